"""One process, and one thread, at a time: `locked`.

The system takes the lock away from a process that dies, however it dies.  The file stays where it is: whoever waits has
it open, and a new one in its place would be another lock.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import warn

if sys.platform == "win32":
    import msvcrt

    def _take(file: int) -> None:
        while not _tried(file):
            pass

    def _tried(file: int) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_LOCK, 1)
        except OSError as error:
            if error.errno != errno.EDEADLK:  # ten seconds are over
                raise
            return False
        return True

    def _let_go(file: int) -> None:
        os.lseek(file, 0, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX)

    def _let_go(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)


NONE_HERE = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # of file systems that have no locks


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until nobody else is in here with this file, which is made if needed, and its directory too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        taken = True
        try:
            _take(file.fileno())
        except OSError as error:
            if error.errno not in NONE_HERE:
                raise
            taken = False
            warn(
                f"{path} can't be locked ({error.strerror}): two processes that write there at the same moment may "
                "overwrite each other's rows. Let one write, or use a file system that has locks."
            )
        try:
            yield
        finally:
            if taken:
                _let_go(file.fileno())  # not by closing alone: a process that was forked meanwhile has the file, too
