"""Atomic file writes: a file is there whole or not at all."""

import contextlib
import errno
import os
import secrets
import stat
from typing import IO

_IN_USE = "qjax-{}.part"


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file, all or nothing.

    The data go to a file of the same folder, which then takes the place of the old one.
    Both are on disk when this returns. Where the system has files without a name
    (Linux), one that is killed while it writes leaves nothing behind; else, and between
    naming the file and moving it, a ``qjax-*.part`` may stay.

    Args:
      path: Path. A symbolic link stays one: what it points to is written. A file that
        is there keeps its mode, a new one has what the umask leaves of 0666. What is no
        regular file, such as a pipe, is written to.
      data: Bytes to write.

    Raises:
      OSError: if the file cannot be written. The old one is as it was.
    """
    target = os.path.realpath(path)
    if os.path.islink(target):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    mode = None
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        with open(target, "wb") as file:
            file.write(data)
        return
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, _IN_USE.format(secrets.token_hex(8)))
    try:
        _write(temporary, folder, data, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _write(path: str, folder: str, data: bytes, mode: int | None) -> None:
    """Writes a new file, which gets its name last where that is possible."""
    handle = _open_nameless(folder)
    if handle is not None:
        with os.fdopen(handle, "wb") as file:
            _fill(file, data, mode)
            if _link(file.fileno(), folder, path):
                return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        _fill(file, data, mode)


def _fill(file: IO[bytes], data: bytes, mode: int | None) -> None:
    """Writes data to disk, and gives the file its mode."""
    file.write(data)
    file.flush()
    if mode is not None and hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), stat.S_IMODE(mode))
    os.fsync(file.fileno())


def _link(handle: int, folder: str, path: str) -> bool:
    """Links an open file to a name; returns whether the system can."""
    place = os.open(folder, os.O_RDONLY)
    try:
        # With `src_dir_fd` Python follows the link, without it never.
        os.link(f"/proc/self/fd/{handle}", path, src_dir_fd=place)
        return True
    except OSError:
        return False
    finally:
        os.close(place)


def _open_nameless(folder: str) -> int | None:
    """Opens a file without a name, to be linked later; None where there are none."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o666)
    except OSError:  # The file system's limit, or an error that the name will meet too.
        return None


def _sync_folder(folder: str) -> None:
    """Makes a new name durable, where folders can be synchronized."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
