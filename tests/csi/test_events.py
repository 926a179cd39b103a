"""Events on pods: what the API server gets is a valid Event, rarely, over verified TLS; nothing fails or waits for it."""

from __future__ import annotations

import json
import logging
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import kubernetes_validate
import pytest
import trio
import trio.testing
import trustme
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.csi._pb import csi_pb2 as pb
from rafsfs.csi._pb import csi_pb2_grpc
from rafsfs.csi.codes import Code, CsiError
from rafsfs.csi.events import AGAIN_S, ApiAccess, Events, Limits, News, event_of, find_access, news_of
from rafsfs.csi.mounts import SharedMounts
from rafsfs.csi.node import Node
from rafsfs.csi.server import serve
from rafsfs.errors import UnavailableError
from rafsfs.registry.options import RegistryOptions
from tests.support.kubelet import mount_capability

POD = {"namespace": "models", "name": "vllm-0", "uid": "0f1e2d3c-aaaa-bbbb-cccc-000000000001"}
ATTRIBUTES = {f"csi.storage.k8s.io/pod.{key}": value for key, value in POD.items()}
TOKEN = "a-token-that-nobody-may-see"


class Api:
    """An API server that takes Events."""

    def __init__(self, directory: Path, authority: trustme.CA, status: int = 201) -> None:
        self.posts: list[tuple[str, str | None, dict[str, Any]]] = []
        self.came = threading.Semaphore(0)
        posts, came = self.posts, self.came

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                posts.append((self.path, self.headers["Authorization"], body))
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")
                came.release()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        (directory / "token").write_text(TOKEN + "\n")
        authority.cert_pem.write_to_path(directory / "ca.crt")
        environ = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self._server.server_address[1]),
        }
        access = find_access(environ, str(directory))
        assert access is not None
        self.access: ApiAccess = access

    async def wait(self) -> None:
        with trio.fail_after(20):
            assert await trio.to_thread.run_sync(lambda: self.came.acquire(timeout=15))

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def running_api(directory: Path, status: int = 201, authority: trustme.CA | None = None) -> Iterator[Api]:
    api = Api(directory, authority or trustme.CA(), status)
    try:
        yield api
    finally:
        api.close()


