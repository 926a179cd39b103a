"""Run benchmarks: `python -m benchmarks [--quick] [--only NAME ...] [--dir DIR]`. Prints a table, writes nothing that stays."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from .measure import Row, commit, machine, table
from .setting import Setting

QUESTIONS = (
    "stored_ratio",
    "build_throughput",
    "decode",
    "chunk_size",
    "cold_read",
    "cached_read",
    "first_byte",
    "metadata",
    "memory",
    "csi_publish",
    "swarm_sim",
)


def main() -> int:
    """Run what was asked for; return 0 when every benchmark ran, whether or not targets are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less data (182 MB), three rounds")
    parser.add_argument(
        "--only", nargs="+", choices=QUESTIONS, default=QUESTIONS, metavar="NAME", help="of: %(choices)s"
    )
    parser.add_argument("--dir", type=Path, help="work on this disk (default: the temporary directory)")
    arguments = parser.parse_args()

    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {commit()}", machine(), sep="\n", flush=True)
    rows: list[Row] = []
    failed = []
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="rafs-bench-", dir=arguments.dir))
        setting = Setting(Path(directory), stack, quick=arguments.quick)
        for name in arguments.only:
            print(f"... {name}", file=sys.stderr, flush=True)
            try:
                rows += importlib.import_module(f".{name}", __package__).run(setting)
            except Exception as error:  # noqa: BLE001 - one that cannot run must not hide the others
                failed.append(name)
                print(f"{name} did not run: {error}", file=sys.stderr, flush=True)
        if "weights_bytes" in vars(setting):
            print(f"weights: {setting.weights_bytes / 1e6:.0f} MB")
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
