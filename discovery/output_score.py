"""What raising a latent makes the model say: the output side of a feature.

That a latent fires for a concept does not mean that it brings the concept forth: the two agree only
weakly, so both are reported. The output score is that of Arad, Mueller and Belinkov 2025, "SAEs Are
Good for Steering - If You Select the Right Features" (arXiv 2505.20063; their src/output_score.py):

- the latent's own tokens are the 20 that its decoder row promotes most by logit lens;
- at the last position of a neutral prompt the latent is raised by 10 times the largest activation
  of any latent there, and the SAE's error is kept;
- with p the next-token distribution then, the score is (1 - r / vocabulary) * max p over the own
  tokens, where r is the rank, from 0, of the most likely of them.

It says whether the latent does what its decoder row promises, not whether that is the concept. For
that the same raised distributions are read at the words of all concepts (`word_score`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from discovery.concepts import Concept
from discovery.readout import word_tokens
from discovery.records import Candidate, OutputScore
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.splice import Onward
from saes.lm.tokens import pad, tokenize

OWN_TOKENS = 20
AMPLIFICATION = 10.0
_LOGITS = 2**25  # next-token logits that are held at a time


class Raised(NamedTuple):
    """What raising each of some latents does, averaged over the prompts."""

    output_scores: Float[np.ndarray, " latents"]
    rises: Float[np.ndarray, "latents concepts"]
    """Nats: log-probability of the concept's words as the next token, raised less clean."""


