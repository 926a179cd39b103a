"""What a registry answered, and which error of ours that is. Pure.

Rule: text of the registry goes into messages bounded, printable, and only from the fields made for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..errors import NotFoundError, RemoteError
from ..net.http_head import Headers
from ..net.origin import Target


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole, small answer."""

    status: int
    headers: Headers
    body: bytes
    target: Target
    """What was asked in the end, after redirects: relative Locations are relative to this."""

    @property
    def media_type(self) -> str:
        """Content-Type without parameters, lower case."""
        return (self.headers.get("content-type") or "").partition(";")[0].strip().lower()

    @property
    def location(self) -> str | None:
        """Where a redirect or an upload goes on."""
        return self.headers.get("location")


def error_detail(body: bytes) -> tuple[str, str]:
    """Return (codes, text for a message) of an error body as the distribution spec has it; empty if it is not one."""
    try:
        errors = json.loads(body)["errors"]
        pairs = [(str(e.get("code", "")), str(e.get("message", ""))) for e in errors[:3]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return "", ""
    codes = ",".join(code for code, _ in pairs)
    text = "; ".join(f"{code}: {message}" if message else code for code, message in pairs if code or message)
    shown = "".join(c if c.isprintable() else " " for c in text)[:200]
    return codes, f" ({shown})" if shown else ""


def refusal(store: str, what: str, answer: Answer) -> RemoteError:
    """Return the error for an answer that is not what was asked for: NotFoundError for 404."""
    _, detail = error_detail(answer.body)
    if answer.status == 404:
        return NotFoundError(f"{store} has no {what}{detail}")
    if answer.status == 400 and b"HTTPS server" in answer.body[:300]:
        return RemoteError(
            f"{answer.target.origin.netloc} speaks TLS but was asked in plain HTTP; "
            "for a registry on loopback give its CA with --ca-file, else leave out --plain-http"
        )
    return RemoteError(f"{store}: {what}: {answer.target.origin.netloc} answered {answer.status}{detail}")
