"""A sparse autoencoder's forward and backward on the chosen (row, latent) pairs alone.

Everything that is dense in the latents is avoided but one matmul, the encoder's, and that one may
run in bfloat16: it only proposes candidates, whose pre-activations are then computed again in full
precision. The work on pairs is of two kinds: dot products of table rows with batch rows (`score`),
and weighted sums of rows (`decode`, `weight_gradient`). Both add up in a fixed order, without
atomics, so the same input gives the same bytes, with the same number of threads for the matmul.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), appendix D,
describe such kernels for GPUs. Exact selection by groups: the k largest values lie in the k
groups with the largest maxima.

Shapes: rows of the batch, latents, d_in; pairs (chosen latents of all rows together).
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

GROUP = 4  # columns in a group at each level of `top_per_row`
BATCH_GROUP = 16  # latents in a group of `choose_per_batch`
CHUNK = 2**23  # pre-activations held at a time, at most, where rows choose on their own

with warnings.catch_warnings():  # torch says, once, that CSR is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [0.0], (1, 1), check_invariants=False)


class Pairs(NamedTuple):
    """Chosen pairs, sorted by row, then latent, as a CSR matrix has them."""

    starts: Int[Tensor, "rows_and_1"]
    """Where each row's pairs begin; ends with their number."""
    rows: Int[Tensor, "pairs"]
    """Row of each pair."""
    latents: Int[Tensor, "pairs"]
    """Latent of each pair."""


class Encoder(NamedTuple):
    """What pre-activations are made of: `(x @ weight.T + bias) * scale`."""

    weight: Float[Tensor, "latents d_in"]
    """A contiguous row a latent."""
    bias: Float[Tensor, "latents"]
    """Added to the product."""
    scale: Float[Tensor, "latents"] | None
    """Positive factor of each latent: the norm of its decoder row, where that counts."""


def pair_up(
    rows: Int[Tensor, "pairs"], latents: Int[Tensor, "pairs"], n_rows: int, n_latents: int
) -> tuple[Pairs, Int[Tensor, "pairs"]]:
    """Sort distinct pairs by row and latent; also the order in which they were found."""
    key, order = torch.sort(rows * n_latents + latents)
    rows = torch.div(key, n_latents, rounding_mode="floor")
    return Pairs(_starts(rows, n_rows), rows, key - rows * n_latents), order


def _starts(index: Int[Tensor, "pairs"], size: int) -> Int[Tensor, "size_and_1"]:
    """Where each value of a sorted index begins."""
    return torch.searchsorted(index, torch.arange(size + 1, device=index.device))


def score(
    pairs: Pairs, x: Float[Tensor, "rows d_in"], table: Float[Tensor, "latents d_in"]
) -> Float[Tensor, "pairs"]:
    """The dot product of each pair's row of `x` with its row of `table`."""
    pattern = torch.sparse_csr_tensor(
        pairs.starts,
        pairs.latents,
        x.new_zeros(pairs.latents.shape),
        (x.shape[0], table.shape[0]),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, x.contiguous(), table.t(), beta=0.0).values()


