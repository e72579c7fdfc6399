"""`emotion-atlas discover` and `discover(...)` on a tiny model: own texts, one corpus, controls."""

import contextlib
import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import yaml

import emotion_atlas
from discovery.captured import load
from discovery.corpora.source import Source
from discovery.discover import discover
from discovery.evaluate import KINDS, Discovery
from discovery.settings import AlignConfig, ConceptsConfig, OutputConfig
from saes.errors import UserError
from saes.track import NullTracker

if TYPE_CHECKING:
    from saes.lm.model import LM

LABELS = ("anger", "fear", "joy", "sadness")  # in the order of the set
WORDS = {"joy": "sun", "anger": "door", "fear": "dark", "sadness": "rain"}


@pytest.fixture(scope="module")
def comments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of short texts in threads by several writers, and some without any feeling."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "comments.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["body", "feeling", "thread", "author"])
        for thread in range(12):
            for n in range(10):
                label = LABELS[n % 4]
                filler = " ".join(rng.choice(["the", "cat", "walked", "home", "and", "sat"], 8))
                body = f"{filler} {WORDS[label]} {filler[::-1]} {thread} {n}"
                writer.writerow([body, label, f"t{thread}", f"w{thread // 2}"])
    return path


@pytest.fixture(scope="module")
def config(
    tiny_lm_folder: Path,
    tiny_sae_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A config that names no texts of its own."""
    settings = {
        "run": "unset",
        "subject": {
            "model": str(tiny_lm_folder),
            "saes": [str(folder) for folder in tiny_sae_folders.values()],
            "trust": True,  # their weights are random
            "threads": 1,
        },
        "concepts": {"set": "ekman", "names": list(LABELS)},
        "contrast": {"halves": 4},
        "capture": {"poolings": ["mean", "max"], "long": "chunk"},
        "align": {"k": 4, "draws": 100, "ks": [1, 4]},
        "output": {"candidates": 1, "prompts": 2, "prompt_tokens": 40, "controls": 2},
        "track": {"backend": "jsonl"},
    }
    path = tmp_path_factory.mktemp("config") / "discover.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def arguments(config: Path, comments: Path, run: Path) -> list[str]:
    columns = ("--text-column", "body", "--label-column", "feeling", "--group-column", "thread",
               "--writer-column", "author")  # fmt: skip
    return ["discover", str(config), "--run", str(run), "--corpus", str(comments), *columns]


class Made(NamedTuple):
    run: Path
    out: str  # what was printed


@pytest.fixture(scope="module")
def made(config: Path, comments: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A finished `discover` of a file of one's own."""
    run, out = tmp_path_factory.mktemp("made") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert emotion_atlas.main(arguments(config, comments, run)) == 0
    return Made(run, out.getvalue())


def test_a_file_of_ones_own(made: Made) -> None:
    run = made.run
    assert str(run / "discovery" / "report.html") in made.out
    assert "browse" not in made.out  # there is no catalog yet
    found = Discovery.load_run(run)
    assert [row.concept for row in found.alignments] == list(LABELS)
    assert {row.pooling for row in found.site_choices} == {"mean", "max"}
    assert [row.set for row in found.sets] == ["selection", "confirmation", "neutral"]
    assert sum(row.texts for row in found.sets[:2]) == 120
    assert all(row.source.endswith("comments") for row in found.sets[:2])
    texts = load(run / "capture").texts
    threads = {s: {t.topic for t in texts if t.set == s} for s in ("selection", "confirmation")}
    writers = {s: {t.writer for t in texts if t.set == s} for s in ("selection", "confirmation")}
    assert threads["selection"]
    assert not threads["selection"] & threads["confirmation"]
    assert not writers["selection"] & writers["confirmation"]
    assert all(row.lexical_auroc is None for row in found.alignments)
    methods = {row.method for row in found.scores}
    assert methods >= {
        *("latent", "set", "vector", "probe", "tfidf", "embedding", "random"),
        *("untrained", "untrained set", "randomised", "randomised set"),
    }
    words = [row.auroc for row in found.scores
             if (row.method, row.set) == ("tfidf", "confirmation")]  # fmt: skip
    assert min(words) > 0.9  # each label has a word of its own
    kinds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tables = {row["name"] for row in kinds if row["kind"] == "table"}
    assert {"summary", "alignments"} <= tables


def test_a_run_goes_on_from_a_discovery(
    config: Path, comments: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`run` on the same config and folder keeps what `discover` made."""
    tree = yaml.safe_load(config.read_text())
    tree["corpora"] = [
        {"source": str(comments), "role": "split", "text_column": "body",
         "label_column": "feeling", "group_column": "thread", "writer_column": "author"},
        {"source": "packaged", "role": "neutral"},
    ]  # fmt: skip
    tree["causal"] = {"concepts": 2, "doses": [0.5], "prompts": 2, "prompt_tokens": 40,
                      "controls": 2}  # fmt: skip
    path, run = tmp_path / "own.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(tree))
    assert emotion_atlas.main(["discover", str(path), "--run", str(run)]) == 0
    capsys.readouterr()
    assert emotion_atlas.main(["run", str(path), "--run", str(run)]) == 0
    error = capsys.readouterr().err
    assert "align was done before" in error
    assert (run / "catalog" / "catalog.sqlite").exists()


def test_a_run_of_the_config_alone_is_told_the_way_on(
    config: Path,
    made: Made,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After `discover CONFIG --corpus FILE`, `run CONFIG` is another run; RUN/config.yaml is it."""
    run = made.run
    assert emotion_atlas.main(["run", str(config), "--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert "corpora is [" in error
    assert f"give its own config, {run / 'config.yaml'};" in error
    assert len(error) < 400 + 3 * len(str(run))
    shown: list[object] = []

    def tracker(*given: object) -> NullTracker:
        shown.append(given[2])
        return NullTracker()

    monkeypatch.setattr(emotion_atlas, "open_tracker", tracker)
    assert emotion_atlas.main(["discover", str(run / "config.yaml")]) == 0
    (tree,) = shown
    assert str(run.parents[1]) in (run / "config.yaml").read_text()
    assert str(run.parents[1]) not in json.dumps(tree)  # others see no folder of this machine
    assert "align was done before" in capsys.readouterr().err


def test_discover_in_a_notebook(
    tiny_lm: "LM",
    tiny_sae_folders: dict[str, Path],
    comments: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from saes.pretrained import load_sae

    saes = [load_sae(str(path), d_model=tiny_lm.d_model) for path in tiny_sae_folders.values()]
    columns: dict[str, Any] = {
        "text_column": "body", "label_column": "feeling", "group_column": "thread",
    }  # fmt: skip
    found = discover(
        tiny_lm,
        saes,
        [Source(str(comments), "crossfit", **columns), {"source": "packaged", "role": "neutral"}],
        ConceptsConfig("ekman", LABELS),
        align=AlignConfig(k=4, draws=100, ks=(1, 4)),
        output=OutputConfig(candidates=1, prompts=2, prompt_tokens=40, controls=2),
    )
    assert len(found.outputs) == len(LABELS)
    assert found.alignment("joy").reverse_auroc is None
    with pytest.raises(UserError, match=r"'Joyy' is not in this discovery; did you mean 'joy'\?"):
        found.alignment("Joyy")
    with pytest.raises(UserError, match="known: anger, fear, joy, sadness"):
        found.alignment("xxx")
    assert re.fullmatch(r"Discovery\(4 concepts: \d found, .*\)", repr(found))
    lines = found.summary().splitlines()
    assert lines[0].startswith("4 concepts: ")
    assert re.fullmatch(r"shuffled within topic: \d found, .* not found", lines[1])
    assert re.fullmatch(r"site blocks\.\d\.hook_resid_post, pooling rule", lines[2])
    rows = {row[0]: row[1:] for line in lines if (row := cells(line))}
    assert rows["mean AUROC"] == ["selection set", "confirmation set"]
    for method in ("latent", "tfidf", "randomised set"):
        for text, name in zip(rows[method], ("selection", "confirmation"), strict=True):
            values = [s.auroc for s in found.scores if (s.method, s.set) == (method, name)]
            assert text == f"{np.mean(values):.2f}"
    bars = capsys.readouterr().err
    assert {"shuffles: ", "shuffles of the null run: "} <= set(
        re.findall(r"shuffles[a-z ]*: ", bars)
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []


def test_a_summary_has_the_set_beside_the_single_latent(made: Made) -> None:
    found = Discovery.load_run(str(made.run))
    first, second, *rest = found.alignments
    first = replace(first, verdict="found", auroc=0.876, set_auroc=0.912)
    second = replace(second, verdict="found as a set", set_auroc=0.801)
    text = replace(found, alignments=[second, first, *rest]).summary()
    rows = [row for line in text.splitlines() if (row := cells(line))]
    head, _, one, two = rows[:4]
    assert (head[2], head[3], head[-1]) == ("latent", "AUROC", "set AUROC")
    assert one[:4] == [first.concept, "found", str(first.latent), "0.88"]
    assert one[-1] == "0.91"
    assert (two[0], two[2], two[3], two[-1]) == (second.concept, "set", "0.80", "0.80")


@pytest.mark.parametrize(
    ("labels", "writers", "message"),
    [
        (LABELS * 6, ["w"] * 24, "all 24 texts of the selection set share one unit"),
        ((*LABELS[:3] * 8, "sadness"), "abcdefgh" * 3 + "a", "has 1 text of 'sadness' and needs 2"),
        (
            (*LABELS[:3] * 8, "sadness", "sadness"),
            "abcdefgh" * 3 + "aa",
            "has 2 texts of 'sadness', which share one unit .* and needs texts of 2",
        ),
    ],
)
def test_texts_that_cannot_be_judged_are_refused_before_anything_is_written(
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    labels: tuple[str, ...],
    writers: Sequence[str],
    message: str,
) -> None:
    path, run = tmp_path / "few.csv", tmp_path / "runs" / "run"
    rows = [
        f"{' '.join(f'w{i}x{j}' for j in range(8))},{label},{writer}"
        for i, (label, writer) in enumerate(zip(labels, writers, strict=True))
    ]
    path.write_text("\n".join(["text,label,by", *rows]))
    options = ["--corpus", str(path), "--role", "crossfit", "--writer-column", "by"]
    assert emotion_atlas.main(["discover", str(config), "--run", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1])
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("capture.poolings=[mean,span]", "no text of the selection or confirmation set has a span"),
        ("capture.poolings=[position-Assistant]", "no line that begins with 'Assistant:'"),
        ("capture.poolings=[from-200]", "too few for the pooling 'from-200'"),
        ("align.q=0.01", "align.shuffles is 40, but an align.q of 0.01 takes at least 200"),
    ],
)
def test_settings_that_the_texts_cannot_serve_are_refused_before_anything_is_written(
    config: Path,
    comments: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    message: str,
) -> None:
    run = tmp_path / "runs" / "run"
    line = [*arguments(config, comments, run), "--role", "crossfit", "--set", setting]
    assert emotion_atlas.main(line) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert not run.parent.exists()


def test_the_options_of_a_corpus_need_one(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["discover", str(config), "--run", str(tmp_path / "run"), "--mapping", "goemotions"]
    assert emotion_atlas.main(line) == 2
    assert "--mapping says something of --corpus" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_discovery_is_saved_and_loaded(tmp_path: Path) -> None:
    empty = Discovery(**{kind: [] for kind in KINDS})
    assert repr(empty).startswith("Discovery(0 concepts: 0 found, ")
    assert empty.summary().startswith("0 concepts: 0 found, ")
    folder = tmp_path / "new" / "folder"
    empty.save(str(folder))
    assert Discovery.load(str(folder)) == empty == Discovery.load(folder)
    (folder / "scores.parquet").unlink()
    with pytest.raises(UserError, match=r"scores\.parquet"):
        Discovery.load(folder)
    with pytest.raises(UserError, match="cannot make the folder"):
        empty.save(folder / "cross.parquet" / "x")
    with pytest.raises(UserError, match="none"):
        empty.alignment("joy")


@pytest.mark.parametrize(
    ("saes", "more", "message"),
    [
        (["x"], {"concepts": "no-such-set"}, "no-such-set"),
        ([], {}, "name at least one SAE"),
        (["x"], {"corpora": {"source": "packaged", "rolle": "all"}}, r"'rolle' in corpora\[0\]"),
        (["x"], {"corpora": [Path("no/file.csv")]}, r"no/file\.csv"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(
    saes: list[str], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        discover("no-such-model", saes, **more)


def test_the_tables_say_in_one_line_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scripts import discovery_tables

    line = ["--data", str(tmp_path / "none"), "--runs", str(tmp_path), "--only", "goemotions"]
    assert discovery_tables.main(line) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("discovery_tables: error: ")
    assert "train.tsv" in error
