"""Step 7 of the verdict protocol: other readers beside the latents, on the same texts.

The readers are TF-IDF of the bare text, the token-embedding layer, a dense probe and contrastive
vectors. One that wins on the first set may know the vocabulary only: the hard set avoids the words
that give the concepts away in the first. scikit-learn is imported when TF-IDF is fitted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_array

from discovery import scores
from discovery.probes import Fit, Labels, Reader, cross_fit
from discovery.records import Difference, Score

Texts = Shaped[np.ndarray, " texts"]
"""Strings, in an array of objects."""


class Results(NamedTuple):
    """AUROCs of one method for all concepts."""

    method: str
    """One of those of `records.Score`."""
    first: Float[np.ndarray, "concepts topics"]
    """Cross-fitted over writers."""
    hard: Float[np.ndarray, "concepts topics"]
    """Fitted on the first set."""
    situations: Float[np.ndarray, "concepts situations"]
    """Fitted on the first set; see `situation_aurocs`."""


def fit_tfidf(texts: Texts, labels: Labels) -> Reader:
    """Difference of mean TF-IDF vectors of words and pairs, with sublinear term frequency.

    Words and their weights are those of the fitted texts. Pairs, and the difference from the mean
    of all concepts in place of the cosine with a concept's mean, make it the stronger baseline.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer: Any = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
    x = csr_array(vectorizer.fit_transform(texts))
    texts_of = np.bincount(labels.concepts, minlength=labels.n_concepts)
    each = csr_array(
        (1 / texts_of[labels.concepts], (labels.concepts, np.arange(len(texts)))),
        shape=(labels.n_concepts, len(texts)),
    )
    means = each @ x
    grand = means.mean(0)

    def reader(others: Texts) -> Float[np.ndarray, "texts concepts"]:
        y = csr_array(vectorizer.transform(others))
        return (y @ means.T).toarray() - (y @ grand)[:, None]

    return reader


def measure(
    method: str,
    fit: Fit,
    first: tuple[np.ndarray, Labels],
    hard: tuple[np.ndarray, Labels],
    situations: tuple[np.ndarray, Labels],
) -> Results:
    """Fit a method on the first set and read all three sets with it."""
    labels = first[1]
    reader = fit(*first)
    return Results(
        method,
        scores.aurocs_by_group(cross_fit(fit, *first), labels.concepts, labels.topics),
        scores.aurocs_by_group(reader(hard[0]), hard[1].concepts, hard[1].topics),
        situation_aurocs(reader(situations[0]), situations[1].concepts),
    )


def situation_aurocs(
    values: Float[np.ndarray, "texts concepts"], labels: Int[np.ndarray, " texts"]
) -> Float[np.ndarray, "concepts situations"]:
    """Percentile of each text of a concept among all texts of other concepts.

    Situations have no topics. The mean over a concept's texts is its AUROC; concepts with fewer
    texts than others have NaN in their places.
    """
    counts = np.bincount(labels, minlength=values.shape[1])
    result = np.full((values.shape[1], counts.max()), np.nan)
    for c, column in enumerate(values.T):
        others = np.sort(column[labels != c])
        own = column[labels == c]
        ranks = np.searchsorted(others, own) + np.searchsorted(others, own, side="right")
        result[c, : len(own)] = ranks / (2 * len(others))
    return result


def score_rows(results: Results, concepts: Sequence[str]) -> list[Score]:
    """AUROC of a method for each concept on the first set, the hard set, and situations.

    Intervals are over topics, or over the situations of the concept.
    """
    return [
        Score(concept, results.method, name, float(mean), float(low), float(high))
        for name in ("first", "hard", "situations")
        for concept, mean, low, high in zip(
            concepts, *scores.auroc_interval(getattr(results, name)), strict=True
        )
    ]


def difference_rows(ours: Results, baseline: Results, concepts: Sequence[str]) -> list[Difference]:
    """AUROC of our method minus that of a baseline on the hard set, paired by topic.

    The first row, for no concept, is the mean over concepts: all share the topics, so its interval
    is over the topics' means.
    """
    gap = ours.hard - baseline.hard
    rows = np.concatenate([np.nanmean(gap, axis=0, keepdims=True), gap])
    return [
        Difference(concept, ours.method, baseline.method, float(mean), float(low), float(high))
        for concept, mean, low, high in zip(["", *concepts], *scores.t_interval(rows), strict=True)
    ]
