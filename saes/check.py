"""Does a loaded SAE reconstruct the residuals of the model it is to be used on?

A wrong site, activation function, normalisation or orientation raises no error by itself: it
gives latents that mean nothing. So a few thousand real residuals are reconstructed when an SAE is
loaded. If too little of their variance is explained, or too many or too few latents fire, each
usual mistake is undone in turn, and the one whose undoing helps is named.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saes.errors import UserError
from saes.latents import Dictionary, SaeLens
from saes.lm.model import LM, Site
from saes.mistakes import (
    DENSE,
    TRIAL_TOKENS,
    Run,
    Undone,
    beginning,
    biased,
    bos,
    depth,
    every,
    line,
    plain,
    residuals,
    scaled,
)

LEAST_EXPLAINED = 0.5
"""Variance explained that is asked of an SAE that promises none."""
FLOOR = 0.2
"""Variance explained that is asked of every SAE, however little it promises."""
TOLERANCE = 0.1
"""How far below what is promised it may lie, since the text is another one."""
L0_FACTOR = 3.0
"""How far from what is promised L0 may lie, either way."""
CLEARLY_LESS = 0.8
"""A mistake whose undoing leaves less than this share of the error was made."""
MORE_LATENTS = 1.2
"""As long as it does not make more than this many times as many latents fire."""


class Expect(NamedTuple):
    """What an SAE's makers promise of it; None where they say nothing."""

    variance_explained: float | None = None
    l0: float | None = None


class Trial(NamedTuple):
    """How well an SAE does with one mistake undone."""

    cause: str
    """The mistake."""
    detail: str
    """How it was undone."""
    variance_explained: float
    l0: float


class Check(NamedTuple):
    """Whether an SAE fits the model at its site, on texts that ship with this package."""

    ok: bool
    source: str
    site: str
    variance_explained: float
    """1 - (squared error) / (squared distance from the mean), each summed over tokens."""
    l0: float
    """Mean number of latents that fire on a token."""
    tokens: int
    needed: float
    """Least variance explained."""
    l0_range: tuple[float, float]
    cause: str | None
    """The probable cause of a failure; None when all is well or no simple cause was found."""
    tried: tuple[Trial, ...]
    """Every mistake that was undone; empty when all is well."""


def self_check(lm: LM, dictionary: Dictionary, *, expect: Expect | None = None) -> Check:
    """Reconstruct real residuals of the model, and look for the cause if that goes badly.

    The residuals are those this package works with: BOS in front where the tokenizer has one, the
    first position and special tokens left out. Nothing is random, and nothing is changed.

    Args:
        expect: what the SAE's makers promise; its own k when it is a TopK SAE.

    Raises:
        UserError: the SAE's site is out of range for the model.
    """
    expect = _promises(expect or Expect())
    own = lm.site(dictionary.site)
    near = [str(site) for site in line(lm) if abs(depth(site) - depth(own)) <= 1]
    x = residuals(lm, near, front=bos(lm))
    here = x.pop(str(_canonical(own)))
    explained, l0 = _score(plain(dictionary), here, dictionary.d_sae)
    needed, (low, high) = _bounds(expect, dictionary.d_sae)
    fits = explained >= needed and low <= l0 <= high
    check = Check(
        ok=fits and not _suspicious(lm, dictionary, x, here[:TRIAL_TOKENS]),
        source=_source(dictionary),
        site=dictionary.site,
        variance_explained=explained,
        l0=l0,
        tokens=len(here),
        needed=needed,
        l0_range=(low, high),
        cause=None,
        tried=(),
    )
    return check if check.ok else _diagnosed(check, lm, dictionary, here[:TRIAL_TOKENS], expect.l0)


def require(check: Check, trust: bool) -> None:
    """Refuse an SAE that failed its check.

    Args:
        trust: take it all the same.

    Raises:
        UserError: it failed and `trust` is off; the message names the probable cause.
    """
    if not check.ok and not trust:
        raise UserError(
            f"{describe(check)}; mend that, or take the SAE as it is with --trust "
            "(in a run's config: subject.trust: true)"
        )


