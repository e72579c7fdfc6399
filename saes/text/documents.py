"""Documents of text from files, folders, globs and `datasets`, in pieces of bounded size.

A document is a text file (or a paragraph of one), a line of a JSONL file, a row of a table. The
order is that of the source: files by name, then as written.
"""

import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from saes.errors import UserError
from saes.files import locate, relative_files, sha256

PIECE = 1 << 17  # characters
KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "table"}
PACKED = {".gz": gzip.open, ".xz": lzma.open}
WILD = "*?["
KNOWN = ".txt, .md, .jsonl, .ndjson (each also with .gz or .xz), .parquet"


class Piece(NamedTuple):
    """Some text of a document; pieces of one document follow each other."""

    document: int
    """Number of the document."""
    text: str


class Source(NamedTuple):
    """Where documents are; what `TextConfig` says of it."""

    source: str
    column: str
    split: str
    name: str | None
    document: Literal["file", "paragraph"]


def pieces(source: Source) -> Iterator[Piece]:
    """All documents of a source that hold more than white space, numbered from 0.

    Raises:
        UserError: nothing there, an unknown kind of file, a damaged file, text that is not UTF-8, a
            column that is missing, or a hub that cannot be reached.
    """
    number, fresh = -1, True
    for start, text in _texts(source):
        fresh = fresh or start
        if fresh and not text.strip():
            continue
        number += fresh
        fresh = False
        yield Piece(number, text)


def local_files(source: str) -> list[Path]:
    """The text files that a source names, sorted; none if it is not on this machine.

    Raises:
        UserError: a file of an unknown kind, or a folder without a known one.
    """
    if any(c in source for c in WILD):
        files = [path for path in _match(locate(source)) if path.is_file()]
        if not files:
            raise UserError(f"no file matches {source}")
    elif (path := locate(source)).is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and _kind(p) is not None]
        files = [p for p in files if not any(n.startswith(".") for n in p.relative_to(path).parts)]
        if not files and not _saved(path):
            raise UserError(f"folder {source} holds no text: none of {KNOWN}")
    else:
        files = [path] if path.is_file() else []
    for path in files:
        if _kind(path) is None:
            raise UserError(f"{path} is of an unknown kind; text is read from {KNOWN}")
    return files


def source_hashes(source: str) -> dict[str, str]:
    """SHA-256 of every local file of a source, by its name below the deepest folder of them all.

    Where the files lie and when they were written does not matter. Empty for text of a hub.

    Raises:
        UserError: as `local_files`.
    """
    path = locate(source)
    if path.is_dir() and _saved(path):
        return {name: sha256(path / name) for name in relative_files(path)}
    files = local_files(source)
    if not files:
        return {}
    top = os.path.commonpath([file.absolute().parent for file in files])
    return {file.absolute().relative_to(top).as_posix(): sha256(file) for file in files}


def _match(pattern: Path) -> list[Path]:
    """What a pattern matches, sorted."""
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if any(c in part for c in WILD))
    return sorted(Path(*parts[:first]).glob("/".join(parts[first:])))


def label(source: Source) -> str:
    """The source in words, without a path of this machine."""
    if any(c in source.source for c in WILD) or locate(source.source).exists():
        return locate(source.source).name
    return ", ".join(part for part in (source.source, source.name, source.split) if part)


def _texts(source: Source) -> Iterator[tuple[bool, str]]:
    """(whether a document starts here, text), from wherever the source is."""
    path = locate(source.source)
    if path.is_dir() and _saved(path):
        yield from _columns(_open_saved(path, source), source)
        return
    files = local_files(source.source)
    if not files:
        looks_local = source.source.startswith((".", "/", "~", "packaged/"))
        looks_local = looks_local or _kind(path) is not None
        if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.source):
            raise UserError(f"no text file or folder {source.source}")
        yield from _columns(_open_hub(source), source)
    for file in files:
        with _readable(file):
            yield from _read(file, source)


