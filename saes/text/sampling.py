"""Text sampled from the language model itself: rows of tokens that follow BOS, at temperature 1.

For a model whose training text is not to be had. A row is an exact sample of what the model expects
of a row of packed text: an EOS in it is followed by whatever the model puts after one.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from saes.errors import UserError
from saes.lm.model import LM

BLOCK = 128  # rows that are sampled together


def sample_block(
    lm: LM, width: int, *, seed: tuple[int, ...], rows: int = BLOCK
) -> Integer[np.ndarray, "rows width"]:
    """Rows of `width` tokens that follow BOS (or, without BOS, that open with EOS).

    The rows are a function of the seed and of the model's logits.

    Raises:
        UserError: the model has neither BOS nor EOS, or its logits are not finite.
    """
    bos, eos = lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id
    start: Any = eos if bos is None else bos
    if start is None:
        raise UserError(f"{lm.name} has neither BOS nor EOS to sample from; give it a text")
    uniform = np.random.default_rng(seed).random((width, rows))
    first = torch.full((rows, 1), start, device=lm.device)
    tokens = [] if bos is not None else [first]
    for step in _generate(lm, first, torch.from_numpy(uniform).to(lm.device)):
        tokens.append(step)
        if len(tokens) == width:
            break
    return torch.cat(tokens, dim=1).cpu().numpy()


class _Layer(DynamicLayer):
    """Keys and values of one layer, written in place: appending by copy takes most of the time."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity, self._length = capacity, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append one position; all positions so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._all = [
                x.new_empty((*x.shape[:-2], self._capacity, x.shape[-1]))
                for x in (key_states, value_states)
            ]
        begin, self._length = self._length, self._length + key_states.shape[-2]
        for whole, new in zip(self._all, (key_states, value_states), strict=True):
            whole[..., begin : self._length, :] = new
        self.keys, self.values = (whole[..., : self._length, :] for whole in self._all)
        return self.keys, self.values


@torch.no_grad()
def _generate(
    lm: LM, token: Int[Tensor, "rows 1"], uniform: Float[Tensor, "steps rows"]
) -> Iterator[Int[Tensor, "rows 1"]]:
    """One token of every row after the other, with a cache of keys and values."""
    cache = Cache(layers=[_Layer(len(uniform)) for _ in range(lm.n_layers)])
    for u in uniform:
        logits = lm.model(input_ids=token, past_key_values=cache, use_cache=True).logits
        token = draw(logits[:, -1], u)
        yield token


def draw(logits: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]) -> Int[Tensor, "rows 1"]:
    """A token of each row by the inverse of its distribution function, in double precision.

    Raises:
        UserError: logits that are not finite.
    """
    upto = logits.float().softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    total = upto[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise UserError("the model's logits are not finite; load it in float32")
    return torch.searchsorted(upto, u[:, None] * total, right=True).clamp(max=logits.shape[1] - 1)
