"""Discovery in the report: its figures, its tables, its sentences; and any part may be missing."""

import inspect
import itertools
import math
import re
import typing
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from discovery.concepts import load_concepts
from discovery.records import (
    VERDICTS,
    Alignment,
    Candidate,
    Control,
    Cross,
    CurvePoint,
    Depth,
    Difference,
    OutputScore,
    Score,
    SetMember,
    SiteChoice,
    TextSet,
)
from labeling import discovery_figures
from labeling.discovery_figures import COLOURS, LEVELS, PLAIN, level, place_in_depth
from labeling.discovery_prose import captions, totals
from labeling.prose import paragraphs, selection_sentences, summary_rows
from labeling.report import report
from labeling.results import Results
from labeling.summary import CONTROLS, METHODS, agreement, summarise, topics_of

SITES = ("blocks.0.hook_resid_pre", "blocks.3.hook_resid_post", "blocks.5.hook_resid_post")
SITE = SITES[-1]
KS = (1, 2, 4, 8, 16, 32, 64, 128)
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>'


def row(record: type, **values: Any) -> Any:
    """A record with these values, and plain ones elsewhere."""
    plain = {str: "", int: 0, float: 0.5, bool: False}
    filled = {
        name: values.get(name, plain.get(kind, () if typing.get_origin(kind) is tuple else None))
        for name, kind in typing.get_type_hints(record).items()
    }
    return record(**filled)


