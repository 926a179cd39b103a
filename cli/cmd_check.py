"""`rafs check`: whether an image is whole and sound."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import click
import trio

from rafsfs.errors import FormatError, IntegrityError, NotFoundError, RemoteError
from rafsfs.format.check import check_bootstrap
from rafsfs.image import Image, ImageReader
from rafsfs.interfaces import ImageStore
from rafsfs.registry.options import RegistryOptions
from rafsfs.types import Digest

from .options import json_option, option, registry_options, take_registry_options
from .output import print_json, progress_bar, show_path
from .run import run_async
from .wiring import opened_image

_READERS = 4
"""Chunks read at once by --data."""


@click.command("check")
@click.argument("ref")
@option("--data", "with_data", is_flag=True, envvar="RAFS_CHECK_DATA", help="Read and verify every chunk.")
@json_option
@registry_options
def command(ref: str, with_data: bool, as_json: bool, **options: Any) -> int:
    """Check the image REF: its metadata, that every blob is there, and with --data every byte.

    Exits with 12 if anything is wrong. Names each bad chunk with its blob and the files that need it.

    Example: rafs check --data registry.example/models/llama:v1
    """
    result = run_async(_check, ref, with_data, take_registry_options(options), not as_json)
    if as_json:
        print_json(result)
    else:
        for finding in result["findings"]:
            print(finding)
        print(f"{ref}: {result['chunks_checked']} chunks read, {len(result['findings'])} findings")
    return IntegrityError.exit_code if result["findings"] else 0


async def _check(ref: str, with_data: bool, options: RegistryOptions, bar: bool) -> dict[str, Any]:
    async with opened_image(ref, options) as (image, store):
        findings = await trio.to_thread.run_sync(lambda: list(check_bootstrap(image.bootstrap_bytes)))
        findings += await trio.to_thread.run_sync(_uncovered, image)
        bad_blobs = await _check_blobs(image, store)
        findings += bad_blobs.values()
        bad_chunks: list[dict[str, Any]] = []
        if with_data:
            with progress_bar("checking", enabled=bar) as progress:
                bad_chunks = await _check_data(image, store, bad_blobs, progress)
            findings += [_describe(chunk) for chunk in bad_chunks]
        return {
            "reference": ref,
            "digest": str(image.manifest.digest),
            "findings": findings,
            "bad_chunks": bad_chunks,
            "chunks_checked": image.chunk_map.chunk_count if with_data else 0,
        }


def _uncovered(image: Image) -> list[str]:
    """Return a line for every file of which some byte is in no chunk."""
    found = []
    for path, inode in image.bootstrap.walk():
        for extent in image.bootstrap.extents(inode.nid) if stat.S_ISREG(inode.mode) else []:
            if extent.space is None:
                continue
            table = image.chunk_map.table(extent.space)
            position, end = extent.offset, extent.offset + extent.length
            for index in table.covering(extent.offset, extent.length):
                start, length = table.extent(index)
                if start > position:
                    break
                position = start + length
            if position < end:
                found.append(f"{show_path(path)}: byte {position} of data space {extent.space} is in no chunk")
    return found


async def _check_blobs(image: Image, store: ImageStore) -> dict[Digest, str]:
    """Return a line for every blob that is not there, or not as long as the image says."""
    findings = {}
    for blob in image.manifest.blobs:
        if not await store.has_blob(blob.digest):
            findings[blob.digest] = f"blob {blob.digest} is not in {store.name}"
        elif blob.size:
            try:
                async with store.open_range(blob.digest, blob.size - 1, 1) as stream:
                    await stream.readinto(memoryview(bytearray(1)))
            except (RemoteError, IntegrityError, FormatError) as error:
                findings[blob.digest] = f"blob {blob.digest} does not give the last of its {blob.size} bytes: {error}"
    return findings


async def _check_data(
    image: Image, store: ImageStore, broken: Collection[Digest], progress: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Read every chunk; return those that are bad, with the files that need them.

    A store that cannot be reached ends the check, except where `broken` says that a blob does not have its bytes.
    """
    reader = ImageReader(store, image)
    bad: list[tuple[int, int, str]] = []
    done = 0
    send, receive = trio.open_memory_channel[tuple[int, int, int]](0)

    async def read(channel: trio.MemoryReceiveChannel[tuple[int, int, int]]) -> None:
        nonlocal done
        async with channel:
            async for space, index, length in channel:
                try:
                    await reader.read_chunk(space, index)
                except (IntegrityError, FormatError, NotFoundError) as error:
                    bad.append((space, index, str(error)))
                except RemoteError as error:
                    if _blob_of(image, space, index) not in broken:
                        raise
                    bad.append((space, index, str(error)))
                done += length
                progress(done, image.chunk_map.data_bytes)

    async with trio.open_nursery() as nursery:
        async with receive:
            for _ in range(_READERS):
                nursery.start_soon(read, receive.clone())
        async with send:
            for space in image.chunk_map.spaces:
                table = image.chunk_map.table(space.index)
                for index in range(space.count):
                    await send.send((space.index, index, table.extent(index)[1]))
    users = await trio.to_thread.run_sync(_users, image, {(space, index) for space, index, _ in bad})
    return [
        {
            "space": space,
            "chunk": index,
            "blob": str(_blob_of(image, space, index)),
            "offset": image.chunk_map.stored(space, index).offset,
            "files": users[space, index],
            "cause": cause,
        }
        for space, index, cause in sorted(bad)
    ]


def _blob_of(image: Image, space: int, index: int) -> Digest:
    return image.chunk_map.blobs[image.chunk_map.stored(space, index).blob].digest


def _users(image: Image, chunks: set[tuple[int, int]]) -> defaultdict[tuple[int, int], list[str]]:
    found: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    if not chunks:
        return found
    for path, inode in image.bootstrap.walk():
        if not stat.S_ISREG(inode.mode):
            continue
        for extent in image.bootstrap.extents(inode.nid):
            if extent.space is not None:
                for index in image.chunk_map.table(extent.space).covering(extent.offset, extent.length):
                    if (extent.space, index) in chunks:
                        found[extent.space, index].append(show_path(path))
    return found


def _describe(chunk: dict[str, Any]) -> str:
    return (
        f"chunk {chunk['chunk']} of data space {chunk['space']}, at {chunk['offset']} of blob {chunk['blob']}, "
        f"needed by {', '.join(chunk['files'][:5]) or 'no file'}: {chunk['cause']}"
    )
