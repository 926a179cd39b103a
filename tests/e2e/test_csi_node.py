"""The driver's node part in this process, over a real daemon and real mounts: what takes a driver of its own too long to wait for."""

from __future__ import annotations

import functools
import os
import random
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from rafsfs.csi import binds
from rafsfs.csi.codes import Code, CsiError
from rafsfs.csi.mounts import SharedMounts
from rafsfs.csi.node import PATIENCE, Node
from rafsfs.csi.volume import VolumeSpec, parse_attributes
from rafsfs.registry.options import RegistryOptions
from tests.support.processes import Node as Host
from tests.support.processes import output_within
from tests.support.registry import Registry


def spec_of(registry: Registry, name: str, **attributes: str) -> VolumeSpec:
    return parse_attributes({"ref": f"localhost:{registry.port}/csi/{name}:v1", **attributes}, loopback=True)


@asynccontextmanager
async def driver(host: Host) -> AsyncIterator[Node]:
    directory = str(host.cache / "csi")
    mounts = SharedMounts(directory, str(host.cache), RegistryOptions(), scheduler="", may_start=False)
    started = host.start("daemon", "--cache-dir", host.cache)
    try:
        await trio.to_thread.run_sync(lambda: output_within(started, b"\n", 30))
        yield Node(directory, mounts, loopback=True)
    finally:
        for place in (path for path in binds.mount_devices() if str(host.home.parent / "pod") in path):
            binds.detach(place)


@pytest.mark.logs_warnings
async def test_a_mount_that_hangs_is_aborted_and_its_pods_have_a_new_one(
    node: Host, registry: Registry, tmp_path: Path
) -> None:
    """Its worker lives and answers nothing; whoever reads waits in the kernel, from where no signal gets him out."""
    data = random.Random(1).randbytes(3 << 20)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.bin").write_bytes(data)
    node.build(tmp_path / "source", f"localhost:{registry.port}/csi/model:v1")
    (tmp_path / "pod").mkdir()
    targets = [tmp_path / "pod" / str(n) for n in range(3)]
    async with driver(node) as volumes:
        spec = spec_of(registry, "model", mode="fuse")
        for n, target in enumerate(targets):
            await volumes.publish(f"csi-{n}", str(target), spec, {}, {})
        (worker,) = node.worker_pids()
        os.kill(worker, signal.SIGSTOP)
        errors: list[OSError] = []

        def read() -> None:
            try:
                (targets[0] / "weights.bin").read_bytes()
            except OSError as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        threads = threading.active_count()
        for _ in range(PATIENCE):
            assert not errors
            await volumes.heal()
            assert threading.active_count() <= threads + 8, "few threads wait for what hangs"
        await trio.to_thread.run_sync(functools.partial(reader.join, 20))
        assert errors, "the reader was let go"
        for _ in range(2):
            await volumes.heal()
        assert worker not in node.worker_pids()
        for n, target in enumerate(targets):
            assert (target / "weights.bin").read_bytes() == data
            await volumes.unpublish(f"csi-{n}", str(target))
            assert not target.exists()


async def test_a_second_call_for_a_volume_in_flight_is_told_to_come_again(tmp_path: Path) -> None:
    """While the first one waits for a registry that says nothing; another volume is not held up."""
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = silent[0].socket.getsockname()[1]
    mounts = SharedMounts(str(tmp_path / "csi"), str(tmp_path), RegistryOptions(), scheduler="", may_start=False)
    volumes = Node(str(tmp_path / "csi"), mounts, loopback=True)
    spec = parse_attributes({"ref": f"127.0.0.1:{port}/model:v1"}, loopback=True)
    target = str(tmp_path / "target")
    async with trio.open_nursery() as nursery:
        for volume in ("csi-1", "csi-2"):
            nursery.start_soon(volumes.publish, volume, f"{target}-{volume}", spec, {}, {})
            (await silent[0].accept()).socket.detach()  # it has been claimed, and waits
        for again in (
            volumes.publish("csi-1", f"{target}-csi-1", spec, {}, {}),
            volumes.unpublish("csi-1", f"{target}-csi-1"),
        ):
            with pytest.raises(CsiError) as error:
                await again
            assert error.value.code is Code.ABORTED
        nursery.cancel_scope.cancel()
    await silent[0].aclose()
    await volumes.unpublish("csi-1", f"{target}-csi-1")
    assert list((tmp_path / "csi" / "auth").iterdir()) == []
