"""The figures of discovery: concept by concept, over the size of a set, over depth.

As in `labeling.figures`: records to one inline `<svg>` element without external references.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import escape

from discovery.captured import EMBEDDING
from discovery.records import Cross, CurvePoint, Depth
from labeling.summary import CONTROLS, Mean, finite
from labeling.svg import INK, METHOD_COLOURS, SOFT, Drawing, canvas, inline
from labeling.words import method_name, number

SETS = {"selection": "Selection set (cross-fitted)", "confirmation": "Confirmation set"}
LEVELS = [0.3, 0.35, 0.4, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9]  # edges of the colours
COLOURS = [
    "#7f3b08", "#b35806", "#e08214", "#fdd7a0", "#f4f5f7", "#d6e6f4", "#abcfe6", "#74b1d6",
    "#4090c5", "#1b69af", "#084a91", "#072b57",
]  # fmt: skip
PLAIN = 4  # the colour around chance, painted as one ground
LEVEL_METHODS = {  # their names beside a level line
    "vector": "contrastive vector",
    "probe": "dense probe",
    "embedding": "embedding layer",
    "tfidf": "TF-IDF",
    "untrained set": "untrained SAE",
    "randomised set": "randomised model",
}
LINES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
LEGEND = 6  # entries in a row of a legend
NAMED = 40  # with more concepts than this the map names families only


class _Family(NamedTuple):
    name: str
    start: int
    size: int


def cross_map(rows: Sequence[Cross], families: Mapping[str, str], slugs: Mapping[str, str]) -> str:
    """AUROC of every chosen latent (rows) for the texts of every concept (columns).

    Drawn by hand: one path a colour, with equal neighbours joined, keeps 171 x 171 cells small. A
    row has a tooltip and leads to its concept.

    Args:
        rows: one a pair of concepts.
        families: concept to family; concepts are ordered by family, then in this order.
        slugs: concept to the slug of its row on the page.
    """
    known = {row.concept for row in rows}
    order = sorted((c for c in families if c in known), key=lambda c: families[c])
    place = {c: i for i, c in enumerate(order)}
    table = {(r.concept, r.other): r.auroc for r in rows if math.isfinite(r.auroc)}
    kin = [
        _Family(name, place[group[0]], len(group))
        for name, members in itertools.groupby(order, key=lambda c: families[c])
        if (group := list(members))
    ]
    n, left, top = len(order), 168.0, 6.0
    cell = min(472 / max(n, 1), 34.0)
    side = n * cell
    parts = [f'<rect x="{left}" y="{top}" width="{side:g}" height="{side:g}" '
             f'fill="{COLOURS[PLAIN]}"/>',
             f'<g transform="translate({left} {top}) scale({cell:.5g})">',
             *_cells(order, table), "</g>", *_rules(kin, left, top, cell, side),
             *_names(order, kin, left, top, cell),
             *(_row(c, i, order, table, slugs, left, top, cell, side) for i, c in enumerate(order)),
             *_key(left, top + side + 14)]  # fmt: skip
    alt = f"Map of the AUROC of {n} chosen latents for the texts of {n} concepts."
    height = top + side + 46
    return (
        f'<svg viewBox="0 0 648 {height:.0f}" role="img" aria-label="{escape(alt)}">'
        + "\n".join(parts)
        + "</svg>"
    )


def level(auroc: float) -> int:
    """The index of the colour of an AUROC."""
    return sum(auroc >= edge for edge in LEVELS)


def _cells(order: Sequence[str], table: Mapping[tuple[str, str], float]) -> Iterable[str]:
    """One path a colour, in units of cells; what was not measured is left white."""
    paths: dict[str, list[str]] = {}
    for y, concept in enumerate(order):
        values = [table.get((concept, other)) for other in order]
        shades = ["#ffffff" if v is None else COLOURS[level(v)] for v in values]
        x = 0
        for shade, run in itertools.groupby(shades):
            width = len(list(run))
            if shade != COLOURS[PLAIN]:
                paths.setdefault(shade, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    return (f'<path fill="{shade}" d="{"".join(d)}"/>' for shade, d in sorted(paths.items()))


def _rules(
    kin: Sequence[_Family], left: float, top: float, cell: float, side: float
) -> Iterable[str]:
    """Thin lines between families, and a frame around each family's own block."""
    starts = [family.start * cell for family in kin if family.start]
    lines = "".join(
        f"M{left:g} {top + at:.2f}h{side:g}M{left + at:.2f} {top:g}v{side:g}" for at in starts
    )
    yield f'<path d="{lines}" stroke="#fff" stroke-width="1.2" fill="none"/>'
    for family in kin:
        at, size = family.start * cell, family.size * cell
        yield (
            f'<rect x="{left + at:.2f}" y="{top + at:.2f}" width="{size:.2f}" '
            f'height="{size:.2f}" fill="none" stroke="{INK}" stroke-width=".8"/>'
        )


