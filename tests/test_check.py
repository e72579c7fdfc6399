"""`saes.check`, `saes.mistakes`: a good SAE passes; broken in a known way, it is refused and the
way is named; a random one is refused without a cause."""

import copy
import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from saes import check as checks
from saes import mistakes
from saes.check import Check, Expect, describe, require, self_check
from saes.errors import UserError
from saes.latents import SaeLens
from saes.lm.model import LM, load_lm
from saes.pretrained import load_checked, load_sae

SITE = "blocks.3.hook_resid_post"
PROMISED = Expect(0.926, 32.0)
ALL_TEXTS = mistakes.check_texts


@pytest.fixture(scope="module")
def lm() -> LM:
    return load_lm("packaged/demo_lm")


@pytest.fixture(autouse=True)
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five texts instead of 45."""
    monkeypatch.setattr(mistakes, "check_texts", lambda: ALL_TEXTS()[:5])


def demo(site: str = SITE) -> SaeLens:
    """A fresh copy of a packaged SAE, free to be broken."""
    return load_sae(f"packaged/demo_saes/{site}", d_model=256)


def as_kind(good: SaeLens, sae: Any, **more: Tensor) -> SaeLens:
    """The same weights read as another architecture."""
    with torch.no_grad():
        sae.load_state_dict({**good.sae.state_dict(), **more})
    return SaeLens(sae.eval().requires_grad_(False), good.site)


# -------------------------------------------------------------------------------------- a good one


def test_the_packaged_saes_pass_on_all_texts(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mistakes, "check_texts", ALL_TEXTS)
    before = torch.random.get_rng_state(), torch.get_num_threads()
    dictionary, check = load_checked("packaged/demo_saes/blocks.5.hook_resid_post", lm)
    assert check.ok
    assert check.cause is None
    assert check.tried == ()
    assert 2000 < check.tokens < 6000
    assert check.l0 == 32
    assert abs(check.variance_explained - 0.904) < 0.02  # on books: quality.json beside it
    assert abs(check.needed - (0.904 - checks.TOLERANCE)) < 1e-3
    assert check.source == "packaged/demo_saes/blocks.5.hook_resid_post"
    require(check, trust=False)
    assert self_check(lm, dictionary, expect=Expect(0.90397, 32.0)) == check._replace(
        needed=0.90397 - checks.TOLERANCE
    )
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == torch.get_num_threads()


def test_figures_against_an_independent_computation(lm: LM) -> None:
    dictionary = demo()
    check = self_check(lm, dictionary)
    rows: list[Tensor] = []
    for text in mistakes.check_texts():
        ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text)["input_ids"][1:]]
        hidden = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        rows.append(hidden[4][0, 1:])
    x = torch.cat(rows)
    out = dictionary.decode(dictionary.encode(x)).numpy()
    unexplained = np.square(x.numpy() - out).sum() / np.square(x.numpy() - x.numpy().mean(0)).sum()
    assert check.tokens == len(x)
    assert check.variance_explained == pytest.approx(1 - unexplained, abs=1e-4)
    assert check.l0 == pytest.approx((dictionary.encode(x) != 0).sum(1).float().mean())


def test_the_other_name_of_a_site_is_the_same_site(lm: LM) -> None:
    named = dataclasses.replace(demo(), site="blocks.4.hook_resid_pre")
    check, usual = self_check(lm, named), self_check(lm, demo())
    assert check.ok
    assert check.variance_explained == pytest.approx(usual.variance_explained, abs=1e-6)


def test_first_and_last_sites_have_one_neighbour(lm: LM) -> None:
    for site in ("blocks.0.hook_resid_pre", "blocks.7.hook_resid_post"):
        check = self_check(lm, dataclasses.replace(demo(), site=site))
        assert not check.ok
        assert check.cause is not None
        assert SITE in check.cause


def test_a_good_jumprelu_passes(lm: LM) -> None:
    good = demo()
    threshold = torch.full((4096,), 2.5)
    jump = as_kind(good, JumpReLUSAE(JumpReLUSAEConfig(256, 4096)), threshold=threshold)
    assert self_check(lm, jump, expect=Expect(l0=32.0)).ok


# ------------------------------------------------------------------------- broken in a known way


def other_site(d: SaeLens) -> SaeLens:
    return dataclasses.replace(d, site="blocks.7.hook_resid_post")


def next_site(d: SaeLens) -> SaeLens:
    return dataclasses.replace(d, site="blocks.4.hook_resid_post")


def two_sites_early(d: SaeLens) -> SaeLens:
    return dataclasses.replace(d, site="blocks.1.hook_resid_post")


def rescaled(d: SaeLens, scale: float) -> SaeLens:
    d.sae.W_enc.data *= scale
    d.sae.W_dec.data /= scale
    d.sae.b_dec.data /= scale
    return d


def unfolded(d: SaeLens) -> SaeLens:
    """As it would be stored if it were trained on inputs of norm sqrt(256) = 16; they have 71."""
    return rescaled(d, 71 / 16)


def folded_twice(d: SaeLens) -> SaeLens:
    return rescaled(d, 16 / 71)


def transposed(d: SaeLens) -> SaeLens:
    """The numbers of a [d_in, d_sae] decoder taken as [d_sae, d_in]."""
    d.sae.W_dec.data = d.sae.W_dec.data.T.contiguous().view(4096, 256)
    return d


def transposed_encoder(d: SaeLens) -> SaeLens:
    d.sae.W_enc.data = d.sae.W_enc.data.T.contiguous().view(256, 4096)
    return d


def bias_not_subtracted(d: SaeLens) -> SaeLens:
    d.sae.cfg.apply_b_dec_to_input = False
    return d


def as_relu(d: SaeLens) -> SaeLens:
    return as_kind(d, StandardSAE(StandardSAEConfig(256, 4096)))


def threshold_ignored(d: SaeLens) -> SaeLens:
    """A JumpReLU SAE whose thresholds came out a hundred times too low."""
    threshold = torch.full((4096,), 0.025)
    return as_kind(d, JumpReLUSAE(JumpReLUSAEConfig(256, 4096)), threshold=threshold)


def wrong_k(d: SaeLens) -> SaeLens:
    return as_kind(d, TopKSAE(TopKSAEConfig(256, 4096, k=2)))


BREAKS: list[tuple[Callable[[SaeLens], SaeLens], Expect, str, str]] = [
    (other_site, Expect(), "other site", SITE),
    (next_site, Expect(), "other site", SITE),
    (next_site, PROMISED, "other site", SITE),
    (two_sites_early, Expect(), "other site", SITE),
    (unfolded, Expect(), "not folded", "multiplied by 0.22"),
    (unfolded, PROMISED, "not folded", "multiplied by 0.22"),
    (folded_twice, Expect(), "should not be", "multiplied by 4.4"),
    (transposed, Expect(), "transposed decoder", "W_dec"),
    (transposed_encoder, Expect(), "transposed encoder", "W_enc"),
    (bias_not_subtracted, Expect(), "wrong use of b_dec", "with it taken"),
    (as_relu, PROMISED, "wrong activation function", "the 32 largest"),
    (as_relu, Expect(l0=32.0), "wrong activation function", "the 32 largest"),
    (threshold_ignored, PROMISED, "wrong activation function", "the 32 largest"),
    (wrong_k, PROMISED, "wrong activation function", "the 32 largest"),
]


@pytest.mark.parametrize(
    ("break_it", "expect", "cause", "detail"),
    BREAKS,
    ids=[f"{b[0].__name__}-{'promised' if any(b[1]) else 'default'}" for b in BREAKS],
)
def test_the_cause_is_named(
    break_it: Callable[[SaeLens], SaeLens], expect: Expect, cause: str, detail: str, lm: LM
) -> None:
    check = self_check(lm, break_it(demo()), expect=expect)
    assert not check.ok
    assert check.cause is not None
    assert cause in check.cause
    assert detail in check.cause
    best = max(check.tried, key=lambda t: t.variance_explained)
    assert best.variance_explained > 0.9
    with pytest.raises(UserError, match=r"Probable cause: .*--trust") as error:
        require(check, trust=False)
    assert check.cause in str(error.value)
    assert "\n" not in str(error.value)
    require(check, trust=True)


def test_a_threshold_that_was_lost_is_found_again(lm: LM) -> None:
    """Read as a ReLU, an SAE with thresholds needs them back; which ones it had is not promised."""
    relu = as_relu(demo())
    x = mistakes.residuals(lm, [SITE], front=lm.tokenizer.bos_token_id)[SITE]
    found = next(u for u in mistakes.every(lm, relu, x, 32.0) if "one threshold" in u.detail)
    z, out = found.run(x)
    assert (z != 0).sum() == 32 * len(x)
    h = relu.encode(x)
    cut = float(found.detail.split()[-1])
    torch.testing.assert_close(z, h * (h >= z[z > 0].min()))
    assert float(h[z == 0].max()) == pytest.approx(cut, rel=1e-3)
    torch.testing.assert_close(out, relu.decode(z))


@pytest.fixture
def without_bos(lm: LM) -> LM:
    """The same model with a tokenizer that knows no BOS."""
    tokenizer: Any = copy.deepcopy(lm.tokenizer)
    tokenizer.bos_token = None
    return dataclasses.replace(lm, tokenizer=tokenizer)


@pytest.mark.parametrize("expect", [Expect(), Expect(1.0, 32.0)], ids=["default", "promised"])
def test_missing_bos(expect: Expect, without_bos: LM) -> None:
    """The demo SAE was trained with BOS, as its metadata say; without, a third more is lost."""
    check = self_check(without_bos, demo(), expect=expect)
    assert not check.ok
    assert check.cause is not None
    assert "missing BOS" in check.cause
    assert "with token 1 in front" in check.cause


def test_bos_that_it_was_not_trained_with(lm: LM) -> None:
    """An SAE of directions that fit the model's residuals without BOS alone."""
    x = mistakes.residuals(lm, [SITE], front=None)[SITE]
    y = mistakes.residuals(lm, [SITE], front=lm.tokenizer.bos_token_id)[SITE]
    # what is the same on every token with BOS, and has no variance without it, is an error with it
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False).Vh[:40]
    sae = StandardSAE(StandardSAEConfig(256, 80, metadata=SAEMetadata(prepend_bos=False)))
    sae.W_dec.data = torch.cat([directions, -directions])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_dec.data = mean
    dictionary = SaeLens(sae.requires_grad_(False), SITE)
    run = mistakes.plain(dictionary)
    without, with_it = checks._score(run, x, 80)[0], checks._score(run, y, 80)[0]
    assert without > with_it
    check = self_check(lm, dictionary, expect=Expect((without + with_it) / 2 + checks.TOLERANCE))
    assert not check.ok
    assert check.cause is not None
    assert check.cause.startswith("BOS, which it was not trained with (without BOS ")


