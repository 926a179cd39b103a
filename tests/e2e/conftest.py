"""What every acceptance test starts from: one node, one registry, one tree with everything, one real model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.models import make_model
from tests.support.processes import Node, running_node, why_no_mount
from tests.support.registry import Registry, running_registry
from tests.support.swarm import Swarm
from tests.support.trees import make_tree
from tests.support.weights import Array, save_safetensors

CALM = {
    "test_acceptance.py",
    "test_mount_errors.py",
    "test_prefetch.py",
    "test_push.py",
    "test_views.py",
    "test_weights.py",
}
"""One node each, and nobody is killed or raced with: they may run beside others (scripts/test.sh)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here run several processes and mount; without /dev/fuse they say so and do not run."""
    here = Path(__file__).parent
    reason = why_no_mount()
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.mount)
            if item.path.name in CALM:
                item.add_marker(pytest.mark.calm)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with every kind of inode; read-only by agreement."""
    top = tmp_path_factory.mktemp("trees") / "everything"
    make_tree(top)
    return top


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real weights as published, their bf16 copy, tokenizer and configuration; read-only by agreement."""
    return make_model(tmp_path_factory.mktemp("models") / "model", dtypes=("F32", "BF16"))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node of its own."""
    with running_node(tmp_path / "node") as node:
        yield node


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A docker-registry of its own, empty, open, on loopback."""
    with running_registry(tmp_path / "registry") as registry:
        yield registry


@pytest.fixture(params=["registry", "oci"])
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Make references of images in a real registry, or in an OCI layout."""
    if request.param == "oci":
        return lambda name: f"oci:{tmp_path / 'layout'}:{name}"
    registry: Registry = request.getfixturevalue("registry")
    return lambda name: f"localhost:{registry.port}/e2e/{name}:v1"


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """A scheduler of its own; nodes as the test wants them."""
    with ExitStack() as stack:
        yield Swarm(tmp_path, stack)


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB of noise in one file and a small one; read-only by agreement."""
    top = tmp_path_factory.mktemp("swarm") / "model"
    top.mkdir()
    tensors = {f"layer.{n}": Array("U8", (4 << 20,), os.urandom(4 << 20)) for n in range(16)}
    save_safetensors(top / "model.safetensors", tensors)
    (top / "config.json").write_text("{}")
    return top
