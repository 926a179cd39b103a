"""Who may import whom: the tables of docs/architecture.md, held against the source."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import pytest

from .source_tree import PACKAGES, ROOT, calls, imports, modules, top_level_imports

_ALLOWED: Final = {
    "rafsfs": {"rafsfs"},
    "builder": {"builder", "rafsfs"},
    "p2p": {"p2p", "rafsfs"},
    "scheduler": {"scheduler", "rafsfs", "p2p.protocol"},
    "cli": set(PACKAGES),
}
_ENTRY: Final = "rafsfs.__main__"
"""`python -m rafsfs` is the command line, so this one module reaches up to `cli`."""

_RANKS: Final = {
    **dict.fromkeys(("errors", "types", "units", "logs", "interfaces", "config", "metrics", "patterns", "siblings"), 0),
    "format": 1,
    "net": 2,
    "weights": 2,
    "registry": 3,
    "store": 3,
    "image": 4,
    "view": 4,
    "fetch": 5,
    "files": 6,
    "fuse": 7,
    "flat": 7,
    "erofs": 7,
    "daemon": 7,
    "mirror": 7,
    "csi": 8,
}
_NO_IO: Final = {
    *("asyncio", "glob", "httpx", "io", "lmdb", "multiprocessing", "pathlib", "pyfuse3", "random", "secrets", "select"),
    *("selectors", "shutil", "signal", "socket", "ssl", "subprocess", "tempfile", "time", "trio", "urllib"),
}  # fmt: skip
_PURE_OF_OS: Final = {"os.makedev", "os.major", "os.minor", "os.fsdecode", "os.fsencode"}
_HEAVY: Final = ("numpy", "httpx", "click", "rich", "lmdb", "prometheus_client", "cli", "builder")


def package_of(module: str) -> str:
    return module.partition(".")[0]


def inside(module: str, area: str) -> bool:
    return module == area or module.startswith(area + ".")


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module != _ENTRY
        for name in imports(module)
        if package_of(name) in PACKAGES and not any(inside(name, area) for area in _ALLOWED[package_of(module)])
    ]
    assert wrong == []


def test_parts_of_rafsfs_import_only_what_ranks_no_higher() -> None:
    def part(module: str) -> str:
        return ([*module.split("."), ""])[1]

    wrong = []
    for module in modules():
        if package_of(module) != "rafsfs" or module in {"rafsfs", _ENTRY}:
            continue
        assert part(module) in _RANKS, (
            f"{module}: give rafsfs.{part(module)} its place in docs/architecture.md and here"
        )
        for name in imports(module):
            # `from .. import __version__` is an import of rafsfs itself, which imports nothing.
            if package_of(name) != "rafsfs" or name == "rafsfs":
                continue
            same_rank = _RANKS[part(name)] == _RANKS[part(module)] and part(name) != part(module)
            if _RANKS[part(name)] > _RANKS[part(module)] or (same_rank and _RANKS[part(module)] not in {0, 7}):
                wrong.append(f"{module} imports {name}")
    assert wrong == []
    assert imports("rafsfs") <= {"__future__", "importlib", "importlib.metadata"}


def test_the_format_does_no_io_and_asks_no_clock() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if inside(module, "rafsfs.format")
        for name in imports(module)
        if package_of(name) in _NO_IO
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "area", ["p2p.core", "p2p.selection", "scheduler.engine", "scheduler.state", "scheduler.weights"]
)
def test_decisions_of_the_swarm_do_no_io_and_ask_no_clock(area: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if inside(module, area)
        for name in imports(module)
        if package_of(name) in _NO_IO - {"random"} or inside(name, "rafsfs.store") or inside(name, "rafsfs.net")
    ]
    assert wrong == [], "randomness comes as an argument, the rest from the shell"


def test_the_format_opens_no_file() -> None:
    wrong = [
        f"{module} calls {call}"
        for module in modules()
        if inside(module, "rafsfs.format")
        for call in calls(module)
        if call in {"open", "mmap", "mmap.mmap"} or (call.startswith("os.") and call not in _PURE_OF_OS)
    ]
    assert wrong == []


def test_there_is_no_cycle_between_modules_at_import() -> None:
    state: dict[str, str] = {}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", " → ".join([*trail, module])
        state[module] = "open"
        for name in sorted(top_level_imports(module) & modules().keys() - {package_of(module)}):
            visit(name, (*trail, module))
        state[module] = "done"

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("module", ["rafsfs.fuse.worker", "rafsfs.flat.worker", "rafsfs.erofs.guard"])
def test_a_mount_pays_for_nothing_that_it_does_not_use(module: str) -> None:
    code = f"import sys, {module}; print(*(m for m in {_HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.split() == []


def test_help_loads_no_event_loop_and_no_command() -> None:
    code = (
        "import sys; from cli.main import invoke; code = invoke(['--help']);"
        "print('LOADED', code, *(m for m in ('trio', 'httpx', 'numpy', 'rich', 'cli.cmd_build') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.splitlines()[-1] == "LOADED 0"