def discovered(n: int = 171, topics: int = 12, lexical: bool = True, seed: int = 0) -> Results:
    """Plausible records of a discovery, as `emotion-atlas discover` leaves them."""
    rng = np.random.default_rng(seed)
    concepts = load_concepts()[:n]
    means = dict(zip(METHODS, (0.64, 0.76, 0.79, 0.81, 0.7, 0.8), strict=True))
    means |= dict(zip(CONTROLS, (0.51, 0.57, 0.63, 0.53, 0.55), strict=True))
    level = rng.normal(0, 0.06, n)

    def about(mean: float, i: int) -> float:
        return float(np.clip(mean + level[i] + rng.normal(0, 0.04), 0.2, 0.99))

    alignments, scores, cross = [], [], []
    for i, c in enumerate(concepts):
        single, group = about(means["latent"], i), about(means["set"], i)
        passed = {"specific_q": 0.02, "reverse_q": 0.03} if i % 3 == 0 else {"reverse_q": 0.4}
        word = {"lexical_latent": 7, "lexical_auroc": 0.6, "lexical_q": 0.4} if lexical else {}
        alignments.append(
            row(
                Alignment, concept=c.name, family=c.family, site=SITE,
                verdict=VERDICTS[(0, 4, 1, 2, 4)[i % 5]],
                pooling="rule", latent=i, auroc=single, auroc_low=single - 0.1,
                auroc_high=single + 0.08, set_auroc=group, set_auroc_low=group - 0.1,
                set_auroc_high=group + 0.08, q=0.01, set_q=0.02, reverse_set_q=0.02,
                reverse_auroc=single - 0.03, reverse_set_auroc=group - 0.02, positives=12,
                nearest=tuple(o.name for o in concepts[:3]), detectable_auroc=0.84,
                **passed, **word,
            )
        )  # fmt: skip
        for method, mean in means.items():
            for name, more in (("selection", 0.08), ("confirmation", 0.0)):
                x = about(mean + more, i)
                scores.append(Score(c.name, method, name, x, max(x - 0.1, 0.0), min(x + 0.1, 1.0)))
        for j, o in enumerate(concepts):
            mean = means["latent"] if i == j else 0.58 if o.family == c.family else 0.49
            cross.append(Cross(c.name, o.name, about(mean, j)))
    return Results(
        facts={"model": "demo_lm", "texts": "selection 2,052, confirmation 2,052"},
        concepts=concepts,
        alignments=alignments,
        sets=[
            row(TextSet, set=s, source="packaged", language="en", texts=12 * n, concepts=n,
                topics=topics, units=topics, read=13 * n, duplicates=3, leaks=2, cut=4)
            for s in ("selection", "confirmation")
        ],
        members=[SetMember(c.name, SITE, r, r, 0.3) for c in concepts for r in range(16)],
        scores=scores,
        differences=[
            Difference(c, ours, m, 0.01 * len(m), -0.01, 0.1)
            for c in ("", *(c.name for c in concepts))
            for ours in METHODS[:2]
            for m in (*METHODS[2:], *CONTROLS)
        ],
        controls=[
            Control("true", 1, 1, 1, 1, n, 9),
            Control("shuffled within topic", 0, 0, 0, 0, n, 0),
        ],
        site_choices=[SiteChoice(s, "rule", 0.6, 0.7, s == SITE) for s in SITES[1:]],
        candidates=[
            row(Candidate, concept=c.name, site=SITE, rank=r, latent=17 * i + r, auroc=0.9 - r / 50,
                cohens_d=-1.25, firing_ratio=math.inf if r == 1 else 3.5, q=1e-9)
            for i, c in enumerate(concepts)
            for r in range(1, 11)
        ],
        outputs=[
            OutputScore(c.name, SITE, 17 * i + r, r, 0.9 - r / 50, float(rng.uniform()),
                        float(rng.normal(0.6 - r / 10, 0.5)), int(rng.integers(1, n + 1)),
                        float(rng.uniform(0.01, 1)))
            for i, c in enumerate(concepts)
            for r in range(1, 6)
        ],
        cross=cross,
        curve=[
            CurvePoint(k, s, x, x - 0.02, x + 0.02)
            for s, more in (("selection", 0.08), ("confirmation", 0.0))
            for k in KS
            for x in [0.62 + more + 0.05 * math.log2(k) - 0.003 * math.log2(k) ** 2.2]
        ],
        depth=[
            Depth(site, "rule", m, s, x, x - 0.02, x + 0.02)
            for s, more in (("selection", 0.08), ("confirmation", 0.0))
            for i, site in enumerate(SITES)
            for m in METHODS[:4]
            if not (m in ("latent", "set") and i == 0)
            for x in [means[m] + more - 0.04 * (2 - i)]
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> Results:
    return discovered()


@pytest.fixture(scope="module")
def page(found: Results, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("discovery"), found)


def written(folder: Path, results: Results) -> str:
    report(folder / "report.html", results)
    return (folder / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Visible text, tags, ids and links of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.ids, self.links = set[str](), set[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids |= {v or "" for n, v in attrs if n == "id"}
        self.links |= {v or "" for n, v in attrs if n in ("href", "src")}

    def handle_data(self, data: str) -> None:
        self.text += data


def figure_names(page: str) -> set[str]:
    return set(re.findall(r'<figure id="fig-(\w+)">', page))


def test_discovery_alone_makes_a_whole_page(found: Results, page: str) -> None:
    reader = Reader(page)
    assert figure_names(page) == {
        "verdicts", "families", "auroc", "curve", "depth", "cross", "standings",
    }  # fmt: skip
    assert all(link.startswith("#") for link in reader.links)
    assert {link[1:] for link in reader.links} <= reader.ids
    assert not re.search(r"\bnan\b|\binf\b|None|undefined", reader.text)
    assert "No causal experiment was run" in reader.text
    assert len(page) < 2_500_000
    assert len(re.findall('<tr><th scope="row" rowspan', page)) == len(found.concepts)


def test_every_candidate_is_shown_with_both_sides(found: Results, page: str) -> None:
    (table,) = re.findall(r"<summary>Candidates.*?<tbody>(.*?)</tbody>", page, flags=re.S)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r, flags=re.S) for r in table.split("</tr>")]
    rows = [r for r in rows if r]
    assert len(rows) == len(found.candidates)
    first = next(r for r in rows if ">calm<" in r[0])
    out = next(o for o in found.outputs if o.concept == "calm")
    assert first[1] == "1"
    assert first[2] == str(out.latent)
    assert first[8] == "–"  # it fires in none of the others
    assert first[-1] == str(out.word_rank)
    assert first[-2] == f"{out.word_p:.3f}"
    assert first[-3].replace("−", "-") == f"{out.word_score:+.2f}"
    assert rows[9][-4:] == ["–"] * 4  # the tenth candidate was not raised


def test_controls_stand_beside_every_row(found: Results, page: str) -> None:
    a = found.alignments[0]
    (lines,) = re.findall(
        rf'<tr><th scope="row" rowspan="2">{a.concept}</th>(.*?</tr>.*?)</tr>', page, flags=re.S
    )
    latent, group = (
        re.findall(r"<td[^>]*>(.*?)</td>", line, flags=re.S) for line in lines.split("</tr>")
    )
    score = {s.method: s.auroc for s in found.scores
             if (s.concept, s.set) == (a.concept, "confirmation")}  # fmt: skip
    assert latent[0] == "latent"
    assert latent[1] == f"{a.auroc:.2f}"
    assert latent[-3:] == [f"{score[m]:.2f}" for m in ("random", "untrained", "randomised")]
    assert group[-2:] == [f"{score[m]:.2f}" for m in ("untrained set", "randomised set")]
    assert latent[-4].startswith(f"{a.reverse_auroc:.2f}")


@pytest.mark.parametrize(
    "part",
    ["sets", "members", "scores", "differences", "controls", "site_choices", "candidates",
     "outputs", "cross", "curve", "depth", "facts"],
)  # fmt: skip
def test_any_part_may_be_missing(part: str, tmp_path: Path) -> None:
    few = discovered(7)
    text = Reader(written(tmp_path, replace(few, **{part: {} if part == "facts" else []}))).text
    assert "The 7 concepts" in text
    assert not re.search(r"\bnan\b|\binf\b|None|undefined", text)


def test_alignments_alone_are_enough(tmp_path: Path) -> None:
    few = discovered(3)
    bare = Results(alignments=few.alignments, concepts=few.concepts)
    assert figure_names(written(tmp_path, bare)) == {"verdicts"}  # all of one family


def test_one_topic_and_no_lexical_control_are_said(tmp_path: Path) -> None:
    text = Reader(written(tmp_path, discovered(9, topics=1, lexical=False))).text
    assert "within-topic" not in text
    assert "within topic" not in text.replace("shuffled within topic", "")
    assert "over topics" not in text
    assert "by DeLong" in text
    assert "No lexical control was run" in text
    assert "word only" not in text
    rows = dict(summary_rows(summarise(discovered(9, lexical=False))))
    assert rows["lexical only"] == "no lexical control was run"


def test_what_is_not_a_number_spoils_no_drawing(tmp_path: Path) -> None:
    few, nan = discovered(6), float("nan")
    first = few.alignments[0]
    spoilt = replace(
        few,
        alignments=[replace(first, auroc_low=nan, auroc_high=nan), *few.alignments[1:]],
        scores=[replace(s, auroc=nan, low=nan, high=nan) if s.concept == first.concept else s
                for s in few.scores],
        cross=[replace(c, auroc=nan) if c.other == first.concept else c for c in few.cross],
    )  # fmt: skip
    page = written(tmp_path, spoilt)
    assert not re.search(r"""["' ,MLH]nan\b""", page)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    few = discovered(5)
    name = {c.name: f"{c.name} {HOSTILE}" for c in few.concepts}
    hostile = replace(
        few,
        concepts=[replace(c, name=name[c.name], slug=f'{c.slug}"><script>') for c in few.concepts],
        alignments=[replace(a, concept=name[a.concept], family=HOSTILE + a.family)
                    for a in few.alignments],
        cross=[replace(c, concept=name[c.concept], other=name[c.other]) for c in few.cross],
        candidates=[replace(c, concept=name[c.concept]) for c in few.candidates],
        outputs=[], members=[], scores=[],
        depth=[replace(d, site=HOSTILE + d.site, pooling=HOSTILE) for d in few.depth],
        sets=[replace(t, source=HOSTILE, language=HOSTILE, set=HOSTILE) for t in few.sets],
    )  # fmt: skip
    reader = Reader(written(tmp_path, hostile))
    assert not {"script", "img"} & reader.tags
    assert reader.text.count(HOSTILE) > 20
    assert {link[1:] for link in reader.links} <= reader.ids


# ------------------------------------------------------------------------------------- figures


def cells(svg: str, n: int) -> dict[tuple[int, int], str]:
    """(row, column) → colour, read back from the paths of a map."""
    grid = {(y, x): COLOURS[PLAIN] for y in range(n) for x in range(n)}
    for shade, path in re.findall(r'<path fill="(#\w+)" d="([^"]+)"/>', svg):
        for x, y, w in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path):
            grid |= {(int(y), int(x) + i): shade for i in range(int(w))}
    return grid


def test_every_cell_of_the_map_has_the_colour_of_its_auroc() -> None:
    few = discovered(12)
    rows = [replace(r, auroc=math.nan) if r.other == "amused" else r for r in few.cross]
    families = {a.concept: a.family for a in few.alignments}
    svg = discovery_figures.cross_map(rows, families, {c.name: c.slug for c in few.concepts})
    ET.fromstring(svg)
    order = sorted(families, key=lambda c: families[c])
    drawn = cells(svg, len(order))
    for r in rows:
        shade = "#ffffff" if math.isnan(r.auroc) else COLOURS[level(r.auroc)]
        assert drawn[order.index(r.concept), order.index(r.other)] == shade
    assert level(0.5) == PLAIN
    assert [level(edge) for edge in LEVELS] == list(range(1, len(COLOURS)))
    assert level(0.0) == 0


def test_a_map_of_all_concepts_is_small_and_names_its_rows(found: Results) -> None:
    families = {a.concept: a.family for a in found.alignments}
    svg = discovery_figures.cross_map(
        found.cross, families, {c.name: c.slug for c in found.concepts}
    )
    assert len(svg) < 600_000
    titles = {t.split(":")[0] for t in re.findall(r"<title>(.*?)</title>", svg)}
    assert titles == set(families)
    texts = re.findall(r"<text[^>]*>(.*?)</text>", svg)
    assert set(families.values()) <= set(texts)
    heights = [float(y) for y in re.findall(r'<text x="\S+" y="(\S+)" text-anchor="end"', svg)]
    assert min(b - a for a, b in itertools.pairwise(heights)) > 9


def test_curve_and_depth_stand_alone_and_are_the_same_every_time(found: Results) -> None:
    means = summarise(found).auroc
    for draw, rows, rest in (
        (discovery_figures.curve, found.curve, (means, 16, "AUROC")),
        (discovery_figures.depth, found.depth, (SITE, 16, "AUROC")),
    ):
        svg = draw(rows, *rest)
        root = ET.fromstring(svg)
        assert root.attrib["aria-label"]
        assert svg == draw(rows, *rest)
        assert "http" not in svg
        assert "svg" in draw([rows[0]], *rest)
        assert "svg" in draw([replace(r, low=math.nan, high=math.nan) for r in rows], *rest)


def test_lines_of_the_curve_lie_at_the_means() -> None:
    few = discovered(5)
    svg = discovery_figures.curve(few.curve, summarise(few).auroc, 16, "AUROC")
    texts = [t.text for t in ET.fromstring(svg).iter("text")]
    for name in ("TF-IDF", "dense probe", "contrastive vector", "embedding layer",
                 "untrained SAE", "randomised model"):  # fmt: skip
        assert texts.count(name) == 2
    assert texts.count("128") == 2


def test_several_poolings_and_unknown_sites_are_drawn() -> None:
    rows = discovered(5).depth
    both = [*rows, *(replace(r, pooling="max", auroc=r.auroc - 0.1) for r in rows)]
    texts = [
        t.text for t in ET.fromstring(discovery_figures.depth(both, SITE, 16, "AUROC")).iter("text")
    ]
    assert {"rule", "max", "embedding", "after 3", "after 5"} <= set(texts)
    odd = [replace(r, site=f"layer {i % 2}") for i, r in enumerate(rows)]
    texts = [
        t.text for t in ET.fromstring(discovery_figures.depth(odd, None, 16, "AUROC")).iter("text")
    ]
    assert {"layer 0", "layer 1"} <= set(texts)
    assert place_in_depth("blocks.3.hook_resid_mid") == 3.5
    assert place_in_depth("layer 0") is None


@pytest.mark.parametrize("poolings", [1, 2, 4, 9])
def test_the_legend_of_the_depths_lies_above_the_panels(poolings: int) -> None:
    rows = [replace(r, pooling=f"from-{i}") for r in discovered(3).depth for i in range(poolings)]
    figure = inspect.unwrap(discovery_figures.depth)(rows, SITE, 16, "AUROC").figure
    figure.canvas.draw()
    titles = [ax.title.get_window_extent() for ax in figure.axes]
    legend = figure.legends[0].get_window_extent()
    assert legend.y0 > max(title.y1 for title in titles)
    assert legend.y1 <= figure.bbox.y1 + 4


def test_means_over_concepts_name_their_interval(found: Results) -> None:
    s = summarise(found)
    assert s.curve_interval_words == "95 % t interval over the means of topics"
    few = summarise(discovered(9, topics=1))
    assert "DeLong over units on the confirmation set" in few.curve_interval_words
    for text in captions(s, found).values():
        assert "at chance counted in" not in text
    assert s.curve_interval_words in captions(s, found)["curve"]
    same = {key: mean._replace(mean=0.8, low=0.7, high=0.9) for key, mean in s.auroc.items()}
    assert "TF-IDF reaches as much" in selection_sentences(replace(s, auroc=same))


def test_the_rate_of_errors_is_said_to_be_over_concepts(page: str) -> None:
    text = Reader(page).text
    assert "controlled over the 171 concepts" in text
    assert "over all 2" not in text


@pytest.mark.parametrize("places", [[], [1.0], [0.0, 0.0, 0.0], [0.0, 0.1, 5.0, 5.05, 9.0]])
def test_places_are_moved_apart_and_no_further(places: list[float]) -> None:
    moved = discovery_figures.apart(places, 1.0)
    assert len(moved) == len(places)
    assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(moved))
    assert sum(moved) == pytest.approx(sum(places))
    assert moved[-1:] == places[-1:] or len(places) == 3


