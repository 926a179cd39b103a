"""One blob on its way to a registry: POST, PATCH in parts, PUT (distribution-spec 1.1, pushing blobs).

Decided here: parts of 8 MiB; a blob that fits into one goes with the final PUT alone. Only the LAST Location is good
(docker-registry keeps its state in it), so a resume token is good until the next part is sent. After a part whose fate
is unknown the registry is asked how far it got before anything is sent again. A session that is gone starts anew as
long as all its bytes are still here, in the first part; later the upload is lost, which `resume_token` being None says.

Concurrency: one task writes one upload. A cancelled write lets the part that is on its way finish for up to 5 s, because
docker-registry gives up a session whose part broke off; otherwise the part's fate is unknown and the next write asks.
Rule: nothing unacknowledged leaves memory.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from ..errors import IntegrityError, NotFoundError, RafsError, RemoteError, UnavailableError, UploadLostError
from ..net.origin import MAX_URL, Target
from ..types import Digest
from .answer import Answer, error_detail, refusal
from .remote import Remote

PART: Final = 8 << 20
"""Bytes per PATCH: a round trip costs little against it, and it is what a broken connection makes us send again."""
MAX_PART: Final = 64 << 20
"""Largest part that a registry may insist on (OCI-Chunk-Min-Length): it is kept in memory."""
_HASHING_BYTES_PER_S: Final = 16 << 20
"""How slow a registry may be at checking a blob before it answers the final PUT."""
GRACE_S: Final = 5.0
"""How long a cancelled write waits for its part, seconds: 8 MiB at 14 Mbit/s."""
_ACTIONS: Final = "pull,push"
_VERSION: Final = "upload1:"
_RANGE: Final = re.compile(r"\A(?:bytes=)?0-([0-9]{1,18})\Z")
_STARTED: Final = "upload"
_BYTES: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Session:
    """Where an upload stands: the last Location, and the bytes that the registry acknowledged."""

    location: Target
    held: int


class RegistryUpload:
    """A BlobUpload to a registry. `offset` counts what `write` took; the last bytes of it may wait here for a part."""

    def __init__(self, remote: Remote, session: Session, part: int) -> None:
        self._remote = remote
        self._session: Session | None = session
        self._part = part
        self._waiting = bytearray()
        self._held = session.held
        self._is_sure = True

    @property
    def offset(self) -> int:
        """Bytes taken, resumed ones included."""
        return self._held + len(self._waiting)

    @property
    def resume_token(self) -> str | None:
        """What continues this upload after the last part that was acknowledged; None if that is not possible."""
        if self._session is None or not self._is_sure:
            return None
        return encode_token(self._remote, self._session)

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Append `parts`; what fills a PATCH is sent. Raises UploadLostError, UnavailableError, AccessDeniedError, RemoteError.

        After a mere UnavailableError everything has been taken: write or commit continues.
        """
        for part in parts:
            self._waiting += memoryview(part).cast("B")
        while len(self._waiting) > self._part:
            await self._send_part(self._part)

    async def commit(self, digest: Digest, *, computed: bool = False) -> None:
        """Finish the blob. Raises IntegrityError if the registry holds other bytes than that (send them again)."""
        while len(self._waiting) > self._part or (self._held and self._waiting):
            await self._send_part(self._part)
        pace = self._remote.pace()
        while True:
            try:
                if not self._is_sure:
                    await self._ask_state()
                await self._put(digest)
                break
            except UploadLostError:
                # A PUT whose answer got lost ends the session, too.
                if not await self._is_there(digest):
                    raise
                break
            except UnavailableError as error:
                if await self._is_there(digest):
                    break
                await pace.again(error)
        self._session = None
        self._held, self._waiting = self.offset, bytearray()

    async def abandon(self) -> None:
        """Nothing to do: registries expire sessions by themselves."""

    async def _send_part(self, most: int) -> None:
        """Send up to `most` waiting bytes in one PATCH, again and again until the registry has taken some."""
        pace = self._remote.pace()
        while True:
            try:
                if not self._is_sure:
                    await self._ask_state()
                if self._waiting:
                    # A copy: a request that broke off may hold on to its bytes while the buffer moves on.
                    part = bytes(memoryview(self._waiting)[:most])
                    await finish_within(GRACE_S, partial(self._patch, part))
                return
            except UploadLostError:
                raise
            except UnavailableError as error:
                await pace.again(error)

    async def _patch(self, part: bytes) -> None:
        session = self._current()
        self._is_sure = False
        expected = self._held + len(part)
        answer = await self._remote.call(
            "PATCH",
            session.location,
            what=_STARTED,
            scope=self._remote.scope(_ACTIONS),
            headers={"Content-Type": _BYTES, "Content-Range": f"{self._held}-{expected - 1}"},
            body=part,
            retry=False,
        )
        if answer.status in {404, 416}:
            raise UnavailableError(f"{self._remote.name}: the registry answered {answer.status} to a part of an upload")
        if answer.status not in {200, 201, 202, 204}:
            raise refusal(self._remote.name, _STARTED, answer)
        held = held_bytes(answer, expected)
        if held is None:
            held = expected
        if not self._held < held <= expected:
            raise RemoteError(f"{self._remote.name}: the registry holds {held} bytes of an upload, expected {expected}")
        self._acknowledge(Session(self._follow(answer, session.location), held))

    async def _put(self, digest: Digest) -> None:
        session = self._current()
        self._is_sure = False
        headers = {"Content-Type": _BYTES}
        answer = await self._remote.call(
            "PUT",
            session.location.with_query([("digest", digest.text)]),
            what=f"blob {digest}",
            scope=self._remote.scope(_ACTIONS),
            headers=headers,
            body=bytes(self._waiting),
            retry=False,
            patience_s=self.offset / _HASHING_BYTES_PER_S,
        )
        codes, detail = error_detail(answer.body)
        if answer.status in {200, 201, 204}:
            check_announced(self._remote.name, answer, digest)
            return
        if "DIGEST_INVALID" in codes:
            self._session = None
            raise IntegrityError(f"{self._remote.name} holds other bytes than blob {digest}{detail}; send it again")
        if answer.status in {404, 416}:
            raise UnavailableError(
                f"{self._remote.name}: the registry answered {answer.status} to the end of an upload"
            )
        raise refusal(self._remote.name, f"upload of blob {digest}", answer)

    async def _ask_state(self) -> None:
        """Learn how far the registry got; start anew if it does not know and everything is still here."""
        session = self._current()
        found = await ask_session(self._remote, session.location, known=self._held)
        if found is None and self._held == 0:
            found, self._part = await open_session(self._remote)
        if found is None or not self._held <= found.held <= self.offset:
            self._session = None
            raise UploadLostError(
                f"{self._remote.name} no longer has an upload of which it had taken {self._held} bytes; send the blob again"
            )
        self._acknowledge(found)

    def _acknowledge(self, session: Session) -> None:
        del self._waiting[: session.held - self._held]
        self._held = session.held
        self._session = session
        self._is_sure = True

    def _current(self) -> Session:
        if self._session is None:
            raise UploadLostError(f"{self._remote.name}: the upload is finished or lost; begin another")
        return self._session

    def _follow(self, answer: Answer, last: Target) -> Target:
        return last if answer.location is None else self._remote.redirected(answer.target, answer.location, _STARTED)

    async def _is_there(self, digest: Digest) -> bool:
        return await has_blob(self._remote, digest)


