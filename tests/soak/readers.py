"""The readers of a soak: started, started again when a SIGBUS ends one, and what they have seen, by time.

Concurrency: a thread per reader waits for its death, to note when it was; everything else belongs to the caller's thread.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_PROGRAM = Path(__file__).with_name("reader.py")


@dataclass(frozen=True, slots=True)
class Job:
    """What one reader reads, and how."""

    source: Path
    mounted: Path
    seed: int
    way: str
    is_present: bool
    """Whether all of its file is on the node: what it waits for is whoever serves the mount, and no registry."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One that took long or failed."""

    job: Job
    started: float
    seconds: float
    errno: int
    """0: it went well; -SIGBUS: the reader was ended by it."""

    def overlaps(self, first: float, last: float) -> bool:
        """Tell whether it was under way between two times."""
        return self.started <= last and self.started + self.seconds >= first


@dataclass
class Seen:
    """What readers have seen."""

    reads: int = 0
    operations: list[Operation] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class _Reader:
    def __init__(self, job: Job, out: Path) -> None:
        self.job = job
        self.out = out
        with out.open("wb") as file:
            command = [sys.executable, "-S", str(_PROGRAM), str(job.source), str(job.mounted), str(job.seed), job.way]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE)
        self.died_at = 0.0
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def _wait(self) -> None:
        self.process.wait()
        self.died_at = time.monotonic()

    def last_told(self) -> float:
        """Return when it last told how far it is."""
        for line in reversed(self.out.read_bytes().splitlines()):
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if len(told) == 2:
                    return float(told[0])
        return 0.0

    def take(self, seen: Seen, *, killed: bool) -> None:
        """Add what a reader that has ended has told."""
        self.thread.join(20)
        assert self.process.stderr is not None
        said = self.process.stderr.read().decode(errors="replace").strip()
        self.process.stderr.close()
        last_s, reads = self.died_at, 0
        for line in self.out.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if len(told) == 3:
                    seen.operations.append(Operation(self.job, *told))
                else:
                    last_s, reads = told
        seen.reads += reads
        code = self.process.returncode
        if code == -signal.SIGBUS:
            seen.operations.append(Operation(self.job, last_s, self.died_at - last_s, -signal.SIGBUS))
        elif not (killed and code == -signal.SIGKILL):
            seen.wrong.append(f"{self.job}: {code} {said}")


class Readers:
    """Readers that run."""

    def __init__(self, jobs: list[Job], home: Path, seen: Seen) -> None:
        self._home = home
        self._seen = seen
        self._number = 0
        self._running = [self._start(job) for job in jobs]

    def _start(self, job: Job) -> _Reader:
        self._number += 1
        return _Reader(job, self._home / f"reader-{self._number}")

    def look(self) -> None:
        """Start those that have ended anew."""
        for number, reader in enumerate(self._running):
            if reader.process.poll() is not None:
                reader.take(self._seen, killed=False)
                self._running[number] = self._start(reader.job)

    def have_read_present_since(self, since: float) -> bool:
        """Tell whether every reader of a present file has read something after a time."""
        return all(reader.last_told() > since for reader in self._running if reader.job.is_present)

    def end(self) -> None:
        """End all. One that waits in the kernel is killed as well."""
        for reader in self._running:
            if reader.process.poll() is None:
                reader.process.kill()
                reader.take(self._seen, killed=True)
            else:
                reader.take(self._seen, killed=False)
        self._running = []
