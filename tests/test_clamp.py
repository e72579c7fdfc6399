"""`saes.clamp`: equals h + decode(z') - decode(z) written out with sae-lens's encode and decode."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE

from saes.clamp import ablate, add, cap, clamp, scale
from saes.errors import UserError
from saes.latents import SaeLens
from saes.lm.capture import capture
from saes.lm.edit import edit
from saes.lm.model import LM
from saes.lm.tokens import pad
from saes.pretrained import load_sae

H = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.5


@pytest.fixture(scope="module")
def dictionary(tiny_sae_folder: Path) -> SaeLens:
    return load_sae(tiny_sae_folder, d_model=32)


@pytest.fixture(scope="module")
def often(dictionary: SaeLens) -> int:
    """The latent that fires most on H."""
    fires = (dictionary.encode(H.flatten(0, 1)) > 0).sum(0)
    assert 3 <= fires.max() < 21
    return int(fires.argmax())


def naive(
    folder: Path, latent: int, change: Callable[[torch.Tensor], torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        z = sae.encode(H)
        edited = z.clone()
        edited[..., latent] = change(z[..., latent])
        return torch.where(mask[..., None], H + sae.decode(edited) - sae.decode(z), H)


@pytest.mark.parametrize("masked", [True, False])
def test_equals_the_formula(
    dictionary: SaeLens, tiny_sae_folder: Path, often: int, masked: bool
) -> None:
    mask, where = (MASK, MASK) if masked else (None, torch.ones(3, 7, dtype=torch.bool))
    cases = [
        (clamp(dictionary, often, 4.0, mask), lambda z: torch.full_like(z, 4.0)),
        (ablate(dictionary, often, mask), lambda z: z * 0),
        (scale(dictionary, often, 3.0, mask), lambda z: z * 3),
        (cap(dictionary, often, 0.5, mask), lambda z: z.clamp(max=0.5)),
    ]
    for fn, change in cases:
        expected = naive(tiny_sae_folder, often, change, where)
        assert not torch.allclose(expected, H, atol=0.1)
        torch.testing.assert_close(fn(H), expected, rtol=1e-5, atol=1e-5)


@given(latent=st.integers(0, 127), value=st.floats(-20, 20, width=32))
def test_a_clamp_moves_along_the_decoder_row_only_where_masked(
    dictionary: SaeLens, latent: int, value: float
) -> None:
    before = H.clone()
    moved = clamp(dictionary, latent, value, MASK)(H) - H
    assert torch.equal(before, H)  # the input is left alone
    assert not moved[~MASK].any()
    row = dictionary.W_dec[latent]
    along = moved[MASK] @ row / row.norm() ** 2
    torch.testing.assert_close(moved[MASK], along[:, None] * row, rtol=0, atol=1e-5)
    z = dictionary.encode(H[MASK])[:, latent]
    torch.testing.assert_close(along, value - z, rtol=1e-5, atol=1e-5)


def test_clamping_to_the_present_value_does_nothing(dictionary: SaeLens, often: int) -> None:
    for row, pos in ((0, 0), (1, 4), (2, 6)):
        one = torch.zeros(3, 7, dtype=torch.bool)
        one[row, pos] = True
        value = float(dictionary.encode(H[row, pos][None])[0, often])
        torch.testing.assert_close(clamp(dictionary, often, value, one)(H), H, rtol=0, atol=1e-6)
    assert torch.equal(scale(dictionary, often, 1.0)(H), H)
    assert torch.equal(cap(dictionary, often, 1e9)(H), H)


def test_add() -> None:
    vector = torch.arange(32.0)
    assert torch.equal(add(vector)(H), H + vector)
    assert torch.equal(add(vector, MASK)(H), torch.where(MASK[..., None], H + vector, H))


def test_an_empty_mask_changes_nothing(dictionary: SaeLens, often: int) -> None:
    none = torch.zeros(3, 7, dtype=torch.bool)
    assert torch.equal(clamp(dictionary, often, 9.0, none)(H), H)
    assert torch.equal(add(torch.ones(32), none)(H), H)


def test_half_precision_is_kept(dictionary: SaeLens, often: int) -> None:
    edited = clamp(dictionary, often, 4.0, MASK)(H.bfloat16())
    assert edited.dtype == torch.bfloat16
    expected = clamp(dictionary, often, 4.0, MASK)(H.bfloat16().float())
    torch.testing.assert_close(edited.float(), expected, rtol=1e-2, atol=1e-2)


def test_wrong_latent_and_mask(dictionary: SaeLens) -> None:
    for latent in (-1, 128):
        with pytest.raises(UserError, match=f"latent {latent} .* 128 latents"):
            clamp(dictionary, latent, 1.0)
    with pytest.raises(AssertionError, match="mask"):
        clamp(dictionary, 0, 1.0, MASK[:2])(H)


def test_inside_the_model(tiny_lm: LM, dictionary: SaeLens) -> None:
    """A clamped latent shows at its site and changes what comes after, at masked positions on."""
    batch = pad(tiny_lm, [[1, 40, 41, 42, 43, 44]])
    mask = torch.tensor([[False, False, False, True, False, False]])
    later = "blocks.3.hook_resid_post"
    clean = capture(tiny_lm, batch, [dictionary.site, later])
    z = dictionary.encode(clean[dictionary.site][0, 3:4])[0]
    latent = int(z.argmax())
    with edit(tiny_lm, dictionary.site, clamp(dictionary, latent, 30.0, mask)):
        edited = capture(tiny_lm, batch, [dictionary.site, later])
    moved = (edited[later] - clean[later]).norm(dim=-1)[0] > 1e-3
    assert moved.tolist() == [False, False, False, True, True, True]
    at_site = (edited[dictionary.site] - clean[dictionary.site])[0, 3]
    torch.testing.assert_close(at_site, (30 - z[latent]) * dictionary.W_dec[latent])
