"""TLS among the nodes of one cluster: both sides show a certificate of the cluster's own authority.

Decided here: one mode. A certificate without the authority, or the authority without a certificate, is refused at start, since either
would let somebody in who shows nothing. The authority alone is trusted, not the system's: a certificate from a public authority proves
nothing about who takes part. TLS 1.2 or newer. Files are tried on themselves: what every other node would refuse (expired, of another
authority, not for clients and servers) is said at start, in one line, and in the log when they are renewed; then the old ones stay. Rule:
a key that every user of the machine can read is refused, as is a token; see `refuse_if_public`.

Concurrency: `follow_files` is one task of whoever has the contexts. It reads files in a thread and changes the contexts between two
checkpoints, all from one reading, so that no handshake sees a certificate with another's key. Cancelled, it leaves them as they are.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from ..errors import UsageError

_log = logging.getLogger(__name__)

_LOOK_S: Final = 30.0
"""How often files are looked at: certificates are renewed days before they end."""
_MOST_FILE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where a node's certificate lies, its key (empty: in the same file) and the authority of the swarm; PEM."""

    cert: str
    key: str
    ca: str

    def stamp(self) -> list[tuple[int, ...]]:
        """Return what changes when one of them is replaced. Raises OSError."""
        found = [os.stat(path) for path in (self.cert, self.key or self.cert, self.ca)]
        return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


@dataclass(frozen=True, slots=True)
class MutualTls:
    """The contexts of a node. Made by `load_mutual_tls`."""

    server: ssl.SSLContext
    """For those who connect to us: they must show a certificate."""
    by_name: ssl.SSLContext
    """For what we connect to: the certificate must be for the name or address that we connect to."""
    peers: ssl.SSLContext
    """For other nodes, which are reached by address: as `by_name`, unless any certificate of the authority will do."""
    files: TlsFiles

    def renew(self, copied: TlsFiles) -> None:
        """Use what lies in these files from the next handshake on: certificate and key instead of the old, the authority besides it."""
        for context in {id(c): c for c in (self.server, self.by_name, self.peers)}.values():
            context.load_verify_locations(copied.ca)
            context.load_cert_chain(copied.cert, copied.key or None, password=lambda: "")


def load_mutual_tls(cert: str, key: str, ca: str, *, any_address: bool = False) -> MutualTls | None:
    """Return the contexts that three PEM files make, None if none is named; an empty `key` lies in the file of the certificate.

    `any_address`: another node may show any certificate of the authority, whatever its address. Raises UsageError naming the file.
    """
    if not (cert or key or ca):
        return None
    for option, value, other in (("--swarm-ca", ca, cert or key), ("--swarm-cert", cert, ca or key)):
        if not value:
            raise UsageError(
                f"{other} is given without {option}; TLS among nodes needs a certificate and its authority"
            )
    refuse_if_public(key or cert, "the key of this node's certificate")
    server = _context(ssl.PROTOCOL_TLS_SERVER, cert, key, ca)
    server.verify_mode = ssl.CERT_REQUIRED
    by_name = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)
    peers = by_name
    if any_address:
        peers = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)
        peers.check_hostname = False
    _try_on_itself(server, cert, key, ca)
    return MutualTls(server, by_name, peers, TlsFiles(cert, key, ca))


async def follow_files(tls: MutualTls) -> None:
    """Look for ever whether the files have been replaced, and use the new ones; if these will not do, say so once and keep the old."""
    seen = await trio.to_thread.run_sync(_stamp, tls.files)
    while True:
        await trio.sleep(_LOOK_S)
        found = await trio.to_thread.run_sync(_stamp, tls.files)
        if found is None or found == seen:  # None: they are just being replaced
            continue
        seen = found
        try:
            with copied(tls.files) as files:
                await trio.to_thread.run_sync(_try, files, tls.files)
                tls.renew(files)
        except UsageError as error:
            _log.warning("certificate of the swarm is not renewed, the old one stays in use: %s", error)
        else:
            _log.info("certificate of the swarm renewed: file=%s", tls.files.cert)


