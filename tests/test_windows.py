"""Every way of pooling, over texts that fit and texts that do not, against plain loops."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from discovery.captured import check_pooling, pooling_of, site_of
from discovery.corpora.rows import Text
from discovery.pooling import capture_texts
from discovery.windows import check_poolings, first_position, in_words, rule_starts, windows
from saes.errors import UserError
from saes.latents import Dictionary
from saes.pretrained import load_sae

if TYPE_CHECKING:
    from saes.lm.model import LM

SITE = "blocks.1.hook_resid_post"
POOLINGS = ("rule", "mean", "max", "last", "from-4", "position-2", "span", "position-She")
LINES = "Rain came; the lane was a river.\nShe: the door. \n She: read the letter twice.\n"
LONG = LINES + "The door stood open, and nobody had swept the hall. " * 5
SHORT = "My letter.\nShe: here."


def text(name: str, content: str, marked: str = "", kind: str = "selection") -> Text:
    span = (content.index(marked), content.index(marked) + len(marked)) if marked else None
    return Text(name, content, ("calm",), kind, span=span)


TEXTS = [text("a", LONG, "swept the"), text("b", SHORT), text("c", LINES, "lane", "neutral")]


@pytest.fixture(scope="module")
def dictionary(tiny_sae_folder: Path) -> Dictionary:
    return load_sae(tiny_sae_folder, d_model=32)


@pytest.fixture(scope="module")
def no_bos(tiny_lm: "LM") -> "LM":
    """The same model with a tokenizer that knows no BOS."""
    bare = Tokenizer.from_str(tiny_lm.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    bare.post_processor = processors.ByteLevel(trim_offsets=False)
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>")
    return dataclasses.replace(tiny_lm, tokenizer=tokenizer)


def tokens_of(lm: "LM", content: str) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Residuals of all content tokens, one window after the other, and their characters."""
    ids = lm.tokenizer(content, add_special_tokens=False)["input_ids"]
    ends = np.cumsum([len(lm.tokenizer.decode([i])) for i in ids]).tolist()
    places = list(zip([0, *ends[:-1]], ends, strict=True))
    if lm.tokenizer.bos_token_id is None:  # the first token is not content
        rows = [ids[at : at + 256] for at in range(0, len(ids) - 1, 255)]
        places = places[1:]
    else:
        rows = [[1, *ids[at : at + 255]] for at in range(0, len(ids), 255)]
    with torch.no_grad():
        hidden = [
            lm.model(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0, 1:]
            for row in rows
        ]
    return torch.cat(hidden), places


