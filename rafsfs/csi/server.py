"""The driver as a gRPC server: the only file that knows gRPC. Checks requests, calls node and controller, turns errors into codes.

Decided here: what each request must hold before anything is done, and deadlines. Concurrency: gRPC runs each call in a thread
of a pool of THREADS; the thread hands the work to the trio run and waits for it. A call whose client has gone is cancelled
there at its deadline. Secrets are in requests: no request is ever logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from concurrent import futures
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Final, TypeVar

import grpc
import trio

from .. import __version__
from ..errors import DeadlineError, RafsError
from ._pb import csi_pb2 as pb
from ._pb import csi_pb2_grpc
from .codes import Code, CsiError, code_of
from .controller import Controller, Provisioned
from .node import Node, is_inline
from .volume import parse_attributes

_log = logging.getLogger(__name__)

DRIVER: Final = "csi.rafs.dev"
THREADS: Final = 64
"""Calls at once: a node restart republishes every pod's volume."""
CALL_S: Final = 90.0
"""Most that a call takes; the kubelet gives up at 120 s."""
_MOST_ID: Final = 128
_READ_ONLY_MODES: Final = frozenset({
    pb.VolumeCapability.AccessMode.SINGLE_NODE_READER_ONLY,
    pb.VolumeCapability.AccessMode.MULTI_NODE_READER_ONLY,
})  # fmt: skip
_SINGLE_WRITERS: Final = frozenset({
    pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER,
    pb.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER,
    pb.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER,
})  # fmt: skip
"""What Kubernetes says of every inline volume and of ReadWriteOnce claims: mounted, read-only like all others."""

_T = TypeVar("_T")


class Bridge:
    """From a gRPC thread into the trio run."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token

    def run(
        self,
        context: grpc.ServicerContext,
        function: Callable[[], Awaitable[_T]],
        reporting: AbstractContextManager[None] | None = None,
    ) -> _T:
        """Run an async function within the call's deadline; end the call with the code of what it raises.

        `reporting` is told of every error, that of the deadline too.
        """
        left = context.time_remaining()
        limit = CALL_S if left is None else min(CALL_S, left)

        async def bounded() -> _T:
            with reporting or nullcontext():
                with trio.move_on_after(limit):
                    return await function()
                raise DeadlineError(
                    f"the call was not done within {limit:.0f} s; it goes on where it was when it is repeated"
                )

        try:
            return trio.from_thread.run(bounded, trio_token=self._token)
        except RafsError as error:
            fail(context, code_of(error), str(error))
        except (trio.Cancelled, trio.RunFinishedError):
            fail(context, Code.UNAVAILABLE, "the driver is stopping")
        except BaseException as error:  # noqa: BLE001 - the boundary of a call: log it, tell the caller, serve on
            ours = _ours(error)
            if ours is not None:
                fail(context, code_of(ours), str(ours))
            _log.exception("call failed")
            fail(context, Code.INTERNAL, f"the driver met a fault of its own: {type(error).__name__}; see its log")
        raise AssertionError("a failed call has been ended")


def _ours(error: BaseException) -> RafsError | None:
    while isinstance(error, BaseExceptionGroup):
        part, _ = error.split(RafsError)
        if part is None:
            return None
        error = part.exceptions[0]
    return error if isinstance(error, RafsError) else None


def fail(context: grpc.ServicerContext, code: Code, message: str) -> None:
    """End a call with an error."""
    context.abort(next(status for status in grpc.StatusCode if status.value[0] == code), message)


def check(condition: object, message: str, code: Code = Code.INVALID_ARGUMENT) -> None:
    """Raise CsiError unless a condition holds."""
    if not condition:
        raise CsiError(code, message)


def check_capability(capability: pb.VolumeCapability) -> list[str]:
    """Return the mount options of a capability that we can serve. Raises CsiError."""
    check(not capability.HasField("block"), "models are directories, not block devices")
    check(capability.HasField("mount"), "volume_capability has no access type")
    mode = capability.access_mode.mode
    check(mode != pb.VolumeCapability.AccessMode.UNKNOWN, "volume_capability has no access mode")
    check(
        mode in _READ_ONLY_MODES | _SINGLE_WRITERS,
        "models are read-only: no node can write them for others; ask for ReadOnlyMany",
    )
    fs_type = capability.mount.fs_type
    check(fs_type in {"", "rafs"}, f"fsType {fs_type[:40]!r} is not what a model is on; leave it out")
    return list(capability.mount.mount_flags)


class Identity(csi_pb2_grpc.IdentityServicer):
    """Who we are. Answers at once, whatever else goes on: registration waits one second."""

    def __init__(self, bridge: Bridge, name: str, *, node: Node | None, controller: Controller | None) -> None:
        self._bridge = bridge
        self._name = name
        self._node = node
        self._controller = controller

    def GetPluginInfo(self, request: Any, context: Any) -> pb.GetPluginInfoResponse:
        """Name and version."""
        return pb.GetPluginInfoResponse(name=self._name, vendor_version=__version__)

    def GetPluginCapabilities(self, request: Any, context: Any) -> pb.GetPluginCapabilitiesResponse:
        """Whether volumes can be provisioned."""
        service = pb.PluginCapability.Service(type=pb.PluginCapability.Service.CONTROLLER_SERVICE)
        capabilities = [pb.PluginCapability(service=service)] if self._controller is not None else []
        return pb.GetPluginCapabilitiesResponse(capabilities=capabilities)

    def Probe(self, request: Any, context: Any) -> pb.ProbeResponse:
        """Whether a publish could work now: the node's daemon answers."""
        response = pb.ProbeResponse()
        node = self._node
        response.ready.value = True
        if node is not None:

            async def daemon_answers() -> bool:
                with trio.move_on_after(5):
                    with suppress(RafsError):
                        await node.mounts.status()
                        return True
                return False

            response.ready.value = self._bridge.run(context, daemon_answers)
        return response


