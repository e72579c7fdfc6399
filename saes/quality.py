"""How well SAEs stand in for the residual stream, on held-out text: many SAEs, one clean pass.

Spliced passes start at the site with the residual already at hand, so that only the blocks above
it run again, and the ablations that a site's SAEs are measured against run once for all of them.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from tqdm import tqdm

from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.model import LM, Site
from saes.lm.splice import Onward
from saes.lm.tokens import Batch, pad
from saes.tables import markdown

CHUNK_BYTES = 16 * 2**20  # of one array of logits or latents; larger ones were slower ...
CHUNK_TOKENS = 256  # ... but not fewer tokens: weights are read anew for each array


Way = tuple[str, str]  # what stands in for the residual: clean, mean or zero at a site, or an SAE
CLEAN: Way = ("clean", "")
WIDER = "load the model in float32 or bfloat16"


class Quality(NamedTuple):
    """Figures over content tokens. Cross-entropy (CE) and KL are in nats a token.

    `..._se` is a standard error with rows of text as the unit that is drawn: tokens of one row
    depend on each other (delta method for a ratio of sums over rows). NaN where it is undefined.
    """

    tokens: int
    l0: float
    """Mean number of latents that fire on a token."""
    variance_explained: float
    """1 - (squared error) / (squared distance from the mean), each summed over tokens."""
    variance_explained_per_token: float
    """The same ratio token by token, then the mean."""
    ce_clean: float
    """Of the token that follows."""
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
    rows: int
    """Rows of text that the tokens are from."""
    kl_sae: float
    """KL(clean || spliced) of the next-token distributions, with the reconstruction in place."""
    kl_mean: float
    kl_zero: float
    kl_recovered_mean: float
    """1 - kl_sae / kl_mean."""
    kl_recovered_zero: float
    """1 - kl_sae / kl_zero."""
    cosine_median: float
    """For each latent the largest cosine of its decoder row with another's; median of latents."""
    cosine_p95: float
    """95th percentile of the same."""
    variance_explained_se: float
    variance_explained_per_token_se: float
    recovered_mean_se: float
    recovered_zero_se: float
    kl_recovered_mean_se: float
    kl_recovered_zero_se: float


def quality(
    lm: LM,
    dictionary: Dictionary,
    rows: Integer[np.ndarray, "rows width"],
    *,
    pass_rows: int = 16,
) -> Quality:
    """Judge one SAE; see `qualities`."""
    return qualities(lm, {"": dictionary}, rows, pass_rows=pass_rows)[""]


def qualities(
    lm: LM,
    dictionaries: Mapping[str, Dictionary],
    rows: Integer[np.ndarray, "rows width"],
    *,
    pass_rows: int = 16,
) -> dict[str, Quality]:
    """Judge SAEs on rows of token ids that were not trained on, each with its BOS.

    BOS and other special tokens keep their residual and are not counted. CE is of the token after
    each content token, wherever that is not padding.

    Args:
        dictionaries: by a name of your choice; at any sites, several at one site too.
        pass_rows: rows of one pass through the model.

    Raises:
        UserError: no rows, rows that do not fit the model, an unknown site, an SAE of another
            width than the model's, or residuals, reconstructions or logits that are not finite.
    """
    _check(lm, dictionaries, rows)
    sites = sorted({d.site for d in dictionaries.values()}, key=lm.site)
    starts = range(0, len(rows), pass_rows)
    with tqdm(
        total=2 * len(rows), desc="quality", unit="row", file=sys.stderr, disable=None
    ) as bar:

        def batches() -> Iterator[tuple[int, Batch]]:
            for start in starts:
                part = rows[start : start + pass_rows].astype(np.int64)
                yield start, pad(lm, part)
                bar.update(len(part))

        means = _means(lm, sites, (batch for _, batch in batches()))
        tally = _Tally(lm, dictionaries, means, len(rows))
        for start, batch in batches():
            tally.add(start, batch)
    return {name: tally.quality(name) for name in dictionaries}


def _check(
    lm: LM, dictionaries: Mapping[str, Dictionary], rows: Integer[np.ndarray, "rows width"]
) -> None:
    if rows.size == 0:
        raise UserError("no text to judge SAEs on: there are no rows")
    if rows.shape[1] > lm.context:
        raise UserError(
            f"rows of {rows.shape[1]} tokens exceed the context of {lm.name}: {lm.context}"
        )
    if rows.max() >= lm.vocab_size:
        raise UserError(
            f"token {rows.max()} is outside the vocabulary of {lm.name} ({lm.vocab_size}); "
            "the tokens were made by another tokenizer"
        )
    for name, dictionary in dictionaries.items():
        lm.site(dictionary.site)
        if dictionary.d_in != lm.d_model:
            raise UserError(
                f"SAE {name} reads width {dictionary.d_in} but the residual stream of {lm.name} "
                f"has {lm.d_model}; take an SAE that was trained on this model"
            )


