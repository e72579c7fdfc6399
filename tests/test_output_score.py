"""Output scores against one plain pass a latent, and latents that write a known word."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from discovery.concepts import Concept
from discovery.controls import Untrained
from discovery.output_score import (
    contrasts,
    output_scores,
    passes,
    promoted,
    raise_latents,
)
from discovery.readout import word_tokens
from discovery.records import Candidate
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.edit import edit
from saes.pretrained import load_sae

if TYPE_CHECKING:
    from saes.lm.model import LM

PROMPTS = ["The door stood open, and nobody", "She read the letter"]
SITE = "blocks.1.hook_resid_post"
LAST = "blocks.3.hook_resid_post"


def concept(*forms: str) -> Concept:
    return Concept(forms[0], forms[0], "all", forms, *([None] * 5), False, None, None)  # type: ignore[arg-type]


CONCEPTS = [concept("happy", "happily"), concept("bell"), concept("river", "rivers", "rain")]


def candidate(name: str, latent: int, site: str = SITE, rank: int = 1) -> Candidate:
    return Candidate(name, site, rank, latent, 0.9, *([0.5] * 9))


@pytest.fixture(scope="module")
def dictionary(tiny_sae_folder: Path) -> Dictionary:
    return load_sae(tiny_sae_folder, d_model=32)


def naive(lm: "LM", dictionary: Dictionary, latent: int) -> tuple[float, list[float]]:
    """Output score and rises of one latent, from whole passes of one prompt at a time."""
    row = dictionary.W_dec[latent]
    own = lm.unembed(row).softmax(-1).argsort(descending=True)[:20]
    scores, rises = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])

        def raised(h: torch.Tensor) -> torch.Tensor:
            z = dictionary.encode(h[0, -1:])
            error = h[0, -1:] - dictionary.decode(z)
            z[0, latent] += 10 * z.max()
            return torch.cat([h[:, :-1], (dictionary.decode(z) + error)[None]], 1)

        with torch.no_grad():
            clean = lm.model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            with edit(lm, SITE, raised):
                after = lm.model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        order = after.argsort(descending=True).tolist()
        rank = min(order.index(token) for token in own.tolist())
        scores.append((1 - rank / 300) * float(after[own].max().exp()))
        first = [{word_tokens(lm.tokenizer, f)[0] for f in c.inflections} for c in CONCEPTS]
        rises.append([float((after - clean)[list(tokens)].mean()) for tokens in first])
    return float(np.mean(scores)), np.mean(rises, axis=0).tolist()


@pytest.mark.parametrize("batch_tokens", [1, 50, 4096])
def test_against_one_pass_a_latent(
    tiny_lm: "LM", dictionary: Dictionary, batch_tokens: int
) -> None:
    latents = [3, 0, 77, 120, 41]
    got = raise_latents(tiny_lm, dictionary, latents, CONCEPTS, PROMPTS, batch_tokens=batch_tokens)
    for i, latent in enumerate(latents):
        score, rises = naive(tiny_lm, dictionary, latent)
        assert got.output_scores[i] == pytest.approx(score, rel=1e-3, abs=1e-6)
        np.testing.assert_allclose(got.rises[i], rises, rtol=1e-3, atol=1e-4)


def test_rows_of_candidates(tiny_lm: "LM", dictionary: Dictionary) -> None:
    candidates = [
        candidate("bell", 5),
        candidate("river", 9, rank=2),
        candidate("happy", 5, rank=3),
    ]
    controls = [0, 9, 14, 15]
    done: list[int] = []
    got = output_scores(
        tiny_lm,
        dictionary,
        candidates,
        CONCEPTS,
        PROMPTS,
        controls=controls,
        progress=done.append,
    )
    assert sum(done) == passes(candidates, controls, PROMPTS) == 5 * 2
    null = contrasts(raise_latents(tiny_lm, dictionary, controls, CONCEPTS, PROMPTS).rises)
    for row, own in zip(got, candidates, strict=True):
        assert (row.concept, row.latent, row.rank) == (own.concept, own.latent, own.rank)
        assert (row.site, row.input_auroc) == (SITE, 0.9)
        score, rises = naive(tiny_lm, dictionary, own.latent)
        c = [x.name for x in CONCEPTS].index(own.concept)
        others = [rise for i, rise in enumerate(rises) if i != c]
        assert row.output_score == pytest.approx(score, rel=1e-3, abs=1e-6)
        assert row.word_score == pytest.approx(rises[c] - np.mean(others), abs=1e-3)
        assert row.word_rank == 1 + sum(rise > rises[c] for rise in rises)
        reach = null[:, c] >= row.word_score - 1e-4  # latent 9 is among them itself
        assert row.word_p == pytest.approx((1 + reach.sum()) / 5)
    plain = output_scores(tiny_lm, dictionary, candidates[:1], CONCEPTS, PROMPTS)
    assert plain[0].word_p is None


@pytest.fixture
def writers(tiny_lm: "LM") -> Dictionary:
    """Latents after the last block that write the first token of each concept's name."""
    heads = [word_tokens(tiny_lm.tokenizer, c.name)[0] for c in CONCEPTS]
    rows = tiny_lm.unembedding.weight.detach()[[*heads, *range(100, 108)]]
    return Untrained(LAST, normalize(rows), torch.zeros(32), 4)


def test_a_latent_that_writes_the_word_is_told_from_others(
    tiny_lm: "LM", writers: Dictionary
) -> None:
    candidates = [
        candidate(c.name, latent, LAST) for c in CONCEPTS for latent in range(len(CONCEPTS))
    ]
    got = output_scores(
        tiny_lm, writers, candidates, CONCEPTS, PROMPTS, controls=range(3, 11), amplification=30.0
    )
    for row in got:
        right = CONCEPTS[row.latent].name == row.concept
        assert (row.word_rank == 1) == right
        assert (row.word_score > 0) == right
        assert (row.word_p == pytest.approx(1 / 9)) or not right
    tokens = promoted(tiny_lm, writers.W_dec, n=1)[:3, 0].tolist()
    assert tokens == [word_tokens(tiny_lm.tokenizer, c.name)[0] for c in CONCEPTS]


def test_one_concept_has_nothing_to_be_compared_with() -> None:
    rises = np.array([[0.5], [-1.0]])
    np.testing.assert_array_equal(contrasts(rises), rises)
    np.testing.assert_allclose(contrasts(np.array([[1.0, 2.0, 6.0]])), [[-3.0, -1.5, 4.5]])


def test_what_is_refused(tiny_lm: "LM", dictionary: Dictionary) -> None:
    with pytest.raises(UserError, match="at least one neutral prompt"):
        output_scores(tiny_lm, dictionary, [candidate("bell", 5)], CONCEPTS, [])
    silent = Untrained(SITE, torch.zeros(8, 32), torch.zeros(32), 2)
    with pytest.raises(UserError, match=r"no latent of the SAE at .* 'She read the letter'"):
        output_scores(tiny_lm, silent, [candidate("bell", 5)], CONCEPTS, PROMPTS[1:])