@torch.no_grad()
def output_scores(
    lm: LM,
    dictionary: Dictionary,
    candidates: Sequence[Candidate],
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    *,
    controls: Sequence[int] = (),
    amplification: float = AMPLIFICATION,
    batch_tokens: int = 4096,
    progress: Callable[[int], object] = lambda _: None,
) -> list[OutputScore]:
    """The output side of candidate latents, in their order.

    `word_score` is the mean rise of the concept's words, less the mean of that over all other
    concepts; `word_rank` the concept's place among all by rise. A word counts by its first token,
    so words of several tokens are told apart only as far as these differ: a concept whose first
    tokens are all another's too rises with it, and both have one rank.

    Args:
        candidates: latents of `dictionary`; one may stand for several concepts.
        concepts: all concepts of the run, those of the candidates among them.
        prompts: neutral openings that end at a word (`discovery.causal.neutral_prompts`).
        controls: random latents (`discovery.causal.control_latents`): `word_p` of a candidate is
            the share of them, itself counted in, that raise the concept's words as much.
        amplification: how far a latent is raised, in multiples of the largest activation.
        batch_tokens: most tokens of a pass.
        progress: called with the number of latents raised at a prompt; they add up to
            `passes(candidates, controls, prompts)`.

    Raises:
        UserError: no prompt, a prompt at whose end no latent fires, or a tokenizer that joins words
            across a space.
    """
    assert {c.site for c in candidates} <= {dictionary.site}, "candidates of another site"
    latents = _latents(candidates, controls)
    raised = raise_latents(
        lm,
        dictionary,
        latents,
        concepts,
        prompts,
        amplification=amplification,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    contrast = contrasts(raised.rises)
    row = {latent: i for i, latent in enumerate(latents)}
    column = {concept.name: i for i, concept in enumerate(concepts)}
    null = contrast[[row[latent] for latent in controls]]
    scores: list[OutputScore] = []
    for candidate in candidates:
        i, c = row[candidate.latent], column[candidate.concept]
        score = OutputScore(
            concept=candidate.concept,
            site=candidate.site,
            latent=candidate.latent,
            rank=candidate.rank,
            input_auroc=candidate.auroc,
            output_score=float(raised.output_scores[i]),
            word_score=float(contrast[i, c]),
            word_rank=1 + int((raised.rises[i] > raised.rises[i, c]).sum()),
        )
        if controls:
            as_much = int((null[:, c] >= contrast[i, c]).sum())
            score = replace(score, word_p=(1 + as_much) / (1 + len(controls)))
        scores.append(score)
    return scores


def passes(candidates: Sequence[Candidate], controls: Sequence[int], prompts: Sequence[str]) -> int:
    """How many times `output_scores` raises a latent at a prompt."""
    return len(_latents(candidates, controls)) * len(prompts)


def contrasts(
    rises: Float[np.ndarray, "latents concepts"],
) -> Float[np.ndarray, "latents concepts"]:
    """Each concept's rise less the mean rise of all others; of a single concept the rise itself."""
    n = rises.shape[1]
    if n == 1:
        return rises
    return rises - (rises.sum(1, keepdims=True) - rises) / (n - 1)


@torch.no_grad()
def raise_latents(
    lm: LM,
    dictionary: Dictionary,
    latents: Sequence[int],
    concepts: Sequence[Concept],
    prompts: Sequence[str],
    *,
    amplification: float = AMPLIFICATION,
    batch_tokens: int = 4096,
    progress: Callable[[int], object] = lambda _: None,
) -> Raised:
    """Raise latents one by one at the end of every prompt, and read the next token.

    Only the blocks above the site run, on the same prompt for many latents at a time.

    Raises:
        UserError: as `output_scores`.
    """
    if not prompts:
        raise UserError("output scores need at least one neutral prompt")
    rows = dictionary.W_dec[list(latents)].to(lm.device)
    own = promoted(lm, rows)
    heads = [_heads(lm.tokenizer, concept) for concept in concepts]
    onward, site = Onward(lm), dictionary.site
    scores, rises = np.zeros(len(latents)), np.zeros((len(latents), len(concepts)))
    for prompt, ids in zip(prompts, tokenize(lm, prompts).ids, strict=True):
        resid = capture(lm, pad(lm, [ids]), [site])[site]
        strength = float(dictionary.encode(resid[0, -1:].float()).max())
        if strength <= 0:
            raise UserError(
                f"no latent of the SAE at {site} fires at the end of the prompt "
                f"{prompt!r}, so there is nothing to raise a latent to; use other prompts"
            )

        clean = _of_words(_following(onward, site, ids, resid, torch.zeros_like(rows[:1])), heads)
        at_once = max(1, min(batch_tokens // len(ids), _LOGITS // lm.vocab_size))
        for at in range(0, len(latents), at_once):
            here = slice(at, at + at_once)
            change = amplification * strength * rows[here]
            log_p = _following(onward, site, ids, resid, change)
            scores[here] += _output_score(log_p, own[here]).cpu().numpy() / len(prompts)
            rises[here] += (_of_words(log_p, heads) - clean) / len(prompts)
            progress(len(log_p))
    return Raised(scores, rises)


def promoted(
    lm: LM, rows: Float[Tensor, "latents d_model"], n: int = OWN_TOKENS
) -> Int[Tensor, "latents n"]:
    """The tokens that decoder rows promote most by logit lens."""
    at_once = max(1, _LOGITS // lm.vocab_size)
    return torch.cat(
        [
            lm.unembed(part).topk(min(n, lm.vocab_size), dim=-1).indices
            for part in rows.split(at_once)
        ]
    )


def _following(
    onward: Onward,
    site: str,
    ids: Sequence[int],
    resid: Float[Tensor, "1 pos d_model"],
    change: Float[Tensor, "n d_model"],
) -> Float[Tensor, "n vocab"]:
    """Log-probabilities of the next token with each change made to the last position."""
    edited = resid.repeat(len(change), 1, 1)
    edited[:, -1] = (resid[0, -1].float() + change).to(resid.dtype)
    above = onward(pad(onward.lm, [ids] * len(change)), site, edited)
    return onward.lm.unembed(above[:, -1]).float().log_softmax(-1)


def _output_score(
    log_p: Float[Tensor, "latents vocab"], own: Int[Tensor, "latents n"]
) -> Float[Tensor, " latents"]:
    best = log_p.gather(1, own).max(1, keepdim=True).values
    rank = (log_p > best).sum(1)
    return (1 - rank / log_p.shape[1]) * best[:, 0].exp()


def _of_words(
    log_p: Float[Tensor, "n vocab"], heads: Sequence[Sequence[int]]
) -> Float[np.ndarray, "n concepts"]:
    """Mean log-probability over the first tokens of each concept's words."""
    means = [log_p[:, list(head)].mean(1) for head in heads]
    return torch.stack(means, dim=1).double().cpu().numpy()


def _heads(tokenizer: PreTrainedTokenizerBase, concept: Concept) -> list[int]:
    """The first token of each of its words, each once; one that is only a space does not count."""
    heads: list[int] = []
    for form in concept.inflections:
        first, *more = word_tokens(tokenizer, form)
        blank = not str(tokenizer.decode([first])).strip()
        heads.append(more[0] if more and blank else first)
    return list(dict.fromkeys(heads))


def _latents(candidates: Sequence[Candidate], controls: Sequence[int]) -> list[int]:
    return list(dict.fromkeys([*(c.latent for c in candidates), *controls]))
