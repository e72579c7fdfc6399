"""Mappings: how a dataset is written, and which concepts its labels mean. No torch.

A mapping is a YAML file; those of well-known datasets ship in `discovery/data/mappings`
(docs/corpora.md shows how to write one).
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, cast

from discovery.concepts import DATA, Concept, unknown_concept
from discovery.corpora.files import Format
from saes import config
from saes.errors import UserError

MAPPINGS = DATA / "mappings"
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}


@dataclass(frozen=True)
class LabelMapping:
    """How a dataset is written, and which concepts its labels mean."""

    about: str = ""
    """What the dataset is."""
    refused: str | None = None
    """Why it cannot be used, for a dataset that one would try."""
    hub: tuple[str, ...] = ()
    """Its names on the hub: there the mapping is taken without being asked for."""
    format: Format | None = None
    """Of its files, where their names do not say it."""
    header: tuple[str, ...] = ()
    """Names of the columns of files that have no line with them."""
    quoted: bool | None = None
    """Whether `"` quotes cells; null: in CSV it does, in TSV it is a letter like others."""
    broken: Literal["refuse", "leave out"] = "refuse"
    """What to do with rows that do not have the columns, and with empty texts."""
    text: str = "text"
    """Column of the text."""
    label: str | None = "label"
    """Column of the labels; null where each label has a column of its own."""
    columns: tuple[str, ...] = ()
    """Columns that are labels: one holds where its number is at least `threshold`."""
    optional_columns: tuple[str, ...] = ()
    """Those of `columns` that some files lack."""
    threshold: float = 1.0
    """Of the numbers in `columns`."""
    written: Literal["separated", "json", "one"] = "separated"
    """How several labels stand in a cell: parted by `separator`, as a JSON list, or never."""
    separator: str = ","
    """Parts labels."""
    ids: dict[str, str] | None = None
    """By number, the name of the label."""
    labels: dict[str, tuple[str, ...]] | None = None
    """By label, the concepts that it means in any concept set that has them."""
    sets: dict[str, dict[str, tuple[str, ...]]] | None = None
    """By concept set, what `labels` is for that set."""
    free: bool = False
    """Labels are free text: one means the concept of which it is a form, or nothing."""
    neutral: tuple[str, ...] = ()
    """Labels that say there is no feeling."""
    ignored: tuple[str, ...] = ()
    """Labels that mean no concept."""
    id: str | None = None
    """Column of a name that no other row has."""
    group: str | None = None
    """Column of the topic: texts are compared within it, and it is never split."""
    writer: str | None = None
    """Column of the writer, who is never split."""
    span: tuple[str, ...] = ()
    """Columns of the first character that the label is about and of the one after the last."""
    merge: bool = False
    """Rows of one text, as by several annotators, become one text with all their labels."""
    replace: dict[str, str] | None = None
    """What to write in texts for what stands there."""
    language: str | None = None
    """Code of the language."""
    language_column: str | None = None
    """Column of the language."""
    language_pattern: str | None = None
    """Finds the language in the name of a file (without endings) or of a hub configuration."""
    languages: dict[str, str] | None = None
    """By what was found, the code of the language."""

    def __post_init__(self) -> None:
        if self.label is None and not self.columns:
            raise ValueError(
                "name the column of the labels (label), or the label columns (columns)"
            )
        if odd := set(self.optional_columns) - set(self.columns):
            raise ValueError(f"optional_columns names {min(odd)!r}, which is not in columns")
        if self.span and len(self.span) != 2:
            raise ValueError(f"span names {len(self.span)} columns, expected first and last")
        try:
            re.compile(self.language_pattern or "")
        except re.error as error:
            raise ValueError(f"language_pattern {self.language_pattern!r}: {error}") from None


def shipped() -> list[str]:
    """The names of the shipped mappings, sorted."""
    return sorted(path.stem for path in MAPPINGS.glob("*.yaml"))


def load_mapping(name: str) -> LabelMapping:
    """A shipped mapping by name, or a YAML file.

    Raises:
        UserError: an unknown name, a faulty file, or a dataset that cannot be used (and why).
    """
    if name in shipped():
        mapping = _read(MAPPINGS / f"{name}.yaml")
    else:
        path = Path(name).expanduser()
        if path.suffix not in (".yaml", ".yml"):
            near = difflib.get_close_matches(name, shipped(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"no mapping {name!r}; {hint}shipped: {', '.join(shipped())}; or name a YAML file"
            )
        if not path.is_file():
            raise UserError(f"no mapping {name}; shipped: {', '.join(shipped())}")
        mapping = config.load(LabelMapping, _listed(config.read(path)), path.name)
    if mapping.refused is not None:
        raise UserError(f"{name}: {mapping.refused}")
    return mapping


def describe() -> dict[str, LabelMapping]:
    """The shipped mappings by name, with those that say why a dataset can't be used."""
    return {name: _read(MAPPINGS / f"{name}.yaml") for name in shipped()}


