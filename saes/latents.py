"""Sparse dictionaries of a site's residual stream: encode to latents, decode back.

Everything downstream uses the small `Dictionary` Protocol; sae-lens's classes stand behind it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Dictionary(Protocol):
    """A sparse autoencoder with an affine decoder: `decode(z) == z @ W_dec + constant`.

    Tensors are float32 on the dictionary's device; nothing records gradients.
    """

    @property
    def site(self) -> str: ...
    @property
    def d_in(self) -> int: ...
    @property
    def d_sae(self) -> int: ...
    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]: ...
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]: ...
    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]: ...


class Origin(NamedTuple):
    """Where an SAE was loaded from."""

    source: str
    """As it was named; of a local path the last part or the last two."""
    format: str
    """File format: sae-lens, sparsify, dictionary_learning, gemma-scope, llama-scope ..."""
    release: str | None = None
    """Release in sae-lens's registry."""
    sae_id: str | None = None
    """Its id in that release."""
    neuronpedia: str | None = None
    """Its id at Neuronpedia; `saes.registry.neuronpedia_link` makes the address."""
    revision: str | None = None
    """Commit of the hub repository."""


@dataclass(frozen=True)
class SaeLens:
    """A sae-lens inference SAE as a `Dictionary`.

    `saes.pretrained.load_sae` makes it, with everything folded into the weights that makes the
    decoder other than affine in the latents.
    """

    sae: Any
    """`sae_lens.SAE` in float32."""
    site: str
    origin: Origin | None = None

    @property
    def d_in(self) -> int:
        return self.sae.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.sae.cfg.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.sae.W_dec.detach()

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        return self.sae.encode(x.to(self.sae.W_dec))

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return self.sae.decode(z)
