"""`saes.text`: text that the model writes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from saes.errors import UserError
from saes.lm.model import LM, load_lm
from saes.text import sampling
from saes.text.prepare import TextConfig, write_tokens
from saes.text.sampling import draw, sample_block

DOCUMENTS = tuple(
    f"Door {i} of the house stood open.\nNobody had swept hall {i} since Tuesday, said {i}.\n" * 3
    for i in range(24)
)
CONFIG = TextConfig(source="set by each test", tokens=600, held_out_tokens=200, context=16)


def test_sampled_text(tiny_lm: LM, tmp_path: Path) -> None:
    config = TextConfig(tokens=2000, held_out_tokens=300, context=9, seed=4)
    tokens = write_tokens(tmp_path / "a", tiny_lm, config)
    assert tokens.text == "sampled from tiny_lm"
    assert tokens.train.shape[1] == 8
    assert (tokens.train > 2).sum() >= 2000
    assert not {tuple(r) for r in tokens.train.tolist()} & {
        tuple(r) for r in tokens.held_out.tolist()
    }
    again = write_tokens(tmp_path / "b", tiny_lm, config)
    assert np.array_equal(again.train, tokens.train)
    assert np.array_equal(again.held_out, tokens.held_out)
    other = write_tokens(tmp_path / "c", tiny_lm, replace(config, seed=5))
    assert not np.array_equal(other.train[:10], tokens.train[:10])


def test_sampling_goes_on_at_the_block(
    tiny_lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TextConfig(tokens=3000, held_out_tokens=300, context=9)
    whole = write_tokens(tmp_path / "whole", tiny_lm, config)
    seeds: list[tuple[int, ...]] = []

    def block(*args: Any, seed: tuple[int, ...]) -> np.ndarray:
        seeds.append(seed)
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return sample_block(*args, seed=seed)

    monkeypatch.setattr(sampling, "sample_block", block)
    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "out", tiny_lm, config)
    again = write_tokens(tmp_path / "out", tiny_lm, config)
    assert np.array_equal(again.train, whole.train)
    assert len(seeds) == len(set(seeds)) + 1  # only the interrupted block twice
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "train.npy",
        "held_out.npy",
        "manifest.json",
    }


def test_sampled_tokens_follow_the_models_probabilities(tiny_lm: LM) -> None:
    """Chi-square of the first token, and of the second after the most frequent first."""
    rows = np.concatenate([sample_block(tiny_lm, 2, seed=(i,), rows=4000) for i in range(5)])
    common = int(np.bincount(rows[:, 0]).argmax())
    prefixes = ([1], rows[:, 0]), ([1, common], rows[rows[:, 0] == common, 1])
    for prefix, found in prefixes:
        with torch.no_grad():
            logits = tiny_lm.model(input_ids=torch.tensor([prefix])).logits[0, -1]
        expected = logits.double().softmax(-1).numpy() * len(found)
        counts = np.bincount(found, minlength=300)
        likely = expected >= 8
        assert likely.sum() > 8
        observed = [*counts[likely], counts[~likely].sum()]
        wanted = [*expected[likely], expected[~likely].sum()]
        assert chisquare(observed, wanted).pvalue > 0.01


@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_the_cache_changes_nothing(family: str, tiny_lm: LM) -> None:
    """With the same random numbers, whole passes without a cache choose the same tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gpt2":
            shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
            model = GPT2LMHeadModel(GPT2Config(vocab_size=300, **shape, initializer_range=0.2))
        else:
            shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4}
            model = MistralForCausalLM(
                MistralConfig(vocab_size=300, **shape, **heads, initializer_range=0.2)
            )
    lm = load_lm(model, tokenizer=tiny_lm.tokenizer)
    rows = sample_block(lm, 12, seed=(7,), rows=5)
    ids = torch.from_numpy(np.concatenate([np.ones((5, 1), np.int64), rows], axis=1))
    with torch.no_grad():
        logits = lm.model(input_ids=ids, use_cache=False).logits
    uniform = torch.from_numpy(np.random.default_rng((7,)).random((12, 5)))
    for i, u in enumerate(uniform):
        assert torch.equal(draw(logits[:, i], u)[:, 0], ids[:, i + 1])


def test_draw_inverts_the_distribution_function() -> None:
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25]])
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 0.999999], dtype=torch.float64)
    found = draw(p.log().expand(6, 5), u)[:, 0].tolist()
    assert found == [1, 1, 3, 3, 4, 4]
    with pytest.raises(UserError, match="not finite"):
        draw(torch.full((2, 3), torch.nan), torch.zeros(2, dtype=torch.float64))


def test_a_model_without_bos_samples_from_eos(tiny_lm: LM) -> None:
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.bos_token = None
    lm = replace(tiny_lm, tokenizer=tokenizer)
    rows = sample_block(lm, 4, seed=(0,), rows=6)
    assert rows.shape == (6, 4)
    assert (rows[:, 0] == 2).all()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        sample_block(lm, 4, seed=(0,), rows=6)
