"""The texts of one source: its rows, their labels as concepts, and a count of what was left out."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

from discovery.concepts import Concept
from discovery.corpora import hub
from discovery.corpora.files import Layout, Row, labels, local_files, named_files, stem
from discovery.corpora.files import rows as file_rows
from discovery.corpora.mappings import (
    LabelMapping,
    Meaning,
    Reader,
    language,
    load_mapping,
    no_column,
    of_hub,
)
from discovery.corpora.packaged import SOURCE as PACKAGED
from discovery.corpora.rows import ROLES, Text
from discovery.corpora.source import Source
from discovery.corpora.split import sample
from saes.errors import UserError
from saes.files import locate

Key = tuple[str, str, str]  # set, source, language
Tally = dict[Key, Counter[str]]
PENDING = ("split", "crossfit")  # roles that become sets when all sources are read


class Table(NamedTuple):
    """Rows of one file or dataset."""

    rows: Iterator[Row]
    label: str
    """What results call it; no path of this machine."""
    language: str | None


class Part(NamedTuple):
    """What a source gave."""

    texts: list[Text]
    tally: Tally
    """By set, source and language: rows read, and those left out as unreadable, unlabelled,
    repeated (merged with a text that they repeat) or beyond the limit (beyond)."""


class _Columns(NamedTuple):
    text: str
    label: str | None
    group: str | None
    writer: str | None
    id: str | None
    set: str | None
    language: str | None
    span: tuple[str, ...]


def file_labels(sources: Sequence[Source]) -> dict[Path, str]:
    """By file of any of the sources, what results call it."""
    files = [path for source in sources for path in named_files(source.source)]
    return labels(files, taken=(PACKAGED,))


def read(
    source: Source,
    concepts: Sequence[Concept],
    known: Sequence[Concept],
    seed: int,
    names: Mapping[Path, str] | None = None,
) -> Part:
    """Read a source that is no corpus folder. Texts of the roles split and crossfit get the set
    "selection" for now.

    Args:
        concepts: those of the run.
        known: those of the whole concept set.
        seed: of the sample, where there is a limit.
        names: what to call its files, from `file_labels`; None if it is the only source.

    Raises:
        UserError: the source is nowhere or empty, a file is damaged, a column, text or label is
            missing or does not fit, or an id is there twice.
    """
    name = source.mapping or of_hub(source.source)
    mapping = None if name is None else load_mapping(name)
    unlabelled = mapping is None and source.role == "neutral"
    reader = None if unlabelled else Reader(mapping, name or "", concepts, known)
    columns = _columns(source, mapping)
    texts: list[Text] = []
    tally: Tally = {}
    names = file_labels([source]) if names is None else names
    for table in _tables(source, mapping, names):
        texts += _read_table(table, source, mapping or LabelMapping(), columns, reader, tally)
    if source.limit is not None:
        kept = sample(texts, source.limit, seed)
        if texts and not kept:
            raise UserError(
                f"{source.source}: the first whole group has more texts than the limit of "
                f"{source.limit}; raise it"
            )
        left = Counter((text.set, text.source, text.language) for text in texts)
        left.subtract((text.set, text.source, text.language) for text in kept)
        for key, n in left.items():
            tally[key]["beyond"] += n
        texts = kept
    if not texts:
        count = sum(tally.values(), Counter[str]())
        if not count["read"]:
            raise UserError(f"{source.source} has no rows")
        raise UserError(
            f"{source.source} gives no text for the role {source.role}: of {count['read']} rows, "
            f"{count['unlabelled']} have no label that fits and {count['unreadable']} no text"
        )
    return Part(texts, tally)


def _columns(source: Source, mapping: LabelMapping | None) -> _Columns:
    written = mapping or LabelMapping()
    return _Columns(
        source.text_column or written.text,
        source.label_column or written.label,
        source.group_column or written.group,
        source.writer_column or written.writer,
        source.id_column or written.id,
        source.set_column,
        written.language_column,
        source.span_columns or written.span,
    )


def _tables(
    source: Source, mapping: LabelMapping | None, names: Mapping[Path, str]
) -> Iterator[Table]:
    written = mapping or LabelMapping()
    layout = Layout(written.format, written.header, written.quoted, written.broken)
    path = locate(source.source)
    files = local_files(source.source, layout)
    if files:
        _check_no_hub(source, ("hub_config", "hub_split", "revision"))
    for file in files:
        code = source.language or language(written, stem(file))
        yield Table(file_rows(file, layout), names[file.absolute()], code)
    if files:
        return
    folder = path if path.is_dir() else None
    if folder is not None and not hub.is_saved(folder):
        raise UserError(
            f"folder {source.source} is neither a corpus of five files nor a dataset that was "
            "saved; name its files, with * for several"
        )
    if folder is None and (source.source.startswith((".", "/", "~")) or path.suffix in _ENDINGS):
        raise UserError(f"no file {source.source}")
    if folder is not None:
        _check_no_hub(source, ("hub_config", "revision"))
    name = source.source if folder is None else folder.name
    config = source.hub_config
    label = " ".join(part for part in (name, config, source.hub_split) if part)
    rows = hub.rows(name, config, source.hub_split, source.revision, folder)
    yield Table(rows, label, source.language or language(written, config or name))


def _check_no_hub(source: Source, names: Sequence[str]) -> None:
    """Nothing is said that means nothing here."""
    plain = Source(source.source)
    for name in names:
        if getattr(source, name) != getattr(plain, name):
            raise UserError(
                f"{source.source} is on this machine; leave out {name}, of hub datasets"
            )


_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".gz", ".txt", ".json")


def _read_table(
    table: Table,
    source: Source,
    mapping: LabelMapping,
    columns: _Columns,
    reader: Reader | None,
    tally: Tally,
) -> list[Text]:
    texts: list[Text] = []
    ids: dict[str, str] = {}
    merged: dict[tuple[str, str], int] = {}
    pending = "selection" if source.role in (*PENDING, "all") else source.role
    for row in table.rows:
        if row.cells is None:
            _count(tally, (pending, table.label, table.language or "en"), "read", "unreadable")
            continue
        role = pending if columns.set is None else _role(row.cells, columns.set, row.place)
        code = _language(row.cells, columns, row.place) or table.language or "en"
        key = (role, table.label, code)
        text = _text(row, columns, mapping)
        if text is None:
            _count(tally, key, "read", "unreadable")
            continue
        label = None if columns.set is not None and role == "neutral" else columns.label
        meaning = Meaning((), True)
        if reader is not None and (role != "neutral" or columns.set is None):
            meaning = reader.read(row.cells, label, row.place)
        if not (meaning.neutral if role == "neutral" else meaning.concepts):
            _count(tally, key, "read", "unlabelled")
            continue
        concepts = () if role == "neutral" else meaning.concepts
        if mapping.merge and (at := merged.setdefault((role, text), len(texts))) < len(texts):
            before = texts[at]
            together = tuple(dict.fromkeys((*before.concepts, *concepts)))
            texts[at] = replace(before, concepts=together)
            _count(tally, key, "read", "repeated")
            continue
        number = _id(row, columns, ids)
        texts.append(
            Text(
                id=f"{table.label}:{number}",
                text=text,
                concepts=concepts,
                set=role,
                topic=_optional(row.cells, columns.group, row.place),
                writer=_optional(row.cells, columns.writer, row.place),
                source=table.label,
                language=code,
                span=_span(row.cells, columns.span, text, row.place),
            )
        )
        _count(tally, key, "read")
    return texts


def _count(tally: Tally, key: Key, *what: str) -> None:
    tally.setdefault(key, Counter()).update(what)


def _cell(cells: Mapping[str, object], column: str, place: str) -> object:
    if column not in cells:
        raise no_column(column, cells, place)
    return cells[column]


def _text(row: Row, columns: _Columns, mapping: LabelMapping) -> str | None:
    """The text of a row; None where it is empty and such rows are left out."""
    assert row.cells is not None
    value = _cell(row.cells, columns.text, row.place)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.place}: {columns.text!r} is {value!r}, expected a text")
    for old, new in (mapping.replace or {}).items():
        value = (value or "").replace(old, new)
    if value is not None and value.strip():
        return value if columns.span else value.strip()
    if mapping.broken == "leave out":
        return None
    raise UserError(
        f"{row.place}: {columns.text!r} is empty; fill it, take the row out, or give a mapping "
        "with `broken: leave out`"
    )


def _optional(cells: Mapping[str, object], column: str | None, place: str) -> str:
    value = None if column is None else _cell(cells, column, place)
    return "" if value is None else str(value).strip()


def _language(cells: Mapping[str, object], columns: _Columns, place: str) -> str:
    return _optional(cells, columns.language, place)


def _id(row: Row, columns: _Columns, ids: dict[str, str]) -> str:
    """What tells the row from all others of its table."""
    assert row.cells is not None
    name = _optional(row.cells, columns.id, row.place) or str(row.number)
    if (before := ids.setdefault(name, row.place)) != row.place:
        raise UserError(f"{row.place}: the id {name!r} is also that of {before}")
    return name


def _role(cells: Mapping[str, object], column: str, place: str) -> str:
    value = _cell(cells, column, place)
    if value not in ROLES:
        raise UserError(f"{place}: {column!r} is {value!r}, expected one of {', '.join(ROLES)}")
    return cast("str", value)


def _span(
    cells: Mapping[str, object], columns: tuple[str, ...], text: str, place: str
) -> tuple[int, int] | None:
    if not columns:
        return None
    first, last = (_cell(cells, column, place) for column in columns)
    if first in (None, "") and last in (None, ""):
        return None
    try:
        start, end = int(cast("str", first)), int(cast("str", last))
    except (TypeError, ValueError):
        raise UserError(f"{place}: the span {first!r} to {last!r} is no pair of numbers") from None
    if not 0 <= start < end <= len(text):
        raise UserError(
            f"{place}: the span {start} to {end} is not inside the text of {len(text)} characters"
        )
    return start, end


def is_folder(source: Source) -> Path | None:
    """The folder of a corpus of the five files, where the source is one."""
    path = locate(source.source)
    return path if path.is_dir() and not hub.is_saved(path) else None
