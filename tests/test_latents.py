"""`saes.latents`: sae-lens's SAEs as dictionaries."""

from pathlib import Path

import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

from saes.latents import SaeLens
from saes.pretrained import load_sae

SITE = "blocks.1.hook_resid_post"


def residuals(n: int) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(n))


def architectures() -> list[SAE]:
    standard = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    jump = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64))
    with torch.no_grad():
        jump.threshold.fill_(0.3)
        for sae in (standard, jump):
            sae.b_dec.normal_()
    return [standard, jump]


@pytest.mark.parametrize("sae", architectures(), ids=lambda sae: sae.cfg.architecture())
def test_any_architecture_with_an_affine_decoder(sae: SAE) -> None:
    dictionary = SaeLens(sae, SITE)
    x = residuals(20)
    z = dictionary.encode(x)
    assert torch.equal(z, sae.encode(x))
    assert torch.equal(dictionary.decode(z), sae.decode(z))
    zero = dictionary.decode(torch.zeros_like(z))
    torch.testing.assert_close(dictionary.decode(z) - zero, z @ dictionary.W_dec)
    assert not z.requires_grad
    assert (dictionary.d_in, dictionary.d_sae) == (32, 64)


def test_half_precision_residuals_are_encoded_in_float32(tiny_sae_folder: Path) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    x = residuals(9).bfloat16()
    assert dictionary.encode(x).dtype == torch.float32
    assert torch.equal(dictionary.encode(x), dictionary.encode(x.float()))
