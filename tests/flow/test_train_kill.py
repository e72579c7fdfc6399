"""Training that is killed at random moments ends with the bytes of one that never was.

Processes are forked, so that none has to import anything; four architectures are trained together.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from saes.lm.model import LM
from saes.stream.activations import ActivationStream, StreamConfig
from saes.track import NullTracker, Tracker
from saes.training.architectures import SaeSpec, TrainConfig
from saes.training.checkpoint import steps_of
from saes.training.train import train_saes

SITE = "blocks.1.hook_resid_post"
ROWS = np.random.default_rng(0).integers(5, 290, (64, 31)).astype(np.uint16)
STEPS = 40
SPECS = (
    SaeSpec(SITE, "topk", 48, k=4),
    SaeSpec(SITE, "matryoshka_batchtopk", 48, k=4),
    SaeSpec(SITE, "jumprelu", 48, l0=0.3),
    SaeSpec(SITE, "gated", 48, l1=3.0),
)
CONFIG = TrainConfig(
    tokens=STEPS * 64, lr=5e-3, dead_tokens=500, checkpoint_steps=2, calibration_tokens=256
)


def train(lm: LM, folder: Path, tracker: Tracker | None = None) -> None:
    stream = ActivationStream(lm, ROWS, (SITE,), StreamConfig(batch=64, chunk_rows=8), bos=1)
    train_saes(stream, SPECS, CONFIG, folder / "out", folder / "work", tracker=tracker)


def forked(work: Callable[[], None]) -> int:
    """Run it in a process of its own, silent; the pid. Its exit code is what Python's would be."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        os._exit(code)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outputs(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(tiny_lm: LM, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], float]:
    """What an uninterrupted training leaves, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    train(tiny_lm, tmp_path_factory.mktemp("first"))  # so that the time is without imports
    start = time.perf_counter()
    assert end_of(forked(lambda: train(tiny_lm, folder))) == 0
    seconds = time.perf_counter() - start
    found = outputs(folder / "out")
    assert len([name for name in found if name.endswith(".safetensors")]) == len(SPECS)
    return found, seconds


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow),
                                  pytest.param(2, marks=pytest.mark.slow)])  # fmt: skip
def test_kills_at_random_moments(
    seed: int, whole: tuple[dict[str, bytes], float], tiny_lm: LM, tmp_path: Path
) -> None:
    expected, seconds = whole
    rng = np.random.default_rng(seed)
    killed, partly = 0, 0
    for _ in range(8):
        pid = forked(lambda: train(tiny_lm, tmp_path))
        time.sleep(float(rng.uniform(0.05, 0.6)) * seconds)
        os.kill(pid, signal.SIGKILL)
        killed += end_of(pid) == -signal.SIGKILL
        steps = steps_of(tmp_path / "work") or [0]
        partly += 0 < steps[-1] < STEPS
    assert killed >= 2
    assert partly >= 1
    assert end_of(forked(lambda: train(tiny_lm, tmp_path))) == 0
    assert outputs(tmp_path / "out") == expected


class Signalling(ActivationStream):
    """A stream that sends its own process a signal with some batch."""

    at, how, given = -1, signal.SIGTERM, 0

    def __next__(self) -> dict[str, torch.Tensor]:
        self.given += 1
        if self.given == self.at:
            os.kill(os.getpid(), self.how)
        return super().__next__()


class SignallingTracker(NullTracker):
    """A tracker that does so between a step and what is saved of it."""

    def __init__(self, at: int, how: signal.Signals) -> None:
        self.at, self.how = at, how

    def log(self, _: object, step: int | None = None) -> None:
        if step == self.at:
            self.at = -1  # a second one would not wait for the end of the step
            os.kill(os.getpid(), self.how)


FIT = 8  # batches that are read before the first step
CALIBRATION = 4  # and after the last one


@pytest.mark.parametrize(
    ("batch", "steps"),
    [
        (1, []),
        (FIT, []),
        (FIT + 1, []),
        (FIT + 2, [1]),
        (FIT + 17, [16]),
        (FIT + STEPS, [STEPS - 1]),
        (FIT + STEPS + 1, [STEPS]),
        (FIT + STEPS + CALIBRATION, [STEPS]),
    ],
)
def test_a_signal_while_batches_are_read(
    batch: int, steps: list[int], whole: tuple[dict[str, bytes], float], tiny_lm: LM,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It writes a checkpoint of the last whole step, if there is one, and ends at once."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", _seldom())
    how, code = (signal.SIGINT, 130) if batch % 2 else (signal.SIGTERM, 143)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "ActivationStream", Signalling)
        patch.setattr(Signalling, "at", batch)
        patch.setattr(Signalling, "how", how)
        assert end_of(forked(lambda: train(tiny_lm, tmp_path))) == code
    assert steps_of(tmp_path / "work") == steps
    assert not (tmp_path / "out").exists()
    assert end_of(forked(lambda: train(tiny_lm, tmp_path))) == 0
    assert_same_saes(outputs(tmp_path / "out"), whole[0])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 20, STEPS])
def test_a_signal_within_a_step(
    step: int, how: signal.Signals, whole: tuple[dict[str, bytes], float], tiny_lm: LM,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The step is finished and its checkpoint written."""
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", _seldom(log_steps=1))
    tracker = SignallingTracker(step, how)
    code = 143 if how == signal.SIGTERM else 130
    assert end_of(forked(lambda: train(tiny_lm, tmp_path, tracker))) == code
    assert steps_of(tmp_path / "work") == [step]
    assert not (tmp_path / "out").exists()
    assert end_of(forked(lambda: train(tiny_lm, tmp_path))) == 0
    assert_same_saes(outputs(tmp_path / "out"), whole[0])


