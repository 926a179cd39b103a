"""A registry that goes away or lies, under a mount that stays: never a wrong byte, an error in time, recovery by itself."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path

import pytest

from tests.support.processes import Node, drop_page_cache, read_within
from tests.support.registry import Registry
from tests.support.trees import pattern

_DEADLINE_S = 5.0
_SLACK_S = 3.0
_SIZE = 3 << 20
_FILES = 16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of three chunks each, none like another, and more of them than is read ahead (32 MiB)."""
    top = tmp_path / "source"
    top.mkdir()
    for number in range(_FILES):
        (top / f"file-{number:02d}").write_bytes(pattern(_SIZE, number))
    return top


@pytest.fixture
def mounted(node: Node, registry: Registry, source: Path) -> Path:
    """The source, pushed to a registry and mounted with a short deadline."""
    ref = f"localhost:{registry.port}/e2e/files:v1"
    node.build(source, ref)
    return node.mount(ref, "mnt", "--deadline", str(_DEADLINE_S))


def test_a_registry_that_goes_away_costs_only_what_is_missing_and_only_while_it_is_away(
    node: Node, registry: Registry, source: Path, mounted: Path
) -> None:
    names = sorted(os.listdir(source))
    present, missing = names[0], names[-1]
    assert (mounted / present).read_bytes() == (source / present).read_bytes()
    log_before = len(node.log())
    registry.stop()

    drop_page_cache(mounted / present)
    assert read_within(mounted / present, 0, _SIZE, 10) == (source / present).read_bytes()

    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output error") as raised:
        read_within(mounted / missing, 0, 4096, _DEADLINE_S + _SLACK_S)
    assert raised.value.errno == errno.EIO
    assert time.monotonic() - started < _DEADLINE_S + _SLACK_S

    lines = [line for line in node.log()[log_before:].splitlines() if re.search(r"sha256:[0-9a-f]{12}", line)]
    telling = [line for line in lines if "chunk" in line and re.search("refused|reach|connect", line, re.IGNORECASE)]
    assert telling, f"no line names chunk, blob and cause:\n{node.log()[log_before:]}"
    assert "Traceback" not in node.log()

    registry.start()
    assert read_within(mounted / missing, 0, _SIZE, 20) == (source / missing).read_bytes()
    for name in names:
        assert read_within(mounted / name, 0, _SIZE, 20) == (source / name).read_bytes()


def test_one_failed_read_is_one_line_in_the_log(node: Node, registry: Registry, mounted: Path) -> None:
    registry.stop()
    log_before = len(node.log())
    with pytest.raises(OSError, match="Input/output error"):
        read_within(mounted / "file-02", 0, 4096, _DEADLINE_S + _SLACK_S)
    lines = node.log()[log_before:].splitlines()
    naming = [line for line in lines if "chunk" in line and re.search(r"sha256:[0-9a-f]{12}", line)]
    # Attempts are told while they go on; the end of the read itself is told once.
    assert len([line for line in naming if "failed with EIO" in line]) == 1, "\n".join(lines)
    assert len(naming) <= 4, "\n".join(lines)


def test_a_corrupt_blob_costs_exactly_its_chunks_and_check_names_them(
    node: Node, registry: Registry, source: Path, tmp_path: Path
) -> None:
    ref = f"localhost:{registry.port}/e2e/files:v1"
    # Codec raw: a place in the blob is then a place in a file, so the test knows which chunk it broke.
    node.build(source, ref, "--codec", "raw", "--chunking", "fixed")
    wanted = {name: (source / name).read_bytes() for name in sorted(os.listdir(source))}
    victim, at = "file-03", 1_500_000
    blob = flip_byte(registry.storage, wanted[victim][at - 16 : at + 16])

    check = node.run("check", ref, "--data")
    assert check.returncode == 12, check
    assert "Traceback" not in check.stderr + check.stdout
    said = check.stdout + check.stderr
    assert f"sha256:{blob}"[:19] in said
    named = [line for line in said.splitlines() if "chunk" in line and "sha256:" in line]
    assert len(named) == 1, f"one chunk is corrupt, check says:\n{said}"

    mounted = node.mount(ref, "mnt", "--deadline", str(_DEADLINE_S))
    bad: list[tuple[str, int]] = []
    for name, content in wanted.items():
        for offset in range(0, _SIZE, 65_536):
            try:
                got = read_within(mounted / name, offset, 65_536, 2 * _DEADLINE_S) if name == victim else None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                bad.append((name, offset))
            else:
                assert got is None or got == content[offset : offset + 65_536]
        if name != victim:
            assert read_within(mounted / name, 0, _SIZE, 20) == content
    chunk = 1 << 20
    first = at // chunk * chunk
    assert bad == [(victim, offset) for offset in range(first, first + chunk, 65_536)]

    flip_byte(registry.storage, wanted[victim][at - 16 : at] + bytes([wanted[victim][at] ^ 1]), at=16)
    assert read_within(mounted / victim, 0, _SIZE, 20) == wanted[victim]


def flip_byte(storage: Path, around: bytes, at: int = 16) -> str:
    """Change the lowest bit of byte `at` of the only place in a registry's blobs that holds `around`; return the digest."""
    found = []
    for path in storage.rglob("data"):
        data = path.read_bytes()
        place = data.find(around)
        if place >= 0:
            found.append((path, place))
    assert len(found) == 1, f"{len(found)} blobs hold the bytes"
    path, place = found[0]
    with path.open("r+b") as file:
        file.seek(place + at)
        file.write(bytes([around[at] ^ 1]))
    return path.parent.name
