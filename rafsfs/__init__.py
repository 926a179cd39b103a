"""RAFS: a lazy-loading, read-only filesystem for AI models, on an OCI registry.

`rafsfs` is the public API of the distribution `rafs`; it imports nothing heavy at import time, because
the FUSE worker (one process per mount) pays for every module it loads.
"""

__version__ = "0.1.0"
