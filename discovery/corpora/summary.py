"""What some sources hold, in words: texts by set and concept, what they can show, which leak."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal, NamedTuple

from discovery import inference
from discovery.concepts import Concept
from discovery.corpora.leaks import Leak, leaks
from discovery.corpora.rows import ROLES, Corpus, Text
from discovery.corpora.source import Source
from discovery.corpora.sources import count_sets, load_corpora, read_sources, whole_roles
from discovery.records import TextSet
from saes.tables import markdown

START = 60  # characters of a text that are shown


class Checked(NamedTuple):
    """What some sources hold."""

    sets: list[TextSet]
    corpus: Corpus
    concepts: list[Concept]
    left_out: list[str]
    """Concepts of which a set has too few texts."""
    leaks: list[Leak]


def check(
    sources: Sequence[Source],
    concepts: Sequence[Concept],
    known: Sequence[Concept],
    seed: int,
    missing: Literal["error", "leave out"],
    whole: bool = False,
) -> Checked:
    """Read sources as a run would; where they are not enough for a run, without splitting them.

    Args:
        whole: sources that are not enough for a run are an error.

    Raises:
        UserError: as `load_corpora`.
    """
    if whole or whole_roles(sources):
        loaded = load_corpora(sources, concepts, known=known, seed=seed, missing=missing)
        names = {concept.name for concept in loaded.concepts}
        left_out = [concept.name for concept in concepts if concept.name not in names]
        return Checked(loaded.sets, loaded.corpus, loaded.concepts, left_out, loaded.leaks)
    corpus, tally = read_sources(sources, concepts, known, seed)
    named = leaks([text for text in corpus.texts() if text.set != "lexical"], concepts)
    there = {name for text in corpus.texts() for name in text.concepts}
    left = [concept for concept in concepts if concept.name in there]
    left_out = [concept.name for concept in concepts if concept.name not in there and there]
    return Checked(count_sets(corpus, tally, named), corpus, left, left_out, named)


def in_words(checked: Checked, shown: int) -> str:
    """A report for the terminal.

    Args:
        shown: so many texts that name their concept are listed.
    """
    parts = [_sets(checked.sets), _concepts(checked)]
    if checked.left_out:
        parts.append(
            f"Left out, since a set has too few texts of them: {', '.join(checked.left_out)}\n"
            "(a run leaves them out with concepts: {missing: leave out}, and else stops)"
        )
    parts += [_power(checked), _leaks(checked, shown)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def as_json(checked: Checked) -> str:
    """The same as JSON, with every text that names its concept."""
    record = {
        "sets": [asdict(row) for row in checked.sets],
        "concepts": {c.name: _of(checked.corpus, c.name) for c in checked.concepts},
        "left_out": checked.left_out,
        "leaks": [leak._asdict() for leak in checked.leaks],
    }
    return json.dumps(record, indent=1, ensure_ascii=False)


def _of(corpus: Corpus, name: str) -> dict[str, int]:
    """By set, the texts of a concept."""
    parts: Mapping[str, tuple[Text, ...]] = dict(zip(ROLES, corpus, strict=True))
    count = {role: sum(name in text.concepts for text in texts) for role, texts in parts.items()}
    return {role: n for role, n in count.items() if role != "neutral" and parts[role]}


def _sets(sets: Sequence[TextSet]) -> str:
    head = ["set", "source", "language", "texts", "concepts", "groups", "units", "name it"]
    out = ("unlabelled", "duplicates", "unreadable", "beyond_limit")
    used = [name for name in out if any(getattr(row, name) for row in sets)]
    cells = [[*head, "rows", *(name.replace("_", " ") for name in used)] if used else head]
    for row in sets:
        numbers = [row.texts, row.concepts, row.topics, row.units, row.leaks]
        numbers += [row.read, *(getattr(row, name) for name in used)] if used else []
        cells.append([row.set, row.source, row.language, *(f"{n:,}" for n in numbers)])
    return markdown(cells, left=3)


def _concepts(checked: Checked) -> str:
    counts = {concept.name: _of(checked.corpus, concept.name) for concept in checked.concepts}
    if not counts:
        return ""
    roles = list(next(iter(counts.values())))
    ordered = sorted(counts, key=lambda name: min(counts[name].values()))
    cells = [["texts of", *roles]]
    cells += [[name, *(f"{counts[name][role]:,}" for role in roles)] for name in ordered]
    if all(len({row[i] for row in cells[1:]}) == 1 for i in range(1, len(roles) + 1)):
        cells = [cells[0], [f"each of {len(ordered)} concepts", *cells[1][1:]]]
    return markdown(cells)


def _power(checked: Checked) -> str:
    """How many confirmation texts a concept needs for which effect."""
    texts = checked.corpus.confirmation or checked.corpus.selection
    if not texts or len(checked.concepts) < 2:
        return ""
    topics = Counter(text.topic for text in texts)
    others = len(texts) // len(topics) - 1
    if others < 10:
        return ""
    tests = 2 * len(checked.concepts)  # a single latent and a set for each concept
    few, half = (inference.needed_texts(others, 0.05 / n) for n in (tests, 2))
    return (
        f"To find a concept when few others are found: {few}. "
        f"When half of all tests reject: {half}."
        f"{_too_few(checked, texts, others)}"
    )


def _too_few(checked: Checked, texts: Sequence[Text], others: int) -> str:
    """The concepts that could not be found at an AUROC of .95 when half of all tests reject."""
    try:
        least = inference.needed_positives(0.95, others, 0.05 / 2)
    except ValueError:
        return ""
    count = Counter(name for text in texts for name in text.concepts)
    few = [c.name for c in checked.concepts if count[c.name] < least]
    return f" Even then too few of: {', '.join(few)}." if few else ""


def _leaks(checked: Checked, shown: int) -> str:
    texts = {text.id: text.text for text in checked.corpus.texts() if text.set != "lexical"}
    if not checked.leaks:
        return (
            "No text outside the lexical set names a concept of its own (only word forms of the "
            "concept set are looked for)."
        )
    labelled = sum(bool(t.concepts) for t in checked.corpus.texts() if t.set != "lexical")
    share = len(checked.leaks) / labelled
    cells = [["text", "concept", "names it", "begins"]]
    for leak in checked.leaks[:shown]:
        start = " ".join(texts[leak.id].split())
        start = start if len(start) <= START else f"{start[: START - 3]}..."
        cells.append([leak.id, leak.concept, leak.form, start])
    rest = len(checked.leaks) - shown
    more = f"and {rest:,} more (--json lists all)\n" if rest > 0 else ""
    return (
        f"{len(checked.leaks):,} of {labelled:,} texts ({100 * share:.1f} %) name a concept of "
        f"their own: what is found on them may be the word and not the feeling.\n\n"
        f"{markdown(cells, left=4)}{more}"
    )
