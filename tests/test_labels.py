"""Labels of texts: shuffles, folds, comparison groups and units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from discovery.labels import MAX_FOLDS, Labels, single, units_of


def flat(concepts: np.ndarray) -> Labels:
    """Texts without topics or writers."""
    n = len(concepts)
    return Labels(csr_array(concepts.astype(bool)), np.zeros(n, np.int64), np.arange(n))


@pytest.fixture
def labels() -> Labels:
    """Four topics of six texts; two concepts, the last two texts of a topic have both or none."""
    own = np.array([[1, 0], [1, 0], [0, 1], [0, 1], [1, 1], [0, 0]], dtype=bool)
    topics = np.repeat(np.arange(4), 6)
    return Labels(csr_array(np.tile(own, (4, 1))), topics, topics // 2)


def test_counts_rows_and_columns(labels):
    assert labels.n_concepts == 2
    assert labels.counts.tolist() == [12, 12]
    assert labels.of(1)[:6].tolist() == [False, False, True, True, True, False]
    some = labels.rows(np.array([4, 5, 0]))
    assert some.dense().tolist() == [[True, True], [False, False], [True, False]]
    assert labels.columns(np.array([1])).dense()[:, 0].tolist() == labels.of(1).tolist()


def test_single_has_one_concept_a_text_or_none():
    topics, writers = np.array([0, 0, 1, 1]), np.array([5, 5, 6, 6])
    labels = single(np.array([2, -1, 0, 2]), 3, topics, writers)
    assert labels.dense().astype(int).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert labels.units.tolist() == [0, 0, 1, 1]


def test_masked_texts_lose_their_labels_and_stay(labels):
    keep = labels.topics != 1
    masked = labels.masked(keep)
    np.testing.assert_array_equal(masked.dense(), labels.dense() & keep[:, None])
    assert len(masked.topics) == len(labels.topics)


def test_crossed_groups_are_topics_where_folds_keep_them_whole(labels):
    crossed = labels.crossed(labels.folds())
    np.testing.assert_array_equal(crossed.topics, labels.topics)
    cut = labels.crossed(np.arange(24) % 2).topics
    assert len(np.unique(cut)) == 8
    for group in np.unique(cut):
        assert len(np.unique(labels.topics[cut == group])) == 1


def test_compared_texts_share_their_topic_with_another_kind():
    concepts = np.array([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0]], dtype=bool)
    labels = Labels(csr_array(concepts), np.array([0, 0, 1, 1, 1]), np.arange(5))
    assert labels.compared().tolist() == [1, 2]  # topic 0 is all of concept 0


@given(seed=st.integers(0, 100))
def test_shuffles_keep_whole_rows_within_their_topic(seed):
    rng = np.random.default_rng(seed)
    topics = rng.integers(0, 4, 40)
    labels = Labels(csr_array(rng.random((40, 3)) < 0.4), topics, topics)
    mixed = labels.shuffled(rng)
    for topic in np.unique(topics):
        rows = topics == topic
        before, after = (sorted(map(tuple, x.dense()[rows].tolist())) for x in (labels, mixed))
        assert before == after
    assert mixed.topics is labels.topics


def test_few_units_are_the_folds():
    labels = single(np.zeros(6, np.int64), 1, np.arange(6), np.array([3, 3, 1, 1, 2, 2]))
    folds = labels.folds()
    assert len(np.unique(folds)) == 3
    assert folds[0] == folds[1]
    assert folds[2] == folds[3]


@given(seed=st.integers(0, 100))
def test_folds_keep_units_whole_and_share_concepts_out(seed):
    rng = np.random.default_rng(seed)
    unit = rng.integers(0, 60, 200)
    labels = Labels(csr_array(rng.random((200, 4)) < 0.2), np.zeros(200, np.int64), unit)
    folds = labels.folds()
    assert sorted(np.unique(folds)) == list(range(MAX_FOLDS))
    for u in np.unique(unit):
        assert len(np.unique(folds[unit == u])) == 1
    assert (np.bincount(folds) >= 8).all()


def test_the_order_of_texts_does_not_leave_a_concept_in_one_fold():
    """Texts of ten concepts in turn, which folds dealt in turn would put in one fold each."""
    labels = flat(np.tile(np.eye(MAX_FOLDS), (20, 1)))
    folds = labels.folds()
    for c in range(MAX_FOLDS):
        assert np.bincount(folds[labels.of(c)], minlength=MAX_FOLDS).tolist() == [2] * MAX_FOLDS


def test_units_are_connected_by_topics_and_writers():
    topics, writers = ["a", "a", "b", "", "", "c"], ["x", "y", "y", "", "z", "z"]
    units = units_of(topics, writers)
    assert units[0] == units[1] == units[2]
    assert units[4] == units[5]
    assert len(np.unique(units)) == 3
    assert len(np.unique(units_of(["", ""], ["", ""]))) == 2


def test_a_topic_and_a_writer_of_one_name_are_not_the_same():
    assert len(np.unique(units_of(["anna", "b"], ["c", "anna"]))) == 2
