"""`saes.registry`: sae-lens's list of released SAEs, against sae-lens's own reading of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from saes import registry
from saes.errors import UserError
from saes.latents import Origin
from saes.registry import find, list_saes, neuronpedia_link, width_in


def rows(release: str) -> list[registry.Listed]:
    return [row for row in list_saes() if row.release == release]


def test_equals_what_sae_lens_reads() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = get_pretrained_saes_directory()
    ours = list_saes()
    assert len(ours) == sum(len(t.saes_map) for t in theirs.values()) > 10_000
    for row in ours:
        entry = theirs[row.release]
        assert (row.repo, row.model) == (entry.repo_id, entry.model)
        assert row.path == entry.saes_map[row.id]
        assert row.neuronpedia == entry.neuronpedia_id[row.id]
        assert row.norm_scaling_factor == entry.norm_scaling_factor.get(row.id)
        if entry.expected_l0[row.id]:
            assert row.l0 == entry.expected_l0[row.id]
        if row.variance_explained is not None:
            assert row.variance_explained == entry.expected_var_explained[row.id]


def test_every_format_that_sae_lens_converts_is_known_or_no_residual() -> None:
    for row in list_saes():
        if row.format not in registry.FORMATS.values():
            assert not row.loadable
            assert row.site is None, (row.release, row.format)


def test_sites_agree_with_what_sae_lens_would_hook() -> None:
    """A site is named where, and only where, the names speak of the residual stream."""
    for row in list_saes():
        other = any(word in f"{row.release} {row.path} {row.id}" for word in ("mlp", "attn", "_att", "-att", "transcoder", "hook_z", "resid_mid", "clt"))  # noqa: E501  # fmt: skip
        if other or row.format == "temporal":
            assert row.site is None, row
        elif "llama_scope_lx" not in row.release:
            assert row.site is not None, row
        if row.site is not None and (row.site in row.id or row.site in row.path):
            continue
        if row.site is not None and "embedding" not in row.path:
            layer = row.site.split(".")[1]
            assert any(f"{word}{layer}" in f"{row.id} {row.path}" for word in ("layer_", "layer", "l", "L")), row  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(
    ("release", "sae_id", "site", "width", "l0"),
    [
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", "blocks.8.hook_resid_pre", None, 60.0),
        ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_768", "blocks.8.hook_resid_pre", None, 36.0),  # noqa: E501
        ("gpt2-small-resid-post-v5-32k", "blocks.3.hook_resid_post", "blocks.3.hook_resid_post", 32768, 32.0),  # noqa: E501
        ("gpt2-small-resid-mid-v5-32k", "blocks.3.hook_resid_mid", None, 32768, None),
        ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", "blocks.12.hook_resid_post", 16384, 82.0),  # noqa: E501
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_65k/canonical", "blocks.12.hook_resid_post", 65536, 72.0),  # noqa: E501
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "blocks.0.hook_resid_pre", 4096, 6.0),  # noqa: E501
        ("gemma-scope-2b-pt-mlp", "layer_0/width_16k/average_l0_119", None, 16384, 119.0),
        ("gemma-scope-2-1b-pt-res", "layer_13_width_262k_l0_big", "blocks.13.hook_resid_post", 262144, 150.0),  # noqa: E501
        ("gemma-scope-2-1b-pt-att", "layer_13_width_16k_l0_big", None, 16384, 150.0),
        ("llama_scope_lxr_8x", "l15r_8x", "blocks.15.hook_resid_post", 32768, 50.0),
        ("llama_scope_lxm_8x", "l15m_8x", None, 32768, 50.0),
        ("llama_scope_r1_distill", "l0r_800m_slimpajama", "blocks.0.hook_resid_post", 32768, None),
        ("sae_bench_pythia70m_sweep_gated_ctx128_0730", "blocks.3.hook_resid_post__trainer_0", "blocks.3.hook_resid_post", 4096, None),  # noqa: E501
        ("qwen-scope-3-8b-base-w64k-l50", "layer7", "blocks.7.hook_resid_post", 65536, 50.0),
        ("goodfire-llama-3.1-8b-instruct", "layer_19", "blocks.19.hook_resid_post", None, 91.0),
        ("llama-3.1-8b-instruct-andyrdt", "resid_post_layer_3_trainer_1", "blocks.3.hook_resid_post", None, None),  # noqa: E501
        ("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post", None, None, 192.0),
        ("mwhanna-qwen3-4b-transcoders", "layer_0", None, None, None),
    ],
)  # fmt: skip
def test_sites_and_widths(
    release: str, sae_id: str, site: str | None, width: int | None, l0: float | None
) -> None:
    row = find(f"{release}/{sae_id}")
    assert row is not None
    assert (row.site, row.width, row.l0) == (site, width, l0)
    assert row.loadable == (site is not None)
    assert row.source == f"{release}/{sae_id}"


def test_normalisation_token_by_token_is_not_loadable() -> None:
    assert not any(row.loadable for row in rows("mistral-7b-res-wg"))


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gemma-2-2b", "gemma-2-2b"),
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("Gemma-2-2B", "gemma-2-2b"),
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("EleutherAI/pythia-70m-deduped", "pythia-70m-deduped"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    ],
)
def test_names_of_models(name: str, model: str) -> None:
    assert {row.model for row in list_saes(name)} == {model}


def test_no_sae_for_a_model_suggests_names_like_it() -> None:
    with pytest.raises(UserError, match=r"'gemma-2-3b'.*gemma-2-2b"):
        list_saes("gemma-2-3b")
    with pytest.raises(UserError, match=r"no released SAE for model '/x/y'.* and \d+ more"):
        list_saes("/x/y")


def test_find() -> None:
    assert find("no-release/x") is None
    assert find("/some/folder") is None
    assert find("google/gemma-scope-2b-pt-res/layer_1") is None
    with pytest.raises(UserError, match=r"no SAE 'blocks.8'; it has .*blocks\.8\.hook_resid_pre"):
        find("gpt2-small-res-jb/blocks.8")
    with pytest.raises(UserError, match=r"no SAE ''; it has .* more"):
        find("gpt2-small-res-jb")


def test_neuronpedia_links() -> None:
    row = find("gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical")
    assert row is not None
    link = "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k"
    assert neuronpedia_link(row) == link
    origin = Origin("x", "gemma-scope", neuronpedia=row.neuronpedia)
    assert neuronpedia_link(origin, 0) == f"{link}/0"
    assert neuronpedia_link(Origin("x", "sae-lens"), 3) is None


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("width_1m", 2**20),
        ("width_524k", 2**19),
        ("W80K", 81920),
        ("v5_128k_layer_0", 131072),
        ("res_24k", 24 * 1024),
        ("2pow14", 16384),
        ("gemma_2b_blocks.0.hook_resid_post_16384_anthropic", 16384),
        ("pythia-70m-deduped", None),
        ("llama3.1-8b", None),
        ("layer_7", None),
        ("0k", 0),
    ],
)
def test_widths_in_names(name: str, width: int | None) -> None:
    assert width_in(name) == width


def test_neither_torch_nor_sae_lens_is_imported() -> None:
    code = (
        "import sys; from saes.registry import list_saes; import saes.sources;"
        "assert list_saes('gpt2');"
        "assert not {'torch', 'sae_lens', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
