"""Cosines of decoder rows with vectors: planted features, scipy as the reference."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import percentileofscore

from discovery.compare import Pick, compare, decoder_cosines, percentile
from discovery.contrast import project_out

SITE = "blocks.1.hook_resid_post"


@pytest.fixture
def world():
    """Two concepts in 16 dimensions: latent 7 is concept 0's vector plus much of a neutral axis."""
    rng = np.random.default_rng(0)
    neutral = np.linalg.qr(rng.normal(size=(16, 2)))[0].T
    vectors = project_out(rng.normal(size=(2, 16)), neutral)
    decoder = rng.normal(size=(200, 16))
    decoder[7] = 2 * vectors[0] + 30 * neutral[1]
    decoder[8] = -5 * vectors[1]
    return vectors, neutral, decoder.astype(np.float32)


def test_cosines_equal_scipy_and_ignore_scale(world):
    vectors, neutral, decoder = world
    ours = decoder_cosines(vectors, neutral, decoder)
    np.testing.assert_allclose(
        ours, 1 - cdist(vectors, project_out(decoder, neutral), "cosine"), atol=1e-6
    )
    np.testing.assert_allclose(
        decoder_cosines(3 * vectors, np.zeros((0, 16)), 5 * decoder),
        1 - cdist(vectors, decoder, "cosine"),
        atol=1e-6,
    )


def test_chunks_of_rows_change_nothing(world, monkeypatch):
    whole = decoder_cosines(*world)
    monkeypatch.setattr("discovery.compare._ROWS", 33)
    np.testing.assert_allclose(decoder_cosines(*world), whole, atol=1e-12)


def test_a_row_inside_the_neutral_directions_has_no_cosine(world):
    vectors, neutral, decoder = world
    decoder[3], decoder[4] = 4 * neutral[0] - neutral[1], 0
    np.testing.assert_array_equal(decoder_cosines(vectors, neutral, decoder)[:, 3:5], 0)


def test_planted_features_stand_out_of_the_null(world):
    vectors, neutral, decoder = world
    picks = [
        Pick("calm", 7, [(7, 1.0)], 0.9),
        Pick("angry", 8, [(8, -2.0), (9, 0.0)], 0.8),
    ]
    calm, angry = compare(SITE, picks, vectors, neutral, decoder)
    assert calm.cosine == pytest.approx(1, abs=1e-5)
    assert calm.set_cosine == pytest.approx(1, abs=1e-5)
    assert (calm.nearest_latent, calm.nearest_cosine) == (7, calm.cosine)
    assert calm.percentile == pytest.approx(99.75)
    assert angry.cosine == pytest.approx(-1, abs=1e-5)
    assert angry.set_cosine == pytest.approx(1, abs=1e-5)
    assert angry.percentile == pytest.approx(0.25)
    assert angry.nearest_latent != 8
    null = decoder_cosines(vectors, neutral, decoder)[0]
    assert calm.null_mean == pytest.approx(null.mean())
    assert (calm.null_low, calm.null_high) == pytest.approx(np.percentile(null, [2.5, 97.5]))
    assert (calm.site, calm.latent, calm.ceiling, angry.concept) == (SITE, 7, 0.9, "angry")


def test_set_direction_weights_the_unscaled_rows(world):
    vectors, neutral, decoder = world
    members = [(1, 0.5), (2, -1.5), (7, 0.1)]
    written = sum(weight * decoder[latent] for latent, weight in members)
    row, _ = compare(
        SITE, [Pick("a", 0, members, 1.0), Pick("b", 0, members, 1.0)], vectors, neutral, decoder
    )
    expected = 1 - cdist(vectors[:1], project_out(written[None], neutral), "cosine")
    assert row.set_cosine == pytest.approx(expected.item(), abs=1e-6)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1), st.sampled_from([0.25, 0.75]))
def test_percentile_equals_scipy(values, value):
    null = np.array(values)
    expected = percentileofscore(null, value, kind="mean")
    assert percentile(value, null) == pytest.approx(expected)
