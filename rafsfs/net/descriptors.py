"""How many files and connections a process may have open. Shells start with 1,024, which a scheduler or a busy node outgrows."""

from __future__ import annotations

import logging
import resource
from typing import Final

_log = logging.getLogger(__name__)

MOST: Final = 1 << 16
"""Not more: whoever closes all possible descriptors of a child one by one should not take seconds for it."""


def allow_many_descriptors(needed: int = 0) -> int:
    """Raise the limit of this process as far as it may itself, up to MOST; return it. Logs it if fewer than `needed` can be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    allowed = MOST if soft == resource.RLIM_INFINITY else soft
    if allowed < needed:
        _log.warning(
            "this process may open %d files, expected %d for all connections it would take; raise LimitNOFILE or ulimit -n",
            allowed,
            needed,
        )
    return allowed
