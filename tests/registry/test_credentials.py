"""Where credentials are found in docker's config, and that they show nowhere else."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rafsfs.errors import AccessDeniedError, RafsError, UsageError
from rafsfs.registry.credentials import find_credential

SECRET = "s3cr:et"


def coded(user: str, password: str = SECRET) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def write(directory: Path, config: Any) -> str:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


def helper(directory: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a credential helper on PATH."""
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / f"docker-credential-{name}"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def user_of(registry: str, directory: str, repository: str = "") -> str | None:
    found = find_credential(registry, directory, repository=repository)
    return found.username if found is not None else None


@pytest.mark.parametrize(
    "key", ["reg.io", "https://reg.io", "http://reg.io", "https://reg.io/v1/", "https://reg.io/v2/"]
)
def test_entries_are_found_by_host_in_all_its_spellings(tmp_path: Path, key: str) -> None:
    directory = write(tmp_path, {"auths": {"other.io": {"auth": coded("bob")}, key: {"auth": coded("ada")}}})
    found = find_credential("reg.io", directory)
    assert found is not None
    assert (found.username, found.password) == ("ada", SECRET)
    assert find_credential("reg.io:5000", directory) is None, "another port is another registry"


@pytest.mark.parametrize("registry", ["docker.io", "index.docker.io", "registry-1.docker.io"])
def test_the_hub_is_found_by_its_old_key(tmp_path: Path, registry: str) -> None:
    directory = write(tmp_path, {"auths": {"https://index.docker.io/v1/": {"auth": coded("ada")}}})
    assert user_of(registry, directory) == "ada"


def test_the_most_specific_entry_wins(tmp_path: Path) -> None:
    auths = {"reg.io": coded("any"), "reg.io/team": coded("team"), "reg.io/team/secret": coded("secret")}
    directory = write(tmp_path, {"auths": {key: {"auth": auth} for key, auth in auths.items()}})
    assert user_of("reg.io", directory, "team/secret") == "secret"
    assert user_of("reg.io", directory, "team/other") == "team"
    assert user_of("reg.io", directory, "teams/other") == "any"


def test_identity_tokens_and_plain_fields(tmp_path: Path) -> None:
    auths = {
        "a.io": {"auth": coded("<token>", ""), "identitytoken": "tok"},
        "b.io": {"username": "ada", "password": SECRET},
        "c.io": {},
    }
    directory = write(tmp_path, {"auths": auths})
    found = find_credential("a.io", directory)
    assert found is not None
    assert found.identity_token == "tok"
    assert user_of("b.io", directory) == "ada"
    assert find_credential("c.io", directory) is None


def test_no_config_is_no_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_credential("reg.io", str(tmp_path)) is None
    assert find_credential("reg.io", str(tmp_path / "missing")) is None
    assert find_credential("reg.io", write(tmp_path, "")) is None
    monkeypatch.setenv("DOCKER_CONFIG", write(tmp_path, {"auths": {"reg.io": {"auth": coded("env")}}}))
    assert user_of("reg.io", None) == "env"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        '{"auths": {"reg.io": {"auth": "' + coded("ada"),
        "[]",
        {"auths": ["reg.io"]},
        {"auths": {"reg.io": {"auth": "not base64!" + SECRET}}},
        {"auths": {"reg.io": {"auth": base64.b64encode(b"nocolon").decode()}}},
        {"credHelpers": ["x"]},
        {"credHelpers": {"reg.io": "../evil"}},
        {"credsStore": 5},
        "[" * 100_000,
    ],
)
def test_a_config_that_cannot_be_used_is_named_without_its_secrets(tmp_path: Path, config: Any) -> None:
    directory = write(tmp_path, config)
    with pytest.raises(UsageError) as caught:
        find_credential("reg.io", directory)
    assert directory in str(caught.value)
    assert SECRET not in str(caught.value)
    assert coded("ada") not in str(caught.value)


def test_a_helper_is_asked_with_the_registry_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """test "$1" = get || exit 9; read server
printf '{"ServerURL":"%s","Username":"for-%s","Secret":"s3cr:et"}' "$server" "$server" """
    helper(tmp_path, "one", script, monkeypatch)
    directory = write(
        tmp_path, {"credHelpers": {"reg.io": "one"}, "credsStore": "none", "auths": {"reg.io": {"auth": coded("file")}}}
    )
    found = find_credential("reg.io", directory)
    assert found is not None
    assert (found.username, found.password) == ("for-reg.io", SECRET)
    assert SECRET not in repr(found)


def test_the_general_helper_comes_after_and_the_file_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, "store", 'echo \'{"Username":"<token>","Secret":"tok"}\'', monkeypatch)
    helper(tmp_path, "empty", "echo credentials not found in native keychain; exit 1", monkeypatch)
    config = {"credsStore": "store", "credHelpers": {"b.io": "empty"}, "auths": {"b.io": {"auth": coded("file")}}}
    directory = write(tmp_path, config)
    found = find_credential("a.io", directory)
    assert found is not None
    assert found.identity_token == "tok"
    assert user_of("b.io", directory) == "file"


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        ("echo no keyring here; exit 3", AccessDeniedError, "exit status 3: no keyring here"),
        ('echo \'{"Secret":"s3cr:et"}\'; exit 3', AccessDeniedError, "exit status 3"),
        ("echo nonsense", AccessDeniedError, "expected JSON"),
        ('echo \'{"Username":5,"Secret":"s3cr:et"}\'', AccessDeniedError, "expected JSON"),
        ("sleep 5", AccessDeniedError, "within"),
    ],
)
def test_a_helper_that_fails_is_named_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[RafsError], says: str
) -> None:
    helper(tmp_path, "bad", f"exec 3>&1; {script}" if script != "sleep 5" else "exec sleep 5", monkeypatch)
    directory = write(tmp_path, {"credHelpers": {"reg.io": "bad"}})
    with pytest.raises(error, match=says) as caught:
        find_credential("reg.io", directory, helper_timeout_s=0.3 if "sleep" in script else 5.0)
    assert "docker-credential-bad" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_helper_that_is_not_installed_is_named_with_the_config(tmp_path: Path) -> None:
    directory = write(tmp_path, {"credHelpers": {"reg.io": "missing-for-sure"}})
    with pytest.raises(UsageError, match=r"docker-credential-missing-for-sure.*is not on PATH") as caught:
        find_credential("reg.io", directory)
    assert directory in str(caught.value)
