"""The figures of the report, one function each: records to one inline `<svg>` element.

No external references; text stays text (searchable, in the page's font). Points that stand for a
concept carry its name as a tooltip and link to its row (`#c-slug`).
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from discovery.concepts import Concept
from discovery.records import VERDICTS, Alignment, Comparison, Effect, Score, Vector
from labeling.summary import (
    CONDITIONS,
    CONTROLS,
    METHODS,
    Correlation,
    Standing,
    at_kl,
    curves,
    finite,
    mean_interval,
    median,
    quartiles,
)
from labeling.svg import (
    GRID,
    INK,
    METHOD_COLOURS,
    SOFT,
    WIDTH,
    Drawing,
    canvas,
    inline,
    places,
    swarm,
)
from labeling.words import method_name, number

VERDICT_COLOURS = {
    "found": "#08519c",
    "found as a set": "#3f8fcb",
    "found for the family": "#9cc9e8",
    "lexical only": "#e69f00",
    "not found": "#d3d6da",
}
CONDITION_COLOURS = {"feature": "#0072b2", "vector": "#d55e00", "random": "#7d838c"}


def _stack(ax: Any, y: int, counts: Sequence[int], colours: Sequence[str], total: int) -> None:
    """One stacked bar; counts are written into the segments wide enough on an axis to `total`."""
    left = 0
    fits = 9 / (ax.get_position().width * WIDTH * 72)  # share of the axis that a digit needs
    for count, colour in zip(counts, colours, strict=True):
        if not count:
            continue
        ax.barh(y, count, 0.74, left=left, color=colour, edgecolor="white", linewidth=0.8)
        if count >= fits * len(str(count)) * total:
            dark = _luminance(colour) < 0.42
            ax.text(
                left + count / 2, y, str(count), ha="center", va="center",
                color="white" if dark else INK, size=8.5, weight="bold",
            )  # fmt: skip
        left += count


def _luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _verdict_legend(ax: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=VERDICT_COLOURS[v], label=v) for v in VERDICTS]
    ax.legend(handles=handles, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), columnspacing=1.2)


@inline
def verdict_counts(rows: Sequence[tuple[str, Mapping[str, int]]]) -> Drawing:
    """A stacked bar of verdicts for each labelling, true labels first."""
    figure = canvas(0.45 + 0.42 * len(rows))
    ax = figure.add_axes((0.17, 0, 0.815, 1 - 0.42 / figure.get_figheight()))
    total = max(sum(counts.values()) for _, counts in rows)
    for y, (_, counts) in enumerate(rows):
        _stack(ax, y, [counts[v] for v in VERDICTS], list(VERDICT_COLOURS.values()), total)
    _bare(ax, [label for label, _ in rows], total)
    _verdict_legend(ax)
    alt = "; ".join(
        f"{label}: " + ", ".join(f"{counts[v]} {v}" for v in VERDICTS) for label, counts in rows
    )
    return Drawing(figure, f"Stacked bars of verdicts. {alt}.", {})


def _bare(ax: Any, names: Sequence[str], total: int) -> None:
    """Nothing but the names of the bars, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.55, -0.5)
    ax.set_xlim(0, total)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([])


@inline
def families(alignments: Sequence[Alignment]) -> Drawing:
    """Verdicts by family, the family with the largest share of found concepts on top."""
    groups: dict[str, Counter[str]] = {}
    for row in alignments:
        groups.setdefault(row.family, Counter())[row.verdict] += 1

    def key(family: str) -> list[float]:
        counts, total = groups[family], groups[family].total()
        return [-sum(counts[v] for v in VERDICTS[: i + 1]) / total for i in range(3)]

    names = sorted(groups, key=key)
    figure = canvas(0.45 + 0.33 * len(names))
    ax = figure.add_axes((0.25, 0, 0.735, 1 - 0.42 / figure.get_figheight()))
    largest = max(g.total() for g in groups.values())
    for y, name in enumerate(names):
        counts = [groups[name][v] for v in VERDICTS]
        _stack(ax, y, counts, list(VERDICT_COLOURS.values()), largest)
    _bare(ax, [f"{n} ({groups[n].total()})" for n in names], largest)
    _verdict_legend(ax)
    return Drawing(figure, "Stacked bars of verdicts, one bar a family of concepts.", {})


