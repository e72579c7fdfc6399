"""Selection on the first set: against plain loops over one fold at a time."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from discovery import scores, selection
from discovery.selection import LabelledSet, discriminant, select, top_latents
from saes.errors import UserError

SITE = "blocks.3.hook_resid_post"
N, TOPICS = 6, 7


@pytest.fixture
def first() -> LabelledSet:
    """Seven topics by five writers; concept c raises latents 3c and 3c + 1."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(N), TOPICS)
    x = rng.normal(-0.5, 1, (N * TOPICS, 30))
    for c in range(N):
        x[np.ix_(labels == c, [3 * c, 3 * c + 1])] += 1.5
    topics = np.repeat(np.arange(TOPICS), N)
    writers = np.array([0, 0, 1, 1, 2, 3, 4])[topics]
    return LabelledSet({SITE: csr_array(np.maximum(x, 0))}, labels, topics, writers)


def part(labelled: LabelledSet, rows: np.ndarray) -> LabelledSet:
    return LabelledSet(
        {site: x[rows] for site, x in labelled.latents.items()},
        labelled.labels[rows],
        labelled.topics[rows],
        labelled.writers[rows],
    )


def test_each_writer_is_scored_by_a_selection_on_the_others(first):
    (fit,) = select(first, N, k=3)
    for writer in range(5):
        own = first.writers == writer
        chosen = selection.fit_site(part(first, ~own), SITE, N, k=3).selection
        held_out = part(first, own)
        singles, sets = selection.score(chosen, held_out.latents[SITE])
        topics = np.unique(held_out.topics)
        for got, values in ((fit.latent_aurocs, singles), (fit.set_aurocs, sets)):
            expected = scores.aurocs_by_group(values, held_out.labels, held_out.topics)
            np.testing.assert_allclose(got[:, topics], expected, atol=1e-12)


def test_noise_is_at_chance_when_cross_fitted_and_not_in_sample(first):
    labels = np.random.default_rng(1).permuted(first.labels.reshape(TOPICS, N), axis=1).ravel()
    (noise,) = select(replace(first, labels=labels), N, k=3)
    assert abs(noise.set_aurocs.mean() - 0.5) < 0.1
    _, in_sample = selection.score(noise.selection, first.latents[SITE])
    assert scores.aurocs_by_group(in_sample, labels, first.topics).mean() > 0.7


def test_top_latents_are_those_of_the_largest_within_topic_auroc(first):
    x = first.latents[SITE]
    got = top_latents(scores.within_group_ranks(x, first.topics), first.labels, N, k=4)
    auroc = scores.within_group_auroc(x, first.labels, first.topics, N)
    for c in range(N):
        order = sorted(range(30), key=lambda f: (-round(auroc[f, c], 12), f))
        assert got[c].tolist() == order[:4]
        assert {3 * c, 3 * c + 1} & set(got[c, :2].tolist())


def test_ties_go_to_the_lower_index_and_silent_latents_come_last():
    labels, topics = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    same = np.array([1.0, 0.0, 1.0, 0.0])
    x = np.stack([np.zeros(4), 1 - same, same, same * 2], axis=1)
    ranks = scores.within_group_ranks(csr_array(x), topics)
    assert top_latents(ranks, labels, 2, k=4).tolist() == [[2, 3, 1, 0], [1, 2, 3, 0]]


def test_rarely_firing_latents_are_passed_over():
    labels = np.tile(np.arange(50), 20)
    topics = np.repeat(np.arange(20), 50)
    x = np.zeros((1000, 2))
    x[0, 0] = 1.0  # one text of concept 0, and the only one in which latent 0 fires
    x[500:, 1] = np.random.default_rng(0).random(500)
    ranks = scores.within_group_ranks(csr_array(x), topics)
    assert selection.MIN_FIRING > 1 / 1000
    assert top_latents(ranks, labels, 50, k=1)[0, 0] == 1


def test_discriminant_without_shrinkage_is_that_of_sklearn(monkeypatch):
    monkeypatch.setattr(selection, "SHRINKAGE", 0.0)
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (400, 5)) @ rng.normal(0, 1, (5, 5))
    positive = np.arange(400) % 8 == 0
    x[positive] += rng.normal(0, 0.5, 5)
    got = discriminant(x, positive, np.zeros(400, int))
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x, positive).coef_[0]
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-10)


def test_discriminant_ignores_topics_and_constant_latents():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (60, 4))
    x[:, 2] = 3.0
    positive, topics = np.arange(60) % 6 == 0, np.repeat(np.arange(10), 6)
    weights = discriminant(x, positive, topics)
    shifted = discriminant(x + 5 * topics[:, None], positive, topics)
    np.testing.assert_allclose(shifted, weights, atol=1e-9)
    assert weights[2] == pytest.approx(0, abs=1e-9)
    assert np.linalg.norm(weights) == pytest.approx(1)
    assert not discriminant(np.zeros((60, 4)), positive, topics).any()


def test_set_scores_are_weighted_sums_and_singles_the_first_member(first):
    (fit,) = select(first, N, k=3)
    x = first.latents[SITE]
    singles, sets = selection.score(fit.selection, x)
    dense = x.toarray()
    for c in range(N):
        members, weights = fit.selection.members[c], fit.selection.weights[c]
        np.testing.assert_allclose(sets[:, c], dense[:, members] @ weights, atol=1e-12)
        np.testing.assert_array_equal(singles[:, c], dense[:, members[0]])


def test_the_best_site_comes_first(first):
    noise = csr_array(np.random.default_rng(1).random((N * TOPICS, 30)))
    both = replace(first, latents={"blocks.1.hook_resid_post": noise, SITE: first.latents[SITE]})
    fits = select(both, N, k=3)
    assert [fit.selection.site for fit in fits] == [SITE, "blocks.1.hook_resid_post"]
    assert np.mean(fits[0].set_aurocs) > np.mean(fits[1].set_aurocs)


def test_sets_that_cannot_be_selected_on_are_refused(first):
    with pytest.raises(UserError, match=r"topic 0 of the first set has writers \[0, 1\]"):
        select(replace(first, writers=np.arange(len(first.labels)) % 2), N, k=3)
    with pytest.raises(UserError, match="concept 0 has fewer than two writers"):
        select(replace(first, writers=np.zeros_like(first.labels)), N, k=3)
    with pytest.raises(UserError, match="has 30 latents, too few for a set of k=31"):
        select(first, N, k=31)


def test_every_site_must_hold_all_texts(first):
    shorter = first.latents[SITE][1:]
    with pytest.raises(AssertionError, match="42 labels"):
        replace(first, latents=first.latents | {"blocks.4.hook_resid_post": shorter})
