"""Weights, through the command and a mount: how little of them is stored, sent again and fetched, and that every byte comes back.

The figures are those the product promises, on the published weights of all-MiniLM-L6-v2 and what its users make of them. Ratios are
exact: they do not depend on the machine. Every image is read back through a mount by a node that has nothing.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.support.compare import compare_trees
from tests.support.models import published_model
from tests.support.processes import Node, running_node
from tests.support.registry import Registry, running_registry
from tests.support.weights import (
    FINE_TUNE,
    ONE_STEP,
    Array,
    block_quantised,
    cast,
    fp8_rows,
    load_arrays,
    quantised_rows,
    save_gguf,
    save_onnx,
    save_safetensors,
    trained,
)

Weights = Mapping[str, Array]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def builder(place: Path) -> Iterator[Node]:
    """The machine that builds."""
    with running_node(place / "builder") as node:
        yield node


@pytest.fixture(scope="module")
def registry(place: Path) -> Iterator[Registry]:
    with running_registry(place / "registry") as registry:
        yield registry


@pytest.fixture(scope="module")
def published() -> dict[str, Array]:
    """The float32 tensors as published."""
    return load_arrays(published_model() / "model.safetensors")


@pytest.fixture(scope="module")
def base(place: Path, builder: Node, registry: Registry) -> str:
    """The published model in the registry: what variants are held against."""
    source = place / "base"
    source.mkdir()
    shutil.copyfile(published_model() / "model.safetensors", source / "model.safetensors")
    ref = f"localhost:{registry.port}/models/base:v1"
    builder.build(source, ref, "--dict", "none")
    return ref


def directory(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return source


def assert_reads_back(node: Node, ref: str, source: Path) -> None:
    mounted = node.mount(ref)
    assert compare_trees(source, mounted) == []
    node.rafs("umount", mounted)


def widened(array: Array) -> Array:
    """A float32 tensor with the values that its bf16 cast has: what loading in bf16 and saving in fp32 leaves."""
    if array.dtype != "F32":
        return array
    half = np.frombuffer(cast(array, "BF16").data, dtype="<u2")
    return Array("F32", array.shape, (half.astype("<u4") << 16).tobytes())


SAFETENSORS = {
    "fp32": (lambda array: array, 0.83),
    "bf16": (lambda array: cast(array, "BF16"), 0.68),
    "fp16": (lambda array: cast(array, "F16"), 0.86),
    "bf16 values in fp32": (widened, 0.36),
    "int8": (quantised_rows, 1.0),
    "fp8": (fp8_rows, 0.86),
}
GGUF = {
    "F32": (lambda array: array, 0.83),
    "F16": (lambda array: cast(array, "F16"), 0.86),
    "Q8_0": (lambda array: block_quantised(array, "Q8_0"), 1.0),
    "Q4_0": (lambda array: block_quantised(array, "Q4_0"), 1.0),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_the_stored_share_of_weights(
    name: str, node: Node, registry: Registry, published: Weights, tmp_path: Path
) -> None:
    change, most = SAFETENSORS[name]
    source = directory(tmp_path)
    save_safetensors(source / "model.safetensors", {key: change(array) for key, array in published.items()})
    assert_share(node, registry, source, most)


@pytest.mark.parametrize("name", GGUF)
def test_the_stored_share_of_gguf(
    name: str, node: Node, registry: Registry, published: Weights, tmp_path: Path
) -> None:
    change, most = GGUF[name]
    source = directory(tmp_path)
    save_gguf(source / "model.gguf", {key: change(array) for key, array in published.items()})
    assert_share(node, registry, source, most)


def assert_share(node: Node, registry: Registry, source: Path, most: float) -> None:
    ref = f"localhost:{registry.port}/models/share:v1"
    built = node.build(source, ref, "--dict", "none")
    assert built["cut_bytes"]["tensor"] == built["input_bytes"]
    assert built["stored_bytes"] / built["data_bytes"] <= most
    assert_reads_back(node, ref, source)


def header_edit(source: Path, arrays: Weights) -> None:
    save_safetensors(source / "model.safetensors", arrays, {"format": "pt", "note": "edited " * 99})


def reordered(source: Path, arrays: Weights) -> None:
    save_safetensors(source / "model.safetensors", dict(sorted(arrays.items(), reverse=True)))


def sharded(source: Path, arrays: Weights) -> None:
    names = list(arrays)
    third = len(names) // 3
    places: dict[str, str] = {}
    for number, part in enumerate((names[:third], names[third : 2 * third], names[2 * third :]), 1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_safetensors(source / file, {name: arrays[name] for name in part}, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def as_gguf(source: Path, arrays: Weights) -> None:
    save_gguf(source / "model.gguf", arrays)


@pytest.mark.parametrize("change", [header_edit, reordered, sharded, as_gguf], ids=lambda change: change.__name__)
def test_what_stays_the_same_is_not_stored_again(
    change: Callable[[Path, Weights], None],
    node: Node,
    registry: Registry,
    base: str,
    published: Weights,
    tmp_path: Path,
) -> None:
    """The same tensors in another file: at least 99 % of the bytes are those of the base, in another repository's blobs."""
    source = directory(tmp_path)
    change(source, published)
    ref = f"localhost:{registry.port}/models/{change.__name__.replace('_', '-')}:v1"
    built = node.build(source, ref, "--dict", base, "--dict", "none")
    assert sum(built["reused_from"].values()) >= 0.99 * built["data_bytes"]
    assert built["sent_bytes"] <= 0.01 * built["data_bytes"]
    assert_reads_back(node, ref, source)


