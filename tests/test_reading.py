"""One source becomes texts: columns, ids, spans, merged rows, limits, the hub."""

import json
from pathlib import Path
from typing import Any

import pytest

from discovery.concepts import load_concepts
from discovery.corpora import hub
from discovery.corpora.reading import Part, read
from discovery.corpora.rows import Text
from discovery.corpora.source import Source
from saes.errors import UserError

EKMAN = load_concepts(source="ekman")
ROWS = [
    {"text": " I won! ", "label": "joy", "by": "ann", "at": 1, "n": "a"},
    {"text": "They cheated.", "label": "anger, disgust", "by": None, "at": 2, "n": "b"},
    {"text": "It rained.", "label": "", "by": "bo", "at": 2, "n": "c"},
]


def put(folder: Path, rows: list[dict[str, Any]], name: str = "mine.jsonl") -> Source:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), "selection")


def go(source: Source, **changes: Any) -> Part:
    return read(Source(**{**vars(source), **changes}), EKMAN, EKMAN, 0)


def test_the_texts_of_a_file_without_a_mapping(tmp_path: Path) -> None:
    source = put(tmp_path, ROWS)
    part = go(source, writer_column="by", group_column="at", id_column="n", language="sv")
    label = "mine"
    assert part.texts == [
        Text(f"{label}:a", "I won!", ("joy",), "selection", "1", "ann", label, "sv"),
        Text(
            f"{label}:b", "They cheated.", ("anger", "disgust"), "selection", "2", "", label, "sv"
        ),
    ]
    assert part.tally == {("selection", label, "sv"): {"read": 3, "unlabelled": 1}}
    plain = go(source).texts
    assert [t.id for t in plain] == [f"{label}:1", f"{label}:2"]
    assert {(t.topic, t.writer, t.language) for t in plain} == {("", "", "en")}
    assert str(tmp_path) not in repr([vars(t) for t in plain])


def test_roles(tmp_path: Path) -> None:
    source = put(tmp_path, ROWS)
    for role in ("confirmation", "situations", "lexical"):
        assert {t.set for t in go(source, role=role).texts} == {role}
    for role in ("split", "crossfit"):
        assert {t.set for t in go(source, role=role).texts} == {"selection"}
    # without a mapping a neutral source needs no labels, and any that it has are not read
    neutral = go(source, role="neutral", label_column="nothing")
    assert [(t.concepts, t.set) for t in neutral.texts] == [((), "neutral")] * 3


def test_a_column_of_roles(tmp_path: Path) -> None:
    rows = [
        row | {"set": s}
        for row, s in zip(ROWS, ("selection", "confirmation", "neutral"), strict=True)
    ]
    texts = go(put(tmp_path, rows), role="all", set_column="set").texts
    assert [(t.set, t.concepts) for t in texts] == [
        ("selection", ("joy",)),
        ("confirmation", ("anger", "disgust")),
        ("neutral", ()),
    ]
    rows[1]["set"] = "test"
    with pytest.raises(UserError, match="line 2: 'set' is 'test', expected one of selection, conf"):
        go(put(tmp_path, rows), role="all", set_column="set")


def test_spans(tmp_path: Path) -> None:
    rows = [{"text": " I won!", "label": "joy", "a": 3, "b": 6}]
    rows += [{"text": "So sad.", "label": "sadness", "a": None, "b": None}]
    source = put(tmp_path, rows)
    first, second = go(source, span_columns=("a", "b")).texts
    assert first.span == (3, 6)
    assert first.text[slice(*first.span)] == "won"
    assert second.span is None
    for a, b, message in (
        (3, 9, "3 to 9 is not inside the text of 7"),
        (3, 3, "3 to 3"),
        ("x", 4, "'x'"),
    ):
        rows[0] |= {"a": a, "b": b}
        with pytest.raises(UserError, match=message):
            go(put(tmp_path, rows), span_columns=("a", "b"))


