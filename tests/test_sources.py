"""All sources become one corpus in which nothing is confirmed on what it was chosen on."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discovery.concepts import load_concepts
from discovery.corpora.packaged import load_corpus
from discovery.corpora.rows import ROLES, Corpus
from discovery.corpora.sources import Loaded, Source, load_corpora
from saes.errors import UserError

EKMAN = load_concepts(source="ekman")
NAMES = [concept.name for concept in EKMAN]
NEUTRAL = Source("packaged", "neutral")
NOUNS = [
    "letter", "garden", "harbour", "engine", "market", "window", "violin", "ladder", "orchard",
    "kettle", "bridge", "lantern", "station", "mirror", "blanket", "hammer", "island", "curtain",
]  # fmt: skip


def rows(n: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Texts of all concepts in turn, of words of their own."""
    rng = np.random.default_rng(seed)
    return [
        {"text": f"{' '.join(rng.choice(NOUNS, 9))} {seed}{i}", "label": NAMES[i % 6], **more}
        for i in range(n)
    ]


def put(folder: Path, name: str, content: list[dict[str, Any]], **options: Any) -> Source:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return Source(str(path), **{"role": "selection", **options})


def load(*sources: Source, **options: Any) -> Loaded:
    return load_corpora([*sources, NEUTRAL], EKMAN, **options)


def sizes(corpus: Corpus) -> list[int]:
    return [len(texts) for texts in corpus]


def accounted(loaded: Loaded) -> bool:
    """Whether every row that was read is in the corpus or counted as left out."""
    return all(
        s.read == s.texts + s.unlabelled + s.duplicates + s.unreadable + s.beyond_limit
        for s in loaded.sets
    )


# -------------------------------------------------------------------------------- names of files


def test_a_file_is_called_by_its_stem_unless_two_share_it(tmp_path: Path) -> None:
    a, b = (tmp_path / name for name in ("a", "b"))
    for folder in (a, b):
        folder.mkdir()
    one = put(a, "test", rows(24), role="selection")
    two = put(b, "test", rows(24, seed=1), role="confirmation")
    three = put(b, "more", rows(24, seed=2), role="selection")
    loaded = load(one, two, three)
    assert {s.source for s in loaded.sets} == {"a/test", "b/test", "more", "packaged"}
    assert loaded.corpus.confirmation[0].id == "b/test:1"
    alone = load(one, put(b, "packaged", rows(24, seed=3), role="confirmation"))
    assert {s.source for s in alone.sets} == {"test", "b/packaged", "packaged"}
    assert str(tmp_path) not in repr(loaded.corpus)


# ------------------------------------------------------------------------------- packaged corpus


def test_the_packaged_corpus_is_as_it_was() -> None:
    loaded = load_corpora()
    assert loaded.corpus == load_corpus()
    assert loaded.concepts == load_concepts()
    assert not loaded.crossfit
    assert loaded.leaks == []
    assert [(s.set, s.texts, s.topics, s.units) for s in loaded.sets] == [
        ("selection", 2052, 12, 7),
        ("confirmation", 2052, 12, 6),
        ("situations", 513, 0, 513),
        ("neutral", 180, 12, 12),
        ("lexical", 1368, 0, 1368),
    ]
    assert accounted(loaded)
    for a, b in ((loaded, load_corpora([Source("packaged")])), (loaded, load_corpora(seed=1))):
        assert a.digest == b.digest
    some = load_corpora(concepts=load_concepts()[:5])
    assert some.digest != loaded.digest
    assert sizes(some.corpus) == [60, 60, 15, 180, 40]


def test_roles_of_the_packaged_corpus_can_be_mixed(tmp_path: Path) -> None:
    roles = ("selection", "confirmation", "neutral")
    loaded = load_corpora([Source("packaged", role) for role in roles])
    assert sizes(loaded.corpus) == [2052, 2052, 0, 180, 0]
    mine = put(tmp_path, "mine", [{"text": "Oh well.", "label": "sad"}], role="situations")
    with pytest.raises(UserError, match="the situations set has 0 texts of 'afraid' and needs 1"):
        load_corpora([Source("packaged", role) for role in roles] + [mine])


