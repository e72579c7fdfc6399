"""Deterministic, resumable streams of shuffled residuals, several sites from each model pass.

Order is a function of the seed alone. The source is cut into blocks (here: rows of tokens; in
`saes.stream.shards`: runs of stored tokens). Each epoch permutes all blocks anew; the epochs follow
each other as one endless sequence of tokens, which is cut into chunks of some whole batches. The
tokens of a chunk are permuted together (where an epoch ends in it, those before and those after)
and leave in batches, so a batch mixes as many places of the text as a chunk has blocks. Nothing is
dropped: a block at the border of two chunks is read for both, and each gets its part of it.

Order, shuffle buffer, position and random state are therefore two numbers (chunk, taken): going on
after an interruption gives the same bytes as never having stopped, because the chunk is read again.
Memory is one buffer of a chunk for each site, allocated once and filled in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from saes.errors import UserError
from saes.lm.model import LM, weights_hash
from saes.stream.rows import check_finite, check_rows, content_tokens, read_rows, rows_sha256


class About(NamedTuple):
    """What an SAE's metadata says of its training data."""

    model: str
    """Name of the language model, as `LM.name`."""
    context: int
    """Tokens of a row, BOS included."""
    prepend_bos: bool
    """Whether each row opens with BOS."""
    text: str
    """Where the text is from, in words; no path of a machine."""


class Activations(Protocol):
    """An endless, resumable source of shuffled residuals."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the residual-stream sites."""
        ...

    @property
    def batch(self) -> int:
        """Tokens of a batch."""
        ...

    @property
    def tokens_per_epoch(self) -> int:
        """Content tokens after which the source begins again."""
        ...

    @property
    def buffer_tokens(self) -> int:
        """Tokens that are shuffled together; they are in memory at every site."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the batches are."""
        ...

    @property
    def about(self) -> About:
        """What an SAE's metadata says of this data."""
        ...

    def __next__(self) -> dict[str, Float[Tensor, "batch d_model"]]:
        """The next batch of every site, float32, of the same tokens; the caller's to keep."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a stream with the same `identity`."""
        ...

    def identity(self) -> dict[str, object]:
        """Everything that decides the bytes, as JSON: weights, tokens, settings; not the place."""
        ...


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
    """Rows whose tokens are shuffled together, down to whole batches; the buffer holds their
    residuals at every site."""
    pass_rows: int = 8
    """Rows of one pass through the model: few are faster on a CPU, many on a GPU."""
    seed: int = 0
    """Seed of the order."""
    autocast: bool = False
    """Run the model in bfloat16 where that is safe (faster; residuals differ by about 0.5 %)."""

    def __post_init__(self) -> None:
        for name in ("batch", "chunk_rows", "pass_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")


class Runs(NamedTuple):
    """Consecutive content tokens, as parts of blocks; the fields are as long as there are parts."""

    block: Int[np.ndarray, " runs"]
    """Number of the block."""
    start: Int[np.ndarray, " runs"]
    """First token, counted in its block."""
    length: Int[np.ndarray, " runs"]

    def take(self, which: Any) -> "Runs":
        """Some of them, by slice or by index."""
        return Runs(self.block[which], self.start[which], self.length[which])


