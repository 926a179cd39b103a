"""How far volumes are, over HTTP: for start-up probes, init containers and people. Read-only.

Pages: `/healthz`; `/v1/volumes`, `/v1/volumes/ID`, and `/v1/pods/UID/volumes` for a pod, which knows its own uid but no volume
id. What is told of a volume: its reference, state, bytes present and in all. Concurrency: none of its own; each request asks
the daemon once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any
from urllib.parse import unquote

from ..errors import RafsError
from ..net.http_server import Answer, Request
from .codes import Code, code_of
from .node import Node, VolumeState

_JSON = {"Content-Type": "application/json"}


class ProgressPages:
    """Answers requests about the volumes of a node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def handle(self, request: Request) -> Answer:
        """Answer one request."""
        if request.path == "/healthz":
            return Answer(200, b"ok\n", {"Content-Type": "text/plain"})
        parts = [unquote(part) for part in request.path.strip("/").split("/")]
        try:
            if parts[:2] == ["v1", "volumes"] and len(parts) == 3:
                return _page(described(await self._node.state(parts[2])))
            if parts[:2] == ["v1", "volumes"] and len(parts) == 2:
                return _page({"volumes": await self._all("")})
            if parts[:2] == ["v1", "pods"] and len(parts) == 4 and parts[3] == "volumes":
                return _page({"volumes": await self._all(parts[2])})
        except RafsError as error:
            status = 404 if code_of(error) is Code.NOT_FOUND else 503
            return Answer(status, json.dumps({"error": str(error)}).encode() + b"\n", _JSON)
        return Answer(
            404, b"/healthz, /v1/volumes, /v1/volumes/ID, /v1/pods/UID/volumes\n", {"Content-Type": "text/plain"}
        )

    async def _all(self, uid: str) -> list[dict[str, Any]]:
        wanted = [record for record in self._node.records if not uid or record.pod.get("uid") == uid]
        return [described(state) for state in await self._node.states(wanted)]


def described(state: VolumeState) -> dict[str, Any]:
    """Return a volume's state as a page shows it."""
    return {
        **asdict(state),
        "readable": state.is_healthy,
        "complete": state.total_bytes > 0 and state.present_bytes >= state.total_bytes,
        "percent": round(100 * state.present_bytes / state.total_bytes, 1) if state.total_bytes else 0.0,
    }


def _page(value: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(value, indent=1).encode() + b"\n", _JSON)
