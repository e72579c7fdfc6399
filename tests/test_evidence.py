"""Promoted tokens and contexts against the model's own weights and one text at a time."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import Float
from scipy import sparse
from tokenizers.processors import ByteLevel
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from discovery.corpora.rows import Text
from labeling.evidence import (
    contexts,
    promoted_tokens,
    token_logits,
    token_pieces,
    token_text,
    top_texts,
)
from saes.lm.capture import capture
from saes.lm.model import LM, load_lm
from saes.lm.tokens import pad

SITE = "blocks.1.hook_resid_post"
SENTENCES = (
    "He laughed so hard that the cup slid from his hand.",
    "Rain came in the night; by morning the lane was a brown river.",
    "My sister — 14 coins 🙂 left — cried over the naïve café.",
    "The door stood open.",
    "She read the letter twice, folded it, and put it back where it had been. " * 8,
)


@dataclass(frozen=True)
class Plain:
    """A dictionary that reads a residual by its rows and keeps what is above a threshold."""

    rows: Float[Tensor, "d_sae d_in"]
    site: str = SITE
    threshold: float = 0.5

    @property
    def d_sae(self) -> int:
        return self.rows.shape[0]

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.rows

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        z = x @ self.rows.T
        return torch.where(z > self.threshold, z, 0.0)

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return z @ self.rows


@pytest.fixture
def dictionary(tiny_lm: LM) -> Plain:
    generator = torch.Generator().manual_seed(3)
    return Plain(torch.randn(24, tiny_lm.d_model, generator=generator) / 4)


@pytest.fixture(scope="module")
def neox(tiny_tokenizer: PreTrainedTokenizerFast) -> LM:
    """A model whose final layer norm has a bias, and which has more embeddings than tokens."""
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config)
        with torch.no_grad():
            model.gpt_neox.final_layer_norm.bias.normal_()
            model.gpt_neox.final_layer_norm.weight.uniform_(0.5, 2.0)
    return load_lm(model, tokenizer=tiny_tokenizer)


def texts_of(sentences: tuple[str, ...]) -> list[Text]:
    return [Text(f"t{i}", s, ("sad",), "confirmation", "sea", "a") for i, s in enumerate(sentences)]


def alone(lm: LM, dictionary: Plain, text: str) -> Float[np.ndarray, "tokens d_sae"]:
    """Activations at a text's tokens but its BOS, with no other text beside it."""
    ids = lm.tokenizer(text)["input_ids"][: lm.context]
    residual = capture(lm, pad(lm, [ids]), [SITE])[SITE][0, 1:]
    return dictionary.encode(residual).numpy()


def test_token_logits_are_the_unembedding_with_the_norm_folded_in(tiny_lm: LM) -> None:
    x = torch.randn(5, tiny_lm.d_model, generator=torch.Generator().manual_seed(0))
    logits = token_logits(tiny_lm, x).numpy()
    gain = tiny_lm.model.model.norm.weight.numpy()
    unembed = tiny_lm.model.lm_head.weight.numpy()
    unit = x.numpy() / np.sqrt((x.numpy() ** 2).mean(1, keepdims=True))
    expected = (unit * gain) @ unembed.T
    expected -= expected[:, 3:].mean(1, keepdims=True)  # tokens 0, 1, 2 are special
    np.testing.assert_allclose(logits[:, 3:], expected[:, 3:], atol=2e-4)
    assert np.isnan(logits[:, :3]).all()


@pytest.mark.parametrize("model", ["tiny_lm", "neox"])
def test_token_logits_are_odd_and_free_of_scale(model: str, request: pytest.FixtureRequest) -> None:
    lm: LM = request.getfixturevalue(model)
    x = torch.randn(4, lm.d_model, generator=torch.Generator().manual_seed(1))
    logits = token_logits(lm, x)
    torch.testing.assert_close(token_logits(lm, -x), -logits, equal_nan=True, rtol=0, atol=1e-3)
    torch.testing.assert_close(token_logits(lm, 50 * x), logits, equal_nan=True, rtol=0, atol=1e-3)
    assert logits[:, len(lm.tokenizer) :].isnan().all()


def test_a_row_that_is_a_tokens_unembedding_promotes_that_token(tiny_lm: LM) -> None:
    chosen = [17, 150, 299]
    unembed = tiny_lm.model.lm_head.weight[chosen]
    rows = promoted_tokens(tiny_lm, Plain(torch.cat([unembed, -unembed])), [0, 1, 2, 3, 4, 5], n=4)
    first = {(r.latent, r.sign): r for r in rows if r.rank == 1}
    for latent, token in enumerate(chosen):
        text = token_text(tiny_lm, token)
        assert first[latent, 1].token == text
        assert first[latent + 3, -1].token == text
        assert first[latent, 1].logit == pytest.approx(-first[latent + 3, -1].logit, abs=1e-4)
    assert len(rows) == 6 * 2 * 4
    by_side = [[r.sign * r.logit for r in rows[i : i + 4]] for i in range(0, len(rows), 4)]
    assert all(side == sorted(side, reverse=True) for side in by_side)
    assert [r.rank for r in rows[:4]] == [1, 2, 3, 4]


