"""The sparse training classes against sae-lens's dense ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

import saes.sparse_topk
from saes.errors import UserError
from saes.fused_adam import FusedAdam
from saes.sparse_topk import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaTrainingSAE,
    SparseMatryoshkaTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    fuse_optimizer,
)

ARCHITECTURES = ("topk", "batchtopk", "matryoshka")
SPARSE: dict[str, tuple[Any, Any]] = {
    "topk": (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    "batchtopk": (SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig),
    "matryoshka": (SparseMatryoshkaTrainingSAE, SparseMatryoshkaTrainingSAEConfig),
}
DENSE: dict[str, tuple[Any, Any]] = {
    "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
    "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
    "matryoshka": (
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
    ),
}
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
)


def pair_of_saes(kind: str, *, seed: int = 0, spread: float = 0.3, **more: Any) -> tuple[Any, Any]:
    """A dense and a sparse SAE with the same random weights; the sparse one encodes in float32."""
    config = {"d_in": 16, "d_sae": 96, "k": 5, "device": "cpu", **more}
    if kind != "topk":
        config["k"] = float(config["k"])
    if kind == "matryoshka":
        config.setdefault("matryoshka_widths", [10, 40, config["d_sae"]])
    own = {name: config.pop(name) for name in ("encode_dtype", "candidate_margin") if name in more}
    dense_class, dense_config = DENSE[kind]
    sparse_class, sparse_config = SPARSE[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dense = dense_class(dense_config(**config))
        sparse = sparse_class(sparse_config(**config, **{"encode_dtype": "float32", **own}))
        with torch.no_grad():
            for p in dense.parameters():
                p.add_(torch.randn_like(p) * spread)
    sparse.load_state_dict(dense.state_dict())
    return dense, sparse


def rows(n: int, d_in: int = 16, *, seed: int = 0, **more: Any) -> Tensor:
    return torch.randn(
        n, d_in, generator=torch.Generator().manual_seed(seed), dtype=more.get("dtype")
    )


def step_of(sae: Any, x: Tensor, dead: Tensor | None = None) -> TrainStepOutput:
    """Forward and backward of one training step."""
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0,
            is_logging_step=False,
        )
    )  # fmt: skip
    output.loss.backward()
    return output


def dead_mask(n: int, d_sae: int, seed: int = 0) -> Tensor:
    mask = torch.zeros(d_sae, dtype=torch.bool)
    mask[torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))[:n]] = True
    return mask


def assert_same_step(dense: Any, sparse: Any, x: Tensor, dead: Tensor | None = None) -> None:
    """Outputs, losses and all gradients agree to 1e-5 of the largest value."""
    a, b = step_of(dense, x, dead), step_of(sparse, x, dead)
    assert set(a.losses) == set(b.losses)
    for name, value in a.losses.items():
        torch.testing.assert_close(b.losses[name], value, rtol=1e-5, atol=1e-6)
    close(a.loss, b.loss)
    close(a.sae_out, b.sae_out)
    close(a.feature_acts.to_dense(), b.feature_acts.to_dense())
    gradients = dict(dense.named_parameters())
    assert set(gradients) == set(dict(sparse.named_parameters()))
    for name, p in sparse.named_parameters():
        assert p.grad is not None, name
        close(gradients[name].grad, p.grad)


def close(a: Any, b: Any) -> None:
    scale = max(1.0, float(a.detach().abs().max()))
    torch.testing.assert_close(b.detach(), a.detach(), rtol=0, atol=1e-5 * scale)


# ------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("kind", ARCHITECTURES)
@settings(max_examples=25)
@given(data=st.data())
def test_a_step_is_sae_lens_s(kind: str, data: st.DataObject) -> None:
    d_in = data.draw(st.sampled_from([2, 5, 16]))
    d_sae = data.draw(st.sampled_from([24, 61, 96, 256]))
    k = data.draw(st.integers(1, 12)) if kind == "topk" else data.draw(st.floats(0.5, 12))
    settings_ = {
        "rescale_acts_by_decoder_norm": data.draw(st.booleans()),
        "apply_b_dec_to_input": data.draw(st.booleans()),
        "aux_loss_coefficient": data.draw(st.sampled_from([1.0, 1 / 32])),
    }
    if kind == "matryoshka":
        settings_["matryoshka_widths"] = [7, 20, d_sae]
        settings_["use_matryoshka_aux_loss"] = data.draw(st.booleans())
    n = data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 2**20))
    dead = dead_mask(data.draw(st.integers(0, d_sae)), d_sae, seed)
    dense, sparse = pair_of_saes(kind, seed=seed, d_in=d_in, d_sae=d_sae, k=k, **settings_)
    assert_same_step(dense, sparse, rows(n, d_in, seed=seed), dead)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_in_float64_are_exact(kind: str) -> None:
    dense, sparse = pair_of_saes(kind, dtype="float64")
    x = rows(33, dtype=torch.float64)
    dead = dead_mask(30, 96)
    step_of(dense, x, dead), step_of(sparse, x, dead)
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_below_zero_among_the_top_are_zero(kind: str) -> None:
    """Most pre-activations are negative here, so that k is more than are positive."""
    dense, sparse = pair_of_saes(kind, k=30)
    for sae in (dense, sparse):
        sae.b_enc.data.sub_(3.0)
    x = rows(20)
    assert (dense.encode(x).to_dense() > 0).sum() < 20 * 15
    assert_same_step(dense, sparse, x)
    assert (step_of(sparse, x).feature_acts.values() >= 0).all()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nothing_fires_at_all(kind: str) -> None:
    dense, sparse = pair_of_saes(kind)
    for sae in (dense, sparse):
        sae.b_enc.data.fill_(-100.0)
    assert_same_step(dense, sparse, rows(6))


def test_exact_ties_decode_the_same() -> None:
    """Which of two equal latents fires is open; with equal decoder rows the output is not."""
    dense, sparse = pair_of_saes("topk", k=3)
    for sae in (dense, sparse):
        with torch.no_grad():
            sae.W_enc[:, 48:] = sae.W_enc[:, :48]
            sae.W_dec[48:] = sae.W_dec[:48]
            sae.b_enc[48:] = sae.b_enc[:48]
    x = rows(30)
    a, b = step_of(dense, x), step_of(sparse, x)
    close(a.sae_out, b.sae_out)
    close(a.loss, b.loss)
    close(dense.b_dec.grad, sparse.b_dec.grad)
    both = [sae.W_dec.grad[:48] + sae.W_dec.grad[48:] for sae in (dense, sparse)]
    close(both[0], both[1])


@pytest.mark.parametrize("few", [0, 100])
@pytest.mark.parametrize("n_dead", [3, 8, 9, 60])
def test_the_auxiliary_loss_two_ways(
    few: int, n_dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k_aux is 8; dead latents are decoded densely up to FEW_DEAD times that, else sparsely."""
    monkeypatch.setattr(saes.sparse_topk, "FEW_DEAD", few)
    dense, sparse = pair_of_saes("topk")
    assert_same_step(dense, sparse, rows(20), dead_mask(n_dead, 96))


