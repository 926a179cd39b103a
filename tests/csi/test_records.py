"""Records outlive the driver that wrote them: drivers of other versions read them, and what nobody can read takes nothing away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.csi.records import Records, VolumeRecord, parse_record
from rafsfs.csi.volume import VolumeSpec, key_of

DIGEST = "sha256:" + "a" * 64
SPEC = VolumeSpec(ref="registry.example/models/llama:v1", prefetch="all", include=("*.json",))
MODEL = json.loads(
    json.dumps({"spec": VolumeSpec(ref="registry.example/models/b:v1").to_json(), "digest": DIGEST, "mount_key": "m2"})
)
RECORD = VolumeRecord("csi-1", "/pods/1/mount", SPEC, DIGEST, "m1", {"uid": "u"}, {"b": MODEL})
FORMAT_1 = """{
 "digest": "sha256:%s",
 "models": {},
 "mount_key": "m1",
 "pod": {"name": "vllm", "namespace": "default", "uid": "u"},
 "spec": {"dynamic": false, "exclude": [], "executable": false, "include": ["*.json"], "mode": "auto", "platform": "",
  "prefetch": "all", "ref": "registry.example/models/llama:v1", "sub_path": "", "token_audience": ""},
 "target": "/pods/1/mount",
 "volume_id": "csi-1"
}""" % ("a" * 64)
"""As the first drivers wrote it: must be readable for ever."""


def test_a_record_of_the_first_format_is_read_and_rewritten_in_the_present_one(tmp_path: Path) -> None:
    key = key_of("csi-1\0/pods/1/mount")
    (tmp_path / f"{key}.json").write_text(FORMAT_1)
    records = Records(str(tmp_path))
    record = records.find("csi-1", "/pods/1/mount")
    assert record is not None
    assert (record.spec, record.digest, record.mount_key, record.pod["name"]) == (SPEC, DIGEST, "m1", "vllm")
    records.save(record)
    assert json.loads((tmp_path / f"{key}.json").read_text())["format"] == 2
    assert list(Records(str(tmp_path))) == [record]


def test_a_record_of_a_later_driver_is_read_after_a_rollback(tmp_path: Path) -> None:
    Records(str(tmp_path)).save(RECORD)
    path = next(tmp_path.glob("*.json"))
    values = json.loads(path.read_text())
    values |= {"format": 3, "later": [1], "spec": {**values["spec"], "also_later": True}}
    path.write_text(json.dumps(values))
    assert list(Records(str(tmp_path))) == [RECORD]


@pytest.mark.logs_warnings
def test_while_a_record_cannot_be_read_no_mount_is_unused(tmp_path: Path) -> None:
    Records(str(tmp_path)).save(RECORD)
    path = next(tmp_path.glob("*.json"))
    path.write_text("{}")
    records = Records(str(tmp_path))
    assert list(records) == []
    assert not records.is_unused("m1")
    records.save(RECORD)  # as when the kubelet publishes again
    assert records.is_unused("m3")
    assert not records.is_unused("m1")
    assert not records.is_unused("m2")
    path.write_text("[")
    records = Records(str(tmp_path))
    records.remove("csi-1", "/pods/1/mount")  # as when it unpublishes
    assert records.is_unused("m1")
    assert list(tmp_path.iterdir()) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(json.loads(FORMAT_1))), JSON)
def test_any_value_in_a_record_gives_a_record_or_a_refusal(key: str, value: object) -> None:
    values = {**json.loads(FORMAT_1), key: value}
    try:
        record = parse_record(values)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    assert isinstance(record.key, str)
    assert isinstance(record.spec.ref, str)
