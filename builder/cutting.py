"""Which way each file of the source is cut: looks into the files, says so when one is not what its name promises.

Concurrency: used by one thread at a time (the pipeline's planning hop); opens files of its own. Memory: a few hundred bytes per
tensor of the files being cut, and one window of a file cut by content.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Final, Self

from rafsfs.errors import UsageError
from rafsfs.weights.tensor import ReadAt, TensorFile

from .cut import Cutter, cut_by_content, cut_fixed, cut_tensors, is_compressed
from .scan import Scan
from .source_file import OpenFiles
from .weights.detect import WORTH, WeightFinder, missing_shards

_log = logging.getLogger("rafsfs.builder")

CHUNKINGS: Final = ("auto", "tensor", "cdc", "fixed")
_INDEX: Final = ".safetensors.index.json"
_FEW: Final = 8
"""Layouts kept: data spaces are filled four at a time."""


class FileCutter:
    """The cutters of a build's files, made when they are first asked for. A context manager: leaving it checks the files read."""

    def __init__(self, scanned: Scan, chunking: str, chunk_size: int) -> None:
        if chunking not in CHUNKINGS:
            raise UsageError(f"chunking {chunking!r} is unknown, expected one of {', '.join(CHUNKINGS)}")
        self._files = scanned.files
        self._chunking = chunking
        self._chunk_size = chunk_size
        self._opened = OpenFiles(scanned.files, ahead=0)
        self._finder = WeightFinder()
        self._paths = [scanned.relative(file) for file in scanned.files]
        self._cutters: dict[int, Cutter] = {}
        self.kinds: dict[str, int] = dict.fromkeys(("tensor", "cdc", "fixed"), 0)
        """Bytes by the way they are cut."""

    def __enter__(self) -> Self:
        self._opened.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def prepare(self) -> None:
        """Read what concerns other files: ONNX models that name files of weights, indexes that name shards. Blocking."""
        known = None
        for number, path in enumerate(self._paths):
            size = self._files[number].size
            if path.endswith(".onnx") and self._chunking in {"auto", "tensor"}:
                self._finder.add_model(path, self._reader(number), size)
            elif path.endswith(_INDEX):
                known = known if known is not None else set(self._paths)
                missing = missing_shards(path, self._reader(number)(0, size), known)
                if missing:
                    names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
                    _log.warning(
                        "%s names %d files that are not in the source: %s; is the model complete?",
                        path,
                        len(missing),
                        names,
                    )

    def cutter(self, number: int) -> Cutter:
        """Return the cutter of file `number`. Blocking: reads its header."""
        found = self._cutters.get(number)
        if found is None:
            while len(self._cutters) >= _FEW:
                self._cutters.pop(next(iter(self._cutters)))
            found = self._cutters[number] = self._decide(number)
        return found

    def weights(self, number: int) -> TensorFile | None:
        """Return the tensors of file `number`, None if it is not weights."""
        return self._finder.look(self._paths[number], self._reader(number), self._files[number].size)

    def _decide(self, number: int) -> Cutter:
        size = self._files[number].size
        kind, cutter = "fixed", cut_fixed(self._chunk_size)
        if self._chunking in {"auto", "tensor"} and (weights := self.weights(number)):
            kind, cutter = "tensor", cut_tensors(weights.tensors, self._chunk_size)
        elif self._chunking != "fixed" and size >= WORTH:
            read = self._reader(number)
            if self._chunking == "cdc" or not is_compressed(read(0, 16)):
                kind, cutter = "cdc", cut_by_content(read, self._chunk_size)
        self.kinds[kind] += size
        return cutter

    def _reader(self, number: int) -> ReadAt:
        size = self._files[number].size

        def read(offset: int, length: int) -> bytes:
            return self._opened.read(number, offset, max(0, min(length, size - offset)))

        return read