class ShuffledStream(ABC, Iterator[dict[str, Float[Tensor, "batch d_model"]]]):
    """The order of a stream over numbered blocks; subclasses read the blocks.

    Args:
        lengths: content tokens of each block.
        together: tokens that are shuffled together, at most; at least a batch is.
        batch: tokens of a batch.
        seed: seed of the order.

    Raises:
        UserError: all blocks hold less than a batch.
    """

    def __init__(
        self,
        sites: tuple[str, ...],
        *,
        lengths: Int[np.ndarray, " blocks"],
        together: int,
        batch: int,
        seed: int,
    ) -> None:
        self.sites, self.batch = sites, batch
        self.tokens_per_epoch = int(lengths.sum())
        if self.tokens_per_epoch < batch:
            raise UserError(
                f"{self.tokens_per_epoch} content tokens are fewer than a batch of {batch}; give "
                "more text or a smaller batch"
            )
        together = min(together, self.tokens_per_epoch)
        self.buffer_tokens = max(1, together // batch) * batch
        self._lengths, self._seed = lengths, seed
        self.chunk, self.taken = 0, 0
        self._order: tuple[int, Any, Any] = (-1, None, None)  # of the epoch that was last read
        self._buffers: dict[str, Tensor] = {}
        self._filled = False  # whether the buffers hold the present chunk

    @abstractmethod
    def _read(self, runs: Runs) -> Iterator[dict[str, Tensor]]:
        """Residuals of the tokens of these runs in parts, {site: [n, d]}, in whatever order."""

    @property
    def epoch(self) -> int:
        """How often all tokens have been given."""
        return (self.chunk * self.buffer_tokens + self.taken * self.batch) // self.tokens_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: after this many batches of this chunk."""
        return {"chunk": self.chunk, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a stream with the same arguments."""
        if state["chunk"] != self.chunk:
            self._filled = False
        self.chunk, self.taken = state["chunk"], state["taken"]

    def __next__(self) -> dict[str, Float[Tensor, "batch d_model"]]:
        if self.taken * self.batch == self.buffer_tokens:
            self.taken, self.chunk, self._filled = 0, self.chunk + 1, False
        if not self._filled:  # an error while reading must not leave the old chunk in place
            self._fill()
            self._filled = True
        start = self.taken * self.batch
        self.taken += 1
        # a copy: the buffer is filled anew while the caller still holds the batch
        return {
            site: buffer[start : start + self.batch].to(torch.float32, copy=True)
            for site, buffer in self._buffers.items()
        }

    def _fill(self) -> None:
        """Read the present chunk into the buffers, shuffled."""
        rng = np.random.default_rng([self._seed, self.chunk, 1])
        done = 0
        for runs in self._runs(self.chunk * self.buffer_tokens, self.buffer_tokens):
            place = done + torch.from_numpy(rng.permutation(int(runs.length.sum())))
            for part in self._read(runs):
                n = len(part[self.sites[0]])
                for site in self.sites:
                    self._put(site, part[site], place[:n])
                place, done = place[n:], done + n
            assert len(place) == 0, f"{len(place)} tokens were not read"

    def _runs(self, first: int, count: int) -> list[Runs]:
        """By epoch, the `count` tokens of the endless sequence that begin at token `first`."""
        epoch, at = divmod(first, self.tokens_per_epoch)
        parts: list[Runs] = []
        while count:
            size = min(count, self.tokens_per_epoch - at)
            parts.append(self._runs_of_epoch(epoch, at, at + size))
            epoch, at, count = epoch + 1, 0, count - size
        return parts

    def _runs_of_epoch(self, epoch: int, begin: int, end: int) -> Runs:
        if self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lengths))
            self._order = epoch, order, np.cumsum(self._lengths[order])
        _, order, upto = self._order
        first, last = np.searchsorted(upto, begin, side="right"), np.searchsorted(upto, end)
        blocks, ends = order[first : last + 1], upto[first : last + 1]
        begins = ends - self._lengths[blocks]
        start = np.maximum(begin - begins, 0)
        return Runs(blocks, start, np.minimum(ends, end) - begins - start)

    def _put(self, site: str, x: Float[Tensor, "n d"], place: Int[Tensor, " n"]) -> None:
        """Put residuals at their places of the site's buffer."""
        if site not in self._buffers:
            self._buffers[site] = x.new_empty((self.buffer_tokens, x.shape[1]))
        self._buffers[site].index_copy_(0, place.to(x.device), x)


class ActivationStream(ShuffledStream):
    """Endless batches of float32 residuals of content tokens from a live model.

    Args:
        rows: token ids, [rows, width], possibly a memory map.
        sites: names of residual-stream sites.
        bos: put in front of each row, or None if the rows have theirs.
        text: where the tokens are from, in words, for the metadata of SAEs.

    Raises:
        UserError: an unknown site, rows longer than the model's context, tokens outside its
            vocabulary, fewer content tokens than a batch, or a residual that is not finite.
    """

    def __init__(
        self,
        lm: LM,
        rows: Integer[np.ndarray, "rows width"],
        sites: tuple[str, ...],
        config: StreamConfig,
        *,
        bos: int | None,
        text: str = "",
    ) -> None:
        check_rows(lm, rows, sites, bos)
        lengths = content_tokens(lm, rows, bos)
        together = int(config.chunk_rows * lengths.mean())
        super().__init__(
            sites, lengths=lengths, together=together, batch=config.batch, seed=config.seed
        )
        self.lm, self.rows, self.config, self.bos = lm, rows, config, bos
        self.d_model, self.device = lm.d_model, lm.device
        self.about = about_rows(lm, rows, bos, text)

    def identity(self) -> dict[str, object]:
        """Everything that decides the bytes, as JSON."""
        return {
            "model": weights_hash(self.lm),
            "dtype": str(self.lm.model.dtype),
            "rows": rows_sha256(self.rows),
            "bos": self.bos,
            "sites": list(self.sites),
            "stream": asdict(self.config),
        }

    def _read(self, runs: Runs) -> Iterator[dict[str, Tensor]]:
        size = self.config.pass_rows
        for i in range(0, len(runs.block), size):
            some = runs.take(slice(i, i + size))
            part = read_rows(
                self.lm,
                self.rows[some.block],
                self.sites,
                self.bos,
                autocast=self.config.autocast,
            )
            check_finite(part, f"epoch {self.epoch}, chunk {self.chunk}")
            yield self._cut(part, some)

    def _cut(self, part: dict[str, Tensor], runs: Runs) -> dict[str, Tensor]:
        """Of the content of whole rows, the tokens of the runs."""
        whole = self._lengths[runs.block]
        if np.array_equal(whole, runs.length):
            return part
        at = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)
        start, length = np.repeat(runs.start, whole), np.repeat(runs.length, whole)
        keep = torch.from_numpy((start <= at) & (at < start + length)).to(self.device)
        return {site: x[keep] for site, x in part.items()}


def about_rows(
    lm: LM, rows: Integer[np.ndarray, "rows width"], bos: int | None, text: str
) -> About:
    """What to say of residuals of these rows."""
    own = lm.tokenizer.bos_token_id
    opens = bos is not None or (own is not None and int(rows[0, 0]) == own)
    return About(lm.name, rows.shape[1] + (bos is not None), opens, text)
