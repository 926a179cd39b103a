"""How to reach a registry: the settings both stores understand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """Holds names of files, never a secret itself, so it can be sent and logged."""

    plain_http: bool = False
    """Speak HTTP without TLS to a registry that is not on loopback."""
    ca_file: str | None = None
    """PEM file of CAs trusted in addition to the system's; also asks for TLS on loopback."""
    client_cert: str | None = None
    """PEM file of a client certificate chain; also asks for TLS on loopback."""
    client_key: str | None = None
    """PEM file of its key; None: in the same file."""
    docker_config: str | None = None
    """Directory of docker's config.json; None: $DOCKER_CONFIG, else ~/.docker."""
    timeout_s: float = 30.0
    """Longest silence of the other side, seconds."""
    retries: int = 4
    """Further tries after the first one of each operation."""

    @property
    def asks_for_tls(self) -> bool:
        """Whether these settings only make sense with TLS."""
        return not self.plain_http and (self.ca_file is not None or self.client_cert is not None)
