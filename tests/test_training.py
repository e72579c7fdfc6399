"""`saes.training.run`: a run from its YAML to a table, kept when done, and bad settings refused."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sae_lens import SAE

from saes.config import load, override, read, to_dict
from saes.errors import UserError
from saes.files import RESERVE
from saes.text.prepare import TextConfig
from saes.training import run as run_module
from saes.training.run import TrainRunConfig, train_run

ROOT = Path(__file__).parents[1]
SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of paragraphs."""
    words = ["door", "stood", "open", "nobody", "had", "swept", "hall", "since", "she", "read"]
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(120)))
    return path


@pytest.fixture(scope="module")
def tree(text: Path, tiny_lm_folder: Path) -> dict[str, object]:
    """A config for the tiny model, but for its run folder."""
    return {
        "run": "unset",
        "model": {"name": str(tiny_lm_folder), "threads": 1},
        "text": {"source": str(text), "document": "paragraph", "tokens": 5120, "epochs": 2,
                 "held_out_tokens": 1000, "context": 32},
        "stream": {"batch": 128, "chunk_rows": 16},
        "saes": [
            {"architecture": "topk", "sites": [SITES[0]], "d_sae": [48], "k": [4, 8]},
            {"architecture": "standard", "sites": [SITES[1]], "d_sae": [48], "l1": [3]},
        ],
        "train": {"tokens": 5120, "lr": 5e-3, "dead_tokens": 1000, "log_steps": 10,
                  "held_out_steps": 20, "calibration_tokens": 256, "snapshots": 1},
        "watch_rows": 8,
        "quality_rows": 8,
        "track": {"backend": "jsonl"},
    }  # fmt: skip


NAMES = (f"{SITES[0]}/k4", f"{SITES[0]}/k8", SITES[1])


