"""`rafs wait`: return when a mount can be read, or has got so far. For init containers and start-up probes."""

from __future__ import annotations

import json
import os
import re
import stat
from typing import Any, Final

import click
import trio

from rafsfs.daemon.connection import open_connection
from rafsfs.errors import DaemonError, DeadlineError, RafsError, UsageError

from .options import DurationType, cache_dir_option, option
from .run import run_async

_POLL_S: Final = 0.25
_PIECE: Final = 4 << 20


@click.command("wait")
@click.argument("path", type=click.Path())
@option(
    "--until",
    envvar="RAFS_WAIT_UNTIL",
    default="first-byte",
    show_default=True,
    metavar="first-byte|percent=N|complete",
    help="What to wait for.",
)
@option(
    "--timeout",
    envvar="RAFS_WAIT_TIMEOUT",
    type=DurationType(0.1, 7 * 86400),
    default="10m",
    show_default=True,
    help="Give up, with exit code 24, after this long.",
)
@option(
    "--url",
    envvar="RAFS_STATUS_URL",
    default="",
    help="Page of the driver that tells how far the volume is, such as http://$HOST_IP:9810/v1/pods/$POD_UID/volumes.",
)
@cache_dir_option
def command(path: str, until: str, timeout: float, url: str, cache_dir: str) -> None:
    """Wait until PATH, a mount or something in one, can be read or is on this node.

    How far it is is asked of --url, else of the node daemon. Where neither can be reached, as in a pod, PATH is read: what has been read is
    there.

    Example: rafs wait /models --until percent=50 --timeout 5m
    """
    share = parse_until(until)
    if not os.path.lexists(path):
        raise UsageError(f"{path} does not exist")
    run_async(_wait, path, share, timeout, url, cache_dir)


def parse_until(text: str) -> float:
    """Return the share of the bytes to wait for, 0 for the first byte. Raises UsageError."""
    if text == "first-byte":
        return 0.0
    if text == "complete":
        return 1.0
    match = re.fullmatch(r"percent=(\d{1,3})", text)
    if match is None or not 0 < int(match[1]) <= 100:
        raise UsageError(f"--until {text!r} is not first-byte, percent=1 to percent=100, or complete")
    return int(match[1]) / 100


async def _wait(path: str, share: float, timeout_s: float, url: str, cache_dir: str) -> None:
    last = "nothing is known of it yet"
    with trio.move_on_after(timeout_s):
        if share == 0.0:
            while not await trio.to_thread.run_sync(_read_first, path, abandon_on_cancel=True):  # noqa: ASYNC110 - a mount sends no event
                await trio.sleep(_POLL_S)
            return
        while True:
            try:
                far = await (_ask_page(url, path) if url else _ask_daemon(path, cache_dir))
            except RafsError as error:
                far, last = None, str(error)
            if far is None and not url:
                await trio.to_thread.run_sync(_read_share, path, share, abandon_on_cancel=True)
                return
            if far is not None:
                last = f"{far:.0%} are here"
                if far >= share:
                    return
            await trio.sleep(_POLL_S)
    raise DeadlineError(f"{path} has not got so far within {timeout_s:g} s: {last}")


async def _ask_daemon(path: str, cache_dir: str) -> float | None:
    """Return the share that is present of the mount that holds `path`, None if no daemon knows one."""
    where = os.path.abspath(path)
    status: dict[str, Any] = {}
    try:
        async with open_connection(cache_dir) as connection:
            status = await connection.call("status", {})
    except* RafsError:
        status = {}
    for mount in status.get("mounts", []):
        if where == mount["mountpoint"] or where.startswith(mount["mountpoint"] + "/"):
            return _share(mount["present_bytes"], mount["data_bytes"])
    return None


async def _ask_page(url: str, path: str) -> float | None:
    import httpx  # noqa: PLC0415 - only where a page is asked

    try:
        async with httpx.AsyncClient(timeout=10) as client:
            value = json.loads((await client.get(url)).content)
    except (httpx.HTTPError, ValueError, httpx.InvalidURL) as error:
        raise DaemonError(f"{url} does not answer: {str(error) or type(error).__name__}") from None
    shares = shares_of(value, await trio.to_thread.run_sync(_device_of, path, abandon_on_cancel=True))
    if not shares:
        raise DaemonError(f"{url} knows no volume of {path}")
    return min(shares)


def _device_of(path: str) -> str:
    """Return `major:minor` of what `path` is on, nothing while it cannot be asked."""
    try:
        device = os.stat(path).st_dev
    except OSError:
        return ""
    return f"{os.major(device)}:{os.minor(device)}"


def shares_of(page: Any, device: str) -> list[float]:
    """Return how far the volume or model on a device is, by a page of the driver; where none is on it, how far all of the page are.

    Any page gives a list.
    """
    volumes = page.get("volumes", [page]) if isinstance(page, dict) else []
    found = [volume for volume in _objects(volumes) if isinstance(volume.get("total_bytes"), int)]
    models = [model for volume in found for model in _objects(volume.get("models"))]
    for among in (found, models):
        on_it = [one for one in among if isinstance(one.get("devices"), list) and device in one["devices"]]
        if on_it:
            found = on_it
            break
    figures = [(one.get("present_bytes"), one.get("total_bytes")) for one in found]
    return [_share(here, total) for here, total in figures if isinstance(here, int) and isinstance(total, int)]


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _share(present: int, total: int) -> float:
    return present / total if total else 1.0


def _files(path: str) -> list[tuple[int, str]]:
    """Return size and path of the regular files at or below `path`, largest first."""
    if not os.path.isdir(path):
        return [(os.path.getsize(path), path)]
    found = []
    for directory, _, names in os.walk(path):
        for name in names:
            where = os.path.join(directory, name)
            status = os.lstat(where)
            if stat.S_ISREG(status.st_mode):
                found.append((status.st_size, where))
    return sorted(found, reverse=True)


def _read_first(path: str) -> bool:
    """Read the first byte of the largest file; return whether that went well."""
    try:
        files = _files(path)
        if files and files[0][0]:
            with open(files[0][1], "rb") as file:
                return len(file.read(1)) == 1
    except OSError:
        return False
    return True


def _read_share(path: str, share: float) -> None:
    """Read files until this share of all bytes has been read."""
    files = _files(path)
    left = share * sum(size for size, _ in files)
    buffer = bytearray(_PIECE)
    for _, where in files:
        with open(where, "rb", buffering=0) as file:
            while left > 0 and (got := file.readinto(buffer)):
                left -= got