def _means(
    lm: LM, sites: Sequence[str], batches: Iterator[Batch]
) -> dict[str, Float[Tensor, " d_model"]]:
    """Mean residual over content tokens at each site."""
    totals = {site: torch.zeros(lm.d_model, dtype=torch.float64) for site in sites}
    count = 0
    for batch in batches:
        read = capture(lm, batch, sites)
        for site in sites:
            totals[site] += read[site][batch.content].double().sum(0).cpu()
        count += int(batch.content.sum())
    if count == 0:
        raise UserError("no text to judge SAEs on: every token is special or first in its row")
    for site, total in totals.items():
        if not total.isfinite().all():
            raise UserError(f"residuals of {lm.name} at {site} are not finite; {WIDER}")
    return {site: (total / count).float().to(lm.device) for site, total in totals.items()}


# ------------------------------------------------------------------------------- sums over rows


class _Fit:
    """Sums over the content tokens of each row, for one SAE."""

    def __init__(self, rows: int, fired: Float[Tensor, " d_sae"]) -> None:
        self.error = np.zeros(rows)  # squared error of the reconstruction
        self.relative = np.zeros(rows)  # the same over the squared distance from the mean
        self.l0 = np.zeros(rows)
        self.fired = fired  # tokens on which each latent fires; not by row


class _Loss:
    """Sums over the scored tokens of each row, for one way to replace a residual."""

    def __init__(self, rows: int) -> None:
        self.ce, self.kl = np.zeros(rows), np.zeros(rows)


