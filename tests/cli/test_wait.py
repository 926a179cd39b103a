"""How far a volume is, read off a page of the driver: the one that PATH is in, whatever else the pod has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cli.cmd_wait import shares_of


def volume(here: int, total: int, *devices: str, **more: object) -> dict[str, object]:
    return {"present_bytes": here, "total_bytes": total, "devices": list(devices), **more}


def test_the_volume_on_the_device_is_meant_else_all_of_the_page() -> None:
    page = {"volumes": [volume(1, 2, "0:7", "0:9"), volume(1, 4, "0:8")]}
    assert shares_of(page, "0:9") == [0.5]
    assert shares_of(page, "0:8") == [0.25]
    assert shares_of(page, "0:1") == [0.5, 0.25]
    assert shares_of(volume(3, 4), "0:1") == [0.75], "the page of one volume"
    assert shares_of({"volumes": [volume(0, 0)]}, "") == [1.0], "an image without data is here"


def test_a_model_of_a_dynamic_volume_is_meant_by_its_own_device() -> None:
    models = [volume(1, 2, "0:8", name="a"), volume(2, 2, "0:9", name="b")]
    page = {"volumes": [volume(3, 4, "0:7", models=models), volume(0, 9, "0:6")]}
    assert shares_of(page, "0:9") == [1.0]
    assert shares_of(page, "0:7") == [0.75]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.sampled_from(["0:7", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["volumes", "models", "devices", "present_bytes", "total_bytes"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


@given(_JSON)
def test_any_page_gives_a_list_of_shares(page: object) -> None:
    assert all(isinstance(share, float) for share in shares_of(page, "0:7"))
