"""Pooled activations against Hugging Face's own hidden states and sae-lens, one text at a time."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
import torch

from discovery import pooling
from discovery.captured import EMBEDDING, Captured, save, site_of, view
from discovery.corpora.rows import Text
from discovery.pooling import capture_texts, pool_latents, pool_residuals
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.tokens import batches
from saes.pretrained import load_sae

if TYPE_CHECKING:
    from saes.lm.model import LM

PART = "She read the letter twice, folded it, and put it back. Rain came; the lane was a river. "


def text(name: str, kind: str, content: str) -> Text:
    concepts = () if kind == "neutral" else ("calm", "at ease")
    return Text(name, content, concepts, kind, f"topic of {kind}", "a", "packaged")


# In the tiny tokenizer's tokens the stories and the neutral text have more than 100, the rest less.
TEXTS = [
    text("first/1", "selection", PART * 3),
    text("mention", "lexical", "Entry nine: calm."),
    text("hard/1", "confirmation", "The door stood open. " * 9),
    text("first/2", "selection", PART[::-1] * 2),
    text("situation", "situations", "I counted the coins again, 14 of them."),
    text("neutral", "neutral", "At nine the train left. " * 8),
]


@pytest.fixture(scope="module")
def dictionaries(tiny_sae_folders: dict[str, Path]) -> list[Dictionary]:
    return [load_sae(folder, d_model=32) for folder in tiny_sae_folders.values()]


@pytest.fixture(scope="module")
def captured(tiny_lm: "LM", dictionaries: list[Dictionary]) -> Captured:
    return capture_texts(tiny_lm, dictionaries, TEXTS, sites=["blocks.3.hook_resid_pre"])


class Reference(NamedTuple):
    residuals: dict[str, torch.Tensor]  # of the content tokens
    latents: dict[str, torch.Tensor]


def reference(lm: "LM", dictionaries: list[Dictionary], content: str) -> Reference:
    """One text alone, unpadded, through Hugging Face's `output_hidden_states` and sae-lens."""
    ids = torch.tensor([lm.tokenizer(content)["input_ids"]])
    with torch.no_grad():
        hidden = lm.model(ids, output_hidden_states=True).hidden_states
    states = {"blocks.0.hook_resid_pre": hidden[0]}
    for layer in range(1, 4):
        states[f"blocks.{layer - 1}.hook_resid_post"] = hidden[layer]
        states[f"blocks.{layer}.hook_resid_pre"] = hidden[layer]
    residuals = {site: state[0, 1:] for site, state in states.items()}  # without BOS
    latents = {d.site: d.sae.encode(residuals[d.site]) for d in dictionaries}  # type: ignore[attr-defined]
    return Reference(residuals, latents)


def test_residual_of_the_pooled_tokens_alone() -> None:
    resid = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
    resid[0, 0] = torch.nan  # padding may hold anything
    pooled = torch.tensor([[False, True, False, True], [False, False, True, False]])
    expected = torch.stack([resid[0, 1] + resid[0, 3], resid[1, 2]])
    torch.testing.assert_close(pool_residuals(resid, pooled, "sum"), expected)
    torch.testing.assert_close(pool_residuals(resid, pooled, "max"), resid[[0, 1], [3, 2]])
    half = pool_residuals(resid.bfloat16(), pooled, "sum")
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected)


def test_against_one_text_at_a_time(
    tiny_lm: "LM", dictionaries: list[Dictionary], captured: Captured
) -> None:
    norms: dict[str, list[torch.Tensor]] = {site: [] for site in captured.norms}
    for i, item in enumerate(TEXTS):
        alone = reference(tiny_lm, dictionaries, item.text)
        start = 49 if item.set in ("selection", "confirmation", "neutral") else 0
        for name, got in captured.residuals.items():
            expected = alone.residuals[site_of(name)][start:].mean(0)
            np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)
            norms[site_of(name)].append(alone.residuals[site_of(name)].norm(dim=-1))
        for name, latents in captured.latents.items():
            expected = alone.latents[site_of(name)][start:].mean(0)
            assert expected.count_nonzero() > 8
            np.testing.assert_allclose(latents[[i]].toarray()[0], expected, rtol=1e-4, atol=1e-5)
        row = captured.texts[i]
        for name in ("id", "set", "concepts", "topic", "writer", "source", "language"):
            assert getattr(row, name) == getattr(item, name)
        assert row.tokens == len(alone.residuals[EMBEDDING])
        assert not row.truncated
    assert captured.norms == {
        site: pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
        for site, parts in norms.items()
    }
    sites = [EMBEDDING, "blocks.3.hook_resid_pre", *(d.site for d in dictionaries)]
    assert list(captured.residuals) == [view(site, "rule") for site in sites]
    assert (
        min(row.tokens for row in captured.texts if row.set in ("selection", "confirmation")) >= 100
    )
    assert captured.latents["blocks.1.hook_resid_post@rule"].dtype == np.float32
    long = "tokens from number 50 on"
    assert captured.pooled == {
        "selection": long,
        "confirmation": long,
        "neutral": long,
        "lexical": "all tokens",
        "situations": "all tokens",
    }


