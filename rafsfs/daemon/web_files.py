"""Files of web servers in a daemon: what `rafs get URL` asks for, and what other nodes may have of it.

Decided here: when a file is shared, when that ends, and how long its sections stay open for who copies them out. docs/protocol/get.md.

Concurrency: trio tasks only. `_files` changes between checkpoints; one transfer per file at a time under its lock, whose holder may
wait for the network: it takes no other lock. A call that is cancelled leaves complete sections.
"""

from __future__ import annotations

import logging
import ssl
from collections import Counter
from typing import Any

import trio

from ..errors import RemoteError, UsageError
from ..fetch.fetcher import Fetcher
from ..files.identity import Validator, parse_headers
from ..files.origin_file import ChangedError, Origin, OriginFile
from ..files.plan import digests_of, plan_file
from ..files.record import FileRecord, FileRecords, checked_key
from ..files.transfer import DisagreementError, Transfer, WebFile, first_of
from ..interfaces import SectionRuling, Swarm
from ..net.origin import parse_url, public_url
from ..net.tls import client_context
from ..registry.options import RegistryOptions
from ..store.cache import Cache
from .eviction import Evictor
from .session import PROGRESS_S, Progress

_log = logging.getLogger(__name__)


class WebFiles:
    """All files that this daemon has met."""

    def __init__(self, cache: Cache, fetcher: Fetcher, evictor: Evictor, swarm: Swarm | None) -> None:
        self._evictor = evictor
        self._cache = cache
        self._fetcher = fetcher
        self._swarm = swarm
        self._files: dict[bytes, WebFile] = {}
        self._opening = trio.Lock()
        self.records = FileRecords(cache.path)
        if swarm is not None:
            swarm.pins.news = self._news
            swarm.pins.connected = self._republish

    async def fetch(self, params: dict[str, Any], options: RegistryOptions, progress: Progress) -> dict[str, Any]:
        """Get a file into the cache; return where it lies there. The caller has counted itself as a user by `open`."""
        file = self._files[checked_key(params["key"])]
        name, value = params["validator"]
        shared = bool(params["shared"]) and self._swarm is not None and self._swarm.is_active
        sources: Counter[str] = Counter()
        origin = await trio.to_thread.run_sync(
            _origin,
            str(params["url"]),
            list(params["headers"]),
            options,
            (Validator(str(name), str(value)), file.plan.length),
        )
        try:
            shared, reason = await self._get(file, origin, sources, progress, shared=shared)
        finally:
            origin.close()
        return {
            "sections": [file.spaces[section].path for section in range(file.plan.sections)],
            "section_bytes": file.plan.section_bytes,
            "foreign": file.plan.sections - len(file.record.own),
            "shared": shared,
            "reason": reason,
            "sources": dict(sources),
        }

    async def fetch_from(self, file: WebFile, origin: Origin) -> None:
        """Get a file into the cache whose bytes come from elsewhere than a plain URL: shared if there is a swarm. Raises RafsError."""
        shared = self._swarm is not None and self._swarm.is_active
        await self._get(file, origin, Counter(), lambda event: None, shared=shared)

    def disbelieve(self, file: WebFile) -> None:
        """Forget what other nodes said of a file, and believe them no more. No checkpoint."""
        file.record.shared = False
        self._drop_foreign(file)

    async def open(self, params: dict[str, Any]) -> WebFile:
        """Return a file, one more user; what is here of it from earlier is opened. Give it back by `close`."""
        key, length = checked_key(params["key"]), int(params["length"])
        async with self._opening:
            file = self._files.get(key)
            if file is None:
                url = public_url(str(params["url"]))
                file = await trio.to_thread.run_sync(self._load, key, url, length)
                self._files[key] = file
            if file.plan.length != length:
                raise UsageError(f"a file of {length} bytes, which is known as one of {file.plan.length}")
            file.users += 1
            if file.users == 1:
                self._hold(file)
                await trio.to_thread.run_sync(self._reopen, file)
        return file

    def close(self, file: WebFile) -> None:
        """Take one user off. The file stays known, and other nodes may have it from here."""
        file.users -= 1
        if not file.users:
            held, file.held = file.held, set()
            self._cache.release(held)
            self._evictor.poke()

    async def offer_all(self) -> None:
        """Open every file that is shared, so that others can have it from here."""
        for record in await trio.to_thread.run_sync(lambda: list(self.records.all())):
            if record.shared and self._swarm is not None:
                file = await self.open({"key": record.key, "length": record.length, "url": record.url})
                self.close(file)
                for space in file.spaces.values():
                    self._swarm.enter(space, "")
        self._republish()

    def describe(self) -> list[dict[str, Any]]:
        """Return what a status shows of files."""
        return [
            {
                "key": file.key.hex(),
                "url": file.record.url,
                "data_bytes": file.plan.length,
                "present_bytes": min(file.plan.length, file.present_bytes()),
                "shared": file.record.shared,
                "sources": dict(file.sources),
            }
            for file in self._files.values()
        ]

    def forget(self, wanted: str | None) -> bool:
        """Forget files nobody is getting: those of a URL or key, or all; return whether there were any. Their data spaces are then free.
        No checkpoint.
        """
        found = False
        for record in list(self.records.all()):
            file = self._files.get(record.key)
            if (wanted is None or wanted in {record.url, record.key.hex()}) and (file is None or not file.users):
                self._files.pop(record.key, None)
                self.records.remove(record.key)
                found = True
        return found

    async def _get(
        self, file: WebFile, origin: Origin, sources: Counter[str], progress: Progress, *, shared: bool
    ) -> tuple[bool, str]:
        """Get all of a file; return whether it is shared, and why not if it was to be."""
        async with file.lock:
            if not shared:
                self._drop_foreign(file)
            file.record.shared = file.record.shared or shared
            try:
                await self._transfer(file, origin, self._swarm if shared else None, sources, progress)
            except DisagreementError as error:
                # Its server is the one to be believed. What it gave this node stays.
                _log.warning("file is not shared any more: url=%s cause=%s", file.record.url, error)
                file.record.shared = False
                self._drop_foreign(file)
                await self._transfer(file, origin, None, sources, progress)
                return False, "other nodes say that it is something else than its server gives"
        return shared, ""

    # ---- inside --------------------------------------------------------------------------------------------------

    async def _transfer(
        self, file: WebFile, origin: Origin, swarm: Swarm | None, sources: Counter[str], progress: Progress
    ) -> None:
        transfer = Transfer(
            file,
            origin,
            cache=self._cache,
            fetcher=self._fetcher,
            records=self.records,
            swarm=swarm,
            room=self._evictor,
            sources=sources,
        )

        async def tell() -> None:
            while True:
                done = file.present_bytes() + transfer.staged_bytes
                progress({"done": min(done, file.plan.length), "total": file.plan.length})
                await trio.sleep(PROGRESS_S)

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(tell)
                await transfer.run()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            cause = first_of(group)
            if isinstance(cause, ChangedError):  # a class that the protocol does not know
                raise RemoteError(str(cause)) from group
            raise cause from group

    def _load(self, key: bytes, url: str, length: int) -> WebFile:
        try:
            plan = plan_file(length)
        except ValueError as error:
            raise UsageError(str(error)) from error
        record = self.records.load(key)
        if record is None or record.length != length:
            record = FileRecord(key, url, length, shared=False)
        file = WebFile(record, plan)
        for section, space_id in list(record.spaces.items()):
            space = self._cache.opened_space(space_id)
            digests = digests_of(space.table) if space is not None else b""
            if space is None or not plan.fits(section, digests) or plan.table(section, digests).space_id != space_id:
                del record.spaces[section]  # removed from the cache, or never what it should be
                record.own.discard(section)
                continue
            file.tables[section] = space.table
            file.spaces[section] = space
        return file

    def _hold(self, file: WebFile) -> None:
        """Keep what is known of a file from being removed. No checkpoint."""
        wanted = {table.space_id for table in file.tables.values()} - file.held
        file.held |= wanted
        self._cache.acquire(wanted)

    def _reopen(self, file: WebFile) -> None:
        """Look what of a file is still here. Blocking."""
        for section, table in file.tables.items():
            space = self._cache.opened_space(table.space_id)
            if space is None:
                file.spaces.pop(section, None)  # evicted since; its digests are known all the same
            else:
                file.spaces[section] = space

    def _drop_foreign(self, file: WebFile) -> None:
        """Forget what others said that sections are. No checkpoint."""
        for section in list(file.tables):
            if section not in file.record.own:
                del file.tables[section]
                space = file.spaces.pop(section, None)
                file.record.spaces.pop(section, None)
                if space is not None and self._swarm is not None:
                    self._swarm.leave(space.space_id)
        self.records.save(file.record)

    def _news(self, key: bytes, ruling: SectionRuling) -> None:
        file = self._files.get(key)
        if file is not None:
            file.take_news(ruling)

    def _republish(self) -> None:
        """Tell a scheduler that may know nothing what is known here. No checkpoint."""
        if self._swarm is not None:
            for file in self._files.values():
                if file.record.shared:
                    for section, table in file.tables.items():
                        self._swarm.pins.republish(file.key, file.plan.length, section, digests_of(table))
                    file.news.set()


def _origin(
    url: str, headers: list[str], options: RegistryOptions, version: tuple[Validator, int] | None
) -> OriginFile:
    """Return the file of a server. Reads certificates: blocking. Raises UsageError."""
    try:
        target, fields = parse_url(url), parse_headers(headers)
    except ValueError as error:
        raise UsageError(str(error)) from None
    elsewhere: ssl.SSLContext = client_context(ca_file=options.ca_file)
    home = elsewhere
    if options.client_cert is not None:
        home = client_context(ca_file=options.ca_file, client_cert=options.client_cert, client_key=options.client_key)
    return OriginFile(target, fields, home=home, elsewhere=elsewhere, timeout_s=options.timeout_s, version=version)
