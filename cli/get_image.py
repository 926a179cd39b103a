"""`rafs get REF`: files of an image, from the node's cache into a directory."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import trio

from rafsfs.files.select import chunks_of, select
from rafsfs.format.bootstrap import Bootstrap
from rafsfs.format.chunk_map import ChunkMap
from rafsfs.registry.store import RegistryOptions

from .cached import CacheContent
from .exporting import Exporter, prepare_directory, say_left_out
from .held import held
from .options import for_daemon
from .output import progress_bar


async def get_image(
    ref: str, directory: str, paths: tuple[str, ...], registry: RegistryOptions, common: dict[str, Any]
) -> dict[str, Any]:
    """Fetch the files of an image that `paths` mean, all if none; return what happened."""
    prepare_directory(directory)
    params = for_daemon(ref, registry) | {"paths": list(paths), "scheduler": common["scheduler"]}
    cache_dir = common["cache_dir"]
    with progress_bar("getting", enabled=common["bar"]) as progress:
        async with held(cache_dir, "get_image", params, progress) as found:
            image = found["directory"]
            bootstrap, chunk_map = await trio.to_thread.run_sync(_read, image)
            wanted = await trio.to_thread.run_sync(select, bootstrap, paths)
            files = {inode.nid for inode in wanted.values() if stat.S_ISREG(inode.mode)}
            chunks = await trio.to_thread.run_sync(chunks_of, bootstrap, chunk_map, files)
            content = CacheContent(os.path.abspath(cache_dir), bootstrap, chunk_map, chunks)
            try:
                exporter = Exporter(bootstrap, content, found["data_bytes"], lambda done, total: None, wanted)
                await exporter.run(directory)
            finally:
                content.close()
    say_left_out(exporter.left_out)
    return {
        "path": directory,
        "digest": found["digest"],
        "bytes": sum(inode.size for inode in wanted.values() if stat.S_ISREG(inode.mode)),
        "files": len(files),
        "sources": found["sources"],
        "seconds": found["seconds"],
    }


def _read(directory: str) -> tuple[Bootstrap, ChunkMap]:
    bootstrap = Bootstrap(Path(directory, "bootstrap.erofs").read_bytes())
    return bootstrap, ChunkMap(Path(directory, "chunkmap").read_bytes())
