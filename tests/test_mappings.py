"""Every shipped mapping reads its dataset as it is written, and errors name what to mend."""

from collections import Counter
from pathlib import Path

import pytest

from discovery.concepts import Concept, concept_sets, load_concepts
from discovery.corpora.mappings import (
    LabelMapping,
    Meaning,
    Reader,
    describe,
    language,
    load_mapping,
    no_column,
    of_hub,
    shipped,
)
from discovery.corpora.reading import Part, read
from discovery.corpora.source import Source, SourceRole
from saes.errors import UserError

EKMAN = load_concepts(source="ekman")


def reader(
    mapping: LabelMapping | None, concepts: list[Concept] = EKMAN, run: list[Concept] | None = None
) -> Reader:
    return Reader(mapping, "mine", concepts if run is None else run, concepts)


def meaning(mapping: LabelMapping | None, cell: object, concepts: list[Concept] = EKMAN) -> Meaning:
    return reader(mapping, concepts).read({"label": cell}, "label", "f, line 1")


# -------------------------------------------------------------------------------- how labels read


@pytest.mark.parametrize(
    ("mapping", "cell", "concepts", "neutral"),
    [
        (None, "Anger", ("anger",), False),
        (None, "joy, anger,", ("joy", "anger"), False),
        (None, ["joy", "joy"], ("joy",), False),
        (None, "", (), False),
        (None, None, (), False),
        (LabelMapping(labels={"+": ("joy",), "-": ("anger", "fear")}), "-,+", "afj", False),
        (LabelMapping(labels={"+": ("joy",), "o": ()}), "o", (), False),
        (LabelMapping(ids={"0": "neutral", "1": "joy"}, neutral=("neutral",),
                      labels={"joy": ("joy",)}), [1, 0], ("joy",), False),
        (LabelMapping(ids={"0": "neutral"}, neutral=("neutral",), labels={}), "0", (), True),
        (LabelMapping(neutral=("none",), ignored=("other",), labels={}), "none,other", (), False),
        (LabelMapping(written="json", labels={"joy": ("joy",)}), '["joy"]', ("joy",), False),
        (LabelMapping(written="one", labels={"a, b": ("joy",)}), "a, b", ("joy",), False),
        (LabelMapping(separator="|", labels={"x": ("joy",), "y": ("fear",)}), "x|y", "jf", False),
        (LabelMapping(free=True, written="json"), '["joyful, angry", "Sad.", "fine"]', "jas",
         False),
        (LabelMapping(free=True, labels={"angry": ()}), "angry, happy", (), False),
        (LabelMapping(sets={"ekman": {"x": ("joy",)}, "pairs": {"x": ("love",)}}), "x", "j", False),
    ],
)  # fmt: skip
def test_what_a_cell_means(
    mapping: LabelMapping | None, cell: object, concepts: object, neutral: bool
) -> None:
    names = {"a": "anger", "f": "fear", "j": "joy", "s": "sadness"}
    expected = tuple(names[c] for c in concepts) if isinstance(concepts, str) else concepts
    assert meaning(mapping, cell) == (expected, neutral)


def test_label_columns_hold_from_a_threshold_on() -> None:
    mapping = LabelMapping(
        label=None, columns=("anger", "joy"), optional_columns=("joy",), threshold=2.0,
        neutral=("neutral",), labels={"anger": ("anger",), "joy": ("joy",)},
    )  # fmt: skip
    read_row = reader(mapping).read
    assert read_row({"anger": "1", "joy": "2"}, None, "").concepts == ("joy",)
    assert read_row({"anger": 3}, None, "").concepts == ("anger",)
    assert read_row({"anger": "", "joy": "1.5"}, None, "") == ((), True)
    with pytest.raises(UserError, match="line 2: no column 'anger'; there are: joy"):
        read_row({"joy": 1}, None, "line 2")
    with pytest.raises(UserError, match="line 2: 'anger' is 'much', expected a number"):
        read_row({"anger": "much"}, None, "line 2")


def test_labels_of_concepts_that_the_run_leaves_out_mean_nothing() -> None:
    some = reader(None, EKMAN, EKMAN[:1])
    assert some.read({"label": "anger,joy"}, "label", "") == (("anger",), False)
    assert some.read({"label": "joy"}, "label", "") == ((), False)


