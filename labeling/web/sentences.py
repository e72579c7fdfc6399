"""Verdicts and figures in words, for the pages."""

import math
from typing import NamedTuple

from discovery.records import Alignment, Comparison, Control
from labeling.summary import HELD_OUT, T_TOPICS
from labeling.words import DASH, number, probability

NO_BREAK = "\N{NO-BREAK SPACE}"
SITE_WORDS = {"pre": "before", "post": "after"}


def _chance(symbol: str, value: float | None) -> str:
    """`q = 0.01`, in one piece that no line break can cut."""
    return f"{symbol} = {probability(value)}".replace(" ", NO_BREAK)


def _figures(auroc: float, p: float, q: float) -> str:
    return f"AUROC {number(auroc)}, {_chance('p', p)}, {_chance('q', q)}"


def _specific(auroc: float, q: float | None) -> str:
    return f"AUROC {number(auroc)}, {_chance('q', q)}"


def verdict_sentence(a: Alignment, k: int | None = None, held_out: str = HELD_OUT[False]) -> str:
    """What the verdict on a concept means, with the figures that decided it.

    Args:
        k: latents in the concept's set, where known.
        held_out: the texts on which latents were tested.
    """
    chosen = "the selection set" if held_out == HELD_OUT[False] else "the other folds"
    single = _figures(a.auroc, a.p, a.q)
    group = _figures(a.set_auroc, a.set_p, a.set_q)
    of_set = f"weighted set of {k} latents" if k else "weighted set of latents"
    if a.verdict == "found":
        text = (
            f"One latent, chosen on {chosen}, recognises {a.concept} in {held_out} "
            f"({single}) and tells it from its nearest concepts "
            f"({_specific(a.specific_auroc, a.specific_q)})."
        )
    elif a.verdict == "found as a set":
        text = (
            f"No single latent is enough (the best: {single}), but a {of_set} recognises "
            f"{a.concept} in {held_out} ({group}) and tells it from its nearest concepts "
            f"({_specific(a.set_specific_auroc, a.set_specific_q)})."
        )
    elif a.verdict == "found for the family":
        alone = a.specific_q is not None
        text = (
            f"{'One latent' if alone else f'A {of_set}'} recognises {a.concept} in "
            f"{held_out} ({single if alone else group}), but does not tell it from its nearest "
            "concepts ("
            + (
                _specific(a.specific_auroc, a.specific_q)
                if alone
                else _specific(a.set_specific_auroc, a.set_specific_q)
            )
            + ")."
        )
    elif a.verdict == "lexical only":
        text = (
            f"Nothing recognises it in {held_out} (best latent: {single}; set: "
            f"{group}), but a latent fires on texts that merely mention the word "
            f"(AUROC {number(a.lexical_auroc)}, {_chance('q', a.lexical_q)})."
        )
    else:
        text = (
            f"Neither the best latent ({single}) nor the {of_set} ({group}) recognises {a.concept} "
            f"in {held_out}. These texts would have shown an AUROC of "
            f"{number(a.detectable_auroc)} with 80 % power, so a weaker feature is not ruled out."
        )
    if a.also_lexical and a.verdict != "lexical only":
        text += " The latent also fires on a bare mention of the word."
    if a.lexical_auroc is None:
        text += " No lexical control was run."
    return text


def comparison_sentence(c: Comparison, held_out: str = HELD_OUT[False]) -> str:
    """Where a feature's direction lies beside the concept's contrastive vector.

    Args:
        held_out: the texts on which latents were tested.
    """
    source = "of the confirmation set" if held_out == HELD_OUT[False] else "of the same texts"
    reach = (
        f"The vector's reliability would allow up to {number(c.ceiling)}."
        if math.isfinite(c.ceiling)
        else "The texts are too few for the vector's reliability."
    )
    above, below = c.cosine > c.null_high, c.cosine < c.null_low
    place = "above" if above else "below" if below else "within"
    return (
        f"The decoder row of latent {c.latent} has a cosine of {number(c.cosine)} with the "
        f"contrastive vector {source}, {place} the range of "
        f"{number(c.null_low)} to {number(c.null_high)} that holds 95 % of all decoder rows "
        f"(percentile {number(c.percentile, 1)}). {reach}"
    )


