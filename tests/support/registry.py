"""Debian's docker-registry on a free loopback port: open, with TLS, or with token authentication.

Decided here: a registry's storage and port survive `stop` and `start`, so that tests of failure can take it away and
bring it back. The token server issues only the scopes that were asked for, and of those only what the user may: a
client that shows a pull token for a push fails here as it would in the field. Rule: a registry is ended by its own
process handle, also when its test fails.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.x509.oid import NameOID

_START_S: Final = 20.0
_STOP_S: Final = 10.0


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Registry:
    """One docker-registry process with its storage. `address` is what a reference begins with."""

    directory: Path
    port: int
    ca_file: Path | None = None
    client_cert: Path | None = None
    """PEM with certificate and key, if the registry asks for one."""
    username: str = ""
    password: str = field(default="", repr=False)
    tokens: TokenServer | None = None
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """`localhost:PORT`."""
        return f"localhost:{self.port}"

    @property
    def storage(self) -> Path:
        """Where it keeps blobs: below `docker/registry/v2/blobs/sha256/`."""
        return self.directory / "storage"

    def blob_file(self, digest_hex: str) -> Path:
        """Return the file of a blob's bytes."""
        return self.storage / "docker/registry/v2/blobs/sha256" / digest_hex[:2] / digest_hex / "data"

    def start(self) -> None:
        """Start it and wait until it answers. The port and the storage are those of before."""
        if self.process is not None:
            return
        log = (self.directory / "registry.log").open("ab")
        try:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(self.directory / "config.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        finally:
            log.close()
        end = time.monotonic() + _START_S
        while not _answers(self.port):
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                text = (self.directory / "registry.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"docker-registry does not answer on port {self.port}: {text}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it at once: connections break, unfinished uploads stay in its storage."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait(_STOP_S)


@contextlib.contextmanager
def running_registry(
    directory: Path, *, tls: bool = False, client_certificate: bool = False, config: dict[str, Any] | None = None
) -> Iterator[Registry]:
    """Run a registry with its files in `directory`; `config` is merged into its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    registry = Registry(directory, free_port())
    settings = _settings(registry)
    if tls:
        settings["http"]["tls"] = _make_tls(registry, client_certificate=client_certificate)
    settings.update(config or {})
    _write(registry, settings)
    try:
        registry.start()
        yield registry
    finally:
        registry.stop()


@contextlib.contextmanager
def running_token_registry(directory: Path, *, life_s: int = 300) -> Iterator[Registry]:
    """Run a registry that wants tokens, and their server. `username` and `password` may pull and push everything.

    Without credentials, repositories below `public/` may be pulled.
    """
    directory.mkdir(parents=True, exist_ok=True)
    registry = Registry(directory, free_port(), username="ada", password="correct:horse")
    with running_token_server(registry.username, registry.password, life_s=life_s) as tokens:
        registry.tokens = tokens
        bundle = directory / "tokens.pem"
        bundle.write_bytes(tokens.certificate_pem)
        settings = _settings(registry)
        settings["auth"] = {
            "token": {
                "realm": tokens.realm,
                "service": tokens.service,
                "issuer": tokens.issuer,
                "rootcertbundle": str(bundle),
            }
        }
        _write(registry, settings)
        try:
            registry.start()
            yield registry
        finally:
            registry.stop()


def _settings(registry: Registry) -> dict[str, Any]:
    return {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(registry.storage)},
            "delete": {"enabled": True},
            "cache": {"blobdescriptor": "inmemory"},
        },
        "http": {"addr": f"127.0.0.1:{registry.port}"},
    }


def _write(registry: Registry, settings: dict[str, Any]) -> None:
    # JSON is YAML.
    (registry.directory / "config.json").write_text(json.dumps(settings))


def _make_tls(registry: Registry, *, client_certificate: bool) -> dict[str, Any]:
    authority = trustme.CA()
    registry.ca_file = registry.directory / "ca.pem"
    authority.cert_pem.write_to_path(str(registry.ca_file))
    server = authority.issue_cert("localhost", "127.0.0.1")
    chain, key = registry.directory / "server.pem", registry.directory / "server.key"
    for blob in server.cert_chain_pems:
        blob.write_to_path(str(chain), append=True)
    server.private_key_pem.write_to_path(str(key))
    settings: dict[str, Any] = {"certificate": str(chain), "key": str(key)}
    if client_certificate:
        registry.client_cert = registry.directory / "client.pem"
        authority.issue_cert("rafs@example.org").private_key_and_cert_chain_pem.write_to_path(str(registry.client_cert))
        settings["clientcas"] = [str(registry.ca_file)]
    return settings


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass
class TokenServer:
    """What the token server is and what it did. `asked` has the scopes of every request, in order."""

    realm: str
    certificate_pem: bytes
    service: str = "registry"
    issuer: str = "tests"
    identity_token: str = "identity-of-ada"
    """What the refresh_token grant accepts."""
    asked: list[list[str]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    failures: int = 0
    """So many next requests are answered with 503."""
    basic: str = ""
    """Authorization of who may do everything; assign another, and the old password is refused."""
    life_s: int = 300


@contextlib.contextmanager
def running_token_server(username: str, password: str, *, life_s: int = 300) -> Iterator[TokenServer]:
    """Run a token server in a thread: ES256 with the certificate in `x5c`, scopes cut down to what may be had."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(key)
    port = free_port()
    server = TokenServer(
        f"http://127.0.0.1:{port}/token", certificate.public_bytes(serialization.Encoding.PEM), life_s=life_s
    )
    server.basic = "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()
    x5c = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            self._issue(query.get("scope", []), self.headers.get("Authorization"), identity=None)

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            scopes = [scope for text in form.get("scope", []) for scope in text.split()]
            identity = form.get("refresh_token", [""])[0]
            self._issue(scopes, None, identity=identity)

        def _issue(self, scopes: list[str], authorization: str | None, *, identity: str | None) -> None:
            server.asked.append(scopes)
            server.authorizations.append(authorization)
            if server.failures > 0:
                server.failures -= 1
                self._answer(503, {})
                return
            wrong = identity is not None and identity != server.identity_token
            if wrong or (identity is None and authorization not in {None, server.basic}):
                self._answer(401, {"errors": [{"code": "UNAUTHORIZED", "message": "wrong password"}]})
                return
            known = identity is not None or authorization == server.basic
            token = _sign(key, x5c, server, _access(scopes, known=known))
            self._answer(200, {"token": token, "expires_in": server.life_s})

        def _answer(self, status: int, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with _served(port, Handler):
        yield server


@contextlib.contextmanager
def _served(port: int, handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[None]:
    httpd = ThreadingHTTPServer(("127.0.0.1", port), handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def _access(scopes: list[str], *, known: bool) -> list[dict[str, Any]]:
    access = []
    for scope in scopes:
        kind, name, actions = scope.split(":")
        allowed = {"pull", "push"} if known else ({"pull"} if name.startswith("public/") else set())
        granted = [action for action in actions.split(",") if action in allowed]
        if granted:
            access.append({"type": kind, "name": name, "actions": granted})
    return access


def _sign(key: ec.EllipticCurvePrivateKey, x5c: str, server: TokenServer, access: list[dict[str, Any]]) -> str:
    now = int(time.time())
    header = {"typ": "JWT", "alg": "ES256", "x5c": [x5c]}
    claims = {
        "iss": server.issuer,
        "sub": "ada",
        "aud": server.service,
        "exp": now + server.life_s,
        "nbf": now - 10,
        "iat": now,
        "jti": str(now),
        "access": access,
    }
    signed = f"{_coded(json.dumps(header).encode())}.{_coded(json.dumps(claims).encode())}"
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_coded(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _coded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _self_signed(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
