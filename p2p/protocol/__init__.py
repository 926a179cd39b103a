"""What peers and scheduler say to each other: the vocabulary, and nothing that does I/O. docs/protocol/swarm.md."""
