"""matplotlib to inline SVG: one style, the same bytes every time; where labels and dots go.

matplotlib is imported when a figure is drawn, and used without pyplot, so no state is shared.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import numpy as np
from markupsafe import escape

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK, SOFT, GRID = "#1a1c20", "#5c626b", "#dfe2e6"
METHOD_COLOURS = {  # after Okabe and Ito (2008); controls in greys
    "latent": "#0072b2",
    "set": "#56b4e9",
    "vector": "#d55e00",
    "probe": "#cc79a7",
    "embedding": "#009e73",
    "tfidf": "#3a3d42",
    "random": "#7d838c",
    "untrained": "#8d939b",
    "untrained set": "#a3a8af",
    "randomised": "#8d939b",
    "randomised set": "#a3a8af",
}
WIDTH = 9.0  # inches at 72 points: a view box of 648, set to the width of the page
_STYLE: "dict[RcKeyType, Any]" = {
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
    "svg.fonttype": "none",
}
_SIDES = (
    (5.0, 0.0, "left", "center"),
    (-5.0, 0.0, "right", "center"),
    (0.0, 4.0, "center", "bottom"),
    (0.0, -4.0, "center", "top"),
)
"""Where a label may go: offset from its point, in points, and alignment; the best side first."""
P = ParamSpec("P")


class Drawing(NamedTuple):
    """A finished matplotlib figure, what it shows in a sentence, and the concepts behind points."""

    figure: Any
    alt: str
    points: Mapping[str, Sequence[tuple[str, str]]]  # gid of a collection → (slug, tooltip) a point


def inline(draw: Callable[P, Drawing]) -> Callable[P, str]:
    """Draw in our style, whatever the user's matplotlibrc says, and return the `<svg>` element."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib as mpl

        name = draw.__name__
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            mpl.rcParams["svg.hashsalt"] = name
            figure, alt, points = draw(*args, **kwargs)
            return _clean(_svg(figure), name, alt, points)

    return drawn


def _svg(figure: Any) -> str:
    from io import StringIO

    out = StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return out.getvalue()


def _clean(svg: str, name: str, alt: str, points: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Without prolog, metadata and global style; ids made unique on the page, decimals cut."""

    def tag(match: re.Match[str]) -> str:  # text cannot match: its "<" and ">" are escaped
        text = re.sub(r'\bid="', f'id="{name}-', match[0])
        text = re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", text).replace("xlink:", "")
        return re.sub(r' (d|x|y)="[^"]+"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), text)

    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<[a-z][^>]*>", tag, re.sub(r">\s+<", ">\n<", body))
    for gid, named in points.items():
        body = _link(body, f"{name}-{gid}", named)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alt)}">{body}'


def _link(body: str, gid: str, named: Sequence[tuple[str, str]]) -> str:
    """Wrap the n-th marker of the group `gid` in a link to the n-th concept, with a tooltip."""
    head, group = body.split(f'<g id="{gid}">', 1)
    marks = iter(named)

    def linked(use: re.Match[str]) -> str:
        slug, title = next(marks)
        return f'<a href="#c-{escape(slug)}"><title>{escape(title)}</title>{use[0]}</a>'

    return f'{head}<g id="{gid}">' + re.sub(r"<use [^>]*/>", linked, group, count=len(named))


def canvas(height: float) -> Any:
    """An empty matplotlib figure as wide as the page, `height` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


class Place(NamedTuple):
    """Where a label goes: at `xy` in data units, shifted by `offset` points, aligned `(ha, va)`."""

    text: str
    xy: tuple[float, float]
    offset: tuple[float, float]
    align: tuple[str, str]


def places(ax: Any, named: Sequence[tuple[str, float, float]], size: float = 7.5) -> list[Place]:
    """Labels that collide neither with a label nor with a point, outermost concepts first.

    Widths are estimated, so that the choice does not hang on a font; limits must have been set.
    """
    xy = ax.transData.transform([(x, y) for _, x, y in named])  # points: the figure has 72 a inch
    area = ax.get_window_extent()
    spread = np.ptp(xy, axis=0) + 1e-9
    order = np.argsort(-np.linalg.norm((xy - xy.mean(axis=0)) / spread, axis=1), kind="stable")
    taken = [(x - 3.2, y - 3.2, x + 3.2, y + 3.2) for x, y in xy.tolist()]
    placed: list[Place] = []
    for i in order.tolist():
        name, x, y = named[i]
        wide, high = 0.6 * size * len(name), size
        px, py = xy[i].tolist()
        for dx, dy, ha, va in _SIDES:
            left = px + dx - wide * {"left": 0, "center": 0.5, "right": 1}[ha]
            foot = py + dy - high * {"bottom": 0, "center": 0.5, "top": 1}[va]
            box = (left, foot, left + wide, foot + high)
            inside = area.x0 <= box[0] and box[2] <= area.x1 and area.y0 <= box[1]
            if inside and not any(_overlap(box, t) for j, t in enumerate(taken) if j != i):
                taken.append(box)
                placed.append(Place(name, (x, y), (dx, dy), (ha, va)))
                break
    return placed


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def swarm(values: Sequence[float], width: float, height: float) -> list[float]:
    """Offsets at which dots of one row do not overlap, as near to 0 as they can be.

    Args:
        values: places along the row.
        width, height: of a dot, along the row and across it; offsets are multiples of half of
            `height`.
    """
    rows = [0, *(sign * k for k in range(1, 2 * len(values)) for sign in (1, -1))]
    offsets = [0.0] * len(values)
    placed: list[tuple[float, int]] = []
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        x = values[i] / width
        near = [(x - other, row) for other, row in placed if x - other < 1]
        taken = {row + d for dx, row in near for d in (-1, 0, 1) if math.hypot(dx, d / 2) < 1}
        row = next(r for r in rows if r not in taken)
        placed.append((x, row))
        offsets[i] = row * height / 2
    return offsets
