"""Numbers to words: the sentences of the report and the rows of the closing table.

Every number comes from a `Summary`, so page, terminal and README cannot disagree. Nothing here
knows what the figures ought to say: each sentence has a wording for either outcome.
"""

from collections.abc import Sequence

from discovery.records import VERDICTS, Alignment, Effect, Vector
from labeling import discovery_prose
from labeling.results import Results
from labeling.summary import CONTROLS, METHODS, Correlation, Mean, Standing, Summary, headline
from labeling.words import interval, join, method_name, number, plural


def verdict_sentences(summary: Summary) -> str:
    """The counts in words, and what shuffled labels give."""
    c, n, shuffled = summary.counts, summary.n, summary.shuffled
    of_set = method_name("set", summary.k)
    chosen = "chosen on the other folds" if summary.crossfit else "chosen on the selection set"
    text = (
        f"Of {plural(n, 'concept')}, {c['found']} "
        f"{'was' if c['found'] == 1 else 'were'} found: one latent, {chosen}, recognises the "
        f"concept in {summary.held_out} and tells it from its nearest neighbours. "
        f"{c['found as a set']} more needed a {of_set}; for {c['found for the family']} the "
        f"latents recognise the concept but were not shown to tell it from its nearest ones; "
    )
    if summary.lexical:
        fire = "fires" if c["lexical only"] == 1 else "fire"
        text += f"{c['lexical only']} {fire} on the word only. "
    text += f"{c['not found']} {'was' if c['not found'] == 1 else 'were'} not found."
    if not summary.lexical:
        text += " No lexical control was run: a latent may follow the concept's mere words."
    elif c["found"]:
        text += (
            f" Of the {c['found']} found, {summary.also_lexical} also "
            f"{'fires' if summary.also_lexical == 1 else 'fire'} on a bare mention of the word."
        )
    if shuffled:
        false = sum(s.found + s.found_as_a_set + s.found_for_the_family for s in shuffled)
        runs = "" if len(shuffled) == 1 else f" in {len(shuffled)} runs"
        within = "" if summary.topics == 1 else " within each topic"
        text += (
            f" With the labels shuffled{within}, the whole procedure gives "
            f"{false} such {'verdict' if false == 1 else 'verdicts'} (found, set or family){runs}"
        )
        text += (
            ", so choosing among many latents does not by itself produce them."
            if false == 0
            else f": about {number(false / len(shuffled), 1)} of those above may be chance."
        )
    return text


def confirmation_sentences(summary: Summary) -> str:
    """How the methods compare on the confirmation set, best first; what the SAE wins or loses."""
    means = _confirmed(summary, METHODS)
    if not means:
        return f"No AUROC was recorded on {summary.held_out}."
    ranked = sorted(means, key=lambda m: -means[m].mean)
    listed = [f"{method_name(m, summary.k)} {interval(means[m])}" for m in ranked]
    n = max(mean.n for mean in means.values())
    text = (
        f"Mean {summary.auroc_words} on {summary.held_out} over {plural(n, 'concept')}, with a "
        f"95 % t interval over concepts (chance 0.5): {join(listed)}."
    )
    baselines = [s for s in summary.standings if s.baseline in METHODS]
    if baselines:
        text += (
            f" Difference by difference, with intervals {summary.interval_words} (in brackets: of "
            f"{plural(summary.n, 'concept')}, those whose own interval lies above 0 and below 0):"
        )
    clauses = []
    for ours in ("latent", "set"):
        standings = [s for s in baselines if s.ours == ours]
        if standings:
            grouped = [_grouped(summary, standings, outcome) for outcome in (1, 0, -1)]
            clauses.append(
                f" the {method_name(ours, summary.k)} {', and '.join(g for g in grouped if g)}"
            )
    return text + ";".join(clauses) + ("." if clauses else "") + _plain_words(summary)


def _confirmed(summary: Summary, methods: Sequence[str]) -> dict[str, Mean]:
    found = {m: summary.auroc.get(("confirmation", m)) for m in methods}
    return {method: mean for method, mean in found.items() if mean is not None}


