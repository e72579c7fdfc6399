"""The files of harvested residuals: safetensors shards of one tensor, and their manifest.

OUT/SITE/00000.safetensors   `residuals`, [tokens, d_model]
OUT/manifest.json            what made them, and the SHA-256 and size of each; grows by shard
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from saes.errors import UserError
from saes.files import sha256, write_text

MANIFEST = "manifest.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True)
class File:
    """One site's part of a shard."""

    name: str
    """Relative to the folder, with `/`."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """Residuals of the same tokens at every site."""

    tokens: int
    files: dict[str, File]
    """By site."""


@dataclass(frozen=True)
class Manifest:
    """What lies in a folder of shards."""

    made_of: dict[str, Any]
    """Model, tokens and settings that decide the bytes."""
    model: str
    context: int
    prepend_bos: bool
    text: str
    d_model: int
    dtype: str
    """As safetensors names it: F32, BF16 or F16."""
    sites: tuple[str, ...]
    shards: tuple[Shard | None, ...]
    """In the order of the rows; None where a shard is not finished."""

    @property
    def complete(self) -> bool:
        """Whether every shard is there."""
        return None not in self.shards


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one move."""
    write_text(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of shards.

    Raises:
        UserError: no such folder, or the manifest is damaged.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree["sites"] = tuple(tree["sites"])
        tree["shards"] = tuple(map(_shard, tree["shards"]))
        return Manifest(**tree)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no shards: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {folder}, harvest again") from None


def _shard(tree: dict[str, Any] | None) -> Shard | None:
    if tree is None:
        return None
    return Shard(tree["tokens"], {site: File(**file) for site, file in tree["files"].items()})


def fault(folder: Path, file: File) -> str | None:
    """What is wrong with a file: missing, cut off or altered; None if nothing is."""
    path = folder / file.name
    if not path.is_file():
        return f"shard {path} is missing"
    if path.stat().st_size != file.bytes:
        return f"shard {path} is cut off: {path.stat().st_size} bytes of {file.bytes}"
    if sha256(path) != file.sha256:
        return f"shard {path} was altered: its SHA-256 is not {file.sha256[:12]}... of {MANIFEST}"
    return None


def faults(folder: Path, files: Iterable[File]) -> dict[str, str]:
    """By file name, what is wrong with these files; reads all of them, behind a bar."""
    files = list(files)
    found: dict[str, str] = {}
    with tqdm(
        total=sum(file.bytes for file in files),
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=2,
        delay=2,
        desc="check shards",
    ) as bar:
        for file in files:
            if (problem := fault(folder, file)) is not None:
                found[file.name] = problem
            bar.update(file.bytes)
    return found


class ShardWriter:
    """Writes one safetensors file part by part, so that no shard is ever in memory.

    The format: the length of the header (8 bytes, little-endian), the header in JSON, the values.

    Args:
        shape: of the whole tensor.
    """

    def __init__(self, file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0
        header = _header(shape, dtype)
        self._write(struct.pack("<Q", len(header)) + header)

    def add(self, x: Float[Tensor, "n d_model"]) -> None:
        """Append residuals."""
        self._write(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def record(self, name: str) -> File:
        """What the manifest says of the file."""
        return File(name, self.bytes, self._hash.hexdigest())

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes


def _header(shape: tuple[int, int], dtype: torch.dtype) -> bytes:
    end = shape[0] * shape[1] * dtype.itemsize
    tensor = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [0, end]}
    text = json.dumps({"residuals": tensor}, separators=(",", ":"))
    return text.ljust(-(-len(text) // 8) * 8).encode()  # values begin at a multiple of 8


def shard_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Size of a shard's file."""
    return 8 + len(_header(shape, dtype)) + shape[0] * shape[1] * dtype.itemsize


def read_runs(path: Path, starts: Iterable[int], out: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Fill each of `out` ([n, d_model]) with the rows of a shard that begin at its start.

    Plain reads, no memory map: pages of a map count as resident until the system takes them back.

    Raises:
        UserError: the file is gone, cannot be read or ends early.
    """
    cut = UserError(f"shard {path} is cut off; harvest again")
    try:
        with path.open("rb") as file:
            if len(begin := file.read(8)) < 8:
                raise cut
            (header,) = struct.unpack("<Q", begin)
            for start, rows in zip(starts, out, strict=True):
                at = 8 + header + start * rows.shape[1] * dtype.itemsize
                view = rows.view(torch.uint8).numpy().data.cast("B")
                if os.preadv(file.fileno(), [view], at) != view.nbytes:
                    raise cut
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing; harvest again") from None
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}") from None
