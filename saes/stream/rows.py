"""Rows of token ids, and the residuals of their content tokens.

A row is token ids of one width without padding. BOS is either in front of each row already or put
there on reading; special tokens and the first position are never content (`saes.lm.tokens`).
"""

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import pad


def check_rows(
    lm: LM, rows: Integer[np.ndarray, "rows width"], sites: tuple[str, ...], bos: int | None
) -> None:
    """Refuse rows and sites that the model does not have; reads all rows.

    Raises:
        UserError: an unknown site, no rows, rows longer than the model's context, or a token
            outside its vocabulary.
    """
    for site in sites:
        lm.site(site)
    if not sites or len(rows) == 0:
        raise UserError("give at least one site and one row of tokens")
    width = rows.shape[1] + (bos is not None)
    if width > lm.context:
        raise UserError(f"rows of {width} tokens exceed the context of {lm.name}: {lm.context}")
    highest = max(int(part.max()) for part in _pieces(rows))
    if highest >= lm.vocab_size:
        raise UserError(
            f"token {highest} is outside the vocabulary of {lm.name} ({lm.vocab_size}); the tokens "
            "were made by another tokenizer"
        )


def content_tokens(
    lm: LM, rows: Integer[np.ndarray, "rows width"], bos: int | None
) -> Int[np.ndarray, " rows"]:
    """How many tokens of each row `saes.lm.tokens.pad` counts as content."""
    special = lm.tokenizer.all_special_ids
    first = 0 if bos is not None else 1  # without a BOS in front, the first of its text
    parts = [(~np.isin(part[:, first:], special)).sum(1) for part in _pieces(rows)]
    return np.concatenate(parts)


def read_rows(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    sites: tuple[str, ...],
    bos: int | None,
    *,
    autocast: bool,
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """Residuals of the content tokens of rows that `check_rows` passed, in the stream's dtype."""
    ids = rows.astype(np.int64)
    if bos is not None:
        ids = np.concatenate([np.full((len(ids), 1), bos), ids], axis=1)
    batch = pad(lm, ids)
    half = torch.autocast(lm.device.type, torch.bfloat16) if autocast else nullcontext()
    with half:
        residuals = capture(lm, batch, sites)
    return {site: residuals[site][batch.content] for site in sites}


def read_all(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    sites: tuple[str, ...],
    bos: int | None,
    *,
    pass_rows: int,
    autocast: bool,
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """Residuals of the content tokens of rows that fit into memory, in order, float32.

    Args:
        pass_rows: rows of one pass through the model.

    Raises:
        UserError: as `check_rows`.
    """
    check_rows(lm, rows, sites, bos)
    parts = [
        read_rows(lm, rows[i : i + pass_rows], sites, bos, autocast=autocast)
        for i in range(0, len(rows), pass_rows)
    ]
    return {site: torch.cat([part[site] for part in parts]).float() for site in sites}


def check_finite(residuals: dict[str, Float[Tensor, "tokens d_model"]], where: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: names the site and `where`.
    """
    for site, x in residuals.items():
        if bool(x.sum(dtype=torch.float32).isfinite()):
            continue  # five times faster; only huge values make the sum of finite ones infinite
        if not bool(torch.isfinite(x).all()):
            raise UserError(
                f"a residual at {site} is not finite ({where}); the model overflows in this dtype "
                "or its weights are damaged: try float32"
            )


def rows_sha256(rows: Integer[np.ndarray, "rows width"]) -> str:
    """SHA-256 of the ids of all rows and their shape, hex; reads a memory map piece by piece."""
    total = hashlib.sha256(f"{rows.shape} {rows.dtype.str}".encode())
    for part in _pieces(rows):
        total.update(np.ascontiguousarray(part).data)
    return total.hexdigest()


def _pieces(
    rows: Integer[np.ndarray, "rows width"],
) -> Iterator[Integer[np.ndarray, "part width"]]:
    """Runs of rows of about 16 MiB, of what may be a memory map."""
    step = max(1, (1 << 24) // max(1, rows[:1].nbytes))
    return (rows[i : i + step] for i in range(0, len(rows), step))
