"""Where things are on this machine, and what rafs.toml says.

Order of precedence: command line, environment, ~/.config/rafs/rafs.toml (or the file that $RAFS_CONFIG names), /etc/rafs/rafs.toml,
built-in default. Keys are the long names of options; those outside any table hold for every command, those in a
command's table for that one:

    cache_dir = "/data/rafs"
    [mount]
    prefetch = "all"
    deadline = "30s"

Which names exist is the command line's to say; here a file is read, and its two layers are laid over each other.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Final

from .errors import UsageError

SYSTEM_CONFIG: Final = "/etc/rafs/rafs.toml"


def default_cache_dir() -> str:
    """Return the cache directory: $RAFS_CACHE_DIR, /var/lib/rafs for root, else $XDG_CACHE_HOME/rafs or ~/.cache/rafs."""
    configured = os.environ.get("RAFS_CACHE_DIR")
    if configured:
        return os.path.abspath(configured)
    if os.geteuid() == 0:
        return "/var/lib/rafs"
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "rafs")


def state_dir() -> str:
    """Return where a user's journals are kept: $XDG_STATE_HOME/rafs or ~/.local/state/rafs."""
    return os.path.join(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "rafs")


def load_config() -> dict[str, Any]:
    """Return what the config files say, the user's over the system's, table by table. Raises UsageError for a bad file."""
    configured = os.environ.get("RAFS_CONFIG")
    if configured:
        # A daemon that this process starts reads the same file from another working directory.
        os.environ["RAFS_CONFIG"] = configured = os.path.abspath(configured)
    user = configured or os.path.join(
        os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "rafs", "rafs.toml"
    )
    merged: dict[str, Any] = {}
    for path in (SYSTEM_CONFIG, user):
        for key, value in _read(path, must_exist=path == configured).items():
            if isinstance(value, dict) and isinstance(merged.get(key), dict):
                merged[key].update(value)
            else:
                merged[key] = value
    return merged


def _read(path: str, *, must_exist: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if must_exist:
            raise UsageError(f"config file {path} does not exist; RAFS_CONFIG names it") from None
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"config file {path} cannot be read: {error}") from error
