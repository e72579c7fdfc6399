"""The choice of latents against torch.topk; tests/test_sparse_topk.py has the gradients."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saes import sparse_kernels
from saes.sparse_kernels import Encoder, Pairs, choose_per_batch, choose_per_row, top_per_row

ROOT = Path(__file__).resolve().parents[1]


def rows(n: int, d_in: int = 16, *, seed: int = 0) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60)
@given(st.integers(1, 9), st.sampled_from([1, 6, 64, 96, 1024, 4096]), st.data())
def test_top_per_row_is_torch_s(n: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(width, 40)))
    values = rows(n, width, seed=width + k)
    if data.draw(st.booleans()):
        values = values.round()  # ties
    found = top_per_row(values, k)
    assert all(len(set(row)) == k for row in found.tolist())
    best = values.gather(1, found).sort(1).values
    assert torch.equal(best, values.topk(k, dim=1).values.sort(1).values)


def random_encoder(d_in: int, latents: int, *, scaled: bool) -> Encoder:
    generator = torch.Generator().manual_seed(latents)
    weight = torch.randn(latents, d_in, generator=generator)
    scale = torch.rand(latents, generator=generator) + 0.5 if scaled else None
    return Encoder(weight, torch.randn(latents, generator=generator), scale)


def preactivations(x: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Before and after scaling."""
    z = x @ encoder.weight.t() + encoder.bias
    return z, z if encoder.scale is None else z * encoder.scale


def as_dense(pairs: Pairs, values: Tensor, latents: int) -> Tensor:
    out = torch.zeros(pairs.starts.numel() - 1, latents)
    out[pairs.rows, pairs.latents] = values
    return out


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("latents", [80, 1024])
def test_choice_per_row_in_float32_is_exact(latents: int, scaled: bool) -> None:
    x, encoder = rows(50), random_encoder(16, latents, scaled=scaled)
    z, pre = preactivations(x, encoder)
    pairs, found = choose_per_row(x, encoder, 7, margin=3, bfloat16=False)
    expected = torch.zeros_like(z).scatter_(1, pre.topk(7, dim=1).indices, 1.0)
    assert torch.equal(as_dense(pairs, torch.ones_like(found), latents), expected)
    torch.testing.assert_close(found, z[pairs.rows, pairs.latents])
    order = pairs.rows * latents + pairs.latents
    assert (order.diff() > 0).all()
    assert pairs.starts.tolist() == list(range(0, 351, 7))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("latents", [75, 1024])
def test_choice_per_batch_in_float32_is_exact(latents: int, scaled: bool) -> None:
    x, encoder = rows(50), random_encoder(16, latents, scaled=scaled)
    z, pre = preactivations(x, encoder)
    pairs, found = choose_per_batch(x, encoder, 333, margin=3, bfloat16=False)
    expected = torch.zeros(z.numel()).scatter_(0, pre.flatten().topk(333).indices, 1.0)
    assert torch.equal(as_dense(pairs, torch.ones_like(found), latents).flatten(), expected)
    torch.testing.assert_close(found, z[pairs.rows, pairs.latents])
    assert torch.equal(pairs.starts.diff(), torch.bincount(pairs.rows, minlength=50))


@pytest.mark.parametrize("per_batch", [False, True])
def test_bfloat16_finds_the_true_top(per_batch: bool) -> None:
    """Of residual-like rows with outlier dimensions: all but one in 2,000 of the true top k, and
    what is found has pre-activations of full precision."""
    x = rows(256, 64)
    x[:, :2] = 20 * x[:, :2] + 30  # as residuals of trained models have
    encoder = random_encoder(64, 4096, scaled=True)
    z, pre = preactivations(x, encoder)
    if per_batch:
        pairs, found = choose_per_batch(x, encoder, 256 * 32, margin=8, bfloat16=True)
        true = torch.zeros(pre.numel()).scatter_(0, pre.flatten().topk(256 * 32).indices, 1.0)
    else:
        pairs, found = choose_per_row(x, encoder, 32, margin=8, bfloat16=True)
        true = torch.zeros_like(z).scatter_(1, pre.topk(32, dim=1).indices, 1.0)
    hit = as_dense(pairs, torch.ones_like(found), 4096).flatten() @ true.flatten()
    assert found.numel() == 256 * 32
    assert hit / (256 * 32) >= 0.9995
    torch.testing.assert_close(found, z[pairs.rows, pairs.latents], rtol=1e-5, atol=1e-4)


def test_without_margin_bfloat16_misses_some() -> None:
    """So the margin is what makes the recall above."""
    x, encoder = rows(256, 64), random_encoder(64, 4096, scaled=False)
    _, pre = preactivations(x, encoder)
    pairs, found = choose_per_row(x, encoder, 32, margin=0, bfloat16=True)
    true = torch.zeros_like(pre).scatter_(1, pre.topk(32, dim=1).indices, 1.0)
    recall = (as_dense(pairs, torch.ones_like(found), 4096) * true).sum() / true.sum()
    assert 0.9 < recall < 0.9995


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("where", ["weight", "bias", "input"])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("per_batch", [False, True])
def test_nan_shows_whatever_its_sign(
    per_batch: bool, bfloat16: bool, where: str, sign: float
) -> None:
    """x86 makes NaN with the sign set: an integer below all that is positive."""
    nan = torch.copysign(torch.tensor(torch.nan), torch.tensor(sign))
    assert (nan.view(torch.int32) < 0) == (sign < 0)
    x, encoder = rows(50), random_encoder(16, 1024, scaled=False)
    table = {"weight": encoder.weight[700], "bias": encoder.bias[700:701], "input": x[30]}[where]
    table[:1] = nan
    choose, n = (choose_per_batch, 333) if per_batch else (choose_per_row, 7)
    pairs, z = choose(x, encoder, n, margin=3, bfloat16=bfloat16)
    at = pairs.rows == 30 if where == "input" else pairs.latents == 700
    assert at.any()
    assert z[at].isnan().all()


def test_rows_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, encoder = rows(50), random_encoder(16, 80, scaled=True)
    whole = choose_per_row(x, encoder, 7, margin=0, bfloat16=False)
    monkeypatch.setattr(sparse_kernels, "CHUNK", 80 * 3)
    parts = choose_per_row(x, encoder, 7, margin=0, bfloat16=False)
    assert torch.equal(whole[0].latents, parts[0].latents)
    assert torch.equal(whole[1], parts[1])


@pytest.mark.slow
def test_on_the_packaged_model_bfloat16_finds_all() -> None:
    """Of real residuals and a trained SAE, with the margin that is the default."""
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = ROOT / "saes" / "data"
    sae = SAE.load_from_disk(data / "demo_saes" / "blocks.5.hook_resid_post", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(data / "demo_lm", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(data / "demo_lm")
    lines = (ROOT / "discovery" / "data" / "corpus" / "stories.jsonl").read_text().splitlines()
    text = " ".join(json.loads(line)["text"] for line in lines[:8])
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : 4 * 256].view(4, 256)
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[6][:, 1:].flatten(0, 1)
    encoder = Encoder(sae.W_enc.detach().t().contiguous(), sae.b_enc.detach(), None)
    if sae.cfg.apply_b_dec_to_input:
        x = x - sae.b_dec.detach()
    exact = choose_per_row(x, encoder, 32, margin=0, bfloat16=False)
    fast = choose_per_row(x, encoder, 32, margin=8, bfloat16=True)
    assert torch.equal(exact[0].latents, fast[0].latents)
    assert torch.equal(exact[1], fast[1])