def of_pairs(x: Tensor, count: int) -> SaeLens:
    """The first principal components of x, each as two latents that fire on either side of 0."""
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False).Vh[:count]
    sae = StandardSAE(StandardSAEConfig(256, 2 * count))
    sae.W_dec.data = torch.cat([directions, -directions])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    sae.b_dec.data = mean
    return SaeLens(sae.requires_grad_(False), SITE)


def by_norm(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True) * 16


def by_layer_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[1:])


@pytest.mark.parametrize(
    ("normalise", "detail"),
    [(by_norm, "each input scaled to norm sqrt(d)"), (by_layer_norm, "layer norm of each input")],
)
def test_normalisation_of_each_token(
    normalise: Callable[[Tensor], Tensor], detail: str, lm: LM
) -> None:
    """An SAE of x over its own norm, for which one factor for all makes up only in part."""
    x = mistakes.residuals(lm, [SITE], front=lm.tokenizer.bos_token_id)[SITE]
    dictionary = of_pairs(normalise(x), 40)
    undone = {u.detail: u for u in mistakes.every(lm, dictionary, x[: mistakes.TRIAL_TOKENS], None)}
    right = undone[f"with {detail}"]
    explained = checks._score(right.run, right.residuals, 80)[0]
    check = self_check(lm, dictionary, expect=Expect(explained - 0.01 + checks.TOLERANCE))
    assert check.variance_explained < explained - 0.1
    assert not check.ok
    assert check.cause is not None
    assert check.cause.startswith("normalisation of each token, which this package does not do")
    assert detail in check.cause


