"""The image holds what the package needs and nothing that is not pinned. Built it is elsewhere: this needs no container runtime."""

from __future__ import annotations

import re
import tomllib

from .conftest import ROOT

TEXT = (ROOT / "Dockerfile").read_text()


def test_it_copies_all_packages_and_only_what_is_let_into_the_context() -> None:
    copied = {
        source for line in re.findall(r"^COPY (?!--from)(.+)$", TEXT, re.MULTILINE) for source in line.split()[:-1]
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= copied
    assert all((ROOT / name).exists() for name in copied)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


def test_it_is_pinned_names_no_index_and_ends_as_nobody() -> None:
    assert "-c constraints.txt" in TEXT
    assert not re.search(r"index-url|https?://|:latest", TEXT)
    final = TEXT.rpartition("\nFROM ")[2]
    assert "gcc" not in final
    assert "\nUSER 65532:65532\n" in final
    assert 'ENTRYPOINT ["rafs"]' in final
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"ARG VERSION={project['project']['version']}" in final
