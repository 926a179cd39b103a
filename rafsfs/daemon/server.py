"""The node daemon: one per cache directory. Owns the cache, the fetch pipeline and the mounts; answers on a UNIX socket.

Decided here: what each method of the socket does, what is done at start (adopt or remake mounts) and at the end (mounts stay up).
The methods are named in docs/protocol/daemon.md.

Concurrency. One trio run. Nurseries: `_nursery` owns supervisors, prefetches and the sync task; each connection has one of its own for
its calls, cancelled when the connection ends (an `ensure` whose worker has gone is given up; its flights go on). State is
changed by trio tasks only, between checkpoints; blocking work of the cache runs in threads, which touch only thread-safe objects.
Lock order: none; `_mounting` (one mount operation per mountpoint) and `_opening` (one image is made known to the fetcher at a
time, local work only) are never held while waiting for another lock.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import trio

from .. import __version__
from ..errors import (
    CacheError,
    DaemonError,
    FormatError,
    MountError,
    MountpointError,
    RafsError,
    UnavailableError,
    UsageError,
)
from ..fetch.fetcher import Fetcher, FetchSettings, Source, open_fetcher
from ..format.chunk_map import ChunkMap
from ..fuse.mountpoint import check_fuse, check_mountpoint, may_allow_other, unmount
from ..fuse.spec import MountSpec, load_specs
from ..image import load_image
from ..interfaces import ImageStore
from ..registry.reference import Reference, parse_reference
from ..registry.store import RegistryOptions, make_store
from ..store.cache import Cache, CachedImage
from ..store.data_space import DataSpace
from ..types import Digest
from .connection import socket_path
from .launch import daemon_argv
from .mounts import Mount, rss_bytes
from .protocol import VERSION, Event, FrameReader, Hello, Message, Reply, Request, encode, error_reply

_log = logging.getLogger(__name__)

_SYNC_S: Final = 2.0
"""How long a chunk may be present before it is brought to the disk and entered in the index."""
_PROGRESS_S: Final = 0.2
_CREDENTIALS = struct.Struct("3i")

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """What a daemon is run with."""

    fetch: FetchSettings = field(default_factory=FetchSettings)


@dataclass(slots=True, eq=False)
class _Opened:
    """An image in use: where its chunks come from, and by how many mounts and pulls it is used."""

    image: CachedImage
    source: Source
    store: ImageStore
    data_bytes: int
    users: int = 0


class Daemon:
    """The daemon's state and methods."""

    def __init__(self, cache: Cache, fetcher: Fetcher, nursery: trio.Nursery, settings: DaemonSettings) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._nursery = nursery
        self._settings = settings
        self._mounts: dict[str, Mount] = {}
        self._opened: dict[tuple[Digest, str], _Opened] = {}
        self._mounting: set[str] = set()
        self._opening = trio.Lock()
        self._restored = trio.Event()
        self.stop_requested = trio.Event()
        self.unmount_at_end = False

    # ---- methods of the socket ---------------------------------------------------------------------------------

    async def handle(self, request: Request, progress: Progress) -> dict[str, Any]:
        """Run one call. Raises RafsError for the caller."""
        methods = {
            "ensure": self._ensure,
            "ready": self._ready,
            "served": self._served,
            "mount": self._mount,
            "umount": self._umount,
            "status": self._status,
            "cache_list": self._cache_list,
            "cache_remove": self._cache_remove,
            "stop": self._stop,
        }
        if request.method not in {"ensure", "ready", "served"}:
            await self._restored.wait()  # so that nobody is told of half the mounts
        if request.method == "pull":
            return await self._pull(request.params, progress)
        if request.method == "cache_verify":
            return await self._cache_verify(request.params, progress)
        method = methods.get(request.method)
        if method is None:
            raise UsageError(f"the daemon (rafs {__version__}) knows no method {request.method[:60]!r}")
        try:
            return await method(request.params)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"call of {request.method} has bad parameters: {error!r}") from error

    async def _ensure(self, params: dict[str, Any]) -> dict[str, Any]:
        mount = self._mounts.get(params["mount"])
        chunks = range(int(params["first"]), int(params["stop"]))
        space = self._cache.opened_space(bytes(params["space"]))
        if space is None or not 0 <= chunks.start <= chunks.stop <= space.table.count:
            raise UsageError(f"chunks {chunks.start} to {chunks.stop} of a data space that is not here")
        counted = mount.sources if mount else None
        deadline = min(float(params["deadline_s"]), 3600.0)
        limit = int(params.get("limit", space.table.count))
        await self._fetcher.ensure(
            space.space_id, chunks, deadline_s=deadline, on_behalf=counted, readahead_limit=limit
        )
        return {}

    async def _ready(self, params: dict[str, Any]) -> dict[str, Any]:
        mount = self._mounts.get(params["mount"])
        if mount is None:
            raise MountError("the daemon knows no such mount")
        mount.mark_ready()
        return {}

    async def _served(self, params: dict[str, Any]) -> dict[str, Any]:
        mount = self._mounts.get(params["mount"])
        if mount:
            mount.served(int(params["cache_bytes"]))
        return {}

    async def _mount(self, params: dict[str, Any]) -> dict[str, Any]:
        mountpoint = os.path.abspath(str(params["mountpoint"]))
        mode, prefetch = params.get("mode", "auto"), params.get("prefetch", "none")
        if mode not in {"auto", "fuse"}:
            raise UsageError(f"mount mode {mode!r} is not in this version, expected auto or fuse")
        if prefetch not in {"none", "all"}:
            raise UsageError(f"prefetch {prefetch!r} is not in this version, expected none or all")
        check_fuse()
        if mountpoint in self._mounting or any(m.spec.mountpoint == mountpoint for m in self._mounts.values()):
            raise MountpointError(f"{mountpoint} is a mountpoint of this daemon already; unmount it first")
        self._mounting.add(mountpoint)
        try:
            await trio.to_thread.run_sync(check_mountpoint, mountpoint)
            options = _options(params)
            opened = await self._open_image(parse_reference(params["ref"]), options)
            try:
                spec = MountSpec(
                    id=os.urandom(8).hex(),
                    ref=params["ref"],
                    digest=str(opened.image.digest),
                    mountpoint=mountpoint,
                    cache_dir=self._cache.path,
                    prefetch=prefetch,
                    deadline_s=float(params.get("deadline_s", 60.0)),
                    read_ahead_kb=int(params.get("read_ahead_kb", 1024)),
                    allow_other=may_allow_other(),
                    has_xattrs=(await trio.to_thread.run_sync(opened.image.manifest)).has_xattrs,
                    registry=asdict(options),
                    daemon_argv=daemon_argv(self._cache.path),
                )
                mount = await self._run_mount(spec, opened)
                mount.raise_if_failed()
            except BaseException:
                self._release(opened)
                raise
        finally:
            self._mounting.discard(mountpoint)
        return self._mount_status(mount)

    async def _run_mount(self, spec: MountSpec, opened: _Opened) -> Mount:
        """Start supervising a mount; return when it is ready or has failed. A cancelled call takes the mount away."""
        mount = Mount(spec, opened.source, opened.data_bytes, os.path.join(self._cache.path, "daemon.log"))
        spec.save()
        self._mounts[spec.id] = mount
        try:
            async with trio.open_nursery() as nursery:

                async def ended() -> None:
                    await mount.ended.wait()
                    nursery.cancel_scope.cancel()

                self._nursery.start_soon(self._supervise, mount, opened)
                nursery.start_soon(ended)
                await mount.ready.wait()
                nursery.cancel_scope.cancel()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._drop(mount)
            raise
        if mount.state == "failed":
            await self._drop(mount)
        return mount

    async def _supervise(self, mount: Mount, opened: _Opened) -> None:
        async with trio.open_nursery() as nursery:
            if mount.spec.prefetch == "all":
                nursery.start_soon(self._prefetch, mount, opened)
            await mount.supervise()
            nursery.cancel_scope.cancel()

    async def _prefetch(self, mount: Mount, opened: _Opened) -> None:
        """Fill the image behind a mount; a failure is tried again, since reads do their own fetching meanwhile."""
        await mount.ready.wait()
        while True:
            try:
                await self._fetcher.prefetch_all(opened.source, on_behalf=mount.sources)
            except* RafsError as group:
                _log.warning("prefetch paused: mountpoint=%s cause=%s", mount.spec.mountpoint, group.exceptions[0])
            if self._present(opened.source) >= opened.data_bytes:
                _log.info("prefetch complete: mountpoint=%s bytes=%d", mount.spec.mountpoint, opened.data_bytes)
                return
            await trio.sleep(5)

    async def _drop(self, mount: Mount) -> None:
        """Take away a mount that did not come up, leaving nothing behind."""
        with suppress(MountError):
            await mount.stop(lazy=True)
        mount.spec.remove()
        self._mounts.pop(mount.spec.id, None)

    async def _umount(self, params: dict[str, Any]) -> dict[str, Any]:
        mountpoint = os.path.abspath(str(params["mountpoint"]))
        mount = next((m for m in self._mounts.values() if m.spec.mountpoint == mountpoint), None)
        if mount is None:
            raise MountError(f"{mountpoint} is not a mount of the daemon of {self._cache.path}; see `rafs status`")
        await mount.stop(lazy=bool(params.get("lazy", False)))
        self._mounts.pop(mount.spec.id, None)
        self._release_of(mount)
        return {"mountpoint": mountpoint}

    async def _status(self, params: dict[str, Any]) -> dict[str, Any]:
        return {
            "daemon": {
                "pid": os.getpid(),
                "version": __version__,
                "cache_dir": self._cache.path,
                "rss_bytes": rss_bytes(os.getpid()),
            },
            "mounts": [self._mount_status(mount) for mount in self._mounts.values()],
            "fetch": dict(self._fetcher.counters),
        }

    def _mount_status(self, mount: Mount) -> dict[str, Any]:
        return mount.status() | {"present_bytes": self._present(mount.source)}

    async def _pull(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        started = time.monotonic()
        opened = await self._open_image(parse_reference(params["ref"]), _options(params))
        counted: Counter[str] = Counter()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report, opened, progress)
                await self._fetcher.prefetch_all(opened.source, on_behalf=counted)
                nursery.cancel_scope.cancel()
            await trio.to_thread.run_sync(self._cache.sync)
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            self._release(opened)
        return {
            "ref": params["ref"],
            "digest": str(opened.image.digest),
            "data_bytes": opened.data_bytes,
            "fetched_bytes": counted["origin"],
            "local_bytes": counted["local"],
            "seconds": round(time.monotonic() - started, 3),
        }

    async def _report(self, opened: _Opened, progress: Progress) -> None:
        while True:
            progress({"done": self._present(opened.source), "total": opened.data_bytes})
            await trio.sleep(_PROGRESS_S)

    async def _cache_list(self, params: dict[str, Any]) -> dict[str, Any]:
        used = self._used_spaces()
        images = []
        for image in await trio.to_thread.run_sync(self._cache.images):
            mounted = any(mount.spec.digest == str(image.digest) for mount in self._mounts.values())
            images.append({"digest": str(image.digest), "references": image.references(), "mounted": mounted})
        spaces = [
            {
                "id": space.space_id.hex(),
                "size": space.size,
                "chunks": space.chunks,
                "present_chunks": space.present_chunks,
                "present_bytes": space.present_bytes,
                "images": space.images,
                "in_use": space.space_id in used,
            }
            for space in await trio.to_thread.run_sync(self._cache.spaces)
        ]
        return {"cache_dir": self._cache.path, "images": images, "spaces": spaces}

    async def _cache_remove(self, params: dict[str, Any]) -> dict[str, Any]:
        """Remove an image by digest or reference, or everything that is not in use, and the spaces nobody else needs."""
        wanted = params.get("image")
        in_use = {mount.spec.digest for mount in self._mounts.values()} | {
            str(o.image.digest) for o in self._opened.values()
        }
        images = await trio.to_thread.run_sync(self._cache.images)
        if wanted:
            doomed = [image for image in images if wanted in {str(image.digest), image.digest.hex, *image.references()}]
            if not doomed:
                raise UsageError(f"no image {wanted} in cache {self._cache.path}; see `rafs cache ls`")
            held = next((image for image in doomed if str(image.digest) in in_use), None)
            if held:
                raise CacheError(f"image {held.digest} is mounted; unmount it before it is removed")
        else:
            doomed = [image for image in images if str(image.digest) not in in_use]
        for image in doomed:
            self._cache.remove_image(image.digest)
        freed = 0
        removed = 0
        used = self._used_spaces()
        for space in await trio.to_thread.run_sync(self._cache.spaces):
            if not space.images and space.space_id not in used:
                freed += await trio.to_thread.run_sync(self._cache.remove_space, space.space_id)
                removed += 1
        return {"images": [str(image.digest) for image in doomed], "spaces": removed, "freed_bytes": freed}

    async def _cache_verify(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Hash every present chunk; what does not match is unmarked and will be fetched again."""
        checked = 0
        bad: list[dict[str, Any]] = []
        for summary in await trio.to_thread.run_sync(self._cache.spaces):
            space = self._cache.opened_space(summary.space_id)
            if space is None:
                continue
            present = [index for index in range(space.table.count) if space.is_present(index)]
            for start in range(0, len(present), 16):
                batch = present[start : start + 16]
                good = await trio.to_thread.run_sync(_verify_chunks, space, batch)
                bad += [
                    {"space": space.space_id.hex(), "chunk": i} for i, ok in zip(batch, good, strict=True) if not ok
                ]
                checked += len(batch)
                progress({"checked": checked})
        return {"checked": checked, "bad": bad}

    async def _stop(self, params: dict[str, Any]) -> dict[str, Any]:
        self.unmount_at_end = bool(params.get("unmount", False))
        self.stop_requested.set()
        return {}

    # ---- images ------------------------------------------------------------------------------------------------

    async def _open_image(self, reference: Reference, options: RegistryOptions) -> _Opened:
        """Return an image ready to be fetched from, one more user. What is cached already needs no registry."""
        store = make_store(reference, options)
        try:
            image = await self._cached_image(reference, store)
            key = (image.digest, store.name)
            async with self._opening:
                opened = self._opened.get(key)
                if opened is None:
                    chunk_map = await trio.to_thread.run_sync(_read_chunk_map, image)
                    source = await trio.to_thread.run_sync(self._fetcher.add_source, chunk_map, store, store.name)
                    opened = self._opened[key] = _Opened(image, source, store, chunk_map.data_bytes)
                opened.users += 1  # in the lock: nobody's release may come between
        except BaseException:
            with trio.CancelScope(shield=True):
                await store.aclose()
            raise
        if opened.store is not store:
            with trio.CancelScope(shield=True):
                await store.aclose()
        return opened

    async def _cached_image(self, reference: Reference, store: ImageStore) -> CachedImage:
        name = str(reference)
        if reference.digest:
            image = self._cache.image(reference.digest)
            if image:
                return image
        try:
            descriptor = await store.resolve(reference.reference)
        except UnavailableError as error:
            image = self._cache.find_by_reference(name)
            if image is None:
                raise
            _log.warning("registry away, using the cached image: ref=%s digest=%s cause=%s", name, image.digest, error)
            return image
        image = self._cache.image(descriptor.digest)
        if image is None:
            loaded = await load_image(store, str(descriptor.digest))
            parts = (loaded.manifest_bytes, loaded.bootstrap_bytes, loaded.chunk_map_bytes)
            return await trio.to_thread.run_sync(self._cache.add_image, *parts, name)
        self._cache.note_reference(image, name)
        return image

    def _release(self, opened: _Opened) -> None:
        opened.users -= 1
        if not opened.users:
            self._fetcher.remove_source(opened.source)
            self._opened.pop((opened.image.digest, opened.store.name), None)
            self._nursery.start_soon(opened.store.aclose)

    def _release_of(self, mount: Mount) -> None:
        opened = next((o for o in self._opened.values() if o.source is mount.source), None)
        if opened:
            self._release(opened)

    def _present(self, source: Source) -> int:
        total = 0
        for space_id in source.spaces:
            space = self._cache.opened_space(space_id)
            total += space.present_bytes if space else 0
        return total

    def _used_spaces(self) -> set[bytes]:
        return {space_id for opened in self._opened.values() for space_id in opened.source.spaces}

    # ---- life ----------------------------------------------------------------------------------------------------

    async def restore_mounts(self) -> None:
        """Take over the mounts that should exist: adopt live workers, mount again what has lost its own."""
        async with trio.open_nursery() as nursery:
            for spec in list(load_specs(self._cache.path)):
                nursery.start_soon(self._restore, spec)
        self._restored.set()

    async def _restore(self, spec: MountSpec) -> None:
        try:
            reference = parse_reference(spec.ref).with_digest(Digest(spec.digest))
            opened = await self._open_image(reference, RegistryOptions(**spec.registry))
        except (RafsError, TypeError) as error:
            _log.error("mount cannot be restored: mountpoint=%s cause=%s", spec.mountpoint, error)
            if not spec.worker_alive():
                with suppress(MountError):
                    await trio.to_thread.run_sync(lambda: unmount(spec.mountpoint, lazy=True))
            return
        mount = Mount(spec, opened.source, opened.data_bytes, os.path.join(self._cache.path, "daemon.log"))
        self._mounts[spec.id] = mount
        self._nursery.start_soon(self._supervise, mount, opened)

    async def sync_for_ever(self) -> None:
        """Bring what was fetched to the disk, every two seconds while there is anything."""
        while True:
            await trio.sleep(_SYNC_S)
            try:
                await trio.to_thread.run_sync(self._cache.sync)
            except CacheError as error:
                _log.warning("sync failed: %s", error)

    async def unmount_all(self) -> None:
        """Take all mounts away, by force if they are busy."""
        for mount in list(self._mounts.values()):
            with suppress(MountError):
                await mount.stop(lazy=True)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection until it ends."""
        try:
            uid = _CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
            if uid not in {0, os.geteuid()}:
                _log.warning("connection refused: uid=%d", uid)
                return
            async with trio.open_nursery() as nursery:
                await _Session(self, stream, nursery).run()
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, FormatError) as group:
            _log.debug("connection ended: %s", group.exceptions[0])
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()


