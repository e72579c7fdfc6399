"""Sets of concepts: families, inflections, antonyms and human norms. No torch.

The default set is the 171 emotion concepts of "Emotion Concepts and their Function in a Large
Language Model" (Anthropic 2026, arXiv 2604.07729). Others ship in `discovery/data/concepts`, and a
user's own set is a YAML file of the same form, in any language (docs/corpora.md). Norms: Glasgow
Norms (Scott et al. 2019) and VADER (Hutto & Gilbert 2014); see `discovery/data/README.md`.
"""

import csv
import difflib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from saes import config
from saes.errors import UserError

DATA = Path(__file__).parent / "data"
SETS = DATA / "concepts"
DEFAULT = "emotions171"
NORMS = DATA / "emotion171_norms.csv"

_SCALES = ("valence", "arousal", "dominance")
_RANGES = {"valence": (1, 9), "arousal": (1, 9), "dominance": (1, 9), "vader": (-4, 4)}
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
    antonym: str | None  # one of the set where that is natural, else a common emotion word
    valence: float | None  # Glasgow, 1 (unpleasant) to 9 (pleasant)
    arousal: float | None  # Glasgow, 1 to 9
    dominance: float | None  # Glasgow, 1 (controlled) to 9 (in control)
    glasgow_match: str | None  # the word that was rated
    glasgow_exact: bool  # it is the concept's name, not a stem such as "amuse" for "amused"
    valence_vader: float | None  # VADER, -4 (negative) to 4 (positive)
    vader_match: str | None
    definition: str | None = None
    prompts: tuple[str, ...] = ()  # openings that call for the concept
    concept_set: str = ""  # the set that it is of: a shipped name, or the stem of a user's file


