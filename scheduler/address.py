"""At which address a peer is believed to be reached. Pure.

A peer may say an address of its own, since the one that its connection comes from can be that of a gateway. What it says is what others
connect to, so a liar could point a swarm at a stranger; what no other machine can be reached at is not taken. Where that is not enough, a
token or TLS keeps liars out.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

_NAME: Final = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*\Z"
)


def usable_address(said: str, seen: str) -> bool:
    """Tell whether the address that a peer says may be passed on; `seen` is where its connection comes from.

    A name or an IP address; none that stands for all machines or for many, and none of this machine only (loopback, link-local) unless it
    comes from there.
    """
    try:
        address = ipaddress.ip_address(said)
    except ValueError:
        return bool(_NAME.match(said)) and (said.lower() != "localhost" or _is_local(seen))
    if getattr(address, "scope_id", None) or address.is_unspecified or address.is_multicast or address.is_reserved:
        return False
    if address.is_loopback:
        return _is_local(seen)
    return not address.is_link_local or said == seen


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