class _Session:
    """One connection: reads requests, runs each in a task, writes replies."""

    def __init__(self, daemon: Daemon, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        self._daemon = daemon
        self._stream = stream
        self._nursery = nursery
        self._lock = trio.Lock()
        self._limit = trio.Semaphore(256)
        self._mount = ""

    async def run(self) -> None:
        reader = FrameReader()
        while data := await self._stream.receive_some(65536):
            for message in reader.feed(data):
                if isinstance(message, Hello):
                    self._mount = message.mount
                    await self._send(Hello(VERSION, f"rafs {__version__}", "", os.getpid()))
                elif isinstance(message, Request):
                    await self._limit.acquire()
                    self._nursery.start_soon(self._run, message)

    async def _run(self, request: Request) -> None:
        pending: dict[str, Any] = {}

        async def tell(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()
            while True:
                await trio.sleep(_PROGRESS_S)
                if pending:
                    data = dict(pending)
                    pending.clear()
                    await self._send(Event(request.id, data))

        try:
            if self._mount and request.method == "ensure":
                request.params["mount"] = self._mount
            async with _progress_task(tell, quiet=request.method == "ensure"):
                result = await self._daemon.handle(request, pending.update)
            reply = Reply(request.id, result)
        except RafsError as error:
            reply = error_reply(request.id, error)
        except Exception as error:  # noqa: BLE001 - the boundary of a call: log it, tell the caller, serve on
            _log.exception("call failed: method=%s", request.method)
            reply = error_reply(request.id, DaemonError(f"the daemon met a fault of its own: {error!r}; see its log"))
        finally:
            self._limit.release()
        await self._send(reply)

    async def _send(self, message: Message) -> None:
        async with self._lock:
            await self._stream.send_all(encode(message))


@asynccontextmanager
async def _progress_task(tell: Callable[..., Any], *, quiet: bool) -> AsyncIterator[None]:
    """Run the progress sender beside a call; an error of the call comes out as itself, not in a group."""
    if quiet:
        yield
        return
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(tell)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - carried out of the nursery and raised below
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise _first(failure) if isinstance(failure, BaseExceptionGroup) else failure


def _first(group: BaseException) -> BaseException:
    """Return the first error of ours in a group, for a caller who wants one."""
    while isinstance(group, BaseExceptionGroup):
        ours, _ = group.split(RafsError)
        group = (ours or group).exceptions[0]
    return group


def _verify_chunks(space: DataSpace, indexes: list[int]) -> list[bool]:
    return [space.verify(index) for index in indexes]


def _read_chunk_map(image: CachedImage) -> ChunkMap:
    chunk_map = image.chunk_map()
    chunk_map.validate()
    return chunk_map


def _options(params: dict[str, Any]) -> RegistryOptions:
    try:
        return RegistryOptions(**params.get("registry", {}))
    except TypeError as error:
        raise UsageError(f"registry options are not understood: {error}") from error


async def run_daemon(
    cache_dir: str, settings: DaemonSettings, *, ready: Callable[[Daemon], None] | None = None
) -> None:
    """Run the daemon of a cache directory until SIGTERM, SIGINT or a stop request. Raises CacheBusyError and the like.

    Mounts stay up when it ends, unless the stop request said otherwise.
    """
    cache = await trio.to_thread.run_sync(Cache.open, cache_dir)
    try:
        listener = _listen(cache.path)
        try:
            await _run(cache, listener, settings, ready)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(socket_path(cache.path))
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(cache.close)


async def _run(
    cache: Cache, listener: trio.SocketListener, settings: DaemonSettings, ready: Callable[[Daemon], None] | None
) -> None:
    async with open_fetcher(cache, settings.fetch) as fetcher, trio.open_nursery() as nursery:
        daemon = Daemon(cache, fetcher, nursery, settings)
        nursery.start_soon(daemon.sync_for_ever)
        nursery.start_soon(trio.serve_listeners, daemon.serve, [listener])
        nursery.start_soon(_stop_on_signal, daemon)
        nursery.start_soon(_warm_up)
        _log.info("daemon started: pid=%d cache=%s version=%s", os.getpid(), cache.path, __version__)
        nursery.start_soon(daemon.restore_mounts)
        if ready:
            ready(daemon)
        await daemon.stop_requested.wait()
        if daemon.unmount_at_end:
            await daemon.unmount_all()
        await trio.sleep(0.05)  # lets the reply to `stop` leave before its connection is cut
        _log.info("daemon stopped: pid=%d", os.getpid())
        nursery.cancel_scope.cancel()


async def _warm_up() -> None:
    """Load what the first mount would else wait for: the HTTP client and numpy, 0.14 s together on the reference machine."""

    def load() -> None:
        importlib.import_module("rafsfs.registry.client")
        importlib.import_module("numpy")

    await trio.to_thread.run_sync(load, abandon_on_cancel=True)


async def _stop_on_signal(daemon: Daemon) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            daemon.stop_requested.set()


def _listen(cache_dir: str) -> trio.SocketListener:
    """Make the control socket, 0600. The lock of the directory is held, so a socket that is there is stale."""
    path = socket_path(cache_dir)
    directory = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        old = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{directory}/daemon.sock")
        finally:
            os.umask(old)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise DaemonError(f"control socket {path}: {error.strerror}") from error
    finally:
        os.close(directory)
    return trio.SocketListener(trio.socket.from_stdlib_socket(listener))