def _read(path: Path, source: Source) -> Iterator[tuple[bool, str]]:
    if _kind(path) == "table":
        yield from _table(path, source.column)
        return
    with _open(path) as file:
        if _kind(path) == "jsonl":
            yield from ((True, text) for text in _lines(file, path, source.column))
        elif source.document == "paragraph":
            yield from ((True, text) for text in _paragraphs(file))
        else:
            yield from _whole(file)


def _kind(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix in PACKED else path
    kind = KINDS.get(name.suffix)
    return None if kind == "table" and path.suffix in PACKED else kind


def _open(path: Path) -> io.TextIOWrapper:
    raw = PACKED[path.suffix](path, "rb") if path.suffix in PACKED else path.open("rb")
    return io.TextIOWrapper(cast("Any", raw), encoding="utf-8")


@contextmanager
def _readable(path: Path) -> Generator[None, None, None]:
    """Name the file in whatever goes wrong while reading it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason}); convert it") from None
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read, it may be damaged or cut off: {error}") from None


def _whole(file: io.TextIOWrapper) -> Iterator[tuple[bool, str]]:
    """One document in pieces that end with a line, where lines are not overlong."""
    start = True
    while text := file.read(PIECE):
        yield start, text + (file.readline(PIECE) if not text.endswith("\n") else "")
        start = False


def _paragraphs(file: io.TextIOWrapper) -> Iterator[str]:
    """What blank lines separate."""
    lines: list[str] = []
    for line in file:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    yield "".join(lines)


def _lines(file: io.TextIOWrapper, path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object with a {column!r}")
        yield _cell(cast("dict[str, Any]", row), column, f"{path}, line {number}")


def _table(path: Path, column: str) -> Iterator[tuple[bool, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise _no_column(column, names, str(path))
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for row in batch.to_pylist():
                    yield True, _cell(row, column, str(path))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole parquet file: {error}") from None


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    """The text in a column; a null is an empty text."""
    if column not in row:
        raise _no_column(column, list(row), where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column!r} holds a {type(text).__name__}, not text")
    return text or ""


def _no_column(column: str, names: list[str], where: str) -> UserError:
    there = ", ".join(map(str, names[:20])) or "none"
    return UserError(f"{where} has no column {column!r}; there are: {there}")


# ------------------------------------------------------------------------------ datasets library


def _saved(folder: Path) -> bool:
    """Whether `datasets` saved a dataset in this folder (save_to_disk)."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def _open_saved(folder: Path, source: Source) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # many types; each means that it cannot be read
        raise UserError(f"dataset folder {folder.name} cannot be read: {_line(error)}") from None
    if isinstance(data, dict):
        if source.split not in data:
            there = ", ".join(map(str, data))
            raise UserError(f"{folder.name} has no split {source.split!r}; there are: {there}")
        return data[source.split]
    return data


def _open_hub(source: Source) -> Any:
    """A dataset of the hub, streamed; from this machine's cache where the hub is out of reach."""
    import datasets

    local = datasets.DownloadConfig(local_files_only=True)
    reasons: list[str] = []
    for options in ({"streaming": True}, {"download_config": local}):
        try:
            return datasets.load_dataset(
                source.source, source.name, split=source.split, **cast("Any", options)
            )
        except Exception as error:  # many types; each means that it cannot be had this way
            reasons.append(_line(error))
    raise UserError(
        f"no text {source.source}: it is neither a file or folder here nor a dataset that the hub "
        f"gave ({reasons[0]}) or this machine's cache holds ({reasons[1]})"
    )


def _columns(data: Any, source: Source) -> Iterator[tuple[bool, str]]:
    rows = iter(data)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # the network's, the file system's, pyarrow's
            raise UserError(f"reading {source.source} failed: {_line(error)}") from None
        if row is None:
            return
        yield True, _cell(row, source.column, label(source))


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
