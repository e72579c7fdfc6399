"""Rows of local tables (CSV, TSV, JSONL, Parquet), and the place of whatever is wrong in them."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, cast

from saes.errors import UserError
from saes.files import locate

Format = Literal["csv", "tsv", "jsonl", "parquet"]
KINDS: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
KNOWN = ".csv, .tsv, .jsonl, .ndjson (each also with .gz), .parquet"
WILD = "*?["


class Row(NamedTuple):
    """A row of a table."""

    place: str
    """Where it is, for messages: file and line."""
    number: int
    """Its line in a text file, or its number from 1 in a table."""
    cells: dict[str, object] | None
    """By column; None where the row does not have the columns of its table."""


class Layout(NamedTuple):
    """How a table is written, where its name does not say."""

    format: Format | None = None
    """None: by the ending of its name."""
    header: tuple[str, ...] = ()
    """Names of the columns of a CSV or TSV file that has no line with them."""
    quoted: bool | None = None
    """Whether `"` quotes cells; None: in CSV it does, in TSV it is a letter like others."""
    broken: Literal["refuse", "leave out"] = "refuse"
    """What to do with rows of a CSV or TSV file that do not have the columns, and empty texts."""


def local_files(source: str, layout: Layout) -> list[Path]:
    """The tables that a source names, sorted; none if it is not on this machine.

    Raises:
        UserError: a pattern that matches nothing, or a file of an unknown kind.
    """
    files = named_files(source)
    for path in files:
        _kind(path, layout)
    return files


def named_files(source: str) -> list[Path]:
    """The files of any kind that a source names, sorted; none if it is not on this machine.

    Raises:
        UserError: a pattern that matches nothing.
    """
    if any(c in source for c in WILD):
        parts = locate(source).parts
        first = next(i for i, part in enumerate(parts) if any(c in part for c in WILD))
        files = sorted(Path(*parts[:first]).glob("/".join(parts[first:])))
        files = [path for path in files if path.is_file()]
        if not files:
            raise UserError(f"no file matches {source}")
    else:
        files = [locate(source)] if locate(source).is_file() else []
    return files


def stem(path: Path) -> str:
    """The name of a file without its endings: of `dev.csv.gz`, `dev`."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def labels(files: Iterable[Path], taken: Collection[str] = ()) -> dict[Path, str]:
    """By file (absolute), what results call it: its stem, after its folder's name where another
    file has that stem, or it is taken. No more is told of the place of a file."""
    every = {path.absolute() for path in files}
    count = Counter(stem(path) for path in every)
    return {
        path: f"{path.parent.name}/{stem(path)}"
        if (count[stem(path)] > 1 or stem(path) in taken) and path.parent.name
        else stem(path)
        for path in every
    }


def rows(path: Path, layout: Layout) -> Iterator[Row]:
    """The rows of a table; empty lines are none.

    Raises:
        UserError: a file that cannot be read, text that is not UTF-8 all through (with the line),
            a damaged table, two columns of one name, or a row that does not have the columns where
            such rows are refused.
    """
    kind = _kind(path, layout)
    if kind == "parquet":
        yield from _parquet(path)
        return
    text = _text(path)
    if kind == "jsonl":
        yield from _json_lines(text, path)
        return
    quoted = kind == "csv" if layout.quoted is None else layout.quoted
    delimiter = "," if kind == "csv" else "\t"
    lines = _quoted(text, delimiter, path) if quoted else _plain(text, delimiter)
    yield from _table(lines, path, layout, quoted)


def _kind(path: Path, layout: Layout) -> Format:
    if layout.format is not None:
        return layout.format
    name = path.with_suffix("") if path.suffix == ".gz" else path
    kind = KINDS.get(name.suffix)
    if kind is None or (kind == "parquet" and path.suffix == ".gz"):
        raise UserError(f"{path} is of an unknown kind; labelled texts are read from {KNOWN}")
    return kind


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read, it may be damaged or cut off: {error}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is in UTF-16; convert it to UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is not UTF-8; the file is in "
            "another encoding or mixes several: convert it"
        ) from None
    if (at := text.find("\0")) >= 0:
        raise UserError(f"{path}, line {text.count(chr(10), 0, at) + 1}: a NUL byte, so no text")
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            cells = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        if not isinstance(cells, dict):
            raise UserError(f"{place}: expected a JSON object, got {line.strip()[:40]}")
        yield Row(place, number, cast("dict[str, object]", cells))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():  # pyright: ignore[reportUnknownMemberType]
                for cells in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", number, cells)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} is not a whole parquet file: {reason}") from None


def _quoted(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each row, cells quoted as in CSV."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(sys.maxsize)
    start = 1
    try:
        for cells in reader:
            yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {start}: {error}; a cell that holds a quote is itself quoted, "
            "and its quotes are doubled"
        ) from None
    finally:
        csv.field_size_limit(before)


def _plain(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        yield number, line.removesuffix("\r").split(delimiter)


def _table(
    lines: Iterator[tuple[int, list[str]]], path: Path, layout: Layout, quoted: bool
) -> Iterator[Row]:
    header: list[str] = list(layout.header)
    begun = False
    for number, cells in lines:
        if not any(cell.strip() for cell in cells):
            continue
        if not begun:
            begun = True
            names = [cell.strip() for cell in cells]
            while not names[-1]:
                names.pop()
            if not header:
                header = names
                if len(set(header)) < len(header):
                    twice = next(name for name in header if header.count(name) > 1)
                    raise UserError(f"{path}, line {number}: two columns are called {twice!r}")
                continue
            if names == header:
                continue
        place = f"{path}, line {number}"
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) == len(header):
            yield Row(place, number, dict(zip(header, cells, strict=True)))
        elif layout.broken == "leave out":
            yield Row(place, number, None)
        else:
            how = "quoted" if quoted else "not quoted"
            raise UserError(
                f"{place}: {len(cells)} cells, expected the {len(header)} of {', '.join(header)}; "
                f"cells are read as {how} (a mapping can say `quoted: {str(not quoted).lower()}`, "
                "or `broken: leave out`)"
            )
