"""What a volume is, from what Kubernetes says about it. Pure.

Decided here: which attributes there are, who may set them, and every reason to refuse one. Attributes of an inline volume are
written by the author of a pod, who is not trusted with the node. Rule: no attribute names a path of the host, a cache
directory, a way around TLS or anything outside the image.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from ..errors import UsageError
from ..registry.reference import Reference, parse_reference
from ..types import Digest
from .codes import Code, CsiError

PREFETCH: Final = ("none", "all")
MODES: Final = ("auto", "fuse", "lazy", "kernel")
MOST_PATTERNS: Final = 64
_FOREIGN: Final = ("csi.storage.k8s.io/", "storage.kubernetes.io/")
"""Keys that Kubernetes adds."""
_KNOWN: Final = frozenset(
    {"ref", "prefetch", "mode", "platform", "include", "exclude", "subPath", "dynamic", "tokenAudience"}
)
_PLATFORM: Final = re.compile(r"\A[a-z0-9]+/[a-z0-9_]+(?:/[a-z0-9.]+)?\Z")
_MOUNT_FLAGS: Final = frozenset({"ro", "nosuid", "nodev", "noexec", "exec", "noatime"})
_ID: Final = re.compile(r"\Arafs-([0-9a-f]{16})-([0-9a-f]{64})\Z")
_NAME: Final = re.compile(r"\A[A-Za-z0-9](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9])?\Z")
POD_KEYS: Final = {
    "name": "csi.storage.k8s.io/pod.name",
    "namespace": "csi.storage.k8s.io/pod.namespace",
    "uid": "csi.storage.k8s.io/pod.uid",
}


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """One volume of one pod, as asked for."""

    ref: str = ""
    """The reference as written, with a digest if it is pinned; empty for a dynamic volume."""
    prefetch: str = "none"
    mode: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    sub_path: str = ""
    platform: str = ""
    """`os/architecture[/variant]`, of a reference that names an index; empty: this node's."""
    dynamic: bool = False
    """Whether the pod adds and removes models itself."""
    token_audience: str = ""
    """Audience of the service account token that is shown to the registry; empty: none is."""
    executable: bool = False
    """Whether files of the volume may be executed."""

    @property
    def reference(self) -> Reference:
        """The reference, parsed."""
        return parse_reference(self.ref)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> VolumeSpec:
        """Return it from plain values, of whatever version: keys that are not known are passed over, missing ones have their default.

        Raises TypeError for what is none.
        """
        known: dict[str, Any] = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        for key in ("include", "exclude"):
            known[key] = tuple(known.get(key, ()))
        spec = cls(**known)
        texts = (spec.ref, spec.prefetch, spec.mode, spec.sub_path, spec.platform, spec.token_audience)
        if not all(isinstance(text, str) for text in (*texts, *spec.include, *spec.exclude)):
            raise TypeError("a field of a volume is no text")
        return spec


def parse_attributes(
    attributes: Mapping[str, str], *, flags: Sequence[str] = (), loopback: bool = False, inline: bool = True
) -> VolumeSpec:
    """Return what attributes (of a pod's inline volume, a PersistentVolume or a StorageClass) mean. Raises CsiError.

    `loopback`: registries on this node itself are allowed, which a test has and a cluster has not: it is they that are spoken to
    without TLS.
    """
    own = {key: value for key, value in attributes.items() if not key.startswith(_FOREIGN)}
    for key in own:
        if key not in _KNOWN:
            raise _bad(f"attribute {key[:60]!r} is not known, expected some of {', '.join(sorted(_KNOWN))}")
    dynamic = _is_true(own.get("dynamic", "false"), "dynamic")
    ref = own.get("ref", "")
    if dynamic and (ref or not inline):
        raise _bad("a dynamic volume is inline and names no ref: its pod adds models by its socket")
    if not dynamic:
        check_reference(ref, loopback=loopback)
    for flag in flags:
        if flag not in _MOUNT_FLAGS:
            raise _bad(f"mount option {flag[:40]!r} is not for this volume, expected {', '.join(sorted(_MOUNT_FLAGS))}")
    return VolumeSpec(
        ref=ref,
        prefetch=_one_of(own.get("prefetch", "none"), PREFETCH, "prefetch"),
        mode=_one_of(own.get("mode", "auto"), MODES, "mode"),
        include=_patterns(own.get("include", ""), "include"),
        exclude=_patterns(own.get("exclude", ""), "exclude"),
        platform=_platform(own.get("platform", "")),
        sub_path=check_sub_path(own.get("subPath", "")),
        dynamic=dynamic,
        token_audience=own.get("tokenAudience", ""),
        executable="exec" in flags and "noexec" not in flags,
    )