@pytest.mark.parametrize(("seed", "expect"), [(0, Expect()), (1, PROMISED)])
def test_random_weights_are_refused_without_a_cause(seed: int, expect: Expect, lm: LM) -> None:
    dictionary, generator = demo(), torch.Generator().manual_seed(seed)
    for matrix in (dictionary.sae.W_enc, dictionary.sae.W_dec):
        matrix.data.normal_(std=1 / 16, generator=generator)
    check = self_check(lm, dictionary, expect=expect)
    assert not check.ok
    assert check.cause is None
    assert {t.cause.split()[0] for t in check.tried} >= {
        "BOS,",
        "other",
        "normalisation",
        "transposed",
        "wrong",
    }
    with pytest.raises(UserError, match="no simple cause found"):
        require(check, trust=False)


def test_too_many_latents_are_refused_though_all_is_explained(lm: LM) -> None:
    """The identity, as 256 pairs of latents of which one fires: half of them on every token."""
    sae = StandardSAE(StandardSAEConfig(256, 512))
    sae.W_dec.data = torch.cat([torch.eye(256), -torch.eye(256)])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    dictionary = SaeLens(sae.requires_grad_(False), SITE)
    check = self_check(lm, dictionary, expect=Expect(l0=32.0))
    assert check.variance_explained > 0.999
    assert check.l0 == pytest.approx(256, abs=1)
    assert check.l0_range == (32 / 3, 96)
    assert not check.ok


