"""How long does the driver take to publish a volume of a 100 GiB image, and what do ten pods of one model fetch?

The image has its metadata in full (102,400 chunks) and two stored chunks, in a registry on loopback. First volume: the node has no mount
of it, so the driver asks the registry, has the daemon mount, and binds. The others share that mount; each still asks the registry with
its own credentials. Baselines of the same run: `rafs mount` of the same image with the daemon up, and a bare bind mount, which is
the least that any driver does per pod. Calls are real gRPC to a driver process (tests/support/kubelet.py); needs root.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

from tests.support.kubelet import running_kubelet
from tests.support.processes import wait_for

from .measure import Row, files_below, median, read_all, spread, timed
from .setting import Setting

VOLUMES = 100
PODS = 10


def percentile(seconds: list[float], share: float) -> float:
    """Return the smallest value that this share of all do not exceed."""
    ordered = sorted(seconds)
    return ordered[max(1, math.ceil(len(ordered) * share)) - 1]


def bind(source: Path, target: Path) -> float:
    """Make a bind mount by mount(8), take it away again, return the seconds of the first."""
    target.mkdir(parents=True, exist_ok=True)
    seconds = timed(lambda: subprocess.run(["mount", "--bind", source, target], check=True))
    subprocess.run(["umount", target], check=True)
    return seconds


def run(setting: Setting) -> list[Row]:
    """Measure."""
    ref = setting.large_ref
    volumes = 20 if setting.quick else VOLUMES
    first: list[float] = []
    mounted: list[float] = []
    shared: list[float] = []
    bound: list[float] = []
    for turn in range(setting.rounds):
        with setting.node() as node:
            node.start("daemon", "--cache-dir", node.cache)
            wait_for((node.cache / "daemon.sock").exists, "a daemon")
            where = node.home / "mnt"
            where.mkdir()
            mounted.append(timed(lambda: node.rafs("mount", ref, where)))  # noqa: B023 - called at once
        with running_kubelet(setting.fresh("host")) as kubelet:
            first.append(timed(lambda: kubelet.publish("csi-0", {"ref": ref}, "pod-0")))
            if turn == 0:
                for number in range(1, volumes):
                    name = f"pod-{number}"
                    shared.append(timed(lambda: kubelet.publish(f"csi-{number}", {"ref": ref}, name)))  # noqa: B023
                    bound.append(bind(kubelet.home / "pods", kubelet.home / "bare"))
                for number in range(1, volumes):
                    kubelet.unpublish(f"csi-{number}", f"pod-{number}")
            kubelet.unpublish("csi-0", "pod-0")
    base = percentile(bound, 0.5)
    rows = [
        Row(
            "publish of 100 GiB, first volume of a node",
            f"{median(first):.3f} s",
            f"rafs mount {median(mounted):.3f} s",
            median(first) / median(mounted),
            "<= 1 s",
            median(first) <= 1,
            spread(first),
        )
    ]
    rows += [
        Row(
            f"publish of 100 GiB, {volumes - 1} more volumes, p{share * 100:.0f}",
            f"{percentile(shared, share) * 1000:.1f} ms",
            f"mount --bind, p50 {base * 1000:.1f} ms",
            percentile(shared, share) / base,
            "<= 1 s",
            percentile(shared, share) <= 1,
            spread(shared),
        )
        for share in (0.5, 0.99)
    ]
    return [*rows, _ten_pods(setting)]


def _ten_pods(setting: Setting) -> Row:
    ref, size = setting.weights_ref, setting.weights_bytes
    with running_kubelet(setting.fresh("host")) as kubelet:
        targets = [kubelet.publish(f"csi-{n}", {"ref": ref}, f"pod-{n}") for n in range(PODS)]
        read = sum(read_all(files_below(target)) for target in targets)
        assert read == PODS * size, f"pods read {read} bytes, expected {PODS * size}"
        fetched = kubelet.node.json("status")["fetch"]["origin_bytes"]
        for n in range(PODS):
            kubelet.unpublish(f"csi-{n}", f"pod-{n}")
    return Row(
        f"origin bytes of {PODS} pods on a node that read one model",
        f"{fetched / 1e6:.1f} MB",
        f"the model {size / 1e6:.1f} MB",
        fetched / size,
        "<= 1.0",
        fetched <= size,
        f"{read / 1e6:.0f} MB read",
    )
