"""What is refused, how SAEs are named, and the trainers that are built."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saes.config import load
from saes.errors import UserError
from saes.stream.activations import About
from saes.training.architectures import (
    DEAD,
    SPARSITY,
    SaeGrid,
    SaeSpec,
    TrainConfig,
    build,
    name_specs,
)

SITE = "blocks.1.hook_resid_post"
VALUES: dict[str, dict[str, Any]] = {"k": {"k": 8}, "l1": {"l1": 2.0}, "l0": {"l0": 0.5}}
ACTIVATIONS: Any = SimpleNamespace(
    batch=64,
    d_model=16,
    device=torch.device("cpu"),
    about=About("a-model", 128, True, "a text"),
)


def spec_of(architecture: str, **more: Any) -> SaeSpec:
    return SaeSpec(SITE, architecture, 32, **VALUES[SPARSITY[architecture]], **more)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"architecture": "vanilla"}, "unknown architecture 'vanilla'; known ones: topk, abstopk"),
        ({"architecture": "topk"}, "topk needs k"),
        ({"architecture": "topk", "k": 33}, "k = 33 must lie between 1 and d_sae = 32"),
        ({"architecture": "topk", "k": 0}, "k = 0"),
        ({"architecture": "topk", "k": 2.5}, "whole number"),
        ({"architecture": "standard", "k": 4}, "standard takes no k; its sparsity is set by l1"),
        ({"architecture": "jumprelu", "l1": 1.0}, "jumprelu takes no l1"),
        ({"architecture": "topk", "k": 4, "l0": 1.0}, "topk takes no l0"),
        ({"architecture": "gated"}, "gated needs l1"),
        ({"architecture": "gated", "l1": -1.0}, "must not be negative"),
        ({"architecture": "topk", "k": 4, "bandwidth": 0.1}, "is for jumprelu"),
        ({"architecture": "jumprelu", "l0": 1.0, "target_l0": 33}, "above d_sae"),
        ({"architecture": "standard", "l1": 1.0, "dead": 1.0}, "a loss for dead latents"),
        ({"architecture": "topk", "k": 4, "dead": -1.0}, "must not be negative"),
        ({"architecture": "topk", "k": 4, "widths": (8,)}, "takes no widths"),
        ({"architecture": "matryoshka_batchtopk", "k": 4, "widths": (16, 8)}, "must rise"),
        ({"architecture": "matryoshka_batchtopk", "k": 4, "widths": (64,)}, "must rise"),
        ({"architecture": "topk", "k": 4, "d_sae": 0}, "d_sae = 0"),
    ],
)
def test_impossible_saes_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SaeSpec(**({"site": SITE, "d_sae": 32} | settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"lr": 0.0}, "lr = 0"),
        ({"warmup": 0.6, "decay": 0.5}, "overlap"),
        ({"beta1": 1.5}, "beta1 = 1.5"),
        ({"checkpoint_steps": 0}, "checkpoint_steps = 0"),
        ({"snapshots": -1}, "snapshots"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(**settings)


def test_a_grid_from_yaml() -> None:
    tree = {"architecture": "topk", "sites": [SITE, "blocks.2.hook_resid_post"], "d_sae": [16, 32],
            "k": [4, 8], "seeds": [0, 1]}  # fmt: skip
    specs = load(SaeGrid, tree).specs()
    assert len(specs) == len(set(specs)) == 16
    assert specs[0] == SaeSpec(SITE, "topk", 16, k=4)
    assert list(name_specs(specs))[:3] == [f"{SITE}/d16_k4_s0", f"{SITE}/d16_k4_s1",
                                           f"{SITE}/d16_k8_s0"]  # fmt: skip
    with pytest.raises(UserError, match="k = 40"):
        load(SaeGrid, tree | {"k": [40]})
    with pytest.raises(UserError, match="sites is empty"):
        load(SaeGrid, tree | {"sites": []})


@given(
    st.lists(
        st.tuples(
            st.sampled_from([SITE, "blocks.2.hook_resid_pre"]),
            st.sampled_from(["topk", "matryoshka_batchtopk", "jumprelu"]),
            st.sampled_from([16, 32]),
            st.sampled_from([1, 2, 16]),
            st.sampled_from([None, 0.5]),
            st.sampled_from([None, 5]),
            st.sampled_from([(), (8,), (8, 16)]),
            st.integers(0, 2),
        ),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_names_are_unique_and_as_short_as_can_be(drawn: list[Any]) -> None:
    made = []
    for site, architecture, d_sae, k, dead, target, widths, seed in drawn:
        settings: dict[str, Any] = {"dead": dead, "seed": seed}
        settings |= {"k": k} if architecture != "jumprelu" else {"l0": k, "target_l0": target}
        if architecture == "matryoshka_batchtopk":
            settings["widths"] = widths
        made.append(SaeSpec(site, architecture, d_sae, **settings))
    specs = list(dict.fromkeys(made))
    named = name_specs(specs)
    assert list(named.values()) == specs
    for site in {spec.site for spec in specs}:
        names = [name for name, spec in named.items() if spec.site == site]
        assert names == [site] or all(name.startswith(site + "/") for name in names)
    for name in named:
        assert not any(other.startswith(name + "/") for other in named), "an SAE inside another"


@pytest.mark.parametrize(
    ("architecture", "settings", "name"),
    [
        ("topk", {"dead": 0.5}, "dead0.5"),
        ("matryoshka_batchtopk", {"widths": (8, 16)}, "w8-16"),
        ("jumprelu", {"target_l0": 5}, "target5"),
    ],
)
def test_a_setting_left_out_beside_one_given(
    architecture: str, settings: dict[str, Any], name: str
) -> None:
    plain, other = spec_of(architecture), spec_of(architecture, **settings)
    assert name_specs([plain, other]) == {f"{SITE}/default": plain, f"{SITE}/{name}": other}
    assert name_specs([other]) == {SITE: other}


def test_all_that_sae_lens_trains_on_one_site() -> None:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    import saes.sparse_topk  # registers further ones

    assert saes.sparse_topk
    theirs = {name for name in SAE_TRAINING_CLASS_REGISTRY if not name.startswith("sparse_")}
    others = {name for name in theirs if "transcoder" in name or name == "temporal"}
    assert theirs - others == set(SPARSITY)


def test_the_same_sae_twice() -> None:
    with pytest.raises(UserError, match="twice"):
        name_specs([spec_of("topk"), spec_of("topk")])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("architecture", SPARSITY)
def test_trainers_are_sae_lens_own(architecture: str, fast: bool) -> None:
    from sae_lens.registry import get_sae_training_class

    config = TrainConfig(fast=fast, warmup=0.1, decay=0.3, beta1=0.8, dead_tokens=640, tokens=6400)
    spec = spec_of(architecture, seed=3)
    trainer = build(spec, config, ACTIVATIONS, steps=100)
    sae, cfg = trainer.sae, trainer.cfg
    assert isinstance(sae, get_sae_training_class(architecture)[0])
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (16, 32)
    assert (cfg.lr_warm_up_steps, cfg.lr_decay_steps, cfg.adam_beta1) == (10, 30, 0.8)
    assert (cfg.total_training_steps, cfg.dead_feature_window) == (100, 10)
    about = sae.cfg.metadata
    assert (about.model_name, about.hook_name, about.dataset) == ("a-model", SITE, "a text")
    if spec.unit_rows:
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    coefficients = {k: s.final_value for k, s in trainer.coefficient_schedulers.items()}
    kind = SPARSITY[architecture]
    assert coefficients == ({} if kind == "k" else {kind: VALUES[kind][kind]})
    assert all(s.warm_up_steps == 5 for s in trainer.coefficient_schedulers.values())
    if kind == "k":
        assert getattr(sae.cfg, "k", None) == 8 or sae.cfg.max_iterations == 8
    again, other = (build(replace(spec, seed=s), config, ACTIVATIONS, steps=100) for s in (3, 4))
    assert torch.equal(again.sae.W_dec, sae.W_dec)
    assert not torch.equal(other.sae.W_dec, sae.W_dec)


def test_options_reach_sae_lens() -> None:
    config = TrainConfig()

    def cfg(architecture: str, **more: Any) -> Any:
        return build(spec_of(architecture, **more), config, ACTIVATIONS, steps=10).sae.cfg

    assert cfg("matryoshka_batchtopk").matryoshka_widths == [4, 8, 16, 32]
    assert cfg("matryoshka_batchtopk", widths=(10, 20)).matryoshka_widths == [10, 20, 32]
    assert cfg("matryoshka_batchtopk", widths=(10, 32)).matryoshka_widths == [10, 32]
    jump = cfg("jumprelu", target_l0=5.0, bandwidth=0.2)
    assert (jump.jumprelu_sparsity_loss_mode, jump.target_l0) == ("quadratic", 5.0)
    assert (jump.jumprelu_bandwidth, jump.pre_act_loss_coefficient) == (0.2, DEAD["jumprelu"])
    assert cfg("jumprelu", dead=0.0).pre_act_loss_coefficient is None
    assert cfg("topk").aux_loss_coefficient == 1.0
    assert cfg("batchtopk", dead=0.25).aux_loss_coefficient == 0.25


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    for schedule in ("constant", "cosine"):
        config = TrainConfig(lr=0.1, warmup=0.1, decay=0.2, schedule=schedule)
        trainer: Any = build(spec_of("standard"), config, ACTIVATIONS, steps=100)
        rates = []
        for _ in range(100):
            rates.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert rates[0] == pytest.approx(0.01)
        assert max(rates) == pytest.approx(0.1) == rates[10]
        assert rates[79] == pytest.approx(0.1 if schedule == "constant" else 0.01, rel=0.05)
        assert 0 < rates[99] < 0.006


def test_settings_that_may_change_between_resumptions() -> None:
    deciding = TrainConfig().deciding()
    assert "lr" in deciding
    assert not {"checkpoint_steps", "log_steps", "held_out_steps", "snapshots"} & set(deciding)
    assert set(deciding) < set(asdict(TrainConfig()))


def test_specs_load_without_torch() -> None:
    code = "import sys, saes.training.architectures; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