def assert_same(a: Captured, b: Captured) -> None:
    assert a.texts == b.texts
    assert a.norms == pytest.approx(b.norms, rel=1e-6)
    assert a.residuals.keys() == b.residuals.keys()
    for name in a.residuals:
        np.testing.assert_allclose(a.residuals[name], b.residuals[name], rtol=1e-4, atol=1e-5)
    for old, new in ((a.latents, b.latents), (a.controls, b.controls)):
        assert old.keys() == new.keys()
        for name in old:
            one, other = old[name].toarray(), new[name].toarray()
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 400])
@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_batch_size_nor_padding_side_matters(
    tiny_lm: "LM",
    dictionaries: list[Dictionary],
    captured: Captured,
    batch_tokens: int,
    side: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pooling, "batches", partial(batches, side=side))
    done: list[int] = []
    again = capture_texts(
        tiny_lm,
        dictionaries,
        TEXTS,
        sites=["blocks.3.hook_resid_pre"],
        batch_tokens=batch_tokens,
        progress=done.append,
    )
    assert_same(captured, again)
    assert sum(done) == len(TEXTS)
    assert len(done) == (len(TEXTS) if batch_tokens == 1 else 3)


def test_the_order_of_the_texts_is_kept(
    tiny_lm: "LM", dictionaries: list[Dictionary], captured: Captured
) -> None:
    turned = capture_texts(tiny_lm, dictionaries, TEXTS[::-1], sites=["blocks.3.hook_resid_pre"])
    back = Captured(
        turned.texts[::-1],
        {site: residual[::-1] for site, residual in turned.residuals.items()},
        {site: latents[::-1] for site, latents in turned.latents.items()},
        turned.norms,
    )
    assert_same(captured, back)


def test_latents_in_pieces_of_any_size_are_the_same(dictionaries: list[Dictionary]) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(30, 32)
    bounds = np.array(
        [[[0, 11], [11, 14], [14, 14], [14, 30]], [[2, 9], [13, 14], [14, 14], [20, 30]]]
    )
    z = dictionaries[0].encode(tokens)
    for chunk in (1, 4, 11, 100, None):
        got = pool_latents(dictionaries[0], tokens, bounds, ["sum", "max"], chunk)
        for part, own, way in zip(got, bounds, (torch.sum, torch.amax), strict=True):
            assert part.dtype == np.float32
            for row, (a, b) in zip(part.toarray(), own.tolist(), strict=True):
                expected = way(z[a:b], 0) if a < b else torch.zeros(128)
                np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)


def test_two_runs_write_the_same_bytes(
    tiny_lm: "LM", dictionaries: list[Dictionary], tmp_path: Path
) -> None:
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, capture_texts(tiny_lm, dictionaries, TEXTS, batch_tokens=400))
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        written.append([p.read_bytes() for p in files])
    assert len(written[0]) == 6
    assert written[0] == written[1]


def test_a_short_story_of_one_set_decides_for_both(
    tiny_lm: "LM", dictionaries: list[Dictionary], captured: Captured
) -> None:
    with_short = capture_texts(
        tiny_lm, dictionaries, [*TEXTS, text("hard/2", "confirmation", "The door stood open.")]
    )
    embedding = view(EMBEDDING, "rule")
    moved = with_short.residuals[embedding][:-1] - captured.residuals[embedding]
    stories = [item.set in ("selection", "confirmation") for item in TEXTS]
    np.testing.assert_array_equal(np.abs(moved).max(1) > 1e-3, stories)


def test_texts_longer_than_the_context_are_flagged(tiny_lm: "LM") -> None:
    fits = "q" * (tiny_lm.context - 1)
    assert len(tiny_lm.tokenizer(fits)["input_ids"]) == tiny_lm.context
    found = capture_texts(
        tiny_lm, [], [text("fits", "neutral", fits), text("cut", "neutral", fits + "q")]
    )
    assert [(row.tokens, row.truncated) for row in found.texts] == [(255, False), (255, True)]
    assert found.latents == {}


def test_what_is_refused(tiny_lm: "LM", dictionaries: list[Dictionary]) -> None:
    with pytest.raises(UserError, match=r"2 SAEs read blocks\.1\.hook_resid_post"):
        capture_texts(tiny_lm, [dictionaries[0], dictionaries[0]], TEXTS)
    with pytest.raises(UserError, match=r"blocks\.4\.hook_resid_post is out of range"):
        capture_texts(tiny_lm, [], TEXTS, sites=["blocks.4.hook_resid_post"])
