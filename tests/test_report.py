"""The report: planted numbers come out as words; the page stands alone; nothing hostile gets in."""

import re
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from discovery.concepts import Concept, load_concepts
from discovery.records import (
    VERDICTS,
    Alignment,
    Comparison,
    Control,
    Difference,
    Effect,
    Geometry,
    Label,
    Score,
    SetMember,
    SiteChoice,
    Vector,
)
from labeling.prose import paragraphs, summary_rows
from labeling.report import report
from labeling.results import Results
from labeling.summary import Summary, at_kl, summarise

SITE, EMBEDDING = "blocks.5.hook_resid_post", "blocks.0.hook_resid_pre"
CENTRES = {"latent": 0.62, "set": 0.74, "vector": 0.79, "probe": 0.8, "embedding": 0.72}
CENTRES["tfidf"] = 0.8
DOSES = (0.25, 0.5, 1.0)


def row(record: type, **values: Any) -> Any:
    """A record with these values, and plain ones elsewhere."""
    plain = {str: "", int: 0, float: 0.5, bool: False}
    filled = {
        name: values.get(name, plain.get(kind, () if typing.get_origin(kind) is tuple else None))
        for name, kind in typing.get_type_hints(record).items()
    }
    return record(**filled)


def planted(concepts: list[Concept], *, shift: float = 0.0, causal: int = 24) -> dict[str, Any]:
    """Plausible records of a whole run; `shift` moves every AUROC on the confirmation set."""
    rng = np.random.default_rng(0)
    names = [c.name for c in concepts]
    scores, differences, hard = [], [], {}
    for c in names:
        level = rng.normal(0, 0.05)
        for method, centre in CENTRES.items():
            value = float(np.clip(centre + shift + level + rng.normal(0, 0.05), 0.3, 0.99))
            first = float(np.clip(value + 0.1 + rng.normal(0, 0.02), 0.3, 0.995))
            hard[c, method] = value
            values = {"confirmation": value, "selection": first, "situations": value - 0.05}
            for name, x in values.items():
                scores.append(Score(c, method, name, x, max(x - 0.08, 0.0), min(x + 0.08, 1.0)))
        for ours in ("latent", "set"):
            for baseline in ("vector", "probe", "embedding", "tfidf"):
                gap = hard[c, ours] - hard[c, baseline]
                differences.append(Difference(c, ours, baseline, gap, gap - 0.07, gap + 0.07))
    for ours in ("latent", "set"):
        for baseline in ("vector", "probe", "embedding", "tfidf"):
            gap = float(np.mean([hard[c, ours] - hard[c, baseline] for c in names]))
            differences.append(Difference("", ours, baseline, gap, gap - 0.01, gap + 0.02))
    alignments = [_alignment(c, hard, i, names) for i, c in enumerate(concepts)]
    counts = [sum(a.verdict == v for a in alignments) for v in VERDICTS]
    order = sorted(alignments, key=lambda a: -a.auroc)[:causal]
    return {
        "facts": {
            "model": "demo_lm (8.6 M parameters)",
            "SAE 1": "blocks.3.hook_resid_post: L0 32.0, variance explained 0.731",
            "texts": "selection 2,052, confirmation 2,052, lexical 1,368",
        },
        "concepts": concepts,
        "alignments": alignments,
        "members": [
            SetMember(c, SITE, r, int(rng.integers(4096)), float(rng.normal(0, 0.4)))
            for c in names
            for r in range(16)
        ],
        "scores": scores,
        "differences": differences,
        "controls": [
            Control("true", *counts, 61),
            Control("shuffled within topic", 0, 0, 0, 1, len(names) - 1, 0),
        ],
        "site_choices": [
            SiteChoice("blocks.3.hook_resid_post", "rule", 0.668, 0.801, False),
            SiteChoice(SITE, "rule", 0.701, 0.832, True),
        ],
        "vectors": [_vector(c, rng, s) for s in (SITE, EMBEDDING) for c in concepts],
        "geometry": [
            Geometry(s, "rule", norm, source, component, r, r - 0.12, r + 0.09, n, share)
            for s, scale in ((SITE, 1.0), (EMBEDDING, 0.7))
            for norm, source, component, r, n, share in (
                ("valence", "glasgow", 1, 0.71 * scale, 108, 0.26),
                ("valence", "vader", 1, 0.66 * scale, 139, 0.26),
                ("arousal", "glasgow", 1, -0.2 * scale, 108, 0.26),
                ("dominance", "glasgow", 1, 0.5 * scale, 108, 0.26),
                ("valence", "glasgow", 2, 0.1 * scale, 108, 0.15),
                ("arousal", "glasgow", 2, 0.48 * scale, 108, 0.15),
            )
        ],
        "comparisons": [_comparison(a, rng) for a in alignments],
        "effects": [e for a in order for e in _effects(a, rng)],
        "labels": [
            Label(SITE, a.latent, f"feeling {a.concept}", 0.7, "medium", "", (a.concept,), 0.02)
            for a in alignments
        ],
    }


