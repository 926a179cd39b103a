"""What is installed: five packages, all of one distribution, with types, and nothing else."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib

from setuptools import find_packages

from .source_tree import PACKAGES, ROOT, imports, modules


def project() -> dict[str, object]:
    found: dict[str, object] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return found


def test_each_of_the_five_names_is_ours_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: sorted(set(owners.get(name, []))) for name in PACKAGES} == {name: ["rafs"] for name in PACKAGES}


def test_the_distribution_holds_the_five_packages_and_no_tests() -> None:
    include = project()["tool"]["setuptools"]["packages"]["find"]["include"]  # type: ignore[index]
    found = find_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in found} == set(PACKAGES)
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(found) == on_disk


def test_every_package_says_that_it_has_types() -> None:
    data = project()["tool"]["setuptools"]["package-data"]  # type: ignore[index]
    assert {name for name, files in data.items() if "py.typed" in files} == set(PACKAGES)
    assert all((ROOT / name / "py.typed").exists() for name in PACKAGES)


def test_the_console_script_is_the_command_line() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="rafs")
    assert script.load() is not None
    assert script.value == "cli.main:run"


def test_constraints_pin_every_dependency_and_name_no_index() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all("==" in line and "://" not in line and not line.startswith("-") for line in lines if line.strip())
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    metadata = project()["project"]
    wanted = [*metadata["dependencies"], *metadata["optional-dependencies"]["dev"]]  # type: ignore[index]
    assert {distribution(line) for line in wanted} <= pinned


def distribution(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


def test_everything_that_is_imported_is_a_declared_dependency() -> None:
    """A package that is here by chance is missing on the next machine."""
    declared = {distribution(line) for line in project()["project"]["dependencies"]}  # type: ignore[index]
    owners = importlib.metadata.packages_distributions()
    imported = {name.partition(".")[0] for module in modules() for name in imports(module)}
    others = imported - set(PACKAGES) - sys.stdlib_module_names - {""}
    assert others
    # What only the driver of volumes needs is an extra, so that nobody else installs it.
    extra = {distribution(line) for line in project()["project"]["optional-dependencies"]["csi"]}  # type: ignore[index]
    driver = {
        name.partition(".")[0] for module in modules() if module.startswith("rafsfs.csi") for name in imports(module)
    }
    elsewhere = {
        name.partition(".")[0]
        for module in modules()
        if not module.startswith("rafsfs.csi")
        for name in imports(module)
    }
    assert elsewhere & {"google", "grpc"} <= {"grpc"}  # `rafs csi` looks whether it is there
    others -= {name for name in driver & others if extra & {owner.lower().replace("_", "-") for owner in owners[name]}}
    undeclared = {name for name in others if not declared & {owner.lower().replace("_", "-") for owner in owners[name]}}
    assert undeclared == set()
