"""The peer: chunk exchange between nodes. Holds nothing yet; mounts fetch from the registry."""
