"""Text to token blocks: padding, BOS, and the mask of content tokens.

Special tokens and the first position of a text carry residuals of outlier norm in most models,
so they are never content.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saes.errors import UserError
from saes.lm.model import LM


class Tokenized(NamedTuple):
    """Token ids of each text, BOS included, cut to the model's context."""

    ids: list[list[int]]
    truncated: int
    """How many texts were cut."""


class Batch(NamedTuple):
    """A padded block of texts."""

    ids: Int[Tensor, "batch pos"]
    attention: Bool[Tensor, "batch pos"]
    """True at tokens, False at padding."""
    content: Bool[Tensor, "batch pos"]
    """True at tokens that are neither padding, special, nor first in their text."""
    rows: tuple[int, ...]
    """Index of each row's text."""


def tokenize(lm: LM, texts: Sequence[str]) -> Tokenized:
    """Token ids of texts, opened by one BOS if the tokenizer has any.

    Raises:
        UserError: a text has no content token.
    """
    if not texts:
        return Tokenized([], 0)
    special = set(lm.tokenizer.all_special_ids)
    ids: list[list[int]] = []
    truncated = 0
    for i, row in enumerate(lm.tokenizer(list(texts), verbose=False)["input_ids"]):
        row = with_bos(lm, row)
        if all(token in special for token in row[1:]):
            raise UserError(
                f"text {i} ({texts[i][:40]!r}) is too short: no token is left once special "
                "tokens and the first position are masked"
            )
        truncated += len(row) > lm.context
        ids.append(row[: lm.context])
    return Tokenized(ids, truncated)


def with_bos(lm: LM, ids: list[int]) -> list[int]:
    """Token ids with exactly one BOS in front, if the tokenizer has any.

    It may have added none, or one to a text that was written with it.
    """
    bos = cast("int | None", lm.tokenizer.bos_token_id)
    if bos is None:
        return ids
    while ids[:1] == [bos]:
        ids = ids[1:]
    return [bos, *ids]


def batches(
    lm: LM,
    ids: Sequence[Sequence[int]],
    *,
    batch_tokens: int = 8192,
    side: Literal["left", "right"] = "right",
) -> Iterator[Batch]:
    """Padded batches of texts of like length, longest first; the same input gives the same batches.

    Args:
        ids: token ids of each text, as `tokenize` gives them; none empty.
        batch_tokens: most tokens of a batch, padding included (a longer text goes alone).
        side: where padding goes.
    """
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    start = 0
    while start < len(order):
        width = len(ids[order[start]])
        rows = order[start : start + max(1, batch_tokens // width)]
        start += len(rows)
        yield pad(lm, [ids[i] for i in rows], rows=tuple(rows), side=side)


def pad(
    lm: LM,
    ids: Sequence[Sequence[int]] | Int[np.ndarray, "batch pos"],
    *,
    rows: tuple[int, ...] | None = None,
    side: Literal["left", "right"] = "right",
) -> Batch:
    """One batch of these token ids in this order."""
    width = max(len(row) for row in ids)
    shape = (len(ids), width)
    block, attention = np.zeros(shape, np.int64), np.zeros(shape, bool)
    first = np.zeros(shape, bool)
    for i, row in enumerate(ids):
        assert len(row) > 0, f"text {i} has no tokens"
        at = width - len(row) if side == "left" else 0
        block[i, at : at + len(row)] = row
        attention[i, at : at + len(row)] = True
        first[i, at] = True
    content = attention & ~first & ~np.isin(block, lm.tokenizer.all_special_ids)
    return Batch(
        torch.from_numpy(block).to(lm.device),
        torch.from_numpy(attention).to(lm.device),
        torch.from_numpy(content).to(lm.device),
        tuple(range(len(ids))) if rows is None else rows,
    )
