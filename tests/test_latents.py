"""`saes.latents`: CSR encoding equals sae-lens's dense encoding."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig

from saes.latents import SaeLens, encode_csr
from saes.pretrained import load_sae

SITE = "blocks.1.hook_resid_post"


def residuals(n: int) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [1, 7, 64, 150])
def test_csr_equals_dense(tiny_sae_folder: Path, n: int) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    dense = SAE.load_from_disk(tiny_sae_folder).encode(residuals(n)).detach().numpy()
    csr = encode_csr(dictionary, residuals(n), chunk=64)
    assert csr.shape == (n, 128)
    assert csr.dtype == np.float32
    assert csr.has_canonical_format
    assert csr.nnz == (dense != 0).sum() <= 8 * n
    np.testing.assert_allclose(csr.toarray(), dense, rtol=1e-6, atol=1e-6)


def test_no_residuals(tiny_sae_folder: Path) -> None:
    csr = encode_csr(load_sae(tiny_sae_folder, d_model=32), torch.empty(0, 32))
    assert csr.shape == (0, 128)
    assert csr.dtype == np.float32
    assert csr.nnz == 0


def test_rows_without_any_latent() -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    csr = encode_csr(SaeLens(sae, SITE), residuals(5))
    assert csr.shape == (5, 64)
    assert csr.nnz == 0
    assert csr.indptr.tolist() == [0] * 6


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
    np.testing.assert_allclose(encode_csr(dictionary, x, chunk=8).toarray(), z.detach().numpy())
    assert not z.requires_grad
    assert (dictionary.d_in, dictionary.d_sae) == (32, 64)


def test_half_precision_residuals_are_encoded_in_float32(tiny_sae_folder: Path) -> None:
    dictionary = load_sae(tiny_sae_folder, d_model=32)
    x = residuals(9).bfloat16()
    assert dictionary.encode(x).dtype == torch.float32
    assert torch.equal(dictionary.encode(x), dictionary.encode(x.float()))
