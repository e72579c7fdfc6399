"""Baselines and controls: what each reader finds, and rows that say what was measured."""

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_array, vstack
from sklearn.metrics import roc_auc_score

from discovery import inference, ranks, selection
from discovery.baselines import (
    Reading,
    Results,
    control_results,
    depth,
    difference_rows,
    draw_alike,
    latent_results,
    measure,
    random_latents,
    read,
    score_rows,
    situation_aurocs,
)
from discovery.captured import EMBEDDING, Sets, site_of
from discovery.labels import Labels, single
from discovery.probes import fit_probe, fit_vectors
from discovery.selection import LabelledSet
from discovery.tfidf import fit_tfidf, term_counts
from saes.errors import UserError

CONCEPTS = ["glad", "sorry", "upset"]
GIVEAWAYS = ["lantern ribbon", "puddle gravel", "thunder splinter"]
FILLER = np.array(
    ["morning", "table", "window", "street", "bread", "letter", "garden", "kettle", "road", "coat"]
)


def story(rng: np.random.Generator, concept: int, giveaway: bool = True) -> str:
    words = [*rng.choice(FILLER, 6), *(GIVEAWAYS[concept].split() if giveaway else [])]
    return " ".join(rng.permutation(words))


def corpus(seed: int, n_topics: int, giveaway: bool = True) -> tuple[list[str], Labels]:
    rng = np.random.default_rng(seed)
    concepts = np.tile(np.arange(3), n_topics)
    topics = np.repeat(np.arange(n_topics), 3)
    texts = [story(rng, c, giveaway) for c in concepts]
    return texts, single(concepts, 3, topics, topics // 2)


def counted(*sets: tuple[list[str], Labels]) -> list[tuple[csr_array, Labels]]:
    """Term counts of several sets, made at once."""
    counts = term_counts([t for texts, _ in sets for t in texts])
    ends = np.cumsum([0, *(len(texts) for texts, _ in sets)])
    return [(counts[a:b], own[1]) for a, b, own in zip(ends, ends[1:], sets, strict=False)]


def flat(labels: Labels) -> Labels:
    """The same texts in one topic, each a unit."""
    return labels._replace(topics=np.zeros_like(labels.topics), units=np.arange(len(labels.units)))


def test_tfidf_reads_vocabulary_and_nothing_else():
    first, hard, hard_without, situations = counted(
        corpus(0, 12), corpus(1, 12), corpus(1, 12, giveaway=False), corpus(2, 3)
    )
    with_words = measure("tfidf", fit_tfidf, first, hard, situations)
    without = measure("tfidf", fit_tfidf, first, hard_without)
    assert with_words.method == "tfidf"
    assert (with_words.selection.aurocs == 1).all()
    assert (with_words.confirmation.aurocs == 1).all()
    assert (with_words.situations == 1).all()
    assert abs(without.confirmation.aurocs.mean() - 0.5) < 0.2
    np.testing.assert_array_equal(without.selection.aurocs, with_words.selection.aurocs)
    assert without.situations is None


def test_the_selection_set_is_measured_on_units_that_were_not_fitted():
    """A word of one writer says nothing about the concept elsewhere."""
    texts, labels = corpus(0, 8, giveaway=False)
    marked = [
        f"{text} only{unit}{concept}"
        for text, unit, concept in zip(texts, labels.units, labels.concepts.indices, strict=True)
    ]
    ((counts, _),) = counted((marked, labels))
    in_sample = fit_tfidf(counts, labels)(counts)
    assert (ranks.aurocs_by_group(in_sample, labels) == 1).all()
    got = measure("tfidf", fit_tfidf, (counts, labels), (counts, labels))
    assert abs(got.selection.aurocs.mean() - 0.5) < 0.2


def test_cross_fitted_scores_are_compared_within_folds():
    """Readers of different folds have no common scale: one that shifts its fold changes nothing."""
    _, labels = corpus(0, 8)
    own = flat(labels)
    x = np.eye(3)[labels.concepts.indices] + np.random.default_rng(0).normal(0, 0.01, (24, 3))

    def shifting(_: np.ndarray, fitted: Labels):
        return lambda others: others + fitted.units.sum()

    got = measure("vector", shifting, (x, own), (x, own))
    assert np.nanmin(got.selection.aurocs) == 1


@pytest.mark.parametrize("method", ["tfidf", "probe", "vector"])
def test_swapping_the_labels_of_a_pair_flips_what_is_read(method):
    rng = np.random.default_rng(3)
    topics = np.repeat(np.arange(8), 2)
    labels = single(np.tile([0, 1], 8), 2, topics, topics // 2)
    swapped = labels._replace(concepts=csr_array(labels.dense()[:, ::-1]))
    words = [story(rng, c % 2, c % 3 > 0) for c in range(16)]
    x = labels.dense() @ rng.normal(0, 1, (2, 6)) + rng.normal(0, 1, (16, 6))
    fits = {"tfidf": fit_tfidf, "probe": fit_probe, "vector": fit_vectors(rng.normal(0, 1, (9, 6)))}
    data = term_counts(words) if method == "tfidf" else x
    true = measure(method, fits[method], (data, labels), (data, labels))
    flipped = measure(method, fits[method], (data, swapped), (data, labels))
    assert true.confirmation.aurocs.mean() > 0.7
    np.testing.assert_allclose(flipped.confirmation.aurocs, 1 - true.confirmation.aurocs)
    np.testing.assert_allclose(flipped.selection.aurocs, true.selection.aurocs[::-1])


def test_any_fit_can_be_measured():
    rng = np.random.default_rng(0)
    _, labels = corpus(0, 6)
    x = np.eye(3)[labels.concepts.indices] + rng.normal(0, 0.01, (18, 3))
    got = measure("embedding", fit_probe, (x, labels), (x, labels), (x, labels))
    assert got.selection.aurocs.shape == got.confirmation.aurocs.shape == (3, 6)
    assert got.situations.shape == (3, 6)
    assert (got.selection.aurocs == 1).all()


def test_mean_of_situation_aurocs_is_the_pooled_auroc_of_sklearn():
    rng = np.random.default_rng(0)
    concepts = rng.permutation(np.repeat(np.arange(4), [3, 3, 3, 2]))
    labels = single(concepts, 5, np.arange(11), np.arange(11))
    dense = labels.dense()
    dense[0] |= dense[1]  # of two concepts
    labels = labels._replace(concepts=csr_array(dense))
    values = rng.integers(0, 4, (11, 5)).astype(float)
    got = situation_aurocs(values, labels)
    assert got.shape == (5, labels.counts.max())
    assert np.isnan(got[4]).all()
    for c in range(4):
        expected = roc_auc_score(dense[:, c], values[:, c])
        assert np.nanmean(got[c]) == pytest.approx(expected, abs=1e-12)


def reading(aurocs: np.ndarray) -> Reading:
    _, labels = corpus(0, aurocs.shape[1])
    return Reading(aurocs, *inference.auroc_interval(aurocs)[1:], None, labels)


def results(method: str, seed: int) -> Results:
    rng = np.random.default_rng(seed)
    return Results(
        method, reading(rng.random((3, 6))), reading(rng.random((3, 12))), rng.random((3, 3))
    )


def test_score_rows_give_mean_and_interval_of_each_set():
    tfidf = results("tfidf", 0)
    rows = score_rows(tfidf, CONCEPTS)
    assert [(r.set, r.concept) for r in rows] == [
        (name, c) for name in ("selection", "confirmation", "situations") for c in CONCEPTS
    ]
    assert {r.method for r in rows} == {"tfidf"}
    for row, values in zip(rows[3:6], tfidf.confirmation.aurocs, strict=True):
        assert row.auroc == pytest.approx(values.mean())
        assert 0 <= row.low < row.auroc < row.high <= 1
    tfidf.situations[1] = np.nan
    assert [r.concept for r in score_rows(tfidf, CONCEPTS)[6:]] == ["glad", "upset"]
    assert len(score_rows(tfidf._replace(situations=None), CONCEPTS)) == 6


def test_differences_are_paired_by_topic():
    ours, tfidf = results("set", 0), results("tfidf", 1)
    whole, *rows = difference_rows(ours, tfidf, CONCEPTS)
    gap = ours.confirmation.aurocs - tfidf.confirmation.aurocs
    expected = stats.ttest_1samp(gap.mean(0), 0).confidence_interval()
    assert (whole.concept, whole.difference) == ("", pytest.approx(gap.mean()))
    assert (whole.low, whole.high) == pytest.approx((expected.low, expected.high))
    for c, row in enumerate(rows):
        test = stats.ttest_rel(ours.confirmation.aurocs[c], tfidf.confirmation.aurocs[c])
        expected = test.confidence_interval()
        assert (row.concept, row.ours, row.baseline) == (CONCEPTS[c], "set", "tfidf")
        assert row.difference == pytest.approx(gap[c].mean())
        assert (row.low, row.high) == pytest.approx((expected.low, expected.high))
    back = difference_rows(tfidf, ours, CONCEPTS)
    assert [r.difference for r in back] == pytest.approx(
        [-r.difference for r in difference_rows(ours, tfidf, CONCEPTS)]
    )


def scored(seed: int, n_topics: int, strength: float = 1.0) -> tuple[np.ndarray, Labels]:
    """Scores of 60 texts with up to three concepts each, in some topics; tied here and there."""
    rng = np.random.default_rng(seed)
    dense = np.random.default_rng(9).random((60, 3)) < [0.3, 0.5, 0.2]
    scores = (rng.normal(0, 1, (60, 3)) + strength * dense).round(1)
    topics, texts = np.arange(60) % n_topics, np.arange(60)
    labels = Labels(csr_array(dense), topics, texts)
    return scores, labels


@pytest.mark.parametrize("n_topics", [1, 3])
def test_influences_are_those_of_delong(n_topics):
    a, labels = scored(0, n_topics)
    b, _ = scored(1, n_topics, 0.3)
    first, second = inference.influence(a, labels), inference.influence(b, labels)
    np.testing.assert_allclose(first.sum(0), 0, atol=1e-12)
    ours = Results("set", read(a, labels), read(a, labels))
    other = Results("tfidf", read(b, labels), read(b, labels))
    _, *rows = difference_rows(ours, other, CONCEPTS)
    for c, row in enumerate(rows):
        expected = inference.delong_difference(a[:, c], b[:, c], labels.of(c), labels.topics)
        assert (row.difference, row.low, row.high) == pytest.approx(tuple(expected))
        if n_topics == 1:  # DeLong's own formula
            own, rest = a[labels.of(c), c], a[~labels.of(c), c]
            above = (own[:, None] > rest) + 0.5 * (own[:, None] == rest)
            variance = above.mean(1).var(ddof=1) / len(own) + above.mean(0).var(ddof=1) / len(rest)
            assert (first[:, c] ** 2).sum() == pytest.approx(variance)
    assert second.shape == b.shape


def test_few_topics_have_intervals_over_texts_and_many_over_topics():
    for n_topics in (1, 3, 4):
        a, labels = scored(0, n_topics)
        got = read(a, labels)
        assert (got.influence is None) == (n_topics >= inference.FEW_TOPICS)
        bounds = inference.auroc_intervals(a, labels)
        np.testing.assert_allclose((got.low, got.high), (bounds.low, bounds.high))


def test_the_mean_difference_of_a_flat_corpus_is_over_units():
    """Its interval covers what a mean over independent units has; texts repeated add nothing."""
    a, labels = scored(0, 1)
    b, _ = scored(1, 1, 0.3)
    copies = np.tile(np.arange(60), 4)
    several = labels.rows(copies)
    several = several._replace(units=labels.units[copies])
    whole = [
        difference_rows(
            Results("set", read(x, own), read(x, own)),
            Results("tfidf", read(y, own), read(y, own)),
            CONCEPTS,
        )[0]
        for x, y, own in ((a, b, labels), (a[copies], b[copies], several))
    ]
    once, repeated = whole
    assert once.difference == pytest.approx(repeated.difference)
    width = once.high - once.low
    assert repeated.high - repeated.low == pytest.approx(width, rel=0.05)
    assert 0 < once.low < once.difference < once.high
    # the influences of one concept add up with those of another: not as if they were independent
    influences = (inference.influence(a, labels) - inference.influence(b, labels)).mean(1)
    error = np.sqrt((influences**2).sum() * 60 / 59)
    assert width / 2 == pytest.approx(stats.t.ppf(0.975, 59) * error)


def test_a_concept_without_any_comparison_has_no_row():
    a, labels = scored(0, 1)
    dense = labels.dense()
    dense[:, 2] = True
    everywhere = labels._replace(concepts=csr_array(dense))
    got = Results("set", read(a, everywhere), read(a, everywhere))
    assert [r.concept for r in score_rows(got, CONCEPTS)] == ["glad", "sorry"] * 2
    whole, *rows = difference_rows(got, got, CONCEPTS)
    assert whole.difference == 0
    assert [r.concept for r in rows] == ["glad", "sorry"]


DENSE = ("vector", "probe")
VIEW, OTHER = "blocks.1.hook_resid_post@mean", "blocks.2.hook_resid_post@mean"


def latents(seed: int, labels: Labels, strength: float = 3.0) -> csr_array:
    """Sixty latents of various density; latent c rises with concept c."""
    rng = np.random.default_rng(seed)
    density = np.geomspace(0.9, 0.1, 60)
    x = rng.exponential(1, (len(labels.topics), 60))
    x *= rng.random(x.shape) < density
    x[:, :3] += strength * labels.dense()
    x[:, 50] = 0
    return csr_array(x)


def labelled(seed: int, labels: Labels, strength: float = 3.0) -> LabelledSet:
    return LabelledSet(
        {VIEW: latents(seed, labels, strength), OTHER: latents(seed + 1, labels, strength / 4)},
        labels,
    )


def test_controls_fire_about_as_often_as_the_chosen_latents():
    rng = np.random.default_rng(0)
    x = csr_array((rng.random((200, 400)) < np.geomspace(0.9, 0.05, 400)).astype(float))
    x = csr_array(x * (np.arange(400) % 10 > 0))  # some never fire
    fires = x.sum(0)
    chosen = np.array([5, 201, 399])
    drawn = draw_alike(chosen, x, 20, seed=0)
    for latent, others in zip(chosen, drawn, strict=True):
        assert len(set(others)) == 20
        assert latent not in others
        assert np.abs(np.log(fires[others] / fires[latent])).max() < 1
    np.testing.assert_array_equal(draw_alike(chosen, x, 20, seed=0), drawn)
    assert (draw_alike(chosen, x, 20, seed=1) != drawn).any()


def test_random_latents_say_nothing():
    _, labels = corpus(0, 12)
    first, second = latents(0, labels), latents(5, labels)
    chosen = np.array([0, 1, 2])
    drawn = draw_alike(chosen, first, 20, seed=0)
    got = random_latents(chosen, (first, labels), (second, labels), (second, labels))
    each = np.stack([ranks.aurocs_by_group(second[:, some].toarray(), labels) for some in drawn.T])
    np.testing.assert_allclose(got.confirmation.aurocs, each.mean(0))
    rows = score_rows(got, CONCEPTS)
    for row, values in zip(rows[3:6], each.mean(2).T, strict=True):
        assert (row.method, row.low, row.high) == ("random", values.min(), values.max())
        assert abs(row.auroc - 0.5) < 0.1
    for part in (got.selection.aurocs, got.confirmation.aurocs, got.situations):
        assert abs(np.mean(part) - 0.5) < 0.1


def test_random_latents_of_a_flat_corpus_are_compared_over_texts():
    _, labels = corpus(0, 12)
    labels = flat(labels)
    first, second = latents(0, labels), latents(5, labels)
    chosen = np.array([0, 1, 2])
    random = random_latents(chosen, (first, labels), (second, labels))
    best = read(second[:, chosen].toarray(), labels)
    whole, *rows = difference_rows(Results("latent", best, best), random, CONCEPTS)
    assert whole.low > 0.3
    assert all(row.low > 0 for row in rows)
    assert random.situations is None
    assert random.selection.aurocs.shape == (3, labels.folds().max() + 1)


def test_where_few_latents_fire_there_are_fewer_controls():
    _, labels = corpus(0, 12)
    x = latents(0, labels)[:, [0, 1, 2, 3, 50]]
    assert draw_alike(np.array([0, 1, 2]), x, 20, 0).shape == (3, 3)
    with pytest.raises(UserError, match="only 2 of 3 latents ever fire"):
        draw_alike(np.array([0, 1, 2]), x[:, [0, 1, 4]], 20, 0)


@pytest.mark.parametrize("arrange", [lambda labels: labels, flat])
def test_controls_are_chosen_as_the_true_latents_are(arrange):
    labels = arrange(corpus(0, 12)[1])
    first, second = labelled(0, labels), labelled(5, labels)
    single_, set_ = control_results("untrained", first, second, k=4)
    assert (single_.method, set_.method) == ("untrained", "untrained set")
    assert single_.situations is None
    fit = selection.select(first, 4)[0]
    assert fit.selection.view == VIEW
    again = latent_results(("latent", "set"), fit, (second.latents[VIEW], labels))
    for ours, expected in zip((single_, set_), again, strict=True):
        assert score_rows(ours, CONCEPTS)[0].auroc == score_rows(expected, CONCEPTS)[0].auroc
    assert min(row.auroc for row in score_rows(single_, CONCEPTS)) > 0.85
    nothing = control_results("randomised", labelled(0, labels, 0), labelled(5, labels, 0), k=4)
    for results in nothing:
        assert abs(np.mean([row.auroc for row in score_rows(results, CONCEPTS)]) - 0.5) < 0.15


def test_situations_of_latents_are_read_at_the_chosen_view():
    _, labels = corpus(0, 12)
    fit = selection.select(labelled(0, labels), 4)[0]
    x = latents(7, labels)
    single_, set_ = latent_results(("latent", "set"), fit, (x, labels), (x, labels))
    expected = situation_aurocs(x[:, fit.selection.latent].toarray(), labels)
    np.testing.assert_allclose(single_.situations, expected)
    assert set_.situations.mean() > 0.9


@pytest.mark.parametrize("arrange", [lambda labels: labels, flat])
def test_depth_has_every_method_at_every_view(arrange):
    labels = arrange(corpus(0, 12)[1])
    rng = np.random.default_rng(0)
    n = len(labels.topics)
    own, other = (Sets(np.arange(n) + start, labels) for start in (0, n))
    neutral = np.arange(2 * n, 2 * n + 20)
    both = LabelledSet({VIEW: latents(0, labels), OTHER: latents(1, labels, 0.5)}, labels)
    fits = selection.select(both, 4)
    everything = {view: vstack([x, x]).tocsr() for view, x in both.latents.items()}
    residuals = {
        view: np.concatenate(
            [
                np.eye(8)[labels.concepts.indices] * strength + rng.normal(0, 1, (n, 8))
                for _ in range(2)
            ]
            + [rng.normal(0, 1, (20, 8))]
        )
        for view, strength in ((VIEW, 5.0), (OTHER, 0.0), (f"{EMBEDDING}@mean", 0.5))
    }
    rows = depth(fits, everything, residuals, own, other, neutral)
    assert [(r.site, r.pooling, r.method) for r in rows[::2]] == [
        *((site_of(v), "mean", m) for v in (VIEW, OTHER) for m in ("latent", "set", *DENSE)),
        *((EMBEDDING, "mean", m) for m in DENSE),
    ]
    assert {r.set for r in rows[::2]} == {"selection"}
    assert {r.set for r in rows[1::2]} == {"confirmation"}
    at = {(r.site, r.method, r.set): r for r in rows}
    strong, weak = (
        at[site_of(VIEW), "probe", "confirmation"],
        at[site_of(OTHER), "probe", "confirmation"],
    )
    assert strong.auroc > 0.95 > weak.high
    assert all(0 <= r.low <= r.auroc <= r.high <= 1 for r in rows)
    first, second = (residuals[VIEW][s.rows] for s in (own, other))
    scores = fit_probe(first, labels)(second)
    expected = inference.mean_auroc_interval(scores, labels)
    assert (strong.auroc, strong.low, strong.high) == pytest.approx(tuple(expected))
