"""sae-lens's own step, exact resume, and folders that plain sae-lens reads."""

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from sklearn.metrics import r2_score

from saes.errors import UserError
from saes.latents import SaeLens
from saes.lm.model import LM
from saes.pretrained import load_sae
from saes.stream.activations import ActivationStream, StreamConfig
from saes.track import JsonlTracker
from saes.training import train
from saes.training.architectures import SPARSITY, SaeSpec, TrainConfig
from saes.training.checkpoint import read_checkpoint, trainer_state
from saes.training.export import evaluate, export
from saes.training.train import train_saes

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
ROWS = np.random.default_rng(0).integers(5, 290, (200, 31)).astype(np.uint16)
SPECS = tuple(SaeSpec(site, "topk", 96, k=6, seed=i) for i, site in enumerate(SITES))
CONFIG = TrainConfig(
    tokens=60 * 128, lr=5e-3, dead_tokens=1500, checkpoint_steps=7, calibration_tokens=1024
)
SETTINGS: dict[str, dict[str, float]] = {
    name: {"k": 6} if kind == "k" else {"l1": 3.0} if kind == "l1" else {"l0": 0.3}
    for name, kind in SPARSITY.items()
}
WEIGHTS = "sae_weights.safetensors"


def stream(lm: LM) -> ActivationStream:
    return ActivationStream(lm, ROWS, SITES, StreamConfig(batch=128, chunk_rows=16), bos=1)


def spec_of(architecture: str) -> SaeSpec:
    return SaeSpec(SITES[0], architecture, 96, **SETTINGS[architecture])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tiny_lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_saes(stream(tiny_lm), SPECS, CONFIG, folder, folder / "work")
    return folder


@pytest.fixture(scope="module")
def x(tiny_lm: LM) -> dict[str, torch.Tensor]:
    """Residuals of each site: the first ten batches of the stream."""
    batches = stream(tiny_lm)
    parts = [next(batches) for _ in range(10)]
    return {site: torch.cat([part[site] for part in parts]) for site in SITES}


def begun(lm: LM, tmp_path: Path, *specs: SaeSpec, config: TrainConfig = CONFIG) -> Any:
    """A run just before its first step."""
    activations = stream(lm)
    named = {spec.site: spec for spec in specs}
    trainers = {s: train.build(spec, config, activations, steps=60) for s, spec in named.items()}
    run = train._Run(
        activations, config, named, trainers, 60, tmp_path, {}, train.NullTracker(), {}
    )
    train._fit_to_data(run, train.Interrupts(), ())
    return run


def explained(x: torch.Tensor, out: torch.Tensor) -> float:
    return float(r2_score(x.numpy(), out.detach().numpy(), multioutput="variance_weighted"))


def test_the_folders_load_in_plain_sae_lens(trained: Path, x: dict[str, torch.Tensor]) -> None:
    for site in SITES:
        sae = SAE.load_from_disk(trained / site, dtype="float32")
        z = sae.encode(x[site])
        assert ((z > 0).sum(1) == 6).float().mean() > 0.99
        assert explained(x[site], sae.decode(z)) > 0.5
        ours = load_sae(trained / site, d_model=32)
        assert ours.site == site
        assert torch.equal(ours.encode(x[site]), z)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=0.01)
        metadata = sae.cfg.metadata
        assert (metadata.model_name, metadata.hook_name) == ("tiny_lm", site)
        assert (metadata.context_size, metadata.prepend_bos) == (32, True)
        assert metadata.training_tokens == 60 * 128
    assert SAE.load_from_disk(trained / SITES[0]).W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", SPARSITY)
