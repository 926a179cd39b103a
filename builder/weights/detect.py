"""Which files are weights, told by what they begin with, and what is in them.

Decided here: that the content decides, not the name (caches of model hubs name files by digest), and that a file that looks like weights
and is not sound is an ordinary file, with a warning if its name promised weights.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Iterable
from typing import Final

from rafsfs.errors import FormatError
from rafsfs.weights.gguf import looks_like_gguf, parse_gguf
from rafsfs.weights.safetensors import looks_like_safetensors, parse_safetensors
from rafsfs.weights.tensor import ReadAt, Tensor, TensorFile

from .onnx import OnnxWeights, external_file, inside_file, parse_onnx

_log = logging.getLogger("rafsfs.builder")

WORTH: Final = 64 << 10
"""Bytes: a smaller file is a chunk or two, however it is cut."""
_MAX_INDEX: Final = 32 << 20


class WeightFinder:
    """Looks at the files of one tree, `path` relative to its top, in any order but ONNX models before what they name."""

    def __init__(self) -> None:
        self._named: dict[str, list[Tensor]] = {}

    def add_model(self, path: str, read: ReadAt, size: int) -> OnnxWeights | None:
        """Note which files an ONNX model names."""
        try:
            weights = parse_onnx(read, size)
        except FormatError as error:
            _warn(path, "ONNX", error)
            return None
        for name, tensors in weights.outside.items():
            self._named.setdefault(posixpath.normpath(posixpath.join(posixpath.dirname(path), name)), []).extend(
                tensors
            )
        return weights

    def look(self, path: str, read: ReadAt, size: int) -> TensorFile | None:
        """Return the tensors of a file, or None if it is not weights."""
        if size < WORTH:
            return None
        head = read(0, 16)
        try:
            if looks_like_gguf(head):
                return parse_gguf(read, size)
            if looks_like_safetensors(head, size):
                return parse_safetensors(read, size)
            if path in self._named:
                return external_file(self._named[path], size)
            if path.endswith(".onnx"):
                weights = self.add_model(path, read, size)
                return inside_file(weights, size) if weights and weights.inside else None
            if path.endswith((".safetensors", ".gguf")):
                raise FormatError(f"begins with {head[:9].hex()}")
        except FormatError as error:
            _warn(path, "weights", error)
        return None


def missing_shards(path: str, data: bytes, paths: Iterable[str]) -> list[str]:
    """Return the files that a `*.safetensors.index.json` names and that are not among `paths`; nothing if it is not such an index."""
    if len(data) > _MAX_INDEX:
        return []
    try:
        weight_map = json.loads(data)["weight_map"]
        names = {name for name in weight_map.values() if isinstance(name, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    known = set(paths)
    here = posixpath.dirname(path)
    return sorted(name for name in names if posixpath.normpath(posixpath.join(here, name)) not in known)


def _warn(path: str, what: str, error: FormatError) -> None:
    _log.warning("%s is not sound as %s and is cut like an ordinary file: %s", path[-400:], what, error)