def test_special_and_missing_tokens_are_never_promoted(neox: LM) -> None:
    x = torch.randn(3, neox.d_model, generator=torch.Generator().manual_seed(2))
    rows = promoted_tokens(neox, Plain(x), [2, 0], n=297 // 2)
    assert {r.latent for r in rows} == {0, 2}
    assert not {r.token for r in rows} & {"<s>", "</s>", "<pad>", ""}


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), min_size=1))
def test_pieces_join_to_the_text(tiny_lm: LM, text: str) -> None:
    count = len(tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(token_pieces(tiny_lm, text, count)) == text
    assert text.startswith("".join(token_pieces(tiny_lm, text, count // 2)))


def test_pieces_are_the_tokens_and_whole_characters(tiny_lm: LM) -> None:
    ids = tiny_lm.tokenizer(SENTENCES[0], add_special_tokens=False)["input_ids"]
    pieces = token_pieces(tiny_lm, SENTENCES[0], len(ids))
    assert list(pieces) == [token_text(tiny_lm, i) for i in ids]
    smile = tiny_lm.tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert token_pieces(tiny_lm, "🙂", len(smile)) == ("🙂", *[""] * (len(smile) - 1))


@given(
    hnp.arrays(np.float32, (6, 5), elements=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0])),
    st.integers(1, 7),
)
def test_top_texts_are_the_largest_ties_by_row(pooled: np.ndarray, n: int) -> None:
    best = top_texts(sparse.csr_array(pooled), [4, 1], n)
    assert list(best) == [4, 1]
    for latent, rows in best.items():
        column = pooled[:, latent]
        naive = sorted((r for r in range(6) if column[r] > 0), key=lambda r: (-column[r], r))
        assert rows == naive[:n]


def test_contexts_match_each_text_run_alone(tiny_lm: LM, dictionary: Plain) -> None:
    texts = texts_of(SENTENCES)
    traces = [alone(tiny_lm, dictionary, t.text) for t in texts]
    pooled = np.stack([trace.mean(0) for trace in traces])
    latents = [int(i) for i in np.flatnonzero(pooled.any(0))[::-3]]
    rows = contexts(tiny_lm, dictionary, sparse.csr_array(pooled), texts, latents, n=3)
    assert list(dict.fromkeys(r.latent for r in rows)) == latents
    for latent in latents:
        mine = [r for r in rows if r.latent == latent]
        order = [i for i in np.argsort(-pooled[:, latent], kind="stable") if pooled[i, latent] > 0]
        assert [r.text_id for r in mine] == [texts[i].id for i in order[:3]]
        assert [r.rank for r in mine] == list(range(1, len(mine) + 1))
        for row, i in zip(mine, order, strict=False):
            np.testing.assert_allclose(row.activations, traces[i][:, latent], atol=1e-4)
            assert row.peak == max(row.activations) > 0
            assert len(row.tokens) == len(row.activations)
            joined = "".join(row.tokens)
            cut = i == 4  # longer than the model's context
            assert texts[i].text.startswith(joined)
            assert (joined == texts[i].text) != cut


def test_a_text_read_in_several_windows_is_shown_whole(tiny_lm: LM, dictionary: Plain) -> None:
    texts = texts_of(SENTENCES)
    everything = replace(dictionary, threshold=-1e9)
    pooled = sparse.csr_array(np.eye(len(texts), everything.d_sae)[:, ::-1])
    latents = [everything.d_sae - 1 - i for i in range(len(texts))]  # each fires in its own text
    rows = contexts(tiny_lm, everything, pooled, texts, latents, n=1, long="chunk")
    assert ["".join(row.tokens) for row in rows] == list(SENTENCES)
    first, *words = tiny_lm.tokenizer(SENTENCES[4])["input_ids"]
    step = tiny_lm.context - 1
    assert len(words) > step, "the last text is longer than the context"
    for start in range(0, len(words), step):
        ids = [first, *words[start : start + step]]
        residual = capture(tiny_lm, pad(tiny_lm, [ids]), [SITE])[SITE][0, 1:]
        expected = everything.encode(residual)[:, latents[4]].numpy()
        shown = rows[4].activations[start : start + step]
        np.testing.assert_allclose(shown, expected, atol=1e-4)


def test_a_first_token_that_is_not_read_is_shown_as_silent(tiny_lm: LM, dictionary: Plain) -> None:
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.bos_token = None
    bare = copy.deepcopy(tokenizer.backend_tokenizer)
    bare.post_processor = ByteLevel(trim_offsets=False)
    lm = replace(
        tiny_lm,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=bare, eos_token="</s>", pad_token="<pad>"
        ),
    )
    everything = replace(dictionary, threshold=-1e9)
    pooled = sparse.csr_array(np.ones((1, everything.d_sae)))
    (row,) = contexts(lm, everything, pooled, texts_of(SENTENCES[:1]), [7], n=1)
    assert "".join(row.tokens) == SENTENCES[0]
    assert row.activations[0] == 0
    assert all(a != 0 for a in row.activations[1:])