def test_no_latent_fires_or_values_overflow(lm: LM) -> None:
    dead = demo()
    dead.sae.b_enc.data.fill_(-1e6)
    assert not self_check(lm, dead).ok
    wild = demo()
    wild.sae.W_dec.data.fill_(torch.inf)
    check = self_check(lm, wild)
    assert not check.ok
    assert "nan" in describe(check) or "inf" in describe(check)


@pytest.mark.parametrize(
    ("explained", "needed"),
    [
        (-9.0, checks.FLOOR),
        (0, checks.FLOOR),
        (0.25, checks.FLOOR),
        (0.9, 0.9 - checks.TOLERANCE),
        (1.0, 1 - checks.TOLERANCE),
        (1.5, checks.LEAST_EXPLAINED),
        (True, checks.LEAST_EXPLAINED),
        (torch.nan, checks.LEAST_EXPLAINED),
        (-torch.inf, checks.LEAST_EXPLAINED),
    ],
)
def test_promises_that_would_disarm_the_check(explained: Any, needed: float) -> None:
    for l0 in (None, torch.nan, torch.inf, True, 0.0, -3.0):
        promised = checks._promises(Expect(explained, l0))
        assert promised.l0 is None
        bounds = checks._bounds(promised, 4096)
        assert bounds[0] == pytest.approx(needed)
        assert bounds[1] == (1.0, 2048.0)


