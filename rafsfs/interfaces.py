"""The seams of the system, as protocols. Implemented above (registry, oci layout), used by builder, fetch and cli.

Rule: an implementation passes the conformance suite in tests/registry/test_conformance.py, and nothing that uses
a protocol asks which implementation it has.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .errors import CacheError
from .metrics import Values
from .types import Descriptor, Digest

if TYPE_CHECKING:
    from .store.data_space import DataSpace


class BlobStream(Protocol):
    """The bytes of one open range of a blob, in order."""

    async def readinto(self, buffer: memoryview) -> None:
        """Fill `buffer` completely with the next bytes of the range.

        Raises UnavailableError if the source ends, stalls or fails before that (the bytes so far are in `buffer`, the
        stream is spent), ValueError if more is asked than the range has left. After a cancellation the stream is spent.
        """


BlockingRead = Callable[[memoryview], None]
"""Fills a buffer as `BlobStream.readinto` does, in the thread that calls it."""


@runtime_checkable
class ThreadedStream(Protocol):
    """A BlobStream that a thread can read: of many chunks, each costs no turn of the event loop."""

    def blocking(self) -> BlockingRead | None:
        """Return what reads the stream in a thread of `trio.to_thread`, while no task does; None where only the event loop can.

        It raises what `readinto` raises, and trio.Cancelled when the task that waits for the thread was cancelled.
        """


class BlobUpload(Protocol):
    """One blob on its way into a store. Invisible under its digest until `commit` returns."""

    @property
    def offset(self) -> int:
        """Bytes the store already holds, from the start of the blob: where the next `write` continues."""

    @property
    def resume_token(self) -> str | None:
        """Opaque text with which `begin_upload` can continue this upload later, or None if the store cannot."""

    async def write(self, *parts: bytes | bytearray | memoryview) -> None:
        """Append `parts`, in order. Raises UnavailableError when the store cannot be reached after retries."""

    async def commit(self, digest: Digest, *, computed: bool = False) -> None:
        """Finish the blob as `digest`. Raises IntegrityError if the store holds other bytes than that.

        `computed`: the caller has just hashed all that it gave to `write` of this upload, from the blob's start; a store in the same
        process need not do so again.
        """

    async def abandon(self) -> None:
        """Let go of the upload without finishing it; what can be resumed stays resumable."""


class ImageStore(Protocol):
    """One repository of a registry, or one OCI image layout directory.

    All bytes are checked against their digest before they are returned, but for ranges of blobs, which only their
    reader can check. All errors are RemoteError or below; UnavailableError is raised only after the store's own
    retries. Every method is safe to call from several tasks at once and to cancel.
    """

    @property
    def name(self) -> str:
        """How messages call this store: `host:port/repository` or `oci:DIR`."""

    async def resolve(self, reference: str) -> Descriptor:
        """Return the manifest descriptor of a tag or a digest text. Raises NotFoundError."""

    async def get_manifest(self, reference: str) -> tuple[Descriptor, bytes]:
        """Return descriptor and exact bytes of the manifest under a tag or a digest text (at most 4 MiB)."""

    async def put_manifest(
        self,
        data: bytes,
        media_type: str,
        *,
        tag: str | None = None,
        subject: Descriptor | None = None,
    ) -> Descriptor:
        """Store a manifest, under `tag` if given. `subject` is what the manifest's own `subject` says, for the referrers fallback."""

    async def has_blob(self, digest: Digest) -> bool:
        """Tell whether the store has the blob."""

    async def get_blob(self, digest: Digest, *, size: int) -> bytes:
        """Return a whole small blob of exactly `size` bytes, verified. Raises IntegrityError, NotFoundError."""

    def open_range(self, digest: Digest, offset: int, length: int) -> AbstractAsyncContextManager[BlobStream]:
        """Open bytes [offset, offset+length) of a blob; length > 0. Never asks past what it was told exists."""

    async def begin_upload(self, resume_token: str | None = None) -> BlobUpload:
        """Start a blob upload, or continue one; a token that the store no longer knows starts anew at offset 0."""

    async def put_blob(self, data: bytes | bytearray | memoryview) -> Digest:
        """Store a whole small blob unless the store has it; return its digest."""

    async def mount_blob(self, digest: Digest, from_repository: str) -> bool:
        """Make a blob of another repository of the same registry this repository's own, without moving bytes."""

    def referrers(self, digest: Digest, artifact_type: str | None = None) -> AsyncIterator[Descriptor]:
        """Yield descriptors of manifests whose `subject` is `digest` (API, else the tag-schema fallback)."""

    async def aclose(self) -> None:
        """Close connections. Idempotent."""


@dataclass(frozen=True, slots=True)
class Obtained:
    """What is left of chunks that a swarm was asked for."""

    ours: list[int]
    """To be fetched from the registry by this node."""
    waiting: list[int]
    """Somebody else fetches them: `requeue` gives them back."""