def _grouped(summary: Summary, standings: Sequence[Standing], outcome: int) -> str:
    """`beats the A by 0.02 (36, 21) and the B by ...`, for the baselines with that outcome."""
    verb = {1: "beats", 0: "cannot be told from", -1: "loses to"}[outcome]
    parts = []
    for s in standings:
        if s.outcome == outcome:
            gap = f"by {number(abs(s.mean.mean), 3)} " if outcome else ""
            name = method_name(s.baseline, summary.k)
            parts.append(
                f"{'' if s.baseline == 'tfidf' else 'the '}{name} {gap}({s.above}, {s.below})"
            )
    return f"{verb} {join(parts)}" if parts else ""


def _plain_words(summary: Summary) -> str:
    against = {s.ours: s for s in summary.standings if s.baseline == "tfidf"}
    if not against:
        return ""
    best = max(against.values(), key=lambda s: s.mean.mean)
    what = method_name(best.ours, summary.k)
    if best.outcome < 0:
        return (
            " Plainly: counting words recognises these concepts better than this SAE's latents do,"
            " singly or as sets."
            if len(against) > 1
            else f" Plainly: counting words recognises these concepts better than the {what} does."
        )
    if best.outcome > 0:
        return f" Plainly: the {what} carries more than word counts do."
    return f" Plainly: the {what} does no better and no worse than counting words."


def selection_sentences(summary: Summary) -> str:
    """The selection set, and how far TF-IDF falls from it to the confirmation set.

    Empty for one corpus only: cross-fitted figures are all there is.
    """
    means = {m: summary.auroc.get(("selection", m)) for m in METHODS}
    known = {method: mean.mean for method, mean in means.items() if mean is not None}
    if not known or summary.crossfit:
        return ""
    listed = [f"{method_name(m, summary.k)} {number(mean, 3)}" for m, mean in known.items()]
    text = f"On the selection set, cross-fitted over its units: {join(listed)}."
    then = summary.auroc.get(("confirmation", "tfidf"))
    if then and "tfidf" in known:
        drop = known["tfidf"] - then.mean
        by = number(abs(drop), 3)
        if float(by) == 0:
            return f"{text} TF-IDF reaches as much on the confirmation set."
        text += f" From there to the confirmation set TF-IDF {'falls' if drop > 0 else 'rises'} by "
        text += f"{by}: vocabulary that the two sets do not share." if drop > 0 else f"{by}."
    return text


def _correlation(pair: Correlation, label: str) -> str:
    here = pair.here
    text = (
        f"PC{here.component} of the vectors ({number(100 * here.variance, 0)} % of their variance) "
        f"correlates with human {label} at r = {number(here.r)} "
        f"({number(here.low)} to {number(here.high)}, n = {here.n} words)"
    )
    return text + (
        f"; at the embedding layer r = {number(pair.embedding.r)}" if pair.embedding else ""
    )


def geometry_sentences(summary: Summary) -> str:
    """Valence and arousal in the plane of the vectors, with the embedding layer beside them."""
    pairs = [headline(summary.geometry, "valence", 1), headline(summary.geometry, "arousal", 2)]
    texts = [_correlation(p, p.here.norm) for p in pairs if p]
    if not texts:
        return "No concept has human norms at this site, so the map carries no correlation."
    return (
        ". ".join(texts) + ". Components are turned so that r is positive, so only its size tells."
    )


def cosine_sentences(summary: Summary) -> str:
    """Do features point where the contrastive vectors point?"""
    c = summary.cosines
    if c is None:
        return "No feature was compared with a contrastive vector."
    source = (
        "the same texts, which chose the feature too"
        if summary.crossfit
        else "the confirmation set, which did not choose the feature"
    )
    reach = (
        f"; the reliability of the vectors would allow {number(c.ceiling)}"
        if c.ceiling is not None
        else ""
    )
    return (
        f"The feature's decoder row has a median cosine of {number(c.median)} with the concept's "
        f"contrastive vector of {source}, over {plural(c.n, 'concept')}{reach}. "
        f"It lies above 97.5 % of all decoder rows (median limit "
        f"{number(c.null_high)}) for {c.above} of {c.n}, and it is the row nearest to the vector "
        f"for {c.nearest}. The direction of the whole set reaches {number(c.set_median)}."
    )


