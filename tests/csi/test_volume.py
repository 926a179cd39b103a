"""What a pod may say of a volume, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.csi.codes import Code, CsiError
from rafsfs.csi.volume import (
    VolumeSpec,
    check_sub_path,
    digest_of_id,
    is_name,
    mount_key,
    parse_attributes,
    volume_id,
)
from rafsfs.types import Digest

_REF = "registry.example/models/llama:v1"
_DIGEST = Digest("sha256:" + "a" * 64)


def refused(attributes: dict[str, str], **options: object) -> str:
    with pytest.raises(CsiError) as error:
        parse_attributes(attributes, **options)  # type: ignore[arg-type]
    assert error.value.code is Code.INVALID_ARGUMENT
    assert "\n" not in str(error.value)
    return str(error.value)


def test_all_attributes_are_taken() -> None:
    spec = parse_attributes(
        {
            "ref": _REF,
            "prefetch": "all",
            "mode": "fuse",
            "include": '["*.safetensors", "*.json"]',
            "exclude": "*.bin, *.pt\nold/*",
            "subPath": "./a//b/",
            "csi.storage.k8s.io/pod.name": "pod",
        },
        flags=["ro", "exec"],
    )
    assert spec.include == ("*.safetensors", "*.json")
    assert spec.exclude == ("*.bin", "*.pt", "old/*")
    assert (spec.sub_path, spec.executable, spec.prefetch, spec.mode) == ("a/b", True, "all", "fuse")
    assert VolumeSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"ref": "oci:/etc"},
        {"ref": "localhost:5000/model:v1"},
        {"ref": "127.0.0.1:5000/model:v1"},
        {"ref": "[::1]:5000/model:v1"},
        {"ref": "no host"},
        {"ref": _REF, "cacheDir": "/etc"},
        {"ref": _REF, "plainHttp": "true"},
        {"ref": _REF, "prefetch": "everything"},
        {"ref": _REF, "mode": "passthrough"},
        {"ref": _REF, "subPath": "../../etc"},
        {"ref": _REF, "subPath": "a/../../etc"},
        {"ref": _REF, "subPath": "/etc"},
        {"ref": _REF, "include": '["a'},
        {"ref": _REF, "include": "[1]"},
        {"ref": _REF, "include": ",".join("a" * 65)},
        {"ref": _REF, "dynamic": "true"},
        {"dynamic": "maybe"},
    ],
)
def test_what_would_leave_the_image_or_weaken_the_node_is_refused(attributes: dict[str, str]) -> None:
    refused(attributes)


def test_mount_options_that_would_undo_protection_are_refused() -> None:
    for flag in ("rw", "suid", "dev", "bind", "remount"):
        with pytest.raises(CsiError):
            parse_attributes({"ref": _REF}, flags=[flag])


def test_a_dynamic_volume_is_inline() -> None:
    assert parse_attributes({"dynamic": "true"}).dynamic
    refused({"dynamic": "true"}, inline=False)


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=4))
def test_whatever_a_pod_says_is_a_spec_or_a_refusal(attributes: dict[str, str]) -> None:
    try:
        spec = parse_attributes({"ref": _REF, **attributes})
    except CsiError:
        return
    assert ".." not in spec.sub_path.split("/")


@given(st.text(max_size=200))
def test_a_sub_path_never_leaves_the_image(text: str) -> None:
    try:
        path = check_sub_path(text)
    except CsiError:
        return
    assert not path.startswith("/")
    assert all(part not in {"", ".", ".."} for part in path.split("/")) or path == ""


@given(st.text(max_size=300))
def test_a_volume_id_tells_its_digest_and_fits(name: str) -> None:
    identity = volume_id(name, _DIGEST)
    assert len(identity) <= 128
    assert digest_of_id(identity) == _DIGEST


@given(st.text(max_size=100))
def test_other_ids_are_not_taken_for_provisioned_ones(text: str) -> None:
    assert digest_of_id(text) is None


def test_volumes_share_a_mount_if_they_show_the_same_in_the_same_way() -> None:
    one, two = VolumeSpec(_REF, prefetch="all"), VolumeSpec(_REF, sub_path="a")
    assert mount_key("sha256:a", "r/m", one) == mount_key("sha256:a", "r/m", two)
    other = VolumeSpec(_REF, exclude=("*.bin",))
    keys = {mount_key(d, s, v) for d, s, v in (("a", "r", one), ("b", "r", one), ("a", "q", one), ("a", "r", other))}
    assert len(keys) == 4


@given(st.text(max_size=140))
def test_the_name_of_a_model_is_one_directory(name: str) -> None:
    if is_name(name):
        assert "/" not in name
        assert ".." not in name
        assert "\0" not in name
        assert not name.startswith(".")