def test_a_promise_in_the_files_does_not_disarm_the_check(
    tiny_lm: LM, tmp_path: Path, tiny_sae_folder: Path
) -> None:
    """The SAE is of random weights, and explains less than nothing of this model."""
    folder = shutil.copytree(tiny_sae_folder, tmp_path / "sae")
    for promise, needed in (("-9", 0.2), ("0", 0.2), ("NaN", 0.5), ("true", 0.5), ("1e400", 0.5)):
        (folder / "quality.json").write_text(f'{{"held_out": {{"variance_explained": {promise}}}}}')
        with pytest.raises(UserError, match=f"{needed:.2f} or more expected"):
            load_checked(folder, tiny_lm)


def test_a_good_sae_is_not_refused_for_a_promise_that_is_no_number(lm: LM) -> None:
    check = self_check(lm, demo(), expect=Expect(torch.nan, torch.nan))
    assert check.ok
    assert check == self_check(lm, demo())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_residuals_that_are_not_finite_are_named(value: float, lm: LM) -> None:
    broken = load_lm("packaged/demo_lm")
    weights: Any = broken.model.get_input_embeddings().weight
    weights.data[:, 0] = value
    with pytest.raises(UserError, match=rf"residuals at blocks\.\d.* of {lm.name} are not finite"):
        self_check(broken, demo())


def test_latents_are_never_dense_for_more_than_the_bound(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []

    class Counted(StandardSAE):
        def encode(self, x: Tensor) -> Tensor:
            rows.append(len(x))
            return super().encode(x)

    relu = as_kind(demo(), Counted(StandardSAEConfig(256, 4096)))
    shapes: list[int] = []
    activations = mistakes._activations

    def seen(sae: Any, h: Tensor, l0: float | None) -> Any:
        shapes.append(h.numel())
        return activations(sae, h, l0)

    monkeypatch.setattr(mistakes, "_activations", seen)
    monkeypatch.setattr(mistakes, "DENSE", 4096 * 100)
    monkeypatch.setattr(checks, "DENSE", 4096 * 100)
    assert not self_check(lm, relu, expect=PROMISED).ok
    assert shapes == [4096 * 100]
    assert max(rows) == 100
    monkeypatch.setattr(mistakes, "DENSE", 1)
    x = mistakes.residuals(lm, [SITE], front=None, most=4)[SITE]
    assert list(mistakes._activated(relu, x, 32.0))
    assert shapes[-1] == 4096  # one token at least


def test_figures_of_the_documentation(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mistakes, "check_texts", ALL_TEXTS)
    text = (Path(__file__).parents[1] / "docs" / "loading.md").read_text(encoding="utf-8")
    written = re.search(r"check\.variance_explained, check\.l0  # ([\d.]+), ([\d.]+)", text)
    assert written is not None
    check = load_checked(f"packaged/demo_saes/{SITE}", lm)[1]
    assert (f"{check.variance_explained:.3f}", f"{check.l0:.1f}") == written.groups()
    for figure in (f"less {checks.TOLERANCE}", f"less than {checks.FLOOR}"):
        assert figure in " ".join(text.split())


def test_a_site_that_the_model_lacks(lm: LM) -> None:
    with pytest.raises(UserError, match="out of range"):
        self_check(lm, dataclasses.replace(demo(), site="blocks.8.hook_resid_post"))


def test_load_checked_refuses_and_trusts(tiny_lm: LM, tiny_sae_folder: Path) -> None:
    with pytest.raises(UserError, match="no simple cause found"):
        load_checked(tiny_sae_folder, tiny_lm)
    dictionary, check = load_checked(tiny_sae_folder, tiny_lm, trust=True)
    assert not check.ok
    assert dictionary.d_sae == 128
    assert check.l0_range == (8 / 3, 24)


def test_the_check_is_the_same_every_time(tiny_lm: LM, tiny_sae_folder: Path) -> None:
    checked: list[Check] = [load_checked(tiny_sae_folder, tiny_lm, trust=True)[1] for _ in range(2)]
    assert checked[0] == checked[1]
