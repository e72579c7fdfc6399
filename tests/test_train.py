"""`saes.train`: sae-lens's own step, exact resume, and folders that plain sae-lens reads."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from sklearn.metrics import r2_score

from saes import train
from saes.activations import ActivationStream, StreamConfig
from saes.errors import UserError
from saes.lm.model import LM
from saes.pretrained import load_sae
from saes.train import TrainConfig, train_saes

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
ROWS = np.random.default_rng(0).integers(5, 290, (200, 31)).astype(np.uint16)
CONFIG = TrainConfig(d_sae=96, k=6, tokens=60 * 128, lr=5e-3, dead_tokens=1500, checkpoint_steps=7)


def stream(lm: LM) -> ActivationStream:
    return ActivationStream(lm, ROWS, SITES, StreamConfig(batch=128, chunk_rows=16), bos=1)


@pytest.fixture(scope="module")
def trained(tiny_lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_saes(stream(tiny_lm), CONFIG, folder, folder / "work")
    return folder


def residuals(lm: LM, site: str) -> torch.Tensor:
    batches = stream(lm)
    return torch.cat([next(batches)[site] for _ in range(10)])


def explained(x: torch.Tensor, out: torch.Tensor) -> float:
    return float(r2_score(x.numpy(), out.detach().numpy(), multioutput="variance_weighted"))


def test_the_folders_load_in_plain_sae_lens(trained: Path, tiny_lm: LM) -> None:
    for site in SITES:
        sae = SAE.load_from_disk(trained / site, dtype="float32")
        x = residuals(tiny_lm, site)
        z = sae.encode(x)
        assert ((z > 0).sum(1) == CONFIG.k).float().mean() > 0.99
        assert explained(x, sae.decode(z)) > 0.5
        ours = load_sae(trained / site, d_model=32)
        assert ours.site == site
        assert torch.equal(ours.encode(x), z)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=0.01)
        metadata = sae.cfg.metadata
        assert (metadata.model_name, metadata.hook_name) == ("tiny_lm", site)
        assert (metadata.context_size, metadata.prepend_bos) == (32, True)
        assert metadata.training_tokens == 60 * 128
    assert SAE.load_from_disk(trained / SITES[0]).W_dec.dtype == torch.bfloat16


def test_training_helps_and_sites_differ(trained: Path, tiny_lm: LM, tmp_path: Path) -> None:
    short = replace(CONFIG, tokens=2 * 128)
    train_saes(stream(tiny_lm), short, tmp_path, tmp_path / "work")
    x = residuals(tiny_lm, SITES[0])
    early, late, other = (
        explained(x, load_sae(folder, d_model=32).sae(x))
        for folder in (tmp_path / SITES[0], trained / SITES[0], trained / SITES[1])
    )
    assert late > early + 0.1
    assert late > other + 0.05


def test_the_saved_sae_is_the_trained_one(tiny_lm: LM, tmp_path: Path) -> None:
    """Scale folded away and bf16: same L0, variance explained and latents, in residual units."""
    batches = stream(tiny_lm)
    trainer: Any = train._trainer(batches, CONFIG, SITES[0], seed=0, steps=60)
    train._fit_to_data(batches, {SITES[0]: trainer})
    for _ in range(40):
        train._step(trainer, next(batches)[SITES[0]])
    x, scale = residuals(tiny_lm, SITES[0]), trainer.activation_scaler.scaling_factor
    assert not 0.8 < scale < 1.25
    with torch.no_grad():
        z = trainer.sae.encode(scale * x).to_dense()
        out = trainer.sae.decode(trainer.sae.encode(scale * x)) / scale
    train.save(copy.deepcopy(trainer.sae), scale, tmp_path / "sae")
    sae = SAE.load_from_disk(tmp_path / "sae", dtype="float32")
    again = sae.encode(x)
    assert (again > 0).sum() == pytest.approx(int((z > 0).sum()), rel=1e-3)
    assert explained(x, sae.decode(again)) == pytest.approx(explained(x, out), abs=2e-3)
    both = (again > 0) & (z > 0)
    assert both.sum() > 0.95 * (z > 0).sum()
    close = torch.isclose(again[both], z[both] / scale, rtol=0.05, atol=0.02)
    assert close.float().mean() > 0.95


def test_the_activations_are_fitted(tiny_lm: LM) -> None:
    batches = stream(tiny_lm)
    before = batches.state_dict()
    trainer: Any = train._trainer(batches, CONFIG, SITES[0], seed=0, steps=60)
    train._fit_to_data(batches, {SITES[0]: trainer})
    assert batches.state_dict() == before
    x = residuals(tiny_lm, SITES[0])[: 8 * 128] * trainer.activation_scaler.scaling_factor
    torch.testing.assert_close(trainer.sae.b_dec.detach(), x.mean(0), rtol=1e-4, atol=1e-4)
    assert (x - x.mean(0)).norm(dim=1).mean() == pytest.approx(32**0.5, rel=1e-4)


def test_the_step_is_sae_lens_own_step(tiny_lm: LM) -> None:
    """Sparse latents and rows of norm 1 give what its dense trainer gives, with dead latents."""
    batches = stream(tiny_lm)
    config = replace(CONFIG, dead_tokens=256)
    ours: Any = train._trainer(batches, config, SITES[0], seed=0, steps=60)
    train._fit_to_data(batches, {SITES[0]: ours})
    with torch.no_grad():
        ours.sae.b_enc[:20] = -100
    dense = TopKTrainingSAE(replace(ours.sae.cfg, use_sparse_activations=False))
    dense.load_state_dict(ours.sae.state_dict())
    theirs: Any = SAETrainer(ours.cfg, dense, iter(()))
    scale = ours.activation_scaler.scaling_factor
    for _ in range(12):
        x = next(batches)[SITES[0]]
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            train._step(ours, x)
        theirs.step(x * scale)
        with torch.no_grad():
            dense.W_dec /= dense.W_dec.norm(dim=1, keepdim=True)
    assert ours.dead_neurons.sum() == theirs.dead_neurons.sum() >= 20
    for name, weight in ours.sae.state_dict().items():
        torch.testing.assert_close(weight, dense.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stop", [0, 3, 7, 23, 59])
def test_interrupted_training_ends_with_the_same_bytes(
    trained: Path, tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    plain, calls = ActivationStream.__next__, iter(range(10_000))

    def interrupted(self: ActivationStream) -> dict[str, torch.Tensor]:
        if next(calls) == stop + 8:  # the first 8 fit the scale
            raise KeyboardInterrupt
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationStream, "__next__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_saes(stream(tiny_lm), CONFIG, tmp_path, tmp_path / "work")
    assert not (tmp_path / SITES[0]).exists()
    train_saes(stream(tiny_lm), CONFIG, tmp_path, tmp_path / "work")
    for site in SITES:
        for name in ("cfg.json", "sae_weights.safetensors"):
            assert (tmp_path / site / name).read_bytes() == (trained / site / name).read_bytes()


def test_the_global_seed_neither_matters_nor_changes(
    trained: Path, tiny_lm: LM, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    train_saes(stream(tiny_lm), CONFIG, tmp_path, tmp_path / "work")
    assert torch.equal(torch.rand(1), expected)
    weights = "sae_weights.safetensors"
    for site in SITES:
        assert (tmp_path / site / weights).read_bytes() == (trained / site / weights).read_bytes()


def test_a_checkpoint_of_other_settings_or_damaged(trained: Path, tiny_lm: LM) -> None:
    with pytest.raises(UserError, match="other settings"):
        train_saes(stream(tiny_lm), replace(CONFIG, seed=1), trained, trained / "work")
    checkpoint = trained / "work" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        train_saes(stream(tiny_lm), CONFIG, trained, trained / "work")
    checkpoint.write_bytes(whole)


def test_bad_sizes(tiny_lm: LM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="k = 97"):
        replace(CONFIG, k=97)
    with pytest.raises(UserError, match="127 tokens"):
        train_saes(stream(tiny_lm), replace(CONFIG, tokens=127), tmp_path, tmp_path / "work")


def test_activations_that_are_not_finite(
    tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ActivationStream.__next__

    def broken(self: ActivationStream) -> dict[str, torch.Tensor]:
        batch = plain(self)
        return {**batch, SITES[1]: batch[SITES[1]] * float("nan")}

    batches = stream(tiny_lm)
    monkeypatch.setattr(ActivationStream, "__next__", broken)
    with pytest.raises(UserError, match=r"blocks\.2\.hook_resid_post .* step"):
        train_saes(batches, CONFIG, tmp_path, tmp_path / "work")
