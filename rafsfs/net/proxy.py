"""Which HTTP proxy, if any, stands between us and an origin: `http_proxy`, `https_proxy`, `all_proxy`, `no_proxy`.

Decided here: the environment's proxies are used for everything but loopback, where they never are. Only `http://`
proxies are understood. Rule: a proxy's password is sent to the proxy and never shown.
"""

from __future__ import annotations

import base64
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from ..errors import UsageError
from .origin import Origin


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy: where it is and what it wants to see."""

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)
    url: str = field(default="", repr=False)
    """With credentials: for httpx only, never for a message."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def proxy_for(origin: Origin) -> Proxy | None:
    """Return the proxy for an origin, from the environment. Raises UsageError for one that we cannot use."""
    if origin.is_loopback:
        return None
    proxies = urllib.request.getproxies_environment()
    url = proxies.get(origin.scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(f"{origin.host}:{origin.port}"):
        return None
    return parse_proxy(url)


def parse_proxy(url: str) -> Proxy:
    """Parse the value of a proxy variable, with or without `http://`. Raises UsageError."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
    except ValueError:
        raise UsageError("the proxy in the environment is not a URL; expected http://host:port") from None
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"the proxy in the environment has scheme {parts.scheme[:20]!r}; expected http://host:port")
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode("ascii")
    return Proxy(parts.hostname, port, authorization, f"http://{parts.netloc}")