def test_the_roles_of_a_folder_are_its_own() -> None:
    with pytest.raises(
        UserError, match="packaged: limit is for other sources; a corpus folder says"
    ):
        load_corpora([Source("packaged", limit=3)])
    with pytest.raises(UserError, match="packaged: a corpus folder has its own sets; give it the"):
        load_corpora([Source("packaged", "split"), NEUTRAL])


# ----------------------------------------------------------------------------- selection and more


def test_two_files(tmp_path: Path) -> None:
    first = put(tmp_path, "first", rows(60))
    second = put(tmp_path, "second", rows(30, 1), role="confirmation")
    loaded = load(first, second)
    assert sizes(loaded.corpus) == [60, 30, 0, 180, 0]
    assert [s.source for s in loaded.sets[:2]] == [
        "first",
        "second",
    ]
    assert accounted(loaded)
    assert loaded.digest == load(first, second).digest
    assert loaded.digest != load(put(tmp_path, "first", rows(60)[::-1]), second).digest


def test_near_duplicates_leave_the_selection_set(tmp_path: Path) -> None:
    first, second = rows(60), rows(30, 1)
    first[7]["text"] = second[3]["text"].upper()
    first[8]["text"] = second[4]["text"] + " now"
    first[10]["text"] = first[9]["text"]
    second.append(second[0])
    a, b = put(tmp_path, "a", first), put(tmp_path, "b", second, role="confirmation")
    loaded = load(a, b)
    assert [(s.texts, s.duplicates) for s in loaded.sets[:2]] == [(57, 3), (30, 1)]
    assert {t.id[-2:] for t in load(a, b).corpus.selection}.isdisjoint({":8", ":9", "11"})
    assert accounted(loaded)
    exact = load(Source(a.source, "selection", near_duplicates=1.0), b)
    assert [(s.texts, s.duplicates) for s in exact.sets[:2]] == [(58, 2), (30, 1)]


def test_texts_of_a_folder_are_never_left_out(tmp_path: Path) -> None:
    packaged = load_corpus(roles=["neutral"]).neutral[0].text
    a = put(tmp_path, "a", [*rows(60), {"text": packaged, "label": "joy"}])
    loaded = load(a, put(tmp_path, "b", rows(30, 1), role="confirmation"))
    assert sizes(loaded.corpus) == [60, 30, 0, 180, 0]


def test_halves_of_one_file(tmp_path: Path) -> None:
    content = [row | {"who": f"w{i % 20}"} for i, row in enumerate(rows(240))]
    one = put(tmp_path, "one", content, role="split", writer_column="who")
    loaded = load(one)
    parts = (loaded.corpus.selection, loaded.corpus.confirmation)
    assert sum(map(len, parts)) == 240
    assert not {t.writer for t in parts[0]} & {t.writer for t in parts[1]}
    for part in parts:
        assert min(Counter(t.concept for t in part).values()) >= 12
    assert accounted(loaded)
    assert loaded.corpus == load(one).corpus
    assert loaded.corpus != load(one, seed=1).corpus


def test_several_files_are_split_together(tmp_path: Path) -> None:
    content = [row | {"who": f"w{i % 20}"} for i, row in enumerate(rows(240))]
    options = {"role": "split", "writer_column": "who"}
    whole = load(
        put(tmp_path, "one", content[:100], **options),
        put(tmp_path, "two", content[100:], **options),
    )
    assert not {t.writer for t in whole.corpus.selection} & {
        t.writer for t in whole.corpus.confirmation
    }
    assert accounted(whole)


def test_one_corpus_to_be_cross_fitted(tmp_path: Path) -> None:
    content = rows(60)
    content[1]["text"] = content[0]["text"] + " now"
    loaded = load(put(tmp_path, "one", content, role="crossfit"))
    assert loaded.crossfit
    assert sizes(loaded.corpus) == [59, 0, 0, 180, 0]  # folds do not share near-duplicates
    assert loaded.sets[0].duplicates == 1


def test_leaks_are_kept_and_counted(tmp_path: Path) -> None:
    content = rows(60)
    content[0]["text"] += " such anger"
    content[1]["text"] += " such anger"  # of a text on disgust: no leak
    loaded = load(put(tmp_path, "a", content), put(tmp_path, "b", rows(30, 1), role="confirmation"))
    assert [(leak.form, leak.concept, leak.set) for leak in loaded.leaks] == [
        ("anger", "anger", "selection")
    ]
    assert [s.leaks for s in loaded.sets] == [1, 0, 0]


