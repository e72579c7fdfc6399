"""Verdicts and figures in words, for the pages."""

from discovery.records import Alignment, Comparison, Control
from labeling.prose import number, probability

NO_BREAK = "\N{NO-BREAK SPACE}"
SITE_WORDS = {"pre": "before", "post": "after"}


def _chance(symbol: str, value: float | None) -> str:
    """`q = 0.01`, in one piece that no line break can cut."""
    return f"{symbol} = {probability(value)}".replace(" ", NO_BREAK)


def _figures(auroc: float, p: float, q: float) -> str:
    return f"AUROC {number(auroc)}, {_chance('p', p)}, {_chance('q', q)}"


def _specific(auroc: float, q: float | None) -> str:
    return f"AUROC {number(auroc)}, {_chance('q', q)}"


def verdict_sentence(a: Alignment, k: int | None = None) -> str:
    """What the verdict on a concept means, with the figures that decided it.

    Args:
        k: latents in the concept's set, where known.
    """
    single = _figures(a.auroc, a.p, a.q)
    group = _figures(a.set_auroc, a.set_p, a.set_q)
    of_set = f"weighted set of {k} latents" if k else "weighted set of latents"
    if a.verdict == "found":
        text = (
            f"One latent, chosen on the first set of stories, recognises {a.concept} in the hard "
            f"set ({single}) and tells it from its nearest concepts "
            f"({_specific(a.specific_auroc, a.specific_q)})."
        )
    elif a.verdict == "found as a set":
        text = (
            f"No single latent is enough (the best: {single}), but a {of_set} recognises "
            f"{a.concept} in the hard set ({group}) and tells it from its nearest concepts "
            f"({_specific(a.set_specific_auroc, a.set_specific_q)})."
        )
    elif a.verdict == "found for the family":
        alone = a.specific_q is not None
        text = (
            f"{'One latent' if alone else f'A {of_set}'} recognises {a.concept} in the hard set "
            f"({single if alone else group}), but does not tell it from its nearest concepts ("
            + (
                _specific(a.specific_auroc, a.specific_q)
                if alone
                else _specific(a.set_specific_auroc, a.set_specific_q)
            )
            + ")."
        )
    elif a.verdict == "lexical only":
        text = (
            f"Nothing recognises the feeling in the hard set (best latent: {single}; set: "
            f"{group}), but a latent fires on sentences that merely mention the word "
            f"(AUROC {number(a.lexical_auroc)}, {_chance('q', a.lexical_q)})."
        )
    else:
        text = (
            f"Neither the best latent ({single}) nor the {of_set} ({group}) recognises {a.concept} "
            f"in the hard set. These texts would have shown an AUROC of "
            f"{number(a.detectable_auroc)} with 80 % power, so a weaker feature is not ruled out."
        )
    if a.also_lexical and a.verdict != "lexical only":
        text += " The latent also fires on a bare mention of the word."
    return text


def comparison_sentence(c: Comparison) -> str:
    """Where a feature's direction lies beside the concept's contrastive vector."""
    above, below = c.cosine > c.null_high, c.cosine < c.null_low
    place = "above" if above else "below" if below else "within"
    return (
        f"The decoder row of latent {c.latent} has a cosine of {number(c.cosine)} with the "
        f"contrastive vector of the hard set, {place} the range of "
        f"{number(c.null_low)} to {number(c.null_high)} that holds 95 % of all decoder rows "
        f"(percentile {number(c.percentile, 1)}). The vector's reliability would allow up to "
        f"{number(c.ceiling)}."
    )


def control_sentence(controls: list[Control]) -> str:
    """What the same procedure gives when there is nothing to find; empty without such a run."""
    shuffled = [c for c in controls if c.labels != "true"]
    if not shuffled:
        return ""
    found, sets, families, words = (
        sum(getattr(c, name) for c in shuffled) / len(shuffled)
        for name in ("found", "found_as_a_set", "found_for_the_family", "lexical_only")
    )
    runs = "once" if len(shuffled) == 1 else f"{len(shuffled)} times (means)"
    return (
        f"Control: with the labels shuffled within each topic, run {runs}, the same procedure "
        f"gives {found:g} found, {sets:g} found as a set, {families:g} found for the family and "
        f"{words:g} lexical only."
    )


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