def decode(
    pairs: Pairs, weights: Float[Tensor, "pairs"], table: Float[Tensor, "latents d_in"]
) -> Float[Tensor, "rows d_in"]:
    """For each row, the sum over its pairs of weight times row of `table`."""
    return F.embedding_bag(
        pairs.latents,
        table,
        pairs.starts,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


class ByLatent(NamedTuple):
    """The same pairs, sorted by latent, then row."""

    order: Int[Tensor, "pairs"]
    """Of each, its place among the pairs sorted by row."""
    starts: Int[Tensor, "latents_and_1"]
    """Where each latent's pairs begin."""
    rows: Int[Tensor, "pairs"]
    """Row of each."""


def by_latent(pairs: Pairs, n_latents: int) -> ByLatent:
    """Sort pairs by latent, which makes sums over rows possible."""
    latents, order = torch.sort(pairs.latents, stable=True)
    return ByLatent(order, _starts(latents, n_latents), pairs.rows[order])


def weight_gradient(
    pairs: ByLatent, weights: Float[Tensor, "pairs"], x: Float[Tensor, "rows width"]
) -> Float[Tensor, "latents width"]:
    """For each latent, the sum over its pairs of weight times row of `x`.

    Args:
        pairs: Sorted by latent.
        weights: In the order of pairs sorted by row.
        x: What is summed.
    """
    return F.embedding_bag(
        pairs.rows,
        x,
        pairs.starts,
        mode="sum",
        per_sample_weights=weights[pairs.order],
        include_last_offset=True,
    )


class Autoencode(torch.autograd.Function):
    """Decoded sums of chosen latents, with the gradients of both weight matrices and biases.

    The gradient of a chosen latent's value is the dot product of its decoder row with the gradient
    of the output; latents that were not chosen have none, as in the dense computation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "batch d_in"],
        shift: Float[Tensor, "d_in"] | None,
        w_enc: Float[Tensor, "d_in latents"],
        b_enc: Float[Tensor, "latents"],
        w_dec: Float[Tensor, "latents d_in"],
        z: Float[Tensor, "pairs"],
        pairs: Pairs,
        rectify: bool,
    ) -> Float[Tensor, "rows d_in"]:
        """For each row, the sum of its latents' values times their decoder rows.

        Args:
            ctx: Of autograd.
            x: What was encoded; gets no gradient. Row r of the pairs encodes row `r % batch` of it,
                so that levels of a Matryoshka SAE can be decoded apart from each other.
            shift: What was taken off the input to get `x`, for its gradient; None if nothing.
            w_enc: Encoder.
            b_enc: Its bias.
            w_dec: Decoder.
            z: Pre-activations of the pairs: `x @ w_enc + b_enc`.
            pairs: Row and latent of each.
            rectify: Whether values are `relu(z)`, or z itself.
        """
        assert w_enc.shape == (x.shape[1], b_enc.shape[0])
        assert shift is None or shift.shape == x.shape[1:]
        ctx.save_for_backward(x, w_enc, w_dec, z, *pairs)
        ctx.rectify = rectify
        return decode(pairs, z.relu() if rectify else z, w_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, w_enc, w_dec, z, *rest = ctx.saved_tensors
        grad, pairs = grads[0].contiguous(), Pairs(*rest)
        dz = score(pairs, grad, w_dec)
        if ctx.rectify:
            dz = torch.where(z > 0, dz, 0.0)
            z = z.relu()
        latents = by_latent(pairs, w_dec.shape[0])
        d_dec = weight_gradient(latents, z, grad)
        latents = latents._replace(rows=latents.rows % x.shape[0])
        d_enc = weight_gradient(latents, dz, x).t()
        d_bias = weight_gradient(latents, dz, x.new_ones(x.shape[0], 1)).flatten()
        d_shift = -(w_enc @ d_bias) if ctx.needs_input_grad[1] else None
        return None, d_shift, d_enc, d_bias, d_dec, None, None, None


def choose_per_row(
    x: Float[Tensor, "rows d_in"], encoder: Encoder, k: int, *, margin: int, bfloat16: bool
) -> tuple[Pairs, Float[Tensor, "pairs"]]:
    """The k latents of each row with the largest pre-activations, and those before scaling.

    Among candidates the choice is exact. In float32 the candidates are the k themselves; in
    bfloat16 they are the `k + margin` best by pre-activations rounded to 8 bits, so that a latent
    is missed only if rounding lets `margin` worse ones overtake it.
    Latents whose pre-activation is not positive, where fewer than k are, stand in any order.
    NaN counts as the largest, so that it shows in the loss.
    """
    candidates = min(k + margin if bfloat16 else k, encoder.weight.shape[0])
    found = [
        top_per_row(pre.view(torch.int16) if bfloat16 else pre, candidates)
        for pre in _preactivations(x, encoder, bfloat16=bfloat16)
    ]
    rows = torch.arange(x.shape[0], device=x.device).repeat_interleave(candidates)
    pairs, z = _rescore(x, encoder, rows, torch.cat(found).flatten())
    if candidates == k:
        return pairs, z
    best = _scaled(z, encoder, pairs).view(-1, candidates).topk(k, dim=1, sorted=False).indices
    keep = torch.zeros(x.shape[0], candidates, dtype=torch.bool, device=x.device)
    return _keep(pairs, z, keep.scatter_(1, best, True).flatten())


def choose_per_batch(
    x: Float[Tensor, "rows d_in"], encoder: Encoder, n: int, *, margin: int, bfloat16: bool
) -> tuple[Pairs, Float[Tensor, "pairs"]]:
    """The n positive pre-activations that are the largest in the batch, as in `choose_per_row`.

    Args:
        x: Rows to encode.
        encoder: Of all latents.
        n: How many over all rows; fewer are chosen where fewer are positive.
        margin: Further candidates a row, on average, in bfloat16.
        bfloat16: Find candidates in bfloat16.
    """
    keys = torch.cat([_upper_half(pre) for pre in _preactivations(x, encoder, bfloat16=bfloat16)])
    candidates = n + margin * x.shape[0] if bfloat16 else n
    size = math.gcd(BATCH_GROUP, keys.shape[1])
    groups = keys.view(x.shape[0], size, -1)
    best = groups.amax(1)
    rows, group = (best >= _reached_by(best, candidates)).nonzero(as_tuple=True)
    members = groups[rows, :, group]
    pair, member = (members >= _reached_by(members, candidates)).nonzero(as_tuple=True)
    pairs, z = _rescore(x, encoder, rows[pair], member * groups.shape[2] + group[pair])
    pre = _scaled(z, encoder, pairs)
    keep = ~(pre <= 0)  # not pre > 0: NaN stays
    if pre.numel() > n:
        best = pre.topk(n, sorted=False).indices
        keep &= torch.zeros_like(keep).scatter_(0, best, True)
    return _keep(pairs, z, keep)


def top_per_row(values: Shaped[Tensor, "rows width"], k: int) -> Int[Tensor, "rows k"]:
    """The columns of each row's k largest values, in any order; exact.

    A group is every n-th column. The k largest values lie in the k groups with the largest maxima,
    which are found in the same way, so only these groups are searched.
    """
    rows, width = values.shape
    if width % GROUP or width < 4 * GROUP * k:
        return values.topk(k, dim=1, sorted=False).indices
    n_groups = width // GROUP
    groups = top_per_row(values.view(rows, GROUP, n_groups).amax(1), k)
    steps = torch.arange(GROUP, device=values.device) * n_groups
    columns = (groups.unsqueeze(2) + steps).flatten(1)
    best = values.gather(1, columns).topk(k, dim=1, sorted=False).indices
    return columns.gather(1, best)


def _preactivations(x: Tensor, encoder: Encoder, *, bfloat16: bool) -> Iterator[Tensor]:
    """Scaled pre-activations of all latents, some rows at a time; NaN as infinity."""
    weight, bias = encoder.weight, encoder.bias
    if encoder.scale is not None:
        bias = bias * encoder.scale
    if bfloat16:
        weight, bias, x = _scaled_bfloat16(encoder), bias.bfloat16(), x.bfloat16()
    for rows in x.split(max(1, CHUNK // weight.shape[0])):
        if bfloat16 or encoder.scale is None:
            yield _nan_on_top(F.linear(rows, weight, bias))
        else:
            yield _nan_on_top((rows @ weight.t()).mul_(encoder.scale).add_(bias))


def _nan_on_top(pre: Float[Tensor, "rows latents"]) -> Float[Tensor, "rows latents"]:
    """Infinity for NaN, which among integers would rank by its sign, that is below all latents.

    NaN in a latent's weights is in all rows, NaN in an input in all latents: so it is enough to
    look at the first row and the first column.
    """
    if torch.cat([pre[:1].flatten(), pre[:, :1].flatten()]).isnan().any():
        return pre.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return pre


def _scaled_bfloat16(encoder: Encoder) -> Tensor:
    """The scaled encoder rows in bfloat16, made in pieces that stay in the processor's cache."""
    if encoder.scale is None:
        return encoder.weight.bfloat16()
    out = torch.empty_like(encoder.weight, dtype=torch.bfloat16)
    for piece, weight, scale in zip(
        out.split(512), encoder.weight.split(512), encoder.scale.split(512), strict=True
    ):
        piece.copy_(weight * scale.unsqueeze(1))
    return out


def _upper_half(values: Tensor) -> Int[Tensor, "rows latents"]:
    """The upper 16 bits of floats: integers in the order of the floats where these are positive."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16)
    return (values.float().view(torch.int32) >> 16).to(torch.int16)


def _reached_by(keys: Int[Tensor, "..."], n: int) -> int:
    """The highest positive key that at least n keys reach; 1 where fewer than n are positive."""
    counts = torch.bincount(keys.flatten().clamp(min=0).int(), minlength=2**15)
    reach = counts.flip(0).cumsum(0)
    return max(1, 2**15 - 1 - int(torch.searchsorted(reach, n)))


def _rescore(
    x: Tensor, encoder: Encoder, rows: Tensor, latents: Tensor
) -> tuple[Pairs, Float[Tensor, "pairs"]]:
    """Candidates as sorted pairs, with their pre-activations in full precision, unscaled."""
    pairs, _ = pair_up(rows, latents, x.shape[0], encoder.weight.shape[0])
    return pairs, score(pairs, x, encoder.weight) + encoder.bias[pairs.latents]


def _scaled(z: Tensor, encoder: Encoder, pairs: Pairs) -> Tensor:
    return z if encoder.scale is None else z * encoder.scale[pairs.latents]


def _keep(pairs: Pairs, z: Tensor, keep: Tensor) -> tuple[Pairs, Float[Tensor, "pairs"]]:
    """The pairs where `keep` is true."""
    kept = keep.nonzero().flatten()
    rows = pairs.rows[kept]
    starts = _starts(rows, pairs.starts.shape[0] - 1)
    return Pairs(starts, rows, pairs.latents[kept]), z[kept]
