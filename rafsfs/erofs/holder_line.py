"""A line to the holder of a cache directory: one message, one answer, descriptors either way (rafsfs/erofs/holder.py). Blocking.

The holder answers at once, and the socket has a timeout. As long as a line is open the holder takes it that there is a daemon.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Final

_ANSWER_S: Final = 5.0


class HolderLine:
    """An open line. Raises OSError from every method when the holder is gone."""

    def __init__(self, cache_dir: str, daemon_argv: Sequence[str]) -> None:
        directory = os.open(cache_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.socket.settimeout(_ANSWER_S)
            # A path of a UNIX socket holds 107 bytes: go through the directory's descriptor.
            self.socket.connect(f"/proc/self/fd/{directory}/holder.sock")
            self.ask("argv " + "\0".join(daemon_argv))
        except OSError:
            self.socket.close()
            raise
        finally:
            os.close(directory)

    def ask(self, message: str, *descriptors: int) -> tuple[str, list[int]]:
        """Send a message, return the answer and the descriptors that came with it, which are the caller's."""
        socket.send_fds(self.socket, [message.encode()], list(descriptors))
        data, given, _, _ = socket.recv_fds(self.socket, 1 << 20, 1)
        if not data:
            raise ConnectionError("it has ended")
        for descriptor in given:
            os.set_inheritable(descriptor, False)
        return data.decode(), given

    def get(self, name: str) -> int | None:
        """Return a copy of a held descriptor, the caller's; None if nothing is held under the name."""
        _, given = self.ask(f"get {name}")
        return given[0] if given else None

    def close(self) -> None:
        """Close the line."""
        self.socket.close()