class Room(Protocol):
    """Space in the cache, as the fetch pipeline sees it. Implemented by daemon/eviction.py."""

    def stored(self, size: int) -> None:
        """Say that so many bytes more are held. No checkpoint."""

    async def make_room(self, size: int) -> None:
        """Return when so many bytes more fit into the quota. Raises CacheFullError if what is in use fills it: for whoever can wait, not
        for readers.
        """

    def relieve(self, done: Callable[[bool], None]) -> None:
        """The disk is full: evict what may go, then call done(whether anything went). No checkpoint here, none in `done`."""


@dataclass(frozen=True, slots=True)
class SectionRuling:
    """What a scheduler says of one section of a file of a web server."""

    section: int
    digests: bytes | None
    """Of its chunks, 32 bytes each; None: not known yet."""
    ours: bool = False
    """It is this node's to fetch and to say what it is."""


class Pins(Protocol):
    """What the other nodes know of files of web servers, see docs/protocol/get.md. Implemented by p2p/pins.py. Methods that are not async
    have no checkpoint.
    """

    news: Callable[[bytes, SectionRuling], None]
    """Called with (file, ruling) of a section that was asked for: it is known now, or asked for again with profit."""
    connected: Callable[[], None]
    """Called when a scheduler has come, or come back, which may know nothing."""

    async def ask(self, file: bytes, length: int, sections: list[int], room: int) -> list[SectionRuling] | None:
        """Return what is known of sections, of which this node would fetch up to `room`; None if no scheduler answers."""

    async def publish(self, file: bytes, length: int, section: int, digests: bytes) -> bytes | None:
        """Say what a section is; return what holds, which may be what another said first, or None if no scheduler answers."""

    def republish(self, file: bytes, length: int, section: int, digests: bytes) -> None:
        """Say it again, without an answer."""

    def alive(self, file: bytes, sections: list[int]) -> None:
        """Say that sections that are ours are coming."""

    def give_back(self, file: bytes, sections: list[int], cause: str) -> None:
        """Say that sections that were ours do not come."""


class RangedBlobs(Protocol):
    """Where the fetch pipeline reads stored bytes."""

    def open_range(self, digest: Digest, offset: int, length: int) -> AbstractAsyncContextManager[BlobStream]:
        """Open bytes [offset, offset+length) of a blob; length > 0."""


class Swarm(Protocol):
    """The other nodes, as the fetch pipeline of a daemon sees them. Implemented by p2p/swarm.py. Methods that are not async have
    no checkpoint.
    """

    requeue: Callable[[bytes, int], None]
    """Called with (space id, chunk) when a chunk that was waiting is to be asked for again."""
    fill_group: Callable[[bytes, list[int]], None]
    """Called with chunks that are this node's to fetch, whether anybody here reads them or not."""
    arrived: Callable[[bytes, int, str, CacheError | None], None]
    """Called with (space id, chunk, address of the giver, error) when a chunk that was waiting is present, or could not be kept."""
    fill_image: Callable[[str, Callable[[int, int, str], None]], None]
    """Called with (image, report) of an image that this node is to fetch whole; report(done, total, error)."""

    @property
    def pins(self) -> Pins:
        """What the swarm knows of files of web servers."""

    @property
    def is_active(self) -> bool:
        """Whether there is a swarm to take part in."""

    async def use(self, schedulers: str) -> None:
        """Take part in the swarm of `HOST:PORT[,...]`, besides others. Raises UsageError."""

    def enter(self, space: DataSpace, image: str) -> None:
        """Take part in the distribution of a data space. `image`: the reference that it belongs to."""

    def leave(self, space_id: bytes) -> None:
        """Take part in it no longer."""

    def lost(self, space_id: bytes, chunks: Iterable[int]) -> None:
        """Say that chunks that were present turned out wrong and are so no longer."""

    async def obtain(
        self, space: DataSpace, chunks: list[int], *, urgent: bool, landed: Callable[[int, str], None]
    ) -> Obtained:
        """Get chunks from other nodes, verified and stored, and call landed(chunk, address) for each. Raises CacheError."""

    def landed(self, space_id: bytes, chunk: int) -> None:
        """Say that a chunk is present now, from wherever it came."""

    def hurry(self, space_id: bytes, chunks: Iterable[int]) -> None:
        """Say that a reader waits from now on for chunks that `obtain` said would be given back."""

    def gave_up(self, space_id: bytes, chunks: Iterable[int], cause: str) -> None:
        """Say that the registry did not give chunks that were ours to fetch."""

    def order(self, space: DataSpace, batches: list[list[int]]) -> AsyncGenerator[list[int], None]:
        """Yield batches of chunks in the order in which to prefetch them, each chosen when it is asked for and can be had."""

    def guard(self) -> AbstractAsyncContextManager[None]:
        """Hold while a registry is read: bounds how many do so at once when nobody coordinates them."""

    def figures(self) -> Values:
        """Return the values of the series of daemon/metrics.py that concern it."""

    def describe(self) -> dict[str, Any]:
        """Return what a status shows of it."""
