"""The packaged concepts are whole, and a damaged file is refused in one line."""

import csv
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from discovery.concepts import CONCEPTS, NORMS, Concept, load_concepts, read_concepts
from saes.errors import UserError

ALL = load_concepts()
BY_NAME = {concept.name: concept for concept in ALL}

# sizes of the ten clusters of the original study
FAMILIES = {
    "Exuberant Joy": 20,
    "Peaceful Contentment": 9,
    "Compassionate Gratitude": 15,
    "Competitive Pride": 9,
    "Playful Amusement": 2,
    "Depleted Disengagement": 15,
    "Vigilant Suspicion": 3,
    "Hostile Anger": 25,
    "Fear and Overwhelm": 41,
    "Despair and Shame": 32,
}


def test_the_171_of_the_study() -> None:
    assert len(ALL) == 171
    assert [c.name for c in ALL] == sorted(c.name for c in ALL)
    assert Counter(c.family for c in ALL) == FAMILIES
    several = [c.name for c in ALL if " " in c.name or "-" in c.name]
    assert several == [
        "at ease",
        "grief-stricken",
        "on edge",
        "self-confident",
        "self-conscious",
        "self-critical",
        "worn out",
    ]
    assert {c.slug for c in ALL if " " in c.name} == {"at-ease", "on-edge", "worn-out"}


def test_norms_are_those_of_the_sources() -> None:
    assert sum(c.valence is not None for c in ALL) == 108
    assert sum(c.glasgow_exact for c in ALL) == 82
    assert sum(c.valence_vader is not None for c in ALL) == 140
    amused = BY_NAME["amused"]
    assert (amused.glasgow_match, amused.glasgow_exact) == ("amuse", False)
    assert (amused.valence, amused.arousal, amused.dominance) == (7.412, 6.059, 6.0)
    assert amused.valence_vader == 1.8
    assert BY_NAME["at ease"].valence is None


def test_norms_against_the_original_tables(shared_data: Path) -> None:
    with (shared_data / "norms" / "glasgow_norms.csv").open(newline="") as file:
        glasgow = {row["Word"]: row for row in csv.DictReader(file)}
    lines = (shared_data / "norms" / "vader_lexicon.txt").read_text().splitlines()
    vader = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines)}
    for c in ALL:
        if c.glasgow_match is not None:
            row = glasgow[c.glasgow_match]
            ratings = tuple(float(row[scale]) for scale in ("Valence", "Arousal", "Dominance"))
            assert ratings == (c.valence, c.arousal, c.dominance)
        if c.vader_match is not None:
            assert vader[c.vader_match] == c.valence_vader


def test_inflections_belong_to_one_concept_and_share_its_stem() -> None:
    forms = [form for c in ALL for form in c.inflections]
    assert len(forms) == len(set(forms)) > 700
    for c in ALL:
        for form in c.inflections:
            shared = SequenceMatcher(None, c.name, form, autojunk=False).find_longest_match().size
            assert shared >= 3 or form[:2] == c.name[:2], (c.name, form)
    assert "angrily" in BY_NAME["angry"].inflections
    assert "at her ease" in BY_NAME["at ease"].inflections
    assert "worn-out" in BY_NAME["worn out"].inflections
    assert "hope" not in BY_NAME["hopeful"].inflections


def distance(a: Concept, b: Concept) -> float:
    """Largest difference on a scale that both were rated on; inf if on none."""
    pairs = [
        (a.valence, b.valence),
        (a.arousal, b.arousal),
        (a.dominance, b.dominance),
        (a.valence_vader, b.valence_vader),
    ]
    return max((abs(x - y) for x, y in pairs if x is not None and y is not None), default=9)


def test_antonyms_are_opposite_in_the_human_norms() -> None:
    inside = [(c, BY_NAME[c.antonym]) for c in ALL if c.antonym in BY_NAME]
    assert len(inside) > 60
    for concept, antonym in inside:
        assert distance(concept, antonym) > 1.2, (concept.name, antonym.name)
    assert BY_NAME["happy"].antonym == "sad"
    assert BY_NAME["sad"].antonym == "happy"
    assert BY_NAME["nostalgic"].antonym is None


def test_names_select_in_file_order() -> None:
    assert [c.name for c in load_concepts(["sad", "afraid"])] == ["afraid", "sad"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["hapy"], "unknown concept 'hapy'; did you mean 'happy'"),
        (["Anger"], "unknown concept 'Anger'; did you mean 'angry'?"),
        (["xyzzy"], "unknown concept 'xyzzy'; known: afraid, alarmed"),
        (["sad", "sad"], "'sad' is named twice"),
        ([], "no concepts named"),
    ],
)
def test_names_that_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_concepts(names)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def replace(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
        return text.replace(old, new)

    return edit


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  afraid: {family: Fear", "  alarmed: {family: Fear", "the key 'alarmed' is there twice"),
        ("  - Vigilant Suspicion\n", "", "'paranoid' is in a family that is not listed"),
        ("  - Playful Amusement\n", "  - Playful Amusement\n  - Odd\n", "family 'Odd'"),
        ("[afraid]", "[scaredy, afraid]", "do not begin with 'afraid'"),
        ("[afraid]", "[]", "do not begin with 'afraid'"),
        ("[afraid]", "[afraid, Fear!]", "'Fear!' of 'afraid'"),
        ("[afraid]", "[afraid, anger]", "'anger' is a form of 'afraid' and again of 'angry'"),
        ("antonym: brave, inflections: [afraid]", "antonym: ~", "missing key 'inflections'"),
        ("antonym: carefree", "antonym: Care-free", "antonym 'Care-free' of 'brooding'"),
        ("antonym: carefree", "antonym: brooded", "is a form of 'brooding'"),
        ("antonym: carefree", "antonym: joy", "is a form of 'joyful'"),
        ("antonym: carefree", "antonym: hurt", "'hurt' is the antonym of 'brooding' but has none"),
        ("  at ease: {", "  at-ease: {", "begin with 'at-ease'"),
    ],
)
def test_a_damaged_concept_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "concepts.yaml"
    path.write_text(replace(old, new)(CONCEPTS.read_text()))
    with pytest.raises(UserError) as refused:
        read_concepts(path, NORMS)
    assert message in str(refused.value)
    assert "concepts.yaml" in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("word,glasgow_match", "word,match", "expected the columns word, glasgow_match"),
        ("\nangry,angry", "\nafraid,afraid", "a word has two rows"),
        ("\nat ease,", "\nat rest,", "'at ease' is not in both"),
        ("2.206,5.514", "9.206,5.514", "'afraid': glasgow_valence is 9.206, outside 1 to 9"),
        ("2.206,5.514", "nan,5.514", "glasgow_valence is nan"),
        ("2.206,5.514", "low,5.514", "could not convert string to float: 'low'"),
        ("2.206,5.514", ",5.514", "glasgow_match goes with all three ratings"),
        ("alarmed,-1.4", "alarmed,-4.1", "vader_valence is -4.1, outside -4 to 4"),
        ("alarmed,-1.4", ",-1.4", "vader_match goes with a rating"),
        ("amuse,0,", "amuse,1,", "'amused': glasgow_exact is '1'"),
    ],
)
def test_damaged_norms(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "norms.csv"
    path.write_text(replace(old, new)(NORMS.read_text()))
    with pytest.raises(UserError) as refused:
        read_concepts(CONCEPTS, path)
    assert message in str(refused.value)
    assert "norms.csv" in str(refused.value)