def test_every_architecture_trains_and_what_is_saved_is_what_was_trained(
    architecture: str, tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    spec, site = spec_of(architecture), SITES[0]
    config = replace(CONFIG, dtype="float32", calibration_tokens=4096)
    held_out = {site: x[site]}
    folders = train_saes(
        stream(tiny_lm), [spec], config, tmp_path, tmp_path / "work", held_out=held_out
    )
    assert folders == {site: tmp_path / site}
    sae = SAE.load_from_disk(tmp_path / site, dtype="float32")
    record = json.loads((tmp_path / site / "training.json").read_text())
    trained, saved = record["trained"], record["saved"]
    assert saved["l0"] == pytest.approx(trained["l0"], rel=0.05)
    assert saved["variance_explained"] == pytest.approx(trained["variance_explained"], abs=0.02)
    assert sae.cfg.metadata.l0 == trained["l0"]
    fit = evaluate(sae, held_out[site].split(128))
    assert record["held_out"] == pytest.approx(fit._asdict())
    assert fit.variance_explained == pytest.approx(
        explained(held_out[site], sae.decode(sae.encode(held_out[site]))), abs=1e-3
    )
    assert fit.l0 == pytest.approx(trained["l0"], rel=0.05)
    start = begun(tiny_lm, tmp_path, spec)
    untrained = evaluate(start.trainers[site].sae, held_out[site].split(128), 1.0)
    assert fit.variance_explained > max(0.3, untrained.variance_explained)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-4)