def test_normalised_input() -> None:
    norm = "layer_norm"
    dense, sparse = pair_of_saes("topk", normalize_activations=norm)
    assert_same_step(dense, sparse, rows(20))
    with pytest.raises(UserError, match=norm):
        step_of(sparse, rows(20), dead_mask(3, 96))
    with pytest.raises(UserError, match="Matryoshka"):
        pair_of_saes("matryoshka", normalize_activations=norm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nan_in_the_input_shows_in_the_loss(kind: str, dtype: str) -> None:
    _, sparse = pair_of_saes(kind, encode_dtype=dtype)
    x = rows(20)
    x[7, 3] = float("nan")
    assert step_of(sparse, x).loss.isnan()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_any_layout_of_the_encoder_works(kind: str) -> None:
    dense, sparse = pair_of_saes(kind)
    sparse.W_enc.data = sparse.W_enc.data.contiguous()
    assert_same_step(dense, sparse, rows(20), dead_mask(5, 96))


def test_autocast_changes_nothing() -> None:
    _, sparse = pair_of_saes("topk")
    plain = step_of(sparse, rows(20)).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert step_of(sparse, rows(20)).loss == plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_nan_in_the_encoder_shows_in_the_loss(kind: str, dtype: str) -> None:
    _, sparse = pair_of_saes(kind, encode_dtype=dtype)
    with torch.no_grad():
        sparse.W_enc[2, 40] = -torch.tensor(torch.nan)
    assert sparse.W_enc[2, 40].view(torch.int32) < 0
    assert step_of(sparse, rows(20)).loss.isnan()


def test_gradients_add_up_over_steps() -> None:
    _, sparse = pair_of_saes("topk")
    step_of(sparse, rows(20, seed=1))
    first = sparse.W_enc.grad.clone()
    step_of(sparse, rows(20, seed=2))
    both = sparse.W_enc.grad.clone()
    sparse.zero_grad()
    step_of(sparse, rows(20, seed=2))
    close(both, first + sparse.W_enc.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_same_input_gives_the_same_bytes(kind: str, dtype: str, device: str) -> None:
    _, sparse = pair_of_saes(kind, encode_dtype=dtype, d_sae=512)
    sparse.to(device)
    x, dead = rows(200).to(device), dead_mask(100, 512).to(device)
    gradients = []
    for _ in range(2):
        sparse.zero_grad()
        step_of(sparse, x, dead)
        gradients.append([p.grad.clone() for p in sparse.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_devices(kind: str, device: str) -> None:
    dense, sparse = pair_of_saes(kind)
    dense.to(device), sparse.to(device)
    assert_same_step(dense, sparse, rows(33).to(device), dead_mask(30, 96).to(device))


# ---------------------------------------------------------------------------------- the trainer


def trainer_of(sae: Any, *, steps: int = 20, batch: int = 32, window: int = 1000) -> Any:
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=1e-2,
        lr_end=1e-3,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=3,
        lr_decay_steps=4,
        dead_feature_window=window,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(()))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_training_is_sae_lens_s(kind: str) -> None:
    """Twelve steps, some with dead latents, with a fused Adam against a plain one."""
    dense, sparse = pair_of_saes(kind, spread=0.05)
    trainers = [trainer_of(dense, window=2), trainer_of(sparse, window=2)]
    fuse_optimizer(trainers[1])
    dead = 0
    for step in range(12):
        outputs = [trainer.step(rows(32, seed=step)) for trainer in trainers]
        for trainer in trainers:
            trainer.n_training_steps += 1
        close(outputs[0].loss, outputs[1].loss)
        dead = max(dead, int(trainers[1].dead_neurons.sum()))
    assert dead > 0
    a, b = (t.sae.state_dict() for t in trainers)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    for name in ("n_forward_passes_since_fired", "act_freq_scores"):
        assert torch.equal(getattr(trainers[0], name), getattr(trainers[1], name)), name
    assert trainers[0].lr_scheduler.get_last_lr() == trainers[1].lr_scheduler.get_last_lr()
    logs = [t.build_train_step_log_dict(o, 1) for t, o in zip(trainers, outputs, strict=True)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_bfloat16_trains_as_well(kind: str) -> None:
    """On planted features, variance explained is within 0.5 % of sae-lens's."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(64, 32, generator=generator), dim=1)
    fires = (torch.rand(4096, 64, generator=generator) < 0.06) * torch.rand(
        4096, 64, generator=generator
    )
    x = fires @ features
    explained = []
    for sae in pair_of_saes(
        kind, d_in=32, d_sae=128, k=4, spread=0.0, encode_dtype="bfloat16",
        **({"matryoshka_widths": [32, 128]} if kind == "matryoshka" else {}),
    ):  # fmt: skip
        trainer = trainer_of(sae, steps=100, batch=128)
        for step in range(100):
            at = torch.randint(4096, (128,), generator=torch.Generator().manual_seed(step))
            output = trainer.step(x[at])
            trainer.n_training_steps += 1
        left = (output.sae_out - output.sae_in).detach().pow(2).sum()
        explained.append(1 - float(left / (x[at] - x[at].mean(0)).pow(2).sum()))
    assert explained[0] > 0.3
    assert explained[1] == pytest.approx(explained[0], abs=0.005)


def test_fuse_optimizer_half_way_keeps_state_and_schedule() -> None:
    """Adam and its schedule go on as if nothing had happened."""
    saes_ = [pair_of_saes("topk")[1] for _ in range(2)]
    plain, fused = trainers = [trainer_of(sae) for sae in saes_]
    for step in range(10):
        if step == 5:
            fuse_optimizer(fused)
            assert isinstance(fused.optimizer, FusedAdam)
        for trainer in trainers:
            trainer.step(rows(32, seed=step))
        assert plain.optimizer.param_groups[0]["lr"] == fused.optimizer.param_groups[0]["lr"]
    for p, q in zip(plain.sae.parameters(), fused.sae.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(("kind", "plain"), [
    ("topk", "topk"), ("batchtopk", "jumprelu"), ("matryoshka", "jumprelu"),
])  # fmt: skip
def test_inference_folder_is_plain_sae_lens(kind: str, plain: str, tmp_path: Path) -> None:
    dense, sparse = pair_of_saes(kind)
    for name, sae in (("dense", dense), ("sparse", sparse)):
        step_of(sae, rows(50))
        sae.save_inference_model(tmp_path / name)
    loaded = [SAE.load_from_disk(tmp_path / name) for name in ("dense", "sparse")]
    assert json.loads((tmp_path / "sparse" / "cfg.json").read_text())["architecture"] == plain
    assert type(loaded[1]) is type(loaded[0])
    latents = [sae.encode(rows(20)) for sae in loaded]
    assert (latents[0] > 0).any()
    torch.testing.assert_close(latents[1], latents[0])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_training_folder_comes_back(kind: str, tmp_path: Path) -> None:
    _, sparse = pair_of_saes(kind)
    step_of(sparse, rows(20))
    sparse.save_model(tmp_path / "sae")
    again = TrainingSAE.load_from_disk(tmp_path / "sae")
    assert type(again) is type(sparse)
    assert again.cfg.to_dict() == sparse.cfg.to_dict()
    for name, value in sparse.state_dict().items():
        assert value.is_contiguous()
        read = again.state_dict()[name]
        assert torch.equal(read, value.to(read.dtype))  # sae-lens reads the threshold as float32
    assert again.W_enc.stride() == sparse.W_enc.stride() == (1, 16)
    x = rows(20, seed=3)
    assert torch.equal(step_of(again, x).loss, step_of(sparse, x).loss)


@pytest.mark.parametrize("wrong", [
    {"k": 97}, {"k": 0}, {"dtype": "bfloat16"}, {"encode_dtype": "int8"}, {"candidate_margin": -1},
])  # fmt: skip
def test_bad_settings_are_refused_by_value(wrong: dict[str, Any]) -> None:
    config = SparseTopKTrainingSAEConfig(d_in=16, d_sae=96, k=5)
    ((name, value),) = wrong.items()
    setattr(config, name, value)
    with pytest.raises(UserError, match=f"{name}.*{value}"):
        config.__post_init__()
