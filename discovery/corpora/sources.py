"""One corpus out of all sources: split, freed of near-duplicates, and checked. No torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from discovery.concepts import SETS, Concept, load_concepts
from discovery.corpora.duplicates import repeated
from discovery.corpora.leaks import Leak, leaks
from discovery.corpora.packaged import MIN_MENTIONS, load_corpus
from discovery.corpora.packaged import SOURCE as PACKAGED
from discovery.corpora.reading import Key, Part, Tally, file_labels, is_folder, read
from discovery.corpora.rows import ROLES, Corpus, Role, Text, by_role
from discovery.corpora.source import Source, SourceRole
from discovery.corpora.split import halves
from discovery.labels import units_of
from discovery.records import TextSet
from saes.errors import UserError

__all__ = ["Loaded", "Source", "SourceRole", "load_corpora"]

# a text that is in two roles stays in the first of these
PRECEDENCE: tuple[Role, ...] = ("confirmation", "situations", "selection", "lexical", "neutral")
NEUTRAL = "{source: packaged, role: neutral}"


class Loaded(NamedTuple):
    """One corpus out of all sources, and what was left out on the way."""

    corpus: Corpus
    concepts: list[Concept]
    """Those asked for, less those left out because a set has too few texts of them."""
    sets: list[TextSet]
    """What each source gave to each set. `cut` and `chunked` are 0: the capture stage counts."""
    digest: str
    """SHA-256, hex, of all texts and what is known of them."""
    crossfit: bool
    """There is one corpus, all in `corpus.selection`, to be cross-fitted."""
    leaks: list[Leak]
    """Texts outside the lexical set that name a concept of theirs; they are kept."""


def load_corpora(
    sources: Sequence[Source] = (Source(PACKAGED),),
    concepts: Sequence[Concept] | None = None,
    *,
    known: Sequence[Concept] | None = None,
    seed: int = 0,
    missing: Literal["error", "leave out"] = "error",
) -> Loaded:
    """Read all sources and make one corpus of them.

    Texts that repeat a text of another role are left out: of confirmation, situations, selection,
    lexical, neutral the first keeps them. So are equal texts of one role, and of a corpus that is
    cross-fitted all that repeat another, since folds must not share them. Texts of a corpus folder
    are never left out.

    Args:
        sources: at least one for selection and confirmation (or split, or crossfit alone) and one
            for neutral; situations and lexical are optional.
        concepts: of the run, all of one set; None for the 171.
        known: the whole set that `concepts` are a part of, so that labels of the others are known;
            None for the shipped set of that name, or for `concepts`.
        seed: of splits and samples.
        missing: what to do with a concept of which a set has too few texts.

    Raises:
        UserError: a source that cannot be read or gives no text, a role without a source, a group
            or writer in both selection and confirmation, a concept without texts, or texts that
            cannot be compared.
    """
    concepts = load_concepts() if concepts is None else concepts
    known = _whole(concepts) if known is None else known
    if len(concepts) < 2:
        names = ", ".join(concept.name for concept in concepts)
        raise UserError(
            f"the run has one concept ({names}), and a concept is told from others: name more"
        )
    _check_roles(sources)
    parts = _read_all(sources, concepts, known, seed)
    tally = _total([part.tally for part in parts])
    texts = _split(sources, [part.texts for part in parts], tally, seed)
    _check_ids(texts)
    crossfit = any(source.role == "crossfit" for source in sources)
    texts = _without_repeats(texts, _thresholds(sources), crossfit, tally)
    corpus, left = _cover(by_role(texts), concepts, crossfit, missing, tally)
    _check_apart(corpus)
    for role in ("selection",) if crossfit else ("selection", "confirmation"):
        _check_comparable(role, getattr(corpus, role), left)
    named = leaks([t for t in corpus.texts() if t.set != "lexical"], left)
    sets = count_sets(corpus, tally, named)
    return Loaded(corpus, left, sets, _digest(corpus), crossfit, named)


def _digest(corpus: Corpus) -> str:
    total = hashlib.sha256()
    for text in corpus.texts():
        total.update(json.dumps(vars(text)).encode() + b"\n")
    return total.hexdigest()


def _whole(concepts: Sequence[Concept]) -> Sequence[Concept]:
    name = concepts[0].concept_set if concepts else ""
    shipped = load_concepts(source=name) if (SETS / f"{name}.yaml").is_file() else []
    return shipped if set(concepts) <= set(shipped) else concepts


def whole_roles(sources: Sequence[Source]) -> bool:
    """Whether the sources have all the roles that a run needs."""
    try:
        _check_roles(sources)
    except UserError:
        return False
    return True


def read_sources(
    sources: Sequence[Source], concepts: Sequence[Concept], known: Sequence[Concept], seed: int
) -> tuple[Corpus, Tally]:
    """Read sources of any roles and do nothing else; what would be split is in the selection set.

    Raises:
        UserError: a source that cannot be read or gives no text.
    """
    parts = _read_all(sources, concepts, known, seed)
    texts = (text for part in parts for text in part.texts)
    return by_role(texts), _total([part.tally for part in parts])


def _check_roles(sources: Sequence[Source]) -> None:
    """What is missing is said before anything is read."""
    roles = {source.role for source in sources}
    whole = "all" in roles
    if "crossfit" in roles and (other := roles & {"all", "selection", "confirmation", "split"}):
        raise UserError(
            f"crossfit is for a single corpus: with it there is no source of role {min(other)}"
        )
    if not whole and not roles & {"selection", "split", "crossfit"}:
        raise UserError(
            "no source has the role selection; name one to choose on and one of role confirmation "
            "to confirm on, or give a single corpus the role split or crossfit"
        )
    if not whole and not roles & {"confirmation", "split", "crossfit"}:
        raise UserError(
            "no source has the role confirmation: what is chosen on a corpus is confirmed on "
            "another; a single corpus takes the role split or crossfit"
        )
    if not whole and "neutral" not in roles:
        raise UserError(_no_neutral())


def _no_neutral() -> str:
    return f"no source has the role neutral, texts without feeling; add {NEUTRAL} to the corpora"


def _read_all(
    sources: Sequence[Source], concepts: Sequence[Concept], known: Sequence[Concept], seed: int
) -> list[Part]:
    names = file_labels(sources)
    return [_read(source, concepts, known, seed, names) for source in sources]


def _read(
    source: Source,
    concepts: Sequence[Concept],
    known: Sequence[Concept],
    seed: int,
    names: Mapping[Path, str],
) -> Part:
    folder = is_folder(source)
    if source.source != PACKAGED and folder is None:
        if source.role == "all" and source.set_column is None:
            raise UserError(
                f"{source.source}: say what its texts are for (role: selection, confirmation, "
                "split, crossfit, situations, neutral, lexical), or in which column that stands "
                "(set_column)"
            )
        return read(source, concepts, known, seed, names)
    if source.role in ("split", "crossfit"):
        raise UserError(
            f"{source.source}: a corpus folder has its own sets; give it the role all or one of "
            f"{', '.join(ROLES)}, or name one of its files"
        )
    plain = Source(source.source, source.role)
    for name, value in vars(source).items():
        if value != getattr(plain, name):
            raise UserError(
                f"{source.source}: {name} is for other sources; a corpus folder says by itself "
                "what its texts are, and keeps them all"
            )
    if source.source == PACKAGED:
        folder = None
        strange = {concept.name for concept in concepts} - {one.name for one in load_concepts()}
        if strange and source.role != "neutral":
            raise UserError(
                f"the packaged corpus has no texts of {min(strange)!r}, only of the 171 concepts "
                "of emotions171; name texts of yours under corpora (or --corpus), and of the "
                f"packaged ones the neutral: {NEUTRAL}"
            )
    roles = ROLES if source.role == "all" else (source.role,)
    texts = load_corpus(folder, concepts, [role for role in ROLES if role in roles]).texts()
    tally: Tally = {}
    for text in texts:
        tally.setdefault((text.set, text.source, text.language), Counter()).update(["read"])
    return Part(texts, tally)


def _total(tallies: Sequence[Tally]) -> Tally:
    """All counts together."""
    total: Tally = {}
    for tally in tallies:
        for key, count in tally.items():
            total.setdefault(key, Counter()).update(count)
    return total


def _split(
    sources: Sequence[Source], texts: Sequence[list[Text]], tally: Tally, seed: int
) -> list[list[Text]]:
    """The texts of each source; those of role split in halves, over all such sources at once."""
    at = [i for i, source in enumerate(sources) if source.role == "split"]
    pool = [text for i in at for text in texts[i]]
    if not pool:
        return list(texts)
    flags = halves(pool, seed)
    if not flags.any():
        raise UserError(
            f"{', '.join(sources[i].source for i in at)}: {len(pool)} texts make no two halves, "
            "since groups and writers that may not be split tie them all together; name other "
            "columns, or give the role crossfit or a second source"
        )
    second = iter(flags.tolist())
    result = list(texts)
    for i in at:
        result[i] = [
            replace(text, set="confirmation") if next(second) else text for text in texts[i]
        ]
        for text in result[i]:
            if text.set == "confirmation":
                key: Key = ("confirmation", text.source, text.language)
                tally.setdefault(key, Counter())["read"] += 1
                tally["selection", text.source, text.language]["read"] -= 1
    return result


def _check_ids(texts: Sequence[list[Text]]) -> None:
    seen: dict[str, str] = {}
    for part in texts:
        here = {text.id: text.set for text in part}
        for name in here.keys() & seen.keys():
            raise UserError(
                f"text {name!r} is there twice, with the roles {seen[name]} and {here[name]}; take "
                "a source once (files of one name in folders of one name need other names)"
            )
        seen |= here


def _thresholds(sources: Sequence[Source]) -> list[float | None]:
    """Of each source, the overlap from which a text is left out; None for a corpus folder."""
    folders = [source.source == PACKAGED or is_folder(source) is not None for source in sources]
    return [
        None if folder else source.near_duplicates
        for source, folder in zip(sources, folders, strict=True)
    ]


def _without_repeats(
    texts: Sequence[list[Text]],
    thresholds: Sequence[float | None],
    crossfit: bool,
    tally: Tally,
) -> list[Text]:
    every = [
        (text, threshold)
        for part, threshold in zip(texts, thresholds, strict=True)
        for text in part
    ]
    if all(threshold is None for threshold in thresholds):
        return [text for text, _ in every]
    # texts of a folder come first: they stay
    order = sorted(
        range(len(every)),
        key=lambda i: (every[i][1] is not None, PRECEDENCE.index(_role(every[i][0]))),
    )
    ranked = [every[i] for i in order]
    # the texts of a corpus that is cross-fitted are compared with each other too: each is a place
    found = repeated(
        [text.text for text, _ in ranked],
        [
            -i if crossfit and text.set == "selection" else PRECEDENCE.index(_role(text))
            for i, (text, _) in enumerate(ranked, start=1)
        ],
        [1.0 if threshold is None else threshold for _, threshold in ranked],
    )
    out = {
        i
        for i, (_, threshold), before in zip(order, ranked, found, strict=True)
        if before is not None and threshold is not None
    }
    for i in out:
        text = every[i][0]
        tally[text.set, text.source, text.language]["repeated"] += 1
    return [text for i, (text, _) in enumerate(every) if i not in out]


def _role(text: Text) -> Role:
    return next(role for role in ROLES if role == text.set)


def _cover(
    corpus: Corpus,
    concepts: Sequence[Concept],
    crossfit: bool,
    missing: Literal["error", "leave out"],
    tally: Tally,
) -> tuple[Corpus, list[Concept]]:
    """The corpus and the concepts that its sets cover.

    Raises:
        UserError: a set without texts, or a concept with too few texts in a set that needs them.
    """
    if not corpus.neutral:
        raise UserError(_no_neutral())
    needed: dict[str, int] = {"selection": 2}  # units: one to choose on and one to score
    needed |= {} if crossfit else {"confirmation": 1}
    needed |= {"situations": 1} if corpus.situations else {}
    needed |= {"lexical": MIN_MENTIONS} if corpus.lexical else {}
    lacking: dict[str, str] = {}
    for role, least in needed.items():
        texts: tuple[Text, ...] = getattr(corpus, role)
        if not texts:
            raise UserError(f"the {role} set has no texts; give a source of that role")
        count = Counter(name for text in texts for name in text.concepts)
        units = _units_of_concepts(texts) if role == "selection" else count
        for concept in concepts:
            n = count[concept.name]
            fault = f"the {role} set has {n} text{'' if n == 1 else 's'} of {concept.name!r}"
            if n < least:
                lacking.setdefault(concept.name, f"{fault} and needs {least}")
            elif units[concept.name] < least:
                lacking.setdefault(
                    concept.name,
                    f"{fault}, which share one unit (texts that share a group or a writer do), and "
                    f"needs texts of {least}",
                )
    if not lacking:
        return corpus, list(concepts)
    if missing == "error":
        fault = next(iter(lacking.values()))
        others = f" (and {len(lacking) - 1} more concepts lack texts)" if len(lacking) > 1 else ""
        raise UserError(
            f"{fault}{others}; add some (a split can't part the texts of one group or writer), "
            "name the other concepts, or leave such concepts out (concepts: missing: leave out)"
        )
    left = [concept for concept in concepts if concept.name not in lacking]
    if len(left) < 2:
        raise UserError(f"{next(iter(lacking.values()))}; no two concepts have texts in every set")
    return _only(corpus, {concept.name for concept in left}, tally), left


def _units_of_concepts(texts: Sequence[Text]) -> Counter[str]:
    """Of how many units the texts of each concept are. Where all texts share one unit, how many
    texts there are: `discovery.selection` says of such a set that it has one."""
    units = _units(texts)
    if len(set(units)) == 1:
        units = list(range(len(texts)))
    pairs = zip(texts, units, strict=True)
    return Counter(name for name, _ in {(c, unit) for text, unit in pairs for c in text.concepts})


def _units(texts: Sequence[Text]) -> list[int]:
    return units_of([t.topic for t in texts], [t.writer for t in texts]).tolist()


def _only(corpus: Corpus, names: Collection[str], tally: Tally) -> Corpus:
    """The texts of some concepts, and the neutral ones."""
    kept: list[Text] = []
    for text in corpus.texts():
        own = tuple(name for name in text.concepts if name in names)
        if own or text.set == "neutral":
            kept.append(text if own == text.concepts else replace(text, concepts=own))
        else:
            tally[text.set, text.source, text.language]["unlabelled"] += 1
    return by_role(kept)


def _check_apart(corpus: Corpus) -> None:
    for what in ("topic", "writer"):
        first = {getattr(text, what) for text in corpus.selection}
        both = first & {getattr(text, what) for text in corpus.confirmation} - {""}
        if both:
            column = "group" if what == "topic" else what
            raise UserError(
                f"the {column} {min(both)!r} is in the selection set and in the confirmation set; "
                "what is chosen on one is confirmed on texts that are independent of it: give both "
                "sources the role split, or take the texts out of one"
            )


def _check_comparable(role: str, texts: Sequence[Text], concepts: Sequence[Concept]) -> None:
    """Texts are compared within groups: of each concept, one group must hold texts with and
    without it."""
    size = Counter(text.topic for text in texts)
    inside: dict[str, Counter[str]] = {concept.name: Counter() for concept in concepts}
    for text in texts:
        for name in text.concepts:
            inside[name][text.topic] += 1
    for name, count in inside.items():
        if all(n == size[topic] for topic, n in count.items()):
            if set(size) == {""}:
                raise UserError(
                    f"{role} set: every text is of {name!r}, and a concept is told from texts "
                    "without it; add some"
                )
            raise UserError(
                f"{role} set: no group holds a text of {name!r} and a text without it, and texts "
                "are compared within groups; where groups should only not be split, name their "
                "column as writer_column"
            )


def count_sets(corpus: Corpus, tally: Tally, named: Sequence[Leak]) -> list[TextSet]:
    """What each source gave to each set, and what was left out.

    Args:
        tally: counts of `discovery.corpora.reading`.
        named: texts that name a concept of theirs.
    """
    leaked = {leak.id for leak in named}
    inside: dict[Key, list[Text]] = {key: [] for key in tally}
    for text in corpus.texts():
        inside[text.set, text.source, text.language].append(text)
    rows: list[TextSet] = []
    for (role, source, language), texts in inside.items():
        count = tally[role, source, language]
        rows.append(
            TextSet(
                set=role,
                source=source,
                language=language,
                texts=len(texts),
                concepts=len({name for text in texts for name in text.concepts}),
                topics=len({text.topic for text in texts} - {""}),
                units=len(set(_units(texts))),
                read=count["read"],
                unlabelled=count["unlabelled"],
                duplicates=count["repeated"],
                leaks=sum(text.id in leaked for text in texts),
                cut=0,
                chunked=0,
                unreadable=count["unreadable"],
                beyond_limit=count["beyond"],
            )
        )
    order: dict[str, int] = {role: i for i, role in enumerate(ROLES)}
    return sorted(rows, key=lambda row: order[row.set])
