"""Programs of others that tests run, built from the Go registry: csi-sanity, helm.

Decided here: where they are kept. A build takes a minute where nothing is cached, and its result depends on the module files and
the toolchain alone, so it lies in the user's cache directory under their hash; another version is another file. Rule: a file
there is whole, since it is renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

_BUILD_S = 900


def go_program(module: Path, package: str) -> Path:
    """Return the program of a package that a module's go.mod names; skip the test where there is no Go toolchain."""
    go = shutil.which("go")
    if go is None:
        pytest.skip(f"no Go toolchain to build {package} with")
    version = subprocess.run(
        [go, "env", "GOVERSION", "GOARCH"], cwd=module, capture_output=True, check=True, timeout=60
    )
    key = hashlib.sha256(version.stdout + package.encode())
    for name in ("go.mod", "go.sum"):
        key.update((module / name).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rafs-tests"
    program = cache / f"{package.rpartition('/')[2]}-{key.hexdigest()[:16]}"
    if not program.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f".{uuid.uuid4().hex}"
        try:
            done = subprocess.run(
                [go, "build", "-o", partial, package], cwd=module, capture_output=True, text=True, timeout=_BUILD_S, check=False
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-2000:]
            partial.rename(program)
        finally:
            partial.unlink(missing_ok=True)
    return program