def causal_sentences(summary: Summary) -> str:
    """What clamping did, at one dose and at equal KL."""
    c = summary.causal
    if c is None:
        return "No causal effect was measured."
    effect = c.effect
    unconfirmed = c.n - c.confirmed
    text = (
        f"Clamped to {number(c.dose)} of the mean residual norm, the feature changes the "
        f"log-probability of its concept's words by a median of "
        f"{number(effect['feature'].median, sign=True)} nats over {plural(c.n, 'concept')}; the "
        f"contrastive vector at the same norm by {number(effect['vector'].median, sign=True)}, "
        f"random features by {number(effect['random'].median, sign=True)}. For {c.beyond_random} "
        f"of {c.n} its interval lies above every random control. At equal KL (median "
        f"{number(c.equal_kl)} nats) the medians are "
        f"{number(c.equal_effect['feature'], sign=True)}, "
        f"{number(c.equal_effect['vector'], sign=True)} and "
        f"{number(c.equal_effect['random'], sign=True)}, and the feature does more than random for "
        f"{c.equal_beyond_random} and more than the vector for {c.equal_beyond_vector} of {c.n}."
    )
    if unconfirmed:
        text += (
            f" {unconfirmed} of these {plural(c.n, 'concept')} "
            f"{'was' if unconfirmed == 1 else 'were'} not found as a single latent; the best "
            "candidate was clamped instead."
        )
    return text


def _geometry_brief(summary: Summary) -> str:
    pairs = [headline(summary.geometry, "valence", 1), headline(summary.geometry, "arousal", 2)]
    parts = [
        f"human {p.here.norm} at r = {number(p.here.r)}"
        + (f" (embedding layer {number(p.embedding.r)})" if p.embedding else "")
        for p in pairs
        if p
    ]
    return f"The plane of the contrastive vectors follows {join(parts)}. " if parts else ""


def _cosine_brief(summary: Summary) -> str:
    c = summary.cosines
    if c is None:
        return ""
    return (
        f"Features and contrastive vectors have a median cosine of {number(c.median)}, more than "
        f"97.5 % of all decoder rows for {c.above} of {plural(c.n, 'concept')}. "
    )


def _causal_brief(summary: Summary) -> str:
    c = summary.causal
    if c is None:
        return ""
    medians = [f"{name} {number(q.median, sign=True)}" for name, q in c.effect.items()]
    return (
        f"Clamped at a dose of {number(c.dose)}, the words of the concept change by (median nats) "
        f"{join(medians)}; the feature's interval lies above every random control for "
        f"{c.beyond_random} of {plural(c.n, 'concept')}."
    )


def paragraphs(summary: Summary) -> list[str]:
    """The summary at the head of the report, one string a paragraph."""
    texts = [
        verdict_sentences(summary),
        confirmation_sentences(summary),
        selection_sentences(summary),
        _geometry_brief(summary) + _cosine_brief(summary) + _causal_brief(summary),
        discovery_prose.control_sentences(summary),
        discovery_prose.output_sentences(summary),
        discovery_prose.text_sentences(summary),
    ]
    return [t for t in texts if t]


def captions(summary: Summary, results: Results, vectors: Sequence[Vector]) -> dict[str, str]:
    """Figure name to caption: what is drawn, and what it shows in numbers.

    Args:
        vectors: those on the map.
    """
    rated = {c.name for c in results.concepts if c.valence is not None}
    shown = sum(v.concept in rated for v in vectors)
    return {
        "verdicts": _verdict_caption(summary),
        "map": (
            f"One point a concept, at {summary.site}; {shown} of {len(vectors)} have a human "
            f"valence. Names are left out where they would collide; hover over a point to read it. "
            f"{geometry_sentences(summary)}"
        ),
        "auroc": (
            "One dot a concept; the bar is the mean with its 95 % t interval over concepts; "
            f"dashed: chance; grey: controls. {_auroc_takeaway(summary)}"
        ),
        "standings": (
            f"On {summary.held_out}, paired: concepts for which the 95 % interval "
            f"{summary.interval_words} of the difference lies above 0, holds 0, or lies below; at "
            f"the right the mean difference over concepts with its 95 % interval "
            f"{summary.interval_words}."
        ),
        "families": _family_caption(results.alignments),
        "cosines": cosine_sentences(summary),
        "doses": (
            "Median and quartiles over concepts (left); one faint line a concept, the median where "
            f"at least half of them reach that KL (right). {causal_sentences(summary)}"
        ),
        "multiples": _multiples_caption(results.effects),
        **discovery_prose.captions(summary, results),
    }


