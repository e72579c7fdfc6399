"""Scores of all pairs against scikit-learn, scipy and brute force; the same bytes however cut."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import csr_array
from sklearn.metrics import mutual_info_score, roc_auc_score

from discovery import inference, ranks, scores
from discovery.labels import Labels


def world(
    seed: int, n: int = 60, n_features: int = 8, n_concepts: int = 5, n_topics: int = 3
) -> tuple[csr_array, Labels]:
    """Sparse activations with ties and negative values; none, one or several concepts a text."""
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(1, 1, (n, n_features)), 1) * (rng.random((n, n_features)) < 0.4)
    concepts = csr_array(rng.random((n, n_concepts)) < 0.3)
    return csr_array(x.astype(np.float32)), Labels(
        concepts, rng.integers(0, n_topics, n), np.arange(n)
    )


def pairs(x: csr_array, labels: Labels):
    """Every feature's values with every concept's positives, and where the pair is scored."""
    dense = x.toarray().astype(np.float64)
    for f, c in itertools.product(range(x.shape[1]), range(labels.n_concepts)):
        yield (f, c), dense[:, f], labels.of(c)


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), n_topics=st.sampled_from([1, 3]))
def test_every_score_is_that_of_its_definition(seed, n_topics):
    x, labels = world(seed, n_topics=n_topics)
    got = scores.score_pairs(x, labels, workers=1)
    np.testing.assert_allclose(got.auroc, ranks.within_group_auroc(x, labels), rtol=0, atol=1e-12)
    for at, values, own in pairs(x, labels):
        m, n = own.sum(), (~own).sum()
        assert got.auroc_pooled[at] == pytest.approx(roc_auc_score(own, values), abs=1e-12)
        difference = values[own].mean() - values[~own].mean()
        assert got.mean_difference[at] == pytest.approx(difference, abs=1e-12)
        squares = values[own].var() * m + values[~own].var() * n
        d = difference / np.sqrt(squares / (m + n - 2))
        assert got.cohens_d[at] == pytest.approx(d, abs=1e-10)
        fires = values != 0
        ratio = (fires[own].mean() + 0.5 / 60) / (fires[~own].mean() + 0.5 / 60)
        assert got.firing_ratio[at] == pytest.approx(ratio)
        bits = mutual_info_score(fires, own) / np.log(2)
        assert got.mutual_information[at] == pytest.approx(bits, abs=1e-12)
    np.testing.assert_allclose(
        got.q.ravel(), stats.false_discovery_control(got.p.ravel()), atol=1e-14
    )


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6))
def test_p_in_one_topic_is_that_of_mann_whitney(seed):
    x, labels = world(seed, n_topics=1)
    got = scores.score_pairs(x, labels, workers=1)
    for at, values, own in pairs(x, labels):
        test = stats.mannwhitneyu(
            values[own],
            values[~own],
            alternative="greater",
            method="asymptotic",
            use_continuity=False,
        )
        assert got.p[at] == pytest.approx(test.pvalue, rel=1e-9)


def test_p_over_topics_has_the_variance_of_permutations():
    """z of the AUROC over all shuffles within topics has mean 0 and variance 1."""
    x, labels = world(0, n=45, n_features=3, n_concepts=2, n_topics=3)
    rng = np.random.default_rng(1)
    z = np.array(
        [
            stats.norm.isf(scores.score_pairs(x, labels.shuffled(rng), workers=1).p)
            for _ in range(200)
        ]
    )
    assert np.abs(z.mean(0)).max() < 4 / np.sqrt(200)
    np.testing.assert_allclose(z.var(0), 1, atol=0.3)


@pytest.mark.parametrize("n_topics", [1, 3])
def test_standard_error_is_that_of_hanley_and_mcneil(n_topics):
    x, labels = world(4, n_topics=n_topics)
    got = scores.score_pairs(x, labels, workers=1)
    for at, _, own in pairs(x, labels):
        counts = [
            (int(own[labels.topics == t].sum()), int((~own[labels.topics == t]).sum()))
            for t in range(n_topics)
        ]
        variances = [inference.hanley_mcneil(got.auroc[at], m, n) ** 2 for m, n in counts if m * n]
        expected = np.sqrt(np.sum(variances)) / len(variances)
        assert got.se[at] == pytest.approx(expected, rel=1e-9)


def test_standard_error_is_near_that_of_repeated_samples():
    """Here 40 texts against 200 with normal scores: the formula is for exponential ones."""
    rng = np.random.default_rng(0)
    concepts = csr_array((np.arange(240) < 40)[:, None])
    labels = Labels(concepts, np.zeros(240, int), np.arange(240))
    values = rng.normal(0, 1, (240, 1500)) + 1.2 * concepts.toarray()
    got = scores.score_pairs(csr_array(values), labels)
    assert 1 < got.se.mean() / got.auroc.std() < 1.3


@pytest.mark.parametrize("several", [True, False])
def test_the_same_bytes_for_any_block_and_any_number_of_workers(several):
    x, labels = world(2, n=200, n_features=90)
    if not several:  # the shorter way where every text has one concept
        rows = np.arange(200)
        concepts = csr_array((np.ones(200, bool), (rows, rows % 5)), shape=(200, 5))
        labels = labels._replace(concepts=concepts)
    expected = scores.score_pairs(x, labels, workers=1)
    for block, workers in ((1, 1), (37, 2), (10**6, 3), (500, None)):
        got = scores.score_pairs(x, labels, block=block, workers=workers)
        for name, ours, theirs in zip(expected._fields, got, expected, strict=True):
            assert ours.tobytes() == theirs.tobytes(), (name, block, workers)


def test_one_concept_a_text_gives_what_several_give():
    x, _ = world(3)
    one = np.arange(60) % 4
    concepts = csr_array((np.ones(60, bool), (np.arange(60), one)), shape=(60, 4))
    labels = Labels(concepts, np.arange(60) // 20, np.arange(60))
    extra = np.zeros((60, 5), bool)
    extra[:, :4], extra[::7, 4] = concepts.toarray(), True
    expected = scores.score_pairs(x, labels)
    got = scores.score_pairs(x, labels._replace(concepts=csr_array(extra)))
    for name in expected._fields[:-1]:
        np.testing.assert_allclose(
            getattr(got, name)[:, :4], getattr(expected, name), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3])
def test_a_latent_that_never_varies_tells_nothing(value):
    _, labels = world(5)
    x = csr_array(np.full((60, 2), value, np.float32))
    got = scores.score_pairs(x, labels)
    np.testing.assert_allclose(got.auroc, 0.5, atol=1e-12)
    np.testing.assert_allclose(got.auroc_pooled, 0.5, atol=1e-12)
    np.testing.assert_array_equal(got.p, 1.0)
    np.testing.assert_array_equal(got.q, 1.0)
    np.testing.assert_array_equal(got.cohens_d, 0.0)
    np.testing.assert_allclose(got.mutual_information, 0.0, atol=1e-12)
    np.testing.assert_allclose(got.firing_ratio, 1.0)
    assert (got.se > 0).all()


def test_a_concept_without_texts_is_no_test():
    x, labels = world(6)
    dense = labels.dense()
    dense[:, 1], dense[:, 2] = False, True
    dense[:, 3] = labels.topics == 0  # all of one topic, none of the others
    got = scores.score_pairs(x, labels._replace(concepts=csr_array(dense)))
    for values in got:
        assert np.isnan(values[:, 1:3]).all()
        assert np.isfinite(values[:, [0, 4]]).all()
    assert np.isnan(got.p[:, 3]).all()
    assert np.isfinite(got.auroc_pooled[:, 3]).all()
    tested = got.p[:, [0, 4]]
    expected = stats.false_discovery_control(tested.ravel()).reshape(tested.shape)
    np.testing.assert_allclose(got.q[:, [0, 4]], expected, atol=1e-14)


def test_no_labels_give_no_scores():
    x, labels = world(8)
    got = scores.score_pairs(x, labels._replace(concepts=csr_array((60, 5), dtype=bool)))
    for values in got:
        assert np.isnan(values).all()


def test_no_features_give_no_scores():
    _, labels = world(7)
    assert scores.score_pairs(csr_array((60, 0), dtype=np.float32), labels).p.shape == (0, 5)
