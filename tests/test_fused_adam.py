"""FusedAdam against torch's Adam, and memory that is kept."""

import platform
import resource

import pytest
import torch
from torch import Tensor

from saes.fused_adam import FusedAdam, keep_freed_memory


def rows(n: int, width: int, *, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["as it is", "contiguous"])
def test_fused_adam_against_adam_whatever_the_layouts(layout: str) -> None:
    """torch's own fused Adam gives wrong values where layouts differ."""
    start = rows(6, 40)
    plain = torch.nn.Parameter(start.clone())
    turned = torch.nn.Parameter(start.t().contiguous().t())
    adams = [torch.optim.Adam([plain], lr=0.1), FusedAdam([turned], lr=0.1, betas=(0.9, 0.999))]
    for step in range(4):
        plain.grad = rows(6, 40, seed=step)
        turned.grad = plain.grad.clone() if step % 2 else plain.grad.t().contiguous().t()
        if layout == "contiguous" and step:  # as read from a file
            state = adams[1].state_dict()
            for name in ("exp_avg", "exp_avg_sq"):
                state["state"][0][name] = state["state"][0][name].contiguous()
            adams[1].load_state_dict(state)
        for adam in adams:
            adam.step()
    torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-6)
    mean = adams[1].state[turned]["exp_avg"]
    torch.testing.assert_close(mean, adams[0].state[plain]["exp_avg"], rtol=1e-5, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    with_gradient, without = (torch.nn.Parameter(rows(3, 4)) for _ in range(2))
    adam = FusedAdam([with_gradient, without], lr=0.1, betas=(0.9, 0.999))
    with_gradient.grad = torch.ones(3, 4)
    adam.step()
    assert torch.equal(without, rows(3, 4))
    assert not torch.equal(with_gradient, rows(3, 4))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """Another block of 64 MiB has no page that the kernel must first fill with zeros."""
    keep_freed_memory()
    for _ in range(2):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000  # not 16,384
