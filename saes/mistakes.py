"""The usual mistakes in loading an SAE, each undone: what it would do with that one mended.

`saes.check` scores these on the model's residuals, to name the probable cause when an SAE does not
fit them.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saes.errors import UserError
from saes.files import PACKAGED
from saes.latents import Dictionary, SaeLens
from saes.lm.capture import capture
from saes.lm.model import LM, Site
from saes.lm.tokens import pad

TRIAL_TOKENS = 512
"""Tokens that a mended SAE is tried on."""
DENSE = 2**24
"""Latents that are dense at a time, tokens times width: 64 MiB in float32."""
BATCH_ROWS = 16
SPARSITIES = (16, 32, 64, 128, 256)
"""Numbers of latents on a token that are tried where the SAE promises none."""

Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From residuals [n, d_in] to latents [n, d_sae] and reconstructions [n, d_in]."""


class Undone(NamedTuple):
    """An SAE with one mistake undone."""

    cause: str
    """The mistake, if this is better."""
    detail: str
    """How it was undone."""
    run: Run
    residuals: Float[Tensor, "n d_model"]
    """What it is to be tried on."""


def plain(dictionary: Dictionary) -> Run:
    """The SAE as it is."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = dictionary.encode(x)
        return z, dictionary.decode(z)

    return run


def every(
    lm: LM, dictionary: Dictionary, x: Float[Tensor, "n d_model"], l0: float | None
) -> Iterator[Undone]:
    """Every usual mistake undone.

    Args:
        x: residuals at the SAE's site.
        l0: latents on a token that its makers promise.
    """
    run = plain(dictionary)
    yield from beginning(lm, dictionary)
    own = depth(lm.site(dictionary.site))
    yield from other_sites(lm, dictionary, [site for site in line(lm) if depth(site) != own])
    yield from scaled(run, x)
    yield from _normalised(run, x)
    yield from _turned(dictionary, x)
    if isinstance(dictionary, SaeLens):
        yield from biased(dictionary, x)
        yield from _activated(dictionary, x, l0)


# ---------------------------------------------------------------- of the model: BOS and the site


def beginning(lm: LM, dictionary: Dictionary) -> Iterator[Undone]:
    """With BOS where the tokenizer has none, without it where it has one."""
    run, site = plain(dictionary), dictionary.site
    if bos(lm) is not None:
        x = residuals(lm, [site], front=None, most=TRIAL_TOKENS)[site]
        yield Undone("BOS, which it was not trained with", "without BOS", run, x)
        return
    config = lm.model.config.get_text_config()
    for token in dict.fromkeys((config.bos_token_id, lm.tokenizer.eos_token_id)):
        if isinstance(token, int):
            x = residuals(lm, [site], front=token, most=TRIAL_TOKENS)[site]
            cause = "missing BOS, since this tokenizer has none"
            yield Undone(cause, f"with token {token} in front", run, x)


def other_sites(lm: LM, dictionary: Dictionary, sites: list[Site]) -> Iterator[Undone]:
    """At other sites."""
    if sites:
        names = [str(site) for site in sites]
        found = residuals(lm, names, front=bos(lm), most=TRIAL_TOKENS)
        for name, x in found.items():
            yield Undone("other site", f"at {name}", plain(dictionary), x)


def bos(lm: LM) -> int | None:
    """The token that this package puts in front of every text of this model."""
    token = lm.tokenizer.bos_token_id
    return token if isinstance(token, int) else None


def residuals(
    lm: LM, sites: list[str], *, front: int | None, most: int | None = None
) -> dict[str, Float[Tensor, "n d_model"]]:
    """Residuals of content tokens of the check texts, in float32.

    Args:
        front: token put in front of each text.
        most: about how many tokens; all of them by default.

    Raises:
        UserError: some are not finite.
    """
    encoded: Any = lm.tokenizer(check_texts(), add_special_tokens=False, verbose=False)
    first = [] if front is None else [front]
    rows = [(first + row)[: lm.context] for row in encoded["input_ids"]]
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    count = 0
    for start in range(0, len(rows), BATCH_ROWS):
        batch = pad(lm, rows[start : start + BATCH_ROWS])
        for site, residual in capture(lm, batch, sites).items():
            parts[site].append(residual[batch.content].float())
        count += int(batch.content.sum())
        if most is not None and count >= most:
            break
    found = {site: torch.cat(part)[:most] for site, part in parts.items()}
    for site, x in found.items():
        if not bool(torch.isfinite(x).all()):
            raise UserError(
                f"residuals at {site} of {lm.name} are not finite; load the model in float32 or "
                "bfloat16"
            )
    return found


def check_texts() -> list[str]:
    """Short neutral texts that ship with the package."""
    lines = (PACKAGED / "check_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def line(lm: LM) -> list[Site]:
    """The residual-stream sites that differ, in order: a block reads what the last one left."""
    return [Site(0, "pre"), *(Site(layer, "post") for layer in range(lm.n_layers))]


def depth(site: Site) -> int:
    """Index of a site in `line`."""
    return site.layer + (site.kind == "post")


# --------------------------------------------------- of the weights: scale, order, bias, activation


def scaled(run: Run, x: Float[Tensor, "n d_model"]) -> Iterator[Undone]:
    """With inputs brought to the average norm sqrt(d), and with the reverse of that."""
    factor = x.shape[1] ** 0.5 / float(x.norm(dim=1).mean())
    for f, cause in (
        (factor, "normalisation of inputs that is not folded into the weights"),
        (1 / factor, "normalisation of inputs that is folded into the weights and should not be"),
    ):

        def mended(x: Tensor, f: float = f) -> tuple[Tensor, Tensor]:
            z, out = run(x * f)
            return z, out / f

        yield Undone(cause, f"with inputs multiplied by {f:.4g}", mended, x)


def _normalised(run: Run, x: Tensor) -> Iterator[Undone]:
    """With inputs normalised token by token."""

    def by_norm(x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        z, out = run(x / size)
        return z, out * size

    def by_layer_norm(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        z, out = run((x - mean) / std)
        return z, out * std + mean

    cause = "normalisation of each token, which this package does not do"
    yield Undone(cause, "with each input scaled to norm sqrt(d)", by_norm, x)
    yield Undone(cause, "with layer norm of each input", by_layer_norm, x)


def _turned(dictionary: Dictionary, x: Tensor) -> Iterator[Undone]:
    """With a matrix read in the other order of its axes."""
    W_dec = dictionary.W_dec
    d_sae, d_in = W_dec.shape
    zero = dictionary.decode(W_dec.new_zeros(1, d_sae))
    other = W_dec.reshape(d_in, d_sae).T

    def decoder(x: Tensor) -> tuple[Tensor, Tensor]:
        z = dictionary.encode(x)
        return z, z @ other + zero

    yield Undone("transposed decoder", "with W_dec in the other order", decoder, x)
    if not isinstance(dictionary, SaeLens) or getattr(dictionary.sae, "b_enc", None) is None:
        return
    encode = _preactivations(dictionary.sae, dictionary.sae.W_enc.reshape(d_sae, d_in).T)
    activate = _activation(dictionary.sae)

    def encoder(x: Tensor) -> tuple[Tensor, Tensor]:
        z = activate(encode(x))
        return z, dictionary.decode(z)

    yield Undone("transposed encoder", "with W_enc in the other order", encoder, x)


def biased(dictionary: SaeLens, x: Float[Tensor, "n d_model"]) -> Iterator[Undone]:
    """With b_dec taken from the input where it was not, and the reverse."""
    sae = dictionary.sae
    sign = 1.0 if sae.cfg.apply_b_dec_to_input else -1.0

    def mended(x: Tensor) -> tuple[Tensor, Tensor]:
        z = dictionary.encode(x + sign * sae.b_dec)
        return z, dictionary.decode(z)

    detail = f"with it {'not ' * (sign > 0)}taken from the input"
    yield Undone("wrong use of b_dec", detail, mended, x)


def _activated(dictionary: SaeLens, x: Tensor, l0: float | None) -> Iterator[Undone]:
    """With the same weights under other activation functions."""
    sae = dictionary.sae
    if getattr(sae, "b_enc", None) is None:  # gated, matching pursuit
        return
    encode = _preactivations(sae, sae.W_enc)
    some = x[: max(1, DENSE // dictionary.d_sae)]
    for name, activate in _activations(sae, encode(some), l0):

        def mended(
            x: Tensor, activate: Callable[[Tensor], Tensor] = activate
        ) -> tuple[Tensor, Tensor]:
            z = activate(encode(x))
            return z, dictionary.decode(z)

        yield Undone("wrong activation function", f"with {name}", mended, x)


def _preactivations(sae: Any, W_enc: Tensor) -> Callable[[Tensor], Tensor]:
    shift = sae.b_dec if sae.cfg.apply_b_dec_to_input else 0.0
    return lambda x: (x - shift) @ W_enc + sae.b_enc


def _activation(sae: Any) -> Callable[[Tensor], Tensor]:
    """The SAE's own, on pre-activations."""
    threshold = getattr(sae, "threshold", None)
    if threshold is None:
        return sae.activation_fn
    return lambda h: h.relu() * (h > threshold)


