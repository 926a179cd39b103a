"""`rafs get URL`: a file of a web server, from the node's cache, or straight from a server that can do no better, into a directory.

Decided here: what is shared with other nodes and what is not, that a download whose file changes begins again with the new version, and
that with --digest nothing else appears. Rule: no secret goes anywhere but into requests to the host of the URL, and over the daemon's own
socket.
"""

from __future__ import annotations

import base64
import hashlib
import netrc
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Final

import trio
from blake3 import blake3

from rafsfs.errors import IntegrityError, RemoteError, UnavailableError, UsageError
from rafsfs.files.identity import (
    Validator,
    file_key,
    file_name,
    is_name,
    normalise,
    parse_headers,
    sample_extents,
    why_private,
)
from rafsfs.files.origin_file import OriginFile, Probe
from rafsfs.files.plan import MAX_LENGTH, plan_file
from rafsfs.net.origin import Target, parse_url
from rafsfs.net.tls import client_context
from rafsfs.registry.options import RegistryOptions
from rafsfs.store.copying import copy_range

from .cached import open_data
from .held import held
from .new_file import NewFile
from .output import progress_bar

_RESTARTS: Final = 3
"""Versions of a file that are begun, one after the other, before its changing is the user's problem."""
_STREAMS: Final = 3
_PIECE: Final = 1 << 20
_DIGEST: Final = re.compile(r"\Asha256:[0-9a-f]{64}\Z")
_MAX_HEADERS: Final = 64 << 10

ProgressBar = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class UrlRequest:
    """What the user asked for."""

    url: str
    directory: str
    name: str
    digest: str
    force: bool
    headers: tuple[str, ...]
    netrc: bool
    ignored: tuple[str, ...]
    share: bool | None


async def get_url(request: UrlRequest, registry: RegistryOptions, common: dict[str, Any]) -> dict[str, Any]:
    """Fetch one file; return what happened. Raises RafsError."""
    target = _check(request, registry)
    headers = _headers(request, target)
    if headers and not target.origin.is_tls and not target.origin.is_loopback and not registry.plain_http:
        raise UsageError(
            f"credentials for {target} would go over plain HTTP; use https, or --plain-http to send them all the same"
        )
    with progress_bar("getting", enabled=common["bar"]) as progress:
        for attempt in range(_RESTARTS):
            fetch = _Fetch(request, registry, common, target, headers, progress)
            probe = await fetch.probe()
            try:
                return await fetch.run(probe)
            except RemoteError:
                # A file that has changed is begun again, under another key; anything else is what it is.
                if attempt == _RESTARTS - 1 or probe.validator is None or not await fetch.has_changed(probe):
                    raise
    raise AssertionError("unreachable")