@pytest.fixture(scope="module")
def finished(tree: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    train_run(load(TrainRunConfig, tree | {"run": str(folder)}))
    return folder


def test_a_run_leaves_saes_figures_and_curves(finished: Path) -> None:
    figures = json.loads((finished / "quality" / "quality.json").read_text())
    assert tuple(figures) == NAMES
    for name in NAMES:
        folder = finished / "saes" / name
        assert SAE.load_from_disk(folder).cfg.metadata.hook_name == name.split("/")[0]
        beside = json.loads((folder / "quality.json").read_text())
        assert beside == {"site": name.split("/")[0], "held_out": figures[name]}
        training = json.loads((folder / "training.json").read_text())
        assert training["steps"] == 40
        assert training["held_out"]["variance_explained"] > 0.3
    assert figures[NAMES[0]]["l0"] == pytest.approx(4, abs=0.1)
    assert "| blocks.1.hook_resid_post/k4 " in (finished / "quality" / "quality.md").read_text()
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    kinds = {line["kind"] for line in lines}
    assert kinds == {"metrics", "histogram", "summary", "table", "artifact", "finish"}
    artifacts = {line["path"] for line in lines if line["kind"] == "artifact"}
    assert artifacts == {
        *(f"saes/{name}" for name in NAMES),
        *(f"checkpoints/snapshots/step_00000020/{name}" for name in NAMES),
    }
    assert all((finished / path).is_dir() for path in artifacts)
    assert not list((finished / "checkpoints").glob("step_*"))
    assert not (finished / "checkpoints" / "text").exists()


def test_a_second_run_is_quick_and_changes_nothing(
    finished: Path, tree: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in finished.rglob("*") if p.is_file()}

    before = state()
    train_run(load(TrainRunConfig, tree | {"run": str(finished)}))
    out = capsys.readouterr().out
    assert "nothing left to do" in out
    assert "| blocks.1.hook_resid_post/k4 " in out
    assert state() == before
    code = (
        "import sys; from pathlib import Path; from saes.config import load, read\n"
        "from saes.training.run import TrainRunConfig, train_run\n"
        "train_run(load(TrainRunConfig, read(Path(sys.argv[1])) | {'run': sys.argv[2]}))\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(finished / "config.yaml"), str(finished)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def test_from_shards_and_from_a_trained_sae(
    finished: Path, tree: dict[str, object], tmp_path: Path
) -> None:
    grid = [{"architecture": "topk", "sites": [SITES[0]], "d_sae": [48], "k": [8]}]
    start = str(finished / "saes" / SITES[0] / "k8")
    more = {"run": str(tmp_path / "two"), "saes": grid, "shards": str(tmp_path / "shards"),
            "start_from": [start], "quality_rows": 0}  # fmt: skip
    train_run(load(TrainRunConfig, tree | more))
    assert not (tmp_path / "two" / "quality").exists()
    again, first = (
        json.loads((folder / "training.json").read_text())["held_out"]["variance_explained"]
        for folder in (tmp_path / "two" / "saes" / SITES[0], finished / "saes" / NAMES[1])
    )
    assert again > first
    assert list((tmp_path / "shards").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("text.tokens=5000", "train.tokens is 5120 but text.tokens prepares for 5000"),
        ("text.held_out_tokens=0", "watch_rows is 8 but text.held_out_tokens is 0"),
        ("watch_rows=-1", "watch_rows = -1"),
        ("model.threads=0", "threads must be at least 1"),
        ("saes=[]", "no SAE"),
        ("saes=[{architecture: topk, sites: [a], k: [4], colour: red}]", "unknown key 'colour'"),
        ("saes=[{architecture: tropk, sites: [a], k: [4]}]", "unknown architecture 'tropk'"),
        ("stream.batch=0", "batch = 0"),
        ("train.lr=fast", "train.lr"),
        ("text.context=300", "takes 256 tokens"),
        ("text.source=/no/such/text.txt", "/no/such/text.txt"),
        ("model.name=/no/such/model", "/no/such/model"),
        ("start_from=[/no/such/sae]", "/no/such/sae"),
        ("stream.batch=600", "stream.batch is 600 but chunk_rows = 16 rows of 32 tokens hold 496"),
        ("text.epochs=50", "text.tokens / text.epochs is 102, less than a batch of 128"),
        (
            "saes=[{architecture: gated, sites: [blocks.1.hook_resid_post], d_sae: [900000000], "
            "l1: [1]}]",
            "of memory, but this machine has",
        ),
        ("saes=[{architecture: topk, sites: [blocks.9.hook_resid_post], k: [4]}]", "out of range"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    change: str, said: str, tree: dict[str, object], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match=re.escape(said)):
        train_run(load(TrainRunConfig, override(tree | {"run": str(run)}, [change])))
    assert not run.exists()


def test_saes_to_begin_with_are_tried_before_anything_is_written(
    finished: Path, tree: dict[str, object], tmp_path: Path
) -> None:
    run, start = tmp_path / "run", str(finished / "saes" / SITES[0] / "k8")
    for sites, d_sae, said in (
        ([SITES[0]], 40, "set d_sae to 48"),
        ([SITES[1]], 48, f"start_from holds SAEs at {SITES[0]}, but {SITES[1]} are to be trained"),
    ):
        grid = [{"architecture": "topk", "sites": sites, "d_sae": [d_sae], "k": [8]}]
        more = {"run": str(run), "saes": grid, "start_from": [start]}
        with pytest.raises(UserError, match=re.escape(said)):
            train_run(load(TrainRunConfig, tree | more))
        assert not run.exists()


def test_a_disk_too_small_for_the_shards_is_said_first(
    tree: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=RESERVE + 2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    more = {"run": str(tmp_path / "run"), "shards": str(tmp_path / "shards")}
    changed = override(tree | more, ["text.tokens=20480", "text.epochs=1", "model.threads=1"])
    with pytest.raises(UserError, match="harvesting 20,480 tokens needs"):
        train_run(load(TrainRunConfig, changed))
    assert not list(tmp_path.iterdir())


def test_files_of_one_name_in_two_folders_both_count(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    before = run_module._text_files(TextConfig(source=str(tmp_path)))
    assert len(before) == 2
    (tmp_path / "a" / "x.txt").write_text("changed")
    assert run_module._text_files(TextConfig(source=str(tmp_path))) != before


def test_a_run_that_is_stopped_after_training_still_logs_its_saes(
    tree: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the last stage: exit code 143, the tracker is closed; the next start goes on."""
    run = tmp_path / "run"
    config = load(TrainRunConfig, tree | {"run": str(run)})
    handler = signal.getsignal(signal.SIGTERM)

    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_quality", stopped)
        with pytest.raises(SystemExit) as leaving:
            train_run(config)
    assert leaving.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (run / "saes").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1] == {"time": lines[-1]["time"], "kind": "finish", "exit_code": 1}
    train_run(config)
    text = (run / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    artifacts = [line["path"] for line in lines if line["kind"] == "artifact"]
    assert [a for a in artifacts if a.startswith("saes/")] == [f"saes/{name}" for name in NAMES]
    train_run(config)
    assert (run / "metrics.jsonl").read_text() == text


def test_text_that_is_too_short_is_said(tree: dict[str, object], tmp_path: Path) -> None:
    changed = override(tree | {"run": str(tmp_path / "run")}, ["text.epochs=1"])
    with pytest.raises(UserError, match="epochs"):
        train_run(load(TrainRunConfig, override(changed, ["text.tokens=50000"])))
    assert not (tmp_path / "run" / "text").exists()


def test_a_run_folder_of_another_config_is_refused(finished: Path, tree: dict[str, object]) -> None:
    other = override(tree | {"run": str(finished)}, ["train.lr=1e-4"])
    with pytest.raises(UserError, match=r"train\.lr is 0\.005 there and 0\.0001 now"):
        train_run(load(TrainRunConfig, other))


def test_every_setting_is_in_the_config_file() -> None:
    """configs/train.yaml is the reference of the settings."""
    shown = read(ROOT / "configs" / "train.yaml")
    everything = to_dict(load(TrainRunConfig, shown))

    def compare(value: Any, section: Any, where: str) -> None:
        if isinstance(value, dict):
            assert set(value) == set(section), where
            for key in value:
                compare(value[key], section[key], f"{where}.{key}")
        elif value and isinstance(value, list) and isinstance(value[0], dict):
            for i, item in enumerate(value):
                compare(item, section[i], f"{where}[{i}]")

    compare(everything, shown, "")
    text = (ROOT / "configs" / "train.yaml").read_text(encoding="utf-8")
    assert "packaged/demo_lm" in text


def test_configs_load_without_torch() -> None:
    code = "import sys, saes.training.run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
