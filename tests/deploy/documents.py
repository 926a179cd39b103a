"""What must hold of every Kubernetes document here: the schema of its kind, and what a schema does not say.

Rule: arguments are judged by the commands themselves, attributes of volumes by the driver's own parser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import click
import kubernetes_validate

from cli.main import main
from rafsfs.csi.volume import parse_attributes

VERSIONS = ("1.25", "1.36")
"""The oldest Kubernetes that the chart admits, and a recent one."""
Document = dict[str, Any]


def check_schema(document: Document) -> None:
    """Raise unless a document is one of its kind, with no unknown field."""
    if document["kind"] == "ServiceMonitor":  # of an operator, not of Kubernetes
        assert document["apiVersion"] == "monitoring.coreos.com/v1"
        assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert set(document["spec"]) == {"selector", "endpoints"}
        assert document["spec"]["selector"]["matchLabels"]
        assert all(set(end) == {"port", "path", "interval"} for end in document["spec"]["endpoints"])
        return
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def named(documents: Sequence[Document], kind: str, suffix: str = "") -> Document:
    """The one document of a kind whose name ends so."""
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"].endswith(suffix)]
    return found


def pod_specs(documents: Sequence[Document]) -> Iterator[tuple[Document, Document]]:
    """Every document that makes pods, with the pod's spec."""
    for document in documents:
        if document["kind"] == "Pod":
            yield document, document["spec"]
        elif document["kind"] in {"DaemonSet", "Deployment", "StatefulSet", "Job"}:
            yield document, document["spec"]["template"]["spec"]


def containers(spec: Document) -> list[Document]:
    """All containers of a pod."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def check_pod(document: Document, spec: Document) -> None:
    """Raise unless mounts, ports, images and arguments of a pod fit together."""
    claims = document["spec"].get("volumeClaimTemplates", [])
    volumes = {v["name"] for v in spec.get("volumes", [])} | {claim["metadata"]["name"] for claim in claims}
    used: set[str] = set()
    for container in containers(spec):
        name = container["name"]
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts <= volumes, (name, mounts - volumes)
        used |= mounts
        image = container["image"]
        assert re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})\Z", image), image
        assert not image.endswith(":latest"), image
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "httpGet" in container.get(probe, {}):
                assert container[probe]["httpGet"]["port"] in ports, (name, probe)
        for variable in container.get("env", []):
            assert not re.search("TOKEN|PASSWORD|SECRET", variable["name"]), variable["name"]
        texts = [*container.get("command", []), *container.get("args", [])]
        for variable in re.findall(r"\$\((\w+)\)", " ".join(texts)):
            assert variable in {v["name"] for v in container.get("env", [])}, variable
    assert used == volumes, volumes - used
    for volume in spec.get("volumes", []):
        if volume.get("csi", {}).get("driver") == "csi.rafs.dev":
            assert volume["csi"]["readOnly"]
            parse_attributes(volume["csi"].get("volumeAttributes", {}))


def parse_arguments(arguments: Sequence[str]) -> click.Context:
    """Parse what a container hands to `rafs`, as `rafs` does. Raises click.UsageError for what it would refuse."""
    arguments = [re.sub(r"\$\(\w+\)", "10.0.0.1", text) for text in arguments]
    context = click.Context(main)
    command = main.get_command(context, arguments[0])
    assert command is not None, arguments[0]
    return command.make_context(arguments[0], list(arguments[1:]), parent=context)
