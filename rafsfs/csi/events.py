"""Events on pods: why a volume could not be published, or cannot be read any more, where `kubectl describe pod` shows it.

Decided here: what an Event holds, how many there may be, and that nothing waits for them. Posting is putting into a short queue;
what does not fit, is not allowed by the API, or comes too often is dropped with a line in the log. Rule: an Event says what the
error says, bounded and printable; credentials are in no error, and nothing else is put in.

Concurrency: one trio run. `post` never blocks; one task (`run`) speaks to the API server, a request at a time with a deadline.
Cancelled, it leaves at most an Event unsent.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import trio

from ..errors import RafsError
from .codes import Code, code_of
from .volume import POD_KEYS

_log = logging.getLogger(__name__)

ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where Kubernetes puts the token and the authority of a pod's service account."""
PUBLISH_FAILED: Final = "ModelPublishFailed"
UNREADABLE: Final = "ModelUnreadable"
AGAIN_S: Final = 300.0
"""The same news of the same pod is not told again for this long: the kubelet repeats a failing publish for ever."""
_BURST: Final = 20
_PER_S: Final = 0.2
"""As the kubelet's own recorder: 25 at once, then few, whatever happens on the node; the API server is shared by all."""
_QUEUE: Final = 64
_REQUEST_S: Final = 10.0
_MOST_MESSAGE: Final = 1024
"""What the API server takes."""
_MOST_REMEMBERED: Final = 4096
_MOST_TOKEN: Final = 64 << 10
_LABEL: Final = re.compile(r"\A[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?\Z")
_NAME: Final = re.compile(r"\A[a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?\Z")
_UID: Final = re.compile(r"\A[A-Za-z0-9-]{1,64}\Z")


@dataclass(frozen=True, slots=True)
class ApiAccess:
    """How the API server is reached. Token and authority are files: both are replaced from time to time."""

    url: str
    token_file: str
    ca_file: str


@dataclass(frozen=True, slots=True)
class News:
    """One thing that befell a pod."""

    namespace: str
    name: str
    uid: str
    reason: str
    message: str


def find_access(environ: Mapping[str, str], account: str = ACCOUNT) -> ApiAccess | None:
    """Return the access that Kubernetes gives a pod by its environment and files; None outside, or where none is given."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "")
    token, authority = os.path.join(account, "token"), os.path.join(account, "ca.crt")
    if not host or not port.isdigit():
        _log.debug("no events: the environment names no API server (KUBERNETES_SERVICE_HOST and _PORT)")
        return None
    for path in (token, authority):
        if not os.access(path, os.R_OK):
            _log.debug("no events: no access to the API is granted: %s is not there", path)
            return None
    return ApiAccess(f"https://{f'[{host}]' if ':' in host else host}:{port}", token, authority)


def news_of(pod: Mapping[str, str], reason: str, message: str) -> News | None:
    """Return news of a pod, printable and bounded; None if it is not said which pod that is. Pure."""
    namespace, name, uid = (pod.get(key, "") for key in ("namespace", "name", "uid"))
    if not (_LABEL.match(namespace) and _NAME.match(name) and _UID.match(uid)):
        return None
    text = "".join(character if character.isprintable() else " " for character in message)
    if len(text.encode(errors="replace")) > _MOST_MESSAGE:
        text = text.encode(errors="replace")[: _MOST_MESSAGE - 3].decode(errors="ignore") + "..."
    return News(namespace, name, uid, reason, text)


def event_of(news: News, component: str, host: str, when: datetime) -> dict[str, Any]:
    """Return the v1 Event of some news. Pure."""
    stamp = when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{news.name}.", "namespace": news.namespace},
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": news.namespace,
            "name": news.name,
            "uid": news.uid,
        },
        "type": "Warning",
        "reason": news.reason,
        "message": news.message,
        "source": {"component": component, "host": host},
        "reportingComponent": component,
        "reportingInstance": host,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }


class Limits:
    """Which news are told: not twice within AGAIN_S, and few altogether. No clock: times in seconds are arguments."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, str, str], float] = {}
        self._left = float(_BURST)
        self._at = 0.0

    def admit(self, news: News, now: float) -> bool:
        """Tell whether news may be told now, and count them if so."""
        key = (news.uid, news.reason, news.message)
        if key in self._told and now - self._told[key] < AGAIN_S:
            return False
        self._left = min(_BURST, self._left + (now - self._at) * _PER_S)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        self._told.pop(key, None)
        self._told[key] = now
        while len(self._told) > _MOST_REMEMBERED:
            del self._told[next(iter(self._told))]  # the oldest
        return True