def _alignment(
    concept: Concept, hard: dict[tuple[str, str], float], i: int, names: list[str]
) -> Alignment:
    single, of_set = hard[concept.name, "latent"], hard[concept.name, "set"]
    verdict = "not found"
    if single > 0.7:
        verdict = "found" if i % 4 else "found for the family"
    elif of_set > 0.78:
        verdict = "found as a set"
    elif i % 17 == 0:
        verdict = "lexical only"
    return row(
        Alignment,
        concept=concept.name, family=concept.family, verdict=verdict, also_lexical=i % 5 == 0,
        site=SITE, pooling="rule", latent=(i * 37) % 4096, firing=0.1,
        auroc_selection=single + 0.1, auroc=single, auroc_low=single - 0.09,
        auroc_high=min(single + 0.09, 1.0), p=10 ** -(40 * max(single - 0.5, 0.0)), q=0.03,
        specific_auroc=single - 0.05, specific_p=0.02, specific_q=0.04 if single > 0.7 else None,
        set_auroc_selection=of_set + 0.1, set_auroc=of_set, set_auroc_low=of_set - 0.09,
        set_auroc_high=min(of_set + 0.09, 1.0), set_p=1e-5, set_q=4e-5, set_specific_auroc=0.7,
        set_specific_p=0.01, nearest=tuple(names[:5]), positives=12, lexical_latent=7,
        lexical_auroc=0.6, lexical_p=0.2, lexical_q=0.6, latent_lexical_p=0.4,
        detectable_auroc=0.84,
    )  # fmt: skip


def _vector(concept: Concept, rng: np.random.Generator, site: str) -> Vector:
    x = (concept.valence or 4.0) - 4.5 + rng.normal(0, 1.2)
    y = (concept.arousal or 5.3) - 5.3 + rng.normal(0, 0.9)
    return Vector(concept.name, site, "rule", 0.2, 0.75, 0.866, float(x / 40), float(y / 40))


def _comparison(row: Alignment, rng: np.random.Generator) -> Comparison:
    cosine = float(np.clip(row.auroc - 0.5 + rng.normal(0, 0.06), -0.2, 0.7))
    return Comparison(
        row.concept, SITE, row.latent, cosine, 97.0, 0.0, -0.13, 0.14, cosine + 0.15, row.latent,
        cosine, float(0.85 + rng.normal(0, 0.03)),
    )  # fmt: skip


def _effects(row: Alignment, rng: np.random.Generator) -> list[Effect]:
    effects = []
    for condition, slope, cost in (
        ("feature", 0.9, 0.5),
        ("vector", 1.8, 0.7),
        ("random", 0.1, 0.4),
    ):
        strength = slope * (1 + rng.normal(0, 0.35))
        for dose in DOSES:
            delta, kl = strength * dose**0.8, cost * dose**2
            half = 0.15 + 0.3 * dose if condition == "random" else 0.12 * dose + 0.05
            latent = row.latent if condition == "feature" else -1
            figures = (dose, float(delta), float(delta - half), float(delta + half), kl, 40)
            effects.append(Effect(row.concept, row.verdict, condition, SITE, latent, *figures))
    return effects


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    return planted(load_concepts())


@pytest.fixture(scope="module")
def page(world: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("report") / "report.html", world)


def written(path: Path, world: dict[str, Any]) -> str:
    report(path, Results(**world))
    return path.read_text(encoding="utf-8")


def summary_of(world: dict[str, Any]) -> Summary:
    return summarise(Results(**world))