class _Tally:
    """Everything that is summed while the text goes by."""

    def __init__(
        self,
        lm: LM,
        dictionaries: Mapping[str, Dictionary],
        means: Mapping[str, Float[Tensor, " d_model"]],
        rows: int,
    ) -> None:
        self.lm, self.dictionaries, self.means, self.n = lm, dictionaries, means, rows
        self.counted, self.scored = np.zeros(rows), np.zeros(rows)
        self.distance = {site: np.zeros(rows) for site in means}
        self.fit = {
            name: _Fit(rows, torch.zeros(d.d_sae, device=lm.device))
            for name, d in dictionaries.items()
        }
        ways = [CLEAN, *(("mean", s) for s in means), *(("zero", s) for s in means)]
        ways += [("sae", name) for name in dictionaries]
        self.loss = {way: _Loss(rows) for way in ways}
        self.onward = Onward(lm)

    def add(self, start: int, batch: Batch) -> None:
        """One batch of rows, the first of which is row `start`."""
        scored = batch.content.clone()
        scored[:, :-1] &= batch.attention[:, 1:]
        scored[:, -1] = False
        last = str(Site(self.lm.n_layers - 1, "post"))
        clean = capture(self.lm, batch, [*self.means, last])
        row = start + batch.content.nonzero()[:, 0]
        self._sum(self.counted, row, torch.ones(len(row)))
        left: dict[Way, Tensor] = {CLEAN: clean[last][scored]}
        for site, mean in self.means.items():
            x = clean[site][batch.content].float()
            distance = (x - mean).double().square().sum(-1)
            self._sum(self.distance[site], row, distance)
            replace: dict[Way, Tensor] = {
                ("mean", site): mean.expand_as(x),
                ("zero", site): torch.zeros_like(x),
            }
            for name, dictionary in self.dictionaries.items():
                if dictionary.site == site:
                    replace["sae", name] = self._fit(name, row, x, distance)
            for way, new in replace.items():
                spliced = clean[site].clone()
                spliced[batch.content] = new.to(spliced.dtype)
                left[way] = self.onward(batch, site, spliced)[scored]
        self._losses(left, start + scored.nonzero()[:, 0], batch.ids.roll(-1, 1)[scored])

    def _fit(
        self,
        name: str,
        row: Int[Tensor, " n"],
        x: Float[Tensor, "n d_model"],
        distance: Float[Tensor, " n"],
    ) -> Float[Tensor, "n d_model"]:
        """Reconstructions of one SAE; what they are worth goes into its sums."""
        dictionary, fit = self.dictionaries[name], self.fit[name]
        size = max(CHUNK_TOKENS, CHUNK_BYTES // (4 * dictionary.d_sae))
        outs, counts = [], []
        for part in x.split(size):
            z = dictionary.encode(part)
            fires = z != 0
            counts.append(fires.sum(-1))
            fit.fired.add_(fires.sum(0))
            outs.append(dictionary.decode(z))
        out = torch.cat(outs)
        error = (x - out).double().square().sum(-1)
        if not error.isfinite().all():
            raise UserError(
                f"SAE {name or dictionary.site} gives a reconstruction that is not finite; its "
                "weights are damaged, or it is of another model"
            )
        self._sum(fit.error, row, error)
        self._sum(fit.relative, row, error / distance)
        self._sum(fit.l0, row, torch.cat(counts))
        return out

    def _losses(
        self,
        left: Mapping[Way, Float[Tensor, "n d_model"]],
        row: Int[Tensor, " n"],
        target: Int[Tensor, " n"],
    ) -> None:
        """CE and KL of every way, from the residuals that leave the last block."""
        self._sum(self.scored, row, torch.ones(len(row)))
        size = max(CHUNK_TOKENS, CHUNK_BYTES // (4 * self.lm.vocab_size))
        for start in range(0, len(row), size):
            here = slice(start, start + size)
            clean = self.lm.unembed(left[CLEAN][here]).float()
            norm = clean.logsumexp(-1)
            p = (clean - norm[:, None]).exp_()
            for way, x in left.items():
                new = clean if way == CLEAN else self.lm.unembed(x[here]).float()
                new_norm = norm if way == CLEAN else new.logsumexp(-1)
                if not new_norm.isfinite().all():
                    raise UserError(self._not_finite(way))
                ce = new_norm - new.gather(1, target[here, None])[:, 0]
                self._sum(self.loss[way].ce, row[here], ce)
                # KL is never negative, its rounding may be.
                kl = divergence(p, clean - new, norm - new_norm).clamp(min=0)
                self._sum(self.loss[way].kl, row[here], kl)

    def _not_finite(self, way: Way) -> str:
        """What to say of logits that are infinite or no numbers."""
        stand_in = {"clean": "", "sae": f" with the reconstruction of SAE {way[1]} in place"}
        where = stand_in.get(way[0], f" with the {way[0]} in place of the residual at {way[1]}")
        return f"logits of {self.lm.name}{where} are not finite; {WIDER}"

    @staticmethod
    def _sum(total: np.ndarray, row: Int[Tensor, " n"], values: Tensor) -> None:
        total += np.bincount(row.cpu().numpy(), values.double().cpu().numpy(), minlength=len(total))

    def quality(self, name: str) -> Quality:
        """The figures of one SAE."""
        site, fit = self.dictionaries[name].site, self.fit[name]
        clean, sae = self.loss[CLEAN], self.loss["sae", name]
        mean, zero = self.loss["mean", site], self.loss["zero", site]
        distance, counted, scored = self.distance[site], self.counted, self.scored
        unexplained, per_token = ratio(fit.error, distance), ratio(fit.relative, counted)
        by_mean = ratio(mean.ce - sae.ce, mean.ce - clean.ce)
        by_zero = ratio(zero.ce - sae.ce, zero.ce - clean.ce)
        kl_mean, kl_zero = ratio(sae.kl, mean.kl), ratio(sae.kl, zero.kl)
        cosines = nearest_cosines(self.dictionaries[name].W_dec)
        return Quality(
            tokens=int(counted.sum()),
            l0=ratio(fit.l0, counted).value,
            variance_explained=1 - unexplained.value,
            variance_explained_per_token=1 - per_token.value,
            ce_clean=ratio(clean.ce, scored).value,
            ce_sae=ratio(sae.ce, scored).value,
            ce_mean=ratio(mean.ce, scored).value,
            ce_zero=ratio(zero.ce, scored).value,
            recovered_mean=by_mean.value,
            recovered_zero=by_zero.value,
            dead=float((fit.fired == 0).double().mean()),
            dense=float((fit.fired > 0.1 * counted.sum()).double().mean()),
            rows=self.n,
            kl_sae=ratio(sae.kl, scored).value,
            kl_mean=ratio(mean.kl, scored).value,
            kl_zero=ratio(zero.kl, scored).value,
            kl_recovered_mean=1 - kl_mean.value,
            kl_recovered_zero=1 - kl_zero.value,
            cosine_median=float(cosines.quantile(0.5)),
            cosine_p95=float(cosines.quantile(0.95)),
            variance_explained_se=unexplained.se,
            variance_explained_per_token_se=per_token.se,
            recovered_mean_se=by_mean.se,
            recovered_zero_se=by_zero.se,
            kl_recovered_mean_se=kl_mean.se,
            kl_recovered_zero_se=kl_zero.se,
        )


def divergence(
    p: Float[Tensor, "n vocab"], change: Float[Tensor, "n vocab"], norms: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """KL(p || q) in nats, from differences of logits: exactly 0 where the two agree.

    Args:
        p: the first distribution.
        change: logits of p less those of q.
        norms: log of the sum of exponents of p's logits, less that of q's.
    """
    return torch.linalg.vecdot(p, change) - norms


class Ratio(NamedTuple):
    """A ratio of two sums over rows, with its standard error."""

    value: float
    se: float


def ratio(numerator: Float[np.ndarray, " rows"], denominator: Float[np.ndarray, " rows"]) -> Ratio:
    """Sum over sum, and its standard error when rows are drawn at random (delta method).

    NaN when the denominator sums to 0; the error is NaN for fewer than two rows. Rows where both
    are 0 count as drawn. (Cochran, Sampling Techniques, 3rd ed., eq. 6.13, without the correction
    for a finite population.)
    """
    n, total = len(denominator), float(denominator.sum())
    if total == 0:
        return Ratio(math.nan, math.nan)
    value = float(numerator.sum()) / total
    if n < 2:
        return Ratio(value, math.nan)
    deviation = numerator - value * denominator
    return Ratio(value, math.sqrt(n / (n - 1) * float(deviation @ deviation)) / abs(total))


@torch.no_grad()
def nearest_cosines(
    W_dec: Float[Tensor, "d_sae d_in"], block: int = 4096
) -> Float[Tensor, " d_sae"]:
    """For each decoder row, the largest cosine with another row (exact; rows of length 0 give 0).

    Args:
        block: rows on a side of the square of cosines that is in memory at a time.
    """
    unit = torch.nn.functional.normalize(W_dec.float(), dim=-1)
    best = unit.new_full((len(unit),), -torch.inf)
    for i in range(0, len(unit), block):
        for j in range(i, len(unit), block):
            cosines = unit[i : i + block] @ unit[j : j + block].T
            if i == j:
                cosines.fill_diagonal_(-torch.inf)
            for at, dim in ((i, 1), (j, 0)):
                part = best[at : at + block]
                torch.maximum(part, cosines.amax(dim), out=part)
    return best


# -------------------------------------------------------------------------------------- the table


def quality_table(results: Mapping[str, Quality]) -> str:
    """Two tables in Markdown, aligned to be read as they are: what was found, and its baselines.

    Args:
        results: by the name of each SAE. What is NaN is shown as a dash.
    """
    found = [
        ["SAE", "L0", "VE", "VE/token", "CE rec. (mean)", "CE rec. (zero)", "KL rec. (mean)",
         "KL rec. (zero)", "dead", "dense", "cosine", "cosine 95 %"],
        *([
            name,
            _cell(q.l0, ".1f"),
            _cell(q.variance_explained, ".3f", q.variance_explained_se),
            _cell(q.variance_explained_per_token, ".3f", q.variance_explained_per_token_se),
            _cell(q.recovered_mean, ".3f", q.recovered_mean_se),
            _cell(q.recovered_zero, ".3f", q.recovered_zero_se),
            _cell(q.kl_recovered_mean, ".3f", q.kl_recovered_mean_se),
            _cell(q.kl_recovered_zero, ".3f", q.kl_recovered_zero_se),
            _cell(q.dead, ".2%"), _cell(q.dense, ".2%"),
            _cell(q.cosine_median, ".2f"), _cell(q.cosine_p95, ".2f"),
        ] for name, q in results.items()),
    ]  # fmt: skip
    baselines = [
        ["nats a token", "CE clean", "CE SAE", "CE mean", "CE zero", "KL SAE", "KL mean", "KL zero",
         "tokens", "rows"],
        *([
            name,
            *(_cell(v, ".3f") for v in (q.ce_clean, q.ce_sae, q.ce_mean, q.ce_zero)),
            *(_cell(v, ".3f") for v in (q.kl_sae, q.kl_mean, q.kl_zero)),
            _cell(q.tokens, ",.0f"), _cell(q.rows, ",.0f"),
        ] for name, q in results.items()),
    ]  # fmt: skip
    return f"{markdown(found)}\n{markdown(baselines)}"


def _cell(value: float | int, form: str, se: float = math.nan) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:{form}}" + ("" if math.isnan(se) else f" ± {se:{form}}")
