"""What a node and a scheduler say of themselves, against what they did: status, metrics over HTTP and over the socket, debug lines."""

from __future__ import annotations

import os
import stat
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.registry import Registry

from .test_swarm import Swarm, read_all


def scraped(text: str) -> dict[str, float]:
    """Samples by name, the value of the label behind it."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_figures_agree_with_what_was_read(tmp_path: Path, registry: Registry) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights.bin").write_bytes(os.urandom(16 << 20))
    with ExitStack() as stack:
        swarm = Swarm(tmp_path, stack)
        ref = f"localhost:{registry.port}/metrics/model:v1"
        swarm.host.build(source, ref)
        env = {"RAFS_METRICS": "127.0.0.1:0", "RAFS_LOG": "debug"}
        first, second = (swarm.node(name, **env) for name in ("first", "second"))
        for node in (first, second):
            read_all(source, swarm.mount([node], ref))
        status = second.status()
        (mount,) = status["mounts"]
        giver = f"127.0.0.1:{first.status()['swarm']['port']}"
        assert mount["peers"] == {giver: mount["sources"]["peer"]}
        assert mount["sources"]["peer"] == mount["data_bytes"]
        assert f"got from peers: {giver} 16.0 MiB" in second.rafs("status")

        port = status["daemon"]["metrics_port"]
        figures = scraped(get(port, "/metrics"))
        assert figures["rafs_fetched_bytes_total peer"] == mount["data_bytes"]
        assert figures["rafs_fetched_bytes_total origin"] == 0
        assert figures["rafs_cache_present_bytes"] == mount["data_bytes"]
        assert "rafs_cache_quota_bytes" not in figures, "there is none"
        assert figures["rafs_mounts ready"] == 1
        assert figures["rafs_swarm_schedulers up"] == 1
        assert figures["rafs_read_miss_seconds_count"] > 0
        assert figures["rafs_read_miss_seconds_bucket +Inf"] == figures["rafs_read_miss_seconds_count"]
        assert 20e6 < figures["rafs_memory_bytes daemon"] < 200e6
        assert scraped(second.rafs("status", "--metrics")).keys() == figures.keys()
        given = scraped(first.rafs("status", "--metrics"))
        assert given["rafs_upload_bytes_total"] >= mount["data_bytes"]
        assert get(port, "/healthz") == "ok\n"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(port, "/")

        scheduler = scraped(get(swarm.admin, "/metrics"))
        assert scheduler["rafs_scheduler_peers peer"] == 2
        leases = (scheduler.get(f"rafs_scheduler_rulings_total {verdict}", 0) for verdict in ("lease", "order"))
        assert sum(leases) >= 4, "16 MiB are four groups"
        assert scheduler["rafs_scheduler_messages_in_total join"] >= 2
        assert scheduler["rafs_scheduler_engine_seconds_total ask"] > 0
        assert "ruling: space=" in first.log()
        assert "verdict=lease" in first.log()
        assert "parent chosen: space=" in second.log()
        assert stat.S_IMODE((second.cache / "daemon.log").stat().st_mode) == 0o600


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with ExitStack() as stack:
        swarm = Swarm(tmp_path, stack)
        taken = swarm.host.run("daemon", "--metrics", f"127.0.0.1:{swarm.admin}")
        assert taken.returncode == 2
        assert "see --metrics" in taken.stderr
        assert "Traceback" not in taken.stderr