async def finish_within(grace_s: float, work: Callable[[], Awaitable[None]]) -> None:
    """Do `work`, which a cancellation from outside reaches only `grace_s` seconds later. Raises what `work` raises."""
    failure: RafsError | None = None
    shield = trio.CancelScope(shield=True)

    async def watch() -> None:
        try:
            await trio.sleep_forever()
        finally:
            shield.deadline = trio.current_time() + grace_s

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            with shield:
                await work()
        except RafsError as error:
            failure = error  # carried out by hand: the nursery would wrap it into a group
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def begin_upload(remote: Remote, token: str | None) -> RegistryUpload:
    """Start an upload, or continue the one of `token` if the registry still knows it."""
    known = decode_token(remote, token) if token is not None else None
    if known is not None:
        found = await ask_session(remote, known.location, known=known.held)
        if found is not None:
            return RegistryUpload(remote, found, PART)
    session, part = await open_session(remote)
    return RegistryUpload(remote, session, part)


async def open_session(remote: Remote) -> tuple[Session, int]:
    """Open an upload session; return it and the bytes per part."""
    answer = await remote.call(
        "POST", remote.target("blobs/uploads/"), what=_STARTED, scope=remote.scope(_ACTIONS), body=b""
    )
    if answer.status != 202 or answer.location is None:
        raise refusal(remote.name, "repository to upload to" if answer.status == 404 else _STARTED, answer)
    least = answer.headers.get("oci-chunk-min-length") or ""
    part = max(PART, int(least)) if re.fullmatch(r"[0-9]{1,15}", least) else PART
    if part > MAX_PART:
        raise RemoteError(f"{remote.name} wants upload parts of {part} bytes, more than {MAX_PART}")
    return Session(remote.redirected(answer.target, answer.location, _STARTED), 0), part


