"""Nodes made of real processes: the installed `rafs` command, its daemon and its workers, in a private directory each.

Decided here: how processes of a node are found (a mark in their environment, which daemon and workers inherit), how
long anything may take, and that nothing outlives the test. Rule: every wait has a bound, and `Node.close` succeeds
whatever state a test left the node in; it ends only what carries the node's own mark.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

_MARK: Final = "RAFS_TEST_NODE"
_RUN_S: Final = 60.0
T = TypeVar("T")

Arg = str | bytes | os.PathLike[str]


class CommandError(AssertionError):
    """A command ended otherwise than the test expects; the message holds all it said."""


def rafs_command() -> list[str]:
    """Return the start of a command line: the console script beside this interpreter, else the module."""
    script = Path(sys.executable).parent / "rafs"
    return [str(script)] if script.exists() else [sys.executable, "-m", "rafsfs"]


def why_no_mount() -> str | None:
    """Return what this machine lacks for the mounts of these tests, None if nothing."""
    if os.geteuid() != 0:
        return "trees with every kind of inode need root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"/dev/fuse cannot be opened: {error.strerror}"
    return None


def wait_for(condition: Callable[[], T | None], what: str, timeout_s: float = 20.0) -> T:
    """Return the first true value of `condition`, asked every 20 ms: for other processes, which send no event.

    Raises TimeoutError naming `what`.
    """
    end = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int, number: int = signal.SIGKILL, *, timeout_s: float = 10.0) -> None:
    """Send a signal to one process and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    wait_for(lambda: not is_alive(pid), f"process {pid} ends", timeout_s)


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def mountpoints_below(directory: Arg) -> list[str]:
    """Return what is mounted at or below a directory, last mounted first."""
    top = os.path.realpath(os.fsdecode(os.fspath(directory)))
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), line.split(" ")[4])
        if place == top or place.startswith(top + "/"):
            found.append(place)
    return found[::-1]


def file_system_of(path: Arg) -> str:
    """Return the type of the file system that a path is on, as the kernel names it."""
    device = os.lstat(path).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split(" ")[2] == f"{os.major(device)}:{os.minor(device)}":
            return line.partition(" - ")[2].split(" ")[0]
    return ""


