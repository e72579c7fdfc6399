"""Names and confidence: bounds, monotone parts, and an honest name for every verdict."""

import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discovery.concepts import load_concepts
from discovery.records import Alignment, Context, PromotedToken, SetMember
from labeling.explain import (
    CEILINGS,
    NAMES,
    Claim,
    Parts,
    Role,
    claims,
    confidence,
    context_share,
    explain,
    is_word_of,
    labels,
    level,
)

SITE = "blocks.1.hook_resid_post"
CONCEPTS = load_concepts()
BY_NAME = {c.name: c for c in CONCEPTS}
SHARE = st.floats(0, 1)
ROLES = st.sampled_from(sorted(CEILINGS))


def alignment(concept: str, verdict: str, latent: int, **changed: Any) -> Alignment:
    passed = verdict in ("found", "found for the family")
    values: dict[str, Any] = {
        "concept": concept,
        "family": BY_NAME[concept].family,
        "verdict": verdict,
        "also_lexical": False,
        "site": SITE,
        "latent": latent,
        "firing": 0.1,
        "auroc_selection": 0.9,
        "auroc": 0.88 if passed else 0.6,
        "auroc_low": 0.5,
        "auroc_high": 0.95,
        "p": 1e-5,
        "q": 0.0021 if passed else 0.4,
        "specific_auroc": 0.7,
        "specific_p": 0.01,
        "specific_q": 0.02 if passed else None,
        "set_auroc_selection": 0.9,
        "set_auroc": 0.85,
        "set_auroc_low": 0.8,
        "set_auroc_high": 0.9,
        "set_p": 1e-4,
        "set_q": 0.0031,
        "set_specific_auroc": 0.7,
        "set_specific_p": 0.01,
        "set_specific_q": 0.03 if "found" in verdict and verdict != "not found" else None,
        "nearest": (),
        "lexical_latent": 900,
        "lexical_auroc": 0.93,
        "lexical_p": 0.001,
        "lexical_q": 0.01,
        "latent_lexical_p": 0.5,
        "detectable_auroc": 0.84,
    }
    plain = {str: "", int: 0, float: 0.5}
    others = {n: plain.get(kind) for n, kind in typing.get_type_hints(Alignment).items()}
    return Alignment(**{**others, **values, **changed})


def context(*concepts: str, kind: str = "confirmation") -> Context:
    return Context(SITE, 1, 1, "t", kind, concepts, "sea", 1.0, ("a",), (1.0,))


def raised(*tokens: str) -> list[PromotedToken]:
    return [PromotedToken(SITE, 1, 1, i, t, 2.0) for i, t in enumerate(tokens, 1)]


@given(ROLES, SHARE, SHARE, SHARE, SHARE)
def test_confidence_lies_between_0_and_its_ceiling(
    role: Role, a: float, b: float, c: float, d: float
) -> None:
    score = confidence(role, Parts(a, b, c, d))
    assert 0 <= score <= CEILINGS[role]
    assert confidence(role, Parts(1, 1, 1, 1)) == pytest.approx(CEILINGS[role])


@given(ROLES, st.lists(SHARE, min_size=4, max_size=4), st.integers(0, 3), SHARE)
def test_confidence_never_falls_when_a_part_rises(
    role: Role, parts: list[float], place: int, more: float
) -> None:
    better = list(parts)
    better[place] = max(parts[place], more)
    assert confidence(role, Parts(*better)) >= confidence(role, Parts(*parts))


@given(st.lists(SHARE, min_size=4, max_size=4))
def test_a_stronger_verdict_never_lowers_confidence(parts: list[float]) -> None:
    order = sorted(CEILINGS, key=lambda role: CEILINGS[role])
    scores = [confidence(role, Parts(*parts)) for role in order]
    assert scores == sorted(scores)


@given(SHARE, SHARE)
def test_levels_follow_the_score(a: float, b: float) -> None:
    order = ["none", "low", "medium", "high"]
    low, high = sorted([a, b])
    assert order.index(level(low)) <= order.index(level(high))
    assert (level(a) == "high") == (a >= 0.75)


def test_only_a_confirmed_latent_can_be_named_with_high_confidence() -> None:
    best = Parts(1, 1, 1, 1)
    assert {role for role in CEILINGS if level(confidence(role, best)) == "high"} == {
        "concept",
        "family",
    }
    assert level(confidence("concept", Parts(0.5, 0, 0, 0))) == "medium"
    assert level(confidence("candidate", Parts(0.6, 0.5, 1, 0.5))) == "none"


@pytest.mark.parametrize(
    ("verdict", "changed", "name"),
    [
        ("found", {}, "sad"),
        ("found for the family", {}, "Despair and Shame (family of sad)"),
        ("found for the family", {"specific_q": None}, "part of sad"),
        ("found as a set", {}, "part of sad"),
        ("found as a set", {"specific_q": 0.3}, "Despair and Shame (family of sad)"),
        ("lexical only", {}, "candidate for sad (not confirmed)"),
        ("not found", {}, "candidate for sad (not confirmed)"),
    ],
)
def test_each_verdict_gives_an_honest_name(
    verdict: str, changed: dict[str, Any], name: str
) -> None:
    rows = {"sad": alignment("sad", verdict, 1, **changed)}
    label = explain(SITE, 1, 0.1, claims(SITE, 1, rows, []), [], [], CONCEPTS)
    assert label.name == name
    assert label.concepts == ("sad",)
    assert label.reason.endswith("it raises no word of its family and fires in 10 % of the texts.")


