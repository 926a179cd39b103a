"""URLs: origins, redirects, loopback, and what of them may be shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rafsfs.errors import UsageError
from rafsfs.net.origin import Origin, is_loopback, parse_url, public_url, resolve_url
from rafsfs.net.proxy import parse_proxy, proxy_for


def test_a_url_is_taken_apart() -> None:
    target = parse_url("https://Reg.Example:5000/v2/a/b?x=1&y=%20#part")
    assert target.origin == Origin("https", "reg.example", 5000)
    assert target.path == "/v2/a/b?x=1&y=%20"
    assert parse_url("http://[::1]:80").origin == Origin("http", "::1", 80)
    assert parse_url("http://[::1]:8080/x").origin.netloc == "[::1]:8080"
    assert parse_url("https://reg.example:443/").origin.netloc == "reg.example"


def test_blanks_and_line_ends_cannot_get_into_a_request() -> None:
    target = parse_url("http://h/a b\x7fé?q=a b")
    assert target.path == "/a%20b%7F%C3%A9?q=a%20b"
    assert "\r" not in parse_url("http://h/a\r\nX: y").path


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/relative",
        "ftp://h/",
        "file:///etc/passwd",
        "http://",
        "http://user:pw@h/",
        "http://h:99999/",
        "http://h:x/",
        "http://ho st/",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "https://" + "a" * 20_000,
    ],
)
def test_what_is_no_url_for_us_is_refused_without_showing_secrets(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_url(url)
    assert "pw" not in str(caught.value)


def test_locations_are_relative_or_absolute() -> None:
    base = parse_url("https://reg.example/v2/a/blobs/uploads/1?state=x")
    assert resolve_url(base, "/v2/b").url == "https://reg.example/v2/b"
    assert resolve_url(base, "2?s=y").url == "https://reg.example/v2/a/blobs/uploads/2?s=y"
    assert resolve_url(base, "//other.example/x").origin.host == "other.example"
    assert resolve_url(base, "http://plain.example/x").origin == Origin("http", "plain.example", 80)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
def test_any_location_gives_a_target_or_a_value_error(location: str) -> None:
    try:
        target = resolve_url(parse_url("https://reg.example/v2/"), location)
    except ValueError:
        return
    assert all(0x20 < ord(c) < 0x7F for c in target.path)


def test_signatures_and_passwords_are_not_shown() -> None:
    assert public_url("https://s3.example/b/k?X-Signature=secret#f") == "https://s3.example/b/k"
    assert public_url("https://user:secret@h/x") == "https://h/x"
    assert "secret" not in str(parse_url("https://h/x?sig=secret"))
    assert len(public_url("https://h/" + "a" * 5000)) <= 300
    assert public_url("https://h/\x1b[31m") == "https://h/?[31m"


def test_loopback_is_this_machine_only() -> None:
    for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1", "LOCALHOST"):
        assert is_loopback(host), host
    for host in ("localhost.example.org", "10.0.0.1", "0.0.0.0", "::", "127.0.0.1.example.org", ""):
        assert not is_loopback(host), host


def test_proxies_come_from_the_environment_but_never_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("https_proxy", "http://ada:pass%20word@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example,.corp")
    proxy = proxy_for(Origin("https", "reg.example", 443))
    assert proxy is not None
    assert (str(proxy), proxy.authorization) == ("proxy.example:3128", "Basic YWRhOnBhc3Mgd29yZA==")
    assert "word" not in repr(proxy)
    assert proxy_for(Origin("http", "reg.example", 80)) is None
    for host in ("localhost", "127.0.0.1", "::1", "inside.example", "a.corp"):
        assert proxy_for(Origin("https", host, 443)) is None, host


@pytest.mark.parametrize("url", ["socks5://p:1080", "https://p", "http://", "http://p:port"])
def test_a_proxy_that_cannot_be_used_is_said(url: str) -> None:
    with pytest.raises(UsageError):
        parse_proxy(url)
