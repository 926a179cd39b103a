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
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import trio

from .. import __version__
from ..erofs.holdings import Holdings
from ..erofs.probe import Ladder, choose, probe
from ..erofs.recovery import recover
from ..errors import (
    CacheError,
    CacheFullError,
    DaemonError,
    FormatError,
    MountError,
    MountpointError,
    RafsError,
    UsageError,
)
from ..fetch.fetcher import Fetcher, open_fetcher
from ..fetch.source import FetchSettings
from ..fuse.mountpoint import check_fuse, check_mountpoint, may_allow_other, unmount, why_no_fuse
from ..fuse.spec import MountSpec, load_specs
from ..interfaces import Swarm
from ..metrics import CONTENT_TYPE, Histogram, Labelled, render
from ..net.http_server import Answer, HttpServer
from ..net.http_server import Request as HttpRequest
from ..registry.reference import Reference, parse_reference
from ..registry.store import RegistryOptions
from ..store.cache import Cache
from ..store.data_space import DataSpace
from ..store.eviction import Quota
from ..types import BLOCK_SIZE, Digest, align_up
from ..units import format_size
from . import first_aid
from .cache_calls import CacheCalls
from .connection import socket_path
from .erofs_mount import ErofsMount
from .eviction import Evictor
from .get_calls import GetCalls
from .images import OpenedImage, OpenImages
from .launch import daemon_argv
from .metrics import NODE
from .mounts import Mount, rss_bytes
from .prefetch_calls import PrefetchCalls
from .protocol import Request
from .session import PROGRESS_S, Progress, Session, first_error
from .views import View, check_patterns, open_view, sweep_views
from .web_files import WebFiles

_log = logging.getLogger(__name__)

_SYNC_S: Final = 2.0
"""How long a chunk may be present before it is brought to the disk and entered in the index."""
_AFRESH_S: Final = 10.0
"""Longest that commands wait at a start for a mount of kernel mode to be safe."""
_CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class MirrorSettings:
    """What a mirror is run with."""

    host: str
    port: int
    default: str = ""
    """Registry for clients that name none."""
    registries: tuple[str, ...] = ()
    """Registries that are mirrored; none: all but those on the node itself."""


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """What a daemon is run with."""

    fetch: FetchSettings = field(default_factory=FetchSettings)
    swarm: Callable[[Cache], AbstractAsyncContextManager[Swarm]] | None = None
    """Makes the peer of this node; None: a node by itself."""
    registry: RegistryOptions = field(default_factory=RegistryOptions)
    """How registries are reached for images that nobody here has named: those that a scheduler wants filled."""
    mirror: MirrorSettings | None = None
    """Where registries are mirrored for programs that know nothing of us; None: nowhere."""
    keeps_images: bool = False
    """Whether all images in the cache are offered to others from the start, mounted or not: a seed."""
    external_holder: bool = False
    """Whether somebody else runs the holder of this cache directory (`rafs holder`), and it is never started here."""
    metrics: tuple[str, int] | None = None
    """Host and port of /metrics and /healthz; None: not served."""
    quota: Quota | None = None
    """How much data the cache may hold. None: as much as the disk takes."""


