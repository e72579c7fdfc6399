"""A causal language model by hub name, folder or object, and the sites of its residual stream.

Sites are named as TransformerLens and sae-lens do: `blocks.{L}.hook_resid_pre` is what block L
reads, `blocks.{L}.hook_resid_post` what it leaves. `blocks.0.hook_resid_pre` is the embedding.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from saes.errors import UserError
from saes.files import locate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", name)
    if found is None:
        raise UserError(
            f"{name!r} is not a residual-stream site; write blocks.L.hook_resid_post or "
            "blocks.L.hook_resid_pre with a layer L"
        )
    return Site(int(found[1]), cast('Literal["pre", "post"]', found[2]))


@dataclass(frozen=True)
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

    @property
    def device(self) -> torch.device:
        return self.model.device

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
        """Most positions the model takes."""
        return self.model.config.get_text_config().max_position_embeddings

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
            logits = self.unembedding(self.final_norm(x.to(self.model.dtype)))
            cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
            return logits if cap is None else cap * torch.tanh(logits / cap)


def load_lm(
    name: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> LM:
    """A language model, ready to read.

    Args:
        name: a hub name (`EleutherAI/pythia-70m`), a folder in Hugging Face format,
            `packaged/demo_lm`, or a model object (then `tokenizer` must be given).
        tokenizer: used instead of the model's own.
        device: a torch device.
        dtype: float32, bfloat16 or float16.

    Raises:
        UserError: unknown model, missing or damaged folder, no tokenizer, unknown dtype or
            device, or an architecture whose blocks are not found.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    model: Any
    if isinstance(name, PreTrainedModel):
        model = cast("Any", name).to(DTYPES[dtype])
        label = Path(name.config.name_or_path or "").name or type(name).__name__
        if tokenizer is None:
            raise UserError(f"the model object {label} comes without a tokenizer; pass tokenizer=")
    else:
        source, label = _resolve(name)
        tokenizer = tokenizer if tokenizer is not None else _load_tokenizer(source, label)
        model = _load_model(source, label, DTYPES[dtype])
    try:
        model = model.to(device).eval().requires_grad_(False)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"cannot use device {device!r}: {_line(error)}") from None
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the "
            f"{model.get_input_embeddings().weight.shape[0]} embeddings of {label}; "
            "give the model its own tokenizer"
        )
    lm = LM(model, tokenizer, label, *_anatomy(model, label))
    _check_unembed(lm)
    return lm


def _resolve(name: str | Path) -> tuple[str, str]:
    """(what transformers loads, the name to record)."""
    text = str(name)
    folder = locate(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{text} holds no model: config.json is missing")
        return str(folder), text if text.startswith("packaged/") else folder.resolve().name
    looks_local = isinstance(name, Path) or text.count("/") > 1
    if looks_local or text.startswith((".", "/", "~", "packaged/")):
        raise UserError(f"no model folder {text}; give an existing folder or a hub name")
    return text, text


def _load_tokenizer(source: str, label: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        if not Path(source).is_dir():
            raise UserError(_unreachable(label, error)) from None
        raise UserError(f"model {label} has no usable tokenizer: {_line(error)}") from None
    # transformers makes an empty tokenizer of the configured class where the files are missing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"model {label} comes without a tokenizer (tokenizer.json); save one beside it"
        )
    return tokenizer


def _load_model(source: str, label: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            source, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # transformers raises many types; each means it cannot be loaded
        if not Path(source).is_dir():
            raise UserError(_unreachable(label, error)) from None
        raise UserError(f"cannot load model {label}: {_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights of {label} lack {missing[0]} (and {len(missing) - 1} more); "
            "the folder is incomplete or of another architecture"
        )
    return model


def _unreachable(label: str, error: Exception) -> str:
    return (
        f"no model {label}: it is neither a folder nor a hub name that could be fetched "
        f"({_line(error)})"
    )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


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
    if not torch.allclose(lm.unembed(left[0]), logits, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"the logits of {lm.name} ({type(lm.model).__name__}) are not its final norm and "
            "unembedding of the last residual; this architecture is not supported"
        )