class _Fetch:
    """One version of one file."""

    def __init__(
        self,
        request: UrlRequest,
        registry: RegistryOptions,
        common: dict[str, Any],
        target: Target,
        headers: list[str],
        progress: ProgressBar,
    ) -> None:
        self._request = request
        self._registry = registry
        self._common = common
        self._target = target
        self._headers = headers
        self._progress = progress

    def _origin(self, version: tuple[Validator, int] | None = None) -> OriginFile:
        registry = self._registry
        elsewhere = client_context(ca_file=registry.ca_file)
        home = client_context(
            ca_file=registry.ca_file, client_cert=registry.client_cert, client_key=registry.client_key
        )
        return OriginFile(
            self._target, parse_headers(self._headers), home=home, elsewhere=elsewhere, timeout_s=registry.timeout_s,
            version=version,
        )  # fmt: skip

    async def probe(self) -> Probe:
        """Ask the server what there is."""
        origin = self._origin()
        try:
            return await origin.probe()
        finally:
            origin.close()

    async def has_changed(self, before: Probe) -> bool:
        """Tell whether the server has another version now. A server that does not answer has not."""
        try:
            now = await self.probe()
        except RemoteError:
            return False
        return (now.validator, now.length) != (before.validator, before.length)

    async def run(self, probe: Probe) -> dict[str, Any]:
        """Get it, by the best way that its server allows."""
        name = self._request.name or file_name(self._target, probe.disposition)
        if not name:
            raise UsageError(f"{self._target} does not say what to call the file; give --name")
        with NewFile(self._request.directory, name, replace=self._request.force) as new:
            reason = _why_plain(probe)
            if reason:
                found = await self._stream(new, probe) | {"shared": False, "reason": reason}
            else:
                found = await self._through_cache(new, probe)
            await trio.to_thread.run_sync(new.appear, _seconds(probe.last_modified))
        return {"path": new.path, "url": str(self._target), **found}

    # ---- through the cache ---------------------------------------------------------------------------------------

    async def _through_cache(self, new: NewFile, probe: Probe) -> dict[str, Any]:
        assert probe.validator is not None
        assert probe.length is not None
        private = why_private(
            self._target,
            credentials=bool(self._headers) or self._registry.client_cert is not None,
            cache_control=probe.cache_control,
        )
        share = self._request.share if self._request.share is not None else not private
        secret = b""
        if share and private:
            secret = await self._sample(probe.validator, probe.length)
        reason = "" if share else (private or "--no-share")
        url = normalise(self._target, self._request.ignored)
        params = {
            "key": file_key(url, probe.validator, probe.length, secret),
            "url": self._target.url,
            "headers": self._headers,
            "validator": [probe.validator.name, probe.validator.value],
            "length": probe.length,
            "shared": share,
            "scheduler": self._common["scheduler"],
            "registry": asdict(self._registry),
        }
        found = await self._copy(new, params, probe.length)
        wrong = await self._wrong_digest(new)
        if wrong and found["foreign"]:
            # Other nodes have said what it is. Its server may be right and they wrong.
            found = await self._copy(new, params | {"shared": False}, probe.length)
            found["reason"] = "what other nodes have does not match the digest"
            wrong = await self._wrong_digest(new)
        if wrong:
            raise IntegrityError(f"{self._target}: its server gives {wrong}, expected {self._request.digest}")
        return {
            "bytes": probe.length,
            "key": params["key"].hex(),
            "shared": found["shared"],
            "reason": found["reason"] or reason,
            "sources": found["sources"],
            "seconds": found["seconds"],
        }

    async def _copy(self, new: NewFile, params: dict[str, Any], length: int) -> dict[str, Any]:
        """Have the daemon get the file, and copy it out of the cache."""
        plan = plan_file(length)
        async with held(self._common["cache_dir"], "get_file", params, self._progress) as found:
            if len(found["sections"]) != plan.sections or found["section_bytes"] != plan.section_bytes:
                raise UsageError(
                    "the daemon is of another version of rafs; stop it with `rafs daemon --stop`, and run again"
                )
            await trio.to_thread.run_sync(os.ftruncate, new.fd, 0)
            for section, directory in enumerate(found["sections"]):
                offset, size = plan.extent(section)
                source = await trio.to_thread.run_sync(open_data, directory, range(plan.chunks(section)))
                try:
                    await trio.to_thread.run_sync(copy_range, source, 0, new.fd, offset, size)
                finally:
                    os.close(source)
        return found

    async def _sample(self, validator: Validator, length: int) -> bytes:
        """Return what only who may read the file can compute."""
        origin = self._origin((validator, length))
        hasher = blake3()
        try:
            for offset, size in sample_extents(length):
                buffer = memoryview(bytearray(size))
                async with origin.open_range(None, offset, size) as stream:
                    await stream.readinto(buffer)
                hasher.update(buffer)
        finally:
            origin.close()
        return hasher.digest()

    async def _wrong_digest(self, new: NewFile) -> str:
        """Return the digest of what has been written if it is not the one that is wanted, else nothing."""
        if not self._request.digest:
            return ""
        found = "sha256:" + await trio.to_thread.run_sync(_sha256, new.fd)
        return "" if found == self._request.digest else found

    # ---- without the cache ---------------------------------------------------------------------------------------

    async def _stream(self, new: NewFile, probe: Probe) -> dict[str, Any]:
        """Read the file from its start to its end in one go."""
        started = trio.current_time()
        size = 0
        for attempt in range(_STREAMS):
            try:
                size = await self._stream_once(new, probe)
                break
            except UnavailableError:
                if attempt == _STREAMS - 1:
                    raise
        wrong = await self._wrong_digest(new)
        if wrong:
            raise IntegrityError(f"{self._target}: its server gives {wrong}, expected {self._request.digest}")
        seconds = round(trio.current_time() - started, 3)
        return {"bytes": size, "key": "", "sources": {"origin": size}, "seconds": seconds}

    async def _stream_once(self, new: NewFile, probe: Probe) -> int:
        await trio.to_thread.run_sync(os.ftruncate, new.fd, 0)
        if probe.length == 0:
            return 0
        buffer = memoryview(bytearray(_PIECE))
        done = 0
        origin = self._origin()
        try:
            async with origin.whole() as response:
                if response.head.length is None and not response.head.chunked and not self._request.digest:
                    raise RemoteError(
                        f"{self._target}: its server says neither how long the file is nor where it ends; give --digest sha256:HEX"
                    )
                while got := await response.read_some(buffer):
                    await trio.to_thread.run_sync(_write, new.fd, buffer[:got], done)
                    done += got
                    self._progress(done, response.head.length or done)
        finally:
            origin.close()
        return done