@inline
def auroc(scores: Sequence[Score], k: int | None, axis: str = "within-topic AUROC") -> Drawing:
    """AUROC of every method over the concepts, both sets side by side, with means.

    Args:
        k: latents in a set.
        axis: what an AUROC of this run is called.
    """
    sets = [s for s in ("selection", "confirmation") if any(r.set == s for r in scores)]
    titles = {
        "selection": "Selection set (cross-fitted)",
        "confirmation": "Confirmation set",
    }
    known = [*METHODS, *CONTROLS]
    methods = [m for m in known if any(r.method == m and r.set in sets for r in scores)]
    figure = canvas(0.75 + 0.56 * len(methods))
    axes = figure.subplots(1, len(sets), sharex=True, sharey=True, squeeze=False)[0]
    foot, top = 0.5 / figure.get_figheight(), 1 - 0.3 / figure.get_figheight()
    figure.subplots_adjust(left=0.21, right=0.985, bottom=foot, top=top, wspace=0.06)
    shown = [r.auroc for r in scores if r.method in methods and math.isfinite(r.auroc)]
    lowest = min(shown, default=0.5)
    for ax, name in zip(axes, sets, strict=True):
        ax.axvline(0.5, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        for y, method in enumerate(methods):
            values = [
                r.auroc
                for r in scores
                if (r.set, r.method) == (name, method) and math.isfinite(r.auroc)
            ]
            if values:
                _strip(ax, y, values, METHOD_COLOURS[method])
        ax.set_title(titles[name])
        ax.set_xlabel(axis)
        ax.set_yticks(range(len(methods)), [method_name(m, k) for m in methods])
        ax.tick_params(axis="y", length=0)
        ax.set_xlim(min(0.4, math.floor(lowest * 20) / 20) - 0.01, 1.12)
        ax.set_xticks(
            [t / 10 for t in range(math.floor(lowest * 10), 11) if t / 10 >= lowest - 0.1]
        )
        ax.set_ylim(len(methods) - 0.45, -0.6)
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)
    return Drawing(figure, f"Distribution over concepts of {axis} by method and set.", {})


def _strip(ax: Any, y: int, values: Sequence[float], colour: str) -> None:
    """Dots stacked by value, mean with its interval over concepts, and the mean in figures."""
    shifts = swarm(values, width=0.0085, height=0.062)
    squeeze = min(1.0, 0.38 / max(max(shifts), -min(shifts), 1e-9))
    offsets = [y + squeeze * shift for shift in shifts]
    ax.plot(values, offsets, "o", markersize=2.3, color=colour, alpha=0.55, markeredgewidth=0)
    mean = mean_interval(values)
    assert mean
    if mean.low is not None:
        ax.plot([mean.low, mean.high], [y, y], color=INK, linewidth=1.6, solid_capstyle="butt")
    ax.plot([mean.mean] * 2, [y - 0.34, y + 0.34], color=INK, linewidth=1.6, solid_capstyle="butt")
    ax.text(1.025, y, number(mean.mean, 3), va="center", size=8, weight="bold")


@inline
def standings(rows: Sequence[Standing], n: int, k: int | None) -> Drawing:
    """For each of ours against each baseline: concepts above, undecided and below."""
    colours = [METHOD_COLOURS["latent"], VERDICT_COLOURS["not found"], METHOD_COLOURS["tfidf"]]
    figure = canvas(0.45 + 0.3 * len(rows))
    ax = figure.add_axes((0.375, 0, 0.385, 1 - 0.42 / figure.get_figheight()))
    from matplotlib.patches import Patch

    for y, row in enumerate(rows):
        _stack(ax, y, [row.above, n - row.above - row.below, row.below], colours, n)
        text = number(row.mean.mean, 3, sign=True)
        if row.mean.low is not None:
            spread = f"{number(row.mean.low, 3)} to {number(row.mean.high, 3)}"
            text += f"  ({'no spread' if row.mean.low == row.mean.high else spread})"
        ax.text(1.03 * n, y, text, va="center", size=8.5)
    names = [f"{method_name(r.ours, k)} − {method_name(r.baseline, k)}" for r in rows]
    _bare(ax, names, n)
    labels = ["above", "interval holds 0", "below"]
    handles = [Patch(color=c, label=t) for c, t in zip(colours, labels, strict=True)]
    ax.legend(handles=handles, ncols=3, loc="lower left", bbox_to_anchor=(-0.01, 1))
    ax.text(1.03 * n, -0.62, "mean difference", va="bottom", size=8.5, color=SOFT)
    return Drawing(figure, "Concepts for which ours lies above or below each baseline.", {})


