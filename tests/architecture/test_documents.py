"""Documents that repeat what the source says are held against it."""

from __future__ import annotations

import re
import runpy

from rafsfs import errors

from .source_tree import ROOT


def test_the_table_of_errors_is_current() -> None:
    render = runpy.run_path(str(ROOT / "scripts" / "errors_table.py"))["render"]
    assert (ROOT / "docs" / "errors.md").read_text() == render(), "run: python scripts/errors_table.py > docs/errors.md"


def test_every_error_class_has_an_exit_code_of_its_own() -> None:
    kinds = [getattr(errors, name) for name in errors.__all__]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 126 for code in codes)


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("changelog.d/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