def control_sentence(controls: list[Control], topics: int | None = None) -> str:
    """What the same procedure gives when there is nothing to find; empty without such a run.

    Args:
        topics: of the confirmation set; 1 where it has none.
    """
    shuffled = [c for c in controls if c.labels != "true"]
    if not shuffled:
        return ""
    found, sets, families, words = (
        sum(getattr(c, name) for c in shuffled) / len(shuffled)
        for name in ("found", "found_as_a_set", "found_for_the_family", "lexical_only")
    )
    within = "" if topics == 1 else " within each topic"
    runs = "once" if len(shuffled) == 1 else f"{len(shuffled)} times (means)"
    return (
        f"Control: with the labels shuffled{within}, run {runs}, the same procedure "
        f"gives {found:g} found, {sets:g} found as a set, {families:g} found for the family and "
        f"{words:g} lexical only."
    )


class FigureRow(NamedTuple):
    """One figure of a concept, for its latent and for its set."""

    name: str
    latent: str
    set: str
    note: str


def figure_rows(
    a: Alignment, topics: int | None = None, held_out: str = HELD_OUT[False]
) -> list[FigureRow]:
    """All that is known of a concept's latent and set beside the AUROC that decides.

    Args:
        topics: of the texts held out; 1 where they have none.
        held_out: the texts on which latents were tested.
    """

    def q(value: float | None) -> str:
        return "" if value is None else f" ({_chance('q', value)})"

    def between(low: float, high: float) -> str:
        return "no spread" if low == high else f"{number(low)} to {number(high)}"

    over = "over topics" if topics is None or topics >= T_TOPICS else "by DeLong"
    within = "" if topics == 1 else "within topics"
    rows = [
        ("selection set", number(a.auroc_selection), number(a.set_auroc_selection), "cross-fitted"),
        (held_out.removeprefix("the "), number(a.auroc), number(a.set_auroc), within),
        ("95 % interval", between(a.auroc_low, a.auroc_high),
         between(a.set_auroc_low, a.set_auroc_high), over),
        ("95 % interval", between(a.delong_low, a.delong_high),
         between(a.set_delong_low, a.set_delong_high), f"DeLong {within}".strip()),
        ("95 % interval", between(a.bootstrap_low, a.bootstrap_high),
         between(a.set_bootstrap_low, a.set_bootstrap_high), "bootstrap over units"),
        ("p", probability(a.p), probability(a.set_p), "one-sided"),
        ("q", probability(a.q), probability(a.set_q), 
         "errors counted in concepts (Simes, Benjamini-Hochberg)"),
        ("pooled", number(a.auroc_pooled), number(a.set_auroc_pooled), "all texts together"),
        ("among its nearest concepts", number(a.specific_auroc) + q(a.specific_q),
         number(a.set_specific_auroc) + q(a.set_specific_q), "the specificity test"),
        ("among its family", number(a.family_auroc), number(a.set_family_auroc), ""),
        ("against neutral texts", number(a.neutral_auroc), number(a.set_neutral_auroc), ""),
        ("reverse run", number(a.reverse_auroc) + q(a.reverse_q),
         number(a.reverse_set_auroc) + q(a.reverse_set_q),
         "chosen on the confirmation set, tested on the selection set"),
        ("mentions of the word", number(a.lexical_auroc) + q(a.lexical_q), DASH,
         "of the latent chosen on other mentions" if a.lexical_latent is not None
         else "no lexical control was run"),
    ]  # fmt: skip
    return [FigureRow(*row) for row in rows]


def site_words(site: str) -> str:
    """A site's name in words.

    >>> site_words("blocks.3.hook_resid_post")
    'residual stream after block 3'
    """
    parts = site.split(".")
    if len(parts) != 3 or parts[0] != "blocks":
        return site
    where = SITE_WORDS.get(parts[2].rpartition("_")[2])
    return f"residual stream {where} block {parts[1]}" if where else site