def test_a_lexical_source(tmp_path: Path) -> None:
    words = [{"text": f"the word {name} {i} {noun}", "label": name}
             for name in NAMES for i, noun in enumerate(NOUNS[:2])]  # fmt: skip
    both = [put(tmp_path, "a", rows(60)), put(tmp_path, "b", rows(30, 1), role="confirmation")]
    loaded = load(*both, put(tmp_path, "w", words, role="lexical", near_duplicates=1.0))
    assert sizes(loaded.corpus) == [60, 30, 0, 180, 12]
    assert loaded.leaks == []
    with pytest.raises(UserError, match="the lexical set has 1 text of 'surprise' and needs 2"):
        load(*both, put(tmp_path, "w", words[:-1], role="lexical", near_duplicates=1.0))


def test_labels_of_concepts_outside_the_run(tmp_path: Path) -> None:
    sources = [put(tmp_path, "a", rows(60)), put(tmp_path, "b", rows(30, 1), role="confirmation")]
    loaded = load_corpora([*sources, NEUTRAL], EKMAN[:3])
    assert sizes(loaded.corpus) == [30, 15, 0, 180, 0]
    assert [s.unlabelled for s in loaded.sets] == [30, 15, 0]
    (tmp_path / "mine.yaml").write_text("concepts: {" + ", ".join(f"{n}: ~" for n in NAMES) + "}")
    mine = load_concepts(source=str(tmp_path / "mine.yaml"))
    assert load_corpora([*sources, NEUTRAL], mine[:3], known=mine).corpus == loaded.corpus
    with pytest.raises(UserError, match="the label 'joy' is no concept of this set"):
        load_corpora([*sources, NEUTRAL], mine[:3])


# -------------------------------------------------------------------------------------- bad input


def test_concepts_without_texts(tmp_path: Path) -> None:
    short = [row for row in rows(60) if row["label"] not in ("fear", "joy")]
    sources = [put(tmp_path, "a", short), put(tmp_path, "b", rows(30, 1), role="confirmation")]
    with pytest.raises(UserError) as refused:
        load(*sources)
    assert "the selection set has 0 texts of 'fear' and needs 2 (and 1 more concepts" in str(
        refused.value
    )
    loaded = load(*sources, missing="leave out")
    assert [c.name for c in loaded.concepts] == ["anger", "disgust", "sadness", "surprise"]
    assert sizes(loaded.corpus) == [40, 20, 0, 180, 0]
    assert [s.unlabelled for s in loaded.sets] == [0, 10, 0]
    assert accounted(loaded)


@pytest.mark.parametrize("role", ["crossfit", "selection"])
def test_concepts_of_one_unit_cannot_be_cross_fitted(tmp_path: Path, role: str) -> None:
    writers = [f"w{i % 5}" if i % 6 != 1 else "x" for i in range(60)]
    content = [row | {"who": who} for row, who in zip(rows(60), writers, strict=True)]
    sources = [put(tmp_path, "a", content, role=role, writer_column="who")]
    if role == "selection":
        sources.append(put(tmp_path, "b", rows(30, 1), role="confirmation"))
    with pytest.raises(
        UserError,
        match=f"selection set has 10 texts of '{NAMES[1]}', which share one unit .* texts of 2",
    ):
        load(*sources)
    loaded = load(*sources, missing="leave out")
    assert [c.name for c in loaded.concepts] == [name for name in NAMES if name != NAMES[1]]
    assert len(loaded.corpus.selection) == 50
    assert accounted(loaded)


