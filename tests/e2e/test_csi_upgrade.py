"""Upgrades under readers: another version of the driver, then of the node daemon, while pods read what is mounted."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from rafsfs.csi._pb import csi_pb2 as pb
from tests.support.kubelet import install, running_kubelet
from tests.support.processes import output_within, wait_for
from tests.support.registry import Registry

from .test_csi import _READER, left_over, published

_HOLDS_OPEN = """
import hashlib, os, sys, time
file = os.open(os.path.join(sys.argv[1], "weights.bin"), os.O_RDONLY)
size = os.fstat(file).st_size
for at in range(0, size, 1 << 20):
    print(at, hashlib.blake2b(os.pread(file, 1 << 20, at)).hexdigest(), flush=True)
    with open(os.path.join(sys.argv[1], "weights.bin"), "rb") as again:
        again.seek(size - at - (1 << 20))
        print(size - at - (1 << 20), hashlib.blake2b(again.read(1 << 20)).hexdigest(), flush=True)
    sys.stdin.readline()
print("done", flush=True)
"""
"""Reads a file that stays open from the front, and one that is opened each time from the back: mostly what nobody has read before."""


def test_the_driver_is_upgraded_while_pods_read(registry: Registry, tmp_path: Path) -> None:
    """The old one is stopped as Kubernetes stops it; its records are of the first format."""
    top = tmp_path / "source"
    top.mkdir()
    (top / "weights.bin").write_bytes(random.Random(1).randbytes(5 << 20))
    expected = hashlib.blake2b((top / "weights.bin").read_bytes()).hexdigest().encode()
    old, new = install(tmp_path / "old", "0.0.9"), install(tmp_path / "new", "0.2.0")
    with running_kubelet(tmp_path / "host") as kubelet:
        ref = published(registry, kubelet, top)
        kubelet.stop_driver()
        kubelet.start(installed=old)
        assert kubelet.call("Identity", "GetPluginInfo", pb.GetPluginInfoRequest()).vendor_version == "0.0.9"
        first = kubelet.publish("csi-1", {"ref": ref})
        second = kubelet.publish("csi-2", {"ref": ref, "mode": "fuse"}, "two")
        with kubelet.pod(first, _READER) as one, kubelet.pod(second, _READER) as two:
            for reader in (one, two):
                assert expected in output_within(reader, expected, 60)
            kubelet.stop_driver()
            for path in (kubelet.node.cache / "csi" / "volumes").glob("*.json"):
                record = json.loads(path.read_text())
                del record["format"]
                path.write_text(json.dumps(record))
            for reader in (one, two, one, two):  # while there is no driver; the first may be from before
                assert set(output_within(reader, expected, 30).split()) <= {expected}
            kubelet.start(installed=new)
            assert kubelet.call("Identity", "GetPluginInfo", pb.GetPluginInfoRequest()).vendor_version == "0.2.0"
            kubelet.publish("csi-1", {"ref": ref})  # as the kubelet repeats it
            third = kubelet.publish("csi-3", {"ref": ref}, "three")
            assert hashlib.blake2b((third / "weights.bin").read_bytes()).hexdigest().encode() == expected
            for reader in (one, two):
                assert set(output_within(reader, expected, 30).split()) <= {expected}
        for volume, pod in (("csi-1", "pod"), ("csi-2", "two"), ("csi-3", "three")):
            kubelet.unpublish(volume, pod)
        wait_for(lambda: not left_over(kubelet), "nothing is left", 30)


def test_the_node_daemon_is_upgraded_while_pods_read_what_is_not_there_yet(registry: Registry, tmp_path: Path) -> None:
    """Its container ends with everything in it; the holder, in a container of its own, is what mounts live on meanwhile."""
    data = random.Random(2).randbytes(40 << 20)
    top = tmp_path / "source"
    top.mkdir()
    (top / "weights.bin").write_bytes(data)
    wanted = {
        at: hashlib.blake2b(data[at : at + (1 << 20)]).hexdigest().encode() for at in range(0, len(data), 1 << 20)
    }
    new = install(tmp_path / "new", "0.2.0")
    with running_kubelet(tmp_path / "host") as kubelet:
        kubelet.end_daemon()
        kubelet.start_holder()
        kubelet.start_daemon("--external-holder", "--readahead", "1MiB", container=True)
        target = kubelet.publish("csi-1", {"ref": published(registry, kubelet, top), "mode": "lazy"})
        with kubelet.pod(target, _HOLDS_OPEN) as reader:

            def step() -> None:
                said = output_within(reader, b"\n", 60)
                while said.count(b"\n") < 2:
                    said += output_within(reader, b"\n", 60)
                for line in said.splitlines():
                    at, digest = line.split()
                    assert wanted[int(at)] == digest
                assert reader.stdin is not None
                reader.stdin.write(b"\n")
                reader.stdin.flush()

            for _ in range(4):
                step()
            kubelet.end_daemon_pod()  # the reader has been let go on: it waits, or has what the kernel kept
            kubelet.start_daemon("--external-holder", "--readahead", "1MiB", container=True, installed=new)
            assert kubelet.node.json("status")["daemon"]["version"] == "0.2.0"
            for _ in range(6):
                step()
            kubelet.end_holder()  # the holder is upgraded, too, while the daemon runs, which gives it everything again
            kubelet.start_holder()
            step()
            log = kubelet.home / "daemon.log"
            wait_for(lambda: "another holder has the descriptors" in log.read_text(), "the daemon misses its holder")
            kubelet.end_daemon_pod()
            kubelet.start_daemon("--external-holder", "--readahead", "1MiB", container=True)
            for _ in range(len(wanted) - 11):
                step()
            assert b"done" in output_within(reader, b"done", 60)
        kubelet.unpublish("csi-1")
        wait_for(lambda: not left_over(kubelet), "nothing is left", 30)
