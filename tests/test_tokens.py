"""`saes.lm.tokens`: BOS, truncation, batches and the content mask."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from saes.errors import UserError
from saes.lm.model import LM
from saes.lm.tokens import batches, pad, tokenize

TEXTS = ["The door stood open.", "Rain", "She read the letter twice, and put it back."]


def test_tokens_are_the_tokenizers_with_one_bos(tiny_lm: LM) -> None:
    ids, truncated = tokenize(tiny_lm, TEXTS)
    assert ids == [tiny_lm.tokenizer(t)["input_ids"] for t in TEXTS]
    assert all(row[0] == 1 and row[1] != 1 for row in ids)
    assert truncated == 0
    assert tokenize(tiny_lm, []) == ([], 0)


def test_bos_is_added_if_the_tokenizer_has_one_and_did_not(
    tiny_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    bare = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str())
    bare.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>")
    without = PreTrainedTokenizerFast(tokenizer_object=bare)
    expected = tokenize(tiny_lm, TEXTS).ids
    assert tokenize(replace(tiny_lm, tokenizer=with_bos), TEXTS).ids == expected
    assert tokenize(replace(tiny_lm, tokenizer=without), TEXTS).ids == [r[1:] for r in expected]


def test_bos_is_not_doubled_in_a_text_that_is_written_with_it(tiny_lm: LM) -> None:
    """As chat templates render it."""
    assert tokenize(tiny_lm, ["<s>Rain"]).ids == tokenize(tiny_lm, ["Rain"]).ids


def test_long_texts_are_cut_and_counted(tiny_lm: LM) -> None:
    ids, truncated = tokenize(tiny_lm, ["x " * 400, "short"])
    assert truncated == 1
    assert len(ids[0]) == tiny_lm.context == 256


@pytest.mark.parametrize("text", ["", "<s>", "</s></s>"])
def test_a_text_without_content_is_refused(tiny_lm: LM, text: str) -> None:
    with pytest.raises(UserError, match="text 1 "):
        tokenize(tiny_lm, ["fine", text])


@pytest.mark.parametrize("side", ["left", "right"])
def test_content_leaves_out_padding_specials_and_the_first_token(
    tiny_lm: LM, side: Literal["left", "right"]
) -> None:
    # 0 is <pad>, 1 is <s>, 2 is </s>; the second text has no BOS
    batch = pad(tiny_lm, [[1, 50, 2, 60, 70], [40, 41, 42]], side=side)
    row = {"left": [0, 0, 40, 41, 42], "right": [40, 41, 42, 0, 0]}[side]
    mask = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0]}[side]
    content = {"left": [0, 0, 0, 1, 1], "right": [0, 1, 1, 0, 0]}[side]
    assert batch.ids.tolist() == [[1, 50, 2, 60, 70], row]
    assert batch.attention.int().tolist() == [[1, 1, 1, 1, 1], mask]
    assert batch.content.int().tolist() == [[0, 1, 0, 1, 1], content]
    assert batch.rows == (0, 1)


def test_added_special_tokens_are_not_content(
    tiny_lm: LM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>")]})
    lm = replace(tiny_lm, tokenizer=tokenizer)
    ids = tokenize(lm, ["one<|user|>two"]).ids
    batch = pad(lm, ids)
    marked = batch.ids == tokenizer.convert_tokens_to_ids("<|user|>")
    assert marked.sum() == 1
    assert not batch.content[marked].any()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    batch_tokens=st.integers(1, 200),
    side=st.sampled_from(["left", "right"]),
)
def test_batches_hold_every_text_once_and_fit(
    tiny_lm: LM, lengths: list[int], batch_tokens: int, side: Literal["left", "right"]
) -> None:
    ids = [[3 + (i + j) % 200 for j in range(n)] for i, n in enumerate(lengths)]
    seen: dict[int, list[int]] = {}
    for batch in batches(tiny_lm, ids, batch_tokens=batch_tokens, side=side):
        assert batch.ids.numel() <= batch_tokens or len(batch.rows) == 1
        for i, row, attention in zip(batch.rows, batch.ids, batch.attention, strict=True):
            assert i not in seen
            seen[i] = row[attention].tolist()
        assert not batch.ids[~batch.attention].any()
    assert [seen[i] for i in range(len(ids))] == ids


def test_batches_are_on_the_models_device_and_typed(tiny_lm: LM) -> None:
    batch = next(batches(tiny_lm, [[1, 5, 6]]))
    assert batch.ids.dtype == torch.int64
    assert batch.attention.dtype == batch.content.dtype == torch.bool
    assert batch.ids.device == tiny_lm.device