def test_a_split_that_leaves_a_half_without_a_concept(tmp_path: Path) -> None:
    content = [
        row | {"g": "one" if row["label"] == "fear" else f"{i % 7}"}
        for i, row in enumerate(rows(240))
    ]
    one = put(tmp_path, "one", content, role="split", writer_column="g")
    with pytest.raises(
        UserError, match=r"has \d+ texts of 'fear'.*a split can't part the texts of one"
    ):
        load(one)
    assert "fear" not in {c.name for c in load(one, missing="leave out").concepts}
    with pytest.raises(UserError, match="no two concepts have texts in every set"):
        load(put(tmp_path, "two", rows(2), role="split"), missing="leave out")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (
            ["selection", "neutral"],
            "no source has the role confirmation: what is chosen on a corpus",
        ),
        (["confirmation", "neutral"], "no source has the role selection; name one to choose on"),
        (["split"], "add {source: packaged, role: neutral} to the corpora"),
        (["crossfit", "split", "neutral"], "crossfit is for a single corpus: with it there is no"),
        (["all"], "say what its texts are for (role: selection, confirmation"),
    ],
)
def test_roles_that_are_missing_or_too_many(tmp_path: Path, roles: list[str], message: str) -> None:
    sources = [put(tmp_path, f"{i}", rows(60, i), role=role) for i, role in enumerate(roles)]
    with pytest.raises(UserError) as refused:
        load_corpora(sources, EKMAN)
    assert message in str(refused.value)


def test_a_column_of_roles_without_one_of_them(tmp_path: Path) -> None:
    content = [row | {"set": "selection"} for row in rows(60)]
    one = put(tmp_path, "one", content, role="all", set_column="set")
    with pytest.raises(UserError, match="the confirmation set has no texts; give a source of that"):
        load(one)
    with pytest.raises(UserError, match=r"add \{source: packaged, role: neutral\}"):
        load_corpora([one], EKMAN)


def test_one_source_twice(tmp_path: Path) -> None:
    one = put(tmp_path, "one", rows(60))
    with pytest.raises(
        UserError, match="is there twice, with the roles selection and confirmation"
    ):
        load(one, Source(one.source, "confirmation"))


@pytest.mark.parametrize("column", ["group", "writer"])
def test_a_group_or_writer_on_both_sides(tmp_path: Path, column: str) -> None:
    options = {f"{column}_column": "g"}
    a = put(tmp_path, "a", rows(60, g="7"), **options)
    b = put(tmp_path, "b", rows(30, 1, g="7"), role="confirmation", **options)
    with pytest.raises(
        UserError, match=f"the {column} '7' is in the selection set and in the conf"
    ):
        load(a, b)


def test_groups_in_which_nothing_can_be_compared(tmp_path: Path) -> None:
    content = [row | {"g": f"{row['label']}{i // 6 % 2}"} for i, row in enumerate(rows(60))]
    a = put(tmp_path, "a", content, group_column="g")
    b = put(tmp_path, "b", rows(30, 1), role="confirmation")
    with pytest.raises(
        UserError, match="selection set: no group holds a text of 'anger' and a text"
    ):
        load(a, b)
    assert sizes(load(Source(a.source, "selection", writer_column="g"), b).corpus)[0] == 60


def test_nothing_to_tell_a_concept_from(tmp_path: Path) -> None:
    one = put(tmp_path, "one", [row | {"label": "joy, anger"} for row in rows(60)], role="split")
    with pytest.raises(UserError, match="selection set: every text is of 'anger', and a concept"):
        load(one, missing="leave out")
    with pytest.raises(
        UserError, match=r"the run has one concept \(anger\), and a concept is told"
    ):
        load_corpora([one, NEUTRAL], EKMAN[:1])


def test_concepts_that_the_packaged_corpus_lacks() -> None:
    with pytest.raises(UserError, match="packaged corpus has no texts of 'anger', only of the 171"):
        load_corpora(concepts=EKMAN)


def test_texts_that_make_no_halves(tmp_path: Path) -> None:
    content = [row | {"g": f"{i % 4}", "w": f"{i % 3}"} for i, row in enumerate(rows(60))]
    one = put(tmp_path, "one", content, role="split", group_column="g", writer_column="w")
    with pytest.raises(UserError, match="60 texts make no two halves, since groups and writ"):
        load(one)


def test_sets_are_in_the_order_of_the_roles(tmp_path: Path) -> None:
    b = put(tmp_path, "b", rows(30, 1), role="confirmation")
    loaded = load_corpora([NEUTRAL, b, put(tmp_path, "a", rows(60))], EKMAN)
    order = [ROLES.index(s.set) for s in loaded.sets]
    assert order == sorted(order)
