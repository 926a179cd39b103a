"""The chart, rendered by helm itself. Helm is built from source when a Go toolchain is there."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.go_tools import go_program

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
KUBE_VERSION = "1.36.0"
"""Said by hand: a helm that is built without its release script believes in 1.20."""
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm() -> Path:
    return go_program(ROOT / "tests" / "support" / "helm", "helm.sh/helm/v3/cmd/helm")


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
