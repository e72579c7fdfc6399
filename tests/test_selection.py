"""Selection on the selection set: against plain loops over one fold and one concept at a time."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from discovery import ranks, selection
from discovery.labels import Labels, single
from discovery.selection import LabelledSet, SiteFit, curve, select
from saes.errors import UserError

VIEW = "blocks.3.hook_resid_post@rule"
N, TOPICS = 6, 7


def planted(topics: np.ndarray, writers: np.ndarray, seed: int = 0) -> LabelledSet:
    """Six concepts a topic; concept c raises latents 3c and 3c + 1."""
    rng = np.random.default_rng(seed)
    concepts = np.tile(np.arange(N), len(topics) // N)
    x = rng.normal(-0.5, 1, (len(topics), 30))
    for c in range(N):
        x[np.ix_(concepts == c, [3 * c, 3 * c + 1])] += 1.5
    labels = single(concepts, N, topics, writers)
    return LabelledSet({VIEW: csr_array(np.maximum(x, 0))}, labels)


@pytest.fixture
def texts() -> LabelledSet:
    """Seven topics by five writers."""
    topics = np.repeat(np.arange(TOPICS), N)
    return planted(topics, np.array([0, 0, 1, 1, 2, 3, 4])[topics])


@pytest.fixture
def flat() -> LabelledSet:
    """90 texts without topics and writers; some have a second concept."""
    one = planted(np.zeros(90, np.int64), np.zeros(90, np.int64))
    concepts = one.labels.dense() | (np.random.default_rng(1).random((90, N)) < 0.1)
    labels = Labels(csr_array(concepts), np.zeros(90, np.int64), np.arange(90))
    return replace(one, labels=labels)


def reference(texts: LabelledSet, k: int) -> SiteFit:
    """The rule of step 2 and its cross-fit, one fold and one concept at a time."""
    x, labels, folds = texts.latents[VIEW].toarray(), texts.labels, texts.labels.folds()
    dense = labels.dense()

    def choose(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        visible = labels._replace(concepts=csr_array(dense & keep[:, None]))
        auroc = ranks.within_group_auroc(csr_array(x), visible).round(12)
        auroc[(x[keep] != 0).mean(0) < selection.MIN_FIRING] = -1
        members = np.array(
            [sorted(range(30), key=lambda f: (-auroc[f, c], f))[:k] for c in range(N)]
        )
        weights = [
            plain_discriminant(x[keep][:, m], dense[keep, c], labels.topics[keep])
            for c, m in enumerate(members)
        ]
        return members, np.array(weights)

    singles, sets = np.zeros(dense.shape), np.zeros(dense.shape)
    for fold in np.unique(folds):
        own = folds == fold
        members, weights = choose(~own)
        singles[own] = x[own][:, members[:, 0]]
        sets[own] = np.einsum("tck,ck->tc", x[own][:, members], weights)
    groups = labels.crossed(folds)
    by_group = (ranks.aurocs_by_group(values, groups) for values in (singles, sets))
    chosen = selection.Selection(VIEW, *choose(np.ones(len(x), bool)))
    return SiteFit(chosen, *by_group, singles, sets, groups)


def plain_discriminant(x: np.ndarray, positive: np.ndarray, topics: np.ndarray) -> np.ndarray:
    centred = ranks.centred(x.astype(np.float64), topics)
    covariance = centred.T @ centred / len(x)
    shrunken = (1 - selection.SHRINKAGE) * covariance
    floor = 1e-6 * (x**2).mean(0) + 1e-30
    np.fill_diagonal(shrunken, np.maximum(np.diag(covariance), floor))
    weights = np.linalg.solve(shrunken, centred[positive].mean(0))
    return weights / max(float(np.linalg.norm(weights)), 1e-30)


def assert_same(got: SiteFit, expected: SiteFit) -> None:
    np.testing.assert_array_equal(got.selection.members, expected.selection.members)
    np.testing.assert_allclose(got.selection.weights, expected.selection.weights, atol=1e-10)
    np.testing.assert_array_equal(got.labels.topics, expected.labels.topics)
    for name in ("latent_aurocs", "set_aurocs", "latent_scores", "set_scores"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=1e-10)


@pytest.mark.parametrize("block", [1, selection.BLOCK])
@pytest.mark.parametrize("name", ["texts", "flat"])
def test_selection_is_that_of_plain_loops(name, block, request, monkeypatch):
    monkeypatch.setattr(selection, "BLOCK", block)
    labelled = request.getfixturevalue(name)
    (fit,) = select(labelled, k=3)
    assert_same(fit, reference(labelled, 3))


def test_each_writer_is_scored_by_a_selection_on_the_others(texts):
    """Where folds keep topics whole, nothing of a fold reaches the selection that scores it."""
    (fit,) = select(texts, k=3)
    folds = texts.labels.folds()
    for fold in range(5):
        own = folds == fold
        x = texts.latents[VIEW]
        others = LabelledSet({VIEW: csr_array(x[~own])}, texts.labels.rows(~own))
        chosen = selection.choose(others, VIEW, 3)
        singles, sets = selection.score(chosen, csr_array(x[own]))
        np.testing.assert_allclose(fit.latent_scores[own], singles, atol=1e-12)
        np.testing.assert_allclose(fit.set_scores[own], sets, atol=1e-12)


def test_labels_of_a_fold_never_reach_the_selection_that_scores_it(flat):
    (fit,) = select(flat, k=3)
    folds = flat.labels.folds()
    own = folds == 4
    mixed = flat.labels.dense()
    mixed[own] = mixed[own][::-1]
    labels = flat.labels._replace(concepts=csr_array(mixed))
    (again,) = selection.fit_view(flat.relabelled(labels), VIEW, (3,), folds)
    assert (mixed != flat.labels.dense()).any()
    np.testing.assert_array_equal(again.set_scores[own], fit.set_scores[own])
    assert (again.set_scores[~own] != fit.set_scores[~own]).any()


@pytest.mark.parametrize("name", ["texts", "flat"])
def test_noise_is_at_chance_when_cross_fitted_and_not_in_sample(name, request):
    labelled = request.getfixturevalue(name)
    labels = labelled.labels.shuffled(np.random.default_rng(1))
    (noise,) = select(labelled.relabelled(labels), k=3)
    assert abs(np.nanmean(noise.set_aurocs) - 0.5) < 0.1
    _, in_sample = selection.score(noise.selection, labelled.latents[VIEW])
    assert ranks.aurocs_by_group(in_sample, labels).mean() > 0.6


def test_ranks_are_made_once_for_all_shuffles(texts, monkeypatch):
    select(texts, k=3)
    monkeypatch.delattr(ranks, "within_group_ranks")
    shuffled = texts.relabelled(texts.labels.shuffled(np.random.default_rng(0)))
    select(shuffled, k=3)
    other = shuffled.labels._replace(topics=np.zeros_like(shuffled.labels.topics))
    with pytest.raises(AttributeError, match="within_group_ranks"):  # other topics, other ranks
        texts.relabelled(other).prepared(VIEW)
    with pytest.raises(AttributeError, match="within_group_ranks"):  # other latents, other ranks
        replace(texts, latents={VIEW: texts.latents[VIEW] * 2}).prepared(VIEW)


def test_the_scale_of_a_latent_changes_no_member(texts):
    scale = np.random.default_rng(0).uniform(0.1, 10, 30)
    scaled = csr_array(texts.latents[VIEW].toarray() * scale)
    (fit,), (other,) = (select(t, 4) for t in (texts, LabelledSet({VIEW: scaled}, texts.labels)))
    np.testing.assert_array_equal(fit.selection.members, other.selection.members)
    np.testing.assert_array_equal(fit.latent_aurocs, other.latent_aurocs)
    np.testing.assert_allclose(fit.set_aurocs, other.set_aurocs, atol=1e-9)


def two_concepts(x: np.ndarray, topics: np.ndarray) -> LabelledSet:
    concepts = np.arange(len(x)) % 2
    return LabelledSet({VIEW: csr_array(x)}, single(concepts, 2, topics, topics))


def test_ties_go_to_the_lower_index_and_silent_latents_come_last():
    same = np.array([1.0, 0.0, 1.0, 0.0])
    x = np.stack([np.zeros(4), 1 - same, same, same * 2], axis=1)
    texts = two_concepts(x, np.array([0, 0, 1, 1]))
    assert selection.best_latents(texts, VIEW, 4).tolist() == [[2, 3, 1, 0], [1, 2, 3, 0]]


def test_rarely_firing_latents_are_passed_over():
    x = np.zeros((1000, 2))
    x[0, 0] = 1.0  # one text of concept 0, and the only one in which latent 0 fires
    x[500:, 1] = np.random.default_rng(0).random(500)
    labels = single(
        np.tile(np.arange(50), 20), 50, np.repeat(np.arange(20), 50), np.repeat(np.arange(20), 50)
    )
    texts = LabelledSet({VIEW: csr_array(x)}, labels)
    assert selection.MIN_FIRING > 1 / 1000
    assert selection.best_latents(texts, VIEW, 1)[0, 0] == 1


def weights_of(x: np.ndarray, positive: np.ndarray, topics: np.ndarray) -> np.ndarray:
    """Discriminant weights of all columns, for the texts `positive`."""
    labels = single(np.where(positive, 0, -1), 1, topics, topics)
    members, folds = np.arange(x.shape[1])[None, None], np.zeros(len(x), np.int64)
    return selection.discriminants(csr_array(x), labels, folds, members, (x.shape[1],))[0][0, 0]


def test_discriminant_without_shrinkage_is_that_of_sklearn(monkeypatch):
    monkeypatch.setattr(selection, "SHRINKAGE", 0.0)
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (400, 5)) @ rng.normal(0, 1, (5, 5))
    positive = np.arange(400) % 8 == 0
    x[positive] += rng.normal(0, 0.5, 5)
    got = weights_of(x, positive, np.zeros(400, np.int64))
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(x, positive).coef_[0]
    np.testing.assert_allclose(got, expected / np.linalg.norm(expected), atol=1e-10)


def test_discriminant_ignores_topics_and_constant_latents():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (60, 4))
    x[:, 2] = 3.0
    positive, topics = np.arange(60) % 6 == 0, np.repeat(np.arange(10), 6)
    weights = weights_of(x, positive, topics)
    np.testing.assert_allclose(weights, plain_discriminant(x, positive, topics), atol=1e-9)
    shifted = weights_of(x + 5 * topics[:, None], positive, topics)
    np.testing.assert_allclose(shifted, weights, atol=1e-8)
    assert weights[2] == pytest.approx(0, abs=1e-8)
    assert np.linalg.norm(weights) == pytest.approx(1)
    assert not weights_of(np.zeros((60, 4)), positive, topics).any()


def test_set_scores_are_weighted_sums_and_singles_the_first_member(texts):
    (fit,) = select(texts, k=3)
    x = texts.latents[VIEW]
    singles, sets = selection.score(fit.selection, x)
    dense = x.toarray()
    for c in range(N):
        members, weights = fit.selection.members[c], fit.selection.weights[c]
        np.testing.assert_allclose(sets[:, c], dense[:, members] @ weights, atol=1e-12)
        np.testing.assert_array_equal(singles[:, c], dense[:, members[0]])


def test_the_best_view_comes_first(texts):
    noise = csr_array(np.random.default_rng(1).random((N * TOPICS, 30)))
    views = {"blocks.1.hook_resid_post@rule": noise, VIEW: texts.latents[VIEW]}
    fits = select(LabelledSet(views, texts.labels), k=3)
    assert [fit.selection.view for fit in fits] == [VIEW, "blocks.1.hook_resid_post@rule"]
    assert (fits[0].selection.site, fits[0].selection.pooling) == tuple(VIEW.split("@"))
    assert np.mean(fits[0].set_aurocs) > np.mean(fits[1].set_aurocs)


def test_sets_of_other_sizes_are_nested_and_each_as_if_alone(texts):
    fits = curve(texts, VIEW, (1, 4, 30, 31))
    assert [fit.selection.members.shape[1] for fit in fits] == [1, 4, 30]
    for fit in fits:
        k = fit.selection.members.shape[1]
        assert_same(fit, select(texts, k)[0])
    assert curve(texts, VIEW, (31,)) == []


def test_sets_that_cannot_be_selected_on_are_refused(texts):
    labels, names = texts.labels, [f"c{c}" for c in range(N)]

    def refused(labels: Labels, message: str, k: int = 3) -> None:
        with pytest.raises(UserError, match=message):
            select(texts.relabelled(labels), k, names)

    one_unit = labels._replace(units=np.zeros_like(labels.units))
    refused(one_unit, "all 42 texts of the selection set share one unit")
    few = labels.dense()
    few[1:, 0] = False
    message = r"too few texts of 1 concept: 'c0' \(1\).* detect an AUROC of .75, .85 and .95"
    refused(labels._replace(concepts=csr_array(few)), message)
    few[:] = False
    refused(labels._replace(concepts=csr_array(few)), r"6 concepts: 'c0' \(0\), .*, \.\.\.")
    alone = labels._replace(topics=np.arange(42))
    refused(alone, "in the selection set no text of 6 concepts: .* shares its topic")
    refused(labels, "has 30 latents, too few for a set of k=31", k=31)


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_views_where_nothing_varies_are_refused(texts, value):
    same = csr_array(np.full((N * TOPICS, 30), value))
    with pytest.raises(UserError, match=r"no latent at blocks.3.* differs between any two texts"):
        select(LabelledSet({VIEW: same}, texts.labels), k=3)


def test_some_silent_and_constant_latents_do_no_harm(texts):
    x = texts.latents[VIEW].toarray()
    x[:, 5], x[:, 6] = 0.0, 1.0
    (fit,) = select(LabelledSet({VIEW: csr_array(x)}, texts.labels), k=30)
    assert np.isfinite(fit.selection.weights).all()
    assert (fit.selection.members[:, -1] == 5).all()


def test_every_view_must_hold_all_texts(texts):
    views = texts.latents | {"blocks.4.hook_resid_post@rule": csr_array(texts.latents[VIEW][1:])}
    with pytest.raises(AssertionError, match="42 labels"):
        LabelledSet(views, texts.labels)


def test_writers_of_one_concept_each_are_refused():
    """No fold then holds a text of a concept and a text of something else."""
    rng = np.random.default_rng(0)
    concepts = np.repeat(np.arange(3), 8)
    writers = 2 * concepts + np.tile([0, 1], 12)
    units = np.unique(writers, return_inverse=True)[1].astype(np.int64)
    flat_topics = np.zeros(24, np.int64)
    labels = single(concepts, 3, np.arange(24), writers)._replace(topics=flat_topics, units=units)
    texts = LabelledSet({"s@rule": csr_array(rng.exponential(size=(24, 20)))}, labels)
    with pytest.raises(UserError, match="no fold holds a text of"):
        select(texts, 4)