def check_reference(text: str, *, loopback: bool) -> Reference:
    """Return a reference that a pod may name. Raises CsiError."""
    try:
        reference = parse_reference(text)
    except UsageError as error:
        raise _bad(f"attribute ref: {error}") from None
    if reference.kind != "registry":
        raise _bad("attribute ref names a directory of the node; a volume comes from a registry")
    if reference.is_loopback and not loopback:
        raise _bad(
            "attribute ref names a registry on the node itself; a volume comes from one that all nodes can reach"
        )
    return reference


def check_sub_path(text: str) -> str:
    """Return a path below the root of an image, without `.` and `..`. Raises CsiError."""
    if not text:
        return ""
    path = posixpath.normpath(text)
    if text.startswith("/") or path.startswith("..") or "\0" in text or len(text) > 4096:
        raise _bad("attribute subPath leaves the image; expected a relative path without `..`")
    return "" if path == "." else path


def volume_id(name: str, digest: Digest) -> str:
    """Return the id of a provisioned volume: it names what the volume holds, so a node needs nobody to ask."""
    return f"rafs-{hashlib.sha256(name.encode()).hexdigest()[:16]}-{digest.text.removeprefix('sha256:')}"


def digest_of_id(text: str) -> Digest | None:
    """Return the digest in the id of a provisioned volume, None for any other id."""
    match = _ID.match(text)
    return Digest(f"sha256:{match[2]}") if match else None


def key_of(text: str) -> str:
    """Return a file name for an id or path that comes from outside."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def mount_key(digest: str, store: str, spec: VolumeSpec) -> str:
    """Return the name of the mount that volumes share: those of one image of one repository, seen in the same way."""
    seen: list[object] = [digest, store, spec.mode, sorted(spec.include), sorted(spec.exclude)]
    if spec.include or spec.exclude:
        seen.append(spec.prefetch)  # a part of an image is filled by its own mount alone
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:24]


def is_name(text: str) -> bool:
    """Tell whether a pod may call a model of a dynamic volume so: it becomes a directory."""
    return bool(_NAME.match(text)) and ".." not in text


def _patterns(text: str, what: str) -> tuple[str, ...]:
    """Return globs: a JSON list, or one per line, or divided by commas."""
    if not text.strip():
        return ()
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
            raise _bad(f"attribute {what} is not a JSON list of patterns")
    else:
        found = [item.strip() for item in re.split(r"[,\n]", text)]
    patterns = tuple(item for item in found if item)
    if len(patterns) > MOST_PATTERNS or any("\0" in item or len(item) > 1024 for item in patterns):
        raise _bad(f"attribute {what} has more than {MOST_PATTERNS} patterns, or one that is too long")
    return patterns


def _platform(text: str) -> str:
    if text and not _PLATFORM.match(text):
        raise _bad(f"attribute platform is {text[:40]!r}, expected os/architecture such as linux/arm64")
    return text


def _one_of(text: str, allowed: tuple[str, ...], what: str) -> str:
    if text not in allowed:
        raise _bad(f"attribute {what} is {text[:40]!r}, expected {' or '.join(allowed)}")
    return text


def _is_true(text: str, what: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise _bad(f"attribute {what} is {text[:40]!r}, expected true or false")
    return text.lower() == "true"


def _bad(message: str) -> CsiError:
    return CsiError(Code.INVALID_ARGUMENT, message)