def of_hub(dataset: str) -> str | None:
    """The shipped mapping of a dataset of the hub, if there is one."""
    return next(
        (name for name in shipped() if dataset in _read(MAPPINGS / f"{name}.yaml").hub), None
    )


@cache
def _read(path: Path) -> LabelMapping:
    return config.load(LabelMapping, _listed(config.read(path)), path.name)


def _listed(tree: dict[str, object]) -> dict[str, object]:
    """A mapping as it was written, with `joy: joy` as `joy: [joy]`."""

    def lists(labels: object) -> object:
        if not isinstance(labels, dict):
            return labels
        named = cast("dict[object, object]", labels)
        return {name: [c] if isinstance(c, str) else c for name, c in named.items()}

    sets = tree.get("sets")
    if isinstance(sets, dict):
        by_set = cast("dict[object, object]", sets)
        tree = {**tree, "sets": {name: lists(labels) for name, labels in by_set.items()}}
    return {**tree, "labels": lists(tree["labels"])} if "labels" in tree else tree


def language(mapping: LabelMapping, name: str) -> str | None:
    """The code of the language that the name of a file or of a hub configuration tells."""
    if mapping.language_pattern is not None:
        found = re.search(mapping.language_pattern, name)
        if found is not None:
            code = found[1] if found.re.groups else found[0]
            return (mapping.languages or {}).get(code, code)
    return mapping.language


class Meaning(NamedTuple):
    """What the labels of a row mean."""

    concepts: tuple[str, ...]
    """Concepts of the run, in the order of the labels."""
    neutral: bool
    """The labels say that there is no feeling."""


class Reader:
    """Reads the labels of rows."""

    def __init__(
        self,
        mapping: LabelMapping | None,
        name: str,
        concepts: Sequence[Concept],
        known: Sequence[Concept],
    ) -> None:
        """Make the table from labels to concepts.

        Args:
            mapping: None where labels are the names of concepts.
            name: of the mapping, for messages.
            concepts: those of the run.
            known: those of the whole concept set.

        Raises:
            UserError: the mapping has no labels for this concept set, or names an unknown concept.
        """
        self._mapping = LabelMapping() if mapping is None else mapping
        self._own = mapping is None
        self._name = name
        self._wanted = {concept.name for concept in concepts}
        self._table: dict[str, tuple[str, ...]] = {}
        if mapping is None or mapping.free:
            self._table = _by_form(known, every=mapping is not None)
        if mapping is not None and not (mapping.free and mapping.labels is mapping.sets is None):
            self._table |= _by_label(mapping, name, known)

    def read(self, cells: Mapping[str, object], column: str | None, place: str) -> Meaning:
        """What the labels of a row mean.

        Args:
            column: of the labels; None where the mapping names label columns.

        Raises:
            UserError: a missing column, or a label that is unknown.
        """
        names = self._columns(cells, place) if column is None else self._cell(cells, column, place)
        found: dict[str, None] = {}
        neutral = bool(names)
        for label in names:
            neutral = neutral and label in self._mapping.neutral
            if label in self._mapping.neutral or label in self._mapping.ignored:
                continue
            meant = self._table.get(label.lower() if self._own else label)
            if meant is None and not self._mapping.free:
                raise UserError(f"{place}: {self._unknown(label)}")
            found.update(dict.fromkeys(c for c in meant or () if c in self._wanted))
        return Meaning(tuple(found), neutral)

    def _cell(self, cells: Mapping[str, object], column: str, place: str) -> list[str]:
        """The labels in a cell."""
        if column not in cells:
            raise no_column(column, cells, place)
        value = cells[column]
        mapping = self._mapping
        if isinstance(value, str) and mapping.written == "json":
            try:
                value = json.loads(value)
            except ValueError:
                raise UserError(f"{place}: {column!r} is no JSON list: {value[:40]!r}") from None
        items = cast("list[object]", value) if isinstance(value, list | tuple) else [value]
        texts = [str(item) for item in items if item is not None]
        if mapping.written != "one" and (mapping.free or not isinstance(value, list | tuple)):
            texts = [part for text in texts for part in text.split(mapping.separator)]
        if mapping.free:
            texts = [text.lower().strip(" .!?'\"") for text in texts]
        ids = mapping.ids or {}
        return [ids.get(name, name) for name in (text.strip() for text in texts) if name]

    def _columns(self, cells: Mapping[str, object], place: str) -> list[str]:
        """The label columns that hold."""
        held: list[str] = []
        for column in self._mapping.columns:
            if column not in cells and column in self._mapping.optional_columns:
                continue
            if column not in cells:
                raise no_column(column, cells, place)
            value = cells[column]
            try:
                number = float(cast("str", value)) if value not in (None, "") else 0.0
            except (TypeError, ValueError):
                raise UserError(f"{place}: {column!r} is {value!r}, expected a number") from None
            if number >= self._mapping.threshold:
                held.append(column)
        # no label at all says that none was felt, where the dataset has a label for that
        return held or list(self._mapping.neutral[:1])

    def _unknown(self, label: str) -> str:
        if self._own:
            names = sorted({name for names in self._table.values() for name in names})
            near = difflib.get_close_matches(label.lower(), self._table, n=1)
            hint = f"did you mean {near[0]!r}? " if near else f"known: {_some(names)}; "
            return (
                f"the label {label!r} is no concept of this set; {hint}a mapping can translate it"
            )
        near = difflib.get_close_matches(label, self._table, n=1)
        hint = f"did you mean {near[0]!r}? or " if near else ""
        return (
            f"the label {label!r} is not in mapping {self._name}; {hint}add it there, to `ignored` "
            "if it means no concept"
        )


def _some(names: Sequence[str], shown: int = 20) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def no_column(column: str, cells: Mapping[str, object], place: str) -> UserError:
    """What to say of a column that is missing."""
    names = list(map(str, cells))
    parts = {mark: name for mark, name in SEPARATORS.items() if mark in "".join(names)}
    if len(names) == 1 and parts:
        mark, name = next(iter(parts.items()))
        return UserError(
            f"{place}: no column {column!r}, but one column {names[0]!r}: its cells seem to be "
            f"parted by {name} ({mark!r}); cells are parted by commas in CSV and by tabs in TSV "
            "(`format` of a mapping says which), so convert the file or name its kind"
        )
    return UserError(f"{place}: no column {column!r}; there are: {_some(names) or 'none'}")


def _by_form(known: Sequence[Concept], every: bool) -> dict[str, tuple[str, ...]]:
    """By lower-case name (and by every form), the concept."""
    table: dict[str, tuple[str, ...]] = {}
    for concept in known:
        for form in concept.inflections if every else (concept.name, concept.slug):
            table[form.lower()] = (concept.name,)
    return table


def _by_label(
    mapping: LabelMapping, name: str, known: Sequence[Concept]
) -> dict[str, tuple[str, ...]]:
    here = known[0].concept_set
    table = (mapping.sets or {}).get(here, mapping.labels)
    if table is None:
        sets = ", ".join(mapping.sets or {}) or "none"
        raise UserError(
            f"mapping {name} has labels for the concept sets {sets}, not for {here!r}; take one of "
            "these (concepts: set), or write a mapping with `labels` for yours"
        )
    names = {concept.name for concept in known}
    for label, meant in table.items():
        for concept in meant:
            if concept not in names:
                raise UserError(
                    f"mapping {name}, label {label!r}: {unknown_concept(concept, known)}"
                )
    return table