async def ask_session(remote: Remote, location: Target, *, known: int) -> Session | None:
    """Return where a session stands, None if the registry does not know it. `known` are the bytes we know it had."""
    try:
        answer = await remote.call("GET", location, what=_STARTED, scope=remote.scope(_ACTIONS), follow=False)
    except NotFoundError:
        return None
    held = held_bytes(answer, known)
    if answer.status not in {200, 202, 204} or held is None:
        return None
    if answer.location is None:
        return Session(location, held)
    return Session(remote.redirected(answer.target, answer.location, _STARTED), held)


async def has_blob(remote: Remote, digest: Digest) -> bool:
    """Tell whether the repository has a blob. A redirect to its storage says yes: signed for GET, HEAD would fail there."""
    answer = await remote.call(
        "HEAD", remote.target(f"blobs/{digest}"), what=f"blob {digest}", scope=remote.scope("pull"), follow=False
    )
    if answer.status == 200 or 300 <= answer.status < 400:
        return True
    if answer.status == 404:
        return False
    raise refusal(remote.name, f"blob {digest}", answer)


def check_announced(store: str, answer: Answer, digest: Digest) -> None:
    """Raise IntegrityError if the registry says that it stored something else."""
    announced = answer.headers.get("docker-content-digest")
    if announced is not None and announced.startswith("sha256:") and announced != digest.text:
        raise IntegrityError(f"{store}: sent {digest}, the registry says it has {announced[:80]!r}")


def held_bytes(answer: Answer, known: int) -> int | None:
    """Return the bytes that a session holds by its Range header, None without one.

    docker-registry says `0-0` for no byte as well as for one: then what is known decides.
    """
    match = _RANGE.match((answer.headers.get("range") or "").strip())
    if match is None:
        return None
    last = int(match[1])
    return min(known, 1) if last == 0 else last + 1


def encode_token(remote: Remote, session: Session) -> str | None:
    """Return a session as opaque text. None for a Location elsewhere: its signature is a credential."""
    if session.location.origin != remote.origin:
        return None
    fields = {"at": str(remote.origin), "in": remote.repository, "path": session.location.path, "held": session.held}
    return _VERSION + base64.urlsafe_b64encode(json.dumps(fields).encode()).decode("ascii")


def decode_token(remote: Remote, token: str) -> Session | None:
    """Return the session in a token; None for any text that is no token of this repository."""
    if not token.startswith(_VERSION) or len(token) > 4 * MAX_URL:
        return None
    try:
        fields = json.loads(base64.urlsafe_b64decode(token[len(_VERSION) :]))
        origin, repository, path, held = fields["at"], fields["in"], fields["path"], fields["held"]
    except (binascii.Error, ValueError, RecursionError, KeyError, TypeError):
        return None
    if (origin, repository) != (str(remote.origin), remote.repository):
        return None
    if not isinstance(path, str) or not re.fullmatch(r"/[\x21-\x7e]*", path) or not isinstance(held, int) or held < 0:
        return None
    return Session(Target(remote.origin, path), held)
