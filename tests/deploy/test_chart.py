"""The chart: every combination of values that matters makes documents that Kubernetes and `rafs` accept.

What the manifests promise about mounts is what the tests of the driver run with (tests/support/kubelet.py).
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.swarm import split_address
from rafsfs.csi.server import DRIVER
from rafsfs.csi.volume import parse_attributes
from tests.support import kubelet

from .conftest import CHART, KUBE_VERSION, ROOT, Render
from .documents import (
    check_pod,
    check_schema,
    containers,
    named,
    parse_arguments,
    pod_specs,
)

pytestmark = pytest.mark.io

IMAGE = {"image": {"repository": "registry.example/rafs"}}
EVERYTHING: dict[str, Any] = {
    "image": {
        "repository": "registry.example:5000/rafs", "digest": "sha256:" + "0" * 64, "pullPolicy": "Always",
        "pullSecrets": ["pull"],
    },
    "driver": {"name": "models.example", "tokenRequests": [{"audience": "registry.example", "expirationSeconds": 3600}]},
    "kubeletDir": "/var/snap/kubelet",
    "logLevel": "debug",
    "registry": {"caSecret": "ca", "timeout": "5s"},
    "swarm": {"tokenSecret": "swarm", "peerPort": 9000},
    "node": {
        "cacheDir": "/data/rafs", "quota": "500GiB", "mirror": {"enabled": True, "registries": ["registry.example"]},
        "nodeSelector": {"gpu": "true"}, "affinity": {"podAntiAffinity": {}}, "tolerations": [],
    },
    "controller": {"secretNamespaces": ["models", "more"], "nodeSelector": {"a": "b"}},
    "scheduler": {"count": 3, "tolerations": [{"key": "x", "operator": "Exists"}]},
    "seed": {"replicas": 2, "dockerConfigSecret": "docker", "storage": {"size": "1Ti", "className": "fast"}},
    "storageClasses": [
        {"name": "llama", "parameters": {"ref": "registry.example/models/llama:v1", "prefetch": "all"}},
        {"name": "private", "parameters": {"ref": "registry.example/p:v1", "include": '["*.json"]'}, "secretName": "s"},
    ],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "networkPolicy": {"enabled": True},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "defaults": IMAGE,
    "everything": EVERYTHING,
    "host network": {**IMAGE, "node": {"hostNetwork": True, "mirror": {"enabled": True}}},
    "node only": {
        **IMAGE, "controller": {"enabled": False}, "scheduler": {"enabled": False}, "events": {"enabled": False},
    },
    "no seeds": {**IMAGE, "seed": {"enabled": False}, "networkPolicy": {"enabled": True}},
}  # fmt: skip


@pytest.fixture(params=CASES, scope="session")
def documents(request: pytest.FixtureRequest, render: Render) -> list[dict[str, Any]]:
    return render(CASES[request.param])


def test_helm_lint_finds_nothing(helm: Path, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(EVERYTHING))
    command = [helm, "lint", "--strict", CHART, "--kube-version", KUBE_VERSION, "--values", values]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_documents_are_what_kubernetes_expects(documents: list[dict[str, Any]]) -> None:
    keys = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    assert len(keys) == len(set(keys))
    for document in documents:
        check_schema(document)
    for document, spec in pod_specs(documents):
        check_pod(document, spec)
        labels = document["spec"]["template"]["metadata"]["labels"]
        assert document["spec"]["selector"]["matchLabels"].items() <= labels.items()
        for container in containers(spec):
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]["memory"]
            assert container["securityContext"]["readOnlyRootFilesystem"]


def test_services_and_monitors_find_pods_and_ports(documents: list[dict[str, Any]]) -> None:
    pods = list(pod_specs(documents))
    services = [d for d in documents if d["kind"] == "Service"]
    for service in services:
        (spec,) = [
            spec
            for document, spec in pods
            if service["spec"]["selector"].items() <= document["spec"]["template"]["metadata"]["labels"].items()
        ]
        ports = {port["name"] for container in containers(spec) for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    bound = {s["name"] for d in documents if d["kind"].endswith("Binding") for s in d["subjects"]}
    assert {spec["serviceAccountName"] for _, spec in pods if "serviceAccountName" in spec} <= accounts
    assert bound <= accounts
    for monitor in (d for d in documents if d["kind"] == "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        found = [s for s in services if wanted <= s["metadata"]["labels"].items()]
        assert len(found) == 2 + len([s for s in services if "scheduler" in s["metadata"]["name"]])


def test_arguments_are_options_of_the_commands(documents: list[dict[str, Any]]) -> None:
    services = {f"{d['metadata']['name']}.rafs-system.svc" for d in documents if d["kind"] == "Service"}
    seen = set()
    for document, spec in pod_specs(documents):
        for container in containers(spec):
            if "sig-storage" in container["image"]:
                continue
            assert "command" not in container
            context = parse_arguments(container["args"])
            seen.add(context.info_name)
            for name in ("metrics", "mirror", "peer_listen", "listen", "admin", "http"):
                if context.params.get(name):
                    port = split_address(context.params[name], name)[1]
                    assert port in {p["containerPort"] for p in container["ports"]}, (document["kind"], name)
            for address in filter(None, (context.params.get("scheduler") or "").split(",")):
                assert split_address(address, "--scheduler")[0] in services
            mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
            for name in ("cache_dir", "swarm_token_file", "ca_file"):
                if context.params.get(name) is not None:
                    assert any(str(context.params[name]).startswith(m) for m in mounts), name
    assert seen >= {"csi", "daemon"}


def test_mounts_reach_the_node_as_the_tests_of_the_driver_have_it(documents: list[dict[str, Any]]) -> None:
    assert kubelet.BIDIRECTIONAL[kubelet.BIDIRECTIONAL.index("--propagation") + 1] == "unchanged"
    daemon = named(documents, "DaemonSet", "-node")["spec"]["template"]["spec"]
    driver = named(documents, "DaemonSet", "-csi")["spec"]["template"]["spec"]
    cache = parse_arguments(driver["containers"][0]["args"]).params["cache_dir"]
    assert parse_arguments(daemon["containers"][0]["args"]).params["cache_dir"] == cache
    wanted = {"node-daemon": {cache}, "csi": {cache, "pods"}}
    for spec in (daemon, driver):
        host = {v["name"]: v["hostPath"]["path"] for v in spec["volumes"] if "hostPath" in v}
        for container in spec["containers"]:
            shared = {
                mount["mountPath"]
                for mount in container["volumeMounts"]
                if mount.get("mountPropagation") == "Bidirectional"
            }
            assert all(host[m["name"]] == m["mountPath"] for m in container["volumeMounts"] if m["mountPath"] in shared)
            expected = {path if path == cache else host["pods"] for path in wanted.get(container["name"], set())}
            assert shared == expected, container["name"]
            # Kubernetes refuses Bidirectional for others, and nothing else here needs it.
            assert container["securityContext"].get("privileged", False) == bool(shared)


def test_mounts_have_a_holder_in_a_pod_of_its_own(documents: list[dict[str, Any]]) -> None:
    holder = named(documents, "DaemonSet", "-holder")["spec"]["template"]["spec"]
    daemon = named(documents, "DaemonSet", "-node")["spec"]["template"]["spec"]
    started = parse_arguments(daemon["containers"][0]["args"]).params
    assert started["external_holder"]
    assert parse_arguments(holder["containers"][0]["args"]).params["cache_dir"] == started["cache_dir"]
    assert holder["tolerations" if "tolerations" in daemon else "nodeSelector"] == daemon.get(
        "tolerations", daemon.get("nodeSelector")
    )
    (mount,) = holder["containers"][0]["volumeMounts"]
    # One of its own that unmounts do not reach would keep every mount for ever.
    assert mount["mountPropagation"] == "HostToContainer"
    assert holder["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_only_what_mounts_is_root_and_only_the_driver_reaches_the_api(documents: list[dict[str, Any]]) -> None:
    for document, spec in pod_specs(documents):
        if document["kind"] != "DaemonSet":
            assert spec["securityContext"]["runAsNonRoot"]
            assert "hostPath" not in str(spec["volumes"])
        is_controller = document["metadata"]["name"].endswith("controller")
        assert spec["automountServiceAccountToken"] is is_controller
        for container in spec["containers"]:
            has_access = any("serviceaccount" in m["mountPath"] for m in container["volumeMounts"])
            assert not has_access or container["name"] == "csi"
    for role in (d for d in documents if d["kind"] in {"ClusterRole", "Role"}):
        assert "*" not in str(role["rules"])
        if role["metadata"]["name"].endswith("-csi"):
            assert role["rules"] == [{"apiGroups": [""], "resources": ["events"], "verbs": ["create"]}]
        if role["kind"] == "ClusterRole":
            assert "secrets" not in str(role["rules"])


def test_an_upgrade_replaces_the_driver_but_no_node_daemon(documents: list[dict[str, Any]]) -> None:
    assert named(documents, "DaemonSet", "-node")["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert named(documents, "DaemonSet", "-holder")["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert named(documents, "DaemonSet", "-csi")["spec"]["updateStrategy"]["type"] == "RollingUpdate"


def test_the_driver_is_what_kubernetes_is_told(render: Render) -> None:
    assert named(render(IMAGE), "CSIDriver")["metadata"]["name"] == DRIVER
    documents = render(EVERYTHING)
    spec = named(documents, "CSIDriver", "models.example")["spec"]
    assert spec == {
        "attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "None", "requiresRepublish": True,
        "volumeLifecycleModes": ["Persistent", "Ephemeral"],
        "tokenRequests": [{"audience": "registry.example", "expirationSeconds": 3600}],
    }  # fmt: skip
    driver, registrar, _ = named(documents, "DaemonSet", "-csi")["spec"]["template"]["spec"]["containers"]
    assert parse_arguments(driver["args"]).params["driver_name"] == "models.example"
    assert "--kubelet-registration-path=/var/snap/kubelet/plugins/models.example/csi.sock" in registrar["args"]
    classes = [d for d in documents if d["kind"] == "StorageClass"]
    assert [c["provisioner"] for c in classes] == ["models.example", "models.example"]
    for found in classes:
        parse_attributes(found["parameters"], inline=False)
    private = classes[1]["parameters"]
    assert private["csi.storage.k8s.io/node-publish-secret-namespace"] == "rafs-system"
    assert private["include"] == '["*.json"]'


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"image": {"repository": "registry.example/rafs", "tag": "latest"}},
        {**IMAGE, "sidecars": {"registrar": "registry.example/registrar:latest"}},
        {**IMAGE, "sidecars": {"registrar": "registry.example/registrar"}},
        {**IMAGE, "node": {"cacheDir": "relative"}},
        {**IMAGE, "node": {"quotta": "80%"}},
        {**IMAGE, "swarm": {"token": "a secret in the open"}},
        {**IMAGE, "storageClasses": [{"name": "x", "parameters": {"ref": "r.example/m:v1", "cacheDir": "/etc"}}]},
    ],
)
def test_wrong_values_are_refused(render: Render, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image\.repository|values don't meet the specifications"):
        render(values)


def test_plain_manifests_are_what_the_chart_makes(helm: Path) -> None:
    manifests = ROOT / "deploy" / "manifests"
    command = [
        helm,
        "template",
        "rafs",
        CHART,
        "--namespace",
        "rafs-system",
        "--kube-version",
        KUBE_VERSION,
        "--values",
        manifests / "values.yaml",
    ]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert (manifests / "rafs.yaml").read_text().partition("\n")[2] == made, "run `make manifests`"
