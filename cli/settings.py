"""Defaults of options from the config files, for the command that runs.

Decided here: what a key of rafs.toml means. A key is an option's long name; keys outside any table hold for every command that
has the option, keys in a command's table for that command (and its subcommands), and win. Rule: a name that no option has is an
error, never ignored. What has no environment twin (an action such as `--stop`) cannot be set in a file either.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import click

from rafsfs.errors import UsageError

from .options import SHARED


def option_defaults(config: Mapping[str, Any], name: str, command: click.Command) -> dict[str, Any]:
    """Return click's default map of one command. Raises UsageError for keys that mean nothing."""
    shared = {key: value for key, value in config.items() if not isinstance(value, dict)}
    unknown = sorted(set(map(_plain, shared)) - SHARED)
    if unknown:
        raise UsageError(
            f"config: {unknown[0]!r} stands outside any command's table, where only {', '.join(sorted(SHARED))} can"
        )
    table = config.get(name, {})
    if not isinstance(command, click.Group):
        return _defaults(shared, table, name, command)
    known = {key for child in command.commands.values() for key in _names(child)}
    _refuse_unknown(table, known, name)
    return {child: _defaults(shared, table, name, each, strict=False) for child, each in command.commands.items()}


def check_config(config: Mapping[str, Any], commands: Mapping[str, str]) -> None:
    """Raise UsageError for anything in the config files that no command understands."""
    check_tables(config, commands)
    for name in commands:
        option_defaults(config, name, importlib.import_module(f"cli.cmd_{name}").command)


def check_tables(config: Mapping[str, Any], commands: Mapping[str, str]) -> None:
    """Raise UsageError for a table that is no command's."""
    for name, value in config.items():
        if isinstance(value, dict) and name not in commands:
            raise UsageError(f"config: no command {name!r}, expected one of {', '.join(sorted(commands))}")


def _defaults(
    shared: Mapping[str, Any], table: Mapping[str, Any], name: str, command: click.Command, *, strict: bool = True
) -> dict[str, Any]:
    names = dict(_pairs(command))
    if strict:
        _refuse_unknown(table, set(names), name)
    found = {}
    for key, value in [*shared.items(), *table.items()]:
        option = names.get(_plain(key))
        if option is not None and option.name is not None:
            found[option.name] = [value] if option.multiple and not isinstance(value, list) else value
    return found


def _refuse_unknown(table: Mapping[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(key for key in table if _plain(key) not in known)
    if unknown:
        raise UsageError(f"config: [{name}] has no option {unknown[0]!r}, expected one of {', '.join(sorted(known))}")


def _names(command: click.Command) -> set[str]:
    return {name for name, _ in _pairs(command)}


def _pairs(command: click.Command) -> Iterator[tuple[str, click.Option]]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.envvar:
            for text in parameter.opts:
                if text.startswith("--"):
                    yield _plain(text[2:]), parameter


def _plain(key: str) -> str:
    return key.replace("-", "_")
