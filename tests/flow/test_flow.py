"""Whole runs through the front door, on a tiny model: results, resuming, and bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import emotion_atlas
from discovery import records
from discovery.corpora.packaged import CORPUS
from discovery.records import Alignment, Control, Effect
from labeling.catalog import FILE, Catalog

CONCEPTS = ("afraid", "angry", "calm", "happy", "sad", "tired")
STAGES = (
    "capture", "contrast", "align", "output", "discovery",
    "compare", "causal", "label", "catalog", "report",
)  # fmt: skip
ROOT = Path(emotion_atlas.__file__).parent


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged corpus, cut to six concepts, four topics a set and short texts."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in ("stories", "stories_hard", "situations", "neutral", "mentions"):
        rows = rows_of(CORPUS / f"{file}.jsonl")
        if file.startswith("stories"):
            writers: dict[str, list[str]] = {}
            for row in rows:
                topics = writers.setdefault(row["writer"], [])
                if row["topic"] not in topics:
                    topics.append(row["topic"])
            keep = [topics[0] for topics in writers.values()][:4]
            rows = [r for r in rows if r["topic"] in keep and r["concept"] in CONCEPTS]
        elif file == "neutral":
            rows = rows[::12]
        else:
            rows = [r for r in rows if r["concept"] in CONCEPTS]
        write_rows(folder / f"{file}.jsonl", [r | {"text": r["text"][:240]} for r in rows])
    return folder


@pytest.fixture(scope="module")
def config(
    corpus: Path,
    tiny_lm_folder: Path,
    tiny_sae_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A config like the demo's, for the tiny model."""
    settings = {
        "run": "unset",
        "subject": {
            "model": str(tiny_lm_folder),
            "saes": [str(folder) for folder in tiny_sae_folders.values()],
            "trust": True,  # their weights are random
            "threads": 1,
        },
        "concepts": {"names": list(CONCEPTS)},
        "corpora": [{"source": str(corpus)}],
        "contrast": {"halves": 4},
        "align": {"k": 4, "draws": 100},
        "output": {"candidates": 2, "prompts": 2, "prompt_tokens": 40, "controls": 2},
        "causal": {"concepts": 2, "doses": [0.5], "prompts": 2, "prompt_tokens": 40, "controls": 2},
        "label": {"contexts": 2, "promoted": 3},
        "track": {"backend": "wandb", "mode": "offline"},
    }
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never interrupted. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert emotion_atlas.main(["run", str(config), "--run", str(folder)]) == 0
    return folder


def outputs(run: Path) -> dict[str, bytes]:
    """All that must be the same bytes whatever happened on the way."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for stage in STAGES
        for path in sorted((run / stage).rglob("*"))
        if path.is_file()
    }


def test_a_run_leaves_every_result(finished: Path) -> None:
    verdicts = records.read(finished / "align" / "alignments.parquet", Alignment)
    assert [row.concept for row in verdicts] == list(CONCEPTS)
    controls = records.read(finished / "align" / "controls.parquet", Control)
    assert [control.labels for control in controls] == ["true", "shuffled within topic"]
    effects = records.read(finished / "causal" / "effects.parquet", Effect)
    assert {effect.condition for effect in effects} == {"feature", "vector", "random"}
    catalog = Catalog(finished / FILE)
    assert sum(catalog.verdict_counts().values()) == len(CONCEPTS)
    for row in catalog.concepts():
        page = catalog.concept(row.concept.slug)
        assert page is not None
        assert catalog.feature(row.alignment.site, row.alignment.latent) is not None
    assert "Emotion Atlas" in (finished / "report" / "report.html").read_text()
    kinds = [row["kind"] for row in rows_of(finished / "metrics.jsonl")]
    assert {"metrics", "summary", "table", "finish"} <= set(kinds)


def test_a_second_run_keeps_every_stage(
    finished: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = outputs(finished)
    start = time.perf_counter()
    assert emotion_atlas.main(["run", str(config), "--run", str(finished)]) == 0
    assert time.perf_counter() - start < 5
    assert "nothing left to do" in capsys.readouterr().out
    assert outputs(finished) == before


def command(config: Path, run: Path) -> list[str]:
    return [sys.executable, str(ROOT / "emotion_atlas.py"), "run", str(config), "--run", str(run)]


def kill_when(config: Path, run: Path, sign: Callable[[], bool], how: signal.Signals) -> int:
    """Start the run in a process of its own, and send a signal once `sign()` holds."""
    process = subprocess.Popen(
        command(config, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not sign() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(how)
    return process.wait(timeout=120)


STOPPING = """
import os, pathlib, signal, sys
stage, *arguments = sys.argv[1:]
mkdir = pathlib.Path.mkdir
def stopping(path, *args, **kwargs):
    mkdir(path, *args, **kwargs)
    if path.name == f".{stage}.part":
        os.kill(os.getpid(), signal.SIGSTOP)
