"""How well an SAE stands in for the residual stream, on held-out text."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from saes.latents import Dictionary
from saes.lm.capture import capture, forward
from saes.lm.edit import Edit, edit
from saes.lm.model import LM
from saes.lm.tokens import Batch, pad


class Quality(NamedTuple):
    """Figures over content tokens; cross-entropies in nats a token, of the token that follows."""

    tokens: int
    l0: float
    """Mean number of latents that fire on a token."""
    variance_explained: float
    """1 - (squared error) / (squared distance from the mean), each summed over tokens."""
    variance_explained_per_token: float
    """The same ratio token by token, then the mean."""
    ce_clean: float
    ce_sae: float
    """With the SAE's reconstruction in place of the residual."""
    ce_mean: float
    """With the mean residual in place of it."""
    ce_zero: float
    """With zeros in place of it."""
    recovered_mean: float
    """(ce_mean - ce_sae) / (ce_mean - ce_clean): 1 is perfect, 0 as bad as the mean."""
    recovered_zero: float
    """The same against zero ablation, as sae-lens reports it."""
    dead: float
    """Share of latents that never fire on these tokens."""
    dense: float
    """Share of latents that fire on more than a tenth of them."""


def quality(
    lm: LM,
    dictionary: Dictionary,
    rows: Integer[np.ndarray, "rows width"],
    *,
    pass_rows: int = 16,
) -> Quality:
    """Judge an SAE on rows of token ids that were not trained on, each with its BOS.

    BOS and other special tokens keep their residual and are not counted.
    """

    def batches() -> Iterator[Batch]:
        for start in range(0, len(rows), pass_rows):
            yield pad(lm, rows[start : start + pass_rows].astype(np.int64))

    site = dictionary.site
    mean = _mean(lm, site, batches())
    errors, distances, l0 = [], [], []
    fired = torch.zeros(dictionary.d_sae, device=lm.device)

    def reconstruct(x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        z = dictionary.encode(x)
        out = dictionary.decode(z)
        errors.append((x - out).double().square().sum(-1))
        distances.append((x - mean).double().square().sum(-1))
        l0.append((z != 0).sum(-1))
        fired.add_((z != 0).sum(0))
        return out

    clean = _cross_entropy(lm, site, batches(), None)
    with_sae = _cross_entropy(lm, site, batches(), reconstruct)
    with_mean = _cross_entropy(lm, site, batches(), lambda x: mean.expand_as(x))
    with_zero = _cross_entropy(lm, site, batches(), torch.zeros_like)
    error, distance = torch.cat(errors), torch.cat(distances)
    share = fired / len(error)
    return Quality(
        tokens=len(error),
        l0=float(torch.cat(l0).double().mean()),
        variance_explained=float(1 - error.sum() / distance.sum()),
        variance_explained_per_token=float((1 - error / distance).mean()),
        ce_clean=clean,
        ce_sae=with_sae,
        ce_mean=with_mean,
        ce_zero=with_zero,
        recovered_mean=(with_mean - with_sae) / (with_mean - clean),
        recovered_zero=(with_zero - with_sae) / (with_zero - clean),
        dead=float((fired == 0).double().mean()),
        dense=float((share > 0.1).double().mean()),
    )


def _mean(lm: LM, site: str, batches: Iterator[Batch]) -> Float[Tensor, " d_model"]:
    """Mean residual over content tokens."""
    total, count = torch.zeros(lm.d_model, dtype=torch.float64, device=lm.device), 0
    for batch in batches:
        x = capture(lm, batch, [site])[site][batch.content]
        total += x.double().sum(0)
        count += len(x)
    return (total / count).float()


def _cross_entropy(
    lm: LM, site: str, batches: Iterator[Batch], replace: Callable[[Tensor], Tensor] | None
) -> float:
    """Mean loss of predicting the next token at content positions, the residual there replaced."""
    total, count = 0.0, 0
    for batch in batches:
        with edit(lm, site, _at(batch, replace)):
            logits = forward(lm, batch).logits[:, :-1]
        scored = batch.content[:, :-1] & batch.attention[:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits[scored].float(), batch.ids[:, 1:][scored], reduction="none"
        )
        total += float(losses.double().sum())
        count += len(losses)
    return total / count


def _at(batch: Batch, replace: Callable[[Tensor], Tensor] | None) -> Edit:
    """The edit that replaces content positions and leaves the others."""

    def fn(h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if replace is None:
            return h
        new = h.clone()
        new[batch.content] = replace(h[batch.content].float()).to(h.dtype)
        return new

    return fn
