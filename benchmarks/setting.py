"""What a run of benchmarks shares: a working directory on the local disk, a registry, inputs and images made once."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import trio
import zstandard

from rafsfs.format.manifest import (
    MEDIA_TYPE_BLOB,
    MEDIA_TYPE_BOOTSTRAP,
    MEDIA_TYPE_CHUNK_MAP,
    MEDIA_TYPE_CONFIG,
    MEDIA_TYPE_MANIFEST,
    UNCOMPRESSED_SIZE,
    ImageConfig,
    encode_manifest,
)
from rafsfs.registry.reference import parse_reference
from rafsfs.registry.store import RegistryOptions, open_store
from rafsfs.types import Descriptor
from tests.support.processes import Node, running_node
from tests.support.registry import Registry, running_registry

from .inputs import GIB, MIB, large_image, make_many_weights, make_weights
from .measure import files_below


class Setting:
    """Shared by the benchmarks of one run; everything in it is made when it is first asked for."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack, *, quick: bool, modes: Sequence[str] = ()) -> None:
        """`modes`: of mounts whose present data are read; none: all."""
        self.directory = directory
        self.modes = modes
        self.quick = quick
        self.rounds = 3 if quick else 5
        self._stack = stack
        self._numbers = itertools.count()

    @cached_property
    def registry(self) -> Registry:
        """A docker-registry on loopback."""
        return self._stack.enter_context(running_registry(self.directory / "registry"))

    @cached_property
    def weights(self) -> Path:
        """The directory of weights, on the local disk."""
        return make_weights(self.directory / "weights", quick=self.quick)

    @cached_property
    def weights_bytes(self) -> int:
        """Sizes of the weights' files, summed."""
        return sum(path.stat().st_size for path in files_below(self.weights))

    @cached_property
    def many_weights(self) -> Path:
        """A directory of more weights, on the local disk."""
        return make_many_weights(self.directory / "many-weights", quick=self.quick)

    @cached_property
    def weights_ref(self) -> str:
        """The weights as an image in the registry."""
        ref = f"localhost:{self.registry.port}/bench/weights:v1"
        with self.node() as node:
            node.build(self.weights, ref, timeout_s=300)
        return ref

    @cached_property
    def partly_read_ref(self) -> str:
        """The weights, and a file that nobody reads: an image that never becomes complete."""
        source = self.fresh("partly-read")
        shutil.copytree(self.weights, source)
        (source / "unread.bin").write_bytes(os.urandom(64 * MIB))
        ref = f"localhost:{self.registry.port}/bench/partly-read:v1"
        with self.node() as node:
            node.build(source, ref, timeout_s=300)
        return ref

    @cached_property
    def large_ref(self) -> str:
        """An image of 100 GiB in 1 MiB chunks, metadata in full, all chunks stored as one."""
        ref = f"localhost:{self.registry.port}/bench/large:v1"
        trio.run(_push_large, ref)
        return ref

    @contextlib.contextmanager
    def node(self, inside: Sequence[str] = ()) -> Iterator[Node]:
        """A node with an empty cache on the local disk, ended with the block. `inside`: what its commands have before them."""
        with running_node(self.directory / f"node-{next(self._numbers)}", inside=inside) as node:
            yield node

    def fresh(self, name: str) -> Path:
        """Return a path that does not exist yet."""
        return self.directory / f"{name}-{next(self._numbers)}"


async def _push_large(ref: str) -> None:
    bootstrap, chunk_map, blob = large_image(100 * GIB, MIB)
    reference = parse_reference(ref)
    async with open_store(reference, RegistryOptions()) as store:
        compressed = zstandard.ZstdCompressor().compress(bootstrap)
        config = ImageConfig(10, 100 * GIB, len(blob)).encode()
        parts = [
            Descriptor(kind, await store.put_blob(data), len(data), annotations)
            for kind, data, annotations in (
                (MEDIA_TYPE_CONFIG, config, {}),
                (MEDIA_TYPE_BOOTSTRAP, compressed, {UNCOMPRESSED_SIZE: str(len(bootstrap))}),
                (MEDIA_TYPE_CHUNK_MAP, chunk_map, {}),
                (MEDIA_TYPE_BLOB, blob, {}),
            )
        ]
        manifest = encode_manifest(config=parts[0], bootstrap=parts[1], chunk_map=parts[2], blobs=parts[3:])
        await store.put_manifest(manifest, MEDIA_TYPE_MANIFEST, tag=reference.tag)
