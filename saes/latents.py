"""Sparse dictionaries of a site's residual stream: encode to latents, decode back.

Everything downstream uses the small `Dictionary` Protocol; sae-lens's classes stand behind it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
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


def encode_csr(dictionary: Dictionary, x: Float[Tensor, "n d_in"], chunk: int = 1024) -> csr_array:
    """Latents of residuals as a float32 CSR array of shape [n, d_sae].

    Args:
        chunk: rows that are dense at a time (`chunk * d_sae * 4` bytes).
    """
    rows, columns, values = [], [], []
    for part in x.split(chunk):
        z = dictionary.encode(part)
        row, column = z.nonzero(as_tuple=True)
        rows.append(torch.bincount(row, minlength=len(part)).cpu().numpy())
        columns.append(column.to(torch.int32).cpu().numpy())
        values.append(z[row, column].float().cpu().numpy())
    indptr = np.concatenate([[0], np.concatenate(rows).cumsum()])
    parts = (np.concatenate(values), np.concatenate(columns), indptr)
    return csr_array(parts, shape=(len(x), dictionary.d_sae))
