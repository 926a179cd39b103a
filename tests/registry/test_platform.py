"""Which manifest of an index is for a platform."""

from __future__ import annotations

import pytest

from rafsfs.errors import FormatError
from rafsfs.registry.manifests import of_platform


def entry(number: int, platform: dict[str, str] | None) -> dict[str, object]:
    found: dict[str, object] = {"mediaType": "m", "digest": f"sha256:{number:064x}", "size": 1}
    return found if platform is None else {**found, "platform": platform}


def chosen(platform: str, *entries: dict[str, object]) -> int:
    return int(of_platform({"manifests": list(entries)}, platform).digest.hex, 16)


def test_the_platform_that_was_asked_for_is_taken() -> None:
    amd, arm = {"os": "linux", "architecture": "amd64"}, {"os": "linux", "architecture": "arm64", "variant": "v8"}
    assert chosen("linux/amd64", entry(1, arm), entry(2, amd)) == 2
    assert chosen("linux/arm64", entry(1, arm), entry(2, amd)) == 1
    assert chosen("linux/arm64/v8", entry(1, arm), entry(2, amd)) == 1
    with pytest.raises(FormatError, match="linux/arm64/v8, linux/amd64"):
        chosen("linux/arm64/v9", entry(1, arm), entry(2, amd))


def test_what_names_no_platform_is_for_all() -> None:
    assert chosen("linux/riscv64", entry(1, {"os": "linux", "architecture": "amd64"}), entry(2, None)) == 2
    with pytest.raises(FormatError, match="only nothing"):
        chosen("linux/riscv64")
