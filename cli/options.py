"""Options that several commands share, and how options are declared: each has an environment twin, a unit and a default."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from rafsfs.config import default_cache_dir
from rafsfs.errors import UsageError
from rafsfs.units import parse_duration, parse_size

if TYPE_CHECKING:
    from rafsfs.registry.options import RegistryOptions
    from rafsfs.store.eviction import Quota

SHARED: Final = frozenset(
    {"cache_dir", "plain_http", "ca_file", "client_cert", "client_key", "registry_timeout", "scheduler"}
)
"""What can stand outside the tables of rafs.toml: options that mean the same for every command."""

_F = TypeVar("_F", bound=Callable[..., Any])


def option(*names: str, **attributes: Any) -> Callable[[_F], _F]:
    """Declare an option; its help shows the environment twin."""
    return click.option(*names, **{"show_envvar": "envvar" in attributes, **attributes})


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


class DurationType(click.ParamType[float]):
    """A time such as 30 (seconds), 250ms or 5m, within bounds."""

    name = "seconds"

    def __init__(self, low: float, high: float) -> None:
        self._low = low
        self._high = high

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds."""
        try:
            seconds = parse_duration(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        if not self._low <= seconds <= self._high:
            self.fail(f"{value} is not between {self._low:g} and {self._high:g} seconds", param, ctx)
        return seconds


def cache_dir_option(function: _F) -> _F:
    """Add --cache-dir."""
    return option(
        "--cache-dir",
        envvar="RAFS_CACHE_DIR",
        type=click.Path(file_okay=False),
        default=default_cache_dir,
        help="Cache directory of the node; one daemon each.  [default: /var/lib/rafs for root, else ~/.cache/rafs]",
    )(function)


def quota_option(function: _F) -> _F:
    """Add --quota."""
    return option(
        "--quota",
        envvar="RAFS_QUOTA",
        default="",
        metavar="SIZE|PERCENT%|none",
        help="Data that the cache holds at most, of the file system if in percent; what is mounted or pinned stays."
        "  [default: none; 80% for a seed]",
    )(function)


def quota_of(text: str, cache_dir: str, *, is_seed: bool) -> Quota | None:
    """Return what --quota says for a cache directory. Raises UsageError."""
    from rafsfs.store.eviction import SEED_SHARE, parse_quota  # noqa: PLC0415

    from .output import existing_parent  # noqa: PLC0415

    disk = os.statvfs(existing_parent(cache_dir))
    return parse_quota(text or (f"{SEED_SHARE}%" if is_seed else "none"), disk.f_blocks * disk.f_frsize)


def scheduler_option(function: _F) -> _F:
    """Add --scheduler."""
    return option(
        "--scheduler",
        envvar="RAFS_SCHEDULER",
        default="",
        metavar="HOST:PORT[,...]",
        help="Share what is fetched with the nodes of this scheduler.",
    )(function)


def json_option(function: _F) -> _F:
    """Add --json."""
    return option("--json", "as_json", is_flag=True, envvar="RAFS_JSON", help="Print JSON for programs.")(function)


def registry_options(function: _F) -> _F:
    """Add the options that say how to reach a registry."""
    for decorator in reversed(
        (
            option(
                "--plain-http", is_flag=True, envvar="RAFS_PLAIN_HTTP", help="Speak plain HTTP, also to other machines."
            ),
            option(
                "--ca-file",
                envvar="RAFS_CA_FILE",
                type=click.Path(dir_okay=False),
                help="Authorities trusted besides the system's, PEM.",
            ),
            option(
                "--client-cert",
                envvar="RAFS_CLIENT_CERT",
                type=click.Path(dir_okay=False),
                help="Client certificate, PEM.",
            ),
            option(
                "--client-key",
                envvar="RAFS_CLIENT_KEY",
                type=click.Path(dir_okay=False),
                help="Its key, PEM.  [default: in the certificate's file]",
            ),
            option(
                "--registry-timeout",
                envvar="RAFS_REGISTRY_TIMEOUT",
                type=DurationType(0.1, 3600),
                default="30s",
                show_default=True,
                help="Longest silence of the registry.",
            ),
        )
    ):
        function = decorator(function)
    return function


def take_registry_options(options: dict[str, Any]) -> RegistryOptions:
    """Take what `registry_options` added out of a command's keyword arguments. Paths come out absolute."""
    from rafsfs.registry.options import RegistryOptions  # noqa: PLC0415 - `rafs --help` does without it

    def path(name: str) -> str | None:
        value = options.pop(name)
        return os.path.abspath(value) if value else None

    docker_config = os.environ.get("DOCKER_CONFIG")
    return RegistryOptions(
        plain_http=options.pop("plain_http"),
        ca_file=path("ca_file"),
        client_cert=path("client_cert"),
        client_key=path("client_key"),
        docker_config=os.path.abspath(docker_config) if docker_config else None,
        timeout_s=options.pop("registry_timeout"),
    )


def for_daemon(ref: str, registry: RegistryOptions) -> dict[str, Any]:
    """Return a reference and options as parameters of a call: what the daemon needs to find what the user means."""
    from rafsfs.registry.reference import parse_reference  # noqa: PLC0415

    return {"ref": str(parse_reference(ref).absolute()), "registry": asdict(registry)}


def mountpoint_of(directory: str) -> str:
    """Return a mountpoint as the kernel's table names it: absolute, links resolved.

    Nothing below a mount that is there is touched, since its worker may hang. Raises UsageError for a name that cannot be sent.
    """
    from rafsfs.fuse.mountpoint import is_mounted  # noqa: PLC0415

    path = os.path.abspath(directory)
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if not is_mounted(path):
        path = os.path.realpath(path)
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"mountpoint {path!r} has a name that is not UTF-8; choose another directory") from None
    return path
