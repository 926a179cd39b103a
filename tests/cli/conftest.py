"""A small image in a layout, and the installed command as users run it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import rafs_command
from tests.support.trees import pattern


@dataclass(frozen=True)
class Rafs:
    """Runs `rafs` in a home of its own."""

    home: Path

    def __call__(self, *arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAFS_", "XDG_", "DOCKER_"))}
        return subprocess.run(
            [*rafs_command(), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.home,
            env={**inherited, "HOME": str(self.home), "RAFS_CACHE_DIR": str(self.home / "cache"), **(env or {})},
        )

    def json(self, *arguments: object) -> Any:
        """Run a command with --json, which must succeed."""
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def rafs(tmp_path: Path) -> Rafs:
    """The command, in a home of its own."""
    home = tmp_path / "home"
    home.mkdir()
    return Rafs(home)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a bit of everything that needs no root; read-only by agreement."""
    top = tmp_path_factory.mktemp("source") / "model"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "config.json").write_text('{"layers": 6}\n')
    (top / "weights.bin").write_bytes(pattern(3_000_000, 1))
    (top / "text.txt").write_bytes(b"the same line again and again\n" * 100_000)
    (top / "sub" / "copy.bin").write_bytes(pattern(3_000_000, 1))
    (top / "sub" / "deep" / "empty").touch()
    os.link(top / "weights.bin", top / "sub" / "hard")
    os.symlink("../config.json", top / "sub" / "link")
    os.mkfifo(top / "fifo")
    (top / os.fsdecode(b"not \xff utf-8")).write_text("x")
    os.chmod(top / "config.json", 0o640)
    for path in [*top.rglob("*"), top]:
        os.utime(path, ns=(1_700_000_000_123_456_789,) * 2, follow_symlinks=False)
    return top


@pytest.fixture(scope="session")
def layout(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout that holds the image `v1` of `source`; read-only by agreement."""
    home = tmp_path_factory.mktemp("builder")
    path = home / "layout"
    done = Rafs(home)("build", source, "-t", f"oci:{path}:v1")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def ref(layout: Path) -> str:
    """The image `v1`."""
    return f"oci:{layout}:v1"


Refused = Callable[..., str]


@pytest.fixture
def refused(rafs: Rafs) -> Refused:
    """Run a command that must end with a code, one line on stderr and nothing on stdout; return the line."""

    def run(code: int, *arguments: object, env: Mapping[str, str] | None = None) -> str:
        done = rafs(*arguments, env=env)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("rafs: ")
        assert done.stdout == ""
        return done.stderr

    return run
