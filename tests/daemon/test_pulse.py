"""Who hangs is found after some looks, whatever came before, and nobody else is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rafsfs.daemon.pulse import SILENT_LOOKS, Pulse


@given(st.lists(st.sampled_from(["heard", "look"]), max_size=60))
def test_a_worker_hangs_when_it_has_spoken_and_then_not_for_some_looks(events: list[str]) -> None:
    pulse, silent = Pulse(), None
    for event in events:
        if event == "heard":
            pulse.heard()
            silent = 0
        else:
            silent = None if silent is None else silent + 1
            assert pulse.look() is (silent is not None and silent > SILENT_LOOKS)


def test_one_that_never_spoke_is_left_alone() -> None:
    pulse = Pulse()
    assert not any(pulse.look() for _ in range(1000))