class NodeService(csi_pb2_grpc.NodeServicer):
    """Volumes of this node."""

    def __init__(self, bridge: Bridge, node: Node, node_id: str, *, loopback: bool) -> None:
        self._bridge = bridge
        self._node = node
        self._node_id = node_id
        self._loopback = loopback

    def NodeGetInfo(self, request: Any, context: Any) -> pb.NodeGetInfoResponse:
        """The node's name. Volumes are to be had on every node, so there is no topology."""
        return pb.NodeGetInfoResponse(node_id=self._node_id)

    def NodeGetCapabilities(self, request: Any, context: Any) -> pb.NodeGetCapabilitiesResponse:
        """Figures and condition of volumes; nothing is staged."""
        rpc = pb.NodeServiceCapability.RPC
        kinds = (rpc.GET_VOLUME_STATS, rpc.VOLUME_CONDITION, rpc.SINGLE_NODE_MULTI_WRITER)
        return pb.NodeGetCapabilitiesResponse(
            capabilities=[pb.NodeServiceCapability(rpc=pb.NodeServiceCapability.RPC(type=kind)) for kind in kinds]
        )

    def NodePublishVolume(self, request: pb.NodePublishVolumeRequest, context: Any) -> pb.NodePublishVolumeResponse:
        """Mount a volume for a pod."""
        attributes = dict(request.volume_context)

        async def work() -> None:
            check(request.volume_id, "volume_id is missing")
            check(len(request.volume_id) <= _MOST_ID, f"volume_id is longer than {_MOST_ID} bytes")
            target = _path(request.target_path, "target_path")
            check(request.HasField("volume_capability"), "volume_capability is missing")
            flags = check_capability(request.volume_capability)
            spec = parse_attributes(attributes, flags=flags, loopback=self._loopback, inline=is_inline(attributes))
            publish = self._node.publish_dynamic if spec.dynamic else self._node.publish
            mode = request.volume_capability.access_mode.mode
            exclusive = mode == pb.VolumeCapability.AccessMode.SINGLE_NODE_SINGLE_WRITER
            await publish(request.volume_id, target, spec, dict(request.secrets), attributes, exclusive=exclusive)

        self._bridge.run(context, work, self._node.events.reporting(attributes))
        return pb.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: pb.NodeUnpublishVolumeRequest, context: Any
    ) -> pb.NodeUnpublishVolumeResponse:
        """Take it away."""

        async def work() -> None:
            check(request.volume_id, "volume_id is missing")
            await self._node.unpublish(request.volume_id, _path(request.target_path, "target_path"))

        self._bridge.run(context, work)
        return pb.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(self, request: pb.NodeGetVolumeStatsRequest, context: Any) -> pb.NodeGetVolumeStatsResponse:
        """Size, bytes that are here, and whether it can be read."""

        async def work() -> pb.NodeGetVolumeStatsResponse:
            check(request.volume_id, "volume_id is missing")
            check(request.volume_path, "volume_path is missing")
            path = os.path.normpath(request.volume_path)
            state = await self._node.state(request.volume_id, path)
            alive = state.is_healthy and await self._node.mounts.is_alive(path)
            total, here = state.total_bytes, state.present_bytes
            message = f"{here} of {total} bytes are on this node"
            if not alive:
                message = f"cannot be read: {state.reason or 'the mount does not answer'}"
            usage = pb.VolumeUsage(unit=pb.VolumeUsage.BYTES, total=total, used=here, available=0)
            condition = pb.VolumeCondition(abnormal=not alive, message=message)
            return pb.NodeGetVolumeStatsResponse(usage=[usage], volume_condition=condition)

        return self._bridge.run(context, work)


