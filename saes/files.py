"""Files that are either whole or absent, and their hashes."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from saes.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the last: a limit on the size of files
PACKAGED = Path(__file__).resolve().parent / "data"


def locate(name: str | Path) -> Path:
    """The folder that a name means: `packaged/NAME` ships with the package, `~` is one's home.

    >>> locate("packaged/demo_lm").parts[-3:]
    ('saes', 'data', 'demo_lm')
    """
    text = str(name)
    if text.startswith("packaged/"):
        return PACKAGED / text.removeprefix("packaged/")
    return Path(text).expanduser()


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) so that a kill at any moment leaves the old file or the new one.

    Raises:
        UserError: the disk is full.
    """
    with writing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def writing(path: Path) -> Generator[BinaryIO, None, None]:
    """A binary file that takes the name `path` when the block ends without an error.

    A kill at any moment leaves the old file or the new one; what was begun is a hidden `.part` file
    that the next attempt replaces.

    Raises:
        UserError: the disk is full, or takes no file as large.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(
                f"the disk is full: {path} could not be written ({error.strerror}); free some "
                "space and start the same command again, what was finished is kept"
            ) from None
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None, None, None]:
    """Hold `folder/.lock`; however the process ends, the system lets go of it.

    Raises:
        UserError: another process holds it.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing {folder}; wait until it ends, or go elsewhere"
            ) from None
        yield


RESERVE = 1 << 28  # 256 MiB: checkpoints, logs and other people must not find the disk full


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: where it goes; need not exist yet.
        needed: bytes.
        what: opens the message, as `harvesting 3 shards`.

    Raises:
        UserError: with both figures.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed + RESERVE > free:
        raise UserError(
            f"{what} needs {size(needed)} and the disk of {folder} has {size(free)} free, of which "
            f"{size(RESERVE)} stay free; choose another disk or write less"
        )


def size(n: int) -> str:
    """A number of bytes in words.

    >>> size(3_500_000_000)
    '3.3 GiB'
    """
    for unit, bytes_ in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= bytes_:
            return f"{n / bytes_:.1f} {unit}"
    return f"{n} bytes"


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex (0.5 to 1 GB/s)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(path: Path) -> str:
    """SHA-256 over a file's bytes, or over names and bytes of all files below a folder, hex.

    Hidden files and folders are left out (download caches, `.gitattributes`); where the folder lies
    and when its files were written do not matter.
    """
    if path.is_file():
        return sha256(path)
    total = hashlib.sha256()
    for name in relative_files(path):
        total.update(f"{name}\0{sha256(path / name)}\n".encode())
    return total.hexdigest()


def relative_files(folder: Path) -> list[str]:
    """Names of all files below `folder` relative to it, with `/`, sorted; hidden ones left out."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(n.as_posix() for n in names if not any(p.startswith(".") for p in n.parts))
