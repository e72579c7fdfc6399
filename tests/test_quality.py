"""`saes.quality` against planted dictionaries and figures computed in other ways."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import r2_score
from torch.nn import functional

from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture, forward
from saes.lm.edit import edit
from saes.lm.model import LM, load_lm
from saes.lm.tokens import pad
from saes.pretrained import load_sae
from saes.quality import (
    Quality,
    divergence,
    nearest_cosines,
    qualities,
    quality,
    quality_table,
    ratio,
)

SITE = "blocks.1.hook_resid_post"
ROWS = np.random.default_rng(0).integers(5, 290, (12, 20)).astype(np.uint16)
ROWS[:, 0] = 1
ROWS[3, 7] = 2  # a special token in the middle


@dataclass(frozen=True)
class Planted:
    """Latents are the positive and negative parts of x; `keep` = 0 makes it output a constant."""

    keep: float
    constant: torch.Tensor
    site: str = SITE
    d_in: int = 32
    d_sae: int = 64

    @property
    def W_dec(self) -> torch.Tensor:
        return torch.cat([torch.eye(32), -torch.eye(32)])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.keep * torch.cat([x.relu(), (-x).relu()], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.W_dec + self.constant


def content(lm: LM) -> torch.Tensor:
    batch = pad(lm, ROWS.astype(np.int64))
    return capture(lm, batch, [SITE])[SITE][batch.content]


def test_a_perfect_dictionary(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS)
    assert q.tokens == 12 * 19 - 1
    assert q.variance_explained == pytest.approx(1, abs=1e-6)
    assert q.variance_explained_per_token == pytest.approx(1, abs=1e-6)
    assert q.ce_sae == pytest.approx(q.ce_clean, abs=1e-6)
    assert q.recovered_mean == pytest.approx(1, abs=1e-3)
    assert q.recovered_zero == pytest.approx(1, abs=1e-3)
    assert q.l0 == pytest.approx(32)
    assert (q.dead, q.dense) == (0, pytest.approx(1, abs=0.1))


def test_a_dictionary_that_says_the_mean(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(0.0, content(tiny_lm).mean(0)), ROWS)
    assert q.variance_explained == pytest.approx(0, abs=1e-6)
    assert q.ce_sae == pytest.approx(q.ce_mean, abs=1e-6)
    assert q.recovered_mean == pytest.approx(0, abs=1e-4)
    assert (q.l0, q.dead, q.dense) == (0, 1, 0)


def test_a_dictionary_that_says_zero(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(0.0, torch.zeros(32)), ROWS)
    assert q.ce_sae == pytest.approx(q.ce_zero, abs=1e-9)
    assert q.recovered_zero == pytest.approx(0, abs=1e-9)
    assert abs(q.ce_zero - q.ce_mean) > 1e-4


def test_clean_cross_entropy_is_hugging_faces_loss(tiny_lm: LM) -> None:
    ids = torch.from_numpy(ROWS.astype(np.int64))
    labels = ids.clone()
    labels[:, 1] = -100  # predicted from BOS
    labels[3, 8] = -100  # predicted from </s>
    expected = float(tiny_lm.model(input_ids=ids, labels=labels).loss)
    q = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS, pass_rows=5)
    assert q.ce_clean == pytest.approx(expected, abs=1e-5)


def test_figures_of_a_real_sae(tiny_lm: LM, tiny_sae_folder: Path) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    q = quality(tiny_lm, dictionary, ROWS, pass_rows=5)
    x = content(tiny_lm)
    z = dictionary.encode(x)
    out = dictionary.decode(z)
    expected = r2_score(x.numpy(), out.numpy(), multioutput="variance_weighted")
    assert q.variance_explained == pytest.approx(expected, abs=1e-5)
    ratio = (x - out).square().sum(1) / (x - x.mean(0)).square().sum(1)
    assert q.variance_explained_per_token == pytest.approx(float(1 - ratio.mean()), abs=1e-4)
    assert q.l0 == pytest.approx(float((z > 0).sum(1).double().mean()))
    rate = (z > 0).double().mean(0)
    assert q.dead == pytest.approx(float((rate == 0).double().mean()))
    assert q.dense == pytest.approx(float((rate > 0.1).double().mean()))
    assert 0 < q.dense < 1


def test_batching_does_not_matter(tiny_lm: LM, tiny_sae_folder: Path) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    one = quality(tiny_lm, dictionary, ROWS, pass_rows=3)
    assert quality(tiny_lm, dictionary, ROWS, pass_rows=12) == pytest.approx(one, abs=1e-4)


# ---------------------------------------------------- against a plain implementation, whole passes


def plain_losses(
    lm: LM, site: str, replacement: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """CE and KL at each scored position (NaN elsewhere), one row at a time, in float64."""
    ce = np.full(ROWS.shape, np.nan)
    kl = np.full(ROWS.shape, np.nan)
    for i, row in enumerate(ROWS):
        batch = pad(lm, row[None].astype(np.int64))

        def fn(h: torch.Tensor, content: torch.Tensor = batch.content) -> torch.Tensor:
            return torch.where(content[..., None], replacement(h.flatten(0, 1)).view_as(h), h)

        clean = forward(lm, batch).logits[0].double().log_softmax(-1)
        with edit(lm, site, fn):
            spliced = forward(lm, batch).logits[0].double().log_softmax(-1)
        for t in range(len(row) - 1):
            if batch.content[0, t]:
                ce[i, t] = -float(spliced[t, int(row[t + 1])])
                kl[i, t] = float(
                    functional.kl_div(spliced[t], clean[t], log_target=True, reduction="sum")
                )
    return ce, kl


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_pre", SITE, "blocks.3.hook_resid_post"])
def test_losses_are_those_of_whole_passes_with_the_residual_edited(
    tiny_lm: LM, tiny_sae_folder: Path, site: str
) -> None:
    dictionary = replace(load_sae(tiny_sae_folder, d_model=32), site=site)
    q = quality(tiny_lm, dictionary, ROWS, pass_rows=5)
    batch = pad(tiny_lm, ROWS.astype(np.int64))
    mean = capture(tiny_lm, batch, [site])[site][batch.content].mean(0)
    ways = {
        "sae": lambda x: dictionary.decode(dictionary.encode(x)),
        "mean": lambda x: mean.expand_as(x),
        "zero": torch.zeros_like,
    }
    clean, _ = plain_losses(tiny_lm, site, lambda x: x)
    assert q.ce_clean == pytest.approx(np.nanmean(clean), abs=1e-5)
    found = {way: plain_losses(tiny_lm, site, fn) for way, fn in ways.items()}
    for way, (ce, kl) in found.items():
        assert getattr(q, f"ce_{way}") == pytest.approx(np.nanmean(ce), abs=1e-5)
        assert getattr(q, f"kl_{way}") == pytest.approx(np.nanmean(kl), abs=1e-5)
    for way in ("mean", "zero"):
        (ce, kl), (ce_sae, kl_sae) = found[way], found["sae"]
        recovered = np.nansum(ce - ce_sae) / np.nansum(ce - clean)
        assert getattr(q, f"recovered_{way}") == pytest.approx(recovered, abs=1e-4)
        recovered = 1 - np.nansum(kl_sae) / np.nansum(kl)
        assert getattr(q, f"kl_recovered_{way}") == pytest.approx(recovered, abs=1e-4)
        spread = jackknife(np.nansum(kl_sae, 1), np.nansum(kl, 1))
        assert getattr(q, f"kl_recovered_{way}_se") == pytest.approx(spread, rel=0.25)
    assert q.rows == 12


def test_identities_hold_for_kl(tiny_lm: LM) -> None:
    perfect = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS)
    assert perfect.kl_sae == 0
    assert perfect.kl_recovered_mean == perfect.kl_recovered_zero == 1
    zero = quality(tiny_lm, Planted(0.0, torch.zeros(32)), ROWS)
    assert (zero.kl_sae, zero.kl_recovered_zero) == (zero.kl_zero, 0)
    mean = quality(tiny_lm, Planted(0.0, content(tiny_lm).mean(0)), ROWS)
    assert mean.kl_sae == pytest.approx(mean.kl_mean, abs=1e-5)
    assert mean.kl_recovered_mean == pytest.approx(0, abs=1e-4)
    assert min(zero.kl_zero, zero.kl_mean) > 0.01


@settings(max_examples=50)
@given(
    seed=st.integers(0, 999),
    scale=st.floats(0.1, 30),
    size=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
    shift=st.floats(-20, 20),
)
def test_divergence_is_that_of_float64(seed: int, scale: float, size: float, shift: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    p = scale * torch.randn(4, 300, generator=rng)
    q = p + size * torch.randn(4, 300, generator=rng) + shift
    norms = p.logsumexp(-1), q.logsumexp(-1)
    found = divergence((p - norms[0][:, None]).exp(), p - q, norms[0] - norms[1])
    exact = functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert (exact > -1e-12).all()
    rounding = 1e-6 * (scale * 5 + abs(shift) + size * 5 + 1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=4 * rounding)
    if size == shift == 0:
        assert (found == 0).all()


def test_many_saes_at_once_are_as_one_by_one(
    tiny_lm: LM, tiny_sae_folders: dict[str, Path]
) -> None:
    many: dict[str, Dictionary] = {
        site: load_sae(folder, d_model=32) for site, folder in tiny_sae_folders.items()
    }
    many["planted"] = Planted(0.9, torch.ones(32))
    found = qualities(tiny_lm, many, ROWS, pass_rows=5)
    assert list(found) == list(many)
    for name, dictionary in many.items():
        assert found[name] == quality(tiny_lm, dictionary, ROWS, pass_rows=5)
    assert len({q.ce_sae for q in found.values()}) == 3


def test_a_model_in_half_precision(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder, dtype="bfloat16")
    q = quality(lm, Planted(1.0, torch.zeros(32)), ROWS)
    assert q.kl_sae == 0
    assert q.ce_sae == q.ce_clean


def test_the_model_is_as_before(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, ROWS.astype(np.int64))
    before = forward(tiny_lm, batch).logits
    quality(tiny_lm, Planted(0.5, torch.zeros(32)), ROWS)
    assert torch.equal(forward(tiny_lm, batch).logits, before)


# ------------------------------------------------------------------------------ intervals, cosines


def jackknife(numerator: np.ndarray, denominator: np.ndarray) -> float:
    n = len(numerator)
    left = (numerator.sum() - numerator) / (denominator.sum() - denominator)
    return math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))


def test_the_error_of_a_ratio_is_its_spread_over_samples() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        size = rng.uniform(1, 10, 300)
        return 0.3 * size + rng.normal(0, 1, 300), size

    draws = [ratio(*draw()) for _ in range(400)]
    spread = float(np.std([d.value for d in draws]))
    assert np.mean([d.se for d in draws]) == pytest.approx(spread, rel=0.08)
    covered = np.mean([abs(d.value - 0.3) < 1.96 * d.se for d in draws])
    assert 0.92 < covered < 0.98
    sample = draw()
    assert ratio(*sample).se == pytest.approx(jackknife(*sample), rel=0.02)


def test_the_error_of_a_constant_ratio_is_none() -> None:
    size = np.array([1.0, 2.0, 7.0])
    assert ratio(0.25 * size, size) == (0.25, 0)
    assert ratio(-size, size).value == -1


def test_ratios_that_are_undefined() -> None:
    one = np.ones(1)
    assert ratio(one, one).value == 1
    assert math.isnan(ratio(one, one).se)
    assert math.isnan(ratio(one, np.zeros(1)).value)


@given(n=st.integers(2, 40), d=st.integers(1, 6), block=st.integers(1, 50), seed=st.integers(0, 99))
def test_nearest_cosines(n: int, d: int, block: int, seed: int) -> None:
    W = np.random.default_rng(seed).normal(size=(n, d))
    unit = W / np.linalg.norm(W, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    found = nearest_cosines(torch.from_numpy(W).float(), block)
    np.testing.assert_allclose(found.numpy(), cosines.max(1), atol=1e-5)


def test_decoder_cosines_of_planted_rows(tiny_lm: LM) -> None:
    q = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS[:2])
    assert (q.cosine_median, q.cosine_p95) == (0, 0)  # axes, and their opposites
    twins = torch.cat([torch.eye(4), torch.eye(4)[:1] * 3, torch.zeros(1, 4)])
    assert nearest_cosines(twins).tolist() == pytest.approx([1, 0, 0, 0, 1, 0])


# --------------------------------------------------------------------------- the table, bad input


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_residuals_that_are_not_finite(tiny_lm: LM, value: float) -> None:
    other = "blocks.2.hook_resid_post"
    both = {
        "a": Planted(1.0, torch.zeros(32)),
        "b": replace(Planted(1.0, torch.zeros(32)), site=other),
    }

    def spoil(h: torch.Tensor) -> torch.Tensor:
        h = h.clone()
        h[:, -1, 3] = value
        return h

    words = rf"residuals of tiny_lm at {other} are not finite; load the model in float32"
    with edit(tiny_lm, other, spoil), pytest.raises(UserError, match=words):
        qualities(tiny_lm, both, ROWS)


def test_a_model_whose_later_blocks_overflow(tiny_lm: LM) -> None:
    """The site's residual is fine, what the model makes of it is not."""
    words = "logits of tiny_lm are not finite; load the model in float32"
    with (
        edit(tiny_lm, "blocks.3.hook_resid_post", lambda h: h * math.nan),
        pytest.raises(UserError, match=words),
    ):
        quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS)


