"""`saes.lm.splice` against whole passes with the residual edited, on every family of models."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from saes.lm.capture import capture, forward
from saes.lm.edit import edit
from saes.lm.model import LM, load_lm
from saes.lm.splice import Onward
from saes.lm.tokens import pad
from tests.test_families import FAMILIES, build

IDS = [[1, 9, 33, 120, 7, 250], [1, 44, 8], [1, 91, 92, 93, 5]]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> LM:
    return load_lm(build(request.param), tokenizer=tiny_tokenizer)


def sites(lm: LM) -> list[str]:
    return [f"blocks.{i}.hook_resid_{kind}" for i in range(lm.n_layers) for kind in ("pre", "post")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_gives_the_bytes_of_a_whole_edited_pass(lm: LM, side: str) -> None:
    batch = pad(lm, IDS, side=side)  # pyright: ignore[reportArgumentType]
    last = sites(lm)[-1]
    onward = Onward(lm)
    seen = []
    for site in sites(lm):
        new = capture(lm, batch, [site])[site].flip(-1) * 1.5
        with edit(lm, site, lambda _, new=new: new):
            whole = capture(lm, batch, [last])[last]
        found = onward(batch, site, new)
        assert torch.equal(found[batch.attention], whole[batch.attention])
        seen.append(found[batch.attention])
    assert not torch.allclose(seen[0], seen[-1])


def test_unchanged_residuals_give_the_clean_pass(lm: LM) -> None:
    batch = pad(lm, IDS)
    read = capture(lm, batch, sites(lm))
    for site in sites(lm):
        found = Onward(lm)(batch, site, read[site])
        assert torch.equal(found[batch.attention], read[sites(lm)[-1]][batch.attention])


def test_only_the_blocks_above_run(tiny_lm: LM) -> None:
    ran: list[int] = []
    batch, onward = pad(tiny_lm, IDS), Onward(tiny_lm)
    x = capture(tiny_lm, batch, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, block in enumerate(tiny_lm.blocks)
    ]
    onward(batch, "blocks.1.hook_resid_post", x)
    assert ran == [2, 3]
    onward(batch, "blocks.3.hook_resid_pre", x)
    assert ran == [2, 3, 3]
    onward(batch, "blocks.3.hook_resid_post", x)
    assert ran == [2, 3, 3]
    for handle in handles:
        handle.remove()


def test_the_model_is_as_before_even_after_an_error(tiny_lm: LM) -> None:
    batch, site = pad(tiny_lm, IDS), "blocks.2.hook_resid_post"
    own = tiny_lm.blocks[0].forward
    before = forward(tiny_lm, batch).logits
    tiny_lm.blocks[1].forward = special = tiny_lm.blocks[1].forward  # as accelerate does
    with pytest.raises(Exception, match=r"shape|size|edit"):
        Onward(tiny_lm)(batch, site, torch.zeros(3, 6, 31))
    assert vars(tiny_lm.blocks[1]).pop("forward") is special
    assert "forward" not in vars(tiny_lm.blocks[0])
    assert tiny_lm.blocks[0].forward == own
    assert torch.equal(forward(tiny_lm, batch).logits, before)


def test_the_bridge_gives_the_same(tiny_lm: LM, tiny_lm_folder: Path) -> None:
    bridged = load_lm(tiny_lm_folder, backend="bridge")
    batch = pad(tiny_lm, IDS)
    x = 0.5 * capture(tiny_lm, batch, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    for site in sites(tiny_lm):
        plain, other = (Onward(lm)(batch, site, x)[batch.attention] for lm in (tiny_lm, bridged))
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-5)
