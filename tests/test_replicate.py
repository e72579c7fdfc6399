"""One corpus only: cross-fitting with a null from the whole selection under shuffled labels."""

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csc_array, csr_array

from discovery import inference, ranks, replicate
from discovery.align import shuffled
from discovery.confirm import within_concepts
from discovery.labels import Labels, single
from discovery.replicate import crossfit, pooled_p, statistics
from discovery.selection import LabelledSet, fit_views
from saes.errors import UserError

VIEW = "blocks.3.hook_resid_post@mean"
N, LATENTS = 8, 60
NEAREST = {VIEW: np.array([[m for m in range(N) if m // 4 == c // 4 and m != c] for c in range(N)])}
NAMES = [f"c{c}" for c in range(N)]
FAMILIES = ["a"] * 4 + ["b"] * 4


def activations(concepts: np.ndarray, seed: int) -> csr_array:
    rng = np.random.default_rng(seed)
    x = rng.normal(-0.5, 1, (len(concepts), LATENTS)) + rng.normal(0, 0.5, (len(concepts), 1))
    x[:, 0] += 3.0 * concepts[:, 0]
    x[:, 1] += 2.5 * concepts[:, 1]
    x[:, 4] += 3.0 * concepts[:, 4:].any(1)  # for family b, and for none of its concepts
    return csr_array(np.maximum(x, 0))


@pytest.fixture(scope="module")
def texts() -> LabelledSet:
    """No topics and no writers; concepts of 10 to 45 texts, a tenth of the texts with two."""
    rng = np.random.default_rng(0)
    own = np.repeat(np.arange(N), np.arange(10, 50, 5))
    concepts = np.zeros((len(own), N), bool)
    concepts[np.arange(len(own)), own] = True
    concepts[np.arange(len(own)), rng.integers(0, N, len(own))] |= rng.random(len(own)) < 0.1
    labels = Labels(csr_array(concepts), np.zeros(len(own), np.int64), np.arange(len(own)))
    return LabelledSet({VIEW: activations(concepts, 3)}, labels)


@pytest.fixture(scope="module")
def topical() -> LabelledSet:
    """Twelve topics by six writers."""
    own, topics = np.tile(np.arange(N), 12), np.repeat(np.arange(12), N)
    return LabelledSet({VIEW: activations(np.eye(N)[own], 2)}, single(own, N, topics, topics // 2))


@pytest.fixture(scope="module")
def result(texts):
    return crossfit(texts, None, NEAREST, NAMES, FAMILIES, k=4, candidates=2, ks=(1, 4), draws=50)


def test_planted_concepts_are_found(result):
    for c in range(2):
        assert (result.alignments[c].verdict, result.alignments[c].latent) == ("found", c)
    for c in range(4, N):
        assert result.alignments[c].verdict in ("found for the family", "not found")
    assert {row.verdict for row in result.alignments[4:]} >= {"found for the family"}
    assert {row.verdict for row in result.alignments[2:4]} == {"not found"}


def test_figures_are_those_of_the_cross_fit(texts, result):
    fit = fit_views(texts, 4)[0]
    for c, row in enumerate(result.alignments):
        assert row.auroc == row.auroc_selection == pytest.approx(np.nanmean(fit.latent_aurocs[c]))
        assert row.set_auroc == pytest.approx(np.nanmean(fit.set_aurocs[c]))
        assert row.auroc_low <= row.auroc <= row.auroc_high
        assert row.delong_low <= row.auroc <= row.delong_high
        assert row.positives == texts.labels.counts[c]
        assert row.reverse_latent is row.neutral_auroc is row.lexical_latent is None
    assert {(p.k, p.set) for p in result.curve} == {(1, "selection"), (4, "selection")}
    assert len(result.candidates) == 2 * N
    assert np.isnan([row.confirmation_auroc for row in result.candidates]).all()
    assert len(result.cross) == N * N
    assert len(result.members) == 4 * N


def test_p_values_are_shares_of_the_null_of_all_concepts(texts, result):
    """Forty shuffles of eight concepts: the whole selection is run again on each."""
    rng, null = np.random.default_rng(0), []
    for _ in range(40):
        null.append(statistics(fit_views(shuffled(texts, rng), 4)[0], NEAREST[VIEW]).z)
    z = statistics(result.fit, NEAREST[VIEW]).z
    pool = np.array(null)[:, 1, 0].ravel()
    expected = [(1 + (pool >= value).sum()) / (1 + len(pool)) for value in z[1, 0]]
    assert [row.set_p for row in result.alignments] == pytest.approx(expected)
    p = np.array([(row.p, row.set_p) for row in result.alignments]).T
    q = np.array([(row.q, row.set_q) for row in result.alignments]).T
    np.testing.assert_allclose(q, within_concepts(p))
    assert min(expected) == 1 / 321


@pytest.mark.parametrize("name", ["texts", "topical"])
def test_statistics_are_aurocs_and_errors_of_plain_loops(name, request):
    labelled = request.getfixturevalue(name)
    fit = fit_views(labelled, 4)[0]
    got = statistics(fit, NEAREST[VIEW])
    dense, groups = labelled.labels.dense(), fit.labels.topics
    for kind, scores in enumerate((fit.latent_scores, fit.set_scores)):
        for c in range(N):
            near = dense[:, [c, *NEAREST[VIEW][c]]].any(1)
            for test, rows in enumerate((np.ones(len(dense), bool), near)):
                aurocs, variances = [], []
                for g in np.unique(groups):
                    inside = rows & (groups == g)
                    above, below = (scores[inside & (dense[:, c] == b), c] for b in (True, False))
                    m, n = len(above), len(below)
                    if m and n:
                        aurocs.append(stats.mannwhitneyu(above, below).statistic / (m * n))
                        variances.append((m + n + 1) / (12 * m * n))
                assert got.auroc[kind, test, c] == pytest.approx(np.mean(aurocs))
                error = np.sum(variances) ** 0.5 / len(aurocs)
                expected = (np.mean(aurocs) - 0.5) / error
                assert got.z[kind, test, c] == pytest.approx(expected)
    np.testing.assert_allclose(got.auroc[1, 0], np.nanmean(fit.set_aurocs, axis=1))


def test_pooled_p_counts_what_is_known():
    null = np.array([[0.0, 1.0], [2.0, np.nan]])
    p = pooled_p(np.array([1.0, np.nan]), null)
    assert p.tolist() == [3 / 4, 1.0]
    assert pooled_p(np.array([2.5, -1.0]), null).tolist() == [1 / 4, 1.0]


def noise(rng: np.random.Generator) -> LabelledSet:
    x = csr_array(np.maximum(rng.normal(-0.3, 1, (72, 40)) + rng.normal(0, 0.5, (72, 1)), 0))
    topics = np.repeat(np.arange(12), 6)
    return LabelledSet({VIEW: x}, single(np.tile(np.arange(6), 12), 6, topics, topics // 2))


@pytest.fixture(scope="module")
def null() -> np.ndarray:
    """Statistics of 60 runs of the selection on noise, each under other labels."""
    rng = np.random.default_rng(0)
    labelled = noise(rng)
    return np.array(
        [
            statistics(fit_views(shuffled(labelled, rng), 3)[0], NEAREST[VIEW][:6, :2] % 6).z
            for _ in range(60)
        ]
    )


def test_noise_yields_no_more_discoveries_than_the_false_discovery_rate_allows(null):
    """Each run in turn against the null of the others."""
    errors, p = 0, []
    for i, z in enumerate(null):
        p.append(pooled_p(z, np.delete(null, i, axis=0)))
        errors += inference.benjamini_hochberg(p[-1][:, 0].ravel()).min() <= 0.05
    assert errors <= stats.binom.ppf(0.999, len(null), 0.05)
    assert np.mean(np.array(p)[:, :, 0] <= 0.2) == pytest.approx(0.2, abs=0.01)


def test_an_analytic_p_value_of_a_cross_fit_would_be_caught(null):
    """Why the null is taken from shuffles: folds share texts, so cross-fitted AUROCs of noise vary
    more than those of independent texts, and a rank test of them finds what is not there."""
    z = null[:, 1, 0]
    assert np.std(z) > 1.15
    errors = [inference.benjamini_hochberg(stats.norm.sf(run)).min() <= 0.05 for run in z]
    assert sum(errors) > stats.binom.ppf(0.999, len(errors), 0.05)


def test_noise_is_not_found():
    nearest, names = {VIEW: NEAREST[VIEW][:6, :2] % 6}, NAMES[:6]
    mixed = shuffled(noise(np.random.default_rng(1)), np.random.default_rng(2))
    result = crossfit(mixed, None, nearest, names, names, k=3, verdicts_only=True)
    assert {row.verdict for row in result.alignments} == {"not found"}
    assert result.rejected == 0


def test_one_corpus_is_refused_with_too_few_shuffles_or_texts(texts):
    def run(labelled: LabelledSet = texts, **other: object) -> None:
        crossfit(labelled, None, NEAREST, NAMES, FAMILIES, k=4, verdicts_only=True, **other)

    with pytest.raises(UserError, match=r"shuffles is 39.* take at least 40"):
        run(shuffles=39)
    with pytest.raises(UserError, match=r"shuffles is 60.* take at least 200"):
        run(shuffles=60, q=0.01)
    one_unit = texts.labels._replace(units=np.zeros_like(texts.labels.units))
    with pytest.raises(UserError, match="share one unit"):
        run(texts.relabelled(one_unit))


def test_progress_counts_shuffles(topical):
    seen = []
    crossfit(topical, None, NEAREST, NAMES, FAMILIES, k=2, verdicts_only=True, progress=seen.append)
    assert seen == [1] * 40


def test_groups_hold_the_texts_they_are_given(topical):
    labels = topical.labels
    rows = [np.arange(len(labels.topics))] * N
    groups = replicate._Groups.of(labels, csc_array(labels.concepts), rows)
    scores = np.random.default_rng(0).integers(0, 4, (96, N)).astype(np.float64)  # many ties
    expected = ranks.aurocs_by_group(scores, labels).mean(1)
    np.testing.assert_allclose(groups.aurocs(scores)[0], expected)