def _stamp(files: TlsFiles) -> list[tuple[int, ...]] | None:
    try:
        return files.stamp()
    except OSError:
        return None


@contextmanager
def copied(files: TlsFiles) -> Iterator[TlsFiles]:
    """Yield copies in memory, by paths of this process: OpenSSL takes paths only, and reads them anew each time. Raises UsageError."""
    refuse_if_public(files.key or files.cert, "the key of this node's certificate")
    descriptors: list[int] = []
    try:
        paths = []
        for path in (files.cert, files.key, files.ca):
            if not path:
                paths.append("")
                continue
            try:
                with open(path, "rb") as file:
                    content = file.read(_MOST_FILE)
            except OSError as error:
                raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
            descriptors.append(os.memfd_create("swarm-tls", os.MFD_CLOEXEC))
            os.write(descriptors[-1], content)
            paths.append(f"/proc/self/fd/{descriptors[-1]}")
        yield TlsFiles(*paths)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _try(copies: TlsFiles, named: TlsFiles) -> None:
    """Raise UsageError, with the names that the user knows, if copies will not do."""
    try:
        server = _context(ssl.PROTOCOL_TLS_SERVER, copies.cert, copies.key, copies.ca)
        server.verify_mode = ssl.CERT_REQUIRED
        _try_on_itself(server, copies.cert, copies.key, copies.ca)
    except UsageError as error:
        text = str(error)
        for copy, name in ((copies.cert, named.cert), (copies.key, named.key), (copies.ca, named.ca)):
            text = text.replace(copy, name) if copy else text
        raise UsageError(text) from None


def refuse_if_public(path: str, what: str) -> None:
    """Raise UsageError if every user of the machine may read or write a file that holds a secret. A group may: it was chosen."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UsageError(f"{what}, {path}: {(error.strerror or str(error)).lower()}") from None
    if stat.S_ISREG(mode) and mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UsageError(
            f"{what}, {path}, has mode {stat.S_IMODE(mode):04o}, expected one that keeps other users out; chmod o= {path}"
        )


def names_of(certificate: dict[str, Any] | None) -> set[str]:
    """Return the names and addresses that a certificate, as `getpeercert` shows it, is for; in lower case."""
    entries = (certificate or {}).get("subjectAltName", ())
    return {str(value).lower() for kind, value in entries if kind in {"DNS", "IP Address"}}


def _context(protocol: int, cert: str, key: str, ca: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"cannot load the authority of the swarm from {ca}: {_reason(error)}; expected PEM") from None
    shown = f"{cert} with key {key}" if key else cert
    try:
        # A passphrase prompt would block the process; an encrypted key fails instead.
        context.load_cert_chain(cert, key or None, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cannot load the certificate of this node, {shown}: {_reason(error)}; expected PEM, the key that of the certificate"
            " and not encrypted"
        ) from None
    return context


def _try_on_itself(server: ssl.SSLContext, cert: str, key: str, ca: str) -> None:
    """Shake hands with oneself in memory: what fails here would fail with everybody."""
    client = _context(ssl.PROTOCOL_TLS_CLIENT, cert, key, ca)
    client.check_hostname = False
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    try:
        for _ in range(4):  # a handshake takes two round trips at most
            for end in ends:
                try:
                    end.do_handshake()
                except ssl.SSLWantReadError:
                    continue
    except ssl.SSLCertVerificationError as error:
        raise UsageError(
            f"{ca} does not vouch for {cert}: {error.verify_message}; expected a certificate of that authority, in force, for"
            " servers and clients"
        ) from None
    except ssl.SSLError as error:
        raise UsageError(f"{cert} does not work for TLS: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a valid PEM file").lower().replace("_", " ")
    return error.strerror or str(error)
