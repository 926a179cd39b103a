"""Whether the packages beside `rafsfs` are ours: their names (`cli`, `builder`, ...) are common, and others may shadow them."""

from __future__ import annotations

import importlib.util
import os
from typing import Final

from .errors import UsageError

SIBLINGS: Final = ("builder", "cli", "p2p", "scheduler")


def check_siblings() -> None:
    """Raise UsageError if one of the sibling packages would be loaded from elsewhere than from beside this one.

    Asked before any of them is imported: with `python -m` the working directory comes first on the path.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        expected = os.path.join(home, name, "__init__.py")
        found = spec.origin if spec and spec.origin else None
        if found is None or os.path.abspath(found) != expected:
            raise UsageError(
                f"package {name} would come from {found or 'nowhere'}, expected {expected}; "
                f"run rafs from another directory or without PYTHONPATH"
            )