@inline
def valence_map(
    vectors: Sequence[Vector],
    concepts: Sequence[Concept],
    correlations: Sequence[Correlation],
) -> Drawing:
    """Concept vectors in the plane of PC1 and PC2, coloured by valence, and r against norms."""
    known = {c.name: c for c in concepts}
    rows = [v for v in vectors if math.isfinite(v.pc1) and math.isfinite(v.pc2)]
    rated = [v for v in rows if known[v.concept].valence is not None]
    bare = [v for v in rows if known[v.concept].valence is None]
    values = [float(known[v.concept].valence or 0) for v in rated]
    figure = canvas(5.7)
    ax = figure.add_axes((0.075, 0.085, 0.59 if rated or correlations else 0.9, 0.9))
    points: dict[str, list[tuple[str, str]]] = {}
    ax.axhline(0, color=GRID, linewidth=0.8)
    ax.axvline(0, color=GRID, linewidth=0.8)
    if bare:
        _points(ax, bare, "unrated", color="white", edgecolor="#9aa0a8")
        points["unrated"] = [(known[v.concept].slug, f"{v.concept}: not rated") for v in bare]
    if rated:
        colour = {"c": values, "cmap": "PuOr", "vmin": 1, "vmax": 9, "edgecolor": SOFT}
        marks = _points(ax, rated, "rated", **colour)
        points["rated"] = [
            (known[v.concept].slug, f"{v.concept}: valence {number(value, 1)}")
            for v, value in zip(rated, values, strict=True)
        ]
        _colour_bar(figure.add_axes((0.8, 0.935, 0.185, 0.016)), marks.cmap)
    share = {c.here.component: f" ({number(100 * c.here.variance, 0)} % of variance)"
             for c in correlations}  # fmt: skip
    ax.set_xlabel("PC1" + share.get(1, ""))
    ax.set_ylabel("PC2" + share.get(2, ""))
    for side, spread in (
        (ax.set_xlim, [v.pc1 for v in rows]),
        (ax.set_ylim, [v.pc2 for v in rows]),
    ):
        margin = 0.05 * (max(spread) - min(spread)) or 1.0
        side(min(spread) - margin, max(spread) + margin)
    for text, xy, offset, (ha, va) in places(ax, [(v.concept, v.pc1, v.pc2) for v in rows]):
        ax.annotate(
            text, xy, xytext=offset, textcoords="offset points", ha=ha, va=va, size=7.5, color=INK
        )
    if correlations:
        _forest(figure.add_axes((0.835, 0.085, 0.15, 0.7)), correlations)
    alt = f"Map of {len(rows)} concept vectors in the plane of their first two components."
    return Drawing(figure, alt, points)


def _colour_bar(ax: Any, colours: Any, steps: int = 32) -> None:
    """Of rectangles: matplotlib's own would embed a raster image."""
    for i in range(steps):
        ax.axvspan(i / steps, (i + 1.3) / steps, color=colours((i + 0.5) / steps), linewidth=0)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.5, 1], ["1", "5", "9"])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title("human valence (hollow: unrated)", size=8, weight="normal", loc="right", pad=4)


def _points(ax: Any, rows: Sequence[Vector], gid: str, **style: Any) -> Any:
    return ax.scatter(
        [v.pc1 for v in rows], [v.pc2 for v in rows], s=26, linewidth=0.6, gid=gid, **style
    )


