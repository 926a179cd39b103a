"""Every error becomes one line and one exit code, in one place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from cli import run
from cli.main import invoke
from rafsfs import siblings
from rafsfs.errors import DeadlineError, NotFoundError, RafsError

from .conftest import Rafs


def test_an_error_of_ours_is_its_message_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.report(NotFoundError("no\n  such\tthing")) == 21
    assert capsys.readouterr().err == "rafs: no such thing\n"


def test_our_error_comes_out_of_nested_groups_before_others() -> None:
    ours = DeadlineError("late")
    group = BaseExceptionGroup(
        "", [KeyboardInterrupt(), ExceptionGroup("", [ValueError(), ExceptionGroup("", [ours])])]
    )
    assert run.single(group) is ours
    assert isinstance(run.single(BaseExceptionGroup("", [ValueError(), KeyboardInterrupt()])), KeyboardInterrupt)


def test_an_error_in_a_nursery_is_raised_as_itself() -> None:
    async def fail() -> None:
        raise NotFoundError("gone")

    async def use_case() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail)
            nursery.start_soon(trio.sleep_forever)

    with pytest.raises(NotFoundError, match="gone"):
        run.run_async(use_case)


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.report(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "rafs: interrupted\n"


def test_the_machines_refusals_name_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.report(PermissionError(13, "Permission denied", b"/some/\xff")) == 1
    assert capsys.readouterr().err == "rafs: /some/\\udcff: Permission denied\n"


def test_a_fault_of_ours_leaves_a_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("RAFS_DEBUG", raising=False)
    with pytest.raises(ValueError, match="unforeseen") as caught:
        raise ValueError("unforeseen")
    assert run.report(caught.value) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    path = said.split()[-1]
    assert "in test_a_fault_of_ours" in Path(path).read_text()
    assert os.stat(path).st_mode & 0o077 == 0, "a traceback may show what is private"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFS_DEBUG", "1")
    with pytest.raises(RafsError) as caught:
        raise NotFoundError("gone")
    assert run.report(caught.value) == 21
    assert "in test_debug_shows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mount"], "REF"),
        (["mount", "oci:x", "dir", "--prefetch", "some"], "some"),
        (["mount", "oci:x", "dir", "--deadline", "0"], "between"),
        (["build", ".", "-t", "oci:x", "--chunk-size", "big"], "big"),
        (["build", "/nowhere/at/all", "-t", "oci:x"], "/nowhere/at/all"),
        (["cache", "rm"], "--unused"),
        (["ls", "no reference"], "no reference"),
        (["--nonsense"], "nonsense"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert invoke(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("rafs: ")
    assert said in captured.err


def test_a_reader_that_goes_away_ends_the_command_quietly(rafs: Rafs, ref: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rafsfs", "cat", ref, "weights.bin"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "HOME": str(rafs.home)},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(30), said) == (141, b"")


@pytest.mark.parametrize("name", ["cli", "scheduler"])
def test_a_package_that_shadows_ours_is_named(rafs: Rafs, name: str) -> None:
    (rafs.home / f"{name}.py").write_text("raise SystemExit('the wrong one was loaded')\n")
    done = subprocess.run(
        [sys.executable, "-m", "rafsfs", "--help"],
        capture_output=True,
        text=True,
        cwd=rafs.home,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2
    assert str(rafs.home / f"{name}.py") in done.stderr
    assert done.stderr.count("\n") == 1
    assert rafs("--version").returncode == 0, "the console script does not look into the working directory"


def test_our_own_packages_pass() -> None:
    siblings.check_siblings()


def test_version_and_help_exit_with_0(rafs: Rafs) -> None:
    assert rafs("--version").stdout.startswith("rafs")
    assert rafs("--help").returncode == 0
    assert rafs().returncode == 2
