"""What no training made: an SAE of random weights, and the same on a model of random weights.

Both go through the very selection that a trained SAE does. What they reach is due to the texts, the
architecture and the choice of the best among many latents, not to what the SAE or the model has
learnt: Heap et al. 2025, "Sparse Autoencoders Can Interpret Randomly Initialized Transformers"
(arXiv 2501.17727), found SAEs on random transformers hardly less interpretable.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from discovery.captured import RULE, Captured
from discovery.corpora.rows import Text
from discovery.pooling import capture_texts
from discovery.windows import STORIES, Long, windows
from saes.errors import UserError
from saes.latents import Dictionary
from saes.lm.capture import capture
from saes.lm.model import LM
from saes.lm.tokens import batches

UNTRAINED, RANDOMISED = "untrained", "randomised"
SAMPLE = 64  # texts that tell the mean residual and the L0


@dataclass(frozen=True, eq=False)
class Untrained:
    """A TopK SAE that nobody trained, as a `Dictionary`; the encoder is the decoder transposed."""

    site: str
    W_dec: Float[Tensor, "d_sae d_in"]
    """Random directions of length 1."""
    centre: Float[Tensor, " d_in"]
    """Subtracted before encoding, added after decoding."""
    k: int
    """Latents that fire at a token."""

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        top = ((x.to(self.W_dec) - self.centre) @ self.W_dec.T).topk(self.k, dim=-1, sorted=False)
        z = x.new_zeros((len(x), self.d_sae), dtype=self.W_dec.dtype)
        return z.scatter_(-1, top.indices, top.values.relu())

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return z @ self.W_dec + self.centre


def untrained(
    dictionary: Dictionary, l0: float, mean: Float[Tensor, " d_in"], seed: int
) -> Untrained:
    """An SAE of random weights in place of a trained one: as wide, and as sparse on these texts.

    Args:
        l0: mean number of latents of `dictionary` that fire at a token.
        mean: mean residual of the texts.
        seed: with the site, decides the directions.
    """
    rng = _generator(f"{seed} {dictionary.site} {dictionary.d_sae}")
    directions = torch.randn(dictionary.d_sae, dictionary.d_in, generator=rng)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = mean.float()
    k = min(max(1, round(l0)), dictionary.d_sae)
    return Untrained(dictionary.site, directions.to(mean.device), mean, k)


@torch.no_grad()
def randomised(lm: LM, seed: int) -> LM:
    """The same architecture and tokens, with nothing left of what training put into the weights.

    Every parameter but the token embeddings (and an unembedding that is tied to them) is drawn anew
    from a normal of its own mean and standard deviation, so that the scale of each layer stays. It
    takes as much memory again as the model.

    Raises:
        UserError: a model whose weights are quantised or not in memory.
    """
    check_weights(lm)
    kept = lm.model.get_input_embeddings().weight
    twin = copy.deepcopy(lm)
    for (name, weight), new in zip(
        lm.model.named_parameters(), twin.model.parameters(), strict=True
    ):
        if weight is not kept:
            rng = _generator(f"{seed} {name}")
            mean, std = weight.float().mean(), weight.float().std(correction=0)
            drawn = torch.randn(weight.shape, generator=rng).to(weight.device)
            new.copy_(mean + std * drawn)
    return twin


def capture_controls(
    lm: LM,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[Text],
    captured: Captured,
    *,
    beside: Sequence[Untrained] = (),
    seed: int = 0,
    poolings: Sequence[str] = (RULE,),
    long: Long = "cut",
    batch_tokens: int = 2048,
    progress: Callable[[int], object] = lambda _: None,
) -> Captured:
    """`captured` with the latents of both controls for the selection and confirmation texts.

    The model of random weights runs up to the last SAE's site. Where `captured` holds the untrained
    SAEs' latents already (`capture_texts` with `extra=untrained_extra(...)`), only that pass runs.

    Args:
        texts: those of `captured`, in its order.
        beside: the untrained SAEs of `untrained_extra`, one for each of `dictionaries`: they know
            how many latents fire, which is else measured again.
        progress: called with the number of texts that each batch finished; they add up to
            `passes(texts, captured)`.

    Raises:
        UserError: as `randomised` and `capture_texts`.
    """
    assert [row.id for row in captured.texts] == [text.id for text in texts], "other texts"
    at = [i for i, text in enumerate(texts) if text.set in STORIES]
    stories = [texts[i] for i in at]
    counts = {own.site: float(own.k) for own in beside}
    if not counts:
        counts = _l0s(dictionaries, sample(lm, dictionaries, stories, batch_tokens))
    controls = dict(captured.controls)
    subjects = {} if _has_untrained(captured) else {UNTRAINED: lm}
    for name, own in {**subjects, RANDOMISED: randomised(lm, seed)}.items():
        blank = _blank(dictionaries, counts, sample(own, dictionaries, stories, batch_tokens), seed)
        found = capture_texts(
            own,
            [],
            stories,
            poolings=poolings,
            long=long,
            batch_tokens=batch_tokens,
            progress=progress,
            extra={name: blank},
        )
        for key, latents in found.controls.items():
            controls[key] = _spread(latents, at, len(texts))
    return captured._replace(controls=controls)


def untrained_extra(
    lm: LM,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[Text],
    *,
    seed: int = 0,
    batch_tokens: int = 2048,
) -> dict[str, list[Untrained]]:
    """Untrained SAEs beside the trained ones, as the `extra` of `capture_texts`.

    Raises:
        UserError: what `randomised` would refuse after that pass, or no selection or confirmation
            texts.
    """
    check_weights(lm)
    stories = [text for text in texts if text.set in STORIES]
    tokens = sample(lm, dictionaries, stories, batch_tokens)
    return {UNTRAINED: _blank(dictionaries, _l0s(dictionaries, tokens), tokens, seed)}


def passes(texts: Sequence[Text], captured: Captured) -> int:
    """How many texts `capture_controls` will run, all its passes together."""
    return sum(text.set in STORIES for text in texts) * (1 if _has_untrained(captured) else 2)


def sample(
    lm: LM, dictionaries: Sequence[Dictionary], texts: Sequence[Text], batch_tokens: int = 2048
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """By SAE site, the residuals at all content tokens of at most `SAMPLE` texts, evenly spaced."""
    if not texts:
        raise UserError("controls need texts of the selection or the confirmation set")
    some = texts[:: -(-len(texts) // SAMPLE)]
    sites = [d.site for d in dictionaries]
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for block in batches(lm, windows(lm, some).ids, batch_tokens=batch_tokens):
        for site, resid in capture(lm, block, sites).items():
            found[site].append(resid[block.content].float())
    return {site: torch.cat(parts) for site, parts in found.items()}


def _l0s(
    dictionaries: Sequence[Dictionary], tokens: dict[str, Float[Tensor, "tokens d_model"]]
) -> dict[str, float]:
    """By site, how many latents fire at a token, on average."""
    return {
        d.site: sum(int(d.encode(part).count_nonzero()) for part in tokens[d.site].split(1024))
        / len(tokens[d.site])
        for d in dictionaries
    }


def _blank(
    dictionaries: Sequence[Dictionary],
    l0s: dict[str, float],
    tokens: dict[str, Float[Tensor, "tokens d_model"]],
    seed: int,
) -> list[Untrained]:
    return [untrained(d, l0s[d.site], tokens[d.site].mean(0), seed) for d in dictionaries]


def check_weights(lm: LM) -> None:
    """Refuse a model that cannot be randomised.

    Raises:
        UserError: its weights are quantised or not in memory.
    """
    for name, weight in lm.model.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            raise UserError(
                f"the randomised control needs the weights of {lm.name} in memory and not "
                f"quantised, but {name} is not; set capture.controls to false"
            )


def _has_untrained(captured: Captured) -> bool:
    return any(name.startswith(f"{UNTRAINED}/") for name in captured.controls)


def _spread(latents: csr_array, at: Sequence[int], rows: int) -> csr_array:
    """The same rows at their places among all texts; the others are empty."""
    lengths = torch.zeros(rows, dtype=torch.int64)
    lengths[list(at)] = torch.from_numpy(latents.indptr).long().diff()
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).numpy()
    parts = (latents.data, latents.indices, indptr.astype(latents.indptr.dtype))
    return csr_array(parts, shape=(rows, latents.shape[1]))


def _generator(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
