"""Mount records: round trip, newer fields, strangers with a recycled pid."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from rafsfs.errors import FormatError
from rafsfs.fuse.spec import MountSpec, load_spec, load_specs, process_start


def make(tmp_path: Path, **more: object) -> MountSpec:
    (tmp_path / "mounts").mkdir(exist_ok=True)
    spec = MountSpec("id1", "oci:/x:v1", "sha256:" + "0" * 64, "/mnt", str(tmp_path))
    for name, value in more.items():
        setattr(spec, name, value)
    return spec


def test_a_saved_spec_loads_equal_and_is_private(tmp_path: Path) -> None:
    spec = make(tmp_path, deadline_s=3.5, registry={"plain_http": True})
    spec.save()
    assert load_spec(spec.path) == spec
    assert list(load_specs(str(tmp_path))) == [spec]
    assert os.stat(spec.path).st_mode & 0o777 == 0o600
    spec.remove()
    spec.remove()
    assert list(load_specs(str(tmp_path))) == []


def test_fields_of_a_later_version_are_ignored_and_rubbish_is_left_out(tmp_path: Path) -> None:
    spec = make(tmp_path)
    spec.save()
    data = json.loads(Path(spec.path).read_text())
    Path(spec.path).write_text(json.dumps({**data, "colour": "green"}))
    assert load_spec(spec.path) == spec
    Path(tmp_path, "mounts", "bad.json").write_text("{")
    assert list(load_specs(str(tmp_path))) == [spec]
    with pytest.raises(FormatError):
        load_spec(str(tmp_path / "mounts" / "bad.json"))


def test_a_process_is_known_by_its_start_not_its_pid_alone(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        start = process_start(process.pid)
        assert make(tmp_path, worker_pid=process.pid, worker_start=start).worker_alive()
        assert not make(tmp_path, worker_pid=process.pid, worker_start=start - 1).worker_alive()
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(process.pid) == 0  # a zombie is dead
    process.wait()
    assert not make(tmp_path, worker_pid=process.pid, worker_start=start).worker_alive()
