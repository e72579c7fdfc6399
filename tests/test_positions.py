"""`saes.lm.positions`: named positions against the text they stand for, for any padding."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from saes.errors import UserError
from saes.lm.model import LM
from saes.lm.positions import ordinals, role_colon, span, special, token_at, tokens_from
from saes.lm.tokens import Batch, batches, pad, tokenize

TEXTS = (
    "Rain",
    "Human: Hi! Wie geht's? \u00dcber alles \u2014 gut.\n\nAssistant: Fine: thank you.",
    "Human: Again?\n\nAssistant: Yes.\n\nHuman: Sure?\n\nAssistant:",
)
sides = st.sampled_from(("left", "right"))
rows = st.lists(st.lists(st.integers(3, 299), min_size=1, max_size=12), min_size=1, max_size=5)
Side = Literal["left", "right"]


def marked(batch: Batch, mask: torch.Tensor) -> list[list[int]]:
    """Of each text in order, the numbers of the marked tokens, padding not counted."""
    assert not mask[~batch.attention].any()
    found = {
        text: mask[row, batch.attention[row]].nonzero().flatten().tolist()
        for row, text in enumerate(batch.rows)
    }
    return [found[text] for text in sorted(found)]


@given(ids=rows, side=sides)
def test_ordinals_count_each_text_from_0(tiny_lm: LM, ids: list[list[int]], side: Side) -> None:
    batch = pad(tiny_lm, ids, side=side)
    for row, numbers, attention in zip(ids, ordinals(batch), batch.attention, strict=True):
        assert numbers[attention].tolist() == list(range(len(row)))
        assert (numbers[~attention] == -1).all()


@given(ids=rows, side=sides, data=st.data())
def test_token_at(tiny_lm: LM, ids: list[list[int]], side: Side, data: st.DataObject) -> None:
    batch = pad(tiny_lm, ids, side=side)
    assert batch.ids[token_at(batch, 0)].tolist() == [row[0] for row in ids]
    assert batch.ids[token_at(batch, -1)].tolist() == [row[-1] for row in ids]
    each = [data.draw(st.integers(-len(row), len(row) - 1)) for row in ids]
    found = batch.ids[token_at(batch, each)].tolist()
    assert found == [row[i] for row, i in zip(ids, each, strict=True)]


@given(ids=rows, side=sides, k=st.integers(0, 13))
def test_tokens_from(tiny_lm: LM, ids: list[list[int]], side: Side, k: int) -> None:
    batch = pad(tiny_lm, ids, side=side)
    assert marked(batch, tokens_from(batch, k)) == [list(range(k, len(row))) for row in ids]


@pytest.mark.parametrize("side", ["left", "right"])
def test_special_is_what_content_leaves_out(tiny_lm: LM, side: Side) -> None:
    batch = pad(tiny_lm, [[1, 50, 2, 60, 70], [1, 41, 0]], side=side)  # <s> </s> and a true <pad>
    assert marked(batch, special(tiny_lm, batch)) == [[0, 2], [0, 2]]
    assert not (special(tiny_lm, batch) & batch.content).any()


@given(text=st.sampled_from(TEXTS), side=sides, data=st.data())
def test_span_marks_the_tokens_that_hold_its_characters(
    tiny_lm: LM, text: str, side: Side, data: st.DataObject
) -> None:
    """Decoding the marked tokens gives the span, and fewer tokens do not."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    ids = tokenize(tiny_lm, ["Padding " * 9, text]).ids
    batch = pad(tiny_lm, ids, side=side)
    mask = span(tiny_lm, batch, ["Padding " * 9, text], [(0, 1), (start, end)])
    marks = mask[1].nonzero().flatten().tolist()
    assert marks == list(range(marks[0], marks[-1] + 1))
    # Bytes, since a token may hold a part of a character: all of the span, no token too many.
    pieces = [len(piece) for piece in tiny_lm.tokenizer.convert_ids_to_tokens(ids[1])[1:]]
    at = [0, *(sum(pieces[: i + 1]) for i in range(len(pieces)))]
    first, last = marked(batch, mask)[1][0] - 1, marked(batch, mask)[1][-1] - 1
    lo, hi = len(text[:start].encode()), len(text[:end].encode())
    assert at[first] <= lo < at[first + 1]
    assert at[last] < hi <= at[last + 1]


