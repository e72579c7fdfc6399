"""`saes.lm.capture`: one pass, which stops early and leaves nothing behind.

That every site is transformers' own hidden state, for any family, backend, padding and batch size,
is tested in test_families.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from saes.errors import UserError
from saes.lm.capture import capture, forward
from saes.lm.model import LM, load_lm
from saes.lm.tokens import pad

IDS = [[1, *((7 * i + 13 * j) % 290 + 5 for j in range(n))] for i, n in enumerate((3, 20, 9, 14))]


def hooks(lm: LM) -> list[tuple[int, int]]:
    """How many hooks each block has; transformers leaves some of its own."""
    return [(len(b._forward_hooks), len(b._forward_pre_hooks)) for b in lm.blocks]


def test_the_pass_stops_after_the_last_site(tiny_lm: LM) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(tiny_lm.blocks)
    ]
    batch = pad(tiny_lm, IDS)
    capture(tiny_lm, batch, ["blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"])
    assert ran == [0, 1]
    ran.clear()
    capture(tiny_lm, batch, ["blocks.2.hook_resid_pre"])
    assert ran == [0, 1]
    for handle in handles:
        handle.remove()


def test_hooks_are_gone_afterwards_and_several_sites_equal_one(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, IDS)
    sites = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"]
    before = hooks(tiny_lm)
    together = capture(tiny_lm, batch, sites)
    assert list(together) == sites
    for site in sites:
        assert torch.equal(together[site], capture(tiny_lm, batch, [site])[site])
        assert not together[site].requires_grad
    assert hooks(tiny_lm) == before
    assert capture(tiny_lm, batch, []) == {}


def test_the_embedding_is_the_first_pre_site(tiny_lm: LM) -> None:
    batch = pad(tiny_lm, IDS)
    found = capture(tiny_lm, batch, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    assert torch.equal(found, tiny_lm.model.get_input_embeddings()(batch.ids))


def test_an_unknown_site_leaves_no_hook(tiny_lm: LM) -> None:
    before = hooks(tiny_lm)
    with pytest.raises(UserError, match="out of range"):
        capture(tiny_lm, pad(tiny_lm, IDS), ["blocks.0.hook_resid_pre", "blocks.9.hook_resid_pre"])
    assert hooks(tiny_lm) == before


def test_signatures_are_not_read_at_every_call(
    tiny_lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one takes as long as a small model's block."""
    import inspect

    batch = pad(tiny_lm, IDS)
    forward(tiny_lm, batch)
    read: list[Any] = []
    true = inspect.signature

    def spy(function: Any, **options: Any) -> Any:
        if getattr(function, "__qualname__", "") == "LlamaForCausalLM.forward":
            read.append(function)
        return true(function, **options)

    monkeypatch.setattr(inspect, "signature", spy)
    forward(tiny_lm, batch)
    assert not read


def test_residuals_come_in_the_models_dtype(tiny_lm_folder: Path) -> None:
    lm = load_lm(tiny_lm_folder, dtype="bfloat16")
    site = "blocks.2.hook_resid_post"
    assert capture(lm, pad(lm, IDS), [site])[site].dtype == torch.bfloat16
