"""TLS settings of a client, and TLS failures in words.

Decided here: one context per client, verification always on, minimum TLS 1.2. Rule: a failed handshake is explained
by its cause with what to do about it; it is never worked around.
"""

from __future__ import annotations

import ssl

from ..errors import AccessDeniedError, RemoteError, UsageError


def client_context(
    *, ca_file: str | None = None, client_cert: str | None = None, client_key: str | None = None
) -> ssl.SSLContext:
    """Return a context that trusts the system's CAs and, in addition, those in `ca_file` (PEM).

    `client_cert` is a PEM chain; `client_key` its key, by default in the same file. Raises UsageError naming the file.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"cannot load CA certificates from {ca_file}: {_reason(error)}; expected a PEM file"
            ) from None
    if client_key is not None and client_cert is None:
        raise UsageError(f"client key {client_key} is given without a client certificate; give both")
    if client_cert is not None:
        try:
            # A passphrase prompt would block the process; an encrypted key fails instead.
            context.load_cert_chain(client_cert, client_key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            files = client_cert if client_key is None else f"{client_cert} with key {client_key}"
            raise UsageError(
                f"cannot load the client certificate {files}: {_reason(error)}; expected PEM files, the key not encrypted"
            ) from None
    return context


def explain_tls_failure(error: BaseException, server: str) -> RemoteError | None:
    """Return what a failure to talk TLS with `server` means, or None if TLS is not the cause.

    Looks along the chain of causes: HTTP libraries wrap the SSLError that says it.
    """
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            return None
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RemoteError(
                f"the TLS certificate of {server} is not accepted: {cause.verify_message or cause.reason}; "
                "give the CA that signed it with --ca-file (of a scheduler or another node: --swarm-ca)"
            )
        if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError):
            return None
        if isinstance(cause, ssl.SSLError):
            return _explain_ssl_error(cause, server)
        cause = cause.__cause__ or cause.__context__
    return None


def _explain_ssl_error(error: ssl.SSLError, server: str) -> RemoteError:
    reason = str(error.reason or error).upper().replace(" ", "_")
    if any(
        word in reason for word in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER")
    ):
        return RemoteError(
            f"{server} does not answer with TLS, expected https; if it really speaks plain HTTP, ask for it with --plain-http"
        )
    if "CERTIFICATE_REQUIRED" in reason or "BAD_CERTIFICATE" in reason or "HANDSHAKE_FAILURE" in reason:
        return AccessDeniedError(
            f"{server} refused the TLS handshake ({_reason(error)}); it may want a client certificate: "
            "give one with --client-cert and --client-key (to a scheduler or another node: --swarm-cert and --swarm-key)"
        )
    if "UNKNOWN_CA" in reason or "CERTIFICATE_" in reason:
        return AccessDeniedError(f"{server} does not accept our client certificate ({_reason(error)})")
    return RemoteError(f"TLS with {server} failed: {_reason(error)}")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not a valid PEM file").lower().replace("_", " ")
    return error.strerror or str(error)
