"""Files that are either whole or absent, and their hashes."""

import contextlib
import hashlib
import os
from pathlib import Path

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
    """Write `text` (UTF-8) so that a kill at any moment leaves the old file or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    sync_folder(path.parent)


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
