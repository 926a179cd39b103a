"""A swarm without sockets: the engine of the scheduler and the core of every peer, under a virtual clock. docs/simulation.md."""