def test_a_reconstruction_that_is_not_finite(tiny_lm: LM) -> None:
    fine = Planted(1.0, torch.zeros(32))
    with pytest.raises(UserError, match="SAE broken gives a reconstruction that is not finite"):
        qualities(
            tiny_lm, {"fine": fine, "broken": Planted(1.0, torch.full((32,), math.nan))}, ROWS
        )


def test_a_reconstruction_too_large_for_the_model(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder, dtype="float16")
    huge = Planted(1.0, torch.full((32,), 1e6))
    with pytest.raises(UserError, match="logits of tiny_lm with the reconstruction of SAE huge"):
        qualities(lm, {"huge": huge}, ROWS)


def test_the_table_is_aligned_markdown(tiny_lm: LM) -> None:
    good = quality(tiny_lm, Planted(1.0, torch.zeros(32)), ROWS)
    poor = quality(tiny_lm, Planted(0.0, torch.zeros(32)), ROWS)
    nothing = Quality(*[math.nan] * len(Quality._fields))  # pyright: ignore[reportArgumentType]
    first, second = quality_table({"good": good, "a|b": poor, "unknown": nothing}).split("\n\n")
    for table in (first, second):
        lines = table.strip().splitlines()
        assert len(lines) == 5
        assert len({len(line) for line in lines}) == 1
        assert "nan" not in table
        assert r"a\|b" in lines[3]
    head, _, row, *_ = ([c.strip() for c in line.split("|")] for line in first.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells["CE rec. (mean)"].startswith("1.000 ± 0.000")
    assert cells["L0"] == "32.0"
    assert cells["dead"] == "0.00%"
    assert "227" in second.splitlines()[2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS[:0], "no rows"),
        (np.full((1, 257), 5), "257 tokens exceed the context of tiny_lm: 256"),
        (np.full((1, 8), 300), "token 300 is outside the vocabulary of tiny_lm"),
        (np.full((2, 8), 1), "every token is special"),
    ],
)
def test_rows_that_cannot_be_judged_on(tiny_lm: LM, rows: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        quality(tiny_lm, Planted(1.0, torch.zeros(32)), rows)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_in": 64}, "SAE mine reads width 64 but the residual stream of tiny_lm has 32"),
        ({"site": "blocks.4.hook_resid_post"}, "out of range"),
    ],
)
def test_saes_that_do_not_fit(tiny_lm: LM, change: dict[str, object], words: str) -> None:
    dictionary = replace(Planted(1.0, torch.zeros(32)), **change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=words):
        qualities(tiny_lm, {"mine": dictionary}, ROWS)
