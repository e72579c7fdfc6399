"""Word log-probabilities against one plain forward a word; KL against scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from discovery.readout import _openings, kl, n_tokens, read, word_tokens
from saes.clamp import add
from saes.errors import UserError
from saes.lm.tokens import tokenize

PROMPTS = ["The door stood open, and nobody", "She read the letter", "Rain came in the night"]
WORDS = ["and", "happy", "at ease", "the", "happily"]
SITE = "blocks.1.hook_resid_post"


def naive(lm, prompt, word):
    """log p(word | prompt) and the next-token log-probabilities, from one text and one pass."""
    start = len(lm.tokenizer(prompt)["input_ids"])
    ids = torch.tensor([lm.tokenizer(f"{prompt} {word}")["input_ids"]])
    with torch.no_grad():
        log_p = lm.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    positions = torch.arange(start, ids.shape[1])
    return log_p[positions - 1, ids[0, positions]].sum(), log_p[start - 1]


def inputs(lm):
    return tokenize(lm, PROMPTS).ids, [word_tokens(lm.tokenizer, word) for word in WORDS]


def check(lm, got):
    for p, prompt in enumerate(PROMPTS):
        for w, word in enumerate(WORDS):
            log_p, following = naive(lm, prompt, word)
            assert got.words[p, w] == pytest.approx(log_p.item(), abs=1e-4)
            np.testing.assert_allclose(got.following[p], following, atol=1e-4)


def test_words_equal_one_plain_forward_each(tiny_lm):
    prompts, words = inputs(tiny_lm)
    assert {len(word) > 1 for word in words} == {True, False}
    got = read(tiny_lm, prompts, words)
    assert got.words.dtype == torch.float32
    check(tiny_lm, got)


def test_small_batches_change_nothing(tiny_lm, monkeypatch):
    prompts, words = inputs(tiny_lm)
    whole = read(tiny_lm, prompts, words)
    monkeypatch.setattr("discovery.readout._BATCH_TOKENS", 40)
    parts = read(tiny_lm, prompts, words)
    torch.testing.assert_close(parts.words, whole.words)
    torch.testing.assert_close(parts.following, whole.following)


def test_edits_reach_prompt_and_word_but_not_bos(tiny_lm):
    prompts, words = inputs(tiny_lm)
    vector = torch.from_numpy(np.random.default_rng(0).normal(size=32)).float()
    clean = read(tiny_lm, prompts, words)
    edited = read(tiny_lm, prompts, words, SITE, lambda mask: add(vector, mask))

    def all_but_first(_module, _args, output):
        output = output.clone()
        output[:, 1:] += vector
        return output

    handle = tiny_lm.blocks[1].register_forward_hook(all_but_first)
    try:
        check(tiny_lm, edited)
    finally:
        handle.remove()
    assert (edited.words - clean.words).abs().min() > 1e-3
    check(tiny_lm, read(tiny_lm, prompts, words))  # nothing is left behind


def test_tokens_are_counted_as_they_run(tiny_lm):
    prompts, words = inputs(tiny_lm)
    ran = []

    def count(_module, _args, kwargs):
        ran.append(int(kwargs["attention_mask"].sum()))

    handle = tiny_lm.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        read(tiny_lm, prompts, words)
    finally:
        handle.remove()
    assert n_tokens(prompts, words) == sum(ran)
    # Words of one token share a single pass over the prompt.
    assert n_tokens([[1, 2, 3]], [(4,), (5,)]) == 3
    assert n_tokens([[1, 2, 3]], [(4,), (5, 6), (5, 7, 8)]) == 5


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1))
def test_openings_cover_every_word_once(words):
    openings = _openings(words)
    for word in words:
        assert any(o[: len(word) - 1] == word[:-1] for o in openings)
    for a in openings:
        assert a in {word[:-1] for word in words}
        assert not any(b[: len(a)] == a for b in openings if b != a)
    assert len(set(openings)) == len(openings)


def test_kl_equals_scipy_and_is_zero_for_the_same():
    rng = np.random.default_rng(0)
    p, q = (torch.from_numpy(rng.normal(size=(4, 50))).float().log_softmax(-1) for _ in range(2))
    np.testing.assert_allclose(kl(p, q), entropy(p.exp().T, q.exp().T), rtol=1e-5)
    assert (kl(p, q) != kl(q, p)).all()
    np.testing.assert_array_equal(kl(p, p), 0)


def fast(bpe, pre_tokenizer, texts):
    if pre_tokenizer is not None:
        bpe.pre_tokenizer = pre_tokenizer
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_word_tokens_stand_inside_a_text(tiny_tokenizer):
    assert tiny_tokenizer.decode(word_tokens(tiny_tokenizer, "at ease")) == " at ease"
    texts = ["the happy the sad"] * 5
    metaspace = fast(Tokenizer(models.BPE()), pre_tokenizers.Metaspace(), texts)
    assert metaspace.convert_ids_to_tokens(word_tokens(metaspace, "happy")) == ["▁happy"]
    joining = fast(Tokenizer(models.BPE()), None, ["the happy"] * 5)
    with pytest.raises(UserError, match="no tokens for 'happy' alone"):
        word_tokens(joining, "happy")


@pytest.mark.parametrize("word", ["悲伤", "うれしい", "ดีใจ"])
def test_words_of_scripts_without_spaces_have_no_space_before_them(word):
    texts = [f"我{word}。{word}", f"the {word}"] * 5
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = fast(Tokenizer(models.BPE()), split, texts)
    tokens = tokenizer.convert_ids_to_tokens(word_tokens(tokenizer, word))
    assert "".join(tokens) == "".join(part for part, _ in split.pre_tokenize_str(word))
