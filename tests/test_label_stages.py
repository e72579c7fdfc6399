"""`labeling.stages`: what the catalog says of each SAE, whatever lies beside it."""

import json
import shutil
from pathlib import Path

import pytest

from discovery.records import Sae
from labeling.stages import _quality

SITE = "blocks.1.hook_resid_post"
SAE = Sae(SITE, 128, "mine", "sae-lens", None, variance_explained=0.71, l0=8.0)
FIGURES = {
    "l0": 7.5,
    "variance_explained": 0.8,
    "recovered_mean": 0.9,
    "dead": 0.25,
    "tokens": 1234,
}
MEASURED = (
    "L0 7.5, variance explained 0.800, cross-entropy recovered 0.900 (against mean ablation), "
    "dead latents 25.0%, on 1,234 held-out tokens"
)
CHECKED = "L0 8.0, variance explained 0.710, on check texts"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_sae_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_sae_folder, tmp_path / "mine")


def test_figures_of_training_are_quoted(folder: Path) -> None:
    (folder / "quality.json").write_text(json.dumps({"held_out": FIGURES}))
    assert _quality(str(folder), SAE) == MEASURED
    assert _quality(str(folder / "sae_weights.safetensors"), SAE) == MEASURED


@pytest.mark.parametrize(
    "record",
    [
        {"held_out": {**FIGURES, "recovered_mean": None}},  # NaN, as JSON has it
        {"held_out": {"l0": 7.5}},
        {"held_out": {**FIGURES, "tokens": "many"}},
        {"held_out": None},
        {"held_out": [1]},
        [],
        None,
    ],
)
def test_figures_that_are_not_whole_do_not_stop_a_run(folder: Path, record: object) -> None:
    (folder / "quality.json").write_text(json.dumps(record))
    assert _quality(str(folder), SAE) == CHECKED


def test_without_figures_those_of_the_check_are_given(folder: Path, tmp_path: Path) -> None:
    assert _quality(str(folder), SAE) == CHECKED
    (folder / "quality.json").write_text("{")
    assert _quality(str(folder), SAE) == CHECKED
    assert _quality(str(tmp_path / "gone"), SAE) == CHECKED
    assert _quality("nobody/nothing/here", SAE) == CHECKED  # the hub is off


def test_figures_of_a_hub_repository(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "cache" / "models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (folder / "quality.json").write_text(json.dumps({"held_out": FIGURES}))
    shutil.copytree(folder, repo / "snapshots" / COMMIT / SITE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert _quality(f"me/mine/{SITE}", SAE) == MEASURED
