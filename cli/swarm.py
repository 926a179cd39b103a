"""What commands say about the swarm: options, the shared token, and the peer that a daemon is given."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import click

from p2p.swarm import SwarmSettings, open_swarm
from rafsfs.errors import UsageError
from rafsfs.interfaces import Swarm
from rafsfs.net.mutual_tls import MutualTls, load_mutual_tls, refuse_if_public
from rafsfs.store.cache import Cache

from .options import SizeType, option, scheduler_option

_F = TypeVar("_F", bound=Callable[..., Any])


def swarm_options(function: _F) -> _F:
    """Add the options of a daemon that takes part in a swarm."""
    for decorator in reversed(
        (
            scheduler_option,
            option("--seed", is_flag=True, envvar="RAFS_SEED", help="Fetch for others first, and offer all of the cache."),
            option(
                "--peer-listen",
                envvar="RAFS_PEER_LISTEN",
                default="0.0.0.0:0",
                show_default=True,
                metavar="HOST:PORT",
                help="Where other nodes fetch from this one; used with a scheduler only.",
            ),
            option("--peer-address", envvar="RAFS_PEER_ADDRESS", default="", metavar="HOST",
                   help="How others reach it.  [default: as the scheduler sees it]"),
            option("--zone", envvar="RAFS_ZONE", default="", help="Where the node stands, for peers nearby."),
            option("--rack", envvar="RAFS_RACK", default="", help="Where in the zone."),
            option("--upload-limit", envvar="RAFS_UPLOAD_LIMIT", type=SizeType(), default="0", metavar="SIZE",
                   help="Bytes per second for all uploads together.  [default: no limit]"),
            token_option,
            tls_options,
            option("--swarm-verify", envvar="RAFS_SWARM_VERIFY", type=click.Choice(["address", "chain"]), default="address",
                   show_default=True, help="With TLS, what another node's certificate must be: for the address that it is reached at,"
                   " or any of the authority."),
        )
    ):  # fmt: skip
        function = decorator(function)
    return function


def tls_options(function: _F) -> _F:
    """Add --swarm-cert, --swarm-key and --swarm-ca."""
    for name, what in (
        ("ca", "Authority of the swarm, PEM: TLS on all its ports, and no one without a certificate of it."),
        ("key", "Its key, PEM.  [default: in the certificate's file]"),
        ("cert", "Certificate of this node, PEM, for clients and servers; with --swarm-ca."),
    ):
        function = option(
            f"--swarm-{name}", envvar=f"RAFS_SWARM_{name.upper()}", type=click.Path(dir_okay=False), help=what
        )(function)
    return function


def take_tls_options(options: dict[str, Any]) -> MutualTls | None:
    """Take what `tls_options` added out of a command's keyword arguments. Raises UsageError."""
    cert, key, ca = (options.pop(f"swarm_{name}") or "" for name in ("cert", "key", "ca"))
    return load_mutual_tls(cert, key, ca, any_address=options.pop("swarm_verify", "address") == "chain")


def token_option(function: _F) -> _F:
    """Add --swarm-token-file."""
    return option(
        "--swarm-token-file",
        envvar="RAFS_SWARM_TOKEN_FILE",
        type=click.Path(dir_okay=False),
        help="File with a token that all nodes and schedulers share.",
    )(function)


def read_token(path: str | None) -> str:
    """Return the shared token, empty if there is none. Raises UsageError."""
    if not path:
        return ""
    refuse_if_public(path, "the token of the swarm")
    try:
        with open(path, "rb") as file:
            text = file.read(4096).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"token file {path}: {error}") from error
    if not 16 <= len(text) <= 256 or not text.isprintable():
        raise UsageError(f"token file {path} holds {len(text)} characters, expected 16 to 256 printable ones")
    return text


def split_address(text: str, what: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT; port 0: any. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{what} {text!r} is not of the form HOST:PORT")
    return host.strip("[]"), int(port)


def take_swarm_options(options: dict[str, Any]) -> SwarmSettings:
    """Take what `swarm_options` added out of a command's keyword arguments."""
    host, port = split_address(options.pop("peer_listen"), "--peer-listen")
    return SwarmSettings(
        scheduler=options.pop("scheduler"),
        host=host,
        port=port,
        address=options.pop("peer_address"),
        seed=options.pop("seed"),
        zone=options.pop("zone"),
        rack=options.pop("rack"),
        token=read_token(options.pop("swarm_token_file")),
        upload_bytes_per_s=options.pop("upload_limit"),
        tls=take_tls_options(options),
    )


def settings_from_environment() -> SwarmSettings:
    """Return what the environment says, for a command that is its own daemon."""
    host, port = split_address(os.environ.get("RAFS_PEER_LISTEN", "0.0.0.0:0"), "RAFS_PEER_LISTEN")
    return SwarmSettings(
        host=host,
        port=port,
        address=os.environ.get("RAFS_PEER_ADDRESS", ""),
        zone=os.environ.get("RAFS_ZONE", ""),
        rack=os.environ.get("RAFS_RACK", ""),
        token=read_token(os.environ.get("RAFS_SWARM_TOKEN_FILE")),
        tls=load_mutual_tls(
            *(os.environ.get(f"RAFS_SWARM_{name}", "") for name in ("CERT", "KEY", "CA")),
            any_address=os.environ.get("RAFS_SWARM_VERIFY") == "chain",
        ),
    )


def swarm_factory(settings: SwarmSettings) -> Callable[[Cache], AbstractAsyncContextManager[Swarm]]:
    """Return what makes the peer of a daemon."""
    return lambda cache: open_swarm(cache, settings)