# ------------------------------------------------------------------------------------- numbers


def test_tau_is_the_mean_over_concepts_of_scipys(found: Results) -> None:
    outputs = [replace(o, word_score=0.0) if o.concept == "calm" else o for o in found.outputs]
    taus = []
    for c in found.concepts:
        own = [o for o in outputs if o.concept == c.name]
        if c.name != "calm":
            taus.append(
                stats.kendalltau([o.input_auroc for o in own], [o.word_score for o in own])[0]
            )
    low, high = stats.t.interval(0.95, len(taus) - 1, np.mean(taus), stats.sem(taus))
    agreed = agreement(outputs, "word_score")
    assert agreed is not None
    assert agreed.candidates == 5 * len(taus)
    assert agreed.tau == pytest.approx((np.mean(taus), low, high, len(taus)))
    assert agreement([replace(o, word_score=1.0) for o in outputs], "word_score") is None


def test_the_summary_counts_what_the_records_say(found: Results) -> None:
    s = summarise(found)
    best = [o for o in found.outputs if o.rank == 1]
    assert s.outputs is not None
    assert s.outputs.first == sum(o.word_rank == 1 for o in best)
    assert s.outputs.passed == sum((o.word_p or 0) <= 0.05 for o in best)
    assert s.outputs.median_rank == np.median([o.word_rank for o in best])
    own = {r.concept: r.auroc for r in found.cross if r.concept == r.other}
    top = {c: max(r.auroc for r in found.cross if r.concept == c) for c in own}
    assert s.cross is not None
    assert s.cross.own == pytest.approx(np.mean(list(own.values())))
    assert s.cross.highest == sum(own[c] == top[c] for c in own)
    single = [a for a in found.alignments if a.verdict == "found"]
    group = [a for a in found.alignments if a.verdict == "found as a set"]
    assert s.reverse is not None
    assert s.reverse.tested == len(single) + len(group)
    assert s.reverse.passed == sum((a.reverse_q or 1) <= 0.05 for a in single) + len(group)
    assert totals(s.sets).texts == 2 * 12 * 171
    assert (s.topics, s.pooling, s.lexical) == (12, "rule", True)