def _names(
    order: Sequence[str], kin: Sequence[_Family], left: float, top: float, cell: float
) -> Iterable[str]:
    """Concepts where they fit, families otherwise, at the left."""
    if len(order) <= NAMED:
        labels = [(c, i + 0.5) for i, c in enumerate(order)]
    else:
        labels = [(f.name, f.start + f.size / 2) for f in kin]
    size = min(8.5, cell) if len(order) <= NAMED else 8.5
    heights = apart([top + middle * cell for _, middle in labels], 1.15 * size)
    for (name, _), y in zip(labels, heights, strict=True):
        shown = name if len(name) < 32 else f"{name[:30]}…"
        yield (
            f'<text x="{left - 6:g}" y="{y + size / 3:.1f}" text-anchor="end" '
            f'font-size="{size:.1f}" fill="{INK}">{escape(shown)}</text>'
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places, moved as little as needed to lie at least `gap` apart."""
    blocks: list[list[float]] = []  # mean place and number of the members of a block
    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1:
            (low, n), (high, m) = blocks[-2:]
            if high - low >= gap * (n + m) / 2 - 1e-9:
                break
            blocks[-2:] = [[(low * n + high * m) / (n + m), n + m]]
    return [
        middle + gap * (i - (count - 1) / 2) for middle, count in blocks for i in range(int(count))
    ]


def _row(
    concept: str, i: int, order: Sequence[str], table: Mapping[tuple[str, str], float],
    slugs: Mapping[str, str], left: float, top: float, cell: float, side: float,
) -> str:  # fmt: skip
    """An invisible bar with what a row says in words."""
    others = sorted(
        ((table[concept, o], o) for o in order if o != concept and (concept, o) in table),
        key=lambda pair: -pair[0],
    )[:3]
    listed = ", ".join(f"{o} {number(v)}" for v, o in others)
    title = f"{concept}: its own texts {number(table.get((concept, concept)))}; highest of others: "
    return (
        f'<a href="#c-{escape(slugs[concept])}"><title>{escape(title + listed)}</title>'
        f'<rect x="{left:g}" y="{top + i * cell:.2f}" width="{side:g}" height="{cell:.2f}" '
        'fill="transparent"/></a>'
    )


def _key(left: float, y: float) -> Iterable[str]:
    """The colours with their edges."""
    step = 30.0
    for i, colour in enumerate(COLOURS):
        x = left + i * step
        yield f'<rect x="{x:g}" y="{y:g}" width="{step:g}" height="9" fill="{colour}"/>'
    for i, edge in enumerate(LEVELS, start=1):
        yield (
            f'<text x="{left + i * step:g}" y="{y + 20:g}" text-anchor="middle" font-size="8" '
            f'fill="{SOFT}">{edge:g}</text>'
        )
    yield (
        f'<text x="{left + step * len(COLOURS) + 8:g}" y="{y + 8:g}" font-size="8.5" '
        f'fill="{INK}">AUROC</text>'
    )


@inline
def curve(
    points: Sequence[CurvePoint], means: Mapping[tuple[str, str], Mean], k: int | None, axis: str
) -> Drawing:
    """Mean AUROC against the size of the set, the other methods as level lines, on both sets.

    Args:
        means: by set and method.
        k: latents in the sets of the verdicts.
        axis: what an AUROC of this run is called.
    """
    sets = [s for s in SETS if any(p.set == s for p in points)]
    lines = {s: [(m, means[s, m].mean) for m in LEVEL_METHODS if (s, m) in means] for s in sets}
    values = finite(v for p in points for v in (p.low, p.high, p.auroc))
    values += [0.5, *(value for own in lines.values() for _, value in own)]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.05
    figure = canvas(3.7)
    axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.075, right=0.86, bottom=0.14, top=0.93, wspace=0.36)
    for ax, name in zip(axes, sets, strict=True):
        own = sorted((p for p in points if p.set == name), key=lambda p: p.k)
        ks = [p.k for p in own]
        ax.fill_between(ks, [p.low for p in own], [p.high for p in own],
                        color=METHOD_COLOURS["set"], alpha=0.25, linewidth=0)  # fmt: skip
        ax.plot(ks, [p.auroc for p in own], "o-", color=METHOD_COLOURS["latent"], markersize=4)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [str(value) for value in ks])
        ax.minorticks_off()
        ax.set_ylim(low - margin, high + margin)
        _level_lines(ax, lines[name])
        if k in ks:
            ax.axvline(k, color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        ax.set_title(SETS[name])
        ax.set_xlabel("latents in a set (k)")
        ax.grid(axis="y")
    axes[0].set_ylabel(axis)
    return Drawing(figure, "Mean AUROC against the number of latents in a set.", {})


def _level_lines(ax: Any, lines: Sequence[tuple[str, float]]) -> None:
    """Level lines named at the right, names pushed apart where they would collide."""
    low, high = ax.get_ylim()
    ordered = sorted(lines, key=lambda pair: pair[1])
    heights = apart([value for _, value in ordered], 0.052 * (high - low))
    for (method, value), y in zip(ordered, heights, strict=True):
        style = (0, (4, 2)) if method in CONTROLS else "-"
        ax.axhline(value, color=METHOD_COLOURS[method], linewidth=1.1, linestyle=style)
        ax.annotate(LEVEL_METHODS[method], (1.02, y), size=7.5, va="center",
                    xycoords=("axes fraction", "data"), color=METHOD_COLOURS[method],
                    annotation_clip=False)  # fmt: skip


def place_in_depth(site: str) -> float | None:
    """The block after which a site lies, None where its name does not say.

    >>> place_in_depth("blocks.0.hook_resid_pre"), place_in_depth("blocks.3.hook_resid_post")
    (0.0, 4.0)
    """
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", site)
    return int(found[1]) + {"pre": 0.0, "mid": 0.5, "post": 1.0}[found[2]] if found else None


@inline
def depth(rows: Sequence[Depth], chosen: str | None, k: int | None, axis: str) -> Drawing:
    """Mean AUROC of every method at every captured site, by depth, on both sets.

    Args:
        chosen: the site that the selection set chose; marked.
        k: latents in a set.
        axis: what an AUROC of this run is called.
    """
    places = {row.site: place_in_depth(row.site) for row in rows}
    if None in places.values():  # names of another kind: their order in the records
        places = {site: float(i) for i, site in enumerate(places)}
    sets = [s for s in SETS if any(row.set == s for row in rows)]
    methods = [m for m in METHOD_COLOURS if any(row.method == m for row in rows)]
    poolings = sorted({row.pooling for row in rows}, key=lambda name: (name != "rule", name))
    entries = len(methods) + (len(poolings) if len(poolings) > 1 else 0)
    more = 0.2 * (math.ceil(entries / LEGEND) - 1)  # inches for further rows of the legend
    figure = canvas(3.6 + more)
    axes = figure.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.075, right=0.985, bottom=0.5 / height, top=1 - (0.58 + more) / height, wspace=0.06
    )
    for ax, name in zip(axes, sets, strict=True):
        ax.axhline(0.5, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)))
        if chosen is not None and chosen in places:
            ax.axvline(places[chosen], color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)))
        for m, method in enumerate(methods):
            for line, pooling in zip(itertools.cycle(LINES), poolings, strict=False):
                own = [r for r in rows if (r.set, r.method, r.pooling) == (name, method, pooling)]
                shift = 0.04 * (m - (len(methods) - 1) / 2)
                _depth_line(ax, own, places, shift, METHOD_COLOURS[method], line)
        ticks = sorted({p: site for site, p in places.items() if p is not None}.items())
        ax.set_xticks([p for p, _ in ticks], [_short(site) for _, site in ticks])
        ax.set_title(SETS[name])
        ax.set_xlabel("site")
        ax.grid(axis="y")
    axes[0].set_ylabel(axis)
    for method in methods:
        axes[0].plot([], [], "o-", color=METHOD_COLOURS[method], markersize=4,
                     label=method_name(method, k))  # fmt: skip
    if len(poolings) > 1:
        for line, pooling in zip(itertools.cycle(LINES), poolings, strict=False):
            axes[0].plot([], [], color=INK, linewidth=1, linestyle=line, label=pooling)
    figure.legend(ncols=LEGEND, loc="upper left", bbox_to_anchor=(0.06, 1.01), columnspacing=1.3)
    return Drawing(figure, "Mean AUROC by depth, one line a method.", {})


def _depth_line(
    ax: Any, rows: Sequence[Depth], places: Mapping[str, float | None], shift: float,
    colour: str, line: Any,
) -> None:  # fmt: skip
    own = sorted(rows, key=lambda row: places[row.site] or 0.0)
    if not own:
        return
    x = [(places[row.site] or 0.0) + shift for row in own]
    ax.vlines(x, [row.low for row in own], [row.high for row in own], color=colour, linewidth=1)
    ax.plot(x, [row.auroc for row in own], "o", color=colour, markersize=4, linestyle=line,
            linewidth=1.3)  # fmt: skip


def _short(site: str) -> str:
    """`after 3` for a residual site after block 3."""
    if site == EMBEDDING:
        return "embedding"
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", site)
    words = {"pre": "before", "mid": "within", "post": "after"}
    return f"{words[found[2]]} {found[1]}" if found else site
