"""A causal language model by hub name, folder or object, and the sites of its residual stream.

Sites are named as TransformerLens and sae-lens do: `blocks.{L}.hook_resid_pre` is what block L
reads, `blocks.{L}.hook_resid_post` what it leaves. `blocks.0.hook_resid_pre` is the embedding.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from saes.errors import UserError
from saes.lm import bridge
from saes.lm.loading import (
    DeviceMap,
    Placement,
    load_model,
    load_tokenizer,
    place,
    resolve,
)

if TYPE_CHECKING:
    from saes.lm.bridge import TransformerBridge

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Site(NamedTuple):
    """A place of the residual stream: before or after block `layer`."""

    layer: int
    kind: Literal["pre", "post"]

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_resid_{self.kind}"


def parse_site(name: str) -> Site:
    """The site of that name.

    >>> parse_site("blocks.3.hook_resid_post")
    Site(layer=3, kind='post')

    Raises:
        UserError: not the name of a residual-stream site.
    """
    found = re.fullmatch(r"blocks\.(0|[1-9][0-9]*)\.hook_resid_(pre|post)", name)
    if found is None:
        raise UserError(
            f"{name!r} is not a residual-stream site; write blocks.L.hook_resid_post or "
            "blocks.L.hook_resid_pre with a layer L"
        )
    return Site(int(found[1]), cast('Literal["pre", "post"]', found[2]))


@dataclass(frozen=True, repr=False)
class LM:
    """A causal language model for reading: in eval mode, no gradients, never changed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    """Hub name, `packaged/...`, or the folder's own name; no path of this machine."""
    blocks: nn.ModuleList
    """The decoder blocks, in order."""
    final_norm: nn.Module
    """What the last block's residual passes through before the unembedding."""
    unembedding: nn.Module
    """From the normed residual to logits, softcap aside."""
    bridge: "TransformerBridge | None" = None
    """TransformerLens's bridge around `model`, where that is the backend."""

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"LM({self.name!r}, {kind}, {self.n_layers} blocks of width {self.d_model})"

    @property
    def device(self) -> torch.device:
        """Where tokens go in and residuals come out; other parts may lie on other devices."""
        embedding = cast("Any", self.model.get_input_embeddings())
        device = embedding.weight.device
        if device.type == "meta":  # accelerate keeps the weight elsewhere until it is needed
            device = torch.device(embedding._hf_hook.execution_device)
        return device

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.model.config.get_text_config().hidden_size

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Number of logits (may exceed the tokenizer's vocabulary)."""
        return self.model.config.get_text_config().vocab_size

    @property
    def context(self) -> int:
        """Most positions the model takes; with ALiBi what its config or tokenizer says, if any."""
        config = self.model.config.get_text_config()
        names = ("max_position_embeddings", "max_seq_len", "seq_length")
        sizes = (getattr(config, name, None) for name in names)
        return int(next((n for n in sizes if n), self.tokenizer.model_max_length))

    def site(self, name: str) -> Site:
        """Parse a site's name and check that the model has it.

        Raises:
            UserError: not a site's name, or its layer is out of range.
        """
        site = parse_site(name)
        if site.layer >= self.n_layers:
            raise UserError(
                f"site {name} is out of range: {self.name} has {self.n_layers} blocks, "
                f"0 to {self.n_layers - 1}"
            )
        return site

    def unembed(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Logits of a residual as if it left the last block: final norm, unembedding, softcap."""
        with torch.no_grad():
            logits = self.unembedding(self.final_norm(x.to(self.model.dtype))).to(x.device)
            cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
            return logits if cap is None else cap * torch.tanh(logits / cap)


def load_lm(
    name: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | None = None,
    dtype: str | None = None,
    device_map: DeviceMap | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    backend: str = "hf",
) -> LM:
    """A language model, ready to read.

    Args:
        name: a hub name (`EleutherAI/pythia-70m`), a folder in Hugging Face format,
            `packaged/demo_lm`, or a model object (then `tokenizer` must be given).
        tokenizer: used instead of the model's own.
        device: a torch device; by default the CPU, or where the object is.
        dtype: float32, bfloat16 or float16; by default float32, or what the object has.
        device_map: instead of `device`, for a model larger than one device: `auto`, or a device
            for each module; through accelerate.
        quantize: 8bit or 4bit, through bitsandbytes.
        revision: branch, tag or commit of a hub name.
        backend: `hf` hooks the transformers model itself. `bridge` puts TransformerLens's
            TransformerBridge around it, in place, and hooks that; the same residuals, slower,
            with `LM.bridge` for what else TransformerLens offers.

    Raises:
        UserError: unknown model, missing or damaged folder, no tokenizer or that of another
            model, unknown dtype, device or backend, a package that an option needs and is not
            there, an architecture whose blocks are not found, or which the bridge lacks.
    """
    if backend not in ("hf", "bridge"):
        raise UserError(f"unknown backend {backend!r}; choose hf or bridge")
    placement = Placement(device, dtype, device_map, quantize)
    if isinstance(name, PreTrainedModel):
        model, label = name, Path(name.config.name_or_path or "").name or type(name).__name__
        if tokenizer is None:
            raise UserError(f"the model object {label} comes without a tokenizer; pass tokenizer=")
        if unused := device_map or quantize or revision:
            raise UserError(f"{unused!r} is for a model that is loaded here, not for an object")
        if bridge.is_wrapped(model):
            raise UserError(f"{label} is inside a TransformerBridge already; load it anew")
    else:
        source, label = resolve(name)
        if revision is not None and Path(source).is_dir():
            raise UserError(f"{label} is a folder and has no revision {revision!r}; leave it out")
        tokenizer = tokenizer or load_tokenizer(source, label, revision)
        model = load_model(source, label, placement, revision)
    model = place(model, placement, loaded=model is not name)
    embeddings = cast("Any", model.get_input_embeddings()).weight.shape[0]
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the {embeddings} embeddings of "
            f"{label}; give the model its own tokenizer"
        )
    wrapped = bridge.wrap(model, tokenizer, label) if backend == "bridge" else None
    lm = LM(model, tokenizer, label, *_anatomy(model, label), wrapped)
    _check_unembed(lm)
    return lm


def weights_hash(lm: LM) -> str:
    """Tells a model from another training, quantisation or dtype of it, hex.

    Takes in the sum of every parameter's bits, which does not depend on devices or threads, and a
    few of them where they lie. Weights that accelerate has offloaded count by shape alone.
    """
    total = hashlib.sha256()
    for parameter in lm.model.parameters():
        total.update(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            bits = parameter.detach().flatten().view(_BITS[parameter.element_size()])
            some = bits[:: max(1, len(bits) // 16)]
            total.update(f"{bits.sum(dtype=torch.int64).item()} {some.tolist()}".encode())
    return total.hexdigest()


def _anatomy(model: PreTrainedModel, label: str) -> tuple[nn.ModuleList, nn.Module, nn.Module]:
    """The decoder blocks, the norm that follows them where they are held, and the unembedding.

    The blocks are the one ModuleList as long as the model is deep: `transformer.h` in GPT-2 and
    Falcon, `gpt_neox.layers`, `model.layers` in Llama and its kin.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and "vision" not in path
    ]
    if len(lists) != 1:
        raise UserError(
            f"cannot find the decoder blocks of {label} ({type(model).__name__}): "
            f"{len(lists)} module lists of length {depth}"
        )
    path, blocks = lists[0]
    children = list(model.get_submodule(path.rpartition(".")[0]).children())
    after = children[next(i for i, child in enumerate(children) if child is blocks) + 1 :]
    norms = [m for m in after if "norm" in type(m).__name__.lower()]
    head = model.get_output_embeddings()
    if not norms or head is None:
        raise UserError(
            f"cannot find the final norm and unembedding of {label} ({type(model).__name__})"
        )
    return blocks, norms[0], head


def _check_unembed(lm: LM) -> None:
    """Refuse a model whose logits are not what `LM.unembed` says (scaled logits and the like)."""
    left: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    handle = lm.blocks[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            ids = torch.arange(2, 5, device=lm.device)[None]
            logits = lm.model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    # Spread over devices, the last block may lie on another one than the model answers on.
    logits = logits.to(left[0].device)
    if not torch.allclose(lm.unembed(left[0]), logits, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"the logits of {lm.name} ({type(lm.model).__name__}) are not its final norm and "
            "unembedding of the last residual; this architecture is not supported"
        )