def test_a_tenth_of_the_tensors_changed_costs_a_tenth(
    node: Node, registry: Registry, base: str, published: Weights, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    names = [name for name, array in published.items() if array.dtype == "F32"]
    chosen = set(rng.choice(names, len(names) // 10, replace=False).tolist())
    arrays = {name: trained(array, FINE_TUNE, rng) if name in chosen else array for name, array in published.items()}
    source = directory(tmp_path)
    save_safetensors(source / "model.safetensors", arrays, {"format": "pt"})
    total = (source / "model.safetensors").stat().st_size
    ceiling = sum(len(array.data) for name, array in arrays.items() if name not in chosen) / total
    ref = f"localhost:{registry.port}/models/tenth:v1"
    built = node.build(source, ref, "--dict", base, "--dict", "none")
    assert sum(built["reused_from"].values()) / total >= ceiling - 0.01
    assert_reads_back(node, ref, source)

    found = node.json("diff", base, ref)
    assert {change["name"] for change in found["tensors"]} == chosen
    assert found["equal_tensors"] == len(arrays) - len(chosen)
    assert found["fetch"]["stored_bytes"] == built["stored_bytes"], "a node that has the base fetches what is new"


@pytest.mark.parametrize(("moved_by", "least"), [(FINE_TUNE, 3.0), (ONE_STEP, 12.0)], ids=["fine-tune", "one-step"])
def test_differences_to_a_base(
    moved_by: float, least: float, node: Node, registry: Registry, published: Weights, tmp_path: Path
) -> None:
    """All of a bf16 model has moved: no chunk is the same, the differences are small. The reader has neither image."""
    rng = np.random.default_rng(4)
    before, after = directory(tmp_path), tmp_path / "after"
    after.mkdir()
    save_safetensors(before / "model.safetensors", {name: cast(array, "BF16") for name, array in published.items()})
    moved = {name: cast(trained(array, moved_by, rng), "BF16") for name, array in published.items()}
    save_safetensors(after / "model.safetensors", moved)
    first, second = (f"localhost:{registry.port}/models/half-{least:g}:{tag}" for tag in ("v1", "v2"))
    old = node.build(before, first, "--dict", "none")
    built = node.build(after, second, "--dict", "none", "--base", first)
    assert built["data_bytes"] / built["stored_bytes"] >= least
    assert built["base_bytes"] <= old["stored_bytes"]

    found = node.json("inspect", second)["delta"]
    assert found["chunks"] == built["delta_chunks"] > 0
    assert found["base_bytes"] == built["base_bytes"], "what a node that lacks the base pays is shown"
    assert_reads_back(node, second, after)


def test_differences_to_differences_end_at_a_stated_depth(
    node: Node, registry: Registry, published: Weights, tmp_path: Path
) -> None:
    """A series of checkpoints, each against the one before. The depth is what docs/format/chunk-map.md states."""
    rng = np.random.default_rng(5)
    arrays = {name: array for name, array in published.items() if "layer.0." in name}
    previous, deltas = "", []
    for step in range(5):
        source = tmp_path / f"step-{step}"
        source.mkdir()
        save_safetensors(source / "model.safetensors", arrays)
        ref = f"localhost:{registry.port}/models/series:{step}"
        options = ("--base", previous) if previous else ()
        deltas.append(node.build(source, ref, "--dict", "none", *options)["delta_chunks"])
        assert_reads_back(node, ref, source)
        previous = ref
        arrays = {name: trained(array, ONE_STEP, rng) for name, array in arrays.items()}
    assert deltas[0] == 0
    assert all(deltas[1:4]), deltas
    assert deltas[4] == 0, "the fifth checkpoint begins a new chain"


def test_weights_beside_an_onnx_model_are_cut_along_its_tensors(
    node: Node, registry: Registry, base: str, published: Weights, tmp_path: Path
) -> None:
    source = directory(tmp_path)
    save_onnx(source / "model.onnx", source / "model.onnx_data", published)
    ref = f"localhost:{registry.port}/models/onnx:v1"
    built = node.build(source, ref, "--dict", base, "--dict", "none")
    assert built["cut_bytes"]["tensor"] == (source / "model.onnx_data").stat().st_size
    assert sum(built["reused_from"].values()) >= 0.99 * built["data_bytes"]
    assert_reads_back(node, ref, source)


def test_what_a_reader_without_the_base_pays_is_said_and_an_unusable_base_too(
    node: Node, registry: Registry, published: Weights, tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    arrays = {name: array for name, array in published.items() if "layer.0." in name}
    before, after = directory(tmp_path), tmp_path / "after"
    after.mkdir()
    save_safetensors(before / "model.safetensors", arrays)
    save_safetensors(after / "model.safetensors", {name: trained(a, ONE_STEP, rng) for name, a in arrays.items()})
    first, second, third = (f"localhost:{registry.port}/models/paid:{tag}" for tag in ("v1", "v2", "v3"))
    node.build(before, first, "--dict", "none")
    on_base = node.run("build", after, "-t", second, "--dict", "none", "--base", first)
    assert "more than without --base" in on_base.stdout
    taken_over = node.run("build", after, "-t", third, "--dict", second, "--dict", "none")
    assert "a node that has none of the earlier images fetches" in taken_over.stdout
    assert "more than" not in taken_over.stdout

    elsewhere = f"oci:{tmp_path / 'layout'}:v1"
    alone = node.run("build", after, "-t", elsewhere, "--dict", "none", "--base", first, "--json")
    assert json.loads(alone.stdout)["delta_chunks"] == 0
    assert "cannot be used for an image in" in alone.stderr

    for options, code in ((("--base", f"{first}-nowhere"), 21), (("--dict", "auto", "--dict", "none"), 2)):
        refused = node.run("build", after, "-t", third, *options)
        assert (refused.returncode, refused.stderr.count("\n")) == (code, 1), refused.stderr


def test_a_rebuild_pushes_nothing_but_a_manifest(
    node: Node, registry: Registry, published: Weights, tmp_path: Path
) -> None:
    source = directory(tmp_path)
    save_safetensors(source / "model.safetensors", published)
    ref = f"localhost:{registry.port}/models/again:v1"
    first = node.build(source, ref)
    blobs = registry.directory / "docker/registry/v2/blobs"
    before = {path.parent.name for path in blobs.rglob("data")}
    again = node.build(source, ref)
    assert (again["digest"], again["sent_bytes"], again["new_chunks"]) == (first["digest"], 0, 0)
    assert {path.parent.name for path in blobs.rglob("data")} == before

    other = f"localhost:{registry.port}/models/elsewhere:v1"
    moved = node.build(source, other)
    assert moved["sent_bytes"] == 0, "the dictionary of this machine knows the blobs, the registry mounts them"
    assert_reads_back(node, other, source)


def test_a_header_that_lies_is_cut_by_content_with_a_warning(node: Node, registry: Registry, tmp_path: Path) -> None:
    source = directory(tmp_path)
    data = np.random.default_rng(6).bytes(3 << 20)
    bad = {
        "too-long": struct.pack("<Q", 1 << 62) + data,
        "overlap": container({name: [0, 1 << 20] for name in "ab"}) + data,
        "past-the-end": container({"a": [0, 1 << 40]}) + data,
        "twice": struct.pack("<Q", 130) + (b'{"a":' + entry([0, 64]) + b',"a":' + entry([64, 128]) + b"}").ljust(130) + data,
        "cut-short": struct.pack("<Q", 4 << 20) + data,
    }  # fmt: skip
    for name, raw in bad.items():
        (source / f"{name}.safetensors").write_bytes(raw)
    ref = f"localhost:{registry.port}/models/hostile:v1"
    result = node.run("build", source, "-t", ref, "--json")
    assert result.returncode == 0, result.stderr
    for name in bad:
        assert f"{name}.safetensors" in result.stderr
    assert json.loads(result.stdout)["cut_bytes"]["tensor"] == 0
    assert_reads_back(node, ref, source)


def entry(offsets: list[int]) -> bytes:
    return json.dumps({"dtype": "U8", "shape": [offsets[1] - offsets[0]], "data_offsets": offsets}).encode()


def container(places: Mapping[str, list[int]]) -> bytes:
    text = b"{" + b",".join(json.dumps(name).encode() + b":" + entry(place) for name, place in places.items()) + b"}"
    return struct.pack("<Q", len(text)) + text