class Events:
    """Posts Events. Without access all of it does nothing."""

    def __init__(
        self, access: ApiAccess | None, component: str, host: str, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._access = access
        self._component = component
        self._host = host
        self._clock = clock
        self._limits = Limits()
        self._send, self._receive = trio.open_memory_channel[News](_QUEUE)
        self._refused = False

    def post(self, pod: Mapping[str, str], reason: str, message: str) -> None:
        """Have an Event posted some time. Never blocks, never raises. `pod`: its name, namespace and uid."""
        if self._access is None:
            return
        news = news_of(pod, reason, message)
        if news is None:
            _log.debug("no event: the volume does not say whose it is: reason=%s", reason)
        elif self._limits.admit(news, self._clock()):
            try:
                self._send.send_nowait(news)
            except trio.WouldBlock:
                _log.debug("no event: too many wait: reason=%s pod=%s/%s", reason, news.namespace, news.name)

    @contextmanager
    def reporting(self, attributes: Mapping[str, str]) -> Iterator[None]:
        """Post why a publish fails, if it does, on the pod that the attributes of its volume name."""
        try:
            yield
        except BaseException as error:
            ours = error
            while isinstance(ours, BaseExceptionGroup):
                ours = ours.exceptions[0]
            # ABORTED: another call is at it, and the pod's volume may well come.
            if isinstance(ours, RafsError) and code_of(ours) is not Code.ABORTED:
                pod = {name: attributes[key] for name, key in POD_KEYS.items() if key in attributes}
                self.post(pod, PUBLISH_FAILED, str(ours))
            raise

    async def run(self) -> None:
        """Post what comes, for ever."""
        if self._access is None:
            return
        _log.debug("events are posted to %s", self._access.url)
        async for news in self._receive:
            with trio.move_on_after(_REQUEST_S) as scope:
                await self._post_one(self._access, news)
            if scope.cancelled_caught:
                _log.debug("event not posted: the API server does not answer within %g s", _REQUEST_S)

    async def _post_one(self, access: ApiAccess, news: News) -> None:
        import httpx  # noqa: PLC0415 - only where there is an API server

        body = event_of(news, self._component, self._host, datetime.now(UTC))
        try:
            token = _read_token(access.token_file)
            context = ssl.create_default_context(cafile=access.ca_file)
            # Neither proxies nor credentials of the environment: this goes to the API server and nowhere else.
            async with httpx.AsyncClient(verify=context, timeout=_REQUEST_S, trust_env=False) as client:
                answer = await client.post(
                    f"{access.url}/api/v1/namespaces/{news.namespace}/events",
                    json=body,
                    headers={"Authorization": f"Bearer {token}", "User-Agent": "rafs-csi"},
                )
        except (OSError, ValueError, httpx.HTTPError, httpx.InvalidURL) as error:
            _log.debug("event not posted: cause=%s", type(error).__name__)  # its text might quote a header
            return
        if answer.status_code in {401, 403} and not self._refused:
            self._refused = True
            _log.warning(
                "events are not posted: the API server answers %d; grant `create` on events", answer.status_code
            )
        elif answer.status_code >= 300:
            _log.debug("event not posted: the API server answers %d", answer.status_code)
        else:
            self._refused = False


def _read_token(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(_MOST_TOKEN).decode("ascii").strip()
