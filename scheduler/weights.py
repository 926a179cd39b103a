"""What makes a good parent or neighbour: named weights, one score. Pure.

Compared with Dragonfly's default evaluator (load 0.6, IDC 0.2, location 0.1, host type 0.1): a peer here picks its parent per request by
the
rates that it measures itself, so load weighs less in who is introduced to whom, and where a peer stands weighs more; failures are new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LOAD: Final = 0.35
"""1 with no neighbours, 0 with MOST_NEIGHBOURS."""
ZONE: Final = 0.25
"""1 in the same zone. Traffic between zones is what clusters pay for."""
RACK: Final = 0.15
"""1 in the same rack of the same zone."""
KIND: Final = 0.10
"""1 for an ordinary peer, 0 for a seed: seeds are wanted at the registry's side of the mesh, their upload is scarce."""
FAILURES: Final = 0.15
"""Divided by one more than the recent complaints and broken leases."""
MOST_NEIGHBOURS: Final = 16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer stands. Empty: not known, and not equal to anything."""

    zone: str = ""
    rack: str = ""


def score(asker: Place, other: Place, *, degree: int, is_seed: bool, failures: float) -> float:
    """Return how good a neighbour `other` would be for `asker`, 0 to 1. `degree`: neighbours that it has; `failures`: recent ones."""
    same_zone = bool(asker.zone) and asker.zone == other.zone
    same_rack = same_zone and bool(asker.rack) and asker.rack == other.rack
    return (
        LOAD * max(0.0, 1 - degree / MOST_NEIGHBOURS)
        + ZONE * same_zone
        + RACK * same_rack
        + KIND * (not is_seed)
        + FAILURES / (1.0 + failures)
    )
