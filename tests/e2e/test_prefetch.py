"""`rafs prefetch` on a real mount: whole files, plans, and what is refused; and what readers of tensors cost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rafsfs.fetch.waste import FLOOR_BYTES
from tests.support.models import read_header
from tests.support.processes import Node

FILE = "model.safetensors"


@pytest.fixture
def mount(node: Node, reference: Callable[[str], str], model: Path) -> Path:
    ref = reference("model")
    node.build(model, ref)
    return node.mount(ref)


def test_a_directory_is_present_when_the_command_returns(node: Node, mount: Path, model: Path) -> None:
    result = node.json("prefetch", mount)
    status = node.mount_status(mount)
    assert status["present_bytes"] == status["data_bytes"] == result["fetched_bytes"] + result["local_bytes"]
    assert (mount / FILE).read_bytes() == (model / FILE).read_bytes()


def test_a_plan_brings_what_it_names_and_little_more(node: Node, mount: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.jsonl"
    ranges = [(60 << 20, 2 << 20), (20 << 20, 3 << 20)]
    plan.write_text("".join(json.dumps({"path": FILE, "offset": a, "length": n}) + "\n" for a, n in ranges))
    result = node.json("prefetch", mount, "--plan", plan)
    assert result["wanted_bytes"] == 5 << 20
    assert 5 << 20 <= node.mount_status(mount)["present_bytes"] <= 14 << 20, "whole chunks, at both ends"
    again = node.json("prefetch", mount / FILE, "--order", "name")
    assert again["wanted_bytes"] == (mount / FILE).stat().st_size
    assert node.json("prefetch", mount / FILE)["fetched_bytes"] == 0, "it is all here"


REFUSED = {
    '[{"path": "nothing"}]': "the image has no /nothing",
    '[{"path": "model.safetensors", "offset": 99999999999}]': "which has",
    '[{"path": "model.safetensors", "offset": -1}]': "names bytes -1",
    "[7]": "entry 1 of the plan is not an object",
    '{"path": "model.safetensors"}\n{': "line 2 of plan",
    '[{"path": ""}]': "not a regular file",
}


def test_a_plan_with_a_bad_entry_is_refused_in_one_line_and_nothing_fetched(
    node: Node, model: Path, tmp_path: Path
) -> None:
    ref = f"oci:{tmp_path / 'layout'}:v1"  # where the image is from makes no difference
    node.build(model, ref)
    mount = node.mount(ref)
    for plan, words in REFUSED.items():
        (tmp_path / "plan").write_text(plan)
        result = node.run("prefetch", mount, "--plan", tmp_path / "plan")
        assert result.returncode == 2, plan
        assert words in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert node.mount_status(mount)["present_bytes"] == 0, plan
    result = node.run("prefetch", tmp_path)
    assert result.returncode != 0
    assert "is in no mount" in result.stderr


def test_readers_of_a_few_tensors_cost_no_more_than_the_bound_on_what_is_never_read(node: Node, mount: Path) -> None:
    path = mount / FILE
    header, start = read_header(path)
    places = sorted(info["data_offsets"] for name, info in header.items() if name != "__metadata__")
    large = [place for place in places if place[1] - place[0] >= 512 << 10]
    read = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        for first, stop in large[::10]:
            at = first
            while at < stop:
                at += len(os.pread(fd, min(1 << 20, stop - at), start + at))
            read += stop - first
    finally:
        os.close(fd)
    fetched = node.mount_status(mount)["sources"]["origin"]
    assert read <= fetched <= 2 * read + FLOOR_BYTES, "docs/prefetch.md, Waste"
