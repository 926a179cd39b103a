"""Pushes that are cut short: nothing half-made becomes visible, and what was sent is not sent again."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

from tests.support.compare import compare_trees
from tests.support.processes import Node, kill, wait_for
from tests.support.registry import Registry

from .wire import Wire, wire_to


def has_sent_or_ended(build: subprocess.Popen[bytes], wire: Wire, enough: int) -> bool:
    return wire.to_server > enough or build.poll() is not None


def test_an_interrupted_push_resumes_and_sends_the_rest_only(node: Node, registry: Registry, model: Path) -> None:
    """Finished blobs are not sent again. Unfinished ones are: docker-registry gives up an upload whose part was cut."""
    with wire_to(registry.port, bytes_per_s=60e6) as wire:
        ref = f"localhost:{wire.port}/e2e/model:v1"
        options = ("--space-size", "8MiB")
        build = node.start("build", model, "-t", ref, *options)
        try:
            wait_for(partial(has_sent_or_ended, build, wire, 85_000_000), "85 MB are sent", 60)
            assert build.poll() is None, "the build must be killed in the middle"
        finally:
            kill(build.pid)
            build.communicate()

        missing = node.run("inspect", ref)
        assert missing.returncode == 21, "nothing is visible under the tag"

        wire.to_server = 0
        built = node.build(model, ref, *options)
        # Small blobs go out whole, several at once: some were finished at 85 MB, others were on their way.
        assert built["sent_bytes"] < 0.9 * built["stored_bytes"]
        assert wire.to_server < 1.02 * built["sent_bytes"] + (1 << 20)

        wire.to_server = 0
        again = node.build(model, ref, *options)
        assert again["digest"] == built["digest"]
        assert wire.to_server < 1 << 20, "what the registry has is not sent again"
    assert compare_trees(model, node.mount(f"localhost:{registry.port}/e2e/model:v1")) == []


def test_a_push_that_is_cut_off_ends_with_a_line_and_succeeds_when_run_again(
    node: Node, registry: Registry, model: Path
) -> None:
    with wire_to(registry.port, bytes_per_s=60e6) as wire:
        ref = f"localhost:{wire.port}/e2e/model:v1"
        build = node.start("build", model, "-t", ref)
        try:
            wait_for(partial(has_sent_or_ended, build, wire, 20_000_000), "20 MB are sent", 60)
            wire.cut()
            out, _ = build.communicate(timeout=120)
        finally:
            build.kill()
            build.communicate()
        if build.returncode:
            assert build.returncode == 23, out
            assert len(out.strip().splitlines()) == 1, out
            assert node.run("inspect", ref).returncode == 21, "nothing is visible under the tag"
            node.build(model, ref)
    assert compare_trees(model, node.mount(f"localhost:{registry.port}/e2e/model:v1")) == []


def test_an_unreadable_or_changing_source_leaves_no_tag(node: Node, registry: Registry, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    os.symlink("nowhere", tmp_path / "dangling")
    ref = f"localhost:{registry.port}/e2e/broken:v1"
    for bad in (tmp_path / "absent", tmp_path / "dangling"):
        result = node.run("build", bad, "-t", ref)
        assert result.returncode in {2, 30}, result
        assert str(bad) in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert node.run("inspect", ref).returncode == 21
