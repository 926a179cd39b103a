"""Where things are on this machine, and the defaults of options from rafs.toml.

Order of precedence: command line, environment, ~/.config/rafs/rafs.toml (or the file that $RAFS_CONFIG names), /etc/rafs/rafs.toml,
built-in default. A file has one table per command, named as the command, keys named as the options with underscores:

    [mount]
    prefetch = "all"
    deadline = 30
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


def load_config() -> dict[str, dict[str, Any]]:
    """Return the tables of the config files, the user's over the system's. Raises UsageError for a bad file."""
    configured = os.environ.get("RAFS_CONFIG")
    user = configured or os.path.join(
        os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "rafs", "rafs.toml"
    )
    merged: dict[str, dict[str, Any]] = {}
    for path in (SYSTEM_CONFIG, user):
        for table, values in _read(path, must_exist=path == configured).items():
            merged.setdefault(table, {}).update(values)
    return merged


def _read(path: str, *, must_exist: bool) -> dict[str, dict[str, Any]]:
    try:
        data = tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        if must_exist:
            raise UsageError(f"config file {path} does not exist") from None
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"config file {path} cannot be read: {error}") from error
    for table, values in data.items():
        if not isinstance(values, dict):
            raise UsageError(f"config file {path}: {table} stands outside any command's table, for example [mount]")
    return data
