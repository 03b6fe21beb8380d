"""Writing that a crash, a power cut or a full disk leaves whole or undone: the system calls of it as one record.

What must be whole is written under a temporary name, forced to the disk, given its own name, and that is forced to the
disk too. Everything written so goes through a ``Disk``, which tests replace by one that fails or is killed at a call.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

UMASK = os.umask(0o077)  # which the system tells by setting it
os.umask(UMASK)


class StorageError(OSError):
    """Storage that took not what was to be written: where, why, how much was needed and how much is free."""


class Disk:
    """The system calls that change files, one a method; each raises OSError."""

    def create(self, path: Path) -> int:
        """Opens an empty file for writing; a link is not followed."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    def write(self, handle: int, data: bytes | memoryview) -> None:
        """Appends all of it."""
        left = memoryview(data).cast("B")
        while len(left):
            left = left[os.write(handle, left) :]

    def sync(self, handle: int) -> None:
        """Returns when the file's content is on the disk."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        """Closes a file."""
        os.close(handle)

    def sync_path(self, path: Path) -> None:
        """Returns when a folder's names, or a closed file's content, are on the disk."""
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def make_folder(self, path: Path) -> None:
        """Makes a folder whose parent is there."""
        os.mkdir(path)

    def rename(self, old: Path, new: Path) -> None:
        """Gives a file, or a folder, another name; a file of that name goes, a folder must be empty."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Removes a file or a link."""
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        """Removes an empty folder."""
        os.rmdir(path)

    def free(self, path: Path) -> int:
        """Bytes that this process may still write beside ``path``."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


DISK = Disk()


def write_file(path: Path, chunks: Iterable[bytes | memoryview], disk: Disk = DISK) -> None:
    """Writes a file and forces it to the disk; on an error a part of it stays."""
    handle = disk.create(path)
    try:
        for chunk in chunks:
            disk.write(handle, chunk)
        disk.sync(handle)
    finally:
        disk.close(handle)


@contextlib.contextmanager
def whole(path: Path, disk: Disk = DISK, sync: bool = True) -> Iterator[Path]:
    """Hands out a temporary name beside ``path``; what is there becomes ``path`` if all goes well, and goes if not.

    Makes the folder where it is missing.

    Args:
        sync: whether it is on the disk, under its name, when this ends.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    make_folders(path.parent, disk)
    try:
        yield temporary
        if sync:
            disk.sync_path(temporary)
        disk.rename(temporary, path)
        if sync:
            disk.sync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, indent: int = 2, disk: Disk = DISK) -> None:
    """Writes indented JSON, whole or not at all; raises StorageError."""
    data = (json.dumps(value, indent=indent) + "\n").encode()
    with writing(path, len(data), disk), whole(path, disk) as temporary:
        write_file(temporary, [data], disk)


def make_folders(path: Path, disk: Disk = DISK) -> None:
    """Makes a folder and the parents that are missing, and forces their names to the disk."""
    if path.is_dir():
        return
    make_folders(path.parent, disk)
    with contextlib.suppress(FileExistsError):
        disk.make_folder(path)
    disk.sync_path(path.parent)


def remove_tree(path: Path, disk: Disk = DISK) -> None:
    """Removes a file, a link or a folder with all that is in it, if it is there; follows no link."""
    if path.is_symlink() or not path.is_dir():
        if os.path.lexists(path):
            disk.remove(path)
        return
    for name in sorted(os.listdir(path)):
        remove_tree(path / name, disk)
    disk.remove_folder(path)


def set_usual_mode(path: Path) -> None:
    """Gives a file the mode of any new one; safetensors' library and temporary files are for their user alone."""
    os.chmod(path, 0o666 & ~UMASK)


@contextlib.contextmanager
def writing(path: Path, needed: int, disk: Disk = DISK) -> Iterator[None]:
    """Raises StorageError, with ``failure``'s sentence, where the system refuses what is written below ``path``.

    Other errors pass, and so does a StorageError: it says more.
    """
    before = sys.exc_info()[1]  # an error that is being handled already is not this one's reason
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        refused = _refusal(error, before)
        if refused is None:
            raise
        raise StorageError(failure(refused, path, needed, disk)) from error


def try_writing(path: Path) -> None:
    """Makes the folder of a file that will be written, and leaves nothing else; raises StorageError where it cannot be.

    For what takes long before it writes.
    """
    probe = path.with_name(f".{path.name}.{os.getpid()}.try")
    with writing(path, 0):
        make_folders(path.parent)
        write_file(probe, ())
        probe.unlink()


def _refusal(error: Exception, before: BaseException | None) -> OSError | None:
    """The system's error behind one: itself, the one that torch.save met and raises another over, or safetensors'."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) and error.__context__ is not before:
        return error.__context__
    told = re.search(r"\(os error (\d+)\)", str(error))  # what Rust adds to the system's words
    return OSError(int(told[1]), os.strerror(int(told[1]))) if told else None


def failure(error: OSError, path: Path, needed: int, disk: Disk = DISK) -> str:
    """The sentence on a write of ``needed`` bytes below ``path`` that failed."""
    there = next(folder for folder in (path, *path.parents) if os.path.exists(folder) or folder == folder.parent)
    try:
        free = f"{disk.free(there)} are free"
    except OSError:
        free = "nobody can tell how many are free"
    name = errno.errorcode.get(error.errno or 0, type(error).__name__)
    what = f"{name}: {error.strerror}" if error.strerror else f"{name} {error}"
    where = error.filename or path
    fix = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{where} cannot be written ({what}): {needed} bytes are needed, {free}: {fix}use another --out"
