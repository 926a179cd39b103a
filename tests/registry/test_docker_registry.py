"""What only a real docker-registry can show: scopes, sessions, TLS, mounts, and other programs on what we wrote."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import trio

from rafsfs.errors import AccessDeniedError, IntegrityError, RemoteError, UnavailableError, UploadLostError, UsageError
from rafsfs.interfaces import ImageStore
from rafsfs.registry.reference import parse_reference
from rafsfs.registry.store import RegistryOptions, open_store
from rafsfs.types import Digest
from tests.support.registry import Registry, running_registry, running_token_registry

from .test_conformance import MANIFEST, noise, put_image, referrers, upload

pytestmark = pytest.mark.io


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """An open registry."""
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Registry]:
    """A registry that wants tokens, its server counting from zero."""
    with running_token_registry(tmp_path / "guarded") as registry:
        yield registry


@asynccontextmanager
async def opened(
    registry: Registry, repository: str, options: RegistryOptions | None = None
) -> AsyncIterator[ImageStore]:
    """Open a repository."""
    async with open_store(parse_reference(f"{registry.address}/{repository}"), options or RegistryOptions()) as store:
        yield store


def logged_in(directory: Path, registry: Registry, password: str | None = None) -> RegistryOptions:
    """Return options with credentials for the registry."""
    pair = f"{registry.username}:{registry.password if password is None else password}"
    auth = base64.b64encode(pair.encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": auth}}}))
    return RegistryOptions(docker_config=str(directory), retries=1)


# ---- tokens ----------------------------------------------------------------------------------------------------------


async def test_a_push_after_a_pull_gets_a_token_of_its_own(guarded: Registry, tmp_path: Path) -> None:
    async with opened(guarded, "a/b", logged_in(tmp_path, guarded)) as store:
        assert not await store.has_blob(Digest.of(b"x"))
        digest = await upload(store, noise(9 << 20), 1 << 20)
        assert await store.get_blob(digest, size=9 << 20) == noise(9 << 20)
    assert guarded.tokens is not None
    assert guarded.tokens.asked == [["repository:a/b:pull"], ["repository:a/b:pull,push"]]


async def test_many_ranges_at_once_cost_one_token(guarded: Registry, tmp_path: Path) -> None:
    options = logged_in(tmp_path, guarded)
    async with opened(guarded, "a/b", options) as store:
        digest = await store.put_blob(noise(100_000))
    assert guarded.tokens is not None
    guarded.tokens.asked.clear()
    async with opened(guarded, "a/b", options) as store, trio.open_nursery() as nursery:

        async def read() -> None:
            async with store.open_range(digest, 10, 10) as stream:
                await stream.readinto(memoryview(bytearray(10)))

        for _ in range(20):
            nursery.start_soon(read)
    assert guarded.tokens.asked == [["repository:a/b:pull"]]


async def test_an_expired_token_is_renewed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    # Two seconds of life: used for the first of them, by the registry's clock good for two (and its leeway).
    with running_token_registry(tmp_path / "guarded", life_s=2) as registry:
        async with opened(registry, "a/b", logged_in(tmp_path, registry)) as store:
            blob = await store.begin_upload()
            data = noise(18 << 20)
            await blob.write(data[: 9 << 20])
            await trio.sleep(1.1)
            await blob.write(data[9 << 20 :])
            await blob.commit(Digest.of(data))
            assert await store.get_blob(Digest.of(data), size=len(data)) == data
        assert registry.tokens is not None
        assert registry.tokens.asked.count(["repository:a/b:pull,push"]) >= 2


async def test_nobody_may_read_what_is_public_only(guarded: Registry, tmp_path: Path) -> None:
    async with opened(guarded, "public/x", logged_in(tmp_path, guarded)) as store:
        digest = await store.put_blob(b"for everybody")
    anonymous = RegistryOptions(docker_config=str(tmp_path / "nothing here"), retries=0)
    async with opened(guarded, "public/x", anonymous) as store:
        assert await store.get_blob(digest, size=13) == b"for everybody"
        with pytest.raises(AccessDeniedError, match=r"public/x denied .*no credentials .*docker login"):
            await store.put_blob(b"from nobody")
    async with opened(guarded, "private/x", anonymous) as store:
        with pytest.raises(AccessDeniedError, match=str(tmp_path / "nothing here")):
            await store.get_manifest("v1")


async def test_wrong_credentials_are_named_by_where_they_are(guarded: Registry, tmp_path: Path) -> None:
    async with opened(guarded, "a/b", logged_in(tmp_path, guarded, "wrong-secret")) as store:
        with pytest.raises(AccessDeniedError) as caught:
            await store.resolve("v1")
        with pytest.raises(AccessDeniedError):
            async with store.open_range(Digest.of(b"x"), 0, 1):
                pass
    text = str(caught.value)
    assert f"{guarded.address}/a/b" in text
    assert str(tmp_path / "config.json") in text
    assert "wrong-secret" not in text


async def test_an_identity_token_is_exchanged(guarded: Registry, tmp_path: Path) -> None:
    assert guarded.tokens is not None
    entry = {"identitytoken": guarded.tokens.identity_token}
    (tmp_path / "config.json").write_text(json.dumps({"auths": {guarded.address: entry}}))
    async with opened(guarded, "a/b", RegistryOptions(docker_config=str(tmp_path))) as store:
        digest = await store.put_blob(b"identified")
        assert await store.get_blob(digest, size=10) == b"identified"
    assert guarded.tokens.authorizations == [None, None]


async def test_credentials_that_are_rotated_are_used_by_a_store_that_is_open(tmp_path: Path) -> None:
    with running_token_registry(tmp_path / "guarded", life_s=2) as registry:  # too short to be used twice
        async with opened(registry, "a/b", logged_in(tmp_path, registry)) as store:
            data = noise(1000)
            await upload(store, data, len(data))
            assert registry.tokens is not None
            registry.tokens.basic = "Basic " + base64.b64encode(f"{registry.username}:new".encode()).decode()
            await trio.sleep(1.2)  # until the token is not used any more
            with pytest.raises(AccessDeniedError, match="answered 401"):
                await store.get_blob(Digest.of(data), size=len(data))
            logged_in(tmp_path, registry, "new")
            assert await store.get_blob(Digest.of(data), size=len(data)) == data


async def test_a_token_server_that_fails_for_a_moment_is_asked_again(guarded: Registry, tmp_path: Path) -> None:
    assert guarded.tokens is not None
    guarded.tokens.failures = 1
    async with opened(guarded, "a/b", logged_in(tmp_path, guarded)) as store:
        digest = await store.put_blob(b"patience")
        guarded.tokens.failures = 99
        async with opened(guarded, "other", logged_in(tmp_path, guarded)) as other:
            with pytest.raises(UnavailableError, match=r"token server .* answered 503"):
                await other.has_blob(digest)


async def test_basic_authentication(tmp_path: Path) -> None:
    # htpasswd -nbBC 4 ada open-sesame
    (tmp_path / "htpasswd").write_text("ada:$2y$04$5JbuBsN9ltB9HxsvoLQ9heSFnhi2MTUU.QMO2H19eBUFs6jbsQV5.\n")
    config = {"auth": {"htpasswd": {"realm": "tests", "path": str(tmp_path / "htpasswd")}}}
    with running_registry(tmp_path / "registry", config=config) as registry:
        registry.username, registry.password = "ada", "open-sesame"
        async with opened(registry, "a/b", logged_in(tmp_path, registry)) as store:
            digest = await store.put_blob(b"basic")
            assert await store.get_blob(digest, size=5) == b"basic"
        async with opened(registry, "a/b", logged_in(tmp_path, registry, "wrong")) as store:
            with pytest.raises(AccessDeniedError, match="credentials are from the entry"):
                await store.has_blob(digest)


# ---- TLS -------------------------------------------------------------------------------------------------------------


async def test_tls_mistakes_are_said_in_words(registry: Registry, tmp_path: Path) -> None:
    with running_registry(tmp_path / "tls", tls=True, client_certificate=True) as guarded:
        ca_file, cert = str(guarded.ca_file), str(guarded.client_cert)
        system_ca = RegistryOptions(client_cert=cert, retries=3)
        cases = [
            (guarded, RegistryOptions(retries=3), RemoteError, "speaks TLS but was asked in plain HTTP.*--ca-file"),
            (guarded, RegistryOptions(ca_file=ca_file, retries=3), AccessDeniedError, "--client-cert"),
            (guarded, system_ca, RemoteError, r"certificate of localhost:\d+ is not accepted.*--ca-file"),
            (registry, RegistryOptions(ca_file=ca_file, retries=3), RemoteError, "--plain-http"),
        ]
        for server, options, error, says in cases:
            async with opened(server, "a/b", options) as store:
                for ask in (store.resolve("v1"), _read_one(store)):
                    with trio.fail_after(5), pytest.raises(error, match=says) as caught:
                        await ask
                    assert not isinstance(caught.value, UnavailableError), "another try would not help"


async def _read_one(store: ImageStore) -> None:
    async with store.open_range(Digest.of(b"x"), 0, 1):
        pass


@pytest.mark.parametrize("field", ["ca_file", "client_cert"])
def test_a_tls_file_that_cannot_be_loaded_is_named(registry: Registry, tmp_path: Path, field: str) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    reference = parse_reference(f"{registry.address}/a/b")
    for path in (bad, tmp_path / "missing.pem"):
        with pytest.raises(UsageError, match=str(path)):
            trio.run(_open_and_close, reference, RegistryOptions(**{field: str(path)}))
    with pytest.raises(UsageError, match="without a client certificate"):
        trio.run(_open_and_close, reference, RegistryOptions(client_key=str(bad)))


async def _open_and_close(reference: object, options: RegistryOptions) -> None:
    async with open_store(reference, options):  # type: ignore[arg-type]
        pass


# ---- uploads ---------------------------------------------------------------------------------------------------------


async def test_a_resume_token_holds_no_credential_and_is_bound_to_its_repository(
    guarded: Registry, tmp_path: Path
) -> None:
    options = logged_in(tmp_path, guarded)
    async with opened(guarded, "a/b", options) as store:
        blob = await store.begin_upload()
        await blob.write(noise(9 << 20))
        token = blob.resume_token
        assert token is not None
        plain = base64.urlsafe_b64decode(token.removeprefix("upload1:"))
        for secret in (b"Bearer", b"Basic", b"eyJ", guarded.password.encode()):
            assert secret not in plain
        async with opened(guarded, "other", options) as other:
            assert (await other.begin_upload(token)).offset == 0
        assert (await store.begin_upload(token)).offset == 8 << 20


async def test_a_restarted_registry_continues_an_upload(tmp_path: Path) -> None:
    secret = {"http": {"addr": "", "secret": "the same before and after"}}
    with running_registry(tmp_path) as registry:
        secret["http"]["addr"] = f"127.0.0.1:{registry.port}"
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**settings, **secret}))
        registry.stop()
        registry.start()
        data = noise(20 << 20)
        async with opened(registry, "a/b") as store:
            blob = await store.begin_upload()
            await blob.write(data[: 10 << 20])
            registry.stop()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(blob.write, data[10 << 20 :])
                await trio.sleep(0.3)  # the write is in its back-off now, or will find the registry back: both must do
                await trio.to_thread.run_sync(registry.start)
            await blob.commit(Digest.of(data))
            assert await store.get_blob(Digest.of(data), size=len(data)) == data


async def test_an_upload_whose_session_is_gone_is_lost_and_says_so(registry: Registry) -> None:
    data = noise(20 << 20)
    async with opened(registry, "lost", RegistryOptions(retries=1)) as store:
        blob = await store.begin_upload()
        await blob.write(data[: 10 << 20])
        sessions = registry.storage / "docker/registry/v2/repositories/lost/_uploads"
        for file in sessions.glob("*/data"):
            file.unlink()
        with pytest.raises(UploadLostError, match=r"no longer has an upload .* send the blob again"):
            await blob.write(data[10 << 20 :])
        assert blob.resume_token is None


async def test_a_cancelled_write_lets_its_part_finish(registry: Registry) -> None:
    data = noise(20 << 20)
    async with opened(registry, "cancelled") as store:
        blob = await store.begin_upload()
        with trio.move_on_after(0.001) as scope:
            await blob.write(data)
        assert scope.cancelled_caught
        token = blob.resume_token
        assert token is not None
        again = await store.begin_upload(token)
        assert again.offset == 8 << 20, "docker-registry would have dropped the session of a part that broke off"
        await again.write(data[again.offset :])
        await again.commit(Digest.of(data))


async def test_a_blob_corrupted_in_the_registry_is_never_returned(registry: Registry) -> None:
    data = noise(100_000)
    async with opened(registry, "corrupt") as store:
        digest = await store.put_blob(data)
        registry.blob_file(digest.hex).write_bytes(data[:500] + b"!" + data[501:])
        with pytest.raises(IntegrityError, match="holds other bytes"):
            await store.get_blob(digest, size=len(data))
        registry.blob_file(digest.hex).write_bytes(data)


async def test_a_blob_is_mounted_from_another_repository(guarded: Registry, tmp_path: Path) -> None:
    options = logged_in(tmp_path, guarded)
    async with opened(guarded, "from/here", options) as source, opened(guarded, "to/there", options) as store:
        digest = await source.put_blob(noise(1000))
        assert not await store.has_blob(digest)
        assert await store.mount_blob(digest, "from/here")
        assert await store.get_blob(digest, size=1000) == noise(1000)
        assert not await store.mount_blob(Digest.of(b"nowhere"), "from/here")
    assert guarded.tokens is not None
    assert ["repository:to/there:pull,push", "repository:from/here:pull"] in guarded.tokens.asked


# ---- referrers -------------------------------------------------------------------------------------------------------


async def test_referrers_are_kept_under_the_fallback_tag(registry: Registry) -> None:
    async with opened(registry, "fallback") as store:
        subject, _ = await put_image(store, "subject", tag="v1")

        async def attach(number: int) -> None:
            await put_image(store, f"referrer {number}", subject=subject, kind="x/trace")

        for number in range(3):
            await attach(number)
        _, index = await store.get_manifest(f"sha256-{subject.digest.hex}")
        entries = json.loads(index)["manifests"]
        assert len(entries) == 3
        assert all(entry["artifactType"] == "x/trace" for entry in entries)
        assert len(await referrers(store, subject.digest)) == 3
        async with aclosing(store.referrers(subject.digest)) as some:  # type: ignore[type-var]
            async for _ in some:
                break  # leaving early is nothing special


# ---- other programs --------------------------------------------------------------------------------------------------


async def test_skopeo_copies_a_layout_of_ours_to_a_registry_and_back(registry: Registry, tmp_path: Path) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    async with open_store(parse_reference(f"oci:{ours}"), RegistryOptions()) as layout:
        descriptor, data = await put_image(layout, "by hand", tag="v1", kind="application/vnd.oci.image.config.v1+json")
        await put_image(layout, "another", tag="v2")
    await skopeo("copy", f"oci:{ours}:v1", f"docker://127.0.0.1:{registry.port}/copied:v1", "--dest-tls-verify=false")
    async with opened(registry, "copied") as store:
        assert await store.get_manifest("v1") == (descriptor, data)
    await skopeo("copy", f"docker://127.0.0.1:{registry.port}/copied:v1", f"oci:{back}:v9", "--src-tls-verify=false")
    async with open_store(parse_reference(f"oci:{back}"), RegistryOptions()) as layout:
        assert (await layout.get_manifest("v9"))[1] == data
        await put_image(layout, "added by us to a layout of skopeo's", tag="v10")
    await skopeo("inspect", "--raw", f"oci:{back}:v9")
    await skopeo("inspect", "--raw", f"oci:{back}:v10")


async def test_skopeo_reads_what_we_push(registry: Registry) -> None:
    async with opened(registry, "pushed") as store:
        _, data = await put_image(store, "pushed", tag="v1")
    text = await skopeo("inspect", "--raw", "--tls-verify=false", f"docker://127.0.0.1:{registry.port}/pushed:v1")
    assert text == data
    assert json.loads(text)["mediaType"] == MANIFEST


async def skopeo(*arguments: str) -> bytes:
    done = await trio.run_process(
        ["skopeo", "--insecure-policy", *arguments], capture_stdout=True, capture_stderr=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return bytes(done.stdout)
