"""What a feature does: clamp it at several doses on neutral prompts and read the concept's words.

Three conditions at one norm of the edit, a fraction (dose) of the mean residual norm at the site:
- feature: the latent is clamped, in delta form (the SAE's error stays), to the value at which
  value x length of its decoder row = dose x mean norm;
- vector: the contrastive vector, scaled to that length, is added;
- random: latents of similar firing density, none of them a target, clamped alike. They are shared:
  one run of a control reads the words of all concepts.
Edits hold at every content position of the prompt and of the word, never at BOS. Equal norms are
not equal disturbances, so the report also compares conditions at equal KL. Without such
controls steering results did not replicate: in one study random directions moved as much.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from discovery.corpora.leaks import UNSPACED
from discovery.corpora.rows import Text
from discovery.inference import t_interval
from discovery.readout import Intervention, Readout, Word, kl, n_tokens, read, word_tokens
from discovery.records import Effect
from saes.clamp import Mask, add, clamp
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.edit import Edit
from saes.lm.model import LM
from saes.lm.tokens import tokenize

_SIMILAR = 32  # latents nearest in log density from which a control is drawn


class Target(NamedTuple):
    """A concept to test: its feature, its vector and its words."""

    concept: str
    verdict: str
    latent: int
    vector: Float[Tensor, " d_model"]
    words: tuple[str, ...]


class DoseResponse(NamedTuple):
    """Effects of all conditions, and the tokens that the model read for them."""

    effects: list[Effect]
    tokens: int


def neutral_prompts(
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    length: int,
    seed: int = 0,
) -> list[str]:
    """Openings of `n` neutral texts, of different topics as far as there are topics.

    Each is the longest opening of whole words within `length` tokens (BOS not counted) that ends
    in a letter, so that any word may follow. In scripts that do not part words by spaces (Chinese,
    Japanese, Thai ...) it may end at any character.

    Raises:
        UserError: fewer than `n` texts, or no such opening.
    """
    if n > len(texts):
        raise UserError(f"{n} neutral prompts are wanted, but there are {len(texts)} neutral texts")
    rng = np.random.default_rng(seed)
    shuffled = [texts[i] for i in rng.permutation(len(texts))]
    used: Counter[str] = Counter()
    rounds: list[int] = []  # how many texts of the same topic come before
    for text in shuffled:
        rounds.append(used[text.topic])
        used[text.topic] += 1
    chosen = np.argsort(rounds, kind="stable")[:n]
    return [_opening(shuffled[i].text, tokenizer, length) for i in chosen]


def control_latents(
    density: Float[np.ndarray, " d_sae"], targets: Sequence[int], n: int, seed: int = 0
) -> list[int]:
    """`n` random latents that fire about as often as the targets, none of them a target.

    For each control a target is drawn, then one of the latents nearest to it in log density.

    Args:
        density: share of texts in which each latent fires; latents at 0 are never drawn.
        targets: latents of the concepts.
        n: how many.
        seed: of the draws.

    Raises:
        UserError: fewer than `n` latents are left.
    """
    alive = np.setdiff1d(np.flatnonzero(density > 0), targets)
    if n > len(alive):
        raise UserError(
            f"{n} control latents are wanted, but only {len(alive)} other latents ever fire: "
            "lower the number of controls"
        )
    rng = np.random.default_rng(seed)
    floor = density[alive].min(initial=1.0)
    chosen: list[int] = []
    for target in rng.choice(np.asarray(targets), n):
        left = alive[~np.isin(alive, chosen)]
        distance = np.abs(np.log(density[left]) - np.log(max(density[target], floor)))
        chosen.append(int(rng.choice(left[np.argsort(distance, kind="stable")[:_SIMILAR]])))
    return chosen


def planned_tokens(
    lm: LM,
    targets: Sequence[Target],
    controls: Sequence[int],
    prompts: Sequence[str],
    doses: Sequence[float],
) -> int:
    """Tokens that `dose_response` will run, padding not counted."""
    ids, words = tokenize(lm, prompts).ids, _words(lm, targets)
    shared = n_tokens(ids, [word for own in words for word in own])
    return shared * (1 + len(controls) * len(doses)) + sum(
        n_tokens(ids, own) * (1 + 2 * len(doses)) for own in words
    )


def dose_response(
    lm: LM,
    dictionary: Dictionary,
    targets: Sequence[Target],
    controls: Sequence[int],
    prompts: Sequence[str],
    *,
    doses: Sequence[float],
    mean_norm: float,
    max_tokens: int = 300_000,
    progress: Callable[[int], object] = lambda _: None,
) -> DoseResponse:
    """Change of the concepts' words and of the next-token distribution, by condition and dose.

    An effect is the mean over prompts and the concept's words of the word's log-probability minus
    that of the clean run, with a 95 % t interval over prompts (feature, vector) or the range over
    the control latents (random): a feature that beats it beats every control. A dose of 0 is no
    edit and no effect (clamping to 0 would be ablation).

    Args:
        lm: the model.
        dictionary: gives the site, the latents and their decoder rows.
        targets: the concepts.
        controls: latents of the random condition (`control_latents`).
        prompts: neutral texts that end at a word (`neutral_prompts`).
        doses: norms of the edit as fractions of `mean_norm`.
        mean_norm: mean residual norm at the site over content tokens.
        max_tokens: most tokens to run; checked before the first pass.
        progress: called after each run with its tokens; they add up to `planned_tokens`.

    Raises:
        UserError: more tokens than `max_tokens`, a prompt that leaves no room for the words,
            a negative dose, fewer than two prompts or controls.
    """
    assert not {t.latent for t in targets} & set(controls), "a control is a target"
    tokens = planned_tokens(lm, targets, controls, prompts, doses)
    check_design(len(targets), doses, len(prompts), len(controls), tokens, max_tokens)
    ids, words = tokenize(lm, prompts).ids, _words(lm, targets)
    everything = [word for own in words for word in own]
    longest = max(map(len, ids)) + max(map(len, everything)) - 1
    if longest > lm.context:
        raise UserError(
            f"a prompt with a word takes {longest} tokens, more than the {lm.context} of "
            f"{lm.name}: shorten the prompts"
        )

    def run(own: Sequence[Word], intervention: Intervention | None = None) -> Readout:
        readout = read(lm, ids, own, dictionary.site, intervention)
        progress(n_tokens(ids, own))
        return readout

    effects: list[Effect] = []
    clean = run(everything)
    random = {
        dose: [
            _change(clean, run(everything, _clamped(dictionary, latent, dose * mean_norm)))
            for latent in controls
        ]
        for dose in doses
    }
    columns = np.split(np.arange(len(everything)), np.cumsum([len(own) for own in words])[:-1])
    for target, own, column in zip(targets, words, columns, strict=True):
        alone = run(own)  # not `clean`: other batches round otherwise, and dose 0 must be exact
        for dose in doses:
            norm = dose * mean_norm
            feature = _change(alone, run(own, _clamped(dictionary, target.latent, norm)))
            vector = _change(alone, run(own, _added(target.vector, norm)))
            effects += [
                _effect(target, condition, dictionary.site, latent, dose, change)
                for condition, latent, change in (
                    ("feature", target.latent, feature),
                    ("vector", -1, vector),
                    ("random", -1, _by_control(random[dose], column)),
                )
            ]
    return DoseResponse(effects, tokens)


class _Change(NamedTuple):
    """Edited minus clean, by unit of the interval: prompts, or control latents."""

    words: Float[np.ndarray, "units words"]
    kl: Float[np.ndarray, " units"]


def _change(clean: Readout, edited: Readout) -> _Change:
    moved = kl(clean.following, edited.following)
    return _Change((edited.words - clean.words).double().numpy(), moved.double().numpy())


def _by_control(changes: Sequence[_Change], column: Int[np.ndarray, " words"]) -> _Change:
    """One unit a control latent: its means over prompts and over a concept's words."""
    words = [change.words[:, column].mean() for change in changes]
    return _Change(np.array(words)[:, None], np.array([change.kl.mean() for change in changes]))


