"""The have-maps between simulated nodes: told to whoever listens, gathered a little, and what silence means, as p2p/upload.py, p2p/have.py
and p2p/neighbour.py do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2p.core.task import NeighbourView

from .serving import Follow

if TYPE_CHECKING:
    from .node import SimNode

GATHER_S = 0.01
GONE_S = 9.0
Coming = tuple[set[int], dict[int, int]]
"""What a node fetches from the registry, and what it follows, at what depth."""


class Mesh:
    """Who listens to a node, and to whom it listens."""

    __slots__ = ("_far", "_listeners", "_near", "_news", "_node", "_world", "views")

    def __init__(self, node: SimNode) -> None:
        self._node = node
        self._world = node.world
        self._listeners: dict[str, tuple[SimNode, NeighbourView]] = {}
        self._near: list[tuple[SimNode, NeighbourView]] | None = None
        """Of the listeners, those in the same zone; None: to be found anew."""
        self._far: list[tuple[SimNode, NeighbourView]] = []
        self._news: list[int] = []
        self.views: dict[str, NeighbourView] = {}

    # ---- telling -------------------------------------------------------------------------------------------------

    def landed(self, chunk: int) -> None:
        """A unit has come: it is told soon."""
        if not self._news:
            self._world.after(GATHER_S, self._tell)
        self._news.append(chunk)

    def _tell(self) -> None:
        news, self._news = self._news, []
        if self._node.alive and news:
            self._send(news, None)

    def show_coming(self, pending: set[int], relayed: dict[int, int]) -> None:
        """Tell what is being fetched from the registry, and what is followed."""
        self._send(None, (pending, relayed))

    def _send(self, news: list[int] | None, coming: Coming | None) -> None:
        if self._near is None:
            zone = self._node.zone
            self._near = [pair for pair in self._listeners.values() if pair[0].zone == zone]
            self._far = [pair for pair in self._listeners.values() if pair[0].zone != zone]
        for pairs in (self._near, self._far):
            if pairs:
                self._world.after(self._world.latency(self._node, pairs[0][0]), self._reach, pairs, news, coming)

    def _reach(self, pairs: list[tuple[SimNode, NeighbourView]], news: list[int] | None, coming: Coming | None) -> None:
        done = []
        for node, view in pairs:
            if not view.listening or not node.alive:
                continue
            if not node.content.left:
                done.append(node.name)
            elif news is None:
                assert coming is not None
                node.perform(node.core.is_getting(node.task, view, *coming, node.world.now))
                if node.pipeline.room > 0:
                    node.pipeline.prefetch()
            elif len(news) > 1 or not view.have[news[0]]:
                node.mesh.hear(view, news)
        for name in done:  # it wants nothing more
            self._listeners.pop(name, None)
            self._near = None

    def drop_all(self) -> list[SimNode]:
        """Return who listened; nobody does any more."""
        nodes = [node for node, _ in self._listeners.values()]
        self._listeners.clear()
        self._near = None
        return nodes

    # ---- listening -----------------------------------------------------------------------------------------------

    def listen(self, view: NeighbourView) -> None:
        """Begin to listen to somebody."""
        self.views[view.id] = view
        other = self._world.nodes.get(view.id)
        if other is None or not other.alive:
            self._world.after(GONE_S, self._part, view, True)
        else:
            self._world.after(2 * self._world.latency(self._node, other), self._subscribe, view, other)

    def _subscribe(self, view: NeighbourView, other: SimNode) -> None:
        node = self._node
        if not node.alive or node.content.complete:
            return
        if not other.alive:
            self._world.after(GONE_S, self._part, view, True)
            return
        other.mesh._listeners[node.name] = (node, view)
        other.mesh._near = None
        have = list(range(node.content.count)) if other.is_liar else other.content.held()
        coming = set(other.task.leases), other.relayed
        self._world.after(self._world.latency(other, node), self._first_map, view, have, coming)

    def _first_map(self, view: NeighbourView, have: list[int], coming: Coming) -> None:
        node = self._node
        if node.alive and not node.content.complete and node.task.neighbours.get(view.id) is view:
            view.listening = True
            self.hear(view, have)
            node.perform(node.core.is_getting(node.task, view, *coming, node.world.now))

    def hear(self, view: NeighbourView, chunks: list[int]) -> None:
        """A neighbour has told what it has."""
        node, have = self._node, view.have
        fresh = [chunk for chunk in chunks if not have[chunk]]
        for chunk in fresh:
            have[chunk] = 1
        effects = node.core.heard(node.task, fresh)
        if effects:
            node.perform(effects)
        if node.pipeline.room > 0:
            node.pipeline.prefetch()

    def is_silent(self, name: str) -> None:
        """Nothing has come from a neighbour for SILENT_S, or its connection is broken."""
        node, view = self._node, self.views.get(name)
        if node.alive and view is not None and view.listening:
            view.listening = False
            view.pending = set()
            view.relayed = {}
            for exchange in [e for e in node.exchanges if type(e) is Follow and e.view is view]:
                exchange.given_up()
            node.core.silent(node.task)
            node.tick_at(self._world.now)
            self._world.after(GONE_S, self._part, view, not node.content.complete)

    def _part(self, view: NeighbourView, unreachable: bool) -> None:
        node = self._node
        if node.alive and self.views.get(view.id) is view:
            del self.views[view.id]
            node.perform(node.core.part(node.task, view, unreachable=unreachable and not node.content.complete))