def assert_same_saes(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """The same bytes but for training.json, which tells of other settings of no effect."""
    assert set(found) == set(expected)
    for name, data in expected.items():
        assert name.endswith("training.json") or found[name] == data


def _seldom(**more: int) -> TrainConfig:
    """Checkpoints so far apart that only the signal's and the last are there."""
    return replace(CONFIG, checkpoint_steps=1000, **more)  # type: ignore[arg-type]


CODE = """
import sys
from pathlib import Path
from saes.config import load, read
from saes.training.run import TrainRunConfig, train_run
train_run(load(TrainRunConfig, read(Path(sys.argv[1]))))
"""


@pytest.mark.slow
def test_a_whole_run_is_killed_while_it_trains(tiny_lm_folder: Path, tmp_path: Path) -> None:
    """The run folder, its stages and its checkpoints, in processes of their own."""
    root = Path(__file__).parents[2]
    text = tmp_path / "text.txt"
    words = ["door", "stood", "open", "nobody", "had", "swept", "hall", "since", "she", "read"]
    rng = np.random.default_rng(0)
    text.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(150)))

    def config(name: str) -> Path:
        tree = {
            "run": str(tmp_path / name),
            "model": {"name": str(tiny_lm_folder), "threads": 1},
            "text": {"source": str(text), "document": "paragraph", "tokens": 10240, "epochs": 2,
                     "held_out_tokens": 1000, "context": 32},
            "stream": {"batch": 64, "chunk_rows": 8},
            "saes": [{"architecture": "batchtopk", "sites": [SITE], "d_sae": [48], "k": [4, 8]}],
            "train": {"tokens": 10240, "checkpoint_steps": 5, "dead_tokens": 500},
            "quality_rows": 8,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def command(name: str) -> list[str]:
        return [sys.executable, "-c", CODE, str(config(name))]

    subprocess.run(command("whole"), check=True, cwd=root, capture_output=True)
    for wanted in (5, 60):
        process = subprocess.Popen(
            command("killed"), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        work = tmp_path / "killed" / "checkpoints"
        while (steps_of(work) or [0])[-1] < wanted and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed" / "saes").exists()
    subprocess.run(command("killed"), check=True, cwd=root, capture_output=True)
    for stage in ("text", "saes", "quality"):
        assert outputs(tmp_path / "killed" / stage) == outputs(tmp_path / "whole" / stage)
    assert not (tmp_path / "killed" / "checkpoints").exists()