def _forest(ax: Any, correlations: Sequence[Correlation]) -> None:
    """r of each component with each norm: the vectors' site, and the embedding layer as hollow."""
    y = 0.0
    ticks, labels = [], []
    for component, pairs in itertools.groupby(
        sorted(correlations, key=lambda c: c.here.component), key=lambda c: c.here.component
    ):
        for pair in pairs:
            here = pair.here
            _whisker(ax, y, here.r, here.low, here.high, "#0072b2", filled=True)
            if pair.embedding:
                e = pair.embedding
                _whisker(ax, y + 0.3, e.r, e.low, e.high, "#009e73", filled=False)
            ticks.append(y + (0.15 if pair.embedding else 0))
            labels.append(f"PC{component} {here.norm}\n{here.source}, n = {here.n}")
            y += 1.0
        y += 0.35
    ax.axvline(0, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
    ax.set_yticks(ticks, labels, size=7)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(-1, 1)
    ax.set_xticks([-1, 0, 1])
    ax.set_ylim(y - 0.5, -0.6)
    ax.set_xlabel("Pearson r")
    ax.grid(axis="x")
    ax.spines["left"].set_visible(False)
    ax.plot([], [], "o", color="#0072b2", markersize=5, label="these vectors")
    ax.plot([], [], "o", color="#009e73", mfc="white", markersize=5, label="embedding layer")
    ax.legend(loc="lower left", bbox_to_anchor=(-0.62, 1.0), labelspacing=0.25, borderpad=0)


def _whisker(
    ax: Any, y: float, r: float, low: float, high: float, colour: str, *, filled: bool
) -> None:
    ax.plot([low, high], [y, y], color=colour, linewidth=1.3)
    ax.plot(r, y, "o", color=colour, markersize=5, markerfacecolor=colour if filled else "white")


@inline
def cosines(
    comparisons: Sequence[Comparison], alignments: Sequence[Alignment], slugs: Mapping[str, str]
) -> Drawing:
    """Cosine of feature and vector for every concept, with the null band and the ceiling."""
    rows = sorted((c for c in comparisons if math.isfinite(c.cosine)), key=lambda c: -c.cosine)
    verdicts = {a.concept: a.verdict for a in alignments}
    x = np.arange(len(rows))
    figure = canvas(3.6)
    ax = figure.add_axes((0.065, 0.12, 0.925, 0.74))
    ax.fill_between(
        x, [c.null_low for c in rows], [c.null_high for c in rows],
        step="mid", color="#e4e6ea", linewidth=0, label="middle 95 % of all decoder rows",
    )  # fmt: skip
    ax.plot(
        x, [c.ceiling for c in rows], "_", color=INK, markersize=3.5, label="ceiling (reliability)"
    )
    ax.plot(
        x, [c.set_cosine for c in rows], "x", color="#8a9099", markersize=3, markeredgewidth=0.7,
        label="direction of the set",
    )  # fmt: skip
    colours = [VERDICT_COLOURS[verdicts.get(c.concept, "not found")] for c in rows]
    ax.scatter(x, [c.cosine for c in rows], s=20, c=colours, edgecolor="#30343a", linewidth=0.5,
               gid="features", zorder=3)  # fmt: skip
    ax.axhline(0, color=SOFT, linewidth=0.7)
    ax.plot([], [], "o", color=VERDICT_COLOURS["found"], markeredgecolor="#30343a", markersize=4.5,
            label="feature, coloured by verdict")  # fmt: skip
    ax.set_xlim(-1, max(len(rows), 1))
    ax.set_xticks([])
    ax.set_xlabel("concepts, by cosine")
    ax.set_ylabel("cosine with the contrastive vector")
    ax.grid(axis="y")
    ax.legend(ncols=4, loc="lower left", bbox_to_anchor=(-0.01, 1.01), columnspacing=1.3)
    points = [
        (slugs.get(c.concept, ""), f"{c.concept}: cosine {number(c.cosine)}, latent {c.latent}")
        for c in rows
    ]
    return Drawing(
        figure, "Cosine of feature and contrastive vector by concept.", {"features": points}
    )


@inline
def dose_summary(effects: Sequence[Effect]) -> Drawing:
    """Left: change of log-probability against dose. Right: the same against KL."""
    by_concept = curves(effects)
    doses = sorted({e.dose for e in effects if e.dose > 0})
    figure = canvas(3.5)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.985, bottom=0.14, top=0.93, wspace=0.07)
    for name in CONDITIONS:
        colour = CONDITION_COLOURS[name]
        mine = [c[name] for c in by_concept.values() if name in c]
        found = [
            (d, q)
            for d in doses
            if (q := quartiles(e.delta_logprob for c in mine for e in c if e.dose == d))
        ]
        if not found:
            continue
        xs = [0.0, *(d for d, _ in found)]
        left.fill_between(xs, [0, *(q.lower for _, q in found)], [0, *(q.upper for _, q in found)],
                          color=colour, alpha=0.16, linewidth=0)  # fmt: skip
        left.plot(xs, [0, *(q.median for _, q in found)], "o-", color=colour, markersize=3.5,
                  label=name)  # fmt: skip
        _against_kl(right, mine, colour)
    left.set_title("At equal norm")
    left.set_xlabel("dose (norm of the edit / mean residual norm)")
    left.set_ylabel("change of log-probability (nats)")
    right.set_title("At equal KL")
    right.set_xlabel("KL, clean to edited next-token distribution (nats)")
    for ax in (left, right):
        ax.axhline(0, color=SOFT, linewidth=0.7)
        ax.grid(axis="y")
    left.legend(loc="upper left")
    return Drawing(figure, "Median change of log-probability against dose and against KL.", {})


