"""Which rung a mount gets, and when it is promoted: pure decisions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.erofs.generation import MOST_ALIVE, Generation, promotion
from rafsfs.erofs.probe import MODES, Ladder, Rung, choose
from rafsfs.errors import MountError, UsageError

RUNGS = ("erofs", "lazy", "fuse", "kernel")


def ladder(**reasons: str) -> Ladder:
    return Ladder({name: Rung(name, reasons.get(name, "")) for name in RUNGS})


def generation(rung: str, plain: list[bool]) -> Generation:
    return Generation(1, rung, ["erofs-1"], 7, "boot", plain)


@given(
    st.sampled_from(MODES), st.booleans(), st.fixed_dictionaries({name: st.sampled_from(["", "no"]) for name in RUNGS})
)
def test_a_rung_that_cannot_be_had_is_never_chosen_but_fuse_as_the_last(
    mode: str, complete: bool, reasons: dict[str, str]
) -> None:
    try:
        rung, why = choose(mode, complete=complete, ladder=ladder(**reasons))
    except MountError:
        assert mode != "auto"
        return
    assert mode in {"auto", rung} or (complete and rung == "erofs")
    assert rung != "kernel" or mode == "kernel"
    if mode == "auto":
        assert bool(why) == (rung == "fuse")
        assert rung == "fuse" or not reasons[rung]


@given(st.booleans())
def test_only_a_complete_image_is_mounted_without_anybody_to_ask(complete: bool) -> None:
    assert choose("auto", complete=complete, ladder=ladder())[0] == ("erofs" if complete else "lazy")
    if not complete:
        with pytest.raises(MountError, match="rafs pull"):
            choose("erofs", complete=False, ladder=ladder())


def test_a_mode_that_is_none_is_a_mistake_of_the_user() -> None:
    with pytest.raises(UsageError, match="auto, fuse, erofs, lazy, kernel"):
        choose("nfs", complete=True, ladder=ladder())


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=8), st.integers(1, 6), st.floats(0, 100))
def test_a_plain_device_whose_data_is_damaged_is_always_replaced(
    spaces: list[tuple[bool, bool]], alive: int, since: float
) -> None:
    attached = generation("lazy", [plain for plain, _ in spaces])
    settled = [now for _, now in spaces]
    wanted = promotion(attached, settled, alive=alive, since_last_s=since)
    damaged = any(plain and not now for plain, now in spaces)
    better = any(now and not plain for plain, now in spaces)
    assert wanted.replace or not damaged
    assert not wanted.replace or damaged or better
    if better and all(settled):
        assert wanted.replace


def test_promotion_by_the_piece_is_bounded_in_pace_and_number() -> None:
    attached = generation("lazy", [False, False])
    some = [True, False]
    assert promotion(attached, some, alive=1, since_last_s=60).replace
    assert not promotion(attached, some, alive=1, since_last_s=5).replace
    assert not promotion(attached, some, alive=MOST_ALIVE, since_last_s=60).replace
    assert promotion(attached, [True, True], alive=MOST_ALIVE, since_last_s=0).replace
    assert not promotion(generation("kernel", [False, False]), [True, True], alive=1, since_last_s=60).replace
