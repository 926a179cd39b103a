"""One line at debug level for each decision of the swarm: whom chunks are taken from, what the scheduler is asked, rules and is told.

The lines go to the logger of `p2p.swarm`, where the decisions are carried out. Ids of data spaces are cut to 16 characters; nothing that
entitles anybody to anything is logged.
"""

from __future__ import annotations

import logging

from .core.effects import Follow, Listen, Send
from .core.errand import Inquire, Take
from .core.task import PeerTask
from .protocol.messages import Done, Failed, Join, Leave, Report, Ruling

_log = logging.getLogger("p2p.swarm")


def log_step(task: PeerTask, step: object) -> None:
    """Log whom chunks are taken from and what the scheduler is asked."""
    if isinstance(step, Take):
        for run in step.runs:
            _log.debug(
                "parent chosen: space=%s first=%d count=%d peer=%s",
                task.task.hex()[:16],
                run.first,
                run.count,
                run.peer,
            )
    elif isinstance(step, Inquire):
        _log.debug("scheduler asked: space=%s groups=%s", task.task.hex()[:16], step.groups)


def log_rulings(task: PeerTask, rulings: list[Ruling] | None) -> None:
    """Log what the scheduler has ruled."""
    if rulings is None:
        _log.debug("no ruling, fetched from the registry: space=%s", task.task.hex()[:16])
    for ruling in rulings or ():
        _log.debug(
            "ruling: space=%s group=%d verdict=%s peer=%s",
            task.task.hex()[:16],
            ruling.group,
            ruling.verdict.name.lower(),
            ruling.peer.id if ruling.peer else "-",
        )


def log_effect(effect: Send | Listen | Follow) -> None:
    """Log whom a peer meets, whom it follows, and what it tells the scheduler."""
    space = effect.task.hex()[:16]
    if isinstance(effect, Listen):
        _log.debug("neighbour met: space=%s peer=%s", space, effect.neighbour.id)
        return
    if isinstance(effect, Follow):
        run = effect.run
        _log.debug("parent followed: space=%s first=%d count=%d peer=%s", space, run.first, run.count, run.peer)
        return
    message = effect.message
    if isinstance(message, Report):
        _log.debug("peer reported: space=%s peer=%s what=%s", space, message.peer, message.what.name.lower())
    elif isinstance(message, Failed):
        _log.debug("lease given back: space=%s groups=%s reason=%s", space, message.groups, message.reason)
    elif isinstance(message, Done):
        _log.debug("complete: space=%s groups=%s", space, message.groups)
    elif isinstance(message, Join | Leave):
        _log.debug("%s: space=%s", "joined" if isinstance(message, Join) else "left", space)
