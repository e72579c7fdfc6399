"""`saes.training.thresholds`: the quantile against sorting, and the L0 that a threshold gives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from saes.training.thresholds import calibrate, pre_activations, value_above


@given(
    st.lists(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=12), min_size=1, max_size=5),
    st.data(),
)
def test_value_above_is_what_sorting_gives(rows: list[list[float]], data: st.DataObject) -> None:
    width = min(map(len, rows))
    parts = [torch.tensor([row[:width]]) for row in rows]
    flat = np.sort(torch.cat(parts).flatten().double().numpy())[::-1]
    count = data.draw(st.integers(1, len(flat) - 1))
    expected = (flat[count - 1] + flat[count]) / 2
    assert value_above(lambda i: parts[i], len(parts), count) == pytest.approx(expected, abs=1e-6)


def test_all_the_large_scores_in_one_part() -> None:
    """Then the first share of candidates is not enough."""
    parts = [torch.zeros(4, 100), torch.arange(400.0).reshape(4, 100) + 1, torch.zeros(4, 100)]
    calls = []

    def scores(i: int) -> torch.Tensor:
        calls.append(i)
        return parts[i]

    assert value_above(scores, 3, 350) == 50.5
    assert len(calls) > 3


def sae_of(threshold: torch.Tensor) -> JumpReLUSAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=16, d_sae=64))
        sae.b_enc.data.normal_(std=0.3)
        sae.b_dec.data.normal_(std=0.3)
        sae.threshold.data.copy_(threshold)
    return sae.requires_grad_(False)


def batches(n: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(256, 16, generator=generator) for _ in range(n)]


@pytest.mark.parametrize("l0", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("varied", [False, True])
def test_the_l0_is_the_one_asked_for(l0: float, varied: bool) -> None:
    start = torch.linspace(0.05, 2, 64) if varied else torch.full((64,), 0.01)
    sae = sae_of(start)
    calibrate(sae, batches(), l0)
    fired = torch.cat([(sae.encode(x) > 0).sum(1) for x in batches()]).double().mean()
    assert float(fired) == pytest.approx(l0, abs=2 / 1024)
    factor = sae.threshold / start
    torch.testing.assert_close(factor, factor[:1].expand(64))
    held_out = torch.randn(4096, 16, generator=torch.Generator().manual_seed(2))
    noise = 4 / (l0 * 1024) ** 0.5
    got = float((sae.encode(held_out) > 0).sum(1).double().mean())
    assert got == pytest.approx(l0, rel=min(max(0.05, noise), 0.2))


def test_nothing_to_reach_leaves_thresholds_alone() -> None:
    sae = sae_of(torch.full((64,), 0.3))
    calibrate(sae, batches(), 0.0)
    assert torch.equal(sae.threshold, torch.full((64,), 0.3))


def test_more_than_is_positive_fires_all_that_is() -> None:
    sae = sae_of(torch.full((64,), 0.3))
    calibrate(sae, batches(), 63.0)
    positive = torch.cat([(pre_activations(sae, x) > 0).sum(1) for x in batches()])
    fired = torch.cat([(sae.encode(x) > 0).sum(1) for x in batches()])
    assert torch.equal(fired, positive)


def test_pre_activations_are_what_sae_lens_compares() -> None:
    sae = sae_of(torch.full((64,), 0.4))
    (x,) = batches(1)
    pre = pre_activations(sae, x)
    torch.testing.assert_close(sae.encode(x), pre * (pre > 0.4))
