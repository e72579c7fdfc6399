"""The packaged corpus is what its README says, and a user's corpus is checked file by file."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from discovery.concepts import load_concepts
from discovery.corpora.leaks import leaks
from discovery.corpora.packaged import CORPUS, digest, load_corpus
from discovery.corpora.rows import Text
from saes.errors import UserError

CONCEPTS = load_concepts(["calm", "worn out"])
Rows = dict[str, list[dict[str, Any]]]


def story(topic: str, concept: str, writer: str) -> dict[str, Any]:
    name = f"{topic}/{concept}"
    return {
        "id": name,
        "text": f"What happened at the {name}.",
        "concept": concept,
        "topic": topic,
        "writer": writer,
        "mood": "a column that nobody asked for",
    }


def small() -> Rows:
    """By file, the rows of a corpus of two concepts that passes."""
    names = [concept.name for concept in CONCEPTS]
    return {
        "stories.jsonl": [
            story(t, c, "ab"[t > "t2"]) for t in ("t1", "t2", "t3", "t4") for c in names
        ],
        "stories_hard.jsonl": [story(t, c, "c") for t in ("u1", "u2", "u3", "u4") for c in names],
        "situations.jsonl": [{"id": f"s/{c}", "concept": c, "text": f"I, {c}."} for c in names],
        "neutral.jsonl": [{"id": "n", "topic": "t1", "text": "The train left at nine."}],
        "mentions.jsonl": [
            {"id": f"m{i}/{c}", "concept": c, "text": f"Entry {i}: {c}."}
            for i in (1, 2)
            for c in names
        ],
    }


def put(folder: Path, files: Rows) -> Path:
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_packaged_corpus() -> None:
    corpus = load_corpus()
    assert [len(texts) for texts in corpus] == [12 * 171, 12 * 171, 3 * 171, 12 * 15, 8 * 171]
    assert len(corpus.texts()) == sum(map(len, corpus))
    for text in corpus.texts():
        assert (text.concept == "") == (text.set == "neutral")
        assert (text.writer != "") == (text.set in ("selection", "confirmation"))
        assert (text.topic != "") == (text.set in ("selection", "confirmation", "neutral"))
    for stories, writers in ((corpus.selection, 7), (corpus.confirmation, 6)):
        assert len({t.writer for t in stories}) == writers
        assert set(Counter((t.topic, t.concept) for t in stories).values()) == {1}
    assert not {t.topic for t in corpus.selection} & {t.topic for t in corpus.confirmation}
    assert not {t.writer for t in corpus.selection} & {t.writer for t in corpus.confirmation}
    assert {t.topic for t in corpus.neutral} == {t.topic for t in corpus.selection}


def test_stories_and_situations_never_name_their_concept_and_mentions_always_do() -> None:
    corpus, concepts = load_corpus(), load_concepts()
    assert leaks(corpus.selection, concepts) == []
    assert leaks(corpus.confirmation, concepts) == []
    assert leaks(corpus.situations, concepts) == []
    assert leaks(corpus.neutral, concepts) == []
    assert [leak.id for leak in leaks(corpus.lexical, concepts)] == [t.id for t in corpus.lexical]


def test_only_the_texts_of_the_concepts_are_kept() -> None:
    corpus = load_corpus(concepts=CONCEPTS)
    assert [len(texts) for texts in corpus] == [24, 24, 6, 180, 16]
    assert {t.concept for t in corpus.selection} == {"calm", "worn out"}


def test_a_users_corpus(tmp_path: Path) -> None:
    corpus = load_corpus(put(tmp_path, small()), CONCEPTS)
    assert corpus.selection[0] == Text(
        id="t1/calm",
        text="What happened at the t1/calm.",
        concepts=("calm",),
        set="selection",
        topic="t1",
        writer="a",
        source=tmp_path.name,
    )
    (neutral,) = corpus.neutral
    assert (neutral.text, neutral.concepts, neutral.topic) == ("The train left at nine.", (), "t1")
    with (tmp_path / "stories.jsonl").open("a") as file:
        file.write("\n  \n")
    assert load_corpus(tmp_path, CONCEPTS) == corpus


def test_some_roles_need_only_their_files(tmp_path: Path) -> None:
    files = small()
    (tmp_path / "neutral.jsonl").write_text(json.dumps(files["neutral.jsonl"][0]))
    corpus = load_corpus(tmp_path, CONCEPTS, ["neutral"])
    assert [len(texts) for texts in corpus] == [0, 0, 0, 1, 0]
    with pytest.raises(UserError, match=r"no corpus file .*mentions\.jsonl"):
        load_corpus(tmp_path, CONCEPTS, ["neutral", "lexical"])
    unlike = load_concepts(source="ekman")
    assert len(load_corpus(concepts=unlike, roles=["neutral"]).neutral) == 180


def test_digest_covers_every_byte_of_the_five_files_and_nothing_else(tmp_path: Path) -> None:
    before = digest(put(tmp_path, small()))
    (tmp_path / "README.md").write_text("notes")
    assert digest(tmp_path) == before
    for name in small():
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(
            text.replace("calm", "Calm", 1) if "calm" in text else text + " "
        )
        assert digest(tmp_path) != before
        (tmp_path / name).write_text(text)
    assert digest(tmp_path) == before
    assert digest() == digest(CORPUS)
    (tmp_path / "neutral.jsonl").unlink()
    with pytest.raises(UserError, match=r"no corpus file .*neutral\.jsonl"):
        digest(tmp_path)


def change(file: str, row: int, **cells: object) -> Callable[[Rows], None]:
    return lambda files: files[file][row].update(cells)


def drop(file: str, row: int, column: str) -> Callable[[Rows], None]:
    return lambda files: files[file][row].pop(column) and None


def without(file: str, row: int) -> Callable[[Rows], None]:
    return lambda files: files[file].pop(row) and None


FIRST, HARD = "stories.jsonl", "stories_hard.jsonl"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            drop(FIRST, 1, "writer"),
            "stories.jsonl, line 2: missing column 'writer'; needed: id, text",
        ),
        (drop("neutral.jsonl", 0, "topic"), "neutral.jsonl, line 1: missing column 'topic'"),
        (change(FIRST, 2, concept=None), "stories.jsonl, line 3: unlabelled"),
        (change(HARD, 0, concept=""), "stories_hard.jsonl, line 1: unlabelled"),
        (change(FIRST, 0, concept="clam"), "line 1: unknown concept 'clam'; did you mean 'calm'"),
        (change(FIRST, 0, text=" \n"), "stories.jsonl, line 1: 'text' is ' \\n', expected a text"),
        (change(FIRST, 0, topic=7), "line 1: 'topic' is 7, expected a text"),
        (
            change("mentions.jsonl", 1, id="t1/calm"),
            "the id 't1/calm' is also in stories.jsonl, line 1",
        ),
        (
            change(HARD, 0, text="What happened at the t1/calm."),
            "stories_hard.jsonl, line 1: the text 'What happened at the t1/calm.' is also in",
        ),
        (without(FIRST, 0), "topic 't1' has no story of 'calm'"),
        (change(HARD, 1, concept="calm"), "topic 'u1' has 2 stories of 'calm'"),
        (lambda f: f.update({FIRST: f[FIRST][:6]}), "stories.jsonl has 3 topics; at least 4"),
        (
            lambda f: f.update(
                {HARD: [{**r, "topic": r["topic"].replace("u2", "t3")} for r in f[HARD]]}
            ),
            "stories_hard.jsonl: topic 't3' is also in stories.jsonl",
        ),
        (
            lambda f: [r.update(writer="a") for r in f[FIRST]] and None,
            "stories.jsonl has one writer",
        ),
        (
            without("situations.jsonl", 0),
            "situations.jsonl has 0 texts of 'calm' and needs 1",
        ),
        (without("mentions.jsonl", 0), "mentions.jsonl has 1 texts of 'calm' and needs 2"),
        (
            lambda f: f.update({"mentions.jsonl": f["mentions.jsonl"][:2]}),
            "mentions.jsonl has 1 texts of 'calm' and needs 2",
        ),
    ],
)
def test_a_faulty_corpus(tmp_path: Path, break_it: Callable[[Rows], None], message: str) -> None:
    files = small()
    break_it(files)
    with pytest.raises(UserError) as refused:
        load_corpus(put(tmp_path, files), CONCEPTS)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "stories.jsonl is empty"),
        (b"\n \n", "stories.jsonl is empty"),
        (b'{"id": "a"\n', "stories.jsonl, line 1: not JSON"),
        (b'\n["a"]\n', 'stories.jsonl, line 2: expected a JSON object, got ["a"]'),
        (b"\xff\xfe", "stories.jsonl: not a text file in UTF-8"),
    ],
)
def test_a_file_that_is_no_json_lines(tmp_path: Path, content: bytes, message: str) -> None:
    put(tmp_path, small())
    (tmp_path / "stories.jsonl").write_bytes(content)
    with pytest.raises(UserError) as refused:
        load_corpus(tmp_path, CONCEPTS)
    assert message in str(refused.value)


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no corpus folder .*nowhere; give a folder that holds"):
        load_corpus(tmp_path / "nowhere")
    put(tmp_path, small())
    with pytest.raises(UserError, match=r"stories\.jsonl has no story of 'sad'; leave the concept"):
        load_corpus(tmp_path, load_concepts(["calm", "sad"]))
    (tmp_path / "situations.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"no corpus file .*situations\.jsonl; a corpus folder holds"
    ):
        load_corpus(tmp_path, CONCEPTS)
