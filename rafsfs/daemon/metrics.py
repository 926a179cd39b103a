"""The series of a node: all there are, with help and labels, and where their values come from. docs/operations.md repeats the table.

Rule: no label holds a reference, a path or an address, so a node has the same few dozen series however many images and peers it has seen.
"""

from __future__ import annotations

from typing import Final

from ..metrics import Series

NODE: Final = (
    Series("rafs_node_info", "gauge", "1; the version of the daemon.", "version"),
    Series("rafs_memory_bytes", "gauge", "Resident memory of the daemon and of all workers together.", "process"),
    Series("rafs_mounts", "gauge", "Mounts by state: starting, ready, restarting, failed.", "state"),
    Series("rafs_images_open", "gauge", "Images in use or offered to others."),
    Series("rafs_read_cached_bytes", "counter", "Bytes of reads answered at once, their data being present."),
    Series("rafs_fetched_bytes", "counter", "Bytes of chunks obtained, by source: local, peer, origin.", "source"),
    Series("rafs_read_miss_seconds", "histogram", "Time that reads of missing data waited for their chunks."),
    Series("rafs_reads_failed", "counter", "Reads of missing data that failed, by class of error.", "cause"),
    Series("rafs_chunks_landed", "counter", "Chunks obtained."),
    Series("rafs_chunks_failed", "counter", "Chunks given up, by class of error.", "cause"),
    Series("rafs_fetch_retries", "counter", "Attempts to fetch that failed and were repeated."),
    Series("rafs_fetch_corrupt", "counter", "Chunks from a registry that did not match their digest."),
    Series(
        "rafs_fetch_queue_chunks", "gauge", "Chunks that wait for a free worker: demand, leased, prefetch.", "priority"
    ),
    Series("rafs_fetch_in_flight_chunks", "gauge", "Chunks being fetched."),
    Series("rafs_fetch_parked_chunks", "gauge", "Chunks that wait for their base, another node, or space on the disk."),
    Series("rafs_cache_present_bytes", "gauge", "Bytes of chunks in the cache."),
    Series("rafs_cache_quota_bytes", "gauge", "What it may hold; absent without a quota."),
    Series("rafs_cache_evicted_bytes", "counter", "Bytes evicted."),
    Series("rafs_cache_evicted_spaces", "counter", "Data spaces evicted."),
    Series("rafs_cache_disk_full", "counter", "Times that the disk was found full and something was to be evicted."),
    Series("rafs_swarm_schedulers", "gauge", "Schedulers by state: up, down.", "state"),
    Series("rafs_swarm_peers", "gauge", "Other nodes met since the start."),
    Series("rafs_swarm_peers_banned", "gauge", "Of these, not asked any more since they gave a wrong chunk."),
    Series("rafs_swarm_tasks", "gauge", "Data spaces shared with others."),
    Series("rafs_swarm_neighbours", "gauge", "Have-maps that are followed, over all data spaces."),
    Series("rafs_swarm_leases", "gauge", "Groups that this node is to fetch from a registry."),
    Series(
        "rafs_swarm_events",
        "counter",
        "What befell requests to others: stalled, corrupt, busy, absent, and unruled (no scheduler answered).",
        "event",
    ),
    Series("rafs_upload_bytes", "counter", "Bytes of chunks given to others."),
    Series("rafs_upload_requests", "counter", "Requests of others answered with chunks."),
    Series("rafs_upload_refused", "counter", "Requests refused because all slots were busy."),
    Series("rafs_upload_busy_slots", "gauge", "Slots in use."),
    Series("rafs_upload_slots", "gauge", "Slots there are."),
)
