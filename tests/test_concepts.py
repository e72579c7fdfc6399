"""The packaged concepts are whole, and a damaged file is refused in one line."""

import csv
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from discovery.concepts import (
    DATA,
    DEFAULT,
    NORMS,
    Concept,
    concept_sets,
    load_concepts,
    read_concepts,
)
from saes.errors import UserError

ALL = load_concepts()
FILE = DATA / "concepts" / f"{DEFAULT}.yaml"
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
        ("antonym: brave, inflections: [afraid]", "norms: {arousal: 10}", "outside 1 to 9"),
        ("afraid: {family: Fear and Overwhelm,", "afraid: {", "'afraid' has no family"),
        ("antonym: carefree", "antonym: Care-free", "antonym 'Care-free' of 'brooding'"),
        ("antonym: carefree", "antonym: brooded", "is a form of 'brooding'"),
        ("antonym: carefree", "antonym: joy", "is a form of 'joyful'"),
        ("antonym: carefree", "antonym: hurt", "'hurt' is the antonym of 'brooding' but has none"),
        ("  at ease: {", "  at-ease: {", "begin with 'at-ease'"),
    ],
)
def test_a_damaged_concept_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "concepts.yaml"
    path.write_text(replace(old, new)(FILE.read_text()))
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
        read_concepts(FILE, path)
    assert message in str(refused.value)
    assert "norms.csv" in str(refused.value)


# ------------------------------------------------------------------------------------- other sets

SETS = {
    "emotions171": 171,
    "ekman": 6,
    "goemotions27": 27,
    "pairs": 10,
    "plutchik24": 24,
    "plutchik8": 8,
}


def test_the_shipped_sets() -> None:
    assert list(concept_sets()) == list(SETS)
    assert all(concept_sets().values())
    for name, size in SETS.items():
        concepts = load_concepts(source=name)
        assert len(concepts) == size
        assert {c.concept_set for c in concepts} == {name}
        assert name == "emotions171" or all(c.definition for c in concepts)


def test_the_sets_are_those_of_their_sources(shared_data: Path) -> None:
    labels = (shared_data / "emotion" / "goemotions" / "labels.txt").read_text().split()
    assert [c.name for c in load_concepts(source="goemotions27")] == labels[:-1]
    primary = [c.name for c in load_concepts(source="plutchik8")]
    assert {c.family for c in load_concepts(source="plutchik24")} == set(primary)
    assert set(primary) <= {c.name for c in load_concepts(source="plutchik24")}
    ekman = {c.name for c in load_concepts(source="ekman")}
    assert ekman == set(primary) - {"anticipation", "trust"}
    wheel = {c.name: c.antonym for c in load_concepts(source="plutchik24")}
    assert all(other is not None and wheel[other] == name for name, other in wheel.items())
    pairs = {c.name: c.antonym for c in load_concepts(source="pairs")}
    assert pairs["sadness"] == "joy"
    assert all(other is not None and pairs[other] == name for name, other in pairs.items())


def test_norms_inside_a_set_are_those_of_the_sources(shared_data: Path) -> None:
    with (shared_data / "norms" / "glasgow_norms.csv").open(newline="") as file:
        glasgow = {row["Word"]: row for row in csv.DictReader(file)}
    lines = (shared_data / "norms" / "vader_lexicon.txt").read_text().splitlines()
    vader = {word: float(mean) for word, mean, *_ in (line.split("\t") for line in lines)}
    for name in list(SETS)[1:]:
        for c in load_concepts(source=name):
            row = glasgow.get(c.name)
            rated = row and tuple(float(row[s]) for s in ("Valence", "Arousal", "Dominance"))
            assert (c.valence, c.arousal, c.dominance) == (rated or (None, None, None))
            assert c.glasgow_exact == (row is not None)
            assert c.valence_vader == vader.get(c.name)


def write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return str(folder / "mine.yaml")


def test_a_users_set_in_any_script(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
concepts:
  गुस्सा: {inflections: [गुस्सा, गुस्से], definition: क्रोध}
  悲しみ: {antonym: 喜び}
  喜び: {antonym: 悲しみ, norms: {valence: 8, vader: 2.5}, prompts: [やった]}
  l'amour:
""",
    )
    anger, sadness, joy, love = load_concepts(source=path)
    assert {c.family for c in (anger, sadness, joy, love)} == {"mine"}
    assert anger.inflections == ("गुस्सा", "गुस्से")
    assert anger.definition == "क्रोध"
    assert sadness.inflections == ("悲しみ",)
    assert (joy.valence, joy.arousal, joy.valence_vader) == (8, None, 2.5)
    assert (joy.glasgow_match, joy.glasgow_exact, joy.vader_match) == ("喜び", True, "喜び")
    assert joy.prompts == ("やった",)
    assert (love.name, love.valence, love.glasgow_match) == ("l'amour", None, None)
    assert [c.name for c in load_concepts(["喜び"], path)] == ["喜び"]
    with pytest.raises(UserError, match="unknown concept '喜'"):
        load_concepts(["喜"], path)


def test_norms_of_another_word_are_no_exact_match(tmp_path: Path) -> None:
    path = write(tmp_path, "concepts: {amused: {norms: {valence: 7.4, rated: amuse}}}")
    (amused,) = load_concepts(source=path)
    assert (amused.glasgow_match, amused.glasgow_exact) == ("amuse", False)
    assert (amused.valence_vader, amused.vader_match) == (None, None)


def test_families_keep_their_order_or_that_of_the_concepts(tmp_path: Path) -> None:
    text = "concepts: {a: {family: y}, b: {family: x}}"
    assert [c.family for c in load_concepts(source=write(tmp_path, text))] == ["y", "x"]
    assert load_concepts(source=write(tmp_path, f"families: [x, y]\n{text}"))[0].family == "y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concepts: {}", "it names no concepts"),
        ("families: [x]\nconcepts: {a: ~}", "'a' has no family"),
        ("concepts: {Freude: ~}", "'Freude' of 'Freude': write lower-case words"),
        ("concepts: {a: ~, b: {inflections: [b, a]}}", "'a' is a form of 'a' and again of 'b'"),
        ("concepts: {a: {norms: {vader: 5}}}", "vader is 5.0, outside -4 to 4"),
        ("concepts: {a: {norm: 5}}", "unknown key 'norm' in mine.yaml.concepts.a; did you mean"),
        ("concepts: [a]", "expected a mapping of names"),
    ],
)
def test_a_faulty_set(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_concepts(source=write(tmp_path, text))
    assert message in str(refused.value)
    assert "mine.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_set_that_is_nowhere() -> None:
    with pytest.raises(UserError, match="no concept set 'ekmann'; did you mean 'ekman'"):
        load_concepts(source="ekmann")
    with pytest.raises(UserError, match=r"no concept set nowhere\.yaml; shipped: ekman, "):
        load_concepts(source="nowhere.yaml")