@pytest.mark.parametrize(
    ("mapping", "cell", "message"),
    [
        (None, "angr", "line 1: the label 'angr' is no concept of this set; did you mean 'anger'"),
        (None, "xyz", "'xyz' is no concept of this set; known: anger, disgust"),
        (LabelMapping(labels={"joy": ("joy",)}), "joi",
         "f, line 1: the label 'joi' is not in mapping mine; did you mean 'joy'? or add it there"),
        (LabelMapping(written="json", labels={}), "joy", "line 1: 'label' is no JSON list: 'joy'"),
    ],
)  # fmt: skip
def test_a_label_outside_the_set(mapping: LabelMapping | None, cell: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        meaning(mapping, cell)
    assert message in str(refused.value)


def test_long_lists_say_that_they_go_on() -> None:
    with pytest.raises(UserError, match=r"known: .* and 151 more; a mapping can translate it"):
        reader(None, load_concepts(), load_concepts()).read({"label": "3.0"}, "label", "line 2")
    with pytest.raises(UserError, match=r"^no mapping nowhere\.yaml; shipped: brighter, "):
        load_mapping("nowhere.yaml")


def test_an_unknown_concept_in_a_mapping() -> None:
    with pytest.raises(
        UserError, match="mapping mine, label 'x': unknown concept 'angry'; did you"
    ):
        reader(LabelMapping(labels={"x": ("angry",)}))
    with pytest.raises(UserError, match="has labels for the concept sets pairs, not for 'ekman'"):
        reader(LabelMapping(sets={"pairs": {}}))
    with pytest.raises(UserError, match="line 1: no column 'emotion'; there are: label"):
        reader(None).read({"label": "joy"}, "emotion", "line 1")


@pytest.mark.parametrize(
    ("header", "mark"), [("text;label", "semicolons"), ("text\tlabel", "tabs"), ("a|b", "bars")]
)
def test_one_column_hints_at_the_separator(header: str, mark: str) -> None:
    with pytest.raises(UserError, match=f"no column 'text', but one column .* parted by {mark}"):
        raise no_column("text", {header: ""}, "f, line 2")


# ------------------------------------------------------------------------------- mapping files


def test_a_label_may_mean_one_concept_without_a_list(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("labels: {glad: joy, both: [joy, anger], none: []}")
    assert load_mapping(str(path)).labels == {
        "glad": ("joy",), "both": ("joy", "anger"), "none": (),
    }  # fmt: skip
    path.write_text("sets: {ekman: {glad: joy}}")
    assert load_mapping(str(path)).sets == {"ekman": {"glad": ("joy",)}}
    path.write_text("labels: {glad: 3}")
    with pytest.raises(UserError, match="labels"):
        load_mapping(str(path))


def test_a_mapping_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("label: emotion\nlabels: {mad: [anger]}\n")
    assert load_mapping(str(path)) == LabelMapping(label="emotion", labels={"mad": ("anger",)})
    path.write_text("label: mood\nlabels: {mad: [anger]}\n")
    assert load_mapping(str(path)).label == "mood"  # read anew


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label: ~", "name the column of the labels (label), or the label columns"),
        ("labels: {mad: 3}", "mine.yaml.labels.mad: expected a list of texts, got 3"),
        ("lables: {}", "unknown key 'lables' in mine.yaml; did you mean 'labels'?"),
        ("columns: [a]\noptional_columns: [b]", "optional_columns names 'b', which is not in"),
        ("span: [a]", "span names 1 columns"),
        ("language_pattern: '('", "language_pattern '('"),
    ],
)
def test_a_faulty_mapping_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_mapping(str(path))
    assert message in str(refused.value)


def test_a_mapping_that_is_nowhere_or_refuses_its_dataset() -> None:
    with pytest.raises(UserError, match="no mapping 'goemotion'; did you mean 'goemotions'"):
        load_mapping("goemotion")
    for name in ("emobank", "empathic_reactions"):
        with pytest.raises(UserError, match=f"{name}: .* names no emotion"):
            load_mapping(name)


