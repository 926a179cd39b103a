"""One blob upload to a registry: POST, PATCH parts, PUT (distribution-spec 1.1 §"Pushing a blob in chunks").

Decided here: parts of 8 MiB, what survives a broken connection, what a resume token holds. Rules: only the LAST Location is good
(docker-registry keeps state in it); after a failed PATCH the registry is asked how far it got before anything is sent again.

Concurrency: one task writes; nothing is shared. A cancelled write leaves the registry with a prefix of the blob, which the next
`begin_upload` with the token asks about.
"""

from __future__ import annotations

import json
import re
from typing import Final
from urllib.parse import urljoin, urlsplit

from ..errors import IntegrityError, RemoteError, UnavailableError
from ..types import Digest
from .remote import Remote

_PART: Final = 8 << 20
"""Bytes per PATCH: large enough that a round trip costs little, small enough to keep for a second try."""
_ATTEMPTS: Final = 5
_RANGE = re.compile(r"\A(?:bytes=)?0-(\d{1,18})\Z")


class RegistryUpload:
    """An upload session. Up to 8 MiB wait in memory until a part is full."""

    def __init__(self, remote: Remote, location: str, offset: int) -> None:
        self._remote = remote
        self._location = location
        self._sent = offset
        self._waiting = bytearray()

    @property
    def offset(self) -> int:
        """Bytes accepted by `write`, resumed ones included."""
        return self._sent + len(self._waiting)

    @property
    def resume_token(self) -> str | None:
        """Where the session continues. Holds no credential: the Location's state is the registry's own."""
        return json.dumps({"version": 1, "location": self._location})

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`; a full part is sent."""
        view = memoryview(data)
        while view:
            room = _PART - len(self._waiting)
            self._waiting += view[:room]
            view = view[room:]
            if len(self._waiting) == _PART:
                await self._flush()

    async def commit(self, digest: Digest) -> None:
        """Send what is left and finish the blob."""
        if self._waiting:
            await self._flush()
        separator = "&" if urlsplit(self._location).query else "?"
        url = f"{self._location}{separator}digest={digest}"
        response = await self._remote.request("PUT", url, actions="pull,push", content=b"", retry=False)
        if response.status_code == 201:
            return
        if "DIGEST_INVALID" in response.text:
            raise IntegrityError(
                f"{self._remote.name}: the registry holds other bytes than {digest}; send the blob again"
            )
        raise refusal(self._remote, f"finishing blob {digest}", response.status_code, response.text)

    async def abandon(self) -> None:
        """Keep the session for a later resume."""

    async def _flush(self) -> None:
        part = bytes(self._waiting)
        start = self._sent
        for attempt in range(_ATTEMPTS):
            rest = part[self._sent - start :]
            if not rest:
                break
            try:
                await self._patch(rest)
            except UnavailableError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                await self._ask_offset(start, len(part))
        self._waiting.clear()

    async def _patch(self, data: bytes) -> None:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Range": f"{self._sent}-{self._sent + len(data) - 1}",
        }
        response = await self._remote.request(
            "PATCH", self._location, actions="pull,push", headers=headers, content=data, retry=False
        )
        if response.status_code in {429, 500, 502, 503, 504}:
            raise UnavailableError(f"{self._remote.name}: an upload part was answered {response.status_code}")
        if response.status_code not in {201, 202, 204}:
            raise refusal(self._remote, "an upload part", response.status_code, response.text)
        self._follow(response.headers.get("location"))
        self._sent += len(data)

    async def _ask_offset(self, start: int, length: int) -> None:
        status = await ask_status(self._remote, self._location)
        if status is None:
            raise UnavailableError(f"{self._remote.name}: the upload session was lost; start the push again")
        offset, location = status
        if not start <= offset <= start + length:
            raise RemoteError(
                f"{self._remote.name}: the registry holds {offset} bytes of an upload, expected {start} or more"
            )
        self._location, self._sent = location, offset

    def _follow(self, location: str | None) -> None:
        if location:
            self._location = urljoin(self._location, location)


async def ask_status(remote: Remote, location: str) -> tuple[int, str] | None:
    """Return (bytes held, Location to continue at) of an upload session, None if the registry does not know it."""
    response = await remote.request("GET", location, actions="pull,push")
    if response.status_code not in {200, 202, 204}:
        return None
    match = _RANGE.match(response.headers.get("range", ""))
    if not match:
        return None
    # docker-registry says 0-0 both for nothing and for one byte; nothing is the only one we ever leave behind
    offset = int(match[1]) + 1 if match[1] != "0" else 0
    return offset, urljoin(location, response.headers.get("location") or location)


async def begin(remote: Remote, resume_token: str | None) -> RegistryUpload:
    """Start an upload, or continue the one that `resume_token` names if the registry still knows it."""
    location = _location_of(resume_token, remote)
    if location:
        status = await ask_status(remote, location)
        if status:
            return RegistryUpload(remote, status[1], status[0])
    response = await remote.request("POST", remote.url("blobs/uploads/"), actions="pull,push", content=b"")
    if response.status_code != 202 or "location" not in response.headers:
        raise refusal(remote, "an upload", response.status_code, response.text)
    return RegistryUpload(remote, urljoin(remote.base, response.headers["location"]), 0)


def _location_of(token: str | None, remote: Remote) -> str | None:
    """Return the Location in a token, if it belongs to this registry: a token never sends credentials elsewhere."""
    try:
        data = json.loads(token) if token else {}
        location = data.get("location") if data.get("version") == 1 else None
    except (ValueError, AttributeError):
        return None
    if not isinstance(location, str):
        return None
    ours, theirs = urlsplit(remote.base), urlsplit(location)
    return location if (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc) else None


def refusal(remote: Remote, what: str, status: int, text: str) -> RemoteError:
    """Return the error for an answer that is neither success nor worth another try."""
    detail = ""
    try:
        errors = json.loads(text)["errors"]
        detail = ", ".join(f"{error.get('code', '')}: {error.get('message', '')}" for error in errors)[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return RemoteError(f"{remote.name}: the registry refused {what} ({status}{', ' + detail if detail else ''})")
