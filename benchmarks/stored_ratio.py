"""How much of real weights is stored, against the bytes themselves and against plain zstd on the same chunks?

The published float32 weights and their bf16 and fp16 casts, each built by `rafs build` into a layout of its own with codec auto and
with codec zstd. Ratios are exact and do not depend on the machine.
"""

from __future__ import annotations

from tests.support.models import cast_file, published_model

from .measure import Row
from .setting import Setting

_TARGETS = {"F32": 0.83, "BF16": 0.68, "F16": None}


def run(setting: Setting) -> list[Row]:
    """Measure."""
    rows = []
    for dtype, target in _TARGETS.items():
        source = setting.fresh(f"ratio-{dtype}")
        source.mkdir()
        cast_file(published_model() / "model.safetensors", source / "model.safetensors", dtype)
        shares = {}
        with setting.node() as node:
            for codec in ("auto", "zstd"):
                layout = setting.fresh(f"ratio-{dtype}-{codec}")
                built = node.build(source, f"oci:{layout}:v1", "--codec", codec, timeout_s=300)
                shares[codec] = built["stored_bytes"] / built["data_bytes"]
        rows.append(
            Row(
                f"stored share of {dtype} weights, {source.joinpath('model.safetensors').stat().st_size / 1e6:.0f} MB",
                f"{shares['auto']:.3f} of raw",
                f"zstd alone {shares['zstd']:.3f}",
                shares["auto"],
                f"<= {target}" if target else "-",
                shares["auto"] <= target if target else None,
            )
        )
    return rows
