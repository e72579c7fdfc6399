"""Masks of named positions of a batch, right for padding on either side.

Positions count the tokens of a text from 0, BOS included and padding not.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saes.errors import UserError
from saes.lm.model import LM
from saes.lm.tokens import Batch, with_bos

Offsets = list[tuple[int, int]]


def ordinals(batch: Batch) -> Int[Tensor, "batch pos"]:
    """The number of each token in its text; -1 at padding."""
    return torch.where(batch.attention, batch.attention.long().cumsum(-1) - 1, -1)


def special(lm: LM, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """BOS and all other special tokens, padding aside."""
    ids = torch.tensor(lm.tokenizer.all_special_ids, device=batch.ids.device)
    return torch.isin(batch.ids, ids) & batch.attention


def token_at(batch: Batch, index: int | Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """One token of each text: 0 the first, -1 the last (of a prompt: the last prompt token).

    Args:
        index: for all rows, or one for each row (the last prompt token where an answer follows
            is the prompt's length less 1).

    Raises:
        UserError: a text has no such token.
    """
    lengths = batch.attention.sum(-1)
    wanted = torch.as_tensor(index, device=lengths.device).expand_as(lengths)
    found = torch.where(wanted < 0, lengths + wanted, wanted)
    if (outside := (found < 0) | (found >= lengths)).any():
        row = int(outside.nonzero()[0])
        raise UserError(
            f"row {row} has no token {int(wanted[row])}: its text has {int(lengths[row])} tokens"
        )
    return ordinals(batch) == found[:, None]


def tokens_from(batch: Batch, k: int) -> Bool[Tensor, "batch pos"]:
    """All tokens of each text from the k-th on (none of a shorter text).

    Raises:
        UserError: k is negative.
    """
    if k < 0:
        raise UserError(f"tokens are counted from 0; there is no token {k} to start from")
    return ordinals(batch) >= k


def span(
    lm: LM, batch: Batch, texts: Sequence[str], spans: Sequence[tuple[int, int]]
) -> Bool[Tensor, "batch pos"]:
    """The tokens that hold any character of a span of each text.

    Args:
        texts: what the token ids were made from, by `tokenize` or (`chat_text`) by `chat`; row r
            of the batch is `texts[batch.rows[r]]`.
        spans: for each text, its first character and the one after its last, `text[start:end]`.

    Raises:
        UserError: a span that is empty or outside its text, or was cut off with the text's end;
            texts other than those of the batch; a tokenizer without character offsets.
    """
    assert len(texts) == len(spans), f"{len(texts)} texts, {len(spans)} spans"
    mask = torch.zeros_like(batch.attention)
    for row, text in enumerate(batch.rows):
        start, end = spans[text]
        if not 0 <= start < end <= len(texts[text]):
            raise UserError(
                f"span {start}:{end} of text {text} is empty or outside its "
                f"{len(texts[text])} characters"
            )
        places = offsets(lm, texts[text], batch.ids[row][batch.attention[row]].tolist(), text)
        hit = [first < end and last > start for first, last in places]
        if not any(hit):
            raise UserError(
                f"no token of text {text} holds its characters {start}:{end}; the text was cut to "
                f"{len(places)} tokens, or the tokenizer leaves them out"
            )
        mask[row, batch.attention[row]] = torch.tensor(hit, device=mask.device)
    return mask


def role_colon(
    lm: LM, batch: Batch, texts: Sequence[str], role: str = "Assistant"
) -> Bool[Tensor, "batch pos"]:
    """The ":" behind the last line of each text that begins with a role, as in "Assistant: ...".

    Args:
        texts: as for `span`.

    Raises:
        UserError: a text without such a line, and as for `span`.
    """
    spans = [(0, 1)] * len(texts)
    for text in batch.rows:
        spans[text] = role_span(texts[text], role, text)
    return span(lm, batch, texts, spans)


def role_span(text: str, role: str, name: int | str) -> tuple[int, int]:
    """The ":" behind the last line of a text that begins with a role: its first and next character.

    Args:
        name: of the text, for messages.

    Raises:
        UserError: there is no such line.
    """
    found = list(re.finditer(rf"^[ \t]*{re.escape(role)}:", text, re.MULTILINE))
    if not found:
        raise UserError(f"text {name} ({text[:40]!r}) has no line that begins with {role + ':'!r}")
    return found[-1].end() - 1, found[-1].end()


def offsets(lm: LM, text: str, ids: list[int], name: int | str) -> Offsets:
    """Which characters each token holds: the first, and the one after the last.

    Args:
        ids: token ids of the text, BOS included, or the first of them.
        name: of the text, for messages.

    Returns:
        A pair for each id; (0, 0) for BOS and its like.

    Raises:
        UserError: ids of another text, or a tokenizer without character offsets.
    """
    if not lm.tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {lm.name} ({type(lm.tokenizer).__name__}) gives no character "
            "offsets; mark tokens by their number instead (token_at, tokens_from)"
        )
    for specials in (True, False):
        coded = cast("Any", lm.tokenizer)(
            text, add_special_tokens=specials, return_offsets_mapping=True, verbose=False
        )
        made, places = list(coded["input_ids"]), [(a, b) for a, b in coded["offset_mapping"]]
        added = len(with_bos(lm, made)) - len(made)
        made, places = with_bos(lm, made), [(0, 0)] * added + places[max(0, -added) :]
        if made[: len(ids)] == ids:
            return places[: len(ids)]
    raise UserError(
        f"the tokens of text {name} ({text[:40]!r}) are not those in the batch; give the texts "
        "that were tokenized, in their order"
    )
