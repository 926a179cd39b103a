"""WWW-Authenticate: what a registry wants to see (RFC 9110 §11.6.1, distribution token authentication). Pure.

Any text gives a list of challenges; what cannot be parsed ends the list. Several challenges may share one header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BLANKS: Final = re.compile(r"[ \t,]*")
_PARAMETER: Final = re.compile(
    r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*=[ \t]*(?:\"((?:[^\"\\]|\\.)*)\"|([!#$%&'*+.^_`|~0-9A-Za-z:/?@=-]+))"
)
_TOKEN68: Final = re.compile(r"[ \t]+[A-Za-z0-9._~+/-]+=*[ \t]*(?=,|\Z)")
MAX_LENGTH: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge."""

    scheme: str
    """In lower case: `bearer`, `basic`."""
    parameters: Mapping[str, str]
    """Names in lower case."""


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """Return all challenges of all WWW-Authenticate fields, in order."""
    return [challenge for header in headers for challenge in _parse(header[:MAX_LENGTH])]


def _parse(header: str) -> list[Challenge]:
    found: list[Challenge] = []
    at = _skip(header, 0)
    while match := _TOKEN.match(header, at):
        scheme, at = match[0].lower(), match.end()
        parameters: dict[str, str] = {}
        if token68 := _TOKEN68.match(header, at):
            at = token68.end()  # `Negotiate abc==`: of no use to us
        at = _skip(header, at)
        while parameter := _PARAMETER.match(header, at):
            quoted = parameter[2]
            value = parameter[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
            parameters.setdefault(parameter[1].lower(), value)
            at = _skip(header, parameter.end())
        found.append(Challenge(scheme, parameters))
    return found


def _skip(header: str, at: int) -> int:
    match = _BLANKS.match(header, at)
    return match.end() if match else at
