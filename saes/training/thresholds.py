"""Thresholds of JumpReLU SAEs, set on data so that the saved SAE is as sparse as the trained one.

BatchTopK and its matryoshka form choose latents by their rank within a batch, and are used with one
threshold for all latents and tokens (Bussmann et al. 2024, "BatchTopK sparse autoencoders",
arXiv 2412.06410, section 3.1). sae-lens estimates it by a running mean that starts at 0, which is
too low after a short training. Here it is the quantile of the pre-activations that gives the L0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Pre = Callable[[Float[Tensor, "n d_in"]], Float[Tensor, "n d_sae"]]


def value_above(scores: Callable[[int], Float[Tensor, "n d_sae"]], parts: int, count: int) -> float:
    """The value above which lie `count` of all scores, between that one and the next lower.

    Args:
        scores: gives part i of the scores, 0 <= i < parts; called again if need be, so that the
            scores are never held together.
        count: at least 1, fewer than there are scores.
    """
    assert count > 0
    share = 2
    while True:
        kept: list[Tensor] = []
        cut = -math.inf  # what was left out of some part lies at or below this
        for i in range(parts):
            part = scores(i).flatten()
            size = min(len(part), math.ceil(share * (count + 1) / parts))
            kept.append(part.topk(size).values)
            if size < len(part):
                cut = max(cut, float(kept[-1][-1]))
        best = torch.cat(kept)
        if len(best) > count:
            last, below = best.topk(count + 1).values[-2:].tolist()
            if below >= cut:
                return (last + below) / 2
        assert cut > -math.inf, "fewer scores than asked for"
        share *= 2


@torch.no_grad()
def calibrate(sae: Any, batches: Sequence[Float[Tensor, "_ d_in"]], l0: float) -> None:
    """Scale the thresholds of a JumpReLU SAE by one factor so that its L0 on the batches is `l0`.

    Args:
        sae: sae-lens's inference SAE; its `threshold` is changed.
        batches: residuals of the training text.
        l0: latents a token that the trained SAE fired on them; 0 leaves the thresholds alone.
    """
    tokens = sum(len(x) for x in batches)
    count = round(l0 * tokens)
    if count == 0:
        return
    # a latent with threshold 0 fires on anything positive, and no factor changes that
    base = sae.threshold.clamp(min=1e-6)

    def ratio(i: int) -> Float[Tensor, "n d_sae"]:
        pre = pre_activations(sae, batches[i])
        return torch.where(pre > 0, pre / base, -1.0)

    sae.threshold.copy_(base * max(value_above(ratio, len(batches), count), 0.0))


def pre_activations(sae: Any, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
    """What a JumpReLU SAE compares with its thresholds."""
    return sae.process_sae_in(x.to(sae.W_enc)) @ sae.W_enc + sae.b_enc
