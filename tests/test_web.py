"""The pages: all of them answer, hostile text stays text, and a real browser can use them."""

import re
import threading
import time
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from discovery.concepts import Concept, load_concepts
from discovery.records import (
    VERDICTS,
    Alignment,
    Candidate,
    Comparison,
    Context,
    Control,
    Cross,
    Effect,
    Label,
    OutputScore,
    PromotedToken,
    Sae,
    Score,
    SetMember,
    TextSet,
    Vector,
)
from labeling.catalog import FILE, build
from labeling.results import Results
from labeling.web import charts, sentences
from labeling.web.app import create_app
from labeling.web.serve import listen

if TYPE_CHECKING:
    from playwright.sync_api import Page

SITE = "blocks.1.hook_resid_post"
HOSTILE = """<script>alert("x")</script>'"><img src=x onerror=alert(1)>{{ 7*7 }}"""
NAMES = ("sad", "calm", "at ease", "proud", "happy")


def row(record: type, **values: Any) -> Any:
    """A record with these values, and plain ones elsewhere."""
    plain = {str: "", int: 0, float: 0.5, bool: False}
    filled = {
        name: values.get(name, plain.get(kind, () if typing.get_origin(kind) is tuple else None))
        for name, kind in typing.get_type_hints(record).items()
    }
    return record(**filled)


def concepts() -> list[Concept]:
    named = {c.name: c for c in load_concepts()}
    return [named[name] for name in NAMES]


