"""The scheduler: membership and origin leases of a swarm. Holds nothing yet."""
