"""TransformerLens's TransformerBridge around a loaded model: its hook points, the same residuals.

The bridge replaces the modules of the Hugging Face model by wrappers with hook points, in place and
with the weights as they are. A model read through it takes its calls as before.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from saes.errors import UserError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def is_wrapped(model: PreTrainedModel) -> bool:
    """Whether a bridge was put around a model before, perhaps in vain."""
    return any(type(m).__module__.startswith("transformer_lens.") for m in model.modules())


def wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str
) -> "TransformerBridge":
    """Put the bridge around a model, in place, and check that it still gives the same logits.

    No weight is folded, centred or otherwise processed.

    Raises:
        UserError: an architecture that the bridge lacks or computes otherwise (transformer-lens
            3.9 adds Falcon's ALiBi twice). The model may be half wrapped by then.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import (
        build_bridge_from_module,
        detect_tokenizer_bos_eos,
    )

    kind = type(model).__name__
    ArchitectureAdapterFactory.discover_entry_points()
    if kind not in ArchitectureAdapterFactory._adapters:
        raise UserError(f"TransformerBridge does not know {kind}; load {label} with backend='hf'")
    before = _logits(model)
    try:
        # Not given the tokenizer: the builder would load another one with BOS by its name.
        bridge = build_bridge_from_module(
            model, kind, hf_config=model.config, tokenizer=None, model_name=label
        )
        model.requires_grad_(False)  # attention is split into new parameters
        after = _logits(model)
    except Exception as error:  # an adapter that does not fit this checkpoint fails in any way
        raise UserError(
            f"TransformerBridge cannot wrap {label} ({kind}): {error}; use backend='hf'"
        ) from None
    close = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not torch.allclose(before, after, rtol=close, atol=close):
        raise UserError(
            f"TransformerBridge computes other logits than transformers for {label} ({kind}): "
            f"they differ by {(before - after).abs().max():.1e}; use backend='hf'"
        )
    bridge.tokenizer = tokenizer
    prepends, appends = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = prepends, appends
    return bridge


def hook(
    block: nn.Module, kind: Literal["pre", "post"], fn: Callable[[Tensor], Tensor | None]
) -> RemovableHandle:
    """Call `fn` at the hook point of a wrapped block's residual, as `saes.lm.capture.hook` does.

    Hooks that were put on the same point before, through TransformerLens too, have run by then.
    """
    point = cast("Any", block).hook_in if kind == "pre" else cast("Any", block).hook_out

    def call(_module: nn.Module, _args: Any, residual: Tensor) -> Tensor | None:
        return fn(residual)

    return point.register_forward_hook(call)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    """Logits of a left-padded and an unpadded row, at their tokens."""
    device = cast("Any", model.get_input_embeddings()).weight.device
    ids = torch.arange(16, device=device).reshape(2, 8) % model.config.get_text_config().vocab_size
    attention = torch.ones_like(ids)
    attention[0, :3] = 0
    logits = cast("Any", model)(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return logits.to(device)[attention.bool()].float()