def test_roles_of_a_latent_that_is_nobodys_best() -> None:
    rows = {
        "sad": alignment("sad", "found as a set", 7),
        "calm": alignment("calm", "not found", 8),
        "proud": alignment("proud", "lexical only", 9, lexical_latent=1),
    }
    members = [
        SetMember("sad", SITE, 2, 1, 0.4),
        SetMember("calm", SITE, 3, 1, 0.4),
        SetMember("sad", SITE, 4, 1, -0.4),
    ]
    found = claims(SITE, 1, rows, members)
    assert [(c.concept, c.role) for c in found] == [
        ("calm", "member"),
        ("proud", "word"),
        ("sad", "against"),
        ("sad", "piece"),
    ]
    assert not any(c.single for c in found)
    assert not claims("blocks.2.hook_resid_post", 7, rows, [])
    label = explain(SITE, 1, 0.1, found, [], [], CONCEPTS)
    assert (label.name, label.concepts) == ("the word “proud”", ())


def test_the_figures_are_in_the_reason() -> None:
    rows = {"sad": alignment("sad", "found", 1, also_lexical=True)}
    label = explain(
        SITE,
        1,
        0.25,
        claims(SITE, 1, rows, []),
        raised(" sadness", " the"),
        [context("sad"), context("calm")],
        CONCEPTS,
    )
    assert label.reason == (
        "Confirmed for sad on the confirmation set (AUROC 0.88, q = 0.002); it also fires on the "
        "bare word; top contexts score 0.50 for it (chance 0.10); it raises “sadness” and fires in "
        "25 % of the texts."
    )
    share = (0.5 - label_chance("sad")) / (1 - label_chance("sad"))
    expected = 0.4 + 0.25 * 0.76 + 0.2 * share + 0.1 + 0.05 * 0.75
    assert label.confidence == pytest.approx(expected)
    assert label.level == level(expected)


def label_chance(name: str) -> float:
    kin = sum(c.family == BY_NAME[name].family for c in CONCEPTS)
    return (1 + (kin - 1) / 2) / len(CONCEPTS)


def test_contexts_are_credited_by_concept_and_family() -> None:
    sad = BY_NAME["sad"]
    shown = [context("sad"), context("hurt"), context("happy"), context()]
    assert sad.family == BY_NAME["hurt"].family != BY_NAME["happy"].family
    assert context_share("concept", sad, shown, CONCEPTS) == (
        pytest.approx(1.5 / 4),
        pytest.approx(label_chance("sad")),
    )
    assert context_share("family", sad, shown, CONCEPTS)[0] == pytest.approx(2 / 4)
    several = [context("happy", "hurt", "sad"), context("happy", "hurt")]
    assert context_share("concept", sad, several, CONCEPTS)[0] == pytest.approx(1.5 / 2)
    mentions = [context("sad", kind="lexical")]
    assert context_share("concept", sad, mentions, CONCEPTS)[0] == 0
    assert context_share("word", sad, mentions, CONCEPTS)[0] == 1
    assert context_share("concept", sad, [], CONCEPTS)[0] == 0


@settings(max_examples=30)
@given(st.integers(0, 8), st.integers(0, 8), st.floats(0, 1), st.booleans())
def test_more_evidence_never_lowers_a_label(
    about: int, other: int, density: float, own: bool
) -> None:
    claim = [Claim("concept", "sad", 0.8, True, "Confirmed")]
    tokens = raised(" sad") if own else []

    def score(n: int, tokens: list[PromotedToken], density: float) -> float:
        shown = [context("sad")] * n + [context("happy")] * other
        return explain(SITE, 1, density, claim, tokens, shown, CONCEPTS).confidence

    assert score(about + 1, tokens, density) >= score(about, tokens, density)
    assert score(about, raised(" sad"), density) >= score(about, tokens, density)
    assert score(about, tokens, density / 2) >= score(about, tokens, density)


@pytest.mark.parametrize(
    ("token", "concept", "is_word"),
    [
        (" sad", "sad", True),
        ("Sadness", "sad", True),
        (" sa", "sad", False),
        (" happi", "happy", True),
        (" hap", "happy", False),
        (" happening", "happy", False),
        (" calm", "sad", False),
        (" ", "sad", False),
    ],
)
def test_words_of_a_concept(token: str, concept: str, is_word: bool) -> None:
    assert is_word_of(token, BY_NAME[concept]) == is_word


def test_lowered_tokens_are_no_evidence() -> None:
    claim = [Claim("concept", "sad", 0.8, True, "Confirmed")]
    lowered = [PromotedToken(SITE, 1, -1, 1, " sad", -2.0)]
    label = explain(SITE, 1, 0.1, claim, lowered, [], CONCEPTS)
    assert "no word of its family" in label.reason


def test_labels_group_the_evidence_of_each_latent() -> None:
    rows = [alignment("sad", "found", 1), alignment("calm", "not found", 2)]
    members = [SetMember("sad", SITE, 1, 3, 0.5)]
    made = labels(
        {(SITE, 3): 0.2, (SITE, 1): 0.1, (SITE, 5): 0.3},
        rows,
        members,
        raised(" sad"),
        [context("sad")],
        CONCEPTS,
    )
    assert [(f.latent, f.name, f.density) for f in made] == [
        (3, "in the set for sad", 0.2),
        (1, "sad", 0.1),
        (5, "unnamed", 0.3),
    ]
    assert made[1].confidence > made[0].confidence > made[2].confidence == 0
    assert "“sad”" in made[1].reason
    assert "“sad”" not in made[0].reason


def test_every_role_has_a_name() -> None:
    assert NAMES.keys() == CEILINGS.keys()