def test_the_shipped_mappings_name_concepts_that_there_are() -> None:
    known = {name: {c.name for c in load_concepts(source=name)} for name in concept_sets()}
    assert len(shipped()) == len(describe()) == 12
    for name, mapping in describe().items():
        assert mapping.about
        labels = set()
        for concept_set, table in (mapping.sets or {}).items():
            for label, meant in table.items():
                assert set(meant) <= known[concept_set], (name, concept_set, label)
            assert labels in (set(), set(table)), (name, concept_set)
            labels = set(table)
        every = {*(mapping.ids or {}).values(), *mapping.columns} - set(mapping.neutral)
        assert not labels or every <= labels, name
    assert of_hub("google-research-datasets/go_emotions") == "goemotions"
    assert of_hub("nobody/nothing") is None


@pytest.mark.parametrize(
    ("name", "file", "code"),
    [
        ("xed", "de-projections", "de"),
        ("xed", "cn-projections", "zh-hans"),
        ("xed", "fi-annotated", "fi"),
        ("xed_neutral", "neu_en", "en"),
        ("brighter", "hin_train", "hi"),
        ("brighter", "ptbr_dev", "pt-br"),
        ("brighter", "rus", "ru"),
        ("goemotions", "train", "en"),
    ],
)
def test_the_language_is_in_the_name_of_a_file(name: str, file: str, code: str) -> None:
    assert language(load_mapping(name), file) == code


# ---------------------------------------------------------------------- the development data


def part(folder: Path, files: str, mapping: str | None, concept_set: str, role: SourceRole) -> Part:
    concepts = load_concepts(source=concept_set)
    return read(Source(str(folder / files), role, mapping), concepts, concepts, 0)


@pytest.mark.parametrize(
    ("files", "mapping", "concept_set", "role", "texts", "left_out"),
    [
        ("emotion/goemotions/test.tsv", "goemotions", "goemotions27", "selection", 3821, 1606),
        ("emotion/goemotions/dev.tsv", "goemotions", "ekman", "selection", 3834, 1592),
        ("emotion/goemotions/test.tsv", "goemotions", "emotions171", "neutral", 1606, 3821),
        ("emotion/xed/zh-projections.tsv", "xed", "plutchik8", "selection", 645, 49),
        ("emotion/xed/neu_en.txt", "xed_neutral", "plutchik8", "neutral", 9674, 0),
        ("emotion/brighter/track_a/swe_*.csv", "brighter", "ekman", "selection", 1853, 722),
        ("emotion/brighter/track_b/eng_dev.csv", "brighter", "ekman", "selection", 102, 13),
        ("emotion/emolit/gold.tsv", "emolit", "goemotions27", "selection", 642, 85),
        ("emotion/event2mind/dev.csv.gz", "event2mind", "emotions171", "selection", 1645, 3756),
        ("emotion_stories/emotionscope_emotion_stories.jsonl", "emotionscope", "emotions171",
         "selection", 950, 50),
        ("emotion_stories/emotionscope_neutral_prompts.jsonl", None, "ekman", "neutral", 100, 0),
    ],
)  # fmt: skip
def test_a_file_of_the_development_data(
    shared_data: Path,
    files: str,
    mapping: str,
    concept_set: str,
    role: SourceRole,
    texts: int,
    left_out: int,
) -> None:
    given = part(shared_data, files, mapping, concept_set, role)
    assert len(given.texts) == texts
    count = Counter[str]()
    for tally in given.tally.values():
        count.update(tally)
    assert count["read"] == texts + left_out
    assert count["read"] == texts + sum(n for what, n in count.items() if what != "read")


@pytest.mark.slow
def test_every_file_of_the_development_data_loads(shared_data: Path) -> None:
    folders = {"goemotions": ("*.tsv", "goemotions"), "xed": ("*-*.tsv", "xed"),
               "brighter": ("*/*.csv", "brighter"), "emolit": ("*.tsv", "emolit"),
               "event2mind": ("*.gz", "event2mind")}  # fmt: skip
    languages = set()
    for folder, (files, mapping) in folders.items():
        for path in sorted((shared_data / "emotion" / folder).glob(files)):
            concept_set = "plutchik8" if mapping == "xed" else "emotions171"
            given = part(path.parent, path.name, mapping, concept_set, "selection")
            assert given.texts, path
            languages |= {text.language for text in given.texts}
    assert len(languages) == 18