@dataclass(frozen=True)
class _Norms:
    """Ratings in a concept file."""

    valence: float | None = None
    arousal: float | None = None
    dominance: float | None = None
    vader: float | None = None
    rated: str | None = None
    """The word that was rated, where that is not the concept's name."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}, outside {low} to {high}")


@dataclass(frozen=True)
class _Entry:
    family: str | None = None
    antonym: str | None = None
    inflections: tuple[str, ...] | None = None
    definition: str | None = None
    prompts: tuple[str, ...] = ()
    norms: _Norms | None = None


@dataclass(frozen=True)
class _File:
    concepts: dict[str, _Entry | None]
    families: tuple[str, ...] | None = None
    about: str = ""


def concept_sets() -> dict[str, str]:
    """The shipped sets by name, each with what its file says about it; the default set first."""
    paths = sorted(SETS.glob("*.yaml"), key=lambda path: (path.stem != DEFAULT, path.stem))
    return {path.stem: _read_file(path).about for path in paths}


def load_concepts(names: Sequence[str] | None = None, source: str = DEFAULT) -> list[Concept]:
    """The concepts of a set, or those of `names`, in the file's order.

    Args:
        names: the concepts to take; None for all.
        source: the name of a shipped set, or a YAML file.

    Raises:
        UserError: an unknown or faulty set, a name that is unknown (the message suggests known
            ones) or given twice, or an empty list of names.
    """
    concepts = _set(source)
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


def _set(source: str) -> tuple[Concept, ...]:
    if (SETS / f"{source}.yaml").is_file() and "/" not in source:
        return _shipped(source)
    path = Path(source).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        names = ", ".join(sorted(file.stem for file in SETS.glob("*.yaml")))
        near = difflib.get_close_matches(source, names.split(", "), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"no concept set {source!r}; {hint}shipped: {names}; or name a YAML file")
    if not path.is_file():
        raise UserError(f"no concept set {source}; shipped: {', '.join(sorted(concept_sets()))}")
    return read_concepts(path)


@cache
def _shipped(name: str) -> tuple[Concept, ...]:
    concepts = read_concepts(SETS / f"{name}.yaml", NORMS if name == DEFAULT else None)
    assert name != DEFAULT or len(concepts) == 171
    return concepts


def read_concepts(path: Path, norms: Path | None = None) -> tuple[Concept, ...]:
    """Read a concept file, and a file of norms for it, and check them whole.

    Args:
        path: YAML with `concepts` (name: family, antonym, inflections, definition, prompts, norms;
            all may be left out) and, where there are families, `families` (their names in order).
        norms: CSV with one row a concept; its columns are described in `discovery/data/README.md`.
            None where the norms, if any, are in the concept file.

    Raises:
        UserError: a missing or damaged file, an unknown or empty family, a form that two concepts
            share, an antonym that has none itself, norms for other words or out of range.
    """
    file = _read_file(path)
    rows = None if norms is None else _read_norms(norms)
    entries = {name: _complete(name, entry, path.stem) for name, entry in file.concepts.items()}
    try:
        if not entries:
            raise ValueError("it names no concepts; write at least three, one a line")
        _check_families(file.families, file.concepts)
        _check_forms(entries)
        _check_antonyms(entries)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    both = [name for name, entry in entries.items() if entry.norms != _Norms()]
    if rows is not None and both:
        raise UserError(f"{path}: {both[0]!r} has norms here and in {norms}; keep one of them")
    if rows is None or norms is None:
        return tuple(_concept(name, entry, _inline(name, entry)) for name, entry in entries.items())
    if rows.keys() != entries.keys():
        odd = sorted(rows.keys() ^ entries.keys())
        raise UserError(f"{norms}: {odd[0]!r} is not in both this file and {path.name}")
    return tuple(
        _concept(name, entry, _from_row(name, rows[name], norms)) for name, entry in entries.items()
    )


class _Known(NamedTuple):
    """What a concept file says of a concept, with what it leaves out filled in."""

    family: str
    antonym: str | None
    inflections: tuple[str, ...]
    definition: str | None
    prompts: tuple[str, ...]
    norms: _Norms
    concept_set: str


class _Rated(NamedTuple):
    """The norms of a concept, as `Concept` has them."""

    valence: float | None
    arousal: float | None
    dominance: float | None
    glasgow_match: str | None
    glasgow_exact: bool
    valence_vader: float | None
    vader_match: str | None


def _read_file(path: Path) -> _File:
    return config.load(_File, config.read(path), path.name)


def _complete(name: str, entry: _Entry | None, concept_set: str) -> _Known:
    entry = entry or _Entry()
    return _Known(
        entry.family or concept_set,
        entry.antonym,
        (name,) if entry.inflections is None else entry.inflections,
        entry.definition,
        entry.prompts,
        entry.norms or _Norms(),
        concept_set,
    )


def _check_families(
    families: tuple[str, ...] | None, concepts: Mapping[str, _Entry | None]
) -> None:
    named = {name: entry.family if entry else None for name, entry in concepts.items()}
    used = {family for family in named.values() if family is not None}
    if families is None and not used:
        return
    for name, family in named.items():
        if family is None:
            raise ValueError(f"{name!r} has no family; give every concept one, or none of them")
        if families is not None and family not in families:
            raise ValueError(f"{name!r} is in a family that is not listed: {family!r}")
    for family in families or ():
        if family not in used or (families or ()).count(family) > 1:
            raise ValueError(f"family {family!r} is listed twice or has no concept")


def _is_form(text: str) -> bool:
    """Lower-case words of any script, parted by one space, hyphen or apostrophe."""
    words = text.replace("-", " ").replace("'", " ").replace("’", " ").split(" ")
    letters = all(unicodedata.category(c)[0] in "LM" for word in words for c in word)
    return text == text.lower() and letters and all(words)


def _check_forms(concepts: Mapping[str, _Known]) -> None:
    owner: dict[str, str] = {}
    slugs: dict[str, str] = {}
    for name, entry in concepts.items():
        if not entry.inflections or entry.inflections[0] != name:
            raise ValueError(f"the inflections of {name!r} do not begin with {name!r} itself")
        for form in entry.inflections:
            if not _is_form(form):
                raise ValueError(f"{form!r} of {name!r}: write lower-case words, no punctuation")
            if form in owner:
                raise ValueError(f"{form!r} is a form of {owner[form]!r} and again of {name!r}")
            owner[form] = name
        if (other := slugs.setdefault(_slug(name), name)) != name:
            raise ValueError(f"{other!r} and {name!r} have the same slug {_slug(name)!r}")


def _check_antonyms(concepts: Mapping[str, _Known]) -> None:
    owner = {form: name for name, entry in concepts.items() for form in entry.inflections}
    for name, entry in concepts.items():
        antonym = entry.antonym
        if antonym is None:
            continue
        if not _is_form(antonym):
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


def _inline(name: str, entry: _Known) -> _Rated:
    """The norms that stand in the concept file."""
    norms = entry.norms
    rated = norms.rated or name
    glasgow = (norms.valence, norms.arousal, norms.dominance)
    match = None if all(rating is None for rating in glasgow) else rated
    vader_match = None if norms.vader is None else rated
    return _Rated(*glasgow, match, match == name, norms.vader, vader_match)


def _from_row(name: str, row: dict[str, str], norms: Path) -> _Rated:
    """The norms of a row of the norms file."""
    try:
        glasgow = [_rating(row, f"glasgow_{scale}", *_RANGES[scale]) for scale in _SCALES]
        vader = _rating(row, "vader_valence", *_RANGES["vader"])
        if {rating is None for rating in glasgow} != {not row["glasgow_match"]}:
            raise ValueError("glasgow_match goes with all three ratings, or with none")
        if (vader is None) != (not row["vader_match"]):
            raise ValueError("vader_match goes with a rating")
        exact = row["glasgow_match"] == name
        if row["glasgow_exact"] != (str(int(exact)) if row["glasgow_match"] else ""):
            raise ValueError(f"glasgow_exact is {row['glasgow_exact']!r}")
    except ValueError as error:
        raise UserError(f"{norms}: row {name!r}: {error}") from None
    valence, arousal, dominance = glasgow
    match, vader_match = row["glasgow_match"] or None, row["vader_match"] or None
    return _Rated(valence, arousal, dominance, match, exact, vader, vader_match)


def _concept(name: str, entry: _Known, rated: _Rated) -> Concept:
    return Concept(
        name=name,
        slug=_slug(name),
        family=entry.family,
        inflections=entry.inflections,
        antonym=entry.antonym,
        definition=entry.definition,
        prompts=entry.prompts,
        concept_set=entry.concept_set,
        **rated._asdict(),
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
