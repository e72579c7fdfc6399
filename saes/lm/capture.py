"""Read the residual stream at any set of sites in one pass that stops after the last of them."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saes.lm import bridge
from saes.lm.model import LM, Site
from saes.lm.tokens import Batch


class _Done(Exception):
    """Every site has been read."""


def capture(
    lm: LM, batch: Batch, sites: Sequence[str]
) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """The residual at each site, in the model's dtype on `lm.device`; padding's means nothing.

    Runs inside `saes.lm.edit.edit` see the edited residual.

    Raises:
        UserError: an unknown site, or one out of range.
    """
    wanted = sorted({lm.site(name) for name in sites}, key=_depth)
    read: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for site in wanted:
            handle = _watch(lm, site, read, last=site == wanted[-1])
            hooks.callback(handle.remove)
        if wanted:
            with suppress(_Done):
                forward(lm, batch)
    return {name: read[name].to(lm.device) for name in sites}


@torch.no_grad()
def forward(lm: LM, batch: Batch) -> Any:
    """Run the model on a batch so that padding on either side does not matter.

    Position ids count the tokens of each text from 0, whatever padding precedes them.
    """
    inputs: dict[str, Tensor] = {
        "input_ids": batch.ids,
        "attention_mask": batch.attention.long(),
    }
    if _takes_positions(type(lm.model)):
        inputs["position_ids"] = (batch.attention.long().cumsum(-1) - 1).clamp(min=0)
    return lm.model(**inputs, use_cache=False)


@cache
def _takes_positions(model: type) -> bool:
    """Whether position ids are among a model's inputs: not so with Bloom and MPT, all ALiBi."""
    return "position_ids" in inspect.signature(model.forward).parameters


def _depth(site: Site) -> tuple[int, bool]:
    return site.layer, site.kind == "post"


def _watch(lm: LM, site: Site, read: dict[str, Tensor], *, last: bool) -> RemovableHandle:
    """Hook one site: keep its residual in `read`, and stop the pass after the last site."""

    def keep(residual: Tensor) -> None:
        read[str(site)] = residual
        if last:
            raise _Done

    return hook(lm, site, keep)


def hook(lm: LM, site: Site, fn: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `fn` on the residual at a site whenever the model runs; replace it by what `fn` returns.

    Args:
        fn: takes the residual; returns a new one, or None to leave it.

    Returns:
        A handle with `remove()`.
    """
    block = lm.blocks[site.layer]
    if lm.bridge is not None:
        return bridge.hook(block, site.kind, fn)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = fn(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = fn(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            new = fn(output[0])
            return None if new is None else (new, *output[1:])
        return fn(output)

    if site.kind == "pre":
        return block.register_forward_pre_hook(before, with_kwargs=True)
    return block.register_forward_hook(after)