def read_within(path: Arg, offset: int, length: int, timeout_s: float) -> bytes:
    """Return bytes of a file, read by another process that is ended when it takes too long.

    A read that hangs in the kernel must not hang the tests. Raises OSError as the reader met it, TimeoutError.
    """
    program = (
        "import os,sys\n"
        "try:\n"
        " fd=os.open(os.fsencode(sys.argv[1]),os.O_RDONLY); at=int(sys.argv[2]); left=int(sys.argv[3])\n"
        " while left:\n"
        "  data=os.pread(fd,min(left,1<<20),at)\n"
        "  if not data: break\n"
        "  sys.stdout.buffer.write(data); at+=len(data); left-=len(data)\n"
        "except OSError as error:\n"
        " sys.exit(f'errno {error.errno}')\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-S", "-c", program, os.fspath(path), str(offset), str(length)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, errors = reader.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        reader.kill()
        raise TimeoutError(f"{path!r}: a read took more than {timeout_s:g} s") from error
    finally:
        if reader.poll() is None:
            reader.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                reader.wait(5)
        for pipe in (reader.stdout, reader.stderr):
            if pipe is not None:
                pipe.close()
    match = re.search(rb"errno (\d+)", errors)
    if match:
        raise OSError(int(match[1]), os.strerror(int(match[1])), os.fspath(path))
    assert reader.returncode == 0, errors.decode()
    return out


class Node:
    """One node of the field: a home, a cache directory, whatever daemon and workers they get."""

    def __init__(
        self, home: Path, *, cache: Path | None = None, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()
    ) -> None:
        """`inside` goes before every command: what puts it on another machine's network, and with it all that it starts."""
        self.home = home
        self.inside = list(inside)
        self.cache = cache if cache is not None else home / "cache"
        self.mark = uuid.uuid4().hex
        self._started: list[subprocess.Popen[bytes]] = []
        home.mkdir(parents=True, exist_ok=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAFS_", "XDG_", "DOCKER_")) and not name.lower().endswith("_proxy")
        }
        self.env = {
            **inherited,
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "RAFS_CACHE_DIR": str(self.cache),
            _MARK: self.mark,
            **(env or {}),
        }

    def command(self, *arguments: Arg) -> list[str]:
        """Return the command line of `rafs ARGUMENTS`."""
        return self.inside + rafs_command() + [os.fsdecode(os.fspath(argument)) for argument in arguments]

    def run(
        self,
        *arguments: Arg,
        timeout_s: float = _RUN_S,
        wrap: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `rafs ARGUMENTS` to its end, whatever that is; `wrap` goes before it (`unshare -m ...`).

        What it leaves running must not hold its output: the daemon has its own log. Raises TimeoutError.
        """
        process = subprocess.Popen(
            [*wrap, *self.command(*arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.env, **(env or {})},
            cwd=self.home,
        )
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
            shown = " ".join(map(str, arguments))
            raise TimeoutError(f"rafs {shown}: more than {timeout_s:g} s; {errors.decode()}\n{self.log()}") from None
        return subprocess.CompletedProcess(
            process.args, process.returncode, out.decode(errors="replace"), errors.decode(errors="replace")
        )

    def rafs(self, *arguments: Arg, timeout_s: float = _RUN_S) -> str:
        """Run `rafs ARGUMENTS`, which must succeed, and return its output. Raises CommandError."""
        result = self.run(*arguments, timeout_s=timeout_s)
        if result.returncode:
            shown = " ".join(os.fsdecode(os.fspath(argument)) for argument in arguments)
            raise CommandError(
                f"rafs {shown} ended with {result.returncode}\n{result.stdout}{result.stderr}\n--- log\n{self.log()}"
            )
        return result.stdout

    def json(self, *arguments: Arg, timeout_s: float = _RUN_S) -> dict[str, Any]:
        """Run `rafs ARGUMENTS --json` and return what it prints."""
        value: dict[str, Any] = json.loads(self.rafs(*arguments, "--json", timeout_s=timeout_s))
        return value

    def start(self, *arguments: Arg, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start `rafs ARGUMENTS` and leave it running; `close` ends it."""
        process = subprocess.Popen(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**self.env, **(env or {})},
            cwd=self.home,
        )
        self._started.append(process)
        return process

    def build(self, source: Arg, reference: str, *options: Arg, timeout_s: float = 120.0) -> dict[str, Any]:
        """Run `rafs build` and return its JSON."""
        return self.json("build", source, "-t", reference, *options, timeout_s=timeout_s)

    def mount(self, reference: str, name: str = "mnt", *options: Arg, timeout_s: float = _RUN_S) -> Path:
        """Make the directory `name` below the home, mount `reference` on it and return its path."""
        where = self.home / name
        where.mkdir(exist_ok=True)
        self.rafs("mount", reference, where, *options, timeout_s=timeout_s)
        return where

    def status(self) -> dict[str, Any]:
        """Return `rafs status --json`."""
        return self.json("status")

    def mount_status(self, mountpoint: Arg) -> dict[str, Any]:
        """Return what `rafs status --json` says of one mount. Raises LookupError."""
        for mount in self.status()["mounts"]:
            if mount["mountpoint"] == os.fspath(mountpoint):
                found: dict[str, Any] = mount
                return found
        raise LookupError(f"rafs status shows no mount on {mountpoint!r}: {self.status()['mounts']}")

    def log(self) -> str:
        """Return the daemon's log."""
        with contextlib.suppress(FileNotFoundError):
            return (self.cache / "daemon.log").read_text(errors="replace")
        return ""

    def processes(self, what: str = "") -> list[int]:
        """Return the live processes of this node whose command line holds `what`, oldest first."""
        mark = f"{_MARK}={self.mark}".encode()
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                if mark not in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    continue
                line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if what in line and is_alive(int(entry)):
                    found.append(int(entry))
        return sorted(found)

    def daemon_pid(self) -> int:
        """Return the pid of the live daemon. Raises LookupError when there is none."""
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            pid = int((self.cache / "lock").read_text().split()[0])
            if pid in self.processes():
                return pid
        raise LookupError(f"no daemon of {self.cache} runs; processes: {self.processes()}")

    def worker_pids(self) -> list[int]:
        """Return the pids of the live processes that serve a mount: FUSE workers, flat servers, guards."""
        return sorted(
            pid for name in ("fuse.worker", "flat.worker", "erofs.guard") for pid in self.processes(f"rafsfs.{name}")
        )

    def mount_records(self) -> list[Path]:
        """Return the records of mounts that should exist."""
        return sorted((self.cache / "mounts").glob("*.json"))

    def close(self) -> None:
        """Unmount everything below the home and end every process of this node, whatever their state."""
        with contextlib.suppress(LookupError):
            # Asked first, so that it does not repair what is taken away below.
            daemon = self.daemon_pid()
            with contextlib.suppress(TimeoutError):
                kill(daemon, signal.SIGTERM, timeout_s=5)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()
        for place in mountpoints_below(self.home):
            subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)
        # A daemon that was being started may have come meanwhile.
        for pid in self.processes():
            with contextlib.suppress(TimeoutError):
                kill(pid)


@contextlib.contextmanager
def running_node(
    home: Path, *, cache: Path | None = None, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()
) -> Iterator[Node]:
    """Give a node; at the end, also after a failure, unmount and stop all of it."""
    node = Node(home, cache=cache, env=env, inside=inside)
    try:
        yield node
    finally:
        node.close()


def drop_page_cache(path: Arg) -> None:
    """Drop the clean cached pages of one file's inode, of the file system that `path` names alone."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def output_within(process: subprocess.Popen[bytes], wanted: bytes, timeout_s: float) -> bytes:
    """Read a process's output until it holds `wanted`; return all of it so far. Raises TimeoutError."""
    assert process.stdout is not None
    end = time.monotonic() + timeout_s
    seen = b""
    while wanted not in seen:
        left = end - time.monotonic()
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, left))
        data = os.read(process.stdout.fileno(), 65536) if ready else b""
        if not data:
            raise TimeoutError(f"{wanted!r} not in the output within {timeout_s:g} s: {seen!r}")
        seen += data
    return seen


def needs(*programs: str) -> str | None:
    """Return which of the programs this machine lacks, None if none."""
    missing = [program for program in programs if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else None