def expected(
    values: torch.Tensor, places: list[tuple[int, int]], item: Text, pooling: str
) -> torch.Tensor:
    start, end = item.span or (0, len(item.text))
    colon = item.text.rfind("She:") + 3
    rows = {
        "rule": slice(None),
        "mean": slice(None),
        "max": slice(None),
        "last": slice(-1, None),
        "from-4": slice(3, None),
        "position-2": slice(1, 2),
        "span": [i for i, (a, b) in enumerate(places) if a < end and b > start],
        "position-She": [i for i, (a, b) in enumerate(places) if a <= colon < b],
    }
    own = values[rows[pooling]]
    return own.amax(0) if pooling == "max" else own.mean(0)


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 600])
def test_every_pooling(
    tiny_lm: "LM", dictionary: Dictionary, long: bool, batch_tokens: int
) -> None:
    texts = [*TEXTS, text("long", LONG * 2, LONG[-40:] + LONG[:40])] if long else TEXTS
    found = capture_texts(
        tiny_lm,
        [dictionary],
        texts,
        poolings=POOLINGS,
        long="chunk" if long else "cut",
        batch_tokens=batch_tokens,
    )
    for i, item in enumerate(texts):
        resid, places = tokens_of(tiny_lm, item.text)
        assert found.texts[i].tokens == len(resid)
        assert found.texts[i].chunks == -(-len(resid) // 255)
        assert not found.texts[i].truncated
        for pooling in POOLINGS:
            got = found.residuals[f"{SITE}@{pooling}"][i]
            np.testing.assert_allclose(
                got, expected(resid, places, item, pooling), rtol=1e-4, atol=1e-5
            )
            got = found.latents[f"{SITE}@{pooling}"][[i]].toarray()[0]
            z = expected(dictionary.encode(resid), places, item, pooling)
            np.testing.assert_allclose(got, z, rtol=1e-3, atol=1e-4)
    assert {pooling_of(view) for view in found.latents} == set(POOLINGS)
    assert {site_of(view) for view in found.residuals} == found.norms.keys()
    if long:
        assert found.texts[3].chunks > 1


def test_without_bos_a_window_begins_with_the_token_before(no_bos: "LM") -> None:
    item = text("long", LONG * 2, LONG[-40:] + LONG[:40])
    poolings = [pooling for pooling in POOLINGS if pooling != "rule"]
    found = capture_texts(no_bos, [], [item], sites=[SITE], poolings=poolings, long="chunk")
    resid, places = tokens_of(no_bos, item.text)
    whole = len(no_bos.tokenizer(item.text)["input_ids"])
    assert found.texts[0].tokens == len(resid) == whole - 1
    assert found.texts[0].chunks == 2
    for pooling in poolings:
        np.testing.assert_allclose(
            found.residuals[f"{SITE}@{pooling}"][0],
            expected(resid, places, item, pooling),
            rtol=1e-4,
            atol=1e-5,
        )


def test_windows_hold_every_content_token_once(tiny_lm: "LM") -> None:
    item = text("long", LONG * 3)
    whole = tiny_lm.tokenizer(item.text)["input_ids"]
    read = windows(tiny_lm, [item, text("b", SHORT)], "chunk")
    own = [ids for ids, owner in zip(read.ids, read.text, strict=True) if owner == 0]
    assert [token for ids in own for token in ids[1:]] == whole[1:]
    assert {ids[0] for ids in read.ids} == {1}
    assert max(map(len, own)) == tiny_lm.context
    assert read.before[: len(own)].tolist() == [255 * i for i in range(len(own))]
    assert read.truncated.tolist() == [False, False]
    cut = windows(tiny_lm, [item, text("b", SHORT)])
    assert cut.ids == cut.rows
    assert cut.ids[0] == whole[:256]
    assert cut.truncated.tolist() == [True, False]
    assert windows(tiny_lm, []).ids == []


def test_special_tokens_inside_a_text_are_no_content(tiny_lm: "LM") -> None:
    read = windows(tiny_lm, [text("a", "<s>She read</s> the letter</s>")])
    alone = windows(tiny_lm, [text("a", "She read the letter")])
    assert read.tokens.tolist() == alone.tokens.tolist()


@pytest.mark.parametrize(
    ("counts", "start"), [([100], 49), ([100, 99], 0), ([250, 101, 180], 49), ([1, 300], 0)]
)
def test_the_rule_of_the_fiftieth_token(counts: list[int], start: int) -> None:
    assert first_position(counts) == start


@given(
    st.lists(
        st.tuples(st.sampled_from(["selection", "confirmation", "neutral"]), st.integers(98, 103)),
        min_size=1,
    )
)
def test_one_rule_a_corpus_and_one_for_both_story_sets(rows: list[tuple[str, int]]) -> None:
    texts = [text(str(i), "x", kind=kind) for i, (kind, _) in enumerate(rows)]
    got = rule_starts(texts, np.array([n for _, n in rows]))
    assert got.keys() == {kind for kind, _ in rows}
    for kind, start in got.items():
        mates = {"neutral"} if kind == "neutral" else {"selection", "confirmation"}
        shortest = min(n for other, n in rows if other in mates)
        assert start == (49 if shortest >= 100 else 0)
        assert in_words(start) == ("tokens from number 50 on" if start else "all tokens")


@pytest.mark.parametrize("pooling", [*POOLINGS, "from-50", "position-Dr Who", "position-助手"])
def test_names_of_poolings(pooling: str) -> None:
    check_pooling(pooling)


@pytest.mark.parametrize(
    "pooling", ["", "Mean", "from-0", "from-", "from-x", "position-", "position-0", "last-1", "a@b"]
)
def test_no_such_pooling(tiny_lm: "LM", pooling: str) -> None:
    with pytest.raises(UserError, match="is no pooling; choose rule, mean"):
        capture_texts(tiny_lm, [], TEXTS, poolings=[pooling])


@pytest.mark.parametrize(
    ("item", "pooling", "message"),
    [
        (text("b", SHORT), "from-50", r"text b has \d+ content tokens, too few .*'from-50'"),
        (text("b", SHORT), "position-50", r"text b has \d+ content tokens, too few"),
        (text("l", LONG * 2), "from-256", r"text l has 255 content tokens, too few"),
        (text("b", "No one speaks."), "position-She", "text b .* no line that begins with 'She:'"),
        (text("b", "No one.", kind="neutral"), "position-She", "neutral set, .*another pooling"),
        (text("l", LONG * 2 + "end of it", "end of it"), "span", "text l: no content token .*cut"),
        (text("e", ""), "mean", "text e .* is too short: no token is left"),
        (dataclasses.replace(text("s", SHORT), span=(3, 3)), "span", "text s: the span 3 to 3"),
        (dataclasses.replace(text("s", SHORT), span=(3, 99)), "span", "outside its 21 characters"),
    ],
)
def test_a_text_that_lacks_the_tokens_is_named(
    tiny_lm: "LM", item: Text, pooling: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        capture_texts(tiny_lm, [], [item, TEXTS[0]], poolings=[pooling])
    if pooling != "mean":
        with pytest.raises(UserError, match=message):
            check_poolings(tiny_lm, [item, TEXTS[0]], ["rule", pooling])


def test_a_span_that_no_text_has_is_refused(tiny_lm: "LM") -> None:
    bare = [dataclasses.replace(item, span=None) for item in TEXTS]
    with pytest.raises(
        UserError, match=r"no text .* has a span.*; name span_columns of the source"
    ):
        check_poolings(tiny_lm, [*bare[:2], TEXTS[2]], ["mean", "span"])  # a neutral one has
    check_poolings(tiny_lm, TEXTS, POOLINGS)


def test_texts_without_a_span_are_counted(tiny_lm: "LM") -> None:
    found = capture_texts(tiny_lm, [], TEXTS, poolings=["rule", "span"])
    assert found.pooled == {
        "selection": "all tokens; the spans, all tokens of 1 of 2 texts that have none",
        "neutral": "all tokens; the spans",
    }


def test_what_any_text_can_serve_needs_no_tokenizer(
    tiny_lm: "LM", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("discovery.windows.windows", None)
    check_poolings(tiny_lm, TEXTS, ["rule", "mean", "max", "last"])
