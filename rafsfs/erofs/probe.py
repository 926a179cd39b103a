"""What this kernel can do for a cache directory, and why not: each rung of the ladder of mount modes is tried on scratch files.

Decided here: which rung a mount gets (`choose`, a pure function of what was found). Rule: a rung counts as there only if its scratch
image was read, so a kernel that mounts and then gives zeros is found out here and not by a reader.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ..errors import MountError, UsageError
from ..format.bootstrap_writer import Extent, Node, SpaceSpec, write_bootstrap
from ..types import BLOCK_SIZE
from . import fanotify, superblock

MODES: Final = ("auto", "fuse", "erofs", "lazy", "kernel")
_SIZE: Final = 2 * BLOCK_SIZE
_EVENT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to mount."""

    name: str
    reason: str = ""
    """Why it cannot be had; empty: it can."""

    @property
    def available(self) -> bool:
        """Whether it can be had."""
        return not self.reason


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs, by name."""

    rungs: dict[str, Rung] = field(default_factory=dict)

    def reason(self, name: str) -> str:
        """Return why a rung cannot be had, empty if it can."""
        rung = self.rungs.get(name)
        return rung.reason if rung else "not looked at"


def choose(mode: str, *, complete: bool, ladder: Ladder) -> tuple[str, str]:
    """Return the rung for a mount that was asked for as `mode`, and why not a better one (empty if there is none).

    `complete`: the image is on this node and synced. Raises MountError if the mode cannot be had, UsageError if there is no such mode.
    """
    if mode not in MODES:
        raise UsageError(f"mount mode {mode!r} is unknown, expected one of {', '.join(MODES)}")
    if mode == "auto":
        rung = "erofs" if complete else "lazy"
        reason = ladder.reason(rung)
        return ("fuse", f"no {rung}: {reason}") if reason else (rung, "")
    if reason := ladder.reason(mode):
        raise MountError(f"mode {mode} cannot be had here: {reason}; see `rafs doctor`, or use --mode auto")
    if mode == "erofs" and not complete:
        raise MountError(
            "mode erofs needs the whole image on this node; fetch it first with `rafs pull`, or use --mode auto"
        )
    if mode in {"lazy", "kernel"} and complete:
        return "erofs", ""
    return mode, ""


def probe(cache_dir: str, why_no_fuse: str) -> Ladder:
    """Try each rung in `cache_dir`, an existing directory. `why_no_fuse`: empty if FUSE can be used. Blocking, some milliseconds."""
    erofs = _why(cache_dir, _try_erofs)
    lazy = erofs or why_no_fuse
    kernel = erofs or _why(cache_dir, _try_kernel)
    return Ladder(
        {
            "erofs": Rung("erofs", erofs),
            "lazy": Rung("lazy", lazy),
            "fuse": Rung("fuse", why_no_fuse),
            "kernel": Rung("kernel", kernel),
        }
    )


def _why(cache_dir: str, attempt: Callable[[str], None]) -> str:
    """Return why an attempt on scratch files fails, empty if it does not."""
    if os.geteuid() != 0:
        return "only root may mount EROFS"
    scratch = os.path.join(cache_dir, f"probe.new-{os.urandom(6).hex()}")
    try:
        os.mkdir(scratch, 0o700)
        attempt(scratch)
    except (OSError, MountError) as error:
        return (error.strerror or str(error)) if isinstance(error, OSError) else str(error).replace(scratch, cache_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return ""


def _write_scratch(scratch: str, content: bytes | None) -> tuple[str, str]:
    root = Node(0o040755)
    root.children[b"probe"] = Node(0o100644, size=_SIZE, extents=[Extent(0, _SIZE, 0, 0)])
    boot, data = os.path.join(scratch, "bootstrap.erofs"), os.path.join(scratch, "data")
    with open(boot, "wb") as file:
        file.write(write_bootstrap(root, [SpaceSpec(bytes(32), _SIZE)]))
    with open(data, "wb") as file:
        file.truncate(_SIZE)
        if content is not None:
            file.write(content)
        file.flush()
        os.fdatasync(file.fileno())
    return boot, data


def _try_erofs(scratch: str) -> None:
    content = b"rafs".ljust(_SIZE, b"!")
    boot, data = _write_scratch(scratch, content)
    mount = superblock.create(boot, [data])
    try:
        if _read(mount.descriptor) != content:
            raise MountError("the kernel's EROFS gives other bytes than the file has")
    finally:
        mount.close()


def _read(mount: int) -> bytes:
    descriptor = os.open("probe", os.O_RDONLY | os.O_CLOEXEC, dir_fd=mount)
    try:
        return os.pread(descriptor, _SIZE, 0)
    finally:
        os.close(descriptor)


def _try_kernel(scratch: str) -> None:
    """Mark, mount, read a hole in a thread: it must ask, and get EIO when it is told so."""
    boot, data = _write_scratch(scratch, None)
    file = os.open(data, os.O_RDWR | os.O_CLOEXEC)
    group = -1
    try:
        try:
            group = fanotify.open_group()
            fanotify.add_mark(group, file)
        except OSError as error:
            raise MountError(f"no pre-content events of fanotify on this file system ({error.strerror})") from error
        mount = superblock.create(boot, [data])
        try:
            _expect_event(group, mount.descriptor)
        finally:
            mount.close()
    finally:
        for descriptor in (file, group):
            if descriptor >= 0:
                os.close(descriptor)


def _expect_event(group: int, mount: int) -> None:
    outcome: list[str] = []

    def read() -> None:
        try:
            _read(mount)
            outcome.append("a hole was read without a question")
        except OSError:
            outcome.append("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    asked = False
    import select  # noqa: PLC0415

    poller = select.poll()
    poller.register(group, select.POLLIN)
    for _ in range(int(_EVENT_S / 0.01)):
        if not reader.is_alive():
            break
        if poller.poll(10):
            with contextlib.suppress(BlockingIOError):
                for event in fanotify.parse_events(memoryview(os.read(group, fanotify.READ_BUFFER))):
                    asked = asked or event.sound
                    fanotify.deny(group, event.descriptor)
                    os.close(event.descriptor)
    if not asked or outcome != [""]:
        raise MountError(
            f"fanotify does not guard EROFS here: {(outcome or ['the reader still waits'])[0] or 'no event'}"
        )
