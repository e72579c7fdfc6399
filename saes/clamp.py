"""Set, add, scale, cap or ablate latents: functions for `saes.lm.edit.edit`.

Delta form: `h + decode(z') - decode(z)`, so the part of the residual that the SAE does not
reconstruct is kept (Templeton et al. 2024, "Scaling Monosemanticity", appendix on steering). The
decoder is affine, so with one latent changed the difference is `(z' - z) * W_dec[latent]`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.edit import Edit

Mask = Bool[Tensor, "batch pos"] | None
"""Positions to edit; None edits all."""


def clamp(dictionary: Dictionary, latent: int, value: float, mask: Mask = None) -> Edit:
    """Set the latent to `value` (in the latent's own units)."""
    return _rewrite(dictionary, latent, lambda z: torch.full_like(z, value), mask)


def ablate(dictionary: Dictionary, latent: int, mask: Mask = None) -> Edit:
    """Set the latent to zero."""
    return clamp(dictionary, latent, 0.0, mask)


def scale(dictionary: Dictionary, latent: int, factor: float, mask: Mask = None) -> Edit:
    """Multiply the latent by `factor`."""
    return _rewrite(dictionary, latent, lambda z: z * factor, mask)


def cap(dictionary: Dictionary, latent: int, maximum: float, mask: Mask = None) -> Edit:
    """Lower the latent to `maximum` where it is above."""
    return _rewrite(dictionary, latent, lambda z: z.clamp(max=maximum), mask)


def add(vector: Float[Tensor, " d_model"], mask: Mask = None) -> Edit:
    """Add `vector` to the residual (steering by a direction; no dictionary involved)."""

    def fn(h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return _at(h, mask, lambda x: x + vector.to(x))

    return fn


def _rewrite(
    dictionary: Dictionary, latent: int, change: Callable[[Tensor], Tensor], mask: Mask
) -> Edit:
    """Replace the latent's values z by `change(z)`; all else in the residual stays.

    Raises:
        UserError: the dictionary has no such latent.
    """
    if not 0 <= latent < dictionary.d_sae:
        raise UserError(
            f"latent {latent} is out of range: the SAE at {dictionary.site} has "
            f"{dictionary.d_sae} latents, 0 to {dictionary.d_sae - 1}"
        )

    def delta(x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        z = dictionary.encode(x)[:, latent, None].to(x)
        return x + (change(z) - z) * dictionary.W_dec[latent].to(x)

    def fn(h: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return _at(h, mask, delta)

    return fn


def _at(h: Tensor, mask: Mask, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """`h` with `fn`, computed in float32, applied at the masked positions; a new tensor."""
    if mask is None:
        return fn(h.flatten(0, 1).float()).to(h.dtype).view_as(h)
    assert mask.shape == h.shape[:2], f"mask of shape {tuple(mask.shape)}, {tuple(h.shape[:2])}"
    mask = mask.to(h.device)
    new = h.clone()
    new[mask] = fn(h[mask].float()).to(h.dtype)
    return new