class Daemon:
    """The daemon's state and methods."""

    def __init__(
        self,
        cache: Cache,
        fetcher: Fetcher,
        nursery: trio.Nursery,
        settings: DaemonSettings,
        evictor: Evictor,
        swarm: Swarm | None = None,
    ) -> None:
        self._cache = cache
        self._evictor = evictor
        self._swarm = swarm
        if swarm is not None:
            swarm.fill_image = self._fill_image
        self._fillings: dict[str, list[Callable[[int, int, str], None]]] = {}
        self._fetcher = fetcher
        self._nursery = nursery
        self._settings = settings
        self._mounts: dict[str, Mount] = {}
        self._images = OpenImages(cache, fetcher, nursery, evictor)
        evictor.forget = self._images.forget
        evictor.leave = fetcher.drop_space
        self._recorded: dict[str, tuple[bytes, ...]] = {}
        """Data spaces of mounts that were there when the daemon started and have not been taken over yet."""
        self.web_files = WebFiles(cache, fetcher, evictor, swarm)
        self._get_calls = GetCalls(self.web_files, self._images, fetcher, evictor, self._open)
        self._cache_calls = CacheCalls(
            cache, self._images, evictor, self._mounted_digests, self.web_files, self._lost_chunks
        )
        self._prefetch_calls = PrefetchCalls(cache, fetcher)
        self._views: dict[str, View] = {}
        """Parts of images that mounts show, by the path of their bootstrap."""
        self._mounting: set[str] = set()
        self._cached_bytes = 0
        self.metrics_port = 0
        self._ladder: Ladder | None = None
        self._holdings = Holdings(cache.path, daemon_argv(cache.path), may_start=not settings.external_holder)
        self._log_path = os.path.join(cache.path, "daemon.log")
        self._restored = trio.Event()
        self.stop_requested = trio.Event()
        self.unmount_at_end = False
        self.taken_away_at_end: set[str] = set()
        """Mountpoints that go with this daemon, whatever becomes of the others."""

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
            "cache_list": lambda params: self._cache_calls.show(),
            "cache_remove": lambda params: self._cache_calls.remove(params.get("image")),
            "cache_collect": lambda params: self._cache_calls.collect(
                params.get("target_bytes"), dry_run=bool(params.get("dry_run", False))
            ),
            "cache_pin": lambda params: self._cache_calls.pin(params["image"], pinned=bool(params["pinned"])),
            "metrics": self._metrics,
            "release": self._get_calls.release,
            "stop": self._stop,
        }
        if request.method not in {"ensure", "ready", "served"}:
            await self._restored.wait()  # so that nobody is told of half the mounts
        if request.method == "pull":
            return await self._pull(request.params, progress)
        if request.method in {"get_file", "get_image"}:
            return await self._get(request, progress)
        if request.method == "prefetch":
            return await self._prefetch_path(request.params, progress)
        if request.method == "cache_verify":
            return await self._cache_calls.verify(progress)
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
        if "own_first" in params:
            own = range(int(params["own_first"]), int(params["own_stop"]))
        else:
            own = mount.own_chunks(space, chunks) if mount else chunks
        await self._fetcher.ensure(space.space_id, chunks, deadline_s=deadline, on_behalf=counted, own=own)
        return {}

    async def _ready(self, params: dict[str, Any]) -> dict[str, Any]:
        mount = self._mounts.get(params["mount"])
        if mount is None:
            raise MountError("the daemon knows no such mount")
        mount.worker_ready(int(params.get("generation", 0)))
        return {}

    async def _served(self, params: dict[str, Any]) -> dict[str, Any]:
        mount = self._mounts.get(params["mount"])
        if mount:
            generation = int(params.get("generation", 0))
            self._cached_bytes += mount.served(int(params["cache_bytes"]), generation)
            if params.get("beats"):
                mount.heard(generation)
        for space_id, first, stop in params.get("read", ()):
            space = self._cache.opened_space(bytes(space_id))
            if space is not None:
                self._fetcher.prefetcher.touched(space, range(max(0, int(first)), min(int(stop), space.table.count)))
        return {}

    async def _mount(self, params: dict[str, Any]) -> dict[str, Any]:
        mountpoint = os.path.abspath(str(params["mountpoint"]))
        mode, prefetch = params.get("mode", "auto"), params.get("prefetch", "none")
        if prefetch not in {"none", "all"}:
            raise UsageError(f"prefetch {prefetch!r} is not in this version, expected none or all")
        include, exclude = list(params.get("include", ())), list(params.get("exclude", ()))
        check_patterns(include, exclude)
        ladder = await self._look_at_ladder()
        choose(mode, complete=True, ladder=ladder)  # what can be refused is refused before anything is fetched
        if mountpoint in self._mounting or self._is_ours(mountpoint):
            raise MountpointError(f"{mountpoint} is a mountpoint of this daemon already; unmount it first")
        self._mounting.add(mountpoint)
        try:
            await trio.to_thread.run_sync(check_mountpoint, mountpoint)
            options = _options(params)
            await self._use_scheduler(params.get("scheduler", ""))
            opened = await self._open(params["ref"], options)
            try:
                spec = MountSpec(
                    id=os.urandom(8).hex(),
                    ref=params["ref"],
                    digest=str(opened.image.digest),
                    mountpoint=mountpoint,
                    cache_dir=self._cache.path,
                    mode=mode,
                    prefetch=prefetch,
                    include=include,
                    exclude=exclude,
                    deadline_s=float(params.get("deadline_s", 60.0)),
                    read_ahead_kb=int(params.get("read_ahead_kb", 1024)),
                    allow_other=may_allow_other(),
                    has_xattrs=(await trio.to_thread.run_sync(opened.image.manifest)).has_xattrs,
                    registry=asdict(options),
                    scheduler=params.get("scheduler", ""),
                    daemon_argv=daemon_argv(self._cache.path),
                )
                await self._open_view(spec, opened)
                spaces = await trio.to_thread.run_sync(self._spaces_of, opened)
                complete = await trio.to_thread.run_sync(_settle, spaces)
                spec.rung, spec.why = choose(mode, complete=complete, ladder=ladder)
                mount = await self._climb(spec, opened, spaces)
            finally:
                # A mount has taken a user of its own; of a failure nothing stays.
                self._images.release(opened)
        finally:
            self._mounting.discard(mountpoint)
        return self._mount_status(mount)

    async def _climb(self, spec: MountSpec, opened: OpenedImage, spaces: list[DataSpace]) -> Mount:
        """Mount by the chosen rung; where none was asked for by name and it fails, by FUSE. Raises why not."""
        if spec.rung != "fuse":
            spec.spaces = [space.space_id.hex() for space in spaces]
            mount = self._erofs_mount(spec, opened, spaces)
            await self._run_mount(mount, opened)
            if mount.state != "failed":
                return mount
            if spec.mode != "auto":
                mount.raise_if_failed()
            _log.warning(
                "%s mode failed, mounting by FUSE: mountpoint=%s cause=%s", spec.rung, spec.mountpoint, mount.reason
            )
            spec = replace(spec, id=os.urandom(8).hex(), rung="fuse", why=mount.reason, generations=[], detached=False)
        check_fuse()
        mount = Mount(spec, opened.source, self._data_bytes(spec, opened), self._log_path)
        await self._run_mount(mount, opened)
        mount.raise_if_failed()
        return mount

    def _erofs_mount(self, spec: MountSpec, opened: OpenedImage, spaces: list[DataSpace]) -> Mount:
        return ErofsMount(
            spec, opened.source, self._data_bytes(spec, opened), self._log_path,
            image=view.image if (view := self._views.get(spec.view)) else opened.image, spaces=spaces, holdings=self._holdings,
        )  # fmt: skip

    async def _open_view(self, spec: MountSpec, opened: OpenedImage) -> None:
        """Make the part of the image that a mount shows, if it does not show all. Raises UsageError, FormatError, CacheError."""
        if spec.include or spec.exclude:
            view = await trio.to_thread.run_sync(open_view, self._cache.path, opened.image, spec.include, spec.exclude)
            spec.view = view.image.bootstrap_path
            self._views[spec.view] = view

    def _data_bytes(self, spec: MountSpec, opened: OpenedImage) -> int:
        view = self._views.get(spec.view)
        return opened.data_bytes if view is None else view.sizes(self._cache)[1]

    def _spaces_of(self, opened: OpenedImage) -> list[DataSpace]:
        """Return the data spaces of an image in the order of its bootstrap's device slots. Raises FormatError. Blocking."""
        found = []
        for slot in opened.image.bootstrap().spaces:
            space = self._cache.opened_space(slot.space_id)
            if space is None or align_up(space.size, BLOCK_SIZE) != slot.blocks * BLOCK_SIZE:
                raise FormatError(
                    f"bootstrap names data space {slot.space_id.hex()[:16]} of {slot.blocks} blocks, the chunk map does not"
                )
            found.append(space)
        return found

    async def _look_at_ladder(self) -> Ladder:
        """Return which rungs there are; tried once per daemon."""
        if self._ladder is None:
            self._ladder = await trio.to_thread.run_sync(probe, self._cache.path, why_no_fuse())
        return self._ladder

    def _is_ours(self, mountpoint: str) -> bool:
        return any(m.spec.mountpoint == mountpoint and not m.spec.detached for m in self._mounts.values())

    async def _run_mount(self, mount: Mount, opened: OpenedImage) -> None:
        """Start supervising a mount; return when it is ready or has failed. A cancelled call takes the mount away."""
        mount.spec.save()
        self._mounts[mount.spec.id] = mount
        self._images.share(opened)
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

    async def _supervise(self, mount: Mount, opened: OpenedImage) -> None:
        async with trio.open_nursery() as nursery:
            if mount.spec.prefetch == "all" and not mount.spec.detached:
                nursery.start_soon(self._prefetch, mount, opened)
            await mount.supervise()
            nursery.cancel_scope.cancel()
        if mount.spec.detached:
            self._let_go(mount)

    def _let_go(self, mount: Mount) -> None:
        """Forget a mount, and that its image is in use by it. Twice is fine. No checkpoint."""
        if self._mounts.pop(mount.spec.id, None) is not None:
            self._images.release_source(mount.source)

    async def _prefetch(self, mount: Mount, opened: OpenedImage) -> None:
        """Fill the image behind a mount; a failure is tried again, since reads do their own fetching meanwhile."""
        await mount.ready.wait()
        view = self._views.get(mount.spec.view)
        while True:
            try:
                if view is None:
                    await self._fetcher.prefetch_all(opened.source, on_behalf=mount.sources)
                else:
                    await self._fetcher.prefetch_spans(view.spans, on_behalf=mount.sources)
            except* RafsError as group:
                _log.warning("prefetch paused: mountpoint=%s cause=%s", mount.spec.mountpoint, group.exceptions[0])
            if self._present_bytes(mount) >= mount.data_bytes:
                _log.info("prefetch complete: mountpoint=%s bytes=%d", mount.spec.mountpoint, mount.data_bytes)
                return
            await trio.sleep(5)

    async def _drop(self, mount: Mount) -> None:
        """Take away a mount that did not come up, leaving nothing behind."""
        reason = mount.reason
        with suppress(MountError):
            await mount.stop(lazy=True)
        mount.state, mount.reason = "failed", reason
        if mount.ended.is_set():
            mount.spec.remove()
            self._let_go(mount)

    async def _umount(self, params: dict[str, Any]) -> dict[str, Any]:
        mountpoint = os.path.abspath(str(params["mountpoint"]))
        mount = next(
            (m for m in self._mounts.values() if m.spec.mountpoint == mountpoint and not m.spec.detached), None
        )
        if mount is None:
            raise MountError(f"{mountpoint} is not a mount of the daemon of {self._cache.path}; see `rafs status`")
        await mount.stop(lazy=bool(params.get("lazy", False)))
        if mount.ended.is_set():
            self._let_go(mount)  # else `_supervise` does, when the kernel has let go
            return {"mountpoint": mountpoint, "detached": False, "kept_by": []}
        return {
            "mountpoint": mountpoint,
            "detached": True,
            "kept_by": await trio.to_thread.run_sync(mount.kept_by),
        }

    async def _status(self, params: dict[str, Any]) -> dict[str, Any]:
        return {
            "daemon": {
                "pid": os.getpid(),
                "version": __version__,
                "cache_dir": self._cache.path,
                "rss_bytes": rss_bytes(os.getpid()),
                "metrics_port": self.metrics_port,
            },
            "cache": {
                "held_bytes": self._evictor.held_bytes,
                "quota_bytes": self._evictor.quota.limit if self._evictor.quota else None,
                "evicted_bytes": self._evictor.counters["evicted_bytes"],
            },
            "mounts": [self._mount_status(mount) for mount in self._mounts.values()],
            "files": self.web_files.describe(),
            "fetch": self._fetcher.figures(),
            "swarm": self._swarm.describe() if self._swarm is not None and self._swarm.is_active else None,
        }

    async def _metrics(self, params: dict[str, Any]) -> dict[str, Any]:
        return {"text": (await self.metrics()).decode()}

    async def metrics(self) -> bytes:
        """Return what Prometheus scrapes."""
        workers = [mount.spec.worker_pid for mount in self._mounts.values() if mount.spec.worker_alive()]
        depths = self._fetcher.depths()
        counters, evicted = self._fetcher.counters, self._evictor.counters
        quota = self._evictor.quota
        values: dict[str, float | Histogram | Labelled] = {
            "rafs_node_info": {__version__: 1},
            "rafs_memory_bytes": {"daemon": rss_bytes(os.getpid()), "workers": sum(map(rss_bytes, workers))},
            "rafs_mounts": Counter(mount.state for mount in self._mounts.values()),
            "rafs_images_open": len(self._images),
            "rafs_read_cached_bytes": self._cached_bytes,
            "rafs_fetched_bytes": {name: counters[f"{name}_bytes"] for name in ("local", "peer", "origin")},
            "rafs_read_miss_seconds": self._fetcher.miss_seconds,
            "rafs_reads_failed": self._fetcher.failed_reads.copy(),
            "rafs_chunks_landed": counters["landed"],
            "rafs_chunks_failed": self._fetcher.failed_chunks.copy(),
            "rafs_fetch_retries": counters["retries"],
            "rafs_fetch_corrupt": counters["corrupt"],
            "rafs_fetch_queue_chunks": {name: depths[name] for name in ("demand", "leased", "prefetch")},
            "rafs_fetch_in_flight_chunks": depths["in_flight"],
            "rafs_fetch_parked_chunks": depths["parked"],
            "rafs_cache_present_bytes": self._evictor.held_bytes,
            "rafs_cache_evicted_bytes": evicted["evicted_bytes"],
            "rafs_cache_evicted_spaces": evicted["evicted_spaces"],
            "rafs_cache_disk_full": evicted["reliefs"],
        }
        if quota is not None:
            values["rafs_cache_quota_bytes"] = quota.limit
        if self._swarm is not None and self._swarm.is_active:
            values.update(self._swarm.figures())
        return await trio.to_thread.run_sync(render, NODE, values)

    async def serve_metrics(self, request: HttpRequest) -> Answer:
        """Answer a request for /metrics or /healthz."""
        if request.path == "/metrics":
            return Answer(200, await self.metrics(), {"Content-Type": CONTENT_TYPE})
        if request.path == "/healthz":
            # Whoever gets this far has a loop that turns; mounts that failed are their own metric.
            if self._restored.is_set():
                return Answer(200, b"ok\n", {"Content-Type": "text/plain"})
            return Answer(503, b"starting\n", {"Content-Type": "text/plain"})
        return Answer(404, b"/healthz, /metrics\n", {"Content-Type": "text/plain"})

    def _mount_status(self, mount: Mount) -> dict[str, Any]:
        return mount.status() | {"present_bytes": self._present_bytes(mount)}

    def _present_bytes(self, mount: Mount) -> int:
        view = self._views.get(mount.spec.view)
        return self._images.present_bytes(mount.source) if view is None else view.sizes(self._cache)[0]

    async def _pull(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        started = time.monotonic()
        await self._use_scheduler(params.get("scheduler", ""))
        opened = await self._open(params["ref"], _options(params))
        counted: Counter[str] = Counter()
        try:
            self._check_fits(opened)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report, opened, progress)
                await self._fetcher.prefetch_all(opened.source, on_behalf=counted)
                nursery.cancel_scope.cancel()
            await trio.to_thread.run_sync(self._cache.sync)
            for mount in list(self._mounts.values()):
                mount.look()
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        finally:
            self._images.release(opened)
        return {
            "ref": params["ref"],
            "digest": str(opened.image.digest),
            "data_bytes": opened.data_bytes,
            "fetched_bytes": counted["origin"],
            "local_bytes": counted["local"],
            "peer_bytes": counted["peer"],
            "seconds": round(time.monotonic() - started, 3),
        }

    def _check_fits(self, opened: OpenedImage) -> None:
        quota = self._evictor.quota
        if quota is not None and opened.data_bytes > quota.limit:
            raise CacheFullError(
                f"image {opened.image.digest} holds {format_size(opened.data_bytes)}, the quota of cache {self._cache.path} is "
                f"{format_size(quota.limit)}; raise --quota"
            )

    async def _get(self, request: Request, progress: Progress) -> dict[str, Any]:
        call = self._get_calls.file if request.method == "get_file" else self._get_calls.image
        await self._use_scheduler(str(request.params.get("scheduler", "")))
        try:
            return await call(request.params, _options(request.params), progress)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"call of {request.method} has bad parameters: {error!r}") from error

    async def _prefetch_path(self, params: dict[str, Any], progress: Progress) -> dict[str, Any]:
        where = os.path.abspath(str(params["mountpoint"]))
        mount = next((mount for mount in self._mounts.values() if mount.spec.mountpoint == where), None)
        image = self._cache.image(Digest(mount.spec.digest)) if mount is not None else None
        if mount is None or image is None:
            raise MountError(f"{where} is not a mount of the daemon of {self._cache.path}; see `rafs status`")
        try:
            return await self._prefetch_calls.prefetch(image, params, mount.sources, progress)
        except BaseExceptionGroup as group:
            raise first_error(group) from group

    async def _report(self, opened: OpenedImage, progress: Progress) -> None:
        while True:
            progress({"done": self._images.present_bytes(opened.source), "total": opened.data_bytes})
            await trio.sleep(PROGRESS_S)

    async def _use_scheduler(self, schedulers: str) -> None:
        if schedulers:
            if self._swarm is None:
                raise UsageError("this daemon takes part in no swarm; start it by `rafs daemon`")
            await self._swarm.use(schedulers)

    async def _open(self, ref: str, options: RegistryOptions) -> OpenedImage:
        """Open an image, and take part in its distribution."""
        reference = parse_reference(ref)
        opened = await self._images.open(reference, options)
        self._fetcher.enter_swarm(opened.source, str(reference.with_digest(opened.image.digest)))
        return opened

    def _fill_image(self, image: str, report: Callable[[int, int, str], None]) -> None:
        """Fetch all of an image because a scheduler says so; twice at once is one filling with two listeners. No checkpoint."""
        waiting = self._fillings.get(image)
        if waiting is not None:
            waiting.append(report)
            return
        self._fillings[image] = [report]
        self._nursery.start_soon(self._fill, image)

    async def _fill(self, image: str) -> None:
        reports = self._fillings[image]

        def tell(done: int, total: int, error: str = "") -> None:
            for report in reports:
                report(done, total, error)

        async def tell_now_and_then(opened: OpenedImage) -> None:
            while True:
                tell(min(self._images.present_bytes(opened.source), opened.data_bytes - 1), opened.data_bytes)
                await trio.sleep(1)

        opened: OpenedImage | None = None
        try:
            opened = await self._open(image, self._settings.registry)
            self._images.keep(opened)  # others fetch it from here, when nobody here uses it any more
            self._check_fits(opened)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell_now_and_then, opened)
                await self._fetcher.prefetch_all(opened.source)
                nursery.cancel_scope.cancel()
            await trio.to_thread.run_sync(self._cache.sync)
            _log.info("image filled: ref=%s bytes=%d", image, opened.data_bytes)
            tell(opened.data_bytes, opened.data_bytes)
        except (RafsError, BaseExceptionGroup) as error:
            cause = first_error(error) if isinstance(error, BaseExceptionGroup) else error
            if not isinstance(cause, RafsError):
                raise
            _log.warning("image could not be filled: ref=%s cause=%s", image, cause)
            tell(0, 0, str(cause))
        finally:
            if opened is not None:
                self._images.release(opened)
            del self._fillings[image]

    async def offer_cached_images(self) -> None:
        """Open every image of the cache, so that others can have it from here; its data may be evicted all the same."""
        for image, reference in await trio.to_thread.run_sync(self._cached_images):
            try:
                opened = await self._open(str(reference.with_digest(image)), self._settings.registry)
                self._images.keep(opened)
                self._images.release(opened, is_use=False)
            except RafsError as error:
                _log.warning("cached image is not offered: ref=%s cause=%s", reference, error)

    def _cached_images(self) -> list[tuple[Digest, Reference]]:
        found = []
        for image in self._cache.images():
            names = image.references()
            if names:
                with suppress(UsageError):
                    found.append((image.digest, parse_reference(names[0])))
        return found

    def _lost_chunks(self, space_id: bytes, chunks: list[int]) -> None:
        if self._swarm is not None:
            self._swarm.lost(space_id, chunks)

    def _mounted_digests(self) -> set[str]:
        return {mount.spec.digest for mount in self._mounts.values()} | set(self._recorded)

    async def _stop(self, params: dict[str, Any]) -> dict[str, Any]:
        self.unmount_at_end = bool(params.get("unmount", False))
        self.stop_requested.set()
        return {}

    # ---- life ----------------------------------------------------------------------------------------------------

    async def recover_descriptors(self) -> None:
        """Get back what processes of an earlier daemon keep. Called before anything that may open a data space."""
        await recover(self._holdings, self._cache.path)
        first_aid.done()
        self._cache.lend = self._holdings.data_file

    def hold_recorded(self) -> None:
        """Keep the data of the mounts that should exist from eviction until they are taken over. Blocking, before anything runs."""
        for spec in load_specs(self._cache.path):
            with suppress(FormatError, OSError):
                image = self._cache.image(Digest(spec.digest))
                if image is not None and spec.digest not in self._recorded:
                    self._recorded[spec.digest] = self._cache.spaces_of(image)
                    self._cache.acquire(self._recorded[spec.digest])

    def _let_go_recorded(self, digest: str) -> None:
        self._cache.release(self._recorded.pop(digest, ()))

    async def restore_mounts(self) -> None:
        """Take over the mounts that should exist: adopt live workers, mount again what has lost its own."""
        left_alone: set[str] = set()
        self._nursery.start_soon(self._holdings.keep)
        async with trio.open_nursery() as nursery:
            for spec in list(load_specs(self._cache.path)):
                nursery.start_soon(self._restore, spec, left_alone)
        await trio.to_thread.run_sync(
            sweep_views, self._cache.path, [spec.view for spec in load_specs(self._cache.path)]
        )
        for digest in self._recorded.keys() - left_alone:
            self._let_go_recorded(digest)
        self._restored.set()

    async def _restore(self, spec: MountSpec, left_alone: set[str]) -> None:
        try:
            reference = parse_reference(spec.ref).with_digest(Digest(spec.digest))
            await self._use_scheduler(spec.scheduler)
            opened = await self._open(str(reference), RegistryOptions(**spec.registry))
            await self._open_view(spec, opened)
            spaces = await trio.to_thread.run_sync(self._spaces_of, opened) if spec.rung != "fuse" else []
        except (RafsError, TypeError) as error:
            _log.error("mount cannot be restored: mountpoint=%s cause=%s", spec.mountpoint, error)
            if spec.worker_alive() or spec.generations:
                left_alone.add(spec.digest)  # it serves on by itself: its data stay
                self._cache.acquire(bytes.fromhex(name) for name in spec.spaces)
            else:
                with suppress(MountError):
                    await trio.to_thread.run_sync(lambda: unmount(spec.mountpoint, lazy=True))
            return
        if spec.rung == "fuse":
            mount = Mount(spec, opened.source, self._data_bytes(spec, opened), self._log_path)
        else:
            mount = self._erofs_mount(spec, opened, spaces)
        self._mounts[spec.id] = mount
        self._nursery.start_soon(self._supervise, mount, opened)
        if spec.rung == "kernel" and not spec.detached:
            # Nobody is told of a mount whose holes may just have been readable before it is mounted afresh.
            with trio.move_on_after(_AFRESH_S):
                await mount.ready.wait()

    async def sync_for_ever(self) -> None:
        """Bring what was fetched to the disk, every two seconds while there is anything."""
        while True:
            await trio.sleep(_SYNC_S)
            try:
                await trio.to_thread.run_sync(self._cache.sync)
            except CacheError as error:
                _log.warning("sync failed: %s", error)
            for mount in list(self._mounts.values()):
                mount.look()

    def let_holder_rest(self) -> None:
        """Say that this daemon goes on purpose, so that nobody starts another for what needs none."""
        self._holdings.rest()

    async def unmount_at_its_end(self) -> None:
        """Take away the mounts that are to go with this daemon, by force if they are busy."""
        for mount in list(self._mounts.values()):
            if not mount.spec.detached and (self.unmount_at_end or mount.spec.mountpoint in self.taken_away_at_end):
                with suppress(MountError):
                    await mount.stop(lazy=True)
                if mount.ended.is_set():
                    self._let_go(mount)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection until it ends."""
        try:
            uid = _CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[1]
            if uid not in {0, os.geteuid()}:
                _log.warning("connection refused: uid=%d", uid)
                return
            async with trio.open_nursery() as nursery:
                await Session(self.handle, stream, nursery).run()
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, FormatError) as group:
            _log.debug("connection ended: %s", group.exceptions[0])
        finally:
            with trio.CancelScope(shield=True):
                await stream.aclose()


def _options(params: dict[str, Any]) -> RegistryOptions:
    try:
        return RegistryOptions(**params.get("registry", {}))
    except TypeError as error:
        raise UsageError(f"registry options are not understood: {error}") from error


def _settle(spaces: list[DataSpace]) -> bool:
    """Bring what is complete to the disk; tell whether all of it is. Raises CacheError. Blocking."""
    for space in spaces:
        if space.complete and not space.settled:
            space.sync()
    return all(space.settled for space in spaces)


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
    async with AsyncExitStack() as stack:
        swarm = await stack.enter_async_context(settings.swarm(cache)) if settings.swarm else None
        evictor = Evictor(cache, settings.quota)
        fetcher = await stack.enter_async_context(open_fetcher(cache, settings.fetch, swarm, evictor))
        nursery = await stack.enter_async_context(trio.open_nursery())
        daemon = Daemon(cache, fetcher, nursery, settings, evictor, swarm)
        await daemon.recover_descriptors()
        await trio.to_thread.run_sync(daemon.hold_recorded)
        await evictor.start()
        nursery.start_soon(evictor.run)
        nursery.start_soon(evictor.note_use_for_ever)
        await trio.to_thread.run_sync(daemon.web_files.records.prepare)
        if settings.metrics is not None:
            daemon.metrics_port = await _serve_metrics(daemon, nursery, *settings.metrics)
        if settings.mirror is not None:
            await _start_mirror(nursery, daemon, settings, settings.mirror)
        nursery.start_soon(daemon.sync_for_ever)
        nursery.start_soon(trio.serve_listeners, daemon.serve, [listener])
        nursery.start_soon(_stop_on_signal, daemon)
        nursery.start_soon(_warm_up)
        _log.info("daemon started: pid=%d cache=%s version=%s", os.getpid(), cache.path, __version__)
        nursery.start_soon(daemon.restore_mounts)
        if settings.keeps_images:
            nursery.start_soon(daemon.offer_cached_images)
            nursery.start_soon(daemon.web_files.offer_all)
        if ready:
            ready(daemon)
        await daemon.stop_requested.wait()
        await daemon.unmount_at_its_end()
        await trio.sleep(0.05)  # lets the reply to `stop` leave before its connection is cut
        daemon.let_holder_rest()
        _log.info("daemon stopped: pid=%d", os.getpid())
        nursery.cancel_scope.cancel()


async def _serve_metrics(daemon: Daemon, nursery: trio.Nursery, host: str, port: int) -> int:
    try:
        bound: int = await nursery.start(HttpServer(daemon.serve_metrics).serve, host, port)
    except OSError as error:
        raise UsageError(f"metrics cannot be served on {host}:{port}: {error}; see --metrics") from error
    _log.info("metrics served: host=%s port=%d", host, bound)
    return bound


async def _warm_up() -> None:
    """Load what the first mount would else wait for: the HTTP client and numpy, 0.14 s together on the reference machine."""

    def load() -> None:
        importlib.import_module("rafsfs.registry.client")
        importlib.import_module("numpy")

    await trio.to_thread.run_sync(load, abandon_on_cancel=True)


async def _start_mirror(
    nursery: trio.Nursery, daemon: Daemon, settings: DaemonSettings, wanted: MirrorSettings
) -> None:
    """Serve as a mirror of registries. Raises UsageError if the port cannot be had."""
    from ..mirror.pages import Mirror  # noqa: PLC0415 - most nodes are none
    from ..net.http_server import HttpServer  # noqa: PLC0415

    mirror = Mirror(daemon.web_files, settings.registry, wanted.default, wanted.registries)
    await nursery.start(mirror.run)
    server = HttpServer(mirror.handle, methods=frozenset({"GET", "HEAD"}))
    try:
        port = await nursery.start(server.serve, wanted.host, wanted.port)
    except OSError as error:
        raise UsageError(f"the mirror cannot listen on {wanted.host}:{wanted.port}: {error}") from error
    _log.info("mirror serves: host=%s port=%d default=%s", wanted.host, port, wanted.default or "none")


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