def results() -> Results:
    """Five concepts, one for each verdict; the first was clamped."""
    alignments = [
        row(
            Alignment,
            concept=c.name,
            family=c.family,
            verdict=verdict,
            site=SITE,
            latent=i,
            auroc=0.9 - i / 20,
            auroc_low=0.8 - i / 20,
            auroc_high=0.95,
            p=1e-6,
            q=0.0004,
            specific_q=0.02 if verdict.startswith("found") else None,
            set_auroc=0.91,
            set_q=0.0004,
            set_specific_q=0.02,
            detectable_auroc=0.84,
            lexical_latent=7,
            nearest=("calm", "happy"),
        )
        for i, (c, verdict) in enumerate(zip(concepts(), VERDICTS, strict=True))
    ]
    tokens = ("Once", " she", " wept", ".")
    return Results(
        facts={"model": "tiny", "seed": "0"},
        concepts=concepts(),
        alignments=alignments,
        members=[
            row(SetMember, concept="sad", site=SITE, latent=0, rank=1, weight=0.5),
            row(SetMember, concept="sad", site=SITE, latent=7, rank=2, weight=-0.25),
        ],
        scores=[
            row(Score, concept="sad", method=m, set=s, auroc=0.8, low=0.7, high=0.9)
            for m in ("tfidf", "untrained set", "latent", "probe")
            for s in ("confirmation", "selection", "situations")
        ],
        sets=[row(TextSet, set="confirmation", source="mine", language="fr", texts=1234, topics=9)],
        candidates=[
            row(
                Candidate, concept="sad", site=SITE, rank=1, latent=7, auroc=0.87, firing_ratio=2.25
            ),
            row(Candidate, concept="sad", site=SITE, rank=2, latent=9, auroc=0.83),
        ],
        outputs=[
            row(
                OutputScore,
                concept="sad",
                site=SITE,
                latent=7,
                word_score=-0.75,
                word_rank=3,
                word_p=0.031,
            )
        ],
        cross=[row(Cross, concept="sad", other=o, auroc=0.3 + i / 10) for i, o in enumerate(NAMES)],
        controls=[row(Control, labels="true", found=1), row(Control, labels="shuffled 1")],
        vectors=[row(Vector, concept="sad", site=SITE)],
        comparisons=[
            row(Comparison, concept="sad", site=SITE, cosine=0.4, null_low=-0.1, null_high=0.1)
        ],
        effects=[
            row(Effect, concept="sad", condition=c, site=SITE, latent=latent, dose=dose, low=-0.25)
            for c, latent in (("feature", 0), ("vector", -1), ("random", -1))
            for dose in (0.1, 0.2, 0.4)
        ],
        labels=[
            row(Label, site=SITE, latent=0, name="sad", level="high", confidence=0.83),
            row(Label, site=SITE, latent=7, name="in the set for sad", level="none"),
        ],
        promoted=[
            row(PromotedToken, site=SITE, latent=0, sign=1, rank=1, token=" grief", logit=3.5),
            row(PromotedToken, site=SITE, latent=0, sign=-1, rank=1, token=" cheer", logit=-2.5),
        ],
        contexts=[
            Context(
                SITE,
                0,
                1,
                "t",
                "confirmation",
                ("sad", "calm"),
                "sea",
                2.0,
                tokens,
                (0.0, 0.5, 2.0, 0.0),
            )
        ],
        saes=[row(Sae, site=SITE, latents=4096, source="a/b", neuronpedia="gpt2-small/1-res-jb")],
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    build(tmp_path / FILE, results())
    return tmp_path


@pytest.fixture
def client(run: Path) -> TestClient:
    return TestClient(create_app(run / FILE), base_url="http://127.0.0.1:8171")


def test_the_list_shows_every_concept_its_verdict_and_the_control(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    for name, verdict in zip(NAMES, VERDICTS, strict=True):
        assert f">{name}</a>" in page.text
        assert f">{verdict}</span>" in page.text
    assert "5 emotion concepts" in page.text
    assert "gives 0 found, 0 found as a set" in page.text
    assert "0.90" in page.text


def rows_of(client: TestClient, query: str) -> list[str]:
    page = client.get(f"/?{query}")
    assert page.status_code == 200
    return [name for name in NAMES if f">{name}</a>" in page.text]


def test_the_list_is_filtered_and_sorted_without_a_script(client: TestClient) -> None:
    assert rows_of(client, "verdict=not+found") == ["happy"]
    assert rows_of(client, "family=Peaceful+Contentment") == ["calm", "at ease"]
    assert rows_of(client, "q=sadness") == ["sad"]
    assert rows_of(client, "q=zzz") == []
    text = client.get("/?sort=auroc&reverse=true").text
    assert text.index(">happy</a>") < text.index(">sad</a>")
    assert rows_of(client, "sort=no-such-column") == list(NAMES)


def test_the_page_of_a_concept(client: TestClient) -> None:
    page = client.get("/concept/sad")
    assert page.status_code == 200
    text = page.text
    assert "One latent, chosen on the selection set, recognises sad in the confirmation set" in text
    assert text.index("best single latent") < text.index("dense probe") < text.index("TF-IDF")
    assert f'href="/feature/{SITE}/0"' in text
    assert "−0.25" in text  # the weight of the second member
    assert "cosine of 0.40 with the contrastive vector of the confirmation set, above" in text
    assert text.count("contrastive vector, equal norm") == 1
    assert 'href="/concept/happy"' in text
    assert client.get("/concept/at-ease").status_code == 200  # nothing but a verdict


def test_the_page_of_a_concept_shows_controls_and_both_sides(client: TestClient) -> None:
    text = client.get("/concept/sad").text
    assert text.index("TF-IDF") < text.index("set of an untrained SAE")
    assert text.count('class="dotrow control"') == 1
    rows = re.findall(r"<tr>(.*?)</tr>", text.split("<h2>Candidates</h2>")[1], flags=re.S)[1:3]
    raised, other = (re.findall(r'<td class="n">\s*(.*?)\s*</td>', r, flags=re.S) for r in rows)
    assert raised[2] == "0.87"
    assert raised[7] == "2.2"
    assert raised[-3:] == ["−0.75", "0.031", "3"]
    assert other[-4:] == ["–"] * 4
    assert f'href="/feature/{SITE}/7"' in raised[1]
    assert "href" not in other[1]  # the catalog has no page of it
    chips = text.split("What else its latent recognises")[1]
    assert chips.index(">happy ") < chips.index(">proud ") < chips.index(">calm ")
    assert "bootstrap over units" in text
    assert "chosen on the confirmation set, tested on the selection set" in text


def test_texts_are_shown_and_their_topics_heeded(client: TestClient, tmp_path: Path) -> None:
    page = client.get("/").text
    assert '<td>mine</td><td>fr</td><td class="n">1,234</td>' in page
    assert "AUROC within topics on the confirmation set" in page
    made = results()
    flat = replace(
        made,
        sets=[replace(made.sets[0], set="selection", topics=1)],
        alignments=[replace(a, lexical_latent=None, lexical_auroc=None) for a in made.alignments],
    )
    build(tmp_path / FILE, flat)
    other = TestClient(create_app(tmp_path / FILE), base_url="http://127.0.0.1")
    page = other.get("/").text
    assert "AUROC on the folds left out, with a 95 % interval by DeLong" in page
    assert "shuffled, run once" in page
    page = other.get("/concept/sad").text
    assert "chosen on the other folds, recognises sad in the folds left out" in page
    assert "ithin topic" not in page
    assert page.count("no lexical control was run") == 1
    assert "No lexical control was run." in page


def test_what_one_text_cannot_tell_is_not_drawn(tmp_path: Path) -> None:
    plain, nan = results(), float("nan")
    sad = replace(plain.concepts[0], definition="low <spirits>", prompts=("After the funeral",))
    found = replace(
        plain,
        concepts=[sad, *plain.concepts[1:]],
        scores=[replace(s, auroc=nan, low=nan, high=nan) if s.method == "probe" else
                replace(s, low=nan, high=nan) for s in plain.scores],
        vectors=[replace(v, reliability=nan, ceiling=nan) for v in plain.vectors],
        comparisons=[replace(c, ceiling=nan) for c in plain.comparisons],
        sets=[replace(s, set="selection") for s in plain.sets],
    )  # fmt: skip
    build(tmp_path / FILE, found)
    client = TestClient(create_app(tmp_path / FILE), base_url="http://127.0.0.1:8171")
    page = client.get("/concept/sad").text
    assert "low &lt;spirits&gt;" in page
    assert "After the funeral" in page
    assert "dense probe" not in page
    assert 'class="ceiling"' not in page
    assert "too few for the vector&#39;s reliability" in page
    assert "too few texts for a reliability" in page
    assert "contrastive vector of the same texts" in page  # one corpus only
    assert not re.search(r"\bnan\b", page)


def test_the_page_of_a_feature(client: TestClient) -> None:
    page = client.get(f"/feature/{SITE}/0")
    assert page.status_code == 200
    text = page.text
    assert "high confidence" in text
    assert "not a probability" in text
    assert ">·</span>grief</code>" in text
    assert text.index("·</span>grief") < text.index("·</span>cheer")
    assert '<span>Once</span><span class="h3" data-a="0.50"> she</span>' in text
    assert '<span class="h10 top" data-a="2.00"> wept</span><span>.</span>' in text
    assert '<a href="/concept/sad">sad</a>, <a href="/concept/calm">calm</a>' in text
    assert "random features, equal norm" in text
    assert "Latent 0 of the 4,096 of <code>a/b</code>" in text
    assert 'href="https://www.neuronpedia.org/gpt2-small/1-res-jb/0"' in text
    assert "member of its set" in client.get(f"/feature/{SITE}/7").text


def test_a_feature_of_an_sae_that_is_not_on_neuronpedia_has_no_link_there(tmp_path: Path) -> None:
    saes = [replace(results().saes[0], neuronpedia=None)]
    build(tmp_path / FILE, replace(results(), saes=saes))
    page = TestClient(create_app(tmp_path / FILE), base_url="http://127.0.0.1:8171")
    text = page.get(f"/feature/{SITE}/0").text
    assert "<code>a/b</code>" in text
    assert "neuronpedia" not in text


def test_search_leads_to_pages(client: TestClient) -> None:
    hits = client.get("/search?q=grief").text
    assert f'href="/feature/{SITE}/0"' in hits
    assert client.get("/search?q=sad", follow_redirects=False).headers["location"] == "/concept/sad"
    assert "Nothing has every one" in client.get("/search?q=zzzz").text
    assert client.get("/search").status_code == 200


@pytest.mark.parametrize(
    "address",
    ["/nope", "/concept/nope", f"/feature/{SITE}/99", f"/feature/{SITE}/x", "/report", "/docs"],
)
def test_an_unknown_address_says_so_in_a_page(client: TestClient, address: str) -> None:
    page = client.get(address)
    assert page.status_code == 404
    assert "Nothing at this address" in page.text
    assert "All concepts" in page.text


def test_nothing_can_be_written(client: TestClient) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert client.request(method, "/").status_code == 405


def test_the_report_is_served_with_a_policy_of_its_own(run: Path) -> None:
    (run / "report").mkdir()
    report = run / "report" / "report.html"
    report.write_text("<h1>A report</h1>")
    client = TestClient(create_app(run / FILE, report), base_url="http://localhost")
    page = client.get("/report")
    assert page.text == "<h1>A report</h1>"
    assert "script" not in page.headers["content-security-policy"]
    assert 'href="/report"' in client.get("/").text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    made = results()
    hostile = replace(
        made,
        facts={"model": HOSTILE, HOSTILE: HOSTILE},
        concepts=[
            replace(c, inflections=(*c.inflections, HOSTILE), antonym=HOSTILE)
            for c in made.concepts
        ],
        labels=[replace(f, name=HOSTILE, reason=HOSTILE, level=HOSTILE) for f in made.labels],
        promoted=[replace(p, token=HOSTILE) for p in made.promoted],
        contexts=[
            replace(c, tokens=(HOSTILE,) * 4, concepts=(HOSTILE,), topic=HOSTILE)
            for c in made.contexts
        ],
        scores=[replace(s, method=HOSTILE, set=HOSTILE) for s in made.scores],
        saes=[replace(s, source=HOSTILE, neuronpedia=HOSTILE) for s in made.saes],
        sets=[replace(t, set=HOSTILE, source=HOSTILE, language=HOSTILE) for t in made.sets],
    )
    build(tmp_path / FILE, hostile)
    client = TestClient(create_app(tmp_path / FILE), base_url="http://127.0.0.1")
    for address in ("/", "/concept/sad", f"/feature/{SITE}/0", "/search", "/nope"):
        page = client.get(address, params={"q": HOSTILE})
        assert "&lt;script&gt;" in page.text, address
        assert "<script>" not in page.text, address
        assert "<img src=x" not in page.text, address
        assert "49" not in page.text.replace("0.49", ""), address  # no template ran


def test_every_answer_forbids_foreign_content(client: TestClient) -> None:
    for address in ("/", "/nope", "/static/style.css"):
        headers = client.get(address).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_pages_hold_nothing_that_the_policy_would_block(client: TestClient) -> None:
    for address in ("/", "/concept/sad", f"/feature/{SITE}/0", "/search?q=grief"):
        text = client.get(address).text
        assert " style=" not in text
        assert " on" + "click" not in text
        assert "https://" not in text.replace('<a href="https://www.neuronpedia.org/', "")
        assert "<style" not in text


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_other_host_names_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8171", "127.0.0.1:1", "[::1]:8171"])
def test_loopback_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("specific", [0.02, None])
def test_each_verdict_is_told_with_the_figures_that_decided_it(
    verdict: str, specific: float | None
) -> None:
    made = row(
        Alignment,
        concept="sad",
        verdict=verdict,
        auroc=0.71,
        set_auroc=0.72,
        lexical_auroc=0.73,
        detectable_auroc=0.84,
        specific_q=specific,
    )
    text = sentences.verdict_sentence(made, 16)
    decisive = {"lexical only": "0.73", "not found": "0.84", "found": "0.71"}
    if verdict == "found for the family":
        assert ("0.71" in text) == (specific is not None)
    else:
        assert decisive.get(verdict, "0.72") in text
    assert text.endswith(".")
    assert "bare mention" not in text
    if verdict == "found":
        flagged = sentences.verdict_sentence(replace(made, also_lexical=True))
        assert "bare mention" in flagged


@given(st.floats(-5, 5), st.floats(0.01, 10), st.floats(-20, 20), st.floats(-20, 20))
def test_scales_stay_inside_and_keep_order(low: float, span: float, a: float, b: float) -> None:
    scale = charts.Scale(low, low + span)
    assert 0 <= scale.share(a) <= 1
    assert (scale.share(a) - scale.share(b)) * (a - b) >= 0
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-6 <= t <= low + span + 1e-6 for t in ticks)


@given(st.lists(st.floats(-10, 10)), st.floats(0, 10))
def test_heat_grows_with_activation_and_is_0_only_where_silent(
    activations: list[float], peak: float
) -> None:
    shades = [charts.heat(a, peak) for a in sorted(activations)]
    assert shades == sorted(shades)
    if peak > 0:
        assert all((charts.heat(a, peak) > 0) == (a > 0) for a in activations)


@given(st.lists(st.floats(allow_nan=True), max_size=5))
def test_a_scale_around_values_holds_them(values: list[float]) -> None:
    scale = charts.around(v for v in values if not abs(v) > 1e6)
    assert scale.low <= 0 < scale.high
    assert all(scale.low <= v <= scale.high for v in values if abs(v) <= 1e6)


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    """A real server on a free port."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(run / FILE), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def test_a_browser_filters_sorts_and_follows_to_a_heat_map(
    address: str, browser_page: "Page"
) -> None:
    page = browser_page
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(address)
    names = page.locator("tbody th:visible")
    assert names.all_inner_texts() == list(NAMES)
    page.get_by_role("link", name="Concept", exact=True).click()
    assert names.all_inner_texts() == sorted(NAMES)
    page.get_by_role("link", name="Concept", exact=True).click()
    assert names.all_inner_texts() == sorted(NAMES, reverse=True)
    page.get_by_label("Find").fill("sorrow")
    page.get_by_label("Find").fill("sad")
    assert names.all_inner_texts() == ["sad"]
    assert page.locator("[data-count]").inner_text() == "1 of 5"
    page.get_by_label("Verdict").select_option("not found")
    assert names.count() == 0
    assert page.locator("[data-empty]").is_visible()
    page.get_by_label("Verdict").select_option("found")
    page.get_by_role("link", name="sad", exact=True).click()
    assert page.locator("h1").inner_text().startswith("sad")
    page.locator(".stats a.feature").click()
    hot = page.locator(".heatmap .top")
    assert hot.inner_text().strip() == "wept"
    shade = hot.evaluate("e => getComputedStyle(e).backgroundColor")
    faint = page.locator(".heatmap .h3").evaluate("e => getComputedStyle(e).backgroundColor")
    assert shade != faint
    hot.hover()
    shown = hot.evaluate("e => getComputedStyle(e, '::after').content")
    assert shown == '"2.00"'
    page.set_viewport_size({"width": 360, "height": 800})
    for path in ("/", "/concept/sad", f"/feature/{SITE}/0"):
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
    assert complaints == []
