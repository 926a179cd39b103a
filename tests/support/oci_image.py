"""An ordinary container image, as docker and containerd know it: an OCI layout with gzipped layers of random files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any


def make_oci_image(directory: Path, layer_sizes: list[int], seed: int = 1) -> str:
    """Write a layout under the tag v1; return the digest of its manifest."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    layers, diffs = [], []
    for number, size in enumerate(layer_sizes):
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as tar:
            info = tarfile.TarInfo(f"layer{number}.bin")
            info.size = size
            tar.addfile(info, io.BytesIO(random.Random(seed * 100 + number).randbytes(size)))
        diffs.append(f"sha256:{hashlib.sha256(plain.getvalue()).hexdigest()}")
        packed = gzip.compress(plain.getvalue(), compresslevel=1, mtime=0)
        layers.append({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", **put(packed)})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diffs},
        "history": [{"created_by": "test"} for _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **put(json.dumps(config).encode())},
        "layers": layers,
    }
    described = {"mediaType": manifest["mediaType"], **put(json.dumps(manifest).encode())}
    entry = {**described, "annotations": {"org.opencontainers.image.ref.name": "v1"}}
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    digest: str = described["digest"]
    return digest