def _why_plain(probe: Probe) -> str:
    """Return why a file cannot be fetched in parts, nothing if it can."""
    if probe.length == 0:
        return "it is empty"
    if not probe.has_ranges:
        return "its server gives no parts of it (Range)"
    if probe.length is None:
        return "its server does not say how long it is"
    if probe.length > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} bytes"
    if probe.validator is None:
        return "its server names no version of it (strong ETag, or Last-Modified that is not of just now)"
    return ""


def _check(request: UrlRequest, registry: RegistryOptions) -> Target:
    if request.digest and not _DIGEST.match(request.digest):
        raise UsageError(f"digest {request.digest[:80]!r} is not of the form sha256:<64 hex digits>")
    if request.name and not is_name(request.name):
        raise UsageError(f"name {request.name[:80]!r} is not the name of a file in a directory")
    try:
        return parse_url(request.url.partition("#")[0])
    except ValueError as error:
        raise UsageError(f"{error}; expected http(s)://host/path") from None


def _headers(request: UrlRequest, target: Target) -> list[str]:
    """Return `Name: value` lines to be sent to the host of the URL. Raises UsageError, which holds no secret."""
    lines: list[str] = []
    for text in request.headers:
        if not text.startswith("@"):
            lines.append(text)
            continue
        try:
            with open(text[1:], encoding="latin-1") as file:
                lines += [line for line in file.read(_MAX_HEADERS).splitlines() if line.strip()]
        except OSError as error:
            raise UsageError(f"header file {text[1:]}: {error.strerror}") from error
    if request.netrc and not any(line.lower().startswith("authorization:") for line in lines):
        lines += _from_netrc(target.origin.host)
    try:
        parse_headers(lines)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return lines


def _from_netrc(host: str) -> list[str]:
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        found = netrc.netrc(path).authenticators(host)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except netrc.NetrcParseError as error:
        raise UsageError(f"{path}, line {error.lineno}: not understood") from None
    if found is None:
        return []
    pair = f"{found[0]}:{found[2] or ''}".encode()
    return ["Authorization: Basic " + base64.b64encode(pair).decode("ascii")]


def _seconds(last_modified: str | None) -> float | None:
    try:
        return parsedate_to_datetime(last_modified or "").timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


def _sha256(fd: int) -> str:
    hasher = hashlib.sha256()
    position = 0
    while data := os.pread(fd, _PIECE, position):
        hasher.update(data)
        position += len(data)
    return hasher.hexdigest()


def _write(fd: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(fd, data, position)
        data, position = data[written:], position + written
