"""WWW-Authenticate in the forms that registries send it, and in others."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.registry.auth import Scope
from rafsfs.registry.challenge import parse_challenges


def test_a_bearer_challenge() -> None:
    header = (
        'Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push",error="invalid_token"'
    )
    (challenge,) = parse_challenges([header])
    assert challenge.scheme == "bearer"
    assert challenge.parameters["realm"] == "https://auth.example/token"
    assert challenge.parameters["scope"] == "repository:a/b:pull,push"


def test_several_challenges_in_one_header_and_in_several() -> None:
    found = parse_challenges(['Negotiate abc==, Basic realm="x y", Bearer realm=https://h/t', "NTLM", ""])
    assert [challenge.scheme for challenge in found] == ["negotiate", "basic", "bearer", "ntlm"]
    assert found[1].parameters == {"realm": "x y"}
    assert found[2].parameters == {"realm": "https://h/t"}
    assert [challenge.scheme for challenge in parse_challenges(["Negotiate, Basic"])] == ["negotiate", "basic"]


def test_quoted_commas_and_escapes_stay_inside_their_value() -> None:
    (challenge,) = parse_challenges([r'Bearer realm="a, b=\"c\"" , Service = "s"'])
    assert challenge.parameters == {"realm": 'a, b="c"', "service": "s"}


def test_what_cannot_be_parsed_ends_the_list() -> None:
    assert parse_challenges(['"nonsense"']) == []
    assert [c.scheme for c in parse_challenges(['Basic realm="x" ;;; Bearer realm="y"'])] == ["basic"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='Baeric =",\\;/:x0\t', max_size=60))
def test_any_text_gives_a_list(header: str) -> None:
    for challenge in parse_challenges([header]):
        assert challenge.scheme == challenge.scheme.lower()


def test_scopes_are_widened_by_what_the_registry_asks_for() -> None:
    scope = Scope.of("a/b", "pull")
    assert scope.widened("") == ["repository:a/b:pull"]
    assert scope.widened("repository:a/b:pull") == ["repository:a/b:pull"]
    assert scope.widened("repository:a/b:push repository:mirror/a/b:pull") == [
        "repository:a/b:pull,push",
        "repository:mirror/a/b:pull",
    ]
    assert scope.widened("nonsense : :") == ["repository:a/b:pull"]
    both = Scope((("a/b", "pull,push"), ("c", "pull")))
    assert both.widened("") == ["repository:a/b:pull,push", "repository:c:pull"]
