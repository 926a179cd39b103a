"""Taking a file that is complete as the data of a new data space, without copying it.

Rule: only for bytes that this process has just hashed chunk by chunk while it wrote them; the marks say PRESENT, so after an unclean stop
they are hashed again like any other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading

from ..format.space_table import SpaceTable
from ..types import BLOCK_SIZE, align_up
from .data_space import PRESENT, remove_tree, write_error, write_new_record, write_synced


def adopt(directory: str, table: SpaceTable, data_path: str) -> None:
    """Make the directory of a complete data space, unless it is there. `data_path`, on the same file system, is gone then.

    Raises CacheError. Blocking.
    """
    temporary = f"{directory}.new-{os.getpid()}-{threading.get_ident()}"
    try:
        os.truncate(data_path, align_up(table.size, BLOCK_SIZE))
        os.makedirs(temporary, mode=0o700)
        write_synced(os.path.join(temporary, "chunks"), bytes(table.buffer))
        write_synced(os.path.join(temporary, "present"), bytes([PRESENT]) * table.count)
        write_new_record(temporary, table.size)
        os.rename(data_path, os.path.join(temporary, "data"))
        try:
            os.rename(temporary, directory)
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            os.rename(os.path.join(temporary, "data"), data_path)
            remove_tree(temporary)
    except OSError as error:
        with contextlib.suppress(OSError):
            remove_tree(temporary)
        raise write_error(error, directory) from error