def _effect(
    target: Target, condition: str, site: str, latent: int, dose: float, change: _Change
) -> Effect:
    moved = change.words.mean(1)
    mean, low, high = (float(x[0]) for x in t_interval(moved[None], (-math.inf, math.inf)))
    if condition == "random":
        low, high = float(moved.min()), float(moved.max())
    return Effect(
        concept=target.concept,
        verdict=target.verdict,
        condition=condition,
        site=site,
        latent=latent,
        dose=float(dose),
        delta_logprob=mean,
        low=low,
        high=high,
        kl=float(change.kl.mean()),
        n=len(change.kl),
    )


def _clamped(dictionary: Dictionary, latent: int, norm: float) -> Intervention | None:
    """Clamp the latent to where it writes a vector of length `norm`; None if that is nothing."""
    value = norm / float(dictionary.W_dec[latent].norm())

    def intervention(mask: Mask) -> Edit:
        return clamp(dictionary, latent, value, mask)

    return intervention if norm > 0 else None


def _added(vector: Float[Tensor, " d_model"], norm: float) -> Intervention | None:
    """Add the vector at length `norm`; None if that is nothing."""
    scaled = vector.float() * (norm / float(vector.float().norm()))

    def intervention(mask: Mask) -> Edit:
        return add(scaled, mask)

    return intervention if norm > 0 else None


def check_design(
    n_targets: int,
    doses: Sequence[float],
    n_prompts: int,
    n_controls: int,
    tokens: int,
    max_tokens: int,
) -> None:
    """Refuse a design that `dose_response` could not run.

    Raises:
        UserError: a negative dose, fewer than two prompts or controls, or more than `max_tokens`.
    """
    if min(doses, default=0) < 0:
        raise UserError(f"doses are fractions of the residual norm, 0 or more; got {min(doses)}")
    if min(n_prompts, n_controls) < 2:
        raise UserError(
            f"intervals need at least 2 prompts and 2 control latents, got {n_prompts} "
            f"and {n_controls}"
        )
    if tokens > max_tokens:
        raise UserError(
            f"the causal runs would take {tokens:,} tokens, more than max_tokens = {max_tokens:,}: "
            f"lower the number of concepts ({n_targets}), doses ({len(doses)}), prompts "
            f"({n_prompts}) or controls ({n_controls}), or raise max_tokens"
        )


def _words(lm: LM, targets: Sequence[Target]) -> list[list[Word]]:
    return [[word_tokens(lm.tokenizer, word) for word in target.words] for target in targets]


def _opening(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    whole = " ".join(text.split())
    best = ""
    for end in _ends(whole):
        if len(tokenizer(whole[:end], add_special_tokens=False)["input_ids"]) > length:
            break
        best = whole[:end]
    if not best:
        raise UserError(
            f"no word of the neutral text {text[:40]!r} ends within {length} tokens: "
            "use longer prompts"
        )
    return best


def _ends(text: str) -> Iterator[int]:
    """Where a word ends in a letter; between words without spaces, after any letter."""
    for end in range(1, len(text) + 1):
        last, after = text[end - 1], text[end : end + 1]
        letter = last.isalpha() or unicodedata.category(last) in ("Mn", "Mc")
        split = unicodedata.category(after)[0] != "M" if after else True
        if letter and split and (after in ("", " ") or re.match(f"[{UNSPACED}]", last)):
            yield end