pathlib.Path.mkdir = stopping
import emotion_atlas
sys.exit(emotion_atlas.main(arguments))
"""


def kill_at(config: Path, run: Path, stage: str, how: signal.Signals) -> int:
    """Start the run in a process that stops itself as the stage begins; send it a signal there."""
    arguments = [stage, "run", str(config), "--run", str(run)]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "it ended before the stage began"
    process.send_signal(how)
    process.send_signal(signal.SIGCONT)
    return process.wait(timeout=120)


@pytest.mark.parametrize(
    ("stage", "how", "code"),
    [("contrast", signal.SIGKILL, -signal.SIGKILL), ("causal", signal.SIGINT, 130)],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stage: str, how: signal.Signals, code: int, finished: Path, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert kill_at(config, run, stage, how) == code
    assert not (run / stage).exists()
    assert not (run / "report").exists()
    assert emotion_atlas.main(["run", str(config), "--run", str(run)]) == 0
    assert outputs(run) == outputs(finished)


@pytest.mark.slow
def test_kills_at_any_moment(finished: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    killed, partly = 0, 0
    for seconds in (0.5, *np.linspace(2, 8, 10)):
        end = time.perf_counter() + seconds
        code = kill_when(config, run, lambda end=end: time.perf_counter() > end, signal.SIGKILL)
        killed += code == -signal.SIGKILL
        partly += (run / "config.yaml").exists() and not (run / "report").exists()
    assert killed > 2
    assert partly > 0
    assert emotion_atlas.main(["run", str(config), "--run", str(run)]) == 0
    assert outputs(run) == outputs(finished)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a refusal with exit code 2."""
    capsys.readouterr()
    assert emotion_atlas.main(list(arguments)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("emotion-atlas: error: ")
    assert sum("error" in line for line in lines) == 1
    return lines[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("colour=red", "unknown key 'colour'"),
        ("align.k=many", "align.k"),
        ("subject.model=/no/such/folder", "/no/such/folder"),
        ("subject.saes=[/no/such/sae]", "/no/such/sae"),
        ("subject.device=abacus", "abacus"),
        ("concepts.names=[afraid, calm, hapy]", "'hapy'"),
        ("corpora.0.source=/no/such/corpus", "/no/such/corpus"),
        ("align.k=1000", "align.k"),
        ("causal.max_tokens=10", "max_tokens"),
        ("causal.controls=127", "causal.controls"),
        ("causal.prompts=1000", "1000 neutral prompts"),
        ("causal.prompt_tokens=1", "longer prompts"),
    ],
)
def test_bad_settings_are_refused(
    change: str, said: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = refused(capsys, "run", str(config), "--run", str(run), "--set", change)
    assert said in line
    assert not run.exists()


def test_a_model_without_tokenizer_is_refused(
    tiny_lm_folder: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_lm_folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    line = refused(
        capsys, "run", str(config), "--run", str(tmp_path / "r"), "--set", f"subject.model={bare}"
    )
    assert "tokenizer" in line
    assert not (tmp_path / "r").exists()


def test_a_sae_of_another_width_is_refused(
    tiny_sae_folder: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    wide = tmp_path / "wide"
    shutil.copytree(tiny_sae_folder, wide)
    cfg = json.loads((wide / "cfg.json").read_text())
    (wide / "cfg.json").write_text(json.dumps(cfg | {"d_in": 48}))
    weights = load_file(wide / "sae_weights.safetensors")
    weights |= {
        "W_enc": torch.zeros(48, 128),
        "W_dec": torch.zeros(128, 48),
        "b_dec": torch.zeros(48),
    }
    save_file(weights, wide / "sae_weights.safetensors")
    line = refused(
        capsys, "run", str(config), "--run", str(tmp_path / "r"), "--set", f"subject.saes=[{wide}]"
    )
    assert "48" in line
    assert "32" in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("column", ["text", "concept", "topic", "writer"])
def test_a_missing_column_is_refused(
    column: str, corpus: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    rows = rows_of(broken / "stories.jsonl")
    del rows[3][column]
    write_rows(broken / "stories.jsonl", rows)
    line = refused(
        capsys,
        "run",
        str(config),
        "--run",
        str(tmp_path / "r"),
        "--set",
        f"corpora.0.source={broken}",
    )
    assert column in line
    assert "line 4" in line
    assert not (tmp_path / "r").exists()


def test_an_empty_corpus_is_refused(
    corpus: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "corpus"
    shutil.copytree(corpus, broken)
    (broken / "stories_hard.jsonl").write_text("")
    line = refused(
        capsys,
        "run",
        str(config),
        "--run",
        str(tmp_path / "r"),
        "--set",
        f"corpora.0.source={broken}",
    )
    assert "stories_hard.jsonl" in line


def test_a_run_folder_of_another_config_is_refused(
    finished: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = outputs(finished)
    line = refused(capsys, "run", str(config), "--run", str(finished), "--set", "seed=7")
    assert "seed" in line
    assert outputs(finished) == before


def test_a_damaged_file_is_named(
    finished: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "align" / "scores.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    line = refused(capsys, "run", str(config), "--run", str(run))
    assert "scores.parquet" in line
    shutil.rmtree(run / "align")
    assert emotion_atlas.main(["run", str(config), "--run", str(run)]) == 0
    assert outputs(run) == outputs(finished)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "locked"
    place.mkdir(mode=0o500)
    assert str(place) in refused(capsys, "run", str(config), "--run", str(place / "run"))


def test_a_place_that_cannot_be_made_is_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(capsys, "run", str(config), "--run", str(tmp_path / "file" / "run"))
    assert "file" in line


def test_help_is_instant() -> None:
    """Measured in processor time, so that a busy machine does not fail it."""
    seconds: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.check_output([sys.executable, ROOT / "emotion_atlas.py", "--help"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert b"browse" in shown
    assert min(seconds) < 0.5


def test_every_setting_is_in_the_demo_config() -> None:
    """configs/demo.yaml is the reference of the settings."""
    from saes.config import load, read, to_dict

    shown = read(ROOT / "configs" / "demo.yaml")
    everything = to_dict(load(emotion_atlas.RunConfig, shown))
    for key, value in everything.items():
        assert key in shown
        if isinstance(value, dict):
            section = shown[key]
            assert isinstance(section, dict)
            assert set(value) == set(section)