class Reader(HTMLParser):
    """Tags, ids, links and visible text of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids[value or ""] += 1
            if name in ("href", "src"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def interval_of(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval by scipy, independent of discovery.inference."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(np.mean(values)), float(low), float(high)


def three(values: list[float]) -> list[str]:
    return [f"{abs(x):.3f}" for x in interval_of(values)]


def numbers(text: str) -> list[str]:
    """Unsigned numbers in order, without those of names (PC1) and of the statistic (95 %)."""
    text = re.sub(r"PC\d|95 %|97\.5 %|chance 0\.5", "", text)
    return re.findall(r"\d+(?:\.\d+)?", text)


# ------------------------------------------------------------------------------------ the page


def test_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    pages = [
        written(tmp_path / f"{i}.html", planted(load_concepts()[:9], shift=shift, causal=2))
        for i, shift in enumerate((0.0, 0.0, 0.1))
    ]
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]


def test_page_needs_nothing_from_outside(page: str) -> None:
    reader = Reader(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(reader.tags)
    assert not [name for name in reader.attributes if name.startswith("on")]
    assert reader.links
    assert all(link.startswith("#") for link in reader.links)
    assert "http" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert max(reader.ids.values()) == 1
    assert {link[1:] for link in reader.links} <= set(reader.ids)


def test_every_concept_has_a_row_with_its_figures(world: dict[str, Any], page: str) -> None:
    rows = dict(re.findall(r'<tbody id="c-([^"]+)">(.*?)</tbody>', page, flags=re.S))
    assert set(rows) == {c.slug for c in world["concepts"]}
    slugs = {c.name: c.slug for c in world["concepts"]}
    baselines: dict[str, float] = {}
    for s in world["scores"]:
        if s.set == "confirmation" and s.method not in ("latent", "set"):
            baselines[s.concept] = max(baselines.get(s.concept, 0), s.auroc)
    for a in world["alignments"][::10]:
        text = Reader(rows[slugs[a.concept]]).text
        assert a.concept in text
        assert a.verdict in text
        assert f"feeling {a.concept}" in text
        assert f"{a.auroc:.2f} {a.auroc_low:.2f} to {a.auroc_high:.2f}" in text
        assert f"{a.set_auroc:.2f} {a.set_auroc_low:.2f} to {a.set_auroc_high:.2f}" in text
        assert f"{baselines[a.concept]:.2f}" in text
        assert ("also lexical" in text) == a.also_lexical


def test_facts_sites_controls_and_tables_are_shown(page: str) -> None:
    text = Reader(page).text
    for shown in (
        "demo_lm (8.6 M parameters)", "selection 2,052, confirmation 2,052, lexical 1,368",
        "variance explained 0.731", "0.668", "0.801", "chosen", "shuffled within topic",
    ):  # fmt: skip
        assert shown in text
    assert page.count("<figure") == 8


HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)> $\\frac{1$ {{ 7 * 7 }} & id="x"'


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    concepts = [
        replace(c, name=f"{c.name} {HOSTILE}", slug=f'{c.slug}"><script>', family=HOSTILE)
        for c in load_concepts()[:6]
    ]
    world = planted(concepts)
    world["facts"] = {"model": HOSTILE, HOSTILE: [HOSTILE], "table": {HOSTILE: {HOSTILE: HOSTILE}}}
    world["labels"] = [replace(n, name=HOSTILE, level=HOSTILE) for n in world["labels"]]
    world["controls"] = [*world["controls"], replace(world["controls"][1], labels=HOSTILE)]
    world["site_choices"] = [replace(s, site=s.site + HOSTILE) for s in world["site_choices"]]
    reader = Reader(written(tmp_path / "report.html", world))
    assert not {"script", "img"} & set(reader.tags)
    assert not [name for name in reader.attributes if name.startswith("on")]
    assert reader.text.count(HOSTILE) > 30
    assert all(link.startswith("#") for link in reader.links)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {"alignments": [replace(a, verdict="not found") for a in w["alignments"]]},
        lambda w: {"geometry": [], "concepts": [_without_norms(c) for c in w["concepts"]]},
        lambda _: {"effects": []},
        lambda w: {"effects": [e for e in w["effects"] if e.condition != "vector"]},
        lambda w: {"effects": [replace(e, dose=0.0) for e in w["effects"]], "differences": [],
                   "scores": [s for s in w["scores"] if s.set == "confirmation"]},
        lambda w: {name: [_without_numbers(row) for row in w[name]]
                   for name in ("alignments", "scores", "differences", "comparisons", "effects")},
        lambda w: {n: [] for n in w if n not in ("facts", "concepts", "alignments")},
    ],
    ids=["none-found", "no-norms", "no-effects", "no-vector-effects", "little", "nan",
         "alignments-only"],
)  # fmt: skip
def test_what_is_missing_is_left_out(
    change: Callable[[dict[str, Any]], dict[str, Any]], tmp_path: Path
) -> None:
    world = planted(load_concepts()[:6], causal=3)
    world |= change(world)
    reader = Reader(written(tmp_path / "report.html", world))
    assert "The 6 concepts" in reader.text
    assert not re.search(r"\bnan\b|\binf\b|None|undefined", reader.text)
    assert max(reader.ids.values()) == 1
    assert {link[1:] for link in reader.links} <= set(reader.ids)


def _without_numbers(row: Any) -> Any:
    values = {n: float("nan") if isinstance(v, float) else v for n, v in vars(row).items()}
    return type(row)(**values)


def _without_norms(concept: Concept) -> Concept:
    return replace(concept, valence=None, arousal=None, dominance=None, valence_vader=None)


@pytest.mark.parametrize("n", [1, 2])
def test_few_concepts(n: int, tmp_path: Path) -> None:
    text = Reader(written(tmp_path / "report.html", planted(load_concepts()[:n]))).text
    assert f"over {n} concept{'s' if n > 1 else ''}" in text
    assert "nan" not in numbers(text)


# ----------------------------------------------------------------- every number of the summary


def test_numbers_of_the_verdicts(world: dict[str, Any]) -> None:
    counts = Counter(a.verdict for a in world["alignments"])
    also = sum(a.also_lexical for a in world["alignments"] if a.verdict == "found")
    assert min(counts[v] for v in VERDICTS) > 0
    assert numbers(paragraphs(summary_of(world))[0]) == [
        "171", str(counts["found"]), str(counts["found as a set"]), "16",
        str(counts["found for the family"]), str(counts["lexical only"]),
        str(counts["not found"]), str(counts["found"]), str(also), "0",
    ]  # fmt: skip


def test_numbers_of_the_confirmation_set(world: dict[str, Any]) -> None:
    hard = {
        m: [s.auroc for s in world["scores"] if (s.set, s.method) == ("confirmation", m)]
        for m in CENTRES
    }
    expected = ["171"]
    for method in sorted(hard, key=lambda m: -np.mean(hard[m])):
        expected += (["16"] if method == "set" else []) + three(hard[method])
    expected += ["171", "0", "0"]
    for ours in ("latent", "set"):
        expected += ["16"] if ours == "set" else []
        parts: dict[int, list[str]] = {1: [], 0: [], -1: []}
        for baseline in ("vector", "probe", "embedding", "tfidf"):
            rows = [d for d in world["differences"] if (d.ours, d.baseline) == (ours, baseline)]
            (whole,) = [d for d in rows if not d.concept]
            rows = [d for d in rows if d.concept]
            mean, outcome = whole.difference, int(whole.low > 0) - int(whole.high < 0)
            counts = [str(sum(d.low > 0 for d in rows)), str(sum(d.high < 0 for d in rows))]
            parts[outcome] += ([f"{abs(mean):.3f}"] if outcome else []) + counts
        expected += parts[1] + parts[0] + parts[-1]
    text = paragraphs(summary_of(world))[1]
    assert numbers(text) == expected
    assert "Plainly: counting words recognises these concepts better than this SAE's" in text


def test_numbers_of_the_selection_set(world: dict[str, Any]) -> None:
    def mean(name: str, method: str) -> float:
        return float(
            np.mean([s.auroc for s in world["scores"] if (s.set, s.method) == (name, method)])
        )

    expected = []
    for method in CENTRES:
        expected += (["16"] if method == "set" else []) + [f"{mean('selection', method):.3f}"]
    expected.append(f"{mean('selection', 'tfidf') - mean('confirmation', 'tfidf'):.3f}")
    text = paragraphs(summary_of(world))[2]
    assert numbers(text) == expected
    assert "cross-fitted over its units" in text


def test_numbers_of_geometry_cosines_and_effects(world: dict[str, Any]) -> None:
    cosines = world["comparisons"]
    at = {
        name: [e.delta_logprob for e in world["effects"] if (e.condition, e.dose) == (name, 1.0)]
        for name in ("feature", "vector", "random")
    }
    top = {(e.concept, e.condition): e for e in world["effects"] if e.dose == 1.0}
    beyond = sum(
        e.low > top[concept, "random"].high
        for (concept, condition), e in top.items()
        if condition == "feature"
    )
    assert numbers(paragraphs(summary_of(world))[3]) == [
        "0.71", "0.50", "0.48", "0.34",
        f"{np.median([c.cosine for c in cosines]):.2f}",
        str(sum(c.cosine > c.null_high for c in cosines)), "171",
        "1.00", *(f"{abs(np.median(at[n])):.2f}" for n in ("feature", "vector", "random")),
        str(beyond), "24",
    ]  # fmt: skip


def test_equal_kl_is_read_where_all_three_conditions_reach(world: dict[str, Any]) -> None:
    causal = summary_of(world).causal
    assert causal
    read: dict[str, list[float]] = {"feature": [], "vector": [], "random": []}
    for concept in dict.fromkeys(e.concept for e in world["effects"]):
        curve = {n: [(0.0, 0.0)] for n in read}
        for e in world["effects"]:
            if e.concept == concept:
                curve[e.condition].append((e.kl, e.delta_logprob))
        level = min(max(k for k, _ in points) for points in curve.values())
        for name, points in curve.items():
            read[name].append(float(np.interp(level, *zip(*points, strict=True))))
    assert causal.equal_kl == pytest.approx(0.4)
    for name, values in read.items():
        assert causal.equal_effect[name] == pytest.approx(np.median(values))
    assert causal.equal_beyond_random == sum(
        f > r for f, r in zip(read["feature"], read["random"], strict=True)
    )


def test_a_curve_that_turns_back_is_read_at_its_first_crossing() -> None:
    def effect(dose: float, kl: float, delta: float) -> Effect:
        return Effect("calm", "found", "feature", SITE, 1, dose, delta, delta, delta, kl, 4)

    curve = [effect(0.5, 0.2, 1.0), effect(1.0, 0.6, 3.0), effect(2.0, 0.4, -1.0)]
    assert at_kl(curve, 0.1) == pytest.approx(0.5)
    assert at_kl(curve, 0.4) == pytest.approx(2.0)
    assert at_kl(curve, 0.7) is None


def test_the_closing_table_agrees_with_the_page(world: dict[str, Any], page: str) -> None:
    rows = dict(summary_rows(summary_of(world)))
    assert len(rows) == len(summary_rows(summary_of(world)))  # labels are unique
    text = page.replace("&#39;", "'")
    for label, value in rows.items():
        assert f'<th scope="row">{label}</th><td>{value}</td>' in text
    counts = Counter(a.verdict for a in world["alignments"])
    assert rows["found"] == str(counts["found"])
    assert rows["found as a set of 16 latents"] == str(counts["found as a set"])
    assert rows["the same five, labels shuffled within topic"] == "0 / 0 / 0 / 1 / 170"
    assert rows["r of PC1 with valence"] == "0.71, n = 108; embedding layer 0.50"


def test_whichever_wins_is_said_plainly(world: dict[str, Any]) -> None:
    def plain(gap: float) -> str:
        rows = [d for d in world["differences"] if (d.ours, d.baseline) == ("set", "tfidf")]
        rows = [replace(d, difference=gap, low=gap - 0.01, high=gap + 0.01) for d in rows]
        return paragraphs(summary_of({**world, "differences": rows}))[1].split("Plainly: ")[1]

    assert plain(0.05) == "the set of 16 latents carries more than word counts do."
    assert plain(0.0) == "the set of 16 latents does no better and no worse than counting words."
    assert plain(-0.05).endswith("better than the set of 16 latents does.")


def test_false_verdicts_under_shuffled_labels_are_owned_up_to(world: dict[str, Any]) -> None:
    shuffled = [Control(f"shuffled {i}", i, 2, 0, 0, 169 - i, 3) for i in range(2)]
    text = paragraphs(summary_of({**world, "controls": shuffled}))[0]
    assert "gives 5 such verdicts (found, set or family) in 2 runs: about 2.5 of those" in text
