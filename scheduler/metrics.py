"""The series of a scheduler: all there are, with help and labels. docs/operations.md repeats the table.

Rule: labels name kinds of messages and verdicts, never peers, images or tasks.
"""

from __future__ import annotations

from typing import Final

from rafsfs.metrics import Series

SCHEDULER: Final = (
    Series("rafs_scheduler_peers", "gauge", "Connected programs by kind: peer, seed, tool.", "kind"),
    Series(
        "rafs_scheduler_peers_banned", "gauge", "Peers handed to nobody since two others accuse them of wrong bytes."
    ),
    Series("rafs_scheduler_tasks", "gauge", "Data spaces with peers."),
    Series("rafs_scheduler_leases", "gauge", "Live leases."),
    Series("rafs_scheduler_leases_expired", "counter", "Leases that ended without progress."),
    Series("rafs_scheduler_messages_in", "counter", "Messages from peers, by kind.", "event"),
    Series("rafs_scheduler_messages_out", "counter", "Messages to peers, by kind.", "event"),
    Series(
        "rafs_scheduler_rulings",
        "counter",
        "Answers for groups, by verdict: lease, held, wait, later; order: leases given to who asked earlier, or to a seed.",
        "verdict",
    ),
    Series("rafs_scheduler_complaints", "counter", "Reports on peers: corrupt, stalled, unreachable.", "what"),
    Series("rafs_scheduler_engine_seconds", "counter", "Time spent in decisions, by kind of event.", "event"),
    Series("rafs_scheduler_queue_overflows", "counter", "Peers cut off because they did not read."),
    Series(
        "rafs_scheduler_refused", "counter", "Connections refused: version, token, certificate, id, too many.", "cause"
    ),
    Series("rafs_scheduler_preheats", "gauge", "Preheats under way."),
    Series("rafs_scheduler_memory_bytes", "gauge", "Resident memory."),
)