def _against_kl(ax: Any, mine: Sequence[Sequence[Effect]], colour: str) -> None:
    """Faint: one curve a concept. Strong: the median over concepts at each KL that half reach."""
    for curve in mine:
        ax.plot([0, *(e.kl for e in curve)], [0, *(e.delta_logprob for e in curve)],
                color=colour, alpha=0.2, linewidth=0.7)  # fmt: skip
    reach = [max(e.kl for e in curve) for curve in mine]
    grid = np.linspace(0, float(np.median(reach)), 25)
    middle = [median(at_kl(curve, kl) for curve in mine) for kl in grid.tolist()]
    ax.plot(grid, middle, color=colour, linewidth=2)


@inline
def dose_multiples(effects: Sequence[Effect]) -> Drawing:
    """One small panel a concept on common axes: every condition with its interval."""
    by_concept = curves(effects)
    columns = min(6, len(by_concept))
    rows = math.ceil(len(by_concept) / columns)
    figure = canvas(0.85 + 1.3 * rows)
    high = figure.get_figheight()
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.075, right=0.985, bottom=0.5 / high, top=1 - 0.58 / high, wspace=0.1, hspace=0.32
    )
    for ax in axes.flat[len(by_concept) :]:
        ax.set_visible(False)
    bounds = finite(x for e in effects for x in (e.low, e.high, 0.0))
    margin = 0.06 * (max(bounds) - min(bounds)) or 1.0
    furthest = max(e.dose for e in effects)
    panels = zip(axes.flat, by_concept.items(), strict=False)
    for i, (ax, (concept, conditions)) in enumerate(panels):
        ax.set_xlim(-0.05 * furthest, 1.08 * furthest)
        ax.set_ylim(min(bounds) - margin, max(bounds) + margin)
        ax.axhline(0, color=SOFT, linewidth=0.6)
        for name in reversed(CONDITIONS):
            _dose_curve(ax, conditions.get(name, []), name)
        verdict = next(iter(conditions.values()))[0].verdict
        ax.set_title(concept if verdict == "found" else f"{concept} *", size=8.5, pad=3)
        ax.grid(axis="y")
        if i % columns:
            ax.tick_params(axis="y", length=0, labelleft=False)
        if i + columns < len(by_concept):
            ax.tick_params(axis="x", length=0, labelbottom=False)
    names = {"feature": "feature", "vector": "contrastive vector", "random": "random controls"}
    for name, label in names.items():
        axes[0, 0].plot([], [], color=CONDITION_COLOURS[name], label=label)
    figure.legend(ncols=3, loc="upper left", bbox_to_anchor=(0.06, 1.01))
    figure.supxlabel(
        "dose (norm of the edit / mean residual norm)", size=9, y=0.06 / high, va="bottom"
    )
    figure.supylabel("change of log-probability (nats)", size=9, x=0.002)
    return Drawing(figure, "Dose-response curves, one panel a concept.", {})


def _dose_curve(ax: Any, curve: Sequence[Effect], condition: str) -> None:
    curve = [e for e in curve if e.dose > 0]
    doses = [0.0, *(e.dose for e in curve)]
    low, high = [0.0, *(e.low for e in curve)], [0.0, *(e.high for e in curve)]
    random, colour = condition == "random", CONDITION_COLOURS[condition]
    ax.fill_between(doses, low, high, color=colour, alpha=0.3 if random else 0.14, linewidth=0)
    middle = [0.0, *(e.delta_logprob for e in curve)]
    ax.plot(doses, middle, color=colour, linewidth=1.3, linestyle=(0, (2, 1.5)) if random else "-")
