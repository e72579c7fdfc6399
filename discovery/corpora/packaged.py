"""Labelled texts: the packaged corpus or a user's folder of the same files. No torch.

The verdict protocol selects on stories.jsonl and confirms on stories_hard.jsonl, within topics, so
both need exactly one story for each concept and topic, and no topic may be in both. What a folder
lacks is said in one line with its file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from discovery.concepts import DATA, Concept, load_concepts, unknown_concept
from discovery.corpora.rows import ROLES, Corpus, Role, Text, by_role
from saes.errors import UserError
from saes.files import sha256

CORPUS = DATA / "corpus"
SOURCE = "packaged"  # what the rows of the packaged corpus name as their source
MIN_TOPICS = 4  # per story set: an interval over fewer topics says nothing
MIN_MENTIONS = 2  # per concept: one to select a lexical latent on, one to test it

_FILES = {
    "selection": ("stories.jsonl", ("id", "text", "concept", "topic", "writer")),
    "confirmation": ("stories_hard.jsonl", ("id", "text", "concept", "topic", "writer")),
    "situations": ("situations.jsonl", ("id", "text", "concept")),
    "neutral": ("neutral.jsonl", ("id", "text", "topic")),
    "lexical": ("mentions.jsonl", ("id", "text", "concept")),
}
"""By set, its file and the columns that it must have; others are ignored."""


def load_corpus(
    folder: Path | None = None,
    concepts: Sequence[Concept] | None = None,
    roles: Sequence[Role] = ROLES,
) -> Corpus:
    """Read and check a corpus.

    Args:
        folder: holds stories.jsonl, stories_hard.jsonl, situations.jsonl, neutral.jsonl and
            mentions.jsonl, one JSON object a line; None for the packaged corpus.
        concepts: only their texts are kept (and the neutral ones); None for all 171.
        roles: only the files of these sets are read; the other sets are empty.

    Raises:
        UserError: a missing folder or file, a line that is no JSON object, a missing or empty
            column, an unknown concept, an id or text given twice, a concept that a topic lacks or
            has twice, a topic in both story sets, too few topics or writers, or situations or
            mentions that are not as many for every concept.
    """
    everything = load_concepts()
    kept = everything if concepts is None else concepts
    known = {concept.name: concept for concept in (*everything, *kept)}
    names = [concept.name for concept in kept]
    source = SOURCE if folder is None else folder.name
    folder = CORPUS if folder is None else folder
    if not folder.is_dir():
        raise UserError(f"no corpus folder {folder}; give a folder that holds {_file_names()}")
    files = {kind: file for kind, (file, _) in _FILES.items() if kind in roles}
    read = {kind: list(_read(folder / file, kind, source)) for kind, file in files.items()}
    _check_once(folder, read)
    for kind, rows in read.items():
        for line, text in rows:
            if kind != "neutral" and text.concept not in known:
                place = f"{folder / files[kind]}, line {line}"
                raise UserError(f"{place}: {unknown_concept(text.concept, known.values())}")
    wanted = {*names, ""}
    corpus = by_role(t for rows in read.values() for _, t in rows if t.concept in wanted)
    for kind in ("selection", "confirmation"):
        if kind in files:
            _check_stories(folder / files[kind], getattr(corpus, kind), names)
    if "selection" in files:
        _check_writers(folder / files["selection"], corpus.selection)
    _check_apart(folder, corpus)
    for kind, least in (("situations", 1), ("lexical", MIN_MENTIONS)):
        if kind in files:
            _check_counts(folder / files[kind], getattr(corpus, kind), names, least)
    return corpus


def digest(folder: Path | None = None) -> str:
    """SHA-256, hex, over the bytes of a corpus's five files, for the manifest.

    Raises:
        UserError: a file is missing.
    """
    folder = CORPUS if folder is None else folder
    total = hashlib.sha256()
    for file, _ in _FILES.values():
        if not (folder / file).is_file():
            raise UserError(_missing(folder / file))
        total.update(f"{file}\0{sha256(folder / file)}\n".encode())
    return total.hexdigest()


def _file_names() -> str:
    return ", ".join(file for file, _ in _FILES.values())


def _missing(path: Path) -> str:
    return f"no corpus file {path}; a corpus folder holds {_file_names()}"


def _read(path: Path, kind: str, source: str) -> Iterable[tuple[int, Text]]:
    """(line number, text) of each row."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not "".join(lines).strip():
        raise UserError(f"{path} is empty; write one JSON object a line")
    for i, line in enumerate(lines, start=1):
        if line.strip():
            yield i, _row(line, kind, source, f"{path}, line {i}")


