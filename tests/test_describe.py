"""Figures beside the verdicts, and the protocol on a flat corpus of several labels a text."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from discovery import align as protocol
from discovery import describe, inference
from discovery.align import align, detectable
from discovery.labels import Labels, single
from discovery.selection import LabelledSet, best_latents, choose, score

VIEW = "blocks.3.hook_resid_post@mean"
N, LATENTS, TEXTS = 6, 40, 160
SHIFTS = (3.0, 2.0, 1.5, 0.0, 0.0, 0.0)
NEAREST = {VIEW: (np.arange(N)[:, None] + np.arange(1, 4)) % N}
NAMES = [f"c{c}" for c in range(N)]
FAMILIES = ["a", "a", "a", "b", "b", "alone"]


def texts(seed: int) -> LabelledSet:
    """No topics and no writers; a fifth of the texts have two concepts, some have none."""
    rng = np.random.default_rng(seed)
    concepts = np.zeros((TEXTS, N), bool)
    concepts[np.arange(TEXTS), rng.integers(0, N, TEXTS)] = rng.random(TEXTS) < 0.9
    concepts[np.arange(TEXTS), rng.integers(0, N, TEXTS)] |= rng.random(TEXTS) < 0.2
    x = rng.normal(-0.5, 1, (TEXTS, LATENTS))
    x[:, :N] += concepts * np.array(SHIFTS)
    labels = Labels(csr_array(concepts), np.zeros(TEXTS, np.int64), np.arange(TEXTS))
    return LabelledSet({VIEW: csr_array(np.maximum(x, 0))}, labels)


@pytest.fixture(scope="module")
def world() -> dict:
    neutral = np.maximum(np.random.default_rng(2).normal(-0.5, 1, (50, LATENTS)), 0)
    return {
        "selection": texts(0),
        "confirmation": texts(1),
        "lexical": None,
        "neutral": {VIEW: csr_array(neutral)},
        "nearest": NEAREST,
        "concepts": NAMES,
        "families": FAMILIES,
    }


@pytest.fixture(scope="module")
def result(world):
    return align(**world, k=3, candidates=4, ks=(1, 3, 10, 41), draws=200)


def test_planted_concepts_are_found_in_a_flat_corpus_of_several_labels(result):
    for c in range(2):
        assert (result.alignments[c].verdict, result.alignments[c].latent) == ("found", c)
    assert "found" not in {row.verdict for row in result.alignments[3:]}


def test_verdicts_do_not_need_what_stands_beside_them(world, result):
    alone = align(**world, k=3, verdicts_only=True)
    assert (alone.candidates, alone.cross, alone.curve) == ([], [], [])
    for row, expected in zip(alone.alignments, result.alignments, strict=True):
        for name in ("verdict", "latent", "p", "q", "specific_q", "auroc_low", "set_p", "set_q"):
            assert getattr(row, name) == getattr(expected, name)
        assert np.isnan([row.auroc_pooled, row.delong_low, row.set_bootstrap_high]).all()
        assert row.reverse_latent is row.family_auroc is row.neutral_auroc is None


def test_figures_beside_a_verdict_are_those_of_references(world, result):
    confirmation, neutral = world["confirmation"], world["neutral"][VIEW].toarray()
    x, dense = confirmation.latents[VIEW].toarray(), confirmation.labels.dense()
    for c, row in enumerate(result.alignments):
        own, positive = x[:, row.latent], dense[:, c]
        assert row.auroc == pytest.approx(roc_auc_score(positive, own))
        assert row.auroc_pooled == pytest.approx(row.auroc)
        assert row.positives == positive.sum()
        assert row.firing == pytest.approx((own != 0).mean())
        assert row.auroc_low <= row.auroc <= row.auroc_high
        delong = inference.delong_interval(own, positive, confirmation.labels.topics)
        assert (row.delong_low, row.delong_high) == delong[1:]
        assert row.bootstrap_low < row.auroc < row.bootstrap_high
        both = np.concatenate([own[positive], neutral[:, row.latent]])
        truth = np.repeat([True, False], [positive.sum(), 50])
        assert row.neutral_auroc == pytest.approx(roc_auc_score(truth, both))
        family = [i for i, name in enumerate(FAMILIES) if name == FAMILIES[c]]
        if len(family) == 1:
            assert row.family_auroc is None
        else:
            rows = dense[:, family].any(1)
            assert row.family_auroc == pytest.approx(roc_auc_score(positive[rows], own[rows]))


def test_the_reverse_run_chooses_on_the_confirmation_set(world, result):
    chosen = choose(world["confirmation"], VIEW, 3)
    x, dense = world["selection"].latents[VIEW], world["selection"].labels.dense()
    singles, sets = score(chosen, x)
    for c, row in enumerate(result.alignments):
        assert row.reverse_latent == chosen.latent[c]
        assert row.reverse_auroc == pytest.approx(roc_auc_score(dense[:, c], singles[:, c]))
        assert row.reverse_set_auroc == pytest.approx(roc_auc_score(dense[:, c], sets[:, c]))
    assert result.alignments[0].reverse_q < 0.05 < result.alignments[4].reverse_q


def test_candidates_are_in_the_order_of_the_selection(world, result):
    best = best_latents(world["selection"], VIEW, 4)
    x = {name: world[name].latents[VIEW].toarray() for name in ("selection", "confirmation")}
    dense = {name: world[name].labels.dense() for name in x}
    assert len(result.candidates) == 4 * N
    for i, row in enumerate(result.candidates):
        c, rank = divmod(i, 4)
        assert (row.concept, row.site, row.rank) == (NAMES[c], VIEW.split("@")[0], rank + 1)
        assert row.latent == best[c, rank]
        aurocs = [roc_auc_score(dense[n][:, c], x[n][:, row.latent]) for n in x]
        assert [row.auroc, row.confirmation_auroc] == pytest.approx(aurocs)
        assert row.auroc_pooled == pytest.approx(row.auroc)
    assert [row.latent for row in result.candidates[::4]] == [a.latent for a in result.alignments]


def test_cross_is_each_chosen_latent_on_each_concept(world, result):
    x, dense = (getattr(world["confirmation"], n) for n in ("latents", "labels"))
    x, dense = x[VIEW].toarray(), dense.dense()
    assert [(r.concept, r.other) for r in result.cross] == [(a, b) for a in NAMES for b in NAMES]
    for i, row in enumerate(result.cross):
        c, other = divmod(i, N)
        expected = roc_auc_score(dense[:, other], x[:, result.alignments[c].latent])
        assert row.auroc == pytest.approx(expected)


def test_the_curve_holds_the_sizes_that_fit_on_both_sets(result):
    assert [(p.k, p.set) for p in result.curve] == [
        (k, name) for k in (1, 3, 10) for name in ("selection", "confirmation")
    ]
    at_k = {(p.k, p.set): p for p in result.curve}
    for name, rows in (
        ("selection", [np.nanmean(result.fit.set_aurocs[c]) for c in range(N)]),
        ("confirmation", [row.set_auroc for row in result.alignments]),
    ):
        point = at_k[3, name]
        assert point.auroc == pytest.approx(np.mean(rows))
        assert point.low < point.auroc < point.high


def test_auroc_counts_ties_half():
    assert describe.auroc(np.array([1.0, 2.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx(4 / 6)


def test_no_neutral_texts_and_no_rivals_in_the_family_are_none(world):
    one_each = [f"f{c}" for c in range(N)]
    other = {"neutral": None, "families": one_each}
    result = align(**world | other, k=3, candidates=1, ks=(1,), draws=20)
    for row in result.alignments:
        assert row.family_auroc is row.set_family_auroc is None
        assert row.neutral_auroc is row.set_neutral_auroc is None


def test_a_concept_that_shares_all_texts_with_its_nearest_is_not_specific(world):
    """Nothing tells the two apart, so step 6 cannot pass, and nothing crashes."""
    twins = np.array([1, 0, 2, 3, 4, 5])
    sets = {}
    for name in ("selection", "confirmation"):
        dense = world[name].labels.dense()
        dense[:, 1] = dense[:, 0]
        labels = world[name].labels._replace(concepts=csr_array(dense))
        sets[name] = world[name].relabelled(labels)
    near = {VIEW: np.where(np.arange(N) < 2, twins, 5 - twins)[:, None]}
    result = align(**world | sets | {"nearest": near}, k=3, verdicts_only=True)
    for row in result.alignments[:2]:
        assert row.verdict == "found for the family"
        assert (row.specific_auroc, row.specific_p) == (0.5, 1.0)


def test_detectable_auroc_is_exact_for_one_text_a_topic_and_else_approximate():
    topics = np.repeat(np.arange(12), 30)
    packaged = single(np.tile(np.arange(30), 12), 30, topics, topics)
    exact = detectable(packaged, 0.01)
    assert set(exact) == {inference.detectable_auroc(12, 30, 0.01)}
    approximate = protocol._detectable(12, 348, 0.01)
    assert approximate == pytest.approx(exact[0], abs=0.03)
    flat = packaged._replace(topics=np.zeros_like(topics))
    assert detectable(flat, 0.01)[0] == approximate
    assert inference.needed_positives(approximate + 1e-4, 348, 0.01) == 12


def test_detectable_auroc_is_unknown_where_a_perfect_score_would_not_do():
    labels = single(np.array([0, 1, -1, -1]), 2, np.zeros(4, np.int64), np.arange(4))
    assert np.isnan(detectable(labels, 1e-4)).all()
