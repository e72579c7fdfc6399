"""Baselines: TF-IDF against its definition, and rows that say what was measured."""

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score

from discovery import scores
from discovery.baselines import (
    Results,
    difference_rows,
    fit_tfidf,
    measure,
    score_rows,
    situation_aurocs,
)
from discovery.probes import Labels, fit_probe

CONCEPTS = ["glad", "sorry", "upset"]
GIVEAWAYS = ["lantern ribbon", "puddle gravel", "thunder splinter"]
FILLER = np.array(
    ["morning", "table", "window", "street", "bread", "letter", "garden", "kettle", "road", "coat"]
)


def story(rng: np.random.Generator, concept: int, giveaway: bool = True) -> str:
    words = [*rng.choice(FILLER, 6), *(GIVEAWAYS[concept].split() if giveaway else [])]
    return " ".join(rng.permutation(words))


def corpus(seed: int, n_topics: int, giveaway: bool = True) -> tuple[np.ndarray, Labels]:
    rng = np.random.default_rng(seed)
    concepts = np.tile(np.arange(3), n_topics)
    topics = np.repeat(np.arange(n_topics), 3)
    texts = np.array([story(rng, c, giveaway) for c in concepts], dtype=object)
    return texts, Labels(concepts, topics, topics // 2, 3)


def test_tfidf_scores_are_products_with_differences_of_mean_vectors():
    first, labels = corpus(0, 6)
    hard, _ = corpus(1, 4)
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    x = vectorizer.fit_transform(first).toarray()
    means = np.stack([x[labels.concepts == c].mean(0) for c in range(3)])
    expected = vectorizer.transform(hard).toarray() @ (means - means.mean(0)).T
    np.testing.assert_allclose(fit_tfidf(first, labels)(hard), expected, atol=1e-12)


def test_tfidf_reads_vocabulary_and_nothing_else():
    first = corpus(0, 12)
    with_words = measure("tfidf", fit_tfidf, first, corpus(1, 12), corpus(2, 3))
    without = measure("tfidf", fit_tfidf, first, corpus(1, 12, giveaway=False), corpus(2, 3))
    assert with_words.method == "tfidf"
    assert (with_words.first == 1).all()
    assert (with_words.hard == 1).all()
    assert (with_words.situations == 1).all()
    assert abs(without.hard.mean() - 0.5) < 0.2
    np.testing.assert_array_equal(without.first, with_words.first)


def test_the_first_set_is_measured_on_writers_that_were_not_fitted():
    """A word of one writer's topic says nothing about the concept elsewhere."""
    texts, labels = corpus(0, 8, giveaway=False)
    marked = np.array(
        [f"{t} only{w}{c}" for t, w, c in zip(texts, labels.writers, labels.concepts, strict=True)],
        dtype=object,
    )
    in_sample = fit_tfidf(marked, labels)(marked)
    assert (scores.aurocs_by_group(in_sample, labels.concepts, labels.topics) == 1).all()
    got = measure("tfidf", fit_tfidf, (marked, labels), (marked, labels), (marked, labels))
    assert abs(got.first.mean() - 0.5) < 0.2


def test_any_fit_can_be_measured():
    rng = np.random.default_rng(0)
    _, labels = corpus(0, 6)
    x = np.eye(3)[labels.concepts] + rng.normal(0, 0.01, (18, 3))
    got = measure("embedding", fit_probe, (x, labels), (x, labels), (x, labels))
    assert got.first.shape == got.hard.shape == got.situations.shape == (3, 6)
    assert (got.first == 1).all()


def test_mean_of_situation_aurocs_is_the_pooled_auroc_of_sklearn():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [3, 3, 3, 2]))
    values = rng.integers(0, 4, (11, 4)).astype(float)
    got = situation_aurocs(values, labels)
    assert got.shape == (4, 3)
    assert np.isnan(got[3]).sum() == 1
    for c in range(4):
        expected = roc_auc_score(labels == c, values[:, c])
        assert np.nanmean(got[c]) == pytest.approx(expected, abs=1e-12)


def results(method: str, seed: int) -> Results:
    rng = np.random.default_rng(seed)
    return Results(method, rng.random((3, 6)), rng.random((3, 12)), rng.random((3, 3)))


def test_score_rows_give_mean_and_interval_of_each_set():
    tfidf = results("tfidf", 0)
    rows = score_rows(tfidf, CONCEPTS)
    assert [(r.set, r.concept) for r in rows] == [
        (name, c) for name in ("first", "hard", "situations") for c in CONCEPTS
    ]
    assert {r.method for r in rows} == {"tfidf"}
    for row, values in zip(rows[3:6], tfidf.hard, strict=True):
        assert row.auroc == pytest.approx(values.mean())
        assert 0 <= row.low < row.auroc < row.high <= 1


def test_differences_are_paired_by_topic():
    ours, tfidf = results("set", 0), results("tfidf", 1)
    whole, *rows = difference_rows(ours, tfidf, CONCEPTS)
    means = (ours.hard - tfidf.hard).mean(0)
    expected = stats.ttest_1samp(means, 0).confidence_interval()
    assert (whole.concept, whole.difference) == ("", pytest.approx(means.mean()))
    assert (whole.low, whole.high) == pytest.approx((expected.low, expected.high))
    for c, row in enumerate(rows):
        test = stats.ttest_rel(ours.hard[c], tfidf.hard[c])
        expected = test.confidence_interval()
        assert (row.concept, row.ours, row.baseline) == (CONCEPTS[c], "set", "tfidf")
        assert row.difference == pytest.approx((ours.hard[c] - tfidf.hard[c]).mean())
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
    back = difference_rows(tfidf, ours, CONCEPTS)
    assert [r.difference for r in back] == pytest.approx(
        [-r.difference for r in difference_rows(ours, tfidf, CONCEPTS)]
    )
