"""Fixtures that many tests share: a tiny real architecture with random weights, and SAEs for it.

Heavy libraries are imported inside the fixtures, so that tests of torch-free modules stay quick.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before numpy and torch load. One thread: sums come out the same on every machine, and models this
# small run no slower.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "agg"

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from playwright.sync_api import Page
    from transformers import PreTrainedTokenizerFast

    from saes.lm.model import LM

settings.register_profile("same-every-time", derandomize=True, deadline=None, database=None)
settings.load_profile("same-every-time")

SITES = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
SENTENCES = (
    "The door stood open, and nobody had swept the hall since Tuesday.",
    "She read the letter twice, folded it, and put it back where it had been.",
    "He laughed so hard that the cup slid from his hand and broke on the step.",
    "Rain came in the night; by morning the lane was a brown river.",
    'They said, "Wait here until the bell rings," and walked off without turning round.',
    "My sister counted the coins again, 14 of them, and still it was not enough.",
)
CHROMIUM_ARGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE of 300 tokens that puts `<s>` in front, as Llama's does.

    `<pad>`, `<s>` and `</s>` are 0, 1 and 2. Any text comes back unchanged from its tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    assert bpe.get_vocab_size() == 300
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_lm_folder(
    tiny_tokenizer: "PreTrainedTokenizerFast", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random-weight Llama in Hugging Face format: d_model 32, 4 blocks, 2 heads, context 256.

    Read only: copy it before changing anything in it.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # so that blocks and tokens differ by far more than rounding
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("tiny") / "tiny_lm"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny_lm_folder: Path) -> "LM":
    """The model of `tiny_lm_folder`, loaded as a user would; on the CPU, in float32."""
    from saes.lm.model import load_lm

    return load_lm(tiny_lm_folder)


@pytest.fixture(scope="session")
def tiny_sae_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By site, TopK SAEs for `tiny_lm` in sae-lens format: 128 latents, 8 active, random weights.

    Read only: copy a folder before changing anything in it.
    """
    import torch
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    parent = tmp_path_factory.mktemp("tiny_saes")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for site in SITES:
            metadata = SAEMetadata(model_name="tiny_lm", hook_name=site, context_size=256)
            sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=128, k=8, metadata=metadata))
            with torch.no_grad():
                sae.W_enc.normal_(std=32**-0.5)
                sae.b_enc.normal_(std=0.1)
                sae.b_dec.normal_(std=0.1)
                sae.W_dec.normal_()
                sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
            sae.save_model(parent / site)
    return {site: parent / site for site in SITES}


@pytest.fixture(scope="session")
def tiny_sae_folder(tiny_sae_folders: dict[str, Path]) -> Path:
    """The folder of the SAE at `blocks.1.hook_resid_post`."""
    return tiny_sae_folders[SITES[0]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """`../shared/data`, the files for development that no clone comes with; skips without them."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the development data in ../shared/data, which is not here")
    return folder


@pytest.fixture
def browser_page() -> Iterator["Page"]:
    """An empty page of the system's Chromium, 1280 x 800; an error in its script fails the test.

    Skips where no Chromium is installed; Playwright's own browsers are never downloaded.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(CHROMIUM_ARGS))
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        thrown: list[str] = []
        page.on("pageerror", lambda error: thrown.append(str(error)))
        yield page
        browser.close()
    assert not thrown, f"the page's script failed: {thrown}"
