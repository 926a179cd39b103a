"""rafs.toml: precedence, layers, and mistakes in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import rafsfs.config
from cli import cmd_cache, cmd_mount
from cli.main import COMMANDS, invoke, main
from cli.settings import check_config, option_defaults
from rafsfs.config import default_cache_dir, load_config, state_dir
from rafsfs.errors import UsageError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's file, not yet there; the system's lies beside it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("RAFS_CONFIG", raising=False)
    monkeypatch.setattr(rafsfs.config, "SYSTEM_CONFIG", str(tmp_path / "system.toml"))
    for name in list(os.environ):
        if name.startswith("RAFS_"):
            monkeypatch.delenv(name)
    path = tmp_path / "rafs" / "rafs.toml"
    path.parent.mkdir()
    return path


def mount_options(*arguments: str) -> dict[str, Any]:
    context = click.Context(main)
    command = main.get_command(context, "mount")
    assert command is not None
    with command.make_context("mount", [*arguments, "oci:x", "dir"], parent=context) as child:
        return dict(child.params)


def test_without_a_file_the_defaults_hold(config: Path) -> None:
    assert load_config() == {}
    assert mount_options()["prefetch"] == "none"
    assert mount_options()["deadline"] == 60.0


def test_command_line_wins_over_environment_over_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("[mount]\ndeadline = 5\n")
    assert mount_options()["deadline"] == 5.0
    monkeypatch.setenv("RAFS_DEADLINE", "7s")
    assert mount_options()["deadline"] == 7.0
    assert mount_options("--deadline", "1m")["deadline"] == 60.0


def test_the_users_file_lies_over_the_systems_key_by_key(config: Path, tmp_path: Path) -> None:
    (tmp_path / "system.toml").write_text("plain-http = true\n[mount]\ndeadline = 5\nprefetch = 'all'\n")
    config.write_text("[mount]\ndeadline = 6\n")
    options = mount_options()
    assert (options["deadline"], options["prefetch"], options["plain_http"]) == (6.0, "all", True)


def test_a_commands_table_wins_over_what_holds_for_all(config: Path) -> None:
    config.write_text("cache_dir = '/one'\nregistry-timeout = '10s'\n[mount]\ncache-dir = '/two'\n")
    options = mount_options()
    assert (options["cache_dir"], options["registry_timeout"]) == ("/two", 10.0)


def test_subcommands_share_the_table_of_their_group(config: Path) -> None:
    defaults = option_defaults({"cache_dir": "/one", "cache": {"unused": True}}, "cache", cmd_cache.command)
    assert defaults["ls"] == {"cache_dir": "/one"}
    assert defaults["rm"] == {"cache_dir": "/one", "unused": True}


def test_a_single_value_of_a_repeatable_option_is_not_cut_into_letters(config: Path) -> None:
    config.write_text("[build]\nexclude = '*.tmp'\n")
    context = click.Context(main)
    assert main.get_command(context, "build") is not None
    assert context.default_map == {"build": {"exclude": ["*.tmp"]}}


def test_names_are_those_of_the_command_line(config: Path) -> None:
    assert option_defaults({"mount": {"json": True}}, "mount", cmd_mount.command) == {"as_json": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[mount]\nprefetsch = 'all'\n", "prefetsch"),
        ("[mounts]\nprefetch = 'all'\n", "mounts"),
        ("prefetch = 'all'\n", "prefetch"),
        ("[mount\n", "cannot be read"),
        ("[mount]\nprefetch = 'some'\n", "some"),
        ("[mount]\ndeadline = 'soon'\n", "soon"),
        ("[mount]\ndeadline = -1\n", "-1"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_and_code_2(
    config: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    config.write_text(text)
    assert invoke(["mount", "oci:/nowhere:v1", "/nowhere"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_what_acts_once_cannot_be_set_in_a_file(config: Path) -> None:
    with pytest.raises(UsageError, match="stop"):
        check_config({"daemon": {"stop": True}}, COMMANDS)


def test_a_file_that_was_asked_for_must_be_there(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFS_CONFIG", "absent.toml")
    with pytest.raises(UsageError, match=r"absent\.toml does not exist"):
        load_config()
    assert os.path.isabs(os.environ["RAFS_CONFIG"]), "the daemon runs elsewhere"


def test_help_works_with_a_broken_file(config: Path) -> None:
    config.write_text("[")
    assert CliRunner().invoke(main, ["--help"]).exit_code == 0


def test_the_cache_is_where_the_environment_says(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAFS_CACHE_DIR", "relative")
    assert default_cache_dir() == os.path.abspath("relative")
    monkeypatch.delenv("RAFS_CACHE_DIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_cache_dir() == "/var/lib/rafs"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setenv("XDG_STATE_HOME", "/states")
    assert (default_cache_dir(), state_dir()) == ("/caches/rafs", "/states/rafs")