@pytest.mark.io
async def test_a_failed_publish_is_an_event_on_its_pod(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running_api(tmp_path) as api:
        async with trio.open_nursery() as nursery:
            events = Events(api.access, "csi.rafs.dev", "node-1")
            nursery.start_soon(events.run)
            for _ in range(3):  # as the kubelet does
                with pytest.raises(UnavailableError), events.reporting(ATTRIBUTES):
                    raise UnavailableError("registry.example does not answer")
            with pytest.raises(CsiError), events.reporting(ATTRIBUTES):
                raise CsiError(Code.ABORTED, "another call is in flight")
            await api.wait()
            (tmp_path / "token").write_text("next-token")
            with pytest.raises(BaseExceptionGroup), events.reporting(ATTRIBUTES):
                raise BaseExceptionGroup("many", [UnavailableError("x")])
            await api.wait()
            nursery.cancel_scope.cancel()
    assert [authorization for _, authorization, _ in api.posts] == [f"Bearer {TOKEN}", "Bearer next-token"]
    path, _, body = api.posts[0]
    assert path == "/api/v1/namespaces/models/events"
    kubernetes_validate.validate(body, "1.36", strict=True)
    assert body["involvedObject"] == {"apiVersion": "v1", "kind": "Pod", **POD}
    assert body["metadata"]["namespace"] == "models"
    assert body["message"] == "registry.example does not answer"
    assert body["type"] == "Warning"
    assert TOKEN not in caplog.text


@pytest.mark.io
@pytest.mark.logs_warnings
async def test_a_right_that_is_missing_is_told_once_and_nothing_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_api(tmp_path, status=403) as api:
        async with trio.open_nursery() as nursery:
            events = Events(api.access, "csi.rafs.dev", "node-1")
            nursery.start_soon(events.run)
            for number in range(2):
                events.post(POD, "ModelUnreadable", f"message {number}")
                await api.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
            nursery.cancel_scope.cancel()
    assert len([r for r in caplog.records if "grant `create` on events" in r.getMessage()]) == 1


@pytest.mark.io
async def test_a_server_of_another_authority_gets_no_token(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with running_api(tmp_path) as api:
        trustme.CA().cert_pem.write_to_path(tmp_path / "ca.crt")
        events = Events(api.access, "csi.rafs.dev", "node-1")
        with trio.fail_after(20):
            news = news_of(POD, "ModelUnreadable", "x")
            assert news is not None
            await events._post_one(api.access, news)
    assert api.posts == []
    assert "event not posted" in caplog.text


async def test_without_access_nothing_is_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert find_access({}, str(tmp_path)) is None
    assert find_access({"KUBERNETES_SERVICE_HOST": "::1", "KUBERNETES_SERVICE_PORT": "443"}, str(tmp_path)) is None
    assert len([r for r in caplog.records if r.getMessage().startswith("no events")]) == 2
    events = Events(None, "csi.rafs.dev", "node-1")
    events.post(POD, "ModelUnreadable", "x")
    await events.run()


async def test_posting_never_waits_and_drops_what_is_too_much(tmp_path: Path) -> None:
    now = iter(range(0, 10**9, 1000))
    access = ApiAccess("https://127.0.0.1:1", str(tmp_path / "token"), str(tmp_path / "ca.crt"))
    events = Events(access, "csi.rafs.dev", "node-1", clock=lambda: next(now))
    for number in range(500):  # nobody takes them
        events.post(POD, "ModelUnreadable", f"message {number}")


def test_an_address_of_version_six_stands_in_brackets(tmp_path: Path) -> None:
    for name in ("token", "ca.crt"):
        (tmp_path / name).write_text("x")
    access = find_access({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"}, str(tmp_path))
    assert access is not None
    assert access.url == "https://[fd00::1]:6443"


@given(st.text(max_size=3000), st.text(max_size=80))
def test_any_message_is_a_valid_event_and_any_name_is_checked(message: str, name: str) -> None:
    news = news_of(POD, "ModelUnreadable", message)
    assert news is not None
    assert len(news.message.encode(errors="replace")) <= 1024
    assert news.message.isprintable()
    json.dumps(event_of(news, "csi.rafs.dev", "node-1", datetime.now(UTC)))
    other = news_of({**POD, "namespace": name}, "ModelUnreadable", message)
    assert other is None or "/" not in other.namespace


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 30)), max_size=200))
def test_news_are_few_and_not_repeated(arrivals: list[tuple[int, float]]) -> None:
    limits, now = Limits(), 1000.0
    told: dict[int, float] = {}
    times: list[float] = []
    for which, pause in arrivals:
        now += pause
        news = News("models", "vllm-0", f"uid-{which}", "ModelUnreadable", "x")
        if limits.admit(news, now):
            assert which not in told or now - told[which] >= AGAIN_S
            told[which] = now
            times.append(now)
    for start in times:
        assert len([t for t in times if start <= t <= start + 60]) <= 20 + 12 + 1


@pytest.mark.io
async def test_a_publish_that_runs_into_its_deadline_is_an_event_on_its_pod(tmp_path: Path) -> None:
    """A registry that takes the connection and says nothing; the kubelet's deadline comes before ours."""
    endpoint = f"unix://{tmp_path}/csi.sock"
    silent = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = silent[0].socket.getsockname()[1]
    options = RegistryOptions()
    with running_api(tmp_path) as api:
        events = Events(api.access, "csi.rafs.dev", "node-1")
        mounts = SharedMounts(str(tmp_path / "csi"), str(tmp_path), options, scheduler="", may_start=False)
        node = Node(str(tmp_path / "csi"), mounts, loopback=True, events=events)
        request = pb.NodePublishVolumeRequest(
            volume_id="csi-1",
            target_path=str(tmp_path / "target"),
            volume_capability=mount_capability(),
            volume_context={
                "ref": f"127.0.0.1:{port}/model:v1",
                "csi.storage.k8s.io/ephemeral": "true",
                **ATTRIBUTES,
            },
        )

        def publish() -> grpc.StatusCode:
            with grpc.insecure_channel(endpoint) as channel, pytest.raises(grpc.RpcError) as error:
                csi_pb2_grpc.NodeStub(channel).NodePublishVolume(request, timeout=0.5)
            code: grpc.StatusCode = error.value.code()  # type: ignore[attr-defined]
            return code

        async with trio.open_nursery() as nursery:
            nursery.start_soon(events.run)
            serving = trio.Event()
            nursery.start_soon(
                lambda: serve(
                    endpoint, name="n", node_id="1", node=node, controller=None, loopback=True, ready=serving.set
                )
            )
            await serving.wait()
            assert await trio.to_thread.run_sync(publish) is grpc.StatusCode.DEADLINE_EXCEEDED
            await api.wait()
            nursery.cancel_scope.cancel()
    await silent[0].aclose()
    assert [body["reason"] for _, _, body in api.posts] == ["ModelPublishFailed"]
    assert "the call was not done within" in api.posts[0][2]["message"]
