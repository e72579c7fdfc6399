"""Figures: well-formed inline SVG that stands alone, the same bytes, marks that do not collide."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from discovery.concepts import Concept, load_concepts
from discovery.records import VERDICTS, Comparison, Effect, Geometry, Score, Vector
from labeling import figures
from labeling.figures import VERDICT_COLOURS
from labeling.summary import CONTROLS, METHODS, Correlation, Mean, Standing
from labeling.svg import INK, canvas, places, swarm

SITE = "blocks.2.hook_resid_post"
RNG = np.random.default_rng(3)
CONCEPTS = load_concepts()[:12]
VECTORS = [
    Vector(c.name, SITE, "rule", 0.2, 0.7, 0.84, *(float(x) for x in RNG.normal(size=2)))
    for c in CONCEPTS
]


def correlation(component: int) -> Correlation:
    here = Geometry(SITE, "rule", "valence", "glasgow", component, 0.6, 0.4, 0.75, 60, 0.25)
    return Correlation(here, here)


def effects(concept: str) -> list[Effect]:
    return [
        Effect(concept, "found", condition, SITE, 4, dose, dose, dose - 0.1, dose + 0.1, dose**2, 9)
        for condition in ("feature", "vector", "random")
        for dose in (0.0, 0.5, 1.0)
    ]


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    scores = [
        Score(c.name, m, s, float(x), 0.4, 0.9)
        for c in CONCEPTS
        for m in (*METHODS, *CONTROLS)
        for s, x in zip(("selection", "confirmation"), RNG.uniform(0.4, 1, 2), strict=True)
    ]
    compared = [
        Comparison(c.name, SITE, 4, 0.3, 99.0, 0.0, -0.1, 0.1, 0.4, 5, 0.35, 0.8) for c in CONCEPTS
    ]
    changes = [e for c in CONCEPTS[:7] for e in effects(c.name)]
    counts = {v: i for i, v in enumerate(VERDICTS)}
    standing = Standing("set", "tfidf", Mean(-0.05, -0.07, -0.03, 12), 1, 5)
    return {
        "verdict_counts": figures.verdict_counts([("true labels", counts), ("a < b & c", counts)]),
        "valence_map": figures.valence_map(VECTORS, CONCEPTS, [correlation(1), correlation(2)]),
        "auroc": figures.auroc(scores, 16, "AUROC"),
        "standings": figures.standings([standing], 12, 16),
        "cosines": figures.cosines(compared, [], {c.name: c.slug for c in CONCEPTS}),
        "dose_summary": figures.dose_summary(changes),
        "dose_multiples": figures.dose_multiples(changes),
    }


def test_every_figure_is_well_formed_and_stands_alone(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        root = ET.fromstring(svg)
        assert root.tag == "svg"
        assert root.attrib["aria-label"]
        ids = {e.attrib["id"] for e in root.iter() if "id" in e.attrib}
        assert all(i.startswith(f"{name}-") for i in ids)
        used = re.findall(r"url\(#([^)]+)\)", svg)
        used += [e.attrib["href"][1:] for e in root.iter("use")]
        assert used
        assert set(used) <= ids
        assert "http" not in svg
        tags = {
            "svg",
            "g",
            "path",
            "text",
            "tspan",
            "use",
            "defs",
            "clipPath",
            "rect",
            "a",
            "title",
        }
        assert {e.tag for e in root.iter()} <= tags


def test_a_users_matplotlib_settings_neither_matter_nor_change() -> None:
    counts = {v: 1 for v in VERDICTS}
    before = figures.verdict_counts([("true labels", counts)])
    with mpl.rc_context({"font.size": 31, "lines.linewidth": 7, "svg.fonttype": "path"}):
        assert figures.verdict_counts([("true labels", counts)]) == before
        assert mpl.rcParams["font.size"] == 31


def test_text_is_text_and_never_mathematics() -> None:
    counts = {v: 1 for v in VERDICTS}
    root = ET.fromstring(figures.verdict_counts([('$\\frac{1$ id="x" <b>', counts)]))
    assert '$\\frac{1$ id="x" <b>' in [e.text for e in root.iter("text")]


def test_points_name_their_concept_and_lead_to_its_row(drawn: dict[str, str]) -> None:
    for name in ("valence_map", "cosines"):
        links = {
            a.attrib["href"]: (a.findtext("title") or "").split(":")[0]
            for a in ET.fromstring(drawn[name]).iter("a")
        }
        assert links == {f"#c-{c.slug}": c.name for c in CONCEPTS}


def test_points_lie_where_the_records_say(drawn: dict[str, str]) -> None:
    """Pixel positions are an increasing (x) and decreasing (y) affine map of PC1 and PC2."""
    marks = {
        a.attrib["href"]: (float(u.attrib["x"]), float(u.attrib["y"]))
        for a in ET.fromstring(drawn["valence_map"]).iter("a")
        for u in a.iter("use")
    }
    slugs = {c.name: c.slug for c in CONCEPTS}
    xy = np.array([marks[f"#c-{slugs[v.concept]}"] for v in VECTORS])
    assert np.corrcoef(xy[:, 0], [v.pc1 for v in VECTORS])[0, 1] == pytest.approx(1, abs=1e-4)
    assert np.corrcoef(xy[:, 1], [v.pc2 for v in VECTORS])[0, 1] == pytest.approx(-1, abs=1e-4)


def test_a_map_without_norms_shows_hollow_points() -> None:
    bare = [Concept(**{**vars(c), "valence": None}) for c in CONCEPTS]
    svg = figures.valence_map(VECTORS, bare, [])
    assert svg.count("not rated") == len(VECTORS)
    assert "Pearson" not in svg


def test_one_concept_is_enough_for_every_figure() -> None:
    one = CONCEPTS[:1]
    assert "svg" in figures.valence_map(VECTORS[:1], one, [])
    assert "svg" in figures.dose_multiples(effects(one[0].name))
    assert "svg" in figures.dose_summary(effects(one[0].name))
    score = Score(one[0].name, "latent", "confirmation", 0.5, 0.4, 0.6)
    assert "svg" in figures.auroc([score], None)


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=60))
def test_dots_of_a_swarm_do_not_overlap(values: list[float]) -> None:
    width, height = 0.02, 0.1
    offsets = swarm(values, width, height)
    for i in range(len(values)):
        for j in range(i):
            dx, dy = (values[i] - values[j]) / width, (offsets[i] - offsets[j]) / height
            assert math.hypot(dx, dy) >= 1 - 1e-9


def boxes(
    ax: Axes, named: list[tuple[str, float, float]]
) -> Iterator[tuple[float, float, float, float]]:
    """Label boxes as matplotlib itself measures them, in points."""
    for text, xy, offset, (ha, va) in places(ax, named):
        label = ax.annotate(
            text, xy, xytext=offset, textcoords="offset points", ha=ha, va=va, size=7.5
        )
        yield tuple(label.get_window_extent(ax.figure.canvas.get_renderer()).extents)


def test_labels_collide_with_no_label_and_no_point() -> None:
    figure = canvas(5.0)
    figure.set_dpi(72)
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    ax.set_xlim(-3.5, 3.5)
    ax.set_ylim(-3.5, 3.5)
    names = [c.name for c in load_concepts()]
    named = [
        (n, float(x), float(y)) for n, (x, y) in zip(names, RNG.normal(size=(171, 2)), strict=True)
    ]
    found = list(boxes(ax, named))
    assert 40 < len(found) < 171
    for i, (left, low, right, high) in enumerate(found):
        assert ax.bbox.x0 <= left + 3
        assert right - 3 <= ax.bbox.x1
        for other in found[:i]:
            across = min(right, other[2]) - max(left, other[0])
            along = min(high, other[3]) - max(low, other[1])
            assert across < 1.5 or along < 1.5
        inside = [
            n for n, x, y in named
            if (p := ax.transData.transform((x, y)))[0] - left > 1 and right - p[0] > 1
            and p[1] - low > 2 and high - p[1] > 2
        ]  # fmt: skip
        assert not inside


@pytest.mark.parametrize("verdict", VERDICTS)
def test_counts_can_be_read_on_their_bar(verdict: str) -> None:
    """WCAG contrast of at least 4.5 between the bar and the ink of the count on it."""
    counts = {v: 40 if v == verdict else 0 for v in VERDICTS}
    root = ET.fromstring(figures.verdict_counts([("true labels", counts)]))
    (count,) = [e for e in root.iter("text") if e.text == "40"]
    found = re.search(r"fill: (#[0-9a-f]{6})", count.attrib["style"])
    assert found
    lights = sorted((luminance(found[1]), luminance(VERDICT_COLOURS[verdict])))
    assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5
    assert found[1] in ("#ffffff", INK)


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
