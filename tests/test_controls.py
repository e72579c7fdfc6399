"""SAEs and models of random weights: as wide and as sparse, and nothing else in common."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from discovery.captured import Captured, load, save
from discovery.controls import (
    capture_controls,
    passes,
    randomised,
    sample,
    untrained,
    untrained_extra,
)
from discovery.corpora.rows import Text
from discovery.pooling import capture_texts
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.tokens import pad, tokenize
from saes.pretrained import load_sae

if TYPE_CHECKING:
    from saes.lm.model import LM

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
SENTENCES = (
    "The door stood open, and nobody had swept the hall since Tuesday.",
    "She read the letter twice, folded it, and put it back where it had been.",
    "He laughed so hard that the cup slid from his hand and broke on the step.",
    "Rain came in the night; by morning the lane was a brown river.",
    'They said, "Wait here until the bell rings," and walked off.',
    "My sister counted the coins again, 14 of them.",
)
SETS = ("neutral", "selection", "confirmation", "selection", "lexical", "confirmation")
TEXTS = [
    Text(str(i), text, ("calm",), kind)
    for i, (text, kind) in enumerate(zip(SENTENCES, SETS, strict=True))
]
STORIES = [i for i, kind in enumerate(SETS) if kind in ("selection", "confirmation")]


@pytest.fixture(scope="module")
def dictionaries(tiny_sae_folders: dict[str, Path]) -> list[Dictionary]:
    return [load_sae(folder, d_model=32) for folder in tiny_sae_folders.values()]


@pytest.fixture(scope="module")
def captured(tiny_lm: "LM", dictionaries: list[Dictionary]) -> Captured:
    return capture_texts(tiny_lm, dictionaries, TEXTS, poolings=("mean", "max"))


def test_an_untrained_sae_is_as_wide_and_as_sparse(dictionaries: list[Dictionary]) -> None:
    torch.manual_seed(0)
    mean, x = torch.randn(32), torch.randn(50, 32)
    blank = untrained(dictionaries[0], 7.6, mean, seed=3)
    assert isinstance(blank, Dictionary)
    assert (blank.site, blank.d_in, blank.d_sae) == (SITES[0], 32, 128)
    torch.testing.assert_close(blank.W_dec.norm(dim=1), torch.ones(128))
    z = blank.encode(x)
    assert (z.count_nonzero(1) == 8).all()
    dense = (x - mean) @ blank.W_dec.T
    kept = dense >= dense.sort(dim=1, descending=True).values[:, 7:8]
    torch.testing.assert_close(z, torch.where(kept, dense, 0))
    torch.testing.assert_close(blank.decode(z), z @ blank.W_dec + mean)
    torch.testing.assert_close(untrained(dictionaries[0], 8.0, mean, seed=3).encode(x), z)
    for other in (
        untrained(dictionaries[0], 8.0, mean, 4),
        untrained(dictionaries[1], 8.0, mean, 3),
    ):
        cosines = other.W_dec @ blank.W_dec.T
        assert cosines.abs().max() < 0.95


def test_a_randomised_model_keeps_the_scale_of_each_weight(tiny_lm: "LM") -> None:
    before = {name: weight.clone() for name, weight in tiny_lm.model.named_parameters()}
    twin = randomised(tiny_lm, seed=0)
    for name, weight in tiny_lm.model.named_parameters():
        assert weight.equal(before[name])
    embeddings = 0
    for name, weight in twin.model.named_parameters():
        old = before[name]
        if name == "model.embed_tokens.weight":
            assert weight.equal(old)
            embeddings += 1
        elif old.std() == 0:  # a norm as it was initialised
            assert weight.equal(old)
        else:
            r = torch.corrcoef(torch.stack([weight.flatten(), old.flatten()]))[0, 1]
            assert abs(float(r)) < 5 / weight.numel() ** 0.5
            torch.testing.assert_close(weight.std(), old.std(), rtol=0.15, atol=0)
    assert embeddings == 1
    batch = pad(tiny_lm, tokenize(tiny_lm, SENTENCES).ids)
    sites = ["blocks.0.hook_resid_pre", SITES[1]]
    old, new, again = (
        capture(lm, batch, sites) for lm in (tiny_lm, twin, randomised(tiny_lm, seed=0))
    )
    assert new[sites[0]].equal(old[sites[0]])
    assert not new[sites[1]].allclose(old[sites[1]], atol=0.1)
    assert new[sites[1]].equal(again[sites[1]])
    assert not randomised(tiny_lm, seed=1).unembedding.weight.equal(twin.unembedding.weight)


def test_a_tied_unembedding_stays(tiny_lm: "LM") -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from saes.lm.model import load_lm

    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    lm = load_lm(GPT2LMHeadModel(config), tokenizer=tiny_lm.tokenizer)
    twin = randomised(lm, seed=0)
    assert twin.unembedding.weight is twin.model.get_input_embeddings().weight
    assert twin.unembedding.weight.equal(lm.unembedding.weight)
    assert not twin.model.transformer.wpe.weight.equal(lm.model.transformer.wpe.weight)


def test_weights_that_cannot_be_redrawn(tiny_lm: "LM", dictionaries: list[Dictionary]) -> None:
    broken = copy.deepcopy(tiny_lm)
    norm = broken.model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to("meta"))
    with pytest.raises(UserError, match=r"model\.norm\.weight is not; set capture\.controls"):
        randomised(broken, seed=0)
    with pytest.raises(UserError, match="not quantised"):  # before the main pass, not after it
        untrained_extra(broken, dictionaries, TEXTS)


def test_both_controls_are_pooled_like_the_sae(
    tiny_lm: "LM", dictionaries: list[Dictionary], captured: Captured, tmp_path: Path
) -> None:
    done: list[int] = []
    found = capture_controls(
        tiny_lm, dictionaries, TEXTS, captured, poolings=("mean", "max"), progress=done.append
    )
    assert sum(done) == passes(TEXTS, captured) == 2 * len(STORIES)
    assert list(found.controls) == [
        f"{kind}/{site}@{pooling}"
        for kind in ("untrained", "randomised")
        for pooling in ("mean", "max")
        for site in SITES
    ]
    stories = [TEXTS[i] for i in STORIES]
    twin = randomised(tiny_lm, seed=0)
    for kind, lm in (("untrained", tiny_lm), ("randomised", twin)):
        means = {s: x.mean(0) for s, x in sample(lm, dictionaries, stories).items()}
        for dictionary in dictionaries:
            site = dictionary.site
            blank = untrained(dictionary, 8.0, means[site], seed=0)
            everything = found.controls[f"{kind}/{site}@mean"].toarray()
            peaks = found.controls[f"{kind}/{site}@max"].toarray()
            for i, text in enumerate(TEXTS):
                batch = pad(lm, tokenize(lm, [text.text]).ids)
                z = blank.encode(capture(lm, batch, [site])[site][0, 1:]).numpy()
                z = z if i in STORIES else np.zeros((1, 128))
                np.testing.assert_allclose(everything[i], z.mean(0), rtol=1e-3, atol=1e-4)
                np.testing.assert_allclose(peaks[i], z.max(0), rtol=1e-3, atol=1e-4)
    save(tmp_path, found)
    assert load(tmp_path).controls.keys() == found.controls.keys()


def test_the_main_pass_can_take_the_untrained_sae_along(
    tiny_lm: "LM", dictionaries: list[Dictionary], captured: Captured
) -> None:
    along = capture_texts(
        tiny_lm,
        dictionaries,
        TEXTS,
        poolings=("mean", "max"),
        batch_tokens=100,
        extra=untrained_extra(tiny_lm, dictionaries, TEXTS),
    )
    assert passes(TEXTS, along) == len(STORIES)
    one = capture_controls(tiny_lm, dictionaries, TEXTS, along, poolings=("mean", "max"))
    two = capture_controls(tiny_lm, dictionaries, TEXTS, captured, poolings=("mean", "max"))
    assert one.controls.keys() == two.controls.keys()
    for name, latents in one.controls.items():
        got, expected = latents.toarray(), two.controls[name].toarray()
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    for name, latents in along.latents.items():
        np.testing.assert_allclose(
            latents.toarray(), captured.latents[name].toarray(), rtol=1e-4, atol=1e-5
        )


def test_no_texts(tiny_lm: "LM", dictionaries: list[Dictionary]) -> None:
    with pytest.raises(UserError, match="need texts of the selection or the confirmation set"):
        untrained_extra(tiny_lm, dictionaries, TEXTS[:1])
    with pytest.raises(UserError, match="no texts to read"):
        capture_texts(tiny_lm, dictionaries, [])
