"""`rafs scheduler`: who fetches what from registries, and who is introduced to whom."""

from __future__ import annotations

import logging
import random
import signal
import sys
from typing import Any

import click
import trio

from rafsfs import logs
from rafsfs.net.descriptors import allow_many_descriptors
from scheduler.server import CONNECTIONS, Scheduler, SchedulerSettings

from .options import option
from .run import run_async
from .swarm import read_token, split_address, take_tls_options, tls_options, token_option


@click.command("scheduler")
@option(
    "--listen",
    envvar="RAFS_SCHEDULER_LISTEN",
    default="0.0.0.0:7946",
    show_default=True,
    metavar="HOST:PORT",
    help="Where nodes connect; port 0 takes any free one and prints it.",
)
@option(
    "--admin",
    envvar="RAFS_SCHEDULER_ADMIN",
    default="",
    metavar="HOST:PORT",
    help="Serve /healthz, /metrics and /swarm there.",
)
@token_option
@tls_options
@option(
    "--log-level",
    envvar="RAFS_LOG",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much is logged, on standard error.",
)
def command(listen: str, admin: str, swarm_token_file: str | None, log_level: str, **options: Any) -> None:
    """Run a scheduler until it is told to stop. It keeps nothing on disk: nodes announce themselves again after a restart.

    Example: rafs scheduler --listen 0.0.0.0:7946 --admin 127.0.0.1:7947
    """
    logs.configure(log_level)
    allow_many_descriptors(CONNECTIONS)
    host, port = split_address(listen, "--listen")
    admin_host, admin_port = split_address(admin, "--admin") if admin else ("127.0.0.1", None)
    settings = SchedulerSettings(
        host, port, admin_host, admin_port, read_token(swarm_token_file), take_tls_options(options)
    )
    run_async(_run, settings)


async def _run(settings: SchedulerSettings) -> None:
    def ready(port: int, admin: int | None) -> None:
        print(f"listening on port {port}" + (f", admin on port {admin}" if admin else ""), flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(Scheduler(settings, random.Random()).run, ready)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                logging.getLogger("scheduler").info("scheduler stopped")
                nursery.cancel_scope.cancel()
                sys.stdout.flush()
                break
