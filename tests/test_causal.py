"""Dose-response against a naive loop with sae-lens, planted effects, and the design's rules."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from discovery.causal import (
    Target,
    control_latents,
    dose_response,
    neutral_prompts,
    planned_tokens,
)
from discovery.corpora.rows import Text
from saes.errors import UserError
from saes.pretrained import load_sae

SITE = "blocks.1.hook_resid_post"
PROMPTS = ["The door stood open, and nobody", "She read the letter", "Rain came in the night"]


@pytest.fixture
def sae(tiny_sae_folder):
    return load_sae(tiny_sae_folder, d_model=32)


@pytest.fixture
def targets():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=32)).float() for _ in range(2))
    return [
        Target("happy", "found", 3, a, ("happy", "the")),
        Target("at ease", "not found", 90, b, ("at ease",)),
    ]


def of(effects, concept, condition):
    return [e for e in effects if (e.concept, e.condition) == (concept, condition)]


def naive(lm, prompts, words, change):
    """Word log-probabilities and next-token ones, a pass a word; `change` rewrites layer 1."""

    def hook(_module, _args, output):
        output = output.clone()
        output[:, 1:] = change(output[:, 1:])
        return output

    handle = lm.blocks[1].register_forward_hook(hook)
    words_p, following = np.zeros((len(prompts), len(words))), []
    try:
        for p, prompt in enumerate(prompts):
            start = len(lm.tokenizer(prompt)["input_ids"])
            for w, word in enumerate(words):
                ids = torch.tensor([lm.tokenizer(f"{prompt} {word}")["input_ids"]])
                with torch.no_grad():
                    log_p = lm.model(input_ids=ids).logits[0].log_softmax(-1)
                at = torch.arange(start, ids.shape[1])
                words_p[p, w] = log_p[at - 1, ids[0, at]].sum()
            following.append(log_p[start - 1].numpy())
    finally:
        handle.remove()
    return words_p, np.stack(following)


def test_effects_equal_a_naive_loop_with_sae_lens(tiny_lm, sae, targets):
    dose, norm = 0.5, 6.0
    controls = [10, 11, 12]
    effects, _ = dose_response(
        tiny_lm, sae, targets, controls, PROMPTS, doses=[dose], mean_norm=norm
    )

    def clamped(latent):
        raw = sae.sae
        value = dose * norm / raw.W_dec[latent].norm()

        def change(h):
            z = raw.encode(h)
            set_ = z.clone()
            set_[..., latent] = value
            return h + raw.decode(set_) - raw.decode(z)

        return change

    def added(vector):
        return lambda h: h + vector / vector.norm() * dose * norm

    for target in targets:
        words_clean, clean = naive(tiny_lm, PROMPTS, target.words, lambda h: h)

        def effect(change, words=target.words, words_clean=words_clean, clean=clean):
            words_p, edited = naive(tiny_lm, PROMPTS, words, change)
            moved = (np.exp(clean) * (clean - edited)).sum(1)
            return (words_p - words_clean).mean(1), moved.mean()

        for condition, latent, change in (
            ("feature", target.latent, clamped(target.latent)),
            ("vector", -1, added(target.vector)),
        ):
            (row,) = of(effects, target.concept, condition)
            delta, moved = effect(change)
            interval = stats.ttest_1samp(delta, 0).confidence_interval(0.95)
            assert row.delta_logprob == pytest.approx(delta.mean(), abs=1e-4)
            assert (row.low, row.high) == pytest.approx(tuple(interval), abs=1e-3)
            assert row.kl == pytest.approx(moved, abs=1e-4)
            assert (row.latent, row.n, row.dose, row.site) == (latent, 3, dose, SITE)
            assert row.verdict == target.verdict
            assert row.kl > 0.01
        (row,) = of(effects, target.concept, "random")
        runs = [effect(clamped(latent)) for latent in controls]
        means = [delta.mean() for delta, _ in runs]
        assert row.delta_logprob == pytest.approx(np.mean(means), abs=1e-4)
        assert (row.low, row.high) == pytest.approx((min(means), max(means)), abs=1e-3)
        assert row.kl == pytest.approx(np.mean([moved for _, moved in runs]), abs=1e-4)
        assert (row.latent, row.n) == (-1, 3)


def test_a_dose_of_zero_does_exactly_nothing(tiny_lm, sae, targets):
    effects, _ = dose_response(
        tiny_lm, sae, targets, [5, 6], PROMPTS, doses=[0.0, 0.2], mean_norm=5.0
    )
    zero = [e for e in effects if e.dose == 0]
    assert len(zero) == len(effects) / 2 == 6
    assert all((e.delta_logprob, e.low, e.high, e.kl) == (0, 0, 0, 0) for e in zero)
    assert all(e.kl > 0 for e in effects if e.dose > 0)


def test_the_plan_is_what_runs_and_too_much_is_refused_first(tiny_lm, sae, targets):
    ran = []

    def count(_module, _args, kwargs):
        ran.append(int(kwargs["attention_mask"].sum()))

    handle = tiny_lm.model.register_forward_pre_hook(count, with_kwargs=True)
    arguments = (tiny_lm, sae, targets, [5, 6], PROMPTS)
    try:
        steps = []
        result = dose_response(*arguments, doses=[0.1, 0.2], mean_norm=5.0, progress=steps.append)
        assert result.tokens == sum(ran) == sum(steps) > 0
        assert result.tokens == planned_tokens(tiny_lm, targets, [5, 6], PROMPTS, [0.1, 0.2])
        assert len(steps) == 1 + 2 * 2 + 2 * (1 + 2 * 2)
        ran.clear()
        exact = dose_response(*arguments, doses=[0.1, 0.2], mean_norm=5.0, max_tokens=result.tokens)
        assert exact == result
        ran.clear()
        with pytest.raises(UserError, match=r"concepts \(2\), doses \(2\), prompts \(3\)"):
            dose_response(*arguments, doses=[0.1, 0.2], mean_norm=5.0, max_tokens=result.tokens - 1)
        assert ran == []
    finally:
        handle.remove()


def test_bad_input_is_refused(tiny_lm, sae, targets):
    with pytest.raises(UserError, match=r"0 or more; got -0\.1"):
        dose_response(tiny_lm, sae, targets, [5, 6], PROMPTS, doses=[-0.1, 1.0], mean_norm=5.0)
    with pytest.raises(UserError, match="at least 2 prompts and 2 control latents, got 1 and 2"):
        dose_response(tiny_lm, sae, targets, [5, 6], PROMPTS[:1], doses=[0.1], mean_norm=5.0)
    with pytest.raises(AssertionError, match="a control is a target"):
        dose_response(tiny_lm, sae, targets, [3, 6], PROMPTS, doses=[0.1], mean_norm=5.0)
    long = [" ".join(["door"] * 400)] * 2
    with pytest.raises(UserError, match="more than the 256 of tiny_lm: shorten the prompts"):
        dose_response(tiny_lm, sae, targets, [5, 6], long, doses=[0.1], mean_norm=5.0)


@dataclass(frozen=True)
class Planted:
    """A dictionary of given directions whose latents never fire by themselves."""

    W_dec: torch.Tensor
    site: str

    @property
    def d_sae(self):
        return self.W_dec.shape[0]

    @property
    def d_in(self):
        return self.W_dec.shape[1]

    def encode(self, x):
        return torch.zeros(len(x), self.d_sae)

    def decode(self, z):
        return z @ self.W_dec


def test_a_planted_unembedding_direction_raises_its_word(tiny_lm):
    word = "the"
    (token,) = tiny_lm.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    rng = np.random.default_rng(0)
    decoder = torch.from_numpy(rng.normal(size=(20, 32))).float()
    decoder[4] = 0.1 * tiny_lm.model.lm_head.weight[token].detach()
    sae = Planted(decoder, "blocks.3.hook_resid_post")
    vector = tiny_lm.model.lm_head.weight[token].detach()
    targets = [
        Target("the", "found", 4, vector, (word,)),
        Target("and", "not found", 5, decoder[5], ("and",)),
    ]
    effects, _ = dose_response(
        tiny_lm, sae, targets, [7, 8, 9, 10, 11], PROMPTS, doses=[0.2, 0.4, 0.8], mean_norm=10.0
    )
    feature, vector_, random = (of(effects, "the", c) for c in ("feature", "vector", "random"))
    assert [e.dose for e in feature] == [0.2, 0.4, 0.8]
    for f, v, r in zip(feature, vector_, random, strict=True):
        assert f.low > r.high
        assert f.delta_logprob == pytest.approx(v.delta_logprob, abs=1e-4)  # equal norm, one axis
        assert f.kl == pytest.approx(v.kl, abs=1e-4)
    assert feature[0].delta_logprob < feature[1].delta_logprob < feature[2].delta_logprob
    other, shared = of(effects, "and", "feature"), of(effects, "and", "random")
    assert any(o.low < r.high for o, r in zip(other, shared, strict=True))


def test_controls_match_density_and_exclude_targets():
    rng = np.random.default_rng(0)
    density = np.exp(rng.uniform(np.log(0.001), np.log(0.5), 2000))
    density[:500] = 0
    common = np.flatnonzero(density > 0.3)[:10].tolist()
    rare = np.flatnonzero((density > 0) & (density < 0.002))[:10].tolist()
    for targets, low, high in ((common, 0.2, 0.5), (rare, 0.0005, 0.004)):
        for seed in range(5):
            controls = control_latents(density, targets, 6, seed)
            assert len(set(controls)) == 6
            assert not set(controls) & set(targets)
            assert all(low < density[c] < high for c in controls)
            assert controls == control_latents(density, targets, 6, seed)
    assert control_latents(density, common, 6, 0) != control_latents(density, common, 6, 1)
    # A target that never fires is matched by the rarest.
    assert density[control_latents(density, [0], 4)].max() < 0.0015
    # All that is left is taken, and no more is promised.
    few = np.array([0.1, 0.0, 0.2, 0.3])
    assert sorted(control_latents(few, [2], 2)) == [0, 3]
    with pytest.raises(UserError, match="only 2 other latents ever fire"):
        control_latents(few, [2], 3)


def text(topic, number, content):
    return Text(
        id=f"neutral/{topic}/{number}",
        text=content,
        concepts=(),
        topic=topic,
        set="neutral",
        writer="",
    )


def test_prompts_are_openings_of_different_topics(tiny_tokenizer):
    contents = [
        "The door stood open, and nobody had swept the hall since Tuesday. Rain came in.",
        "She read the letter twice, folded it, and put it back where it had been.",
    ]
    texts = [text(t, i, contents[i % 2]) for t in ("hall", "lane", "step") for i in range(4)]
    prompts = neutral_prompts(texts, tiny_tokenizer, 3, length=12)
    for prompt in prompts:
        whole = next(c for c in contents if c.startswith(prompt))
        assert prompt[-1].isalpha()
        rest = whole[len(prompt) :]
        assert not rest[0].isalnum()
        n = len(tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"])
        assert 0 < n <= 12
        # Longest: the next word that ends in a letter would not fit.
        more = [whole[:i] for i in range(len(prompt) + 1, len(whole)) if whole[i] == " "]
        after = next(m for m in more if m[-1].isalpha())
        assert len(tiny_tokenizer(after, add_special_tokens=False)["input_ids"]) > 12
    # Distinct texts tell which were drawn: one of each topic, then a second of each.
    marked = [
        text(t, i, f"{t} {'abcd'[i]} stood open, and nobody had swept it since")
        for t in ("hall", "lane", "step")
        for i in range(4)
    ]
    drawn = neutral_prompts(marked, tiny_tokenizer, 6, length=40, seed=1)
    topics = [prompt.split()[0] for prompt in drawn]
    assert sorted(topics[:3]) == sorted(topics[3:]) == ["hall", "lane", "step"]
    assert len(set(drawn)) == 6
    assert drawn == neutral_prompts(marked, tiny_tokenizer, 6, length=40, seed=1)
    assert drawn != neutral_prompts(marked, tiny_tokenizer, 6, length=40, seed=2)
    with pytest.raises(UserError, match="13 neutral prompts are wanted, but there are 12"):
        neutral_prompts(marked, tiny_tokenizer, 13, length=40)
    with pytest.raises(UserError, match="ends within 1 tokens"):
        neutral_prompts(marked, tiny_tokenizer, 1, length=1)


@pytest.fixture(scope="module")
def characters():
    """A tokenizer whose tokens are characters."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("content", "length", "expected"),
    [
        ("门开着、没有人打扫过。", 5, "门开着、没"),
        ("门开着、没有人打扫过。", 4, "门开着"),
        ("ドアは開いて", 3, "ドアは"),
        ("ฉันดีใจมาก", 7, "ฉันดีใจ"),
        ("ฉันดีใจมาก", 5, "ฉันดี"),
        ("ฉันดีใจมาก", 4, "ฉัน"),  # not between a letter and its vowel sign
        ("वह घर है", 4, "वह"),
        ("वह घर है आज", 8, "वह घर है"),  # a word may end in a vowel sign
        ("The door, open", 13, "The"),
    ],
)
def test_prompts_in_any_script(characters, content, length, expected):
    assert neutral_prompts([text("t", 0, content)], characters, 1, length) == [expected]


@pytest.mark.parametrize("content", ["。。。", "12 34", "ดี"])
def test_texts_without_an_opening_are_refused(characters, content):
    with pytest.raises(UserError, match="ends within 1 tokens: use longer prompts"):
        neutral_prompts([text("t", 0, content)], characters, 1, 1)
