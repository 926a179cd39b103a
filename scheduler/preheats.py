"""Images that a tool wants on many nodes: who was told to fetch what, how far each is, and who waits to hear of it.

Decided here: when a preheat is over. Rule: a tool hears of every change, and of a node that has gone as of one that failed. Pure but for
its own state; bounded by the tools that are connected, each of which names the nodes that were there when it asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from p2p.protocol.messages import Fill, Filled, FromScheduler, NodeProgress, Preheat, Preheated

Out = list[tuple[str, FromScheduler]]


@dataclass(slots=True)
class PreheatState:
    """A tool waits for an image to be everywhere."""

    tool: str
    number: int
    """How the tool calls it."""
    nodes: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    """Of each node: bytes done, bytes in all (0: not known yet), error."""

    def tell(self) -> Out:
        """Return what the tool is told."""
        return [(self.tool, Preheated(self.number, [NodeProgress(name, *node) for name, node in self.nodes.items()]))]


class PreheatTable:
    """The preheats under way, by a number of the scheduler's own."""

    def __init__(self) -> None:
        self._under_way: dict[int, PreheatState] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, tool: str, event: Preheat, nodes: Iterable[str]) -> Out:
        """Have nodes fetch an image for a tool."""
        number, self._next = self._next, self._next + 1
        preheat = self._under_way[number] = PreheatState(tool, event.number, dict.fromkeys(nodes, (0, 0, "")))
        return [*((name, Fill(number, event.image)) for name in preheat.nodes), *preheat.tell()]

    def filled(self, node: str, event: Filled) -> Out:
        """A node says how far it is."""
        preheat = self._under_way.get(event.number)
        if preheat is None or node not in preheat.nodes:
            return []
        preheat.nodes[node] = (event.done, event.total, event.error)
        if all(_is_over(state) for state in preheat.nodes.values()):
            del self._under_way[event.number]
        return preheat.tell()

    def gone(self, name: str) -> Out:
        """A node or a tool is connected no longer."""
        out: Out = []
        for number, preheat in list(self._under_way.items()):
            if preheat.tool == name:
                del self._under_way[number]
            elif name in preheat.nodes and not _is_over(preheat.nodes[name]):
                done, total, _ = preheat.nodes[name]
                preheat.nodes[name] = (done, total, "the node has gone")
                out += preheat.tell()
        return out


def _is_over(node: tuple[int, int, str]) -> bool:
    done, total, error = node
    return bool(error) or (total > 0 and done >= total)