def _multiples_caption(effects: Sequence[Effect]) -> str:
    starred = len({e.concept for e in effects if e.verdict != "found"})
    tried = len({e.concept for e in effects})
    return (
        f"{plural(tried, 'concept')}; 95 % intervals of the mean over prompts; for the random "
        "controls their range. At one dose clamps write, and vectors add, the same norm; where "
        "a latent already fires, its edit is smaller."
        + (f" * not found as a single latent ({starred})." if starred else "")
    )


def _verdict_caption(summary: Summary) -> str:
    text = f"True labels: {summary.counts['found']} of {summary.n} found"
    if not summary.shuffled:
        return f"{text}. No shuffled control was run."
    found = join([str(s.found) for s in summary.shuffled])
    return f"{text}; shuffled labels: {found}."


def _auroc_takeaway(summary: Summary) -> str:
    means = {m: mean.mean for m, mean in _confirmed(summary, METHODS).items()}
    if not means:
        return ""
    best = max(means, key=lambda m: means[m])
    leader = f"{'' if best == 'tfidf' else 'the '}{method_name(best, summary.k)}"
    text = f"On {summary.held_out} {leader} leads with {number(means[best], 3)}"
    ours = [f"{method_name(m, summary.k)} {number(means[m], 3)}" for m in ("latent", "set")
            if m in means and m != best]  # fmt: skip
    return f"{text}; {join(ours)}." if ours else f"{text}."


def _family_caption(alignments: Sequence[Alignment]) -> str:
    groups: dict[str, list[bool]] = {}
    for row in alignments:
        confirmed = row.verdict in ("found", "found as a set")
        groups.setdefault(row.family, []).append(confirmed)
    ranked = sorted(groups.items(), key=lambda item: (-sum(item[1]) / len(item[1]), item[0]))
    (best, high), (worst, low) = ranked[0], ranked[-1]
    return f"Found singly or as a set: {sum(high)} of {len(high)} in {best}" + (
        f", {sum(low)} of {len(low)} in {worst}." if best != worst else "."
    )


def summary_rows(summary: Summary) -> list[tuple[str, str]]:
    """The closing table of a run as (label, value): printed at the end, quoted by the README."""
    k, c = summary.k, summary.causal
    rows = [("concepts", str(summary.n))]
    rows += [
        (
            f"found as a {method_name('set', k)}" if v == "found as a set" else v,
            str(summary.counts[v])
            if summary.lexical or v != "lexical only"
            else "no lexical control was run",
        )
        for v in VERDICTS
    ]
    for s in summary.shuffled:
        counts = (s.found, s.found_as_a_set, s.found_for_the_family, s.lexical_only, s.not_found)
        rows.append((f"the same five, labels {s.labels}", " / ".join(map(str, counts))))
    if summary.site:
        rows.append(("site, pooling", f"{summary.site}, {summary.pooling}"))
    rows += [
        (f"AUROC {summary.held_out.removeprefix('the ')}, {method_name(m, k)}", interval(mean))
        for m, mean in _confirmed(summary, (*METHODS, *CONTROLS)).items()
    ]
    rows += [
        (
            f"{method_name(s.ours, k)} minus {method_name(s.baseline, k)}",
            f"{interval(s.mean, sign=True)}; {s.above} above, {s.below} below",
        )
        for s in summary.standings
        if s.baseline == "tfidf" or (s.ours == "set" and s.baseline.endswith(" set"))
    ]
    rows += discovery_prose.summary_rows(summary)
    for norm, component in (("valence", 1), ("arousal", 2)):
        pair = headline(summary.geometry, norm, component)
        if pair:
            beside = f"; embedding layer {number(pair.embedding.r)}" if pair.embedding else ""
            rows.append(
                (
                    f"r of PC{component} with {norm}",
                    f"{number(pair.here.r)}, n = {pair.here.n}{beside}",
                )
            )
    if summary.cosines:
        s = summary.cosines
        rows.append(
            (
                "cosine feature, vector (median)",
                f"{number(s.median)}; above the null for {s.above} of {s.n}"
                + ("" if s.ceiling is None else f"; ceiling {number(s.ceiling)}"),
            )
        )
    if c:
        for name, quartile in c.effect.items():
            rows.append(
                (
                    f"log-probability at dose {number(c.dose)}, {name}",
                    f"{number(quartile.median, sign=True)} nats (median of {c.n})",
                )
            )
        rows.append(("feature beyond random controls", f"{c.beyond_random} of {c.n}"))
    return rows
