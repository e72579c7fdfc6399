"""A deterministic, resumable stream of shuffled residuals, several sites from each model pass.

Order is a function of the seed alone. Rows of tokens are permuted anew each epoch and taken in
chunks; the content tokens of a chunk are permuted together and leave in batches, so a batch mixes
tokens of as many texts as a chunk has rows. What does not fill a last batch is dropped.

The state is therefore three numbers (epoch, chunk, batch), and going on after an interruption
gives the same bytes as never having stopped: the chunk is computed again.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from saes.errors import UserError
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import pad


def rows_of(
    stream: Integer[np.ndarray, " tokens"], width: int
) -> Integer[np.ndarray, "rows width"]:
    """A flat token stream as rows of `width` tokens, without a copy; the rest is left off.

    Raises:
        UserError: the stream is shorter than one row.
    """
    rows = len(stream) // width
    if rows == 0:
        raise UserError(f"the token stream has {len(stream)} tokens, fewer than a row of {width}")
    return stream[: rows * width].reshape(rows, width)


@dataclass(frozen=True)
class StreamConfig:
    """What decides the order and the size of the batches."""

    batch: int = 2048
    """Tokens of a batch."""
    chunk_rows: int = 256
    """Rows whose tokens are shuffled together."""
    pass_rows: int = 32
    """Rows of one pass through the model."""
    seed: int = 0
    """Seed of the order."""
    autocast: bool = False
    """Run the model in bfloat16 where that is safe (faster; residuals differ by about 0.5 %)."""


class ActivationStream(Iterator[dict[str, Float[Tensor, "batch d_model"]]]):
    """Endless batches of float32 residuals of content tokens: {site: [batch, d_model]}.

    Args:
        rows: token ids, [rows, width], possibly a memory map.
        sites: names of residual-stream sites.
        bos: put in front of each row, or None if the rows have theirs.

    Raises:
        UserError: an unknown site, rows longer than the model's context, tokens outside its
            vocabulary, or a chunk with fewer content tokens than a batch.
    """

    def __init__(
        self,
        lm: LM,
        rows: Integer[np.ndarray, "rows width"],
        sites: tuple[str, ...],
        config: StreamConfig,
        *,
        bos: int | None,
    ) -> None:
        for site in sites:
            lm.site(site)
        width = rows.shape[1] + (bos is not None)
        if width > lm.context:
            raise UserError(f"rows of {width} tokens exceed the context of {lm.name}: {lm.context}")
        self.lm, self.rows, self.sites, self.config, self.bos = lm, rows, sites, config, bos
        self.epoch, self.chunk, self.taken = 0, 0, 0
        self._batches: dict[str, tuple[Tensor, ...]] | None = None

    def state_dict(self) -> dict[str, int]:
        """Where the stream is: after this many batches of this chunk of this epoch."""
        return {"epoch": self.epoch, "chunk": self.chunk, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state of a stream with the same arguments."""
        if (state["epoch"], state["chunk"]) != (self.epoch, self.chunk):
            self._batches = None
        self.epoch, self.chunk, self.taken = state["epoch"], state["chunk"], state["taken"]

    def __next__(self) -> dict[str, Float[Tensor, "batch d_model"]]:
        if self._batches is None:
            self._batches = self._harvest()
        if self.taken == len(self._batches[self.sites[0]]):
            self.taken, self.chunk = 0, self.chunk + 1
            if self.chunk * self.config.chunk_rows >= len(self.rows):
                self.chunk, self.epoch = 0, self.epoch + 1
            self._batches = self._harvest()
        batch = {site: self._batches[site][self.taken] for site in self.sites}
        self.taken += 1
        return batch

    def _harvest(self) -> dict[str, tuple[Tensor, ...]]:
        """The batches of the present chunk."""
        size, seed = self.config.chunk_rows, self.config.seed
        order = np.random.default_rng([seed, self.epoch]).permutation(len(self.rows))
        rows = self.rows[order[self.chunk * size : (self.chunk + 1) * size]].astype(np.int64)
        if rows.max() >= self.lm.vocab_size:
            raise UserError(
                f"token {rows.max()} is outside the vocabulary of {self.lm.name} "
                f"({self.lm.vocab_size}); the tokens were made by another tokenizer"
            )
        if self.bos is not None:
            rows = np.concatenate([np.full((len(rows), 1), self.bos), rows], axis=1)
        parts = [
            self._read(rows[i : i + self.config.pass_rows])
            for i in range(0, len(rows), self.config.pass_rows)
        ]
        n = sum(len(part[self.sites[0]]) for part in parts)
        shuffle = np.random.default_rng([seed, self.epoch, self.chunk + 1]).permutation(n)
        whole = torch.from_numpy(shuffle[: n - n % self.config.batch]).to(self.lm.device)
        if len(whole) == 0 and self.chunk == 0:
            raise UserError(
                f"{len(rows)} rows hold {n} content tokens, fewer than a batch of "
                f"{self.config.batch}; give more text or a smaller batch"
            )
        return {
            site: torch.cat([part[site] for part in parts])[whole].split(self.config.batch)
            if len(whole)
            else ()
            for site in self.sites
        }

    def _read(self, rows: Integer[np.ndarray, "rows width"]) -> dict[str, Tensor]:
        """Residuals of the content tokens of some rows."""
        batch = pad(self.lm, rows)
        half = torch.autocast(self.lm.device.type, torch.bfloat16)
        with half if self.config.autocast else nullcontext():
            residuals = capture(self.lm, batch, self.sites)
        return {site: residuals[site][batch.content].float() for site in self.sites}
