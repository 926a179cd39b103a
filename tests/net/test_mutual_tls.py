"""TLS of a swarm: who is let in, and what is said at start about files that will not do."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from rafsfs.errors import RemoteError, UsageError
from rafsfs.net import mutual_tls
from rafsfs.net.http1 import HttpPool
from rafsfs.net.http_server import Answer, HttpServer, Request
from rafsfs.net.mutual_tls import MutualTls, load_mutual_tls, names_of
from rafsfs.net.origin import Origin, Target
from tests.support.certificates import Authority

pytestmark = pytest.mark.io


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("swarm-ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other-ca"))


def load(variables: dict[str, str], *, any_address: bool = False) -> MutualTls:
    files = (variables[f"RAFS_SWARM_{what}"] for what in ("CERT", "KEY", "CA"))
    loaded = load_mutual_tls(*files, any_address=any_address)
    assert loaded is not None
    return loaded


async def ask(server: ssl.SSLContext, client: ssl.SSLContext) -> int:
    async def handle(request: Request) -> Answer:
        return Answer(200, b"here\n")

    outcome: int | RemoteError = 0
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(HttpServer(handle, ssl_context=server).serve, "127.0.0.1", 0)
            pool = HttpPool(ssl_context=client, timeout_s=5, use_proxies=False)
            try:
                async with pool.get(Target(Origin("https", "127.0.0.1", port), "/"), {}) as response:
                    outcome = response.status
            except RemoteError as error:
                outcome = error
            finally:
                pool.close()
                nursery.cancel_scope.cancel()
    if isinstance(outcome, RemoteError):
        raise outcome
    return outcome


def test_without_files_there_is_no_tls() -> None:
    assert load_mutual_tls("", "", "") is None


async def test_two_certificates_of_the_authority_talk(authority: Authority) -> None:
    one, other = load(authority.issue("one")), load(authority.issue("other"))
    assert await ask(one.server, other.peers) == 200


async def test_a_client_without_certificate_is_refused(authority: Authority) -> None:
    one = load(authority.issue("one"))
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(authority.ca)
    with pytest.raises(RemoteError):
        await ask(one.server, bare)


async def test_a_certificate_of_another_authority_is_refused_by_both_sides(
    authority: Authority, stranger: Authority
) -> None:
    one, other = load(authority.issue("one")), load(stranger.issue("other"))
    with pytest.raises(RemoteError, match="not accepted"):
        await ask(one.server, other.peers)
    other.peers.load_verify_locations(authority.ca)
    with pytest.raises(RemoteError):
        await ask(one.server, other.peers)


async def test_a_certificate_for_another_address_is_refused_unless_the_chain_is_enough(authority: Authority) -> None:
    elsewhere, one = authority.issue("elsewhere", "IP:10.9.9.9,DNS:elsewhere.example"), authority.issue("one")
    with pytest.raises(RemoteError, match="not accepted"):
        await ask(load(elsewhere).server, load(one).peers)
    assert await ask(load(elsewhere).server, load(one, any_address=True).peers) == 200
    with pytest.raises(RemoteError, match="not accepted"):
        await ask(load(elsewhere).server, load(one, any_address=True).by_name)


async def test_tls_1_1_is_refused(authority: Authority) -> None:
    one, old = load(authority.issue("one")), load(authority.issue("old"))
    old.peers.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.peers.minimum_version = old.peers.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(RemoteError, match=r"tls|ssl"):
        await ask(one.server, old.peers)


def test_the_systems_authorities_are_not_trusted(authority: Authority) -> None:
    one = load(authority.issue("one"))
    for context in (one.server, one.peers, one.by_name):
        assert len(context.get_ca_certs()) == 1
        assert context.verify_mode is ssl.CERT_REQUIRED


def test_names_of_a_certificate() -> None:
    shown = {"subjectAltName": (("DNS", "Node.example"), ("IP Address", "10.0.0.1"), ("URI", "x:y"))}
    assert names_of(shown) == {"node.example", "10.0.0.1"}
    assert names_of(None) == set()


def _mode(mode: int) -> Callable[[Path], None]:
    return lambda key: key.chmod(mode)


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (_mode(0o644), "has mode 0644"),
        (_mode(0o602), "has mode 0602"),
        (lambda key: key.write_text("nonsense"), "cannot load the certificate of this node"),
        (lambda key: key.unlink(), "no such file"),
    ],
)
def test_a_key_that_will_not_do_is_one_line(authority: Authority, break_it: Callable[[Path], None], says: str) -> None:
    files = authority.issue("broken")
    break_it(Path(files["RAFS_SWARM_KEY"]))
    with pytest.raises(UsageError, match=says) as caught:
        load(files)
    assert "\n" not in str(caught.value)


def test_a_key_that_a_group_may_read_is_taken(authority: Authority) -> None:
    files = authority.issue("grouped")
    Path(files["RAFS_SWARM_KEY"]).chmod(0o640)
    load(files)


def test_mismatched_foreign_and_missing_files_are_named(authority: Authority, stranger: Authority) -> None:
    one, two, foreign = authority.issue("one"), authority.issue("two"), stranger.issue("foreign")
    with pytest.raises(UsageError, match=r"one\.pem with key .*two\.key: key values mismatch"):
        load({**one, "RAFS_SWARM_KEY": two["RAFS_SWARM_KEY"]})
    with pytest.raises(UsageError, match=r"swarm-ca\.pem does not vouch for .*one\.pem"):
        load({**one, "RAFS_SWARM_CA": foreign["RAFS_SWARM_CA"]})
    with pytest.raises(UsageError, match=r"authority of the swarm from .*absent"):
        load({**one, "RAFS_SWARM_CA": "/absent"})
    with pytest.raises(UsageError, match="without --swarm-ca"):
        load({**one, "RAFS_SWARM_CA": ""})
    with pytest.raises(UsageError, match="without --swarm-cert"):
        load_mutual_tls("", "", one["RAFS_SWARM_CA"])


async def test_bodies_come_whole_whatever_the_pieces_they_are_read_in(authority: Authority) -> None:
    body = bytes(range(256)) * (12 << 10) + b"end"

    async def handle(request: Request) -> Answer:
        return Answer(200, body)

    one = load(authority.issue("one"))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            port = await nursery.start(HttpServer(handle, ssl_context=one.server).serve, "127.0.0.1", 0)
            pool = HttpPool(ssl_context=one.peers, timeout_s=5, use_proxies=False)
            for piece in (len(body), 1 << 20, 16384, 100_001):
                buffer = memoryview(bytearray(len(body)))
                async with pool.get(Target(Origin("https", "127.0.0.1", port), "/"), {}) as response:
                    for start in range(0, len(body), piece):
                        await response.readinto(buffer[start : start + piece])
                assert buffer == body
            pool.close()
            nursery.cancel_scope.cancel()


def _put(files: dict[str, str], others: dict[str, str]) -> None:
    """Put other files in the place of some, as whoever renews certificates does."""
    for name, path in files.items():
        Path(f"{path}.new").write_bytes(Path(others[name]).read_bytes())
        Path(f"{path}.new").chmod(0o600)
        Path(f"{path}.new").rename(path)


@pytest.mark.logs_warnings
async def test_renewed_files_are_used_without_a_restart_and_wrong_ones_are_not(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mutual_tls, "_LOOK_S", 0.02)
    caplog.set_level("INFO")
    old, new = Authority(tmp_path / "old"), Authority(tmp_path / "new")
    files, theirs = old.issue("node"), new.issue("client")
    node, client = load(files), load(theirs)
    with pytest.raises(RemoteError):
        await ask(node.server, client.peers)

    async def until_said(text: str, times: int) -> None:
        while sum(text in record.getMessage() for record in caplog.records) < times:
            await trio.sleep(0.01)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mutual_tls.follow_files, node)
            await trio.sleep(0.05)
            key = Path(files["RAFS_SWARM_KEY"])
            _put({"RAFS_SWARM_KEY": str(key)}, new.issue("other"))
            await until_said("not renewed", 1)
            assert "key values mismatch" in caplog.text
            assert "/proc/" not in caplog.text
            _put({"RAFS_SWARM_CERT": files["RAFS_SWARM_CERT"]}, authority.issue("third"))
            await until_said("not renewed", 2)
            renewed = new.issue("renewed")
            _put(files, renewed)
            await until_said("swarm renewed", 1)
            assert await ask(node.server, client.peers) == 200
            nursery.cancel_scope.cancel()