def _activations(
    sae: Any, h: Tensor, l0: float | None
) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Activation functions other than the SAE's own, at sparsities that may be the right ones.

    An SAE that says how many latents fire is tried at that number only: at more than it was trained
    for, almost any SAE explains more.
    """
    own, own_k = sae.cfg.architecture(), getattr(sae.cfg, "k", None)
    promised = own_k if l0 is None else l0
    sparsities = SPARSITIES if promised is None else (max(1, round(promised)),)
    if own != "standard":
        yield "a plain ReLU", torch.relu
    for k in (k for k in sparsities if k <= h.shape[1] // 2):
        if own != "topk" or k != own_k:
            yield f"the {k} largest", lambda h, k=k: _top(h, k, h).relu()
        if own != "abstopk" or k != own_k:
            yield f"the {k} largest in size", lambda h, k=k: _top(h, k, h.abs())
        if own in ("standard", "jumprelu"):
            cut = float(h.flatten().topk(k * len(h) + 1).values[-1])  # the first to stay silent
            if cut > 0:
                yield f"one threshold of {cut:.4g}", lambda h, cut=cut: h * (h > cut)


def _top(h: Tensor, k: int, by: Tensor) -> Tensor:
    index = by.topk(k, dim=1).indices
    return torch.zeros_like(h).scatter(1, index, h.gather(1, index))
