"""Two versions of a small model: weights of which the second are those of the first, each moved a little."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .weights import Array, cast, save_safetensors, trained

ROWS, COLUMNS = 256, 512


def small_model(seed: int, tensors: int = 4) -> dict[str, Array]:
    """Return float32 tensors of 512 KiB each, distributed as weights are."""
    rng = np.random.default_rng(seed)
    return {
        f"layer.{number}.weight": Array(
            "F32", (ROWS, COLUMNS), rng.normal(0, 0.05, ROWS * COLUMNS).astype("<f4").tobytes()
        )
        for number in range(tensors)
    }


def moved(arrays: dict[str, Array], seed: int, std: float = 1e-5) -> dict[str, Array]:
    """Return the tensors after a small step of training."""
    rng = np.random.default_rng(seed)
    return {name: trained(array, std, rng) for name, array in arrays.items()}


def save(directory: Path, arrays: dict[str, Array], dtype: str = "BF16") -> Path:
    """Write a model into a new directory, as `model.safetensors`."""
    directory.mkdir(parents=True)
    save_safetensors(directory / "model.safetensors", {name: cast(array, dtype) for name, array in arrays.items()})
    return directory
