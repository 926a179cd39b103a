"""The mirror: answers a registry's clients from what this node and others have, else from the registry, once.

Decided here: what a client gets. Each request is shown to the registry first, with the client's own credentials: who may not
pull there gets the registry's refusal. A manifest is the registry's answer; one that was asked for by digest is hashed. A blob
is a file of the swarm whose key is its digest: sections come from other nodes or the registry and are streamed in order as they
become complete. Rule: what other nodes say of a blob is believed only as far as its digest bears it out: the last piece of a
whole blob is held back until all of it has been hashed, and a range is served only of sections that this node took from the
registry itself or of a blob that has been hashed.

Concurrency: one task per request (of the HTTP server) and one per blob under way, in `run`'s nursery, with the credentials of a
client that waits for it; when it fails, the next waiting client's are tried. State changes between checkpoints. A client that
goes leaves the transfer to the others; one that nobody waits for is finished, as the swarm counts on it.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import trio
from blake3 import blake3

from ..daemon.web_files import WebFiles
from ..errors import (
    AccessDeniedError,
    IntegrityError,
    NotFoundError,
    RafsError,
    RemoteError,
    UnavailableError,
    UsageError,
)
from ..files.transfer import WebFile
from ..net.http_server import Answer, Request
from ..registry.options import RegistryOptions
from ..types import Digest
from .request import MirrorRequest, parse_range, parse_registry, parse_request
from .upstream import BlobOrigin, RefusedError, Upstreams, error_body

_log = logging.getLogger(__name__)

_CONTEXT: Final = "rafs 2026-11 a blob of a registry, by digest and length"
_PIECE: Final = 1 << 20
_JSON: Final = {"Content-Type": "application/json"}


@dataclass(slots=True, eq=False)
class _Transfer:
    """A blob on its way."""

    changed: trio.Event = field(default_factory=trio.Event)
    error: RafsError | None = None
    over: bool = False


class Mirror:
    """The mirror of a node. `default`: registry for clients that name none."""

    def __init__(self, files: WebFiles, options: RegistryOptions, default: str, allowed: tuple[str, ...] = ()) -> None:
        self._files = files
        self._upstreams = Upstreams(options)
        self._default = default
        self._allowed = frozenset(allowed)
        self._transfers: dict[bytes, _Transfer] = {}
        self._verified: set[bytes] = set()
        self._nursery: trio.Nursery | None = None
        self.counters: Counter[str] = Counter()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the transfers, for ever."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._upstreams.close()

    async def handle(self, request: Request) -> Answer:
        """Answer one request."""
        try:
            wanted = parse_request(request.path, request.query, self._default)
            if wanted is None:
                return await self._base(request)
            if self._allowed and wanted.registry not in self._allowed:
                raise UsageError(f"this mirror is not for {wanted.registry}")
            target = self._upstreams.target(wanted)
            if target.origin.is_loopback and wanted.registry not in self._allowed:
                raise UsageError("a registry on the node itself is mirrored only if the mirror was told to")
            if wanted.is_blob:
                return await self._blob(request, wanted)
            return await self._manifest(request, wanted)
        except RefusedError as error:
            return Answer(error.status, error.body, error.headers)
        except (UsageError, ValueError) as error:
            return Answer(400, error_body("UNSUPPORTED", str(error)), _JSON)
        except NotFoundError as error:
            return Answer(404, error_body("BLOB_UNKNOWN", str(error)), _JSON)
        except AccessDeniedError as error:
            return Answer(403, error_body("DENIED", str(error)), _JSON)
        except RafsError as error:
            # The client turns to the registry itself: that is what mirrors are like.
            _log.warning("mirror cannot serve: path=%s cause=%s", request.path, error)
            return Answer(502, error_body("UNAVAILABLE", str(error)), _JSON)

    async def _base(self, request: Request) -> Answer:
        """Answer `/v2/` as the registry does: some clients learn there how it wants to be asked, and ask nothing else without."""
        registry = parse_registry(request.query, self._default)
        if registry and (not self._allowed or registry in self._allowed):
            target = self._upstreams.base(registry)
            if not target.origin.is_loopback or registry in self._allowed:
                with suppress(UnavailableError):
                    await self._upstreams.check(target, request.headers.get("authorization"))
        return Answer(200, b"{}", {**_JSON, "Docker-Distribution-Api-Version": "registry/2.0"})

    async def _manifest(self, request: Request, wanted: MirrorRequest) -> Answer:
        target = self._upstreams.target(wanted)
        body, headers = await self._upstreams.manifest(
            target, request.headers.get("authorization"), request.headers.get("accept")
        )
        digest = Digest.of(body)
        if wanted.digest is not None and wanted.digest != digest:
            raise IntegrityError(f"{target} holds other bytes than its digest says: {digest}")
        self.counters["manifests"] += 1
        headers.pop("docker-content-digest", None)
        return Answer(200, body, {**headers, "Docker-Content-Digest": digest.text}, len(body))

    # ---- blobs ---------------------------------------------------------------------------------------------------

    async def _blob(self, request: Request, wanted: MirrorRequest) -> Answer:
        target = self._upstreams.target(wanted)
        authorization = request.headers.get("authorization")
        length = await self._upstreams.blob_length(target, authorization)
        digest = wanted.digest
        assert digest is not None
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest.text,
            "ETag": f'"{digest.text}"',
            "Accept-Ranges": "bytes",
        }
        if request.headers.get("if-none-match", "").strip() in {headers["ETag"], digest.text}:
            return Answer(304, b"", headers)
        if length is None:
            raise RemoteError(f"{target.origin} knows no ranges, so its blobs are not mirrored")
        try:
            part = parse_range(request.headers.get("range"), length)
        except ValueError:
            return Answer(416, b"", {"Content-Range": f"bytes */{length}"})
        offset, size = part or (0, length)
        if part is not None:
            headers["Content-Range"] = f"bytes {offset}-{offset + size - 1}/{length}"
        status = 200 if part is None else 206
        if request.method == "HEAD" or not length:
            return Answer(status, b"", headers, size)
        origin = BlobOrigin(self._upstreams, target, authorization, length)
        return Answer(status, self._body(wanted, digest, length, (offset, size), origin), headers, size)

    async def _body(
        self, wanted: MirrorRequest, digest: Digest, length: int, part: tuple[int, int], origin: BlobOrigin
    ) -> AsyncIterator[bytes]:
        key = blake3(f"{digest.text} {length}".encode(), derive_key_context=_CONTEXT).digest()
        url = f"https://{wanted.registry}/v2/{wanted.repository}/blobs/{digest.text}"
        file = await self._files.open({"key": key, "length": length, "url": url})
        try:
            if part == (0, length):
                async for data in self._whole(file, digest, origin):
                    yield data
            else:
                async for data in self._range(file, digest, part, origin):
                    yield data
        finally:
            self._files.close(file)

    async def _whole(self, file: WebFile, digest: Digest, origin: BlobOrigin) -> AsyncIterator[bytes]:
        hasher = hashlib.sha256()
        held = b""
        for section in range(file.plan.sections):
            await self._section(file, section, origin)
            async for data in self._read(file, section, 0, file.plan.extent(section)[1]):
                if held:
                    yield held
                    self.counters["bytes"] += len(held)
                await trio.to_thread.run_sync(hasher.update, data)
                held = data
        if hasher.hexdigest() != digest.hex:
            self._disbelieve(file, digest)
            raise IntegrityError(f"{origin} does not match its digest as other nodes gave it; it is fetched anew")
        self._verified.add(file.key)
        self.counters["blobs"] += 1
        self.counters["bytes"] += len(held)
        yield held

    async def _range(
        self, file: WebFile, digest: Digest, part: tuple[int, int], origin: BlobOrigin
    ) -> AsyncIterator[bytes]:
        offset, size = part
        first, last = offset // file.plan.section_bytes, (offset + size - 1) // file.plan.section_bytes
        for section in range(first, last + 1):
            await self._section(file, section, origin)
            if section not in file.record.own and file.key not in self._verified:
                await self._verify(file, digest, origin)
            start, length = file.plan.extent(section)
            low, high = max(offset, start), min(offset + size, start + length)
            async for data in self._read(file, section, low - start, high - low):
                self.counters["bytes"] += len(data)
                yield data

    async def _verify(self, file: WebFile, digest: Digest, origin: BlobOrigin) -> None:
        """Hash all of a blob, of which others gave parts. Raises IntegrityError."""
        async for _ in self._whole(file, digest, origin):
            pass

    def _disbelieve(self, file: WebFile, digest: Digest) -> None:
        _log.error("blob does not match its digest: digest=%s url=%s", digest, file.record.url)
        self.counters["disbelieved"] += 1
        self._files.disbelieve(file)

    async def _read(self, file: WebFile, section: int, offset: int, length: int) -> AsyncIterator[bytes]:
        fd = os.open(os.path.join(file.spaces[section].path, "data"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while length:
                data = await trio.to_thread.run_sync(os.pread, fd, min(length, _PIECE), offset)
                if not data:
                    raise UnavailableError(f"section {section} of {file.record.url} was removed while it was read")
                yield data
                offset, length = offset + len(data), length - len(data)
        finally:
            os.close(fd)

    async def _section(self, file: WebFile, section: int, origin: BlobOrigin) -> None:
        """Return when a section is here; see to it that somebody fetches, with this client's credentials if need be."""
        mine: _Transfer | None = None
        while not file.is_complete(section):
            transfer = self._transfers.get(file.key)
            if transfer is None:
                if mine is not None and mine.error is not None:
                    raise mine.error
                transfer = mine = self._transfers[file.key] = _Transfer()
                assert self._nursery is not None
                self._nursery.start_soon(self._run, file, transfer, origin)
            if transfer.changed.is_set():
                transfer.changed = trio.Event()
            with trio.move_on_after(0.25):
                await transfer.changed.wait()

    async def _run(self, file: WebFile, transfer: _Transfer, origin: BlobOrigin) -> None:
        params = {"key": file.key, "length": file.plan.length, "url": file.record.url}
        held = await self._files.open(params)
        try:
            await self._files.fetch_from(held, origin)
        except RafsError as error:
            transfer.error = error
            _log.warning("blob is not fetched: url=%s cause=%s", file.record.url, error)
        finally:
            self._files.close(held)
            del self._transfers[file.key]
            transfer.changed.set()
