"""What is believed of a pull secret, and where it lies."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rafsfs.csi.codes import CsiError
from rafsfs.csi.secrets import Grants, docker_auths, read_auths, remove_auths, write_auths
from rafsfs.csi.volume import VolumeSpec
from rafsfs.registry.credentials import find_credential

_SPEC = VolumeSpec("registry.example/models/llama:v1")
_TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"


def test_only_the_credentials_of_a_pull_secret_are_taken_not_its_programs() -> None:
    config = {"auths": {"registry.example": {"auth": "dTpw"}}, "credsStore": "evil", "credHelpers": {"a": "evil"}}
    auths = docker_auths(_SPEC, {".dockerconfigjson": json.dumps(config)}, {})
    assert auths == {"registry.example": {"auth": "dTpw"}}


def test_user_and_password_are_for_the_registry_of_the_volume(tmp_path: Path) -> None:
    write_auths(str(tmp_path / "auth"), docker_auths(_SPEC, {"username": "u", "password": "p:q"}, {}))
    found = find_credential("registry.example", str(tmp_path / "auth"))
    assert found is not None
    assert (found.username, found.password) == ("u", "p:q")
    assert find_credential("other.example", str(tmp_path / "auth")) is None


def test_a_service_account_token_is_shown_to_the_registry_that_asks_for_it() -> None:
    spec = VolumeSpec(_SPEC.ref, token_audience="registry")
    tokens = json.dumps({"registry": {"token": "t0", "expirationTimestamp": "2026-01-01T00:00:00Z"}})
    assert docker_auths(spec, {}, {_TOKENS: tokens}) == {"registry.example": {"identitytoken": "t0"}}
    with pytest.raises(CsiError, match="tokenRequests"):
        docker_auths(spec, {}, {})


@given(st.dictionaries(st.sampled_from([".dockerconfigjson", "username", "password", "x"]), st.text(max_size=40)))
def test_a_secret_that_cannot_be_used_is_refused_without_being_quoted(secret: dict[str, str]) -> None:
    marked = {key: f"S3CRET{value}" for key, value in secret.items()}
    said = ""
    try:
        docker_auths(_SPEC, marked, {})
    except CsiError as error:
        said = str(error)
    assert "S3CRET" not in said


def test_credentials_lie_in_files_that_nobody_else_reads(tmp_path: Path) -> None:
    directory = tmp_path / "auth" / "volume"
    assert write_auths(str(directory), {"a": {"auth": "eA=="}})
    assert not write_auths(str(directory), {"a": {"auth": "eA=="}})
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "config.json").stat().st_mode) == 0o600
    assert read_auths(str(directory)) == {"a": {"auth": "eA=="}}
    remove_auths(str(directory))
    assert read_auths(str(directory)) == {}


def test_grants_are_for_a_repository_and_its_credentials_and_survive(tmp_path: Path) -> None:
    path = str(tmp_path / "grants.json")
    Grants(path).add("r/m", {"r": {"auth": "S3CRET"}})
    grants = Grants(path)
    assert grants.has("r/m", {"r": {"auth": "S3CRET"}})
    assert not grants.has("r/m", {"r": {"auth": "other"}})
    assert not grants.has("r/m", {})
    assert not grants.has("r/other", {"r": {"auth": "S3CRET"}})
    assert "S3CRET" not in Path(path).read_text()
    Path(path).write_text("{")
    assert not Grants(path).has("r/m", {"r": {"auth": "S3CRET"}})