def describe(check: Check) -> str:
    """The outcome in one line."""
    low, high = check.l0_range
    text = (
        f"SAE {check.source} explains {check.variance_explained:.3f} of the variance at "
        f"{check.site} ({check.needed:.2f} or more expected) with {check.l0:.1f} latents on a token"
        f" ({low:.4g} to {high:.4g} expected), over {check.tokens} tokens"
    )
    if check.ok:
        return text
    return f"{text}. Probable cause: {check.cause or 'no simple cause found'}"


def _source(dictionary: Dictionary) -> str:
    origin = getattr(dictionary, "origin", None)
    return "without a name" if origin is None else origin.source


def _canonical(site: Site) -> Site:
    """Its name in `line`: what block L reads is what block L - 1 leaves."""
    return Site(site.layer - 1, "post") if site.kind == "pre" and site.layer else site


def _promises(expect: Expect) -> Expect:
    """Without what cannot be meant: figures that are not finite, or out of their range."""

    def number(value: object) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    explained, l0 = expect
    return Expect(
        explained if explained is not None and number(explained) and explained <= 1 else None,
        l0 if l0 is not None and number(l0) and l0 > 0 else None,
    )


def _bounds(expect: Expect, d_sae: int) -> tuple[float, tuple[float, float]]:
    """(least variance explained, least and most L0)."""
    explained, l0 = expect
    needed = LEAST_EXPLAINED if explained is None else max(explained - TOLERANCE, FLOOR)
    if l0 is None:
        return needed, (1.0, d_sae / 2)
    return needed, (l0 / L0_FACTOR, min(l0 * L0_FACTOR, float(d_sae)))


@torch.no_grad()
def _score(run: Run, x: Float[Tensor, "n d_model"], d_sae: int) -> tuple[float, float]:
    """(variance explained, L0); latents are dense for `DENSE` at a time."""
    error, fired = 0.0, 0
    for part in x.split(max(1, DENSE // d_sae)):
        z, out = run(part)
        error += float((part - out).double().square().sum())
        fired += int((z != 0).sum())
    distance = float((x - x.mean(0)).double().square().sum())
    return 1 - error / distance, fired / len(x)


def _suspicious(
    lm: LM, dictionary: Dictionary, near: dict[str, Tensor], x: Float[Tensor, "n d_model"]
) -> bool:
    """Whether undoing a mistake leaves far less error with no more latents, though all seems well.

    Neighbouring layers are so alike that an SAE explains most of either, and a TopK SAE minds the
    scale of its inputs little, so that such mistakes pass any fixed bound.
    """
    run = plain(dictionary)
    undone = [Undone("", "", run, y[:TRIAL_TOKENS]) for y in near.values()]
    undone += scaled(run, x)
    if isinstance(dictionary, SaeLens):
        undone += biased(dictionary, x)
        trained_with_bos = dictionary.sae.cfg.metadata.prepend_bos
        if isinstance(trained_with_bos, bool) and trained_with_bos != (bos(lm) is not None):
            undone += beginning(lm, dictionary)
    explained, l0 = _score(run, x, dictionary.d_sae)
    scores = [_score(u.run, u.residuals, dictionary.d_sae) for u in undone]
    return any(
        1 - there < CLEARLY_LESS * (1 - explained) and l0_there <= MORE_LATENTS * l0
        for there, l0_there in scores
    )


def _diagnosed(
    check: Check, lm: LM, dictionary: Dictionary, x: Float[Tensor, "n d_model"], l0: float | None
) -> Check:
    """The check with every trial, and the cause that the best of those that pass speaks for."""
    tried = tuple(
        Trial(u.cause, u.detail, *_score(u.run, u.residuals, dictionary.d_sae))
        for u in every(lm, dictionary, x, l0)
    )
    low, high = check.l0_range
    passed = [t for t in tried if t.variance_explained >= check.needed and low <= t.l0 <= high]
    best = max(passed, key=lambda t: t.variance_explained, default=None)
    if best is None:
        return check._replace(tried=tried)
    cause = (
        f"{best.cause} ({best.detail} it explains {best.variance_explained:.3f} with "
        f"{best.l0:.1f} latents on a token)"
    )
    return check._replace(cause=cause, tried=tried)
