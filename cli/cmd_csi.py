"""`rafs csi`: models as Kubernetes volumes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click
import trio

from rafsfs import logs
from rafsfs.errors import UsageError

from .options import cache_dir_option, option, registry_options, scheduler_option, take_registry_options
from .run import run_async
from .swarm import split_address

if TYPE_CHECKING:
    from rafsfs.registry.options import RegistryOptions


@click.command("csi")
@option(
    "--endpoint",
    envvar="RAFS_CSI_ENDPOINT",
    default="unix:///csi/csi.sock",
    show_default=True,
    metavar="unix:///PATH",
    help="Where the kubelet or a provisioner finds the driver.",
)
@option("--node-id", envvar="RAFS_NODE_ID", default="", help="Name of this node.  [default: its host name]")
@option(
    "--role",
    envvar="RAFS_CSI_ROLE",
    type=click.Choice(["node", "controller", "all"]),
    default="node",
    show_default=True,
    help="node: mounts volumes; controller: provisions claims.",
)
@option("--driver-name", envvar="RAFS_CSI_DRIVER_NAME", default="csi.rafs.dev", show_default=True, help="Its name.")
@option(
    "--http",
    envvar="RAFS_CSI_HTTP",
    default="",
    metavar="HOST:PORT",
    help="Serve /healthz and /v1/volumes there: how far volumes are.",
)
@option(
    "--start-daemon",
    is_flag=True,
    envvar="RAFS_CSI_START_DAEMON",
    help="Start the node daemon if none runs. In a cluster it has a container of its own, so that it outlives this one.",
)
@option(
    "--allow-loopback",
    is_flag=True,
    envvar="RAFS_CSI_ALLOW_LOOPBACK",
    help="Let volumes name registries on this node, which are spoken to without TLS.",
)
@scheduler_option
@cache_dir_option
@option(
    "--log-level",
    envvar="RAFS_LOG",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="How much is logged, on standard error.",
)
@registry_options
def command(endpoint: str, cache_dir: str, log_level: str, http: str, **options: Any) -> None:
    """Run the driver of the Container Storage Interface until it is told to stop. Mounts stay up.

    It needs `pip install 'rafs[csi]'` and, for the node role, the node daemon of the same cache directory.

    Example: rafs csi --endpoint unix:///csi/csi.sock --node-id "$NODE_NAME" --cache-dir /var/lib/rafs
    """
    logs.configure(log_level)
    if not endpoint.startswith("unix:///") or len(os.fsencode(endpoint.removeprefix("unix://"))) > 100:
        raise UsageError(f"endpoint {endpoint!r} is not of the form unix:///PATH, of at most 100 bytes")
    try:
        import grpc  # noqa: F401, PLC0415 - an extra
    except ImportError:
        raise UsageError("the driver needs grpcio; install it with `pip install 'rafs[csi]'`") from None
    registry = take_registry_options(options)
    run_async(_run, endpoint, os.path.abspath(cache_dir), registry, http, options)


async def _run(endpoint: str, cache_dir: str, registry: RegistryOptions, http: str, options: dict[str, Any]) -> None:
    from rafsfs.csi.controller import Controller  # noqa: PLC0415 - grpcio is an extra
    from rafsfs.csi.events import Events, find_access  # noqa: PLC0415
    from rafsfs.csi.mounts import SharedMounts  # noqa: PLC0415
    from rafsfs.csi.node import Node  # noqa: PLC0415
    from rafsfs.csi.progress import ProgressPages  # noqa: PLC0415
    from rafsfs.csi.server import serve  # noqa: PLC0415
    from rafsfs.net.http_server import HttpServer  # noqa: PLC0415

    directory = os.path.join(cache_dir, "csi")
    role = options["role"]
    node_id = options["node_id"] or os.uname().nodename
    controller = Controller(os.path.join(directory, "controller"), registry) if role != "node" else None
    node = None
    async with trio.open_nursery() as nursery:
        if role != "controller":
            mounts = SharedMounts(
                directory, cache_dir, registry, scheduler=options["scheduler"], may_start=options["start_daemon"]
            )
            events = Events(find_access(os.environ), options["driver_name"], node_id)
            node = Node(directory, mounts, loopback=options["allow_loopback"], events=events)
            await nursery.start(node.run)
            if http:
                host, port = split_address(http, "--http")
                bound = await nursery.start(HttpServer(ProgressPages(node).handle).serve, host, port)
                print(f"pages on port {bound}", flush=True)

        def ready() -> None:
            print(f"serving {endpoint}", flush=True)

        async def served() -> None:
            await serve(
                endpoint,
                name=options["driver_name"],
                node_id=node_id,
                node=node,
                controller=controller,
                loopback=options["allow_loopback"],
                ready=ready,
            )

        nursery.start_soon(served)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                logging.getLogger("rafsfs.csi").info("driver stopped; mounts stay up")
                nursery.cancel_scope.cancel()
                sys.stdout.flush()
                break