@pytest.mark.parametrize("architecture", SPARSITY)
def test_the_scale_is_folded_away_exactly(
    architecture: str, tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    """Latents and reconstructions of x are those of scale * x in training, divided by it."""
    spec, site = spec_of(architecture), SITES[0]
    run = begun(tiny_lm, tmp_path, spec)
    trainer = run.trainers[site]
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        for _ in range(20):
            train._step(trainer, next(run.activations)[site])
    trainer.sae.eval()
    scale = trainer.activation_scaler.scaling_factor
    assert not 0.8 < scale < 1.25
    before = copy.deepcopy(trainer.sae.state_dict())
    batches = x[site].split(128)
    sae = export(
        trainer, spec, tmp_path / "sae", batches, dtype="float32", record=lambda *_: {}
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in trainer.sae.state_dict().items())
    with torch.no_grad():
        acts = [trainer.sae.encode(scale * batch) for batch in batches]
        z = torch.cat([a.to_dense() if a.is_sparse else a for a in acts])
        out = torch.cat([trainer.sae.decode(a) for a in acts]) / scale
    norms = trainer.sae.W_dec.norm(dim=1)
    again = sae.encode(x[site])
    if "batchtopk" in architecture:  # ranks within a batch against one threshold
        both = (again > 0) & (z > 0)
        assert both.sum() > 0.85 * (z > 0).sum()
        torch.testing.assert_close(again[both], (z * norms / scale)[both], rtol=1e-3, atol=1e-4)
    else:
        same = (again != 0) == (z != 0)
        assert same.float().mean() > 0.9999  # rounding at a threshold
        tokens = same.all(1)
        torch.testing.assert_close(again[tokens], (z * norms / scale)[tokens], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(sae.decode(again)[tokens], out[tokens], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "jumprelu"])
def test_the_reloaded_l0_is_the_trained_one_on_other_text(
    architecture: str, tiny_lm: LM, tmp_path: Path
) -> None:
    """As a user loads it, saved in bfloat16; the training class chooses latents by batch."""
    spec, site = spec_of(architecture), SITES[0]
    config = replace(CONFIG, calibration_tokens=6000)
    (folder,) = train_saes(stream(tiny_lm), [spec], config, tmp_path, tmp_path / "w").values()
    other = np.random.default_rng(7).integers(5, 290, (200, 31)).astype(np.uint16)
    unseen = ActivationStream(tiny_lm, other, SITES, StreamConfig(batch=128, chunk_rows=16), bos=1)
    batches = [next(unseen)[site] for _ in range(36)]
    state = read_checkpoint(tmp_path / "w").state["saes"][site]  # type: ignore[union-attr]
    trainer = train.build(spec, config, stream(tiny_lm), steps=60)
    trainer.sae.load_state_dict(state["sae"])
    trained = evaluate(trainer.sae, batches, state["scaling_factor"])
    assert architecture == "jumprelu" or trained.l0 == pytest.approx(6, abs=0.01)
    reloaded = evaluate(load_sae(folder, d_model=32).sae, batches)
    assert reloaded.l0 == pytest.approx(trained.l0, rel=0.05)


def test_training_helps_and_sites_differ(
    trained: Path, tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    short = replace(CONFIG, tokens=2 * 128)
    train_saes(stream(tiny_lm), SPECS, short, tmp_path, tmp_path / "work")
    early, late, other = (
        explained(x[SITES[0]], load_sae(folder, d_model=32).sae(x[SITES[0]]))
        for folder in (tmp_path / SITES[0], trained / SITES[0], trained / SITES[1])
    )
    assert late > early + 0.1
    assert late > other + 0.05


def test_the_activations_are_fitted(tiny_lm: LM, tmp_path: Path, x: dict[str, Any]) -> None:
    before = stream(tiny_lm).state_dict()
    run = begun(tiny_lm, tmp_path, SPECS[0])
    trainer = run.trainers[SITES[0]]
    assert run.activations.state_dict() == before
    zero = begun(tiny_lm, tmp_path, SPECS[0], config=replace(CONFIG, b_dec="zero"))
    assert not zero.trainers[SITES[0]].sae.b_dec.any()
    scaled = x[SITES[0]][: 8 * 128] * trainer.activation_scaler.scaling_factor
    torch.testing.assert_close(trainer.sae.b_dec.detach(), scaled.mean(0), rtol=1e-4, atol=1e-4)
    assert (scaled - scaled.mean(0)).norm(dim=1).mean() == pytest.approx(32**0.5, rel=1e-4)


@pytest.mark.parametrize("architecture", SPARSITY)
def test_steps_that_are_tried_for_their_time_leave_no_trace(
    architecture: str, tiny_lm: LM, tmp_path: Path
) -> None:
    spec = spec_of(architecture)
    tried = trainer_state(begun(tiny_lm, tmp_path, spec).trainers[SITES[0]])
    fresh = trainer_state(train.build(spec, CONFIG, stream(tiny_lm), steps=60))
    assert tried["optimizer"]["state"] == {}
    assert tried["scaling_factor"] is not None
    for key in ("optimizer", "lr_scheduler", "coefficients"):
        assert str(tried[key]) == str(fresh[key])
    same = {**tried["sae"], **tried["counts"]}
    for key, value in {**fresh["sae"], **fresh["counts"]}.items():
        assert key == "b_dec" or torch.equal(torch.as_tensor(same[key]), torch.as_tensor(value))


class Clock:
    """Time that passes only where a test lets it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_time_and_passes_are_said_before_the_first_step(
    tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chunk of three batches takes 9 s to read, a step of each SAE 2 s."""
    clock, plain, calls = Clock(), train._step, []

    def step(trainer: Any, x: torch.Tensor) -> Any:
        clock.now += 2
        return plain(trainer, x)

    class Slow(Altered):
        def __next__(self) -> dict[str, torch.Tensor]:
            calls.append(0)
            if len(calls) > 8:
                raise KeyboardInterrupt
            clock.now += 9 if len(calls) % 3 == 1 else 0
            return next(self.inner)

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(train, "_step", step)
    source = stream(tiny_lm)
    with pytest.raises(KeyboardInterrupt):
        train_saes(Slow(source, 0, 1), SPECS, CONFIG, tmp_path, tmp_path / "w")
    said = (
        f"takes about 7 min for 60 steps, 7,680 tokens: 1.2 passes over {source.tokens_per_epoch:,}"
    )
    assert said in capsys.readouterr().err  # 60 * (9 / 3 + 2 + 2) s
    assert source.tokens_per_epoch == 200 * 31


def test_tokens_per_second_after_a_resumption(
    tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes a second, so each point must say 128."""
    clock = Clock()

    class Ticking(Altered):
        def __next__(self) -> dict[str, torch.Tensor]:
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            clock.now += 1
            return next(self.inner)

    monkeypatch.setattr(train, "time", clock)
    config, name = replace(CONFIG, held_out_steps=1000), "details/tokens_per_second"
    with pytest.raises(KeyboardInterrupt):
        train_saes(Ticking(stream(tiny_lm), 8 + 33, 1), SPECS[:1], config, tmp_path, tmp_path / "w")
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    train_saes(
        Ticking(stream(tiny_lm), 0, 1), SPECS[:1], config, tmp_path, tmp_path / "w",
        tracker=tracker,
    )  # fmt: skip
    tracker.finish()
    lines = [json.loads(line) for line in tracker.path.read_text().splitlines()]
    speeds = {p["step"]: p["metrics"][name] for p in lines if name in p.get("metrics", {})}
    assert speeds == {40: 128.0, 60: 128.0}


@pytest.mark.parametrize("fast", [False, True])
def test_the_step_is_sae_lens_own_step(tiny_lm: LM, tmp_path: Path, fast: bool) -> None:
    """Sparse latents and rows of norm 1 give what its dense trainer gives, with dead latents."""
    config = replace(CONFIG, dead_tokens=256, fast=fast)
    run = begun(tiny_lm, tmp_path, SPECS[0], config=config)
    ours = run.trainers[SITES[0]]
    with torch.no_grad():
        ours.sae.b_enc[:20] = -100
    cfg = ours.sae.cfg
    settings = {name: getattr(cfg, name) for name in ("d_in", "d_sae", "k", "decoder_init_norm")}
    dense = TopKTrainingSAE(train_config(rescale_acts_by_decoder_norm=False, **settings))
    dense.load_state_dict(ours.sae.state_dict())
    theirs: Any = SAETrainer(ours.cfg, dense, iter(()))
    scale = ours.activation_scaler.scaling_factor
    for _ in range(12):
        x = next(run.activations)[SITES[0]]
        with torch.sparse.check_sparse_tensor_invariants(enable=False):
            train._step(ours, x)
        theirs.step(x * scale)
        with torch.no_grad():
            dense.W_dec /= dense.W_dec.norm(dim=1, keepdim=True)
    assert ours.dead_neurons.sum() == theirs.dead_neurons.sum() >= 20
    for name, weight in ours.sae.state_dict().items():
        torch.testing.assert_close(weight, dense.state_dict()[name], rtol=1e-3, atol=1e-4)


def train_config(**settings: Any) -> Any:
    from sae_lens import TopKTrainingSAEConfig

    return TopKTrainingSAEConfig(**settings)


@pytest.mark.parametrize("stop", [0, 23, 59])
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
            train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert not (tmp_path / SITES[0]).exists()
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert_same(trained, tmp_path)


def assert_same(a: Path, b: Path) -> None:
    for site in SITES:
        for name in ("cfg.json", WEIGHTS, "training.json"):
            assert (a / site / name).read_bytes() == (b / site / name).read_bytes()


def test_the_global_seed_neither_matters_nor_changes(
    trained: Path, tiny_lm: LM, tmp_path: Path
) -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert torch.equal(torch.rand(1), expected)
    assert_same(trained, tmp_path)


def test_several_saes_at_a_site_are_each_what_they_are_alone(tiny_lm: LM, tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=20 * 128)
    specs = [SaeSpec(SITES[0], "topk", 96, k=k, seed=s) for k in (3, 6) for s in (0, 1)]
    folders = train_saes(stream(tiny_lm), specs, config, tmp_path, tmp_path / "work")
    names = [f"{SITES[0]}/k{k}_s{s}" for k in (3, 6) for s in (0, 1)]
    assert list(folders) == names
    alone = train_saes(stream(tiny_lm), specs[1:2], config, tmp_path / "a", tmp_path / "b")
    together = (folders[names[1]] / WEIGHTS).read_bytes()
    assert (alone[SITES[0]] / WEIGHTS).read_bytes() == together
    assert len({(folder / WEIGHTS).read_bytes() for folder in folders.values()}) == 4


def test_a_checkpoint_of_other_settings(trained: Path, tiny_lm: LM) -> None:
    other = [replace(SPECS[0], seed=9), SPECS[1]]
    for specs, config, said in (
        (other, CONFIG, "SAEs"),
        (SPECS, replace(CONFIG, lr=1.0), "settings"),
    ):
        with pytest.raises(UserError, match=rf"other settings \({said}\)"):
            train_saes(stream(tiny_lm), specs, config, trained, trained / "work")


def test_a_damaged_checkpoint_falls_back_and_says_so(
    trained: Path, tiny_lm: LM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    for site in SITES:
        (tmp_path / site / WEIGHTS).unlink()
    newest = tmp_path / "work" / "step_00000060.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert "step_00000060.pt is damaged (SHA-256" in caplog.text
    assert_same(trained, tmp_path)
    (tmp_path / "work" / "step_00000056.pt").write_bytes(b"")
    newest.write_bytes(data[:1000])
    with pytest.raises(UserError, match=r"step_00000060\.pt is damaged \(1000 bytes instead of"):
        train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")


class Altered:
    """A stream whose batches are changed from some call on."""

    def __init__(self, inner: ActivationStream, at: int, factor: float) -> None:
        self.inner, self.at, self.factor, self.calls = inner, at, factor, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __next__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        batch = next(self.inner)
        if self.calls > self.at:
            batch[SITES[1]][0, 0] *= self.factor
        return batch


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_activations_that_are_not_finite_stop_it_and_the_checkpoint_stays(
    trained: Path, tiny_lm: LM, tmp_path: Path, factor: float
) -> None:
    said = r"blocks\.2\.hook_resid_post is (nan|inf) at step 31: an activation .* step 28 is kept"
    with pytest.raises(UserError, match=said):
        train_saes(
            Altered(stream(tiny_lm), 8 + 30, factor), SPECS, CONFIG, tmp_path, tmp_path / "work"
        )
    assert not (tmp_path / SITES[0]).exists()
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert_same(trained, tmp_path)
    with pytest.raises(UserError, match=r"blocks\.2\.hook_resid_post is not finite, .* step 0"):
        train_saes(Altered(stream(tiny_lm), 0, factor), SPECS, CONFIG, tmp_path, tmp_path / "w2")


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (0, r"^at step 1: a residual at blocks\.2\.hook_resid_post .*epoch 0, chunk 0"),
        (
            8 + 31,
            r"^at step 31: a residual at blocks\.2\S* .*chunk 10.*checkpoint of step 28 is kept",
        ),
    ],
)
def test_a_model_that_overflows_half_way(
    at: int, said: str, trained: Path, tiny_lm: LM, tmp_path: Path
) -> None:
    """The stream finds it; step and checkpoint are said too."""
    weight = tiny_lm.model.model.layers[2].mlp.down_proj.weight.data  # type: ignore[union-attr]
    before = weight.clone()

    class Overflowing(Altered):
        def __next__(self) -> dict[str, torch.Tensor]:
            self.calls += 1
            if self.calls >= self.at:
                weight[0, 0] = math.inf
            return next(self.inner)

    try:
        with pytest.raises(UserError, match=said):
            train_saes(
                Overflowing(stream(tiny_lm), at, 1), SPECS, CONFIG, tmp_path, tmp_path / "work"
            )
    finally:
        weight.copy_(before)
    assert not (tmp_path / SITES[0]).exists()
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert_same(trained, tmp_path)


@pytest.mark.parametrize(("step", "kept"), [(14, 7), (20, 14)])
def test_weights_that_are_not_finite_are_never_saved(
    step: int, kept: int, trained: Path, tiny_lm: LM, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An infinite gradient: the loss before it is finite. A checkpoint is due at 14, else at 20 a
    snapshot."""
    plain = train._step

    def infinite(trainer: Any, x: torch.Tensor) -> Any:
        sae = trainer.sae
        if trainer.n_training_steps == step - 1 and sae.cfg.metadata.hook_name == SITES[1]:
            sae.W_dec.register_hook(lambda gradient: gradient * math.inf)
        return plain(trainer, x)

    config = replace(CONFIG, snapshots=2)
    said = rf"weights of blocks\.2\S* are not finite after step {step}: .* step {kept} is kept"
    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", infinite)
        with pytest.raises(UserError, match=said):
            train_saes(stream(tiny_lm), SPECS, config, tmp_path, tmp_path / "work")
    assert not (tmp_path / "work" / "snapshots").exists()
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert_same(trained, tmp_path)


def test_a_full_disk_while_saving(
    trained: Path, tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    """What was there before stays, and nothing half-written."""
    import resource

    trainer = begun(tiny_lm, tmp_path, SPECS[0]).trainers[SITES[0]]
    folder, batches = tmp_path / "sae", x[SITES[0]].split(128)
    shutil.copytree(trained / SITES[0], folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
        with pytest.raises(UserError, match=rf"cannot write the SAE folder {folder}: .*make room"):
            export(trainer, SPECS[0], folder, batches, dtype="float32", record=lambda *_: {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    assert (folder / WEIGHTS).read_bytes() == (trained / SITES[0] / WEIGHTS).read_bytes()


def test_a_full_disk_stops_it_and_the_checkpoint_stays(
    trained: Path, tiny_lm: LM, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: the write fails half-way."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain, calls = ActivationStream.__next__, iter(range(10_000))

    class Filling(Altered):
        def __next__(self) -> dict[str, torch.Tensor]:
            if next(calls) == 8 + 25:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            return plain(self.inner)

    try:
        with pytest.raises(UserError, match=r"step_00000028\.pt: .* kept: 14, 21\)"):
            train_saes(Filling(stream(tiny_lm), 0, 1), SPECS, CONFIG, tmp_path, tmp_path / "work")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "work").glob("*.pt")) == [
        "step_00000014.pt", "step_00000021.pt",
    ]  # fmt: skip
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert_same(trained, tmp_path)


@pytest.mark.parametrize(
    ("specs", "config", "said"),
    [
        (SPECS, replace(CONFIG, tokens=127), "127 tokens"),
        ([SaeSpec("blocks.3.hook_resid_pre", "topk", 96, k=6)], CONFIG, "no activations at"),
        ((), CONFIG, "no SAE"),
        ((SPECS[0], SPECS[0]), CONFIG, "twice"),
        ([SaeSpec(SITES[0], "topk", 2**34, k=6)], CONFIG, "of memory"),
    ],
)
def test_what_does_not_fit_is_refused(
    specs: Sequence[SaeSpec], config: TrainConfig, said: str, tiny_lm: LM, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train_saes(stream(tiny_lm), specs, config, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_held_out_must_have_the_site(tiny_lm: LM, tmp_path: Path) -> None:
    held_out = {SITES[0]: torch.zeros(4, 32)}
    with pytest.raises(UserError, match=f"lack the site {SITES[1]}"):
        train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "w", held_out=held_out)


@pytest.mark.parametrize("shape", [(4, 33), (0, 32), (1, 32)])
def test_held_out_must_have_the_width_and_tokens(
    shape: tuple[int, int], tiny_lm: LM, tmp_path: Path
) -> None:
    held_out = {SITES[0]: torch.zeros(shape)}
    with pytest.raises(UserError, match=rf"of shape \[{shape[0]}, {shape[1]}\]; .* width 32"):
        train_saes(
            stream(tiny_lm), SPECS[:1], CONFIG, tmp_path, tmp_path / "w", held_out=held_out
        )  # fmt: skip


def test_a_signal_before_the_first_step(
    trained: Path, tiny_lm: LM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Signalling(Altered):
        def __next__(self) -> dict[str, torch.Tensor]:
            os.kill(os.getpid(), signal.SIGTERM)
            return next(self.inner)

    with pytest.raises(SystemExit) as caught:
        train_saes(Signalling(stream(tiny_lm), 0, 1), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert caught.value.code == 143
    assert "stopped at step 0 of 60; nothing to keep yet" in caplog.text
    assert list((tmp_path / "work").iterdir()) == []
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work")
    assert_same(trained, tmp_path)


def test_curves_carry_the_names_of_sae_lens(
    tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    held_out = {site: values[:256] for site, values in x.items()}
    config = replace(CONFIG, log_steps=10, held_out_steps=30, snapshots=1)

    def curves(name: str, specs: Sequence[SaeSpec]) -> list[dict[str, Any]]:
        tracker = JsonlTracker(tmp_path / f"{name}.jsonl")
        out = tmp_path / name
        train_saes(
            stream(tiny_lm), specs, config, out, out / "work", held_out=held_out, tracker=tracker
        )
        tracker.finish()
        return [json.loads(line) for line in tracker.path.read_text().splitlines()]

    lines = curves("one", SPECS[:1])
    points: dict[int, dict[str, float]] = {}
    for line in lines:
        if line["kind"] == "metrics":
            points.setdefault(line["step"], {}).update(line["metrics"])
    assert list(points) == [10, 20, 30, 40, 50, 60]
    assert {
        "losses/overall_loss", "losses/mse_loss", "losses/auxiliary_reconstruction_loss",
        "metrics/l0", "metrics/explained_variance", "sparsity/dead_features",
        "details/current_learning_rate", "details/n_training_samples",
        "details/tokens_per_second",
    } <= set(points[10])  # fmt: skip
    assert points[10]["details/n_training_samples"] == 1280
    assert points[10]["metrics/l0"] == pytest.approx(6, abs=0.2)
    assert points[60]["losses/mse_loss"] < points[10]["losses/mse_loss"]
    shown = {s: p["held_out/explained_variance"] for s, p in points.items() if
             "held_out/l0" in p}  # fmt: skip
    assert list(shown) == [30, 60]
    assert shown[60] > shown[30]
    bars = [line for line in lines if line["kind"] == "histogram"]
    assert [bar["step"] for bar in bars] == [30, 60]
    assert all(sum(bar["counts"]) == 96 for bar in bars)
    assert {bar["name"] for bar in bars} == {"plots/feature_density_line_chart"}
    artifacts = [(line["name"], line["type"]) for line in lines if line["kind"] == "artifact"]
    assert artifacts == [(f"{SITES[0]}-step30", "model")]
    SAE.load_from_disk(tmp_path / "one" / "work" / "snapshots" / "step_00000030" / SITES[0])
    two = [line for line in curves("two", SPECS) if line["kind"] == "metrics"]
    assert {f"{site}/losses/overall_loss" for site in SITES} <= set(two[0]["metrics"])


@pytest.mark.parametrize("written", [False, True])
def test_no_snapshot_is_lost_between_it_and_its_checkpoint(
    written: bool, tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped just before, or just after, the checkpoint of a snapshot's step is written."""
    config = replace(CONFIG, tokens=12 * 128, checkpoint_steps=3, snapshots=3)
    plain = train.write_checkpoint

    def crashing(folder: Path, step: int, state: dict[str, Any]) -> Path:
        if written or step != 6:
            plain(folder, step, state)
        if step == 6:
            raise KeyboardInterrupt
        return folder

    with monkeypatch.context() as patch:
        patch.setattr(train, "write_checkpoint", crashing)
        with pytest.raises(KeyboardInterrupt):
            train_saes(stream(tiny_lm), SPECS[:1], config, tmp_path / "a", tmp_path / "a")
    for name in ("a", "b"):
        train_saes(stream(tiny_lm), SPECS[:1], config, tmp_path / name, tmp_path / name)
    for step in (3, 6, 9):
        a, b = (tmp_path / n / "snapshots" / f"step_{step:08d}" / SITES[0] for n in "ab")
        assert (a / WEIGHTS).read_bytes() == (b / WEIGHTS).read_bytes()


def test_snapshots_and_curves_change_nothing(
    trained: Path, tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    config = replace(CONFIG, snapshots=3, log_steps=3, held_out_steps=11)
    held_out = {site: values[:256] for site, values in x.items()}
    train_saes(
        stream(tiny_lm), SPECS, config, tmp_path, tmp_path / "work", held_out=held_out
    )  # fmt: skip
    for site in SITES:
        assert (trained / site / WEIGHTS).read_bytes() == (tmp_path / site / WEIGHTS).read_bytes()


@pytest.mark.parametrize("architecture", SPARSITY)
def test_fine_tuning_begins_where_the_saved_sae_is(
    architecture: str, tiny_lm: LM, tmp_path: Path, x: dict[str, torch.Tensor]
) -> None:
    """Of batchtopk and matryoshka that is a jumprelu SAE, whose thresholds they do not take."""
    batchwise, site = "batchtopk" in architecture, SITES[0]
    first = spec_of("jumprelu" if batchwise else architecture)
    short = replace(CONFIG, tokens=20 * 128)
    (folder,) = train_saes(stream(tiny_lm), [first], short, tmp_path, tmp_path / "w").values()
    source, spec = load_sae(folder, d_model=32), spec_of(architecture)

    def tuned(name: str, config: TrainConfig) -> Any:
        out = tmp_path / name
        train_saes(stream(tiny_lm), [spec], config, out, out / "w", start_from=[source])
        return load_sae(out / site, d_model=32)

    still = replace(CONFIG, tokens=128, lr=1e-9, warmup=0.0, decay=0.0, dtype="float32")
    start, values = tuned("start", still), x[site]
    for name, weight in source.sae.state_dict().items():
        if not (batchwise and name == "threshold"):  # rows that bf16 rounded are of norm 1 again
            torch.testing.assert_close(start.sae.state_dict()[name], weight, rtol=0.01, atol=0.002)
    if not batchwise:
        before, after = source.encode(values), start.encode(values)
        same = ((before != 0) == (after != 0)).all(1)  # tokens without a latent near its threshold
        assert same.float().mean() > 0.9
        close = torch.isclose(after[same], before[same], rtol=0.02, atol=0.02)
        assert close.all() or (architecture == "matching_pursuit" and close.float().mean() > 0.999)
    begun, better = (explained(values, s.sae(values)) for s in (start, tuned("better", short)))
    assert batchwise or begun == pytest.approx(explained(values, source.sae(values)), abs=0.02)
    assert better > begun


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (replace(SPECS[0], d_sae=128), "set d_sae to 96"),
        (
            SaeSpec(SITES[0], "batchtopk", 96, k=6),
            "is a topk SAE; batchtopk begins from a jumprelu",
        ),
        (SPECS[1], "start_from holds SAEs at blocks.1"),
    ],
)
def test_a_start_that_does_not_fit(
    trained: Path, tiny_lm: LM, tmp_path: Path, spec: SaeSpec, said: str
) -> None:
    source = load_sae(trained / SITES[0], d_model=32)
    with pytest.raises(UserError, match=said):
        train_saes(stream(tiny_lm), [spec], CONFIG, tmp_path, tmp_path / "w", start_from=[source])


def test_a_start_with_decoder_rows_of_other_norms(
    trained: Path, tiny_lm: LM, tmp_path: Path
) -> None:
    sae = copy.deepcopy(load_sae(trained / SITES[0], d_model=32).sae)
    sae.W_dec.mul_(2)
    source = SaeLens(sae, SITES[0])
    with pytest.raises(UserError, match=r"norms of 2\.00"):
        train_saes(
            stream(tiny_lm), SPECS[:1], CONFIG, tmp_path, tmp_path / "w", start_from=[source]
        )


def test_a_failing_wandb_does_not_stop_training(
    trained: Path, tiny_lm: LM, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from saes.track import Trackers, WandbTracker

    class Broken:
        offline, url, step = False, "https://wandb.example/run", 0

        def log(self, *_: object, **__: object) -> None:
            raise OSError("the service is out of reach")

    tracker = Trackers(JsonlTracker(tmp_path / "metrics.jsonl"), WandbTracker(Broken))
    train_saes(stream(tiny_lm), SPECS, CONFIG, tmp_path, tmp_path / "work", tracker=tracker)
    tracker.finish()
    assert_same(trained, tmp_path)
    assert caplog.text.count("wandb failed at log: the service is out of reach") == 1
    steps = [
        json.loads(line).get("step")
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {20, 40, 60} <= set(steps)
