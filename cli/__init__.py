"""The command line: parses, calls one use case, prints. Composition root of the distribution."""
