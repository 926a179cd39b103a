"""WWW-Authenticate challenges (RFC 9110 §11, distribution token authentication). Pure parsing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][A-Za-z0-9-]*)(?:\s+|\Z)")
_PARAMETER = re.compile(r'\s*,?\s*([A-Za-z][A-Za-z0-9_-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: the scheme in lower case and its parameters."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse_challenges(header: str) -> list[Challenge]:
    """Return the challenges of a WWW-Authenticate header; what does not parse is left out."""
    found: list[Challenge] = []
    at = 0
    while at < len(header):
        scheme = _SCHEME.match(header, at)
        if not scheme:
            break
        at = scheme.end()
        parameters: dict[str, str] = {}
        while match := _PARAMETER.match(header, at):
            value = match[2] if match[2] is not None else match[3]
            parameters[match[1].lower()] = re.sub(r"\\(.)", r"\1", value)
            at = match.end()
        found.append(Challenge(scheme[1].lower(), parameters))
    return found