def test_topics_of_several_sources_add_up_unless_none_has_any() -> None:
    def of(*topics: int, name: str = "confirmation") -> list[TextSet]:
        return [row(TextSet, set=name, topics=t, texts=5) for t in topics]

    assert topics_of(of(12)) == 12
    assert topics_of([*of(99, name="selection"), *of(3, 4)]) == 7
    assert topics_of(of(1, 1)) == 1
    assert topics_of(of(0)) == 1
    assert topics_of([]) is None
    assert topics_of(of(8, name="selection")) == 8  # one corpus only
    assert topics_of(of(8, name="neutral")) is None


def test_one_corpus_only_is_said(tmp_path: Path) -> None:
    few = discovered(6)
    alone = replace(
        few, sets=few.sets[:1],
        depth=[d for d in few.depth if d.set == "selection"],
        curve=[p for p in few.curve if p.set == "selection"],
        scores=[replace(s, set=name) for s in few.scores for name in ("selection", "confirmation")
                if s.set == "selection"],
    )  # fmt: skip
    assert summarise(alone).crossfit
    assert not summarise(few).crossfit
    text = Reader(written(tmp_path, alone)).text
    assert "one latent, chosen on the other folds, recognises the concept in the folds left" in text
    assert "run again under labels shuffled within topics" in text
    for phrase in ("Confirmed once", "the confirmation set", "confirmation set,"):
        assert phrase not in text.replace("chosen on the confirmation set, tested on", "")
    rows = dict(summary_rows(summarise(alone)))
    assert "AUROC folds left out, TF-IDF" in rows


def test_paragraphs_and_closing_rows_agree_with_the_summary(found: Results, page: str) -> None:
    s = summarise(found)
    text = " ".join(paragraphs(s))
    assert s.reverse is not None
    assert f"{s.reverse.passed} of the {s.reverse.tested} concepts" in text
    rows = dict(summary_rows(s))
    assert len(rows) == len(summary_rows(s))
    again = f"{s.reverse.passed} of {s.reverse.tested}"
    assert rows["found, and again in the reverse run"] == again
    assert rows["site, pooling"] == f"{SITE}, rule"
    assert rows["longer than the context"].startswith("8 cut, ")
    assert "6 near-duplicates" in rows["left out"]
    assert all(f'<th scope="row">{k}</th><td>{v}</td>' in page for k, v in rows.items())
