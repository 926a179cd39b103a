"""How fast does a model reach every node of a big cluster, and what does it cost registry and scheduler? `python -m benchmarks.swarm_sim`.

Simulated (tests/simulation, docs/simulation.md): the scheduler's engine and the core of every peer are the real code, clock and links are
not. A model of 130 GB by default, in units: as many transfers as peers times units are simulated, so big swarms have bigger units than the
4 MiB of the real thing. A unit is passed on only when it is whole, so big units make the simulated swarm slower, not faster; timeouts and
pauses keep their real length. `--peers 100 --units 64 256 1024` shows how much. `engine` measures the scheduler's engine alone.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
import tracemalloc
from dataclasses import asdict
from typing import Any

from p2p.protocol.groups import pack_bits
from p2p.protocol.messages import (
    VERSION,
    Answer,
    Ask,
    Complaint,
    Done,
    Hello,
    Join,
    Kind,
    Order,
    Progress,
    Report,
    Verdict,
)
from scheduler.engine import Engine, Out
from tests.simulation.world import Setting, World

from .measure import Row, commit, machine, table

_TASK = b"t" * 32
_BATCH = 100
"""Events between two looks at the clock."""


def simulate(setting: Setting) -> tuple[list[Row], World]:
    """Run one swarm; return its rows."""
    began = time.perf_counter()
    world = World(setting)
    world.run()
    seconds = time.perf_counter() - began
    ended = [node.finished_at - node.began_at for node in world.nodes.values() if node.finished_at is not None]
    last = max((node.finished_at or 0.0) for node in world.nodes.values())
    bound = setting.bound_s
    asked = {name: value for name, value in asdict(setting).items() if name in _SHARES and value not in {0, 1}}
    what = ", ".join([f"{setting.peers:,} peers, {setting.units} units", *(f"{k} {v:g}" for k, v in asked.items())])
    messages = sum(world.messages.values())
    target = 1.5 if asked else 1.25
    left = f"; {len(world.unfinished)} PEERS HAVE NOT FINISHED" if world.unfinished else ""
    zones = sum(size for (giver, taker), size in world.moved.items() if giver != taker)
    total = sum(world.moved.values()) or 1.0
    return [
        Row(f"{what}: last peer", f"{last:.1f} s", f"lower bound {bound:.1f} s", last / bound, f"<= {target}",
            last / bound <= target and not world.unfinished,
            f"a node from its arrival: median {_part(ended, 0.5):.1f} s, p99 {_part(ended, 0.99):.1f} s, longest {max(ended):.1f} s; "
            f"{seconds:.0f} s of this machine{left}"),
        Row(f"{what}: bytes from the registry", f"{world.origin_bytes / 1e9:.1f} GB", "the model", world.origin_bytes / setting.size,
            "<= 1.05", world.origin_bytes <= 1.05 * setting.size, f"{world.wrong} wrong units came and were refused"),
        Row(f"{what}: between zones", f"{zones / 1e9:.0f} GB", "all between peers", zones / total, "-", None, _zones(world)),
        Row(f"{what}: to the scheduler", f"{messages / last:.0f} messages/s", f"peak {max(world.per_second.values())}/s", None, "-", None,
            f"{1e6 * world.engine_s / max(1, messages):.0f} us of CPU each; {_counts(world.messages)}"),
    ], world  # fmt: skip


def _part(numbers: list[float], part: float) -> float:
    """Return the number that `part` of all are below, about."""
    return sorted(numbers)[min(len(numbers) - 1, int(len(numbers) * part))]


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(numbers.items()))


_SHARES = {"churn", "slow", "stuck", "corrupt", "empty", "readers", "seeds", "zones"}


def _zones(world: World) -> str:
    into: dict[int, float] = {}
    for (giver, taker), size in world.moved.items():
        if giver != taker:
            into[taker] = into.get(taker, 0.0) + size
    return "into each: " + (", ".join(f"{into.get(zone, 0.0) / world.setting.size:.2f} models" for zone in range(world.setting.zones))
                            if world.setting.zones > 1 else "one zone")  # fmt: skip


def engine(events: int = 200_000, peers: int = 3000, groups: int = 8000, seed: int = 1) -> list[Row]:
    """Drive the engine alone with the mix of a big swarm; return events per second and bytes per peer."""
    rng = random.Random(seed)
    tracemalloc.start()
    memory = Engine(random.Random(2))
    _join_all(memory, rng, peers, groups)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del memory
    core = Engine(random.Random(2))
    leases: dict[str, list[int]] = {}
    inbox = _join_all(core, rng, peers, groups)
    names = list(core.peers)
    now, spent, count = 1.0, 0.0, 0
    kinds: dict[str, int] = {}
    while count < events:
        batch: list[tuple[str, Any]] = []
        for _ in range(_BATCH):
            peer = rng.choice(names)
            mine = leases.pop(peer, [])
            draw = rng.random()
            if mine:
                batch.append((peer, Done(_TASK, mine)))
            elif draw < 0.45:
                first = rng.randrange(groups)
                wanted = list(range(first, min(groups, first + rng.randrange(1, 4))))
                batch.append((peer, Ask(1, _TASK, wanted, draw < 0.05)))
            elif draw < 0.9:
                batch.append((peer, Done(_TASK, [rng.randrange(groups) for _ in range(4)])))
            elif draw < 0.97:
                batch.append((peer, Progress(_TASK, [rng.randrange(groups)])))
            elif draw < 0.99:
                batch.append((peer, Report(_TASK, rng.choice(names), Complaint.UNREACHABLE)))
            else:  # it goes and comes again with what it has
                member = core.tasks[_TASK].members[peer]
                batch.append((peer, Join(_TASK, groups, "image", bytes(member.have))))
        inbox = []
        began = time.thread_time()  # not what others take of this machine
        for peer, event in batch:
            now += 0.0005
            if isinstance(event, Join):
                inbox += core.disconnect(peer, now)
                inbox += core.connect(Hello(VERSION, peer, 1, Kind.PEER, peer[-1]), "host", now)
                count += 2
            inbox += core.handle(peer, event, now)
        inbox += core.tick(now)[0]
        spent += time.thread_time() - began
        count += len(batch)
        for _, event in batch:
            kinds[type(event).__name__] = kinds.get(type(event).__name__, 0) + 1
        for peer, message in inbox:
            if isinstance(message, Order):
                leases.setdefault(peer, []).append(message.group)
            elif isinstance(message, Answer):
                leases.setdefault(peer, []).extend(r.group for r in message.rulings if r.verdict is Verdict.LEASE)
    speed = count / spent
    return [
        Row(f"scheduler engine, {peers:,} peers, {groups:,} groups", f"{speed:,.0f} events/s of CPU", "20,000/s", speed / 20000, ">= 1.0",
            speed >= 20000, _counts(kinds)),
        Row("memory of the engine per peer and task", f"{held / peers / 1024:.1f} KiB", f"{groups / 8 / 1024:.1f} KiB of bitmap", None, "-",
            None, f"{peers:,} peers have just joined with a tenth of the groups"),
    ]  # fmt: skip


def _join_all(core: Engine, rng: random.Random, peers: int, groups: int) -> Out:
    out: Out = []
    for number in range(peers):
        name = f"peer-{number:05}"
        core.connect(Hello(VERSION, name, 1, Kind.PEER, name[-1]), "host", 0.0)
        have = pack_bits(rng.sample(range(groups), groups // 10), groups)
        out = core.handle(name, Join(_TASK, groups, "image", have), 0.0)
    return out


def run(setting: Any) -> list[Row]:
    """The small form that `python -m benchmarks` runs."""
    del setting
    return [*engine(events=60_000, peers=1000, groups=4000), *simulate(Setting(60, units=128, zones=2))[0]]


def main() -> int:
    """Run and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swarm_sim", description=__doc__)
    parser.add_argument("--peers", type=int, nargs="*", default=[100, 300, 1000])
    parser.add_argument("--units", type=int, nargs="+", default=[256])
    parser.add_argument("--size", type=float, default=130e9, help="bytes of the model")
    parser.add_argument("--origin", type=float, default=1.25e9, help="bytes per second of the registry")
    parser.add_argument("--link", type=float, default=1.25e9, help="bytes per second of each peer, each way")
    parser.add_argument("--zones", type=int, default=1)
    parser.add_argument(
        "--zone-link", type=float, default=0.0, help="bytes per second of a zone to all others, each way; 0: no limit"
    )
    for name in ("churn", "slow", "stuck", "corrupt", "empty", "readers"):
        parser.add_argument(f"--{name}", type=float, default=0.0, help="share of the peers")
    parser.add_argument("--downloads", type=int, default=6, help="units to a peer at once; 6: as chunks in the daemon")
    parser.add_argument("--uploads", type=int, default=12, help="units from a peer at once; 12: as in the daemon")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers")
    parser.add_argument("--no-engine", action="store_true", help="leave out the engine alone")
    arguments = parser.parse_args()
    print(f"{commit()}; {machine()}", flush=True)
    rows = [] if arguments.no_engine else engine()
    for peers in arguments.peers:
        for units in arguments.units:
            setting = Setting(
                peers, size=arguments.size, units=units, origin=arguments.origin, up=arguments.link, down=arguments.link,
                zones=arguments.zones, zone_link=arguments.zone_link, churn=arguments.churn, slow=arguments.slow,
                stuck=arguments.stuck, corrupt=arguments.corrupt, empty=arguments.empty, readers=arguments.readers,
                seeds=arguments.seeds, seed=arguments.seed,
                downloads=arguments.downloads, uploads=arguments.uploads,
                step_s=min(0.2, max(0.005, arguments.size / units / arguments.link / 8)),
            )  # fmt: skip
            found, _ = simulate(setting)
            rows += found
            print(table(found), file=sys.stderr, flush=True)
    print(table(rows))
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
