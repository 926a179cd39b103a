"""Plain manifests and examples: Kubernetes would take them, the driver and the commands would, too. Needs no helm."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rafsfs.csi.volume import parse_attributes

from .conftest import CHART, ROOT
from .documents import Document, check_pod, check_schema, containers, parse_arguments, pod_specs

EXAMPLES = sorted((ROOT / "deploy" / "examples").glob("*.yaml"))
MANIFESTS = [
    path for path in (ROOT / "deploy" / "manifests").glob("*.yaml") if path.name in {"rafs.yaml", "namespace.yaml"}
]


def documents_in(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.mark.parametrize("path", [*EXAMPLES, *MANIFESTS], ids=lambda path: path.name)
def test_documents_are_valid(path: Path) -> None:
    documents = documents_in(path)
    for document in documents:
        check_schema(document)
    for document, spec in pod_specs(documents):
        check_pod(document, spec)
        for container in containers(spec):
            if "/rafs:" in container["image"]:
                parse_arguments(container["args"])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_wait_for_their_model_and_see_it_mounted_anew(path: Path) -> None:
    for _, spec in pod_specs(documents_in(path)):
        waits = [c for c in containers(spec) if "/rafs:" in c["image"] and c["args"][0] in {"wait", "models"}]
        assert waits, path.name
        models = {v["name"] for v in spec["volumes"] if "csi" in v or "persistentVolumeClaim" in v}
        for container in containers(spec):
            for mount in container["volumeMounts"]:
                if mount["name"] in models:
                    assert mount["mountPropagation"] == "HostToContainer"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run_nothing_of_ours_as_root(path: Path) -> None:
    for _, spec in pod_specs(documents_in(path)):
        for container in containers(spec):
            context = container.get("securityContext", {})
            assert context.get("runAsUser", 1) != 0, "of whatever image"
            assert not context.get("privileged")
            if "/rafs:" in container["image"]:
                assert context["runAsNonRoot"], container["name"]
                assert not context["allowPrivilegeEscalation"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_volumes_and_classes_of_examples_are_what_the_driver_takes(path: Path) -> None:
    for document in documents_in(path):
        if document["kind"] == "StorageClass":
            parse_attributes(document["parameters"], inline=False)
        if document["kind"] == "PersistentVolume":
            parse_attributes(document["spec"]["csi"]["volumeAttributes"], inline=False)


def test_there_is_an_example_of_every_kind() -> None:
    text = "".join(path.read_text() for path in EXAMPLES)
    for what in ("vllm", "llama.cpp", "tritonserver", "persistentVolumeClaim", 'dynamic: "true"', "PersistentVolume\n"):
        assert what in text, what


def test_plain_manifests_are_one_version_with_the_chart() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    kustomization = yaml.safe_load((ROOT / "deploy" / "manifests" / "kustomization.yaml").read_text())
    assert kustomization["images"][0]["newTag"] == chart["appVersion"]
    assert f'version = "{chart["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()
