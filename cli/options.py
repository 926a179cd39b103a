"""Options that several commands share. Each has an environment twin and names its unit and default."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from rafsfs.config import default_cache_dir
from rafsfs.errors import UsageError
from rafsfs.registry.store import RegistryOptions
from rafsfs.units import parse_size

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class SizeType(click.ParamType[int]):
    """A size such as 1MiB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


def cache_dir_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --cache-dir."""
    return click.option(
        "--cache-dir",
        envvar="RAFS_CACHE_DIR",
        type=click.Path(file_okay=False),
        default=default_cache_dir,
        help="Cache directory of the node; one daemon each.  [default: /var/lib/rafs for root, else ~/.cache/rafs]",
    )(function)


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, envvar="RAFS_JSON", help="Print JSON for programs.")(
        function
    )


def registry_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say how to reach a registry."""
    decorators: list[_Decorator] = [
        click.option(
            "--plain-http", is_flag=True, envvar="RAFS_PLAIN_HTTP", help="Speak plain HTTP, also to other machines."
        ),
        click.option(
            "--ca-file",
            envvar="RAFS_CA_FILE",
            type=click.Path(dir_okay=False),
            help="Authority's certificate, PEM, instead of the system's.",
        ),
        click.option(
            "--client-cert",
            envvar="RAFS_CLIENT_CERT",
            type=click.Path(dir_okay=False),
            help="Client certificate, PEM.",
        ),
        click.option("--client-key", envvar="RAFS_CLIENT_KEY", type=click.Path(dir_okay=False), help="Its key, PEM."),
        click.option(
            "--registry-timeout",
            envvar="RAFS_REGISTRY_TIMEOUT",
            type=click.FloatRange(0.1, 3600),
            default=30.0,
            show_default=True,
            help="Longest silence of the registry, seconds.",
        ),
    ]
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


def take_registry_options(options: dict[str, Any]) -> RegistryOptions:
    """Take what `registry_options` added out of a command's keyword arguments."""
    ca_file, client_cert, client_key = (options.pop(name) for name in ("ca_file", "client_cert", "client_key"))
    return RegistryOptions(
        plain_http=options.pop("plain_http"),
        ca_file=os.path.abspath(ca_file) if ca_file else None,
        client_cert=os.path.abspath(client_cert) if client_cert else None,
        client_key=os.path.abspath(client_key) if client_key else None,
        docker_config=os.environ.get("DOCKER_CONFIG"),
        timeout_s=options.pop("registry_timeout"),
    )
