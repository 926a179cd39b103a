"""`rafs doctor`: what this machine can do, each with the remedy for what it cannot."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click

from rafsfs.config import load_config
from rafsfs.erofs.probe import probe
from rafsfs.errors import RafsError
from rafsfs.fuse.mountpoint import check_fuse, may_allow_other, why_no_fuse
from rafsfs.registry.credentials import docker_config_dir, find_credential
from rafsfs.registry.reference import parse_reference
from rafsfs.registry.store import RegistryOptions

from .main import COMMANDS
from .options import cache_dir_option, json_option, registry_options, take_registry_options
from .output import existing_parent, print_json, print_table, size
from .run import run_async
from .settings import check_config
from .wiring import opened

_MODES: Final = {
    "erofs": "complete images are read by the kernel alone",
    "lazy": "incomplete images are read by the kernel, what is missing through a flat server",
    "fuse": "images are served as a tree by pyfuse3",
    "kernel": "incomplete images are read by the kernel alone, fanotify asks for what is missing",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True


@click.command("doctor")
@click.argument("ref", required=False)
@cache_dir_option
@json_option
@registry_options
def command(ref: str | None, cache_dir: str, as_json: bool, **options: Any) -> int:
    """Look at what mounting needs here, and with REF whether its registry answers. Exits with 1 if something needed is missing.

    Example: rafs doctor registry.example/models/llama:v1
    """
    registry = take_registry_options(options)
    findings = [check() for check in (_fuse, _fusermount, _allow_other, _kernel)]
    findings += _modes(cache_dir)
    findings += _cache(cache_dir)
    findings += [_docker_config(registry), _config()]
    if ref:
        findings.append(_registry(ref, registry))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(
            [(_mark(f), f.name, f.detail + (f"; {f.remedy}" if f.remedy and not f.ok else "")) for f in findings]
        )
    return 1 if any(finding.required and not finding.ok for finding in findings) else 0


def _mark(finding: Finding) -> str:
    return "ok" if finding.ok else "MISSING" if finding.required else "note"


def _fuse() -> Finding:
    try:
        check_fuse()
    except RafsError as error:
        remedy = (
            "load the module with `modprobe fuse`; in a container pass --device /dev/fuse and the capability SYS_ADMIN"
        )
        return Finding("FUSE", False, str(error).split(";")[0], remedy)
    return Finding("FUSE", True, "/dev/fuse can be opened")


def _fusermount() -> Finding:
    found = shutil.which("fusermount3")
    needed = os.geteuid() != 0
    detail = found or "fusermount3 is not installed"
    return Finding("fusermount3", bool(found), detail, "install the package fuse3", required=needed)


def _allow_other() -> Finding:
    ok = may_allow_other()
    detail = "mounts can be read by other users" if ok else "mounts can be read by this user only"
    return Finding("allow_other", ok, detail, "put user_allow_other into /etc/fuse.conf", required=False)


def _kernel() -> Finding:
    release = platform.release()
    parts = release.split(".")
    version = (int(parts[0]), int("".join(c for c in parts[1] if c.isdigit()) or 0)) if len(parts) > 1 else (0, 0)
    return Finding("kernel", version >= (4, 20), f"Linux {release}", "FUSE as it is used here needs Linux 4.20")


def _modes(cache_dir: str) -> Iterator[Finding]:
    """Try each rung of the ladder of mount modes where the cache is or would be."""
    ladder = probe(existing_parent(cache_dir), why_no_fuse())
    for name, rung in ladder.rungs.items():
        remedy = "see docs/modes.md; `--mode auto` takes the best there is"
        yield Finding(f"mode {name}", rung.available, rung.reason or _MODES[name], remedy, required=False)


def _cache(cache_dir: str) -> Iterator[Finding]:
    existing = existing_parent(cache_dir)
    writable = os.access(existing, os.W_OK | os.X_OK)
    yield Finding(
        "cache directory",
        writable,
        f"{cache_dir} {'can' if writable else 'cannot'} be written",
        "choose another with --cache-dir or RAFS_CACHE_DIR",
    )
    kind = _filesystem_of(existing)
    remote = kind in {"nfs", "nfs4", "cifs", "fuse.sshfs", "9p"}
    yield Finding(
        "file system",
        not remote,
        f"{kind} below {existing}",
        "the chunk index and locks need a local disk",
        required=remote,
    )
    free = shutil.disk_usage(existing).free
    yield Finding(
        "free space", free > 1 << 30, f"{size(free)} free", "a cache holds the models that are read", required=False
    )


def _filesystem_of(path: str) -> str:
    best, kind = "", "unknown"
    for line in _lines("/proc/self/mounts"):
        fields = line.split()
        place = fields[1].replace("\\040", " ")
        if (path == place or path.startswith(place.rstrip("/") + "/")) and len(place) >= len(best):
            best, kind = place, fields[2]
    return kind


def _config() -> Finding:
    try:
        check_config(load_config(), COMMANDS)
    except RafsError as error:
        return Finding("rafs.toml", False, str(error), "mend the file, see docs/operations.md")
    return Finding("rafs.toml", True, "no mistakes in the config files, if there are any")


def _docker_config(options: RegistryOptions) -> Finding:
    directory = docker_config_dir(options.docker_config)
    path = os.path.join(directory, "config.json")
    if not os.path.exists(path):
        return Finding("docker config", True, f"{path} does not exist: anonymous access only", required=False)
    try:
        find_credential("registry.invalid", options.docker_config)
    except RafsError as error:
        return Finding("docker config", False, str(error), "mend the file or log in again", required=False)
    return Finding("docker config", True, path, required=False)


def _registry(ref: str, options: RegistryOptions) -> Finding:
    try:
        parse_reference(ref)
        digest = run_async(_resolve, ref, options)
    except RafsError as error:
        return Finding("registry", False, str(error), "check name, network and credentials")
    return Finding("registry", True, f"{ref} is {digest}")


async def _resolve(ref: str, options: RegistryOptions) -> str:
    async with opened(ref, options) as (reference, store):
        return str((await store.resolve(reference.reference)).digest)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []
