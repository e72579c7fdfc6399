"""The 171 emotion concepts: families, inflections, antonyms and human norms. No torch.

Concepts and families: "Emotion Concepts and their Function in a Large Language Model" (Anthropic
2026, arXiv 2604.07729). Norms: Glasgow Norms (Scott et al. 2019) and VADER (Hutto & Gilbert 2014);
see `discovery/data/README.md`.
"""

import csv
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from saes import config
from saes.errors import UserError

DATA = Path(__file__).parent / "data"
CONCEPTS = DATA / "concepts.yaml"
NORMS = DATA / "emotion171_norms.csv"

_SCALES = ("valence", "arousal", "dominance")
_FORM = re.compile(r"[a-z]+(?:[ -][a-z]+)*")
_NORM_COLUMNS = (
    "word",
    "glasgow_match",
    "glasgow_exact",
    "glasgow_valence",
    "glasgow_arousal",
    "glasgow_dominance",
    "vader_match",
    "vader_valence",
)


@dataclass(frozen=True)
class Concept:
    """An emotion concept. A norm is None where its source has no rating."""

    name: str
    slug: str  # the name in URLs and file names: "at ease" is at-ease
    family: str
    inflections: tuple[str, ...]  # forms that count as naming the concept; the first is `name`
    antonym: str | None  # one of the 171 where that is natural, else a common emotion word
    valence: float | None  # Glasgow, 1 (unpleasant) to 9 (pleasant)
    arousal: float | None  # Glasgow, 1 to 9
    dominance: float | None  # Glasgow, 1 (controlled) to 9 (in control)
    glasgow_match: str | None  # the word that was rated
    glasgow_exact: bool  # it is the concept's name, not a stem such as "amuse" for "amused"
    valence_vader: float | None  # VADER, -4 (negative) to 4 (positive)
    vader_match: str | None


@dataclass(frozen=True)
class _Entry:
    family: str
    antonym: str | None
    inflections: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    families: tuple[str, ...]
    concepts: dict[str, _Entry]


def load_concepts(names: Sequence[str] | None = None) -> list[Concept]:
    """The packaged concepts, or those of `names`, in the file's order.

    Raises:
        UserError: a name that is unknown (the message suggests known ones) or given twice, or an
            empty list of names.
    """
    concepts = _packaged()
    if names is None:
        return list(concepts)
    if not names:
        raise UserError("no concepts named; give at least one, or leave the list out for all")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"concept {name!r} is named twice; name it once")
        if all(concept.name != name for concept in concepts):
            raise UserError(unknown_concept(name, concepts))
    return [concept for concept in concepts if concept.name in names]


def unknown_concept(name: str, concepts: Iterable[Concept]) -> str:
    """What to tell a user who wrote `name`: the concept of that word form, or the closest names."""
    owner = {form: concept.name for concept in concepts for form in concept.inflections}
    known = list(dict.fromkeys(owner.values()))
    if name.lower() in owner:
        near = [owner[name.lower()]]
    else:
        near = difflib.get_close_matches(name.lower(), known, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return f"unknown concept {name!r}; {hint}"


@cache
def _packaged() -> tuple[Concept, ...]:
    concepts = read_concepts(CONCEPTS, NORMS)
    assert len(concepts) == 171
    return concepts


def read_concepts(path: Path, norms: Path) -> tuple[Concept, ...]:
    """Read a concept file and its norms, and check them whole.

    Args:
        path: YAML with `families` (names) and `concepts` (name: family, antonym, inflections).
        norms: CSV with one row a concept; its columns are described in `discovery/data/README.md`.

    Raises:
        UserError: a missing or damaged file, an unknown or empty family, a form that two concepts
            share, an antonym that has none itself, norms for other words or out of range.
    """
    file = config.load(_File, config.read(path), path.name)
    rows = _read_norms(norms)
    try:
        _check_families(file)
        _check_forms(file.concepts)
        _check_antonyms(file.concepts)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if rows.keys() != file.concepts.keys():
        odd = sorted(rows.keys() ^ file.concepts.keys())
        raise UserError(f"{norms}: {odd[0]!r} is not in both this file and {path.name}")
    return tuple(_concept(name, entry, rows[name], norms) for name, entry in file.concepts.items())


def _check_families(file: _File) -> None:
    used = {entry.family for entry in file.concepts.values()}
    for name, entry in file.concepts.items():
        if entry.family not in file.families:
            raise ValueError(f"{name!r} is in a family that is not listed: {entry.family!r}")
    for family in file.families:
        if family not in used or file.families.count(family) > 1:
            raise ValueError(f"family {family!r} is listed twice or has no concept")


def _check_forms(concepts: Mapping[str, _Entry]) -> None:
    owner: dict[str, str] = {}
    slugs: dict[str, str] = {}
    for name, entry in concepts.items():
        if not entry.inflections or entry.inflections[0] != name:
            raise ValueError(f"the inflections of {name!r} do not begin with {name!r} itself")
        for form in entry.inflections:
            if not _FORM.fullmatch(form):
                raise ValueError(f"{form!r} of {name!r}: write lower-case words, no punctuation")
            if form in owner:
                raise ValueError(f"{form!r} is a form of {owner[form]!r} and again of {name!r}")
            owner[form] = name
        if (other := slugs.setdefault(_slug(name), name)) != name:
            raise ValueError(f"{other!r} and {name!r} have the same slug {_slug(name)!r}")


def _check_antonyms(concepts: Mapping[str, _Entry]) -> None:
    owner = {form: name for name, entry in concepts.items() for form in entry.inflections}
    for name, entry in concepts.items():
        antonym = entry.antonym
        if antonym is None:
            continue
        if not _FORM.fullmatch(antonym):
            raise ValueError(f"antonym {antonym!r} of {name!r}: write lower-case words")
        meant = owner.get(antonym, antonym)
        if meant == name or meant != antonym:
            raise ValueError(f"antonym {antonym!r} of {name!r} is a form of {meant!r}")
        if antonym in concepts and concepts[antonym].antonym is None:
            raise ValueError(f"{antonym!r} is the antonym of {name!r} but has none itself")


def _read_norms(path: Path) -> dict[str, dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = tuple(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read norms {path}: {error}") from None
    if columns != _NORM_COLUMNS:
        raise UserError(f"{path}: expected the columns {', '.join(_NORM_COLUMNS)}")
    by_word = {row["word"]: row for row in rows}
    if len(by_word) < len(rows):
        raise UserError(f"{path}: a word has two rows")
    return by_word


def _concept(name: str, entry: _Entry, row: dict[str, str], norms: Path) -> Concept:
    try:
        glasgow = [_rating(row, f"glasgow_{scale}", 1, 9) for scale in _SCALES]
        vader = _rating(row, "vader_valence", -4, 4)
        if {rating is None for rating in glasgow} != {not row["glasgow_match"]}:
            raise ValueError("glasgow_match goes with all three ratings, or with none")
        if (vader is None) != (not row["vader_match"]):
            raise ValueError("vader_match goes with a rating")
        exact = row["glasgow_match"] == name
        if row["glasgow_exact"] != (str(int(exact)) if row["glasgow_match"] else ""):
            raise ValueError(f"glasgow_exact is {row['glasgow_exact']!r}")
    except ValueError as error:
        raise UserError(f"{norms}: row {name!r}: {error}") from None
    return Concept(
        name=name,
        slug=_slug(name),
        family=entry.family,
        inflections=entry.inflections,
        antonym=entry.antonym,
        valence=glasgow[0],
        arousal=glasgow[1],
        dominance=glasgow[2],
        glasgow_match=row["glasgow_match"] or None,
        glasgow_exact=exact,
        valence_vader=vader,
        vader_match=row["vader_match"] or None,
    )


def _rating(row: dict[str, str], column: str, low: int, high: int) -> float | None:
    if not row[column]:
        return None
    value = float(row[column])
    if not low <= value <= high:
        raise ValueError(f"{column} is {value}, outside {low} to {high}")
    return value


def _slug(name: str) -> str:
    return name.replace(" ", "-")
