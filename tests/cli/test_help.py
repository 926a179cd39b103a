"""What holds for every command and every option, read from the command line itself."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from cli.main import COMMANDS, main

ACTIONS = {("daemon", "--stop"), ("daemon", "--unmount")}
"""Options that do something once; in the environment they would do it to every daemon that is started."""
RESERVED = {"convert", "index", "trace"}


def all_commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = importlib.import_module(f"cli.cmd_{name}").command
        yield name, command
        if isinstance(command, click.Group):
            for child, each in command.commands.items():
                yield f"{name} {child}", each


NAMES = [name for name, _ in all_commands()]


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_with_an_example_of_the_command(name: str) -> None:
    result = CliRunner().invoke(main, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert result.output.startswith("Usage: ")
    last = result.output.strip().split("\n\n")[-1].strip()
    assert last.startswith(f"Example: rafs {name}"), result.output


def test_every_option_has_an_environment_twin_and_help() -> None:
    twins: dict[str, set[tuple[str, ...]]] = {}
    for name, command in all_commands():
        for option in command.params:
            if not isinstance(option, click.Option) or (name, option.opts[0]) in ACTIONS:
                continue
            assert isinstance(option.envvar, str), f"rafs {name} {option.opts[0]}"
            assert option.envvar.startswith("RAFS_")
            assert option.help, f"rafs {name} {option.opts[0]}"
            assert option.show_envvar
            twins.setdefault(option.envvar, set()).add(tuple(text for text in option.opts if text.startswith("--")))
    assert {name: options for name, options in twins.items() if len(options) > 1} == {}, "one name, one meaning"


def test_values_that_are_no_text_show_their_default() -> None:
    for name, command in all_commands():
        for option in command.params:
            if (
                isinstance(option, click.Option)
                and not option.is_flag
                and not isinstance(option.type, click.types.StringParamType)
            ):
                context = click.Context(command, info_name=name)
                (_, text) = option.get_help_record(context) or ("", "")
                assert "default" in text or isinstance(option.type, click.Path), f"rafs {name} {option.opts[0]}"


def test_commands_are_those_that_work() -> None:
    assert RESERVED.isdisjoint(COMMANDS)
    result = CliRunner().invoke(main, ["--help"])
    assert all(f"\n  {name} " in result.output for name in COMMANDS)


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_command_of_a_later_version_is_no_command(name: str) -> None:
    assert CliRunner().invoke(main, [name]).exit_code == 2
