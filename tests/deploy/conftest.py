"""The chart, rendered by helm itself. Helm is built from source when a Go toolchain is there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
KUBE_VERSION = "1.36.0"
"""Said by hand: a helm that is built without its release script believes in 1.20."""
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("no Go toolchain to build helm with")
    program = tmp_path_factory.mktemp("helm") / "helm"
    subprocess.run(
        ["go", "build", "-o", program, "helm.sh/helm/v3/cmd/helm"],
        cwd=ROOT / "tests" / "support" / "helm", check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    return program


@pytest.fixture(scope="session")
def render(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> Render:
    """Documents of the chart with these values."""
    home = tmp_path_factory.mktemp("values")

    def render(values: dict[str, Any]) -> list[dict[str, Any]]:
        file = home / "values.yaml"
        file.write_text(yaml.safe_dump(values))
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
            file,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise ValueError(done.stderr)
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return render
