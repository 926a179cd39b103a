"""How much of real weights is stored, and how much of a changed model is stored again?

Shares: the published float32 weights and casts of them, each built by `rafs build` with codec auto and, as the baseline, with codec zstd.
Versions: what users make of the published model, each built with `--dict` of it; the baseline is the same with `--chunking fixed`, the way
of file systems that know no tensors. Differences: a bf16 model all of whose weights moved, with `--base`; the baseline is the build
without. Ratios are exact and do not depend on the machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.models import published_model
from tests.support.processes import Node
from tests.support.weights import (
    FINE_TUNE,
    ONE_STEP,
    Array,
    block_quantised,
    cast,
    load_arrays,
    quantised_rows,
    save_gguf,
    save_safetensors,
    trained,
)

from .measure import Row
from .setting import Setting

Weights = dict[str, Array]
Save = Callable[[Path, Weights], None]


def _safetensors(directory: Path, arrays: Weights) -> None:
    save_safetensors(directory / "model.safetensors", arrays)


def _gguf(directory: Path, arrays: Weights) -> None:
    save_gguf(directory / "model.gguf", arrays)


def _header_edit(directory: Path, arrays: Weights) -> None:
    save_safetensors(directory / "model.safetensors", arrays, {"note": "edited " * 99})


def _reordered(directory: Path, arrays: Weights) -> None:
    save_safetensors(directory / "model.safetensors", dict(sorted(arrays.items(), reverse=True)))


def _sharded(directory: Path, arrays: Weights) -> None:
    names = list(arrays)
    third = len(names) // 3
    for number, part in enumerate((names[:third], names[third : 2 * third], names[2 * third :]), 1):
        save_safetensors(directory / f"model-{number:05d}-of-00003.safetensors", {name: arrays[name] for name in part})


def _widened(array: Array) -> Array:
    if array.dtype != "F32":
        return array
    half = np.frombuffer(cast(array, "BF16").data, dtype="<u2")
    return Array("F32", array.shape, (half.astype("<u4") << 16).tobytes())


_SHARES: tuple[tuple[str, Callable[[Array], Array], Save, float | None], ...] = (
    ("fp32", lambda array: array, _safetensors, 0.83),
    ("bf16", lambda array: cast(array, "BF16"), _safetensors, 0.68),
    ("fp16", lambda array: cast(array, "F16"), _safetensors, 0.86),
    ("bf16 values kept in fp32", _widened, _safetensors, None),
    ("int8, a scale per row", quantised_rows, _safetensors, None),
    ("GGUF F16", lambda array: cast(array, "F16"), _gguf, 0.86),
    ("GGUF Q8_0", lambda array: block_quantised(array, "Q8_0"), _gguf, None),
    ("GGUF Q4_0", lambda array: block_quantised(array, "Q4_0"), _gguf, None),
)


def run(setting: Setting) -> list[Row]:
    """Measure."""
    published = load_arrays(published_model() / "model.safetensors")
    with setting.node() as node:
        rows = [_share(setting, node, published, *case) for case in _SHARES]
        rows += _versions(setting, node, published)
        rows += _differences(setting, node, published)
    return rows


def _share(
    setting: Setting,
    node: Node,
    published: Weights,
    name: str,
    change: Callable[[Array], Array],
    save: Save,
    most: float | None,
) -> Row:
    source = _source(setting, save, {key: change(array) for key, array in published.items()})
    shares = {}
    for codec in ("auto", "zstd"):
        ref = f"oci:{setting.fresh('ratio')}:v1"
        built = node.build(source, ref, "--codec", codec, "--dict", "none", timeout_s=300)
        shares[codec] = built["stored_bytes"] / built["data_bytes"]
    return Row(
        f"stored share of {name}, {built['input_bytes'] / 1e6:.0f} MB",
        f"{shares['auto']:.3f} of raw",
        f"zstd alone {shares['zstd']:.3f}",
        shares["auto"],
        f"<= {most}" if most else "-",
        shares["auto"] <= most if most else None,
    )


def _versions(setting: Setting, node: Node, published: Weights) -> list[Row]:
    source = _source(setting, _safetensors, published)
    bases = {}
    for chunking in ("auto", "fixed"):
        bases[chunking] = f"oci:{setting.fresh('versions')}"
        node.build(source, f"{bases[chunking]}:v1", "--chunking", chunking, "--dict", "none")
    rng = np.random.default_rng(3)
    names = [name for name, array in published.items() if array.dtype == "F32"]
    chosen = set(rng.choice(names, len(names) // 10, replace=False).tolist())
    tenth = {name: trained(array, FINE_TUNE, rng) if name in chosen else array for name, array in published.items()}
    unchanged = 1 - sum(len(published[name].data) for name in chosen) / sum(len(a.data) for a in published.values())
    cases: list[tuple[str, Save, Weights, float]] = [
        ("header edit", _header_edit, published, 0.99),
        ("tensors in another order", _reordered, published, 0.99),
        ("1 file to 3 shards", _sharded, published, 0.99),
        ("safetensors to GGUF", _gguf, published, 0.99),
        (f"10 % of the tensors changed, {unchanged:.3f} of the bytes not", _header_edit, tenth, unchanged - 0.01),
    ]
    rows = []
    for number, (name, save, arrays, least) in enumerate(cases):
        changed = _source(setting, save, arrays)
        shares = {}
        for chunking, where in bases.items():
            built = node.build(
                changed, f"{where}:v2-{number}", "--chunking", chunking, "--dict", f"{where}:v1", "--dict", "none"
            )
            shares[chunking] = sum(built["reused_from"].values()) / built["data_bytes"]
        rows.append(
            Row(
                f"bytes taken over from the base, {name}",
                f"{shares['auto']:.4f}",
                f"fixed chunks {shares['fixed']:.4f}",
                shares["auto"],
                f">= {least:.3f}",
                shares["auto"] >= least,
            )
        )
    return rows


def _differences(setting: Setting, node: Node, published: Weights) -> list[Row]:
    where = f"oci:{setting.fresh('differences')}"
    before = _source(setting, _safetensors, {name: cast(array, "BF16") for name, array in published.items()})
    old = node.build(before, f"{where}:v1", "--dict", "none")
    rows = []
    for name, moved_by, least in (("dense fine-tune", FINE_TUNE, 3.0), ("one optimiser step", ONE_STEP, 12.0)):
        rng = np.random.default_rng(4)
        after = _source(
            setting,
            _safetensors,
            {key: cast(trained(array, moved_by, rng), "BF16") for key, array in published.items()},
        )
        built = node.build(after, f"{where}:{least:g}", "--dict", "none", "--base", f"{where}:v1")
        alone = node.build(after, f"{where}:alone-{least:g}", "--dict", f"{where}:v1", "--dict", "none")
        factor = built["data_bytes"] / built["stored_bytes"]
        cold = (built["stored_bytes"] + built["base_bytes"]) / alone["stored_bytes"]
        rows.append(
            Row(
                f"bf16 {name} with --base, raw / stored",
                f"{factor:.2f}",
                f"without {alone['data_bytes'] / alone['stored_bytes']:.2f}",
                factor,
                f">= {least:g}",
                factor >= least,
                f"a node that lacks the base reads {cold:.2f} times what it would without --base, the base being "
                f"{old['stored_bytes'] / 1e6:.0f} MB",
            )
        )
    return rows


def _source(setting: Setting, save: Save, arrays: Weights) -> Path:
    directory = setting.fresh("source")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    save(directory, arrays)
    return directory