class ControllerService(csi_pb2_grpc.ControllerServicer):
    """Provisioning of names."""

    def __init__(self, bridge: Bridge, controller: Controller, *, loopback: bool) -> None:
        self._bridge = bridge
        self._controller = controller
        self._loopback = loopback

    def ControllerGetCapabilities(self, request: Any, context: Any) -> pb.ControllerGetCapabilitiesResponse:
        """Create and delete."""
        rpc = pb.ControllerServiceCapability.RPC
        kinds = (rpc.CREATE_DELETE_VOLUME, rpc.SINGLE_NODE_MULTI_WRITER)
        capabilities = [pb.ControllerServiceCapability(rpc=rpc(type=kind)) for kind in kinds]
        return pb.ControllerGetCapabilitiesResponse(capabilities=capabilities)

    def CreateVolume(self, request: pb.CreateVolumeRequest, context: Any) -> pb.CreateVolumeResponse:
        """Pin a reference."""

        async def work() -> Provisioned:
            check(request.name, "name is missing")
            check(len(request.name) <= _MOST_ID, f"name is longer than {_MOST_ID} bytes")
            check(request.volume_capabilities, "volume_capabilities are missing")
            for capability in request.volume_capabilities:
                check_capability(capability)
            check(
                not request.HasField("volume_content_source"),
                "a model comes from its registry; snapshots and clones are not for it",
            )
            parameters = dict(request.parameters)
            spec = parse_attributes(parameters, loopback=self._loopback, inline=False)
            own = {key: value for key, value in parameters.items() if not key.startswith("csi.storage.k8s.io/")}
            size = request.capacity_range
            check(
                not size.limit_bytes or size.limit_bytes >= size.required_bytes, "capacity_range ends before it begins"
            )
            return await self._controller.create(
                request.name, spec, own, dict(request.secrets), required=size.required_bytes, limit=size.limit_bytes
            )

        made = self._bridge.run(context, work)
        volume = pb.Volume(volume_id=made.id, capacity_bytes=made.capacity, volume_context=made.attributes)
        return pb.CreateVolumeResponse(volume=volume)

    def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: Any) -> pb.DeleteVolumeResponse:
        """Forget it."""

        async def work() -> None:
            check(request.volume_id, "volume_id is missing")
            await self._controller.delete(request.volume_id)

        self._bridge.run(context, work)
        return pb.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: pb.ValidateVolumeCapabilitiesRequest, context: Any
    ) -> pb.ValidateVolumeCapabilitiesResponse:
        """Whether a volume can be used in these ways."""

        async def work() -> pb.ValidateVolumeCapabilitiesResponse:
            check(request.volume_id, "volume_id is missing")
            check(request.volume_capabilities, "volume_capabilities are missing")
            check(self._controller.exists(request.volume_id), f"no volume {request.volume_id[:140]}", Code.NOT_FOUND)
            try:
                for capability in request.volume_capabilities:
                    check_capability(capability)
            except CsiError as error:
                return pb.ValidateVolumeCapabilitiesResponse(message=str(error))
            confirmed = pb.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
            return pb.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)

        return self._bridge.run(context, work)


def _path(text: str, what: str) -> str:
    check(text, f"{what} is missing")
    check(os.path.isabs(text) and "\0" not in text, f"{what} is not an absolute path")
    return os.path.normpath(text)


async def serve(
    endpoint: str,
    *,
    name: str,
    node_id: str,
    node: Node | None,
    controller: Controller | None,
    loopback: bool,
    ready: Callable[[], None],
) -> None:
    """Serve on `unix:///path` until cancelled. The socket is 0600; one that was left over is replaced."""
    path = endpoint.removeprefix("unix://")
    bridge = Bridge(trio.lowlevel.current_trio_token())
    server = grpc.server(futures.ThreadPoolExecutor(THREADS), options=[("grpc.max_receive_message_length", 1 << 20)])
    csi_pb2_grpc.add_IdentityServicer_to_server(Identity(bridge, name, node=node, controller=controller), server)
    if node is not None:
        csi_pb2_grpc.add_NodeServicer_to_server(NodeService(bridge, node, node_id, loopback=loopback), server)
    if controller is not None:
        csi_pb2_grpc.add_ControllerServicer_to_server(ControllerService(bridge, controller, loopback=loopback), server)
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix://{path}")
        server.start()
    finally:
        os.umask(before)
    _log.info("driver serves: name=%s endpoint=%s", name, endpoint)
    try:
        ready()
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            stopped = server.stop(grace=2.0)
            await trio.to_thread.run_sync(stopped.wait, 5.0)
