"""What a training takes, against what it is measured to take, and what a machine has left."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saes.errors import UserError
from saes.files import RESERVE
from saes.training import budget as budgets
from saes.training.architectures import SPARSITY, SaeSpec, TrainConfig
from saes.training.budget import (
    Shape,
    available_memory,
    budget,
    check_budget,
    check_room,
)

SITE = "blocks.1.hook_resid_post"
ROOT = Path(__file__).parents[1]
SPEC = SaeSpec(SITE, "topk", 64, k=4)


def shape(**more: Any) -> Any:
    values = {"sites": (SITE,), "batch": 16, "d_model": 8, "buffer_tokens": 160}
    return SimpleNamespace(**(values | {"device": torch.device("cpu")} | more))


def test_the_parts_of_a_budget() -> None:
    assert isinstance(shape(), Shape)
    config = TrainConfig(calibration_tokens=1000)
    found = budget(shape(sites=(SITE, "b")), [SPEC, SPEC], config, held_out_tokens=50)
    parameters = 2 * (2 * 8 + 3) * 64
    assert found.weights == 16 * parameters
    assert found.checkpoints == 36 * parameters
    assert found.buffer == 4 * 8 * 2 * (160 + 1000 + 2 * 16 + 50)
    assert found.memory == found.weights + found.step + found.buffer
    fast, slow = (budget(shape(), [SPEC], TrainConfig(fast=fast)).step for fast in (True, False))
    assert slow > 2 * fast
    gated = SaeSpec(SITE, "gated", 64, l1=1.0)
    gates = [budget(shape(), [gated], TrainConfig(fast=fast)).step for fast in (True, False)]
    assert gates[0] == gates[1] > slow


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = budget(shape(), [SPEC]).memory
    monkeypatch.setattr(budgets, "available_memory", lambda: need)
    assert "training takes about" in check_budget(shape(), [SPEC], tmp_path)
    monkeypatch.setattr(budgets, "available_memory", lambda: need - 1)
    with pytest.raises(UserError, match=r"training 1 SAEs takes about .* of memory, but this"):
        check_budget(shape(), [SPEC], tmp_path)


def test_checkpoints_that_are_there_need_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = budget(shape(), [SPEC]).checkpoints
    usage = SimpleNamespace(free=RESERVE + need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="for its checkpoints"):
        check_budget(shape(), [SPEC], tmp_path)
    for step in (100, 200):
        (tmp_path / f"step_{step:08d}.pt").write_bytes(bytes(need // 3))
    usage.free = RESERVE + need - 2 * (need // 3)
    check_budget(shape(), [SPEC], tmp_path)
    usage.free -= 1
    with pytest.raises(UserError, match="for its checkpoints"):
        check_budget(shape(), [SPEC], tmp_path)


def test_room_for_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=RESERVE + 1599))
    check_room(tmp_path / "out", shape(), 99, torch.bfloat16)
    with pytest.raises(UserError, match="harvesting 100 tokens needs"):
        check_room(tmp_path / "out", shape(), 100, torch.bfloat16)
    (tmp_path / "manifest.json").write_text("{}")
    check_room(tmp_path, shape(), 100, torch.bfloat16)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container(tmp_path: Path, version: int) -> None:
    """What the system caches for it is given back when programs need it."""
    free = available_memory(tmp_path)
    assert free > 1 << 20
    folder, limit, used, prefix = {
        1: (tmp_path / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: (tmp_path, "memory.max", "memory.current", ""),
    }[version]
    folder.mkdir(exist_ok=True)
    (folder / used).write_text("700000\n")
    (folder / limit).write_text("1000000\n")
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file 20\n{prefix}active_file 3")
    assert available_memory(tmp_path) == 300_023
    (folder / used).write_text("1100000\n")
    assert available_memory(tmp_path) == 0
    (folder / limit).write_text("max\n")
    assert available_memory(tmp_path) > free // 2


MEASURE = """
import re, sys, types
from pathlib import Path
import torch
from saes.training.architectures import SPARSITY, SaeSpec, TrainConfig, build
from saes.training.budget import budget

torch.set_num_threads(1)
architecture, fast = sys.argv[1], sys.argv[2] == "fast"
d_in, d_sae, batch = 128, 8192, 1024
about = types.SimpleNamespace(model="m", context=256, prepend_bos=True, text="t")
shape = types.SimpleNamespace(sites=("a",), batch=batch, d_model=d_in, buffer_tokens=batch,
                              device=torch.device("cpu"), about=about)
k = 8 if architecture == "matching_pursuit" else 32
sparsity = {"k": k} if SPARSITY[architecture] == "k" else {SPARSITY[architecture]: 1.0}
spec = SaeSpec("blocks.1.hook_resid_post", architecture, d_sae, **sparsity)
config = TrainConfig(fast=fast)
trainer = build(spec, config, shape, steps=100)
trainer.activation_scaler.scaling_factor = 1.0
x = torch.randn(batch, d_in)

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

trainer.step(x[:8])  # the moments are there; gradients are not kept
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
for _ in range(3):
    trainer.n_forward_passes_since_fired[: d_sae // 2] = 10**9  # dead
    trainer.step(x)
    trainer.n_training_steps += 1
gradients = 4 * (2 * d_in + 3) * d_sae  # of the weights, which have their own place in a budget
print((resident("VmHWM") - before - gradients) / budget(shape, [spec], config).step)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["fast", "plain"])
@pytest.mark.parametrize("architecture", list(SPARSITY))
def test_a_step_takes_what_it_is_said_to(architecture: str, fast: str) -> None:
    """Peak of resident memory in a process of its own, on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs /proc/self/clear_refs")
    if fast == "fast" and architecture not in budgets.STEP_COPIES_FAST:
        pytest.skip("has no fast step")
    command = [sys.executable, "-c", MEASURE, architecture, fast]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert 2 / 3 < float(done.stdout) < 4 / 3
