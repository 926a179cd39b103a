"""Certificates of a swarm, made by the very commands that docs/operations.md gives."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

_DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"


class Authority:
    """An authority and the certificates of its machines, in one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        block = re.search(r"^```sh\n(.*?openssl.*?)^```$", _DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
        assert block is not None, "docs/operations.md says how certificates are made"
        self._first, self._each = block[1].split("\n\n", 1)
        self._run(self._first)

    @property
    def ca(self) -> Path:
        return self.directory / "swarm-ca.pem"

    def issue(self, name: str, sans: str = "IP:127.0.0.1") -> dict[str, str]:
        """Make a certificate; return the variables with which a node uses it."""
        self._run(self._each, NAME=name, SANS=sans)
        files = {"CERT": self.directory / f"{name}.pem", "KEY": self.directory / f"{name}.key", "CA": self.ca}
        return {f"RAFS_SWARM_{what}": str(path) for what, path in files.items()}

    def _run(self, script: str, **env: str) -> None:
        command = ["sh", "-euc", script]
        subprocess.run(command, check=True, capture_output=True, cwd=self.directory, env={**os.environ, **env})
