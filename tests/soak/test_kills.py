"""The soak, short: a few seeded kills in each mode of the kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.kills import soak
from tests.support.kernel_erofs import why_no_kernel_mount
from tests.support.processes import needs, why_no_mount

_REASON = why_no_mount() or why_no_kernel_mount() or needs("docker-registry")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.mount,
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
]


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("erofs", 3),
        ("lazy", 8),
        ("kernel", 8),
    ],
)
def test_no_kill_makes_a_wrong_byte_and_the_mount_comes_back(tmp_path: Path, mode: str, kills: int) -> None:
    summary = soak(mode, kills, 7, tmp_path).summary(mode)
    assert summary["wrong"] == []
    assert summary["errors_where_none_may_be"] == 0, summary["first_misplaced"]
    assert summary["kills"] == kills
    assert summary["reads"] > 0
