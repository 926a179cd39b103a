"""`rafs preheat`: have an image fetched before anybody asks for it."""

from __future__ import annotations

import secrets
import ssl
from typing import Any, Final

import click
import trio

from p2p.link import dial, parse_addresses
from p2p.protocol.frames import FrameStream
from p2p.protocol.messages import (
    VERSION,
    Hello,
    Kind,
    NodeProgress,
    Ping,
    Preheat,
    Preheated,
    Welcome,
    decode_from_scheduler,
    encode,
)
from rafsfs.errors import DeadlineError, NotFoundError, RemoteError, UnavailableError, UsageError

from .options import DurationType, json_option, option, registry_options, scheduler_option, take_registry_options
from .output import print_json, print_table, progress_bar, size
from .run import run_async
from .swarm import read_token, take_tls_options, tls_options, token_option
from .wiring import opened

_BEAT_S: Final = 3.0


@click.command("preheat")
@click.argument("ref")
@scheduler_option
@option(
    "--peers/--seeds",
    "everybody",
    envvar="RAFS_PREHEAT_PEERS",
    default=False,
    help="Who fetches it: all nodes, or the seeds alone.  [default: seeds]",
)
@option(
    "--timeout",
    envvar="RAFS_PREHEAT_TIMEOUT",
    type=DurationType(1, 86400),
    default="3600s",
    show_default=True,
    help="Give up after this long; what is there stays.",
)
@token_option
@tls_options
@json_option
@registry_options
def command(
    ref: str,
    scheduler: str,
    everybody: bool,
    timeout: float,
    swarm_token_file: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Have the image REF fetched by the seeds of a scheduler, or by all its nodes. Returns when the bytes are there.

    Example: rafs preheat registry.example/models/llama:v1 --scheduler scheduler.example:7946
    """
    if not scheduler:
        raise UsageError("no scheduler is named; give --scheduler HOST:PORT")
    registry = take_registry_options(options)
    token, tls = read_token(swarm_token_file), take_tls_options(options)
    context = tls.by_name if tls is not None else None
    nodes = run_async(_preheat, ref, scheduler, bool(everybody), timeout, token, context, registry, not as_json)
    rows = [{"peer": n.peer, "done_bytes": n.done, "data_bytes": n.total, "error": n.error} for n in nodes]
    if as_json:
        print_json({"ref": ref, "nodes": rows})
    else:
        print_table([(n.peer, size(n.done), n.error or "complete") for n in nodes], header=("node", "present", "state"))
    failed = [n for n in nodes if n.error]
    if failed:
        raise RemoteError(f"{len(failed)} of {len(nodes)} nodes could not fetch {ref}: {failed[0].error}")


async def _preheat(
    ref: str,
    scheduler: str,
    everybody: bool,
    timeout_s: float,
    token: str,
    tls: ssl.SSLContext | None,
    registry: Any,
    bar: bool,
) -> list[NodeProgress]:
    async with opened(ref, registry) as (reference, store):
        descriptor = await store.resolve(reference.reference)
    image = str(reference.with_digest(descriptor.digest))
    cause: Exception | None = None
    for host, port in parse_addresses(scheduler):
        try:
            with trio.fail_after(timeout_s):
                return await _ask(host, port, image, everybody, token, tls, bar)
        except trio.TooSlowError:
            raise DeadlineError(f"{ref} was not everywhere after {timeout_s:g} s") from None
        except (OSError, UnavailableError) as error:
            cause = error
    raise UnavailableError(f"no scheduler of {scheduler} can be reached: {cause}")


async def _ask(
    host: str, port: int, image: str, everybody: bool, token: str, tls: ssl.SSLContext | None, bar: bool
) -> list[NodeProgress]:
    frames = FrameStream(await dial(host, port, tls))
    nodes: list[NodeProgress] = []
    try:
        await frames.send(encode(Hello(VERSION, secrets.token_hex(8), 0, Kind.TOOL, token=token)))
        await frames.send(encode(Preheat(1, image, everybody)))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_beat, frames)
            with progress_bar("preheating", enabled=bar) as progress:
                while (body := await frames.receive()) is not None:
                    message = decode_from_scheduler(body)
                    if isinstance(message, Welcome | Ping):
                        continue
                    if isinstance(message, Preheated):
                        nodes = message.nodes
                        if not nodes:
                            raise NotFoundError(
                                f"the scheduler {host}:{port} has no {'nodes' if everybody else 'seeds'}"
                            )
                        progress(sum(n.done for n in nodes), max(1, sum(n.total for n in nodes)))
                        if all(n.error or (n.total and n.done >= n.total) for n in nodes):
                            nursery.cancel_scope.cancel()
                            return nodes
        raise UnavailableError("it closed the connection; is the token right?")
    finally:
        with trio.CancelScope(shield=True):
            await frames.aclose()


async def _beat(frames: FrameStream) -> None:
    while True:
        await trio.sleep(_BEAT_S)
        await frames.send(encode(Ping()))