def test_several_annotators_of_one_text(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("merge: true\nlabels: {j: [joy], a: [anger], o: []}")
    rows = [{"text": t, "label": c} for t, c in (("X", "j"), ("Y", "a"), ("X", "a"), ("X", "o"))]
    part = go(put(tmp_path, rows), mapping=str(tmp_path / "m.yaml"))
    assert [(t.text, t.concepts) for t in part.texts] == [
        ("X", ("joy", "anger")),
        ("Y", ("anger",)),
    ]
    assert list(part.tally.values()) == [{"read": 4, "repeated": 1, "unlabelled": 1}]


def test_what_a_mapping_says_of_texts_and_languages(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        "text: t\nlabel: l\nreplace: {_comma_: ','}\nbroken: leave out\nlanguage_column: code\n"
        "labels: {j: [joy]}\nneutral: [n]"
    )
    rows = [
        {"t": "well_comma_ yes", "l": "j", "code": "de"},
        {"t": " ", "l": "j", "code": "de"},
        {"t": "ok", "l": "n", "code": ""},
    ]
    source = put(tmp_path, rows)
    part = go(source, mapping=str(tmp_path / "m.yaml"))
    assert [(t.text, t.language) for t in part.texts] == [("well, yes", "de")]
    label = "mine"
    assert part.tally == {
        ("selection", label, "de"): {"read": 2, "unreadable": 1},
        ("selection", label, "en"): {"read": 1, "unlabelled": 1},
    }
    neutral = go(source, mapping=str(tmp_path / "m.yaml"), role="neutral")
    assert [t.text for t in neutral.texts] == ["ok"]


def test_a_limit_is_counted(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "joy", "g": i // 5} for i in range(50)]
    part = go(put(tmp_path, rows), limit=12, group_column="g")
    assert len(part.texts) == 10
    assert list(part.tally.values()) == [{"read": 50, "beyond": 40}]
    with pytest.raises(UserError, match="the first whole group has more texts than the limit of 3"):
        go(put(tmp_path, rows), limit=3, group_column="g")


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": " "}, {}, "mine.jsonl, line 4: 'text' is empty; fill it, take the row out"),
        ({"text": 5}, {}, "line 4: 'text' is 5, expected a text"),
        ({"label": "joi"}, {}, "line 4: the label 'joi' is no concept of this set; did you mean"),
        ({"n": "a"}, {"id_column": "n"}, "line 4: the id 'a' is also that of "),
        (
            {},
            {"text_column": "body"},
            "line 1: no column 'body'; there are: text, label, by, at, n",
        ),
        ({}, {"writer_column": "who"}, "line 1: no column 'who'"),
        ({}, {"mapping": "goemotion"}, "no mapping 'goemotion'; did you mean 'goemotions'?"),
        ({}, {"label_column": "n", "mapping": "goemotions"}, "not for 'mine'; take one of these"),
    ],
)
def test_a_faulty_row(tmp_path: Path, row: dict[str, Any], changes: Any, message: str) -> None:
    source = put(tmp_path, [*ROWS, ROWS[0] | {"n": "d"} | row])
    (tmp_path / "mine.yaml").write_text("concepts: {joy: ~, anger: ~, disgust: ~}")
    mine = load_concepts(source=str(tmp_path / "mine.yaml"))
    with pytest.raises(UserError) as refused:
        read(Source(**{**vars(source), **changes}), mine, mine, 0)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_source_without_texts(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="gives no text for the role selection: of 1 rows, 1 have no"
    ):
        go(put(tmp_path, [{"text": "A", "label": ""}]))
    (tmp_path / "names.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"names\.csv has no rows"):
        go(Source(str(tmp_path / "names.csv"), "selection"))
    with pytest.raises(UserError, match=r"no file .*nowhere\.csv"):
        go(Source(str(tmp_path / "nowhere.csv"), "selection"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is neither a corpus of five files nor a dataset"):
        go(Source(str(tmp_path / "empty"), "selection"))
    with pytest.raises(UserError, match="is on this machine; leave out revision, of hub datasets"):
        go(put(tmp_path, ROWS), revision="main")


# -------------------------------------------------------------------------------------------- hub


@pytest.fixture
def dataset() -> Any:
    """As GoEmotions on the hub: numbers of classes, in lists."""
    import datasets

    names = ["admiration", "anger", "neutral"]
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "labels": datasets.Sequence(datasets.ClassLabel(names=names)),
            "id": datasets.Value("string"),
        }
    )
    rows = {"text": ["A", "B", "C"], "labels": [[1], [0, 1], [2]], "id": ["x", "y", "z"]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_dataset_of_the_hub_takes_its_mapping(
    dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of the hub first, then of the cache; never with leave to run its code."""
    import datasets

    asked: list[dict[str, Any]] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append({"name": name, "config": config, **options})
        if "download_config" not in options:
            raise ConnectionError("no route")
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_reached", lambda: True)
    name = "google-research-datasets/go_emotions"
    source = Source(name, "selection", hub_config="simplified", hub_split="test", revision="r")
    part = go(source)
    label = f"{name} simplified test"
    assert [(t.id, t.concepts) for t in part.texts] == [
        (f"{label}:x", ("anger",)),
        (f"{label}:y", ("joy", "anger")),
    ]
    assert [t.text for t in go(source, role="neutral").texts] == ["C"]
    assert [a.get("download_config") is not None for a in asked] == [False, True] * 2
    for a in asked:
        assert (a["config"], a["split"], a["revision"]) == ("simplified", "test", "r")
        assert "trust_remote_code" not in a


def test_a_hub_out_of_reach_is_not_asked_again(
    dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    off: list[tuple[bool, bool]] = []

    def load(*_: Any, **options: Any) -> Any:
        assert options["download_config"].local_files_only
        off.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        return dataset

    before = (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "_reached", lambda: False)
    part = go(Source("google-research-datasets/go_emotions", "selection"))
    assert [t.concepts for t in part.texts] == [("anger",), ("joy", "anger")]
    assert off == [(True, True)]
    assert before == (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)


def test_the_hub_out_of_reach() -> None:
    with pytest.raises(UserError) as refused:
        go(Source("someone/no_such_texts", "selection"))
    assert "no texts 'someone/no_such_texts': it is neither a file or folder" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_saved_dataset(dataset: Any, tmp_path: Path) -> None:
    import datasets

    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "splits")
    one = Source(str(tmp_path / "one"), "selection", "goemotions")
    assert [t.concepts for t in go(one).texts] == [("anger",), ("joy", "anger")]
    with pytest.raises(UserError, match="is one dataset without splits; leave out hub_split"):
        go(one, hub_split="test")
    splits = Source(str(tmp_path / "splits"), "selection", "goemotions", hub_split="test")
    assert [t.id for t in go(splits).texts] == ["splits test:x", "splits test:y"]
    with pytest.raises(UserError, match=r"no split 'train'; there are: test \(hub_split\)"):
        go(splits, hub_split="train")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match=r"dataset folder .* cannot be read"):
        go(one)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": " "}, "source is empty"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"near_duplicates": 0.5}, r"near_duplicates must be in \[0.6, 1\], not 0.5"),
        ({"span_columns": ("a",)}, "span_columns must be two"),
        ({"set_column": "s", "role": "split"}, "set_column gives texts their roles"),
    ],
)
def test_a_faulty_source(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(**{"source": "a.csv", **values})