def test_span_takes_each_rows_own_text(tiny_lm: LM) -> None:
    """Batches come longest first."""
    spans = [(0, 4), (0, 6), (7, 12)]  # of each text of TEXTS
    for batch in batches(tiny_lm, tokenize(tiny_lm, TEXTS).ids, side="left"):
        assert batch.rows == (1, 2, 0)
        mask = span(tiny_lm, batch, TEXTS, spans)
        words = [tiny_lm.tokenizer.decode(batch.ids[row, mask[row]]) for row in range(3)]
        assert words == ["Human:", "Again", "Rain"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_colon_behind_the_last_role(tiny_lm: LM, side: Side) -> None:
    texts = TEXTS[1:]
    ids = tokenize(tiny_lm, texts).ids
    batch = pad(tiny_lm, ids, side=side)
    mask = role_colon(tiny_lm, batch, texts)
    assert mask.sum(-1).tolist() == [1, 1]
    for row, text in enumerate(texts):
        (number,) = marked(batch, mask)[row]
        before = tiny_lm.tokenizer.decode(ids[row][1 : number + 1])
        assert before == text[: text.rindex("Assistant:") + len("Assistant:")]
    assert torch.equal(mask[1:], token_at(batch, -1)[1:])  # the last prompt token here
    human = role_colon(tiny_lm, batch, texts, "Human")
    before = tiny_lm.tokenizer.decode(ids[1][1 : marked(batch, human)[1][0] + 1])
    assert before == texts[1][: texts[1].rindex("Human:") + len("Human:")]


def test_spans_without_and_with_added_bos(
    tiny_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    bare = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    bare.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for bos, first in (("<s>", 1), (None, 0)):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=bos)
        lm = replace(tiny_lm, tokenizer=tokenizer)
        batch = pad(lm, tokenize(lm, ["Rain came"]).ids)
        assert marked(batch, span(lm, batch, ["Rain came"], [(0, 1)])) == [[first]]


def test_a_span_of_a_text_that_is_written_with_its_bos(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, tokenize(tiny_lm, ["<s>Rain"]).ids)
    assert marked(batch, span(tiny_lm, batch, ["<s>Rain"], [(3, 4)])) == [[1]]
    assert marked(batch, span(tiny_lm, batch, ["<s>Rain"], [(0, 3)])) == [[0]]


@pytest.mark.parametrize("wrong", [(2, 2), (0, 5), (-1, 2), (3, 1)])
def test_a_span_outside_its_text(tiny_lm: LM, wrong: tuple[int, int]) -> None:
    batch = pad(tiny_lm, tokenize(tiny_lm, ["Rain"]).ids)
    with pytest.raises(UserError, match=rf"span {wrong[0]}:{wrong[1]} of text 0"):
        span(tiny_lm, batch, ["Rain"], [wrong])


def test_a_span_that_was_cut_off(tiny_lm: LM) -> None:
    text = "x " * 400
    batch = pad(tiny_lm, tokenize(tiny_lm, [text]).ids)
    assert span(tiny_lm, batch, [text], [(0, 1)]).sum() == 1
    with pytest.raises(UserError, match=r"text 0 holds its characters 798:799.*256 tokens"):
        span(tiny_lm, batch, [text], [(798, 799)])


def test_texts_of_another_batch(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, tokenize(tiny_lm, ["Rain"]).ids)
    with pytest.raises(UserError, match=r"text 0 \('Snow'\) are not those"):
        span(tiny_lm, batch, ["Snow"], [(0, 1)])


def test_a_tokenizer_without_offsets(tiny_lm: LM) -> None:
    from transformers import ByT5Tokenizer

    lm = replace(tiny_lm, tokenizer=ByT5Tokenizer())
    with pytest.raises(UserError, match=r"ByT5Tokenizer.*no character offsets"):
        span(lm, pad(tiny_lm, [[5, 6]]), ["ab"], [(0, 1)])


def test_tokens_that_are_not_there(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, [[1, 5, 6], [1, 7]])
    for index in (2, -3, [0, 2]):
        with pytest.raises(UserError, match=r"row 1 has no token -?\d: its text has 2 tokens"):
            token_at(batch, index)
    with pytest.raises(UserError, match="no token -1"):
        tokens_from(batch, -1)
    with pytest.raises(UserError, match=r"text 0 \('Rain'\) has no line .* 'Judge:'"):
        role_colon(tiny_lm, pad(tiny_lm, tokenize(tiny_lm, ["Rain"]).ids), ["Rain"], "Judge")
