"""How fast does one peer give another what it has, and at what cost? `python -m benchmarks.peer_throughput`.

On loopback, one process each side, 256 MiB in chunks of 1 MiB, in the giver's page cache, into a fresh data space each time. Ours: the
upload server and the download path of the daemon, requests of 4 MiB, every chunk verified, written and marked. Baselines of the same round:
a bare loop of sendfile and recv_into that keeps nothing, and the same with BLAKE3 and pwrite after each chunk, one after the other: what
the bytes cost whoever handles them. CPU seconds are of both processes together.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import socket
import ssl
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Final

import trio

from p2p.core.task import NeighbourView, Standing
from p2p.keeping import KEEPERS, Keeper
from p2p.neighbour import Neighbour
from p2p.protocol.messages import Contact, Kind
from p2p.selection import Run
from p2p.upload import Uploads
from rafsfs.fetch.buffers import BufferPool
from rafsfs.format.codec import chunk_digest
from rafsfs.format.space_table import SpaceTable, pack_record
from rafsfs.net.http1 import HttpPool
from rafsfs.net.http_server import HttpServer
from rafsfs.net.mutual_tls import MutualTls
from rafsfs.net.origin import Origin
from rafsfs.store.data_space import DataSpace, create, open_space_directory

from .measure import MIB, Row, commit, interleave, machine, median, rate, spread, table

SIZE: Final = 256 * MIB
_CHUNK: Final = MIB
_RUN: Final = 4
"""Chunks per request."""
_CONTEXT = multiprocessing.get_context("fork")


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _serve_bare(path: Path, tell: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    tell.send(listener.getsockname()[1])
    wire, _ = listener.accept()
    before = _cpu()
    with path.open("rb") as file:
        while len(wire.recv(1)):
            offset = file.tell()
            end = offset + _RUN * _CHUNK
            while offset < end:
                offset += os.sendfile(wire.fileno(), file.fileno(), offset, end - offset)
            file.seek(end)
    tell.send(_cpu() - before)


def _take_bare(port: int, space: DataSpace | None) -> None:
    wire = socket.create_connection(("127.0.0.1", port))
    buffer = memoryview(bytearray(_CHUNK))
    for chunk in range(SIZE // _CHUNK):
        if chunk % _RUN == 0:
            wire.sendall(b"x")
        got = 0
        while got < _CHUNK:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(256 << 10, _CHUNK - got))
            got += wire.recv_into(buffer[got:])
        if space is not None:
            space.store(chunk, buffer)
    wire.close()


def _serve_ours(space: DataSpace, tell: Connection, tls: MutualTls | None = None) -> None:
    async def serve() -> None:
        uploads = Uploads(lambda space_id: space if space_id == space.space_id else None, lambda space_id: [], "")
        async with trio.open_nursery() as nursery:
            server = HttpServer(uploads.handle, ssl_context=tls.server if tls is not None else None)
            tell.send(await nursery.start(server.serve, "127.0.0.1", 0))
            before = _cpu()
            await trio.to_thread.run_sync(tell.recv)
            tell.send(_cpu() - before)
            nursery.cancel_scope.cancel()

    trio.run(serve)


def take_ours(port: int, space: DataSpace, at_once: int, tls: MutualTls | None = None) -> None:
    """Take all of a data space from the peer at a port, so many requests of _RUN chunks at once."""
    view = NeighbourView(Standing(Contact("giver", "127.0.0.1", port, Kind.PEER)), bytearray(b"\1" * space.table.count))
    neighbour = Neighbour(view, Origin("http" if tls is None else "https", "127.0.0.1", port), space)
    context = tls.peers if tls is not None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    pool = HttpPool(ssl_context=context, timeout_s=10, use_proxies=False)
    keeper = Keeper(BufferPool(32 * MIB))

    async def take(first: int) -> None:
        for start in range(first, space.table.count, _RUN * at_once):
            run = Run("giver", start, _RUN, _RUN * _CHUNK)
            await neighbour.fetch(run, pool, {}, keeper, lambda chunk: None)

    async def take_all() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(KEEPERS):
                nursery.start_soon(keeper.run)
            async with trio.open_nursery() as takers:
                for number in range(at_once):
                    takers.start_soon(take, _RUN * number)
            nursery.cancel_scope.cancel()
        pool.close()

    trio.run(take_all)


class Pair:
    """A giver with everything, and takers with nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        data = [os.urandom(_CHUNK) for _ in range(SIZE // _CHUNK)]
        records = (pack_record(chunk_digest(chunk), number * _CHUNK, _CHUNK) for number, chunk in enumerate(data))
        self._table = SpaceTable(b"".join(records), SIZE)
        self._giver = self._fresh("giver")
        for number, chunk in enumerate(data):
            self._giver.store(number, chunk, verified=True)
        self.cpu: dict[str, list[float]] = {}

    def _fresh(self, name: str) -> DataSpace:
        where = self._directory / name / self._table.space_id.hex()
        shutil.rmtree(where, ignore_errors=True)
        where.parent.mkdir(exist_ok=True)
        create(str(where), self._table)
        return open_space_directory(str(where))[0]

    def run(
        self, name: str, take: Callable[[int, DataSpace], None], *, bare: bool, tls: MutualTls | None = None
    ) -> float:
        """Start both sides, return the seconds of the taker."""
        here, there = _CONTEXT.Pipe()
        if bare:
            giver = _CONTEXT.Process(target=_serve_bare, args=(Path(self._giver.path, "data"), there))
        else:
            giver = _CONTEXT.Process(target=_serve_ours, args=(self._giver, there, tls))
        giver.start()
        port = here.recv()
        results, result = _CONTEXT.Pipe()
        space = self._fresh("taker")

        def taker() -> None:
            before, started = _cpu(), perf_counter()
            take(port, space)
            result.send((perf_counter() - started, _cpu() - before))

        process = _CONTEXT.Process(target=taker)
        process.start()
        seconds, cpu = results.recv()
        process.join()
        here.send(None)
        self.cpu.setdefault(name, []).append(cpu + here.recv())
        giver.join()
        space.close(clean=False)
        return float(seconds)


def main() -> int:
    """Run and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_throughput", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="work on this disk (default: the temporary directory)")
    arguments = parser.parse_args()
    print(f"{commit()}; {machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="rafs-peers-", dir=arguments.dir) as directory:
        pair = Pair(Path(directory))
        seconds = interleave(
            {
                "bare": lambda: pair.run("bare", lambda port, _: _take_bare(port, None), bare=True),
                "kept": lambda: pair.run("kept", _take_bare, bare=True),
                "1": lambda: pair.run("1", lambda port, space: take_ours(port, space, 1), bare=False),
                "4": lambda: pair.run("4", lambda port, space: take_ours(port, space, 4), bare=False),
            },
            arguments.rounds,
        )
    rows = []
    for ours in ("1", "4"):
        for baseline, text in (("bare", "sendfile and recv_into"), ("kept", "the same, hashed and written")):
            mine, other = median(seconds[ours]), median(seconds[baseline])
            costs = [median(pair.cpu[name]) / SIZE * 1e9 for name in (ours, baseline)]
            rows.append(Row(
                f"peer to peer, {ours} request{'s' if ours != '1' else ''} at once",
                rate(SIZE, mine), f"{text}: {rate(SIZE, other)}", other / mine, "-", None,
                f"{spread(seconds[ours])}; CPU {costs[0]:.2f} s/GB, {costs[1]:.2f}",
            ))  # fmt: skip
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
