"""An Adam that goes over memory once, and memory that a step finds where the last one left it."""

import ctypes
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class FusedAdam(torch.optim.Adam):
    """Adam in one pass over memory, whatever the layout of a parameter.

    torch's own fused Adam on a CPU copies parameters that are not contiguous, and mixes values up
    where the layouts of a parameter, its gradient and its averages differ. Its state is Adam's.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            states = [self._state(p) for p in used]
            grads, means, squares = (
                [_in_memory_order(t, p) for t, p in zip(tensors, used, strict=True)]
                for tensors in (
                    [p.grad for p in used],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                )
            )
            adam(
                [_in_memory_order(p, p) for p in used],
                grads,
                means,
                squares,
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        """The averages of a parameter, in its own layout."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(p)
            elif state[name].stride() != p.stride():  # from a checkpoint
                state[name] = torch.empty_like(p).copy_(state[name])
        state["step"] = state["step"].to(p.device)
        return state


def _in_memory_order(values: Tensor, like: Tensor) -> Tensor:
    """`values` as one row in the order in which `like` lies in memory, copied only if need be."""
    if values.stride() != like.stride():
        values = torch.empty_like(like).copy_(values)
    return values.as_strided((values.numel(),), (1,))


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks for the next step, and not give those above 32 MiB back.

    The kernel fills every page of a new block with zeros, which was a tenth of a step. The process
    stays as large as it was at its largest. Does nothing where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