def _row(line: str, kind: str, source: str, place: str) -> Text:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object, got {line.strip()[:40]}")
    cells = cast(dict[str, object], row)
    columns = _FILES[kind][1]
    values: dict[str, Any] = {"concept": "", "topic": "", "writer": ""}
    for column in columns:
        if column not in cells:
            raise UserError(f"{place}: missing column '{column}'; needed: {', '.join(columns)}")
        value = cells[column]
        if column == "concept" and value in (None, ""):
            raise UserError(f"{place}: unlabelled; set its concept, or leave the row out")
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{place}: '{column}' is {value!r}, expected a text that is not empty")
        values[column] = value
    concept = values.pop("concept")
    return Text(set=kind, concepts=(concept,) if concept else (), source=source, **values)


def _check_once(folder: Path, read: dict[str, list[tuple[int, Text]]]) -> None:
    """No id and no text twice: a story in both sets would confirm itself."""
    seen: dict[tuple[str, str], str] = {}
    for kind, rows in read.items():
        for line, text in rows:
            place = f"{_FILES[kind][0]}, line {line}"
            for what, value in (("id", text.id), ("text", text.text)):
                if (before := seen.setdefault((what, value), place)) != place:
                    start = value if len(value) <= 60 else f"{value[:57]}..."
                    raise UserError(f"{folder / place}: the {what} {start!r} is also in {before}")


def _check_stories(path: Path, texts: Sequence[Text], names: Sequence[str]) -> None:
    topics = list(dict.fromkeys(text.topic for text in texts))
    count = Counter((text.topic, text.concept) for text in texts)
    there = {text.concept for text in texts}
    for name in names:
        if name not in there:
            raise UserError(f"{path} has no story of {name!r}; leave the concept out or add it")
    for topic in topics:
        for name in names:
            if (n := count[topic, name]) != 1:
                fault = "has no story" if n == 0 else f"has {n} stories"
                raise UserError(
                    f"{path}: topic {topic!r} {fault} of {name!r}; "
                    "each topic needs exactly one story of each concept"
                )
    if len(topics) < MIN_TOPICS:
        raise UserError(f"{path} has {len(topics)} topics; at least {MIN_TOPICS} are needed")


def _check_apart(folder: Path, corpus: Corpus) -> None:
    both = {text.topic for text in corpus.selection} & {text.topic for text in corpus.confirmation}
    if both:
        raise UserError(
            f"{folder / _FILES['confirmation'][0]}: topic {min(both)!r} is also in "
            f"{_FILES['selection'][0]}; what is selected on one set is confirmed on other topics"
        )


def _check_writers(path: Path, texts: Sequence[Text]) -> None:
    writers: dict[str, set[str]] = {}
    for text in texts:
        writers.setdefault(text.topic, set()).add(text.writer)
    for topic, names in writers.items():
        if len(names) > 1:
            raise UserError(
                f"{path}: topic {topic!r} has stories of writers {', '.join(sorted(names))}; "
                "selection is cross-fitted over writers, so give each writer topics of its own"
            )
    if len({text.writer for text in texts}) < 2:
        raise UserError(
            f"{path} has one writer; selection is cross-fitted over writers, so name at least "
            "two (the topic will do where the writers are unknown)"
        )


def _check_counts(path: Path, texts: Sequence[Text], names: Sequence[str], least: int) -> None:
    """As many texts of every concept: the n-th texts of all concepts are compared like a topic."""
    count = Counter(text.concept for text in texts)
    needed = max(least, *(count[name] for name in names))
    for name in names:
        if count[name] < needed:
            raise UserError(
                f"{path} has {count[name]} texts of {name!r} and needs {needed}, as many as of "
                "every other concept"
            )
