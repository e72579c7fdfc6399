"""Training an SAE on the demo model, language model included, against sae-lens's runner.

    make bench NAME=train-end-to-end

Both train a TopK SAE of 4,096 latents, k = 32, on the same tokens of the packaged corpus, in rows
of 256, 8 rows a pass, batches of 2,048, with the same optimizer settings, from the pass through the
model to the saved folder. Model, weights and updates are float32; our encoder's matmul chooses
candidates in bfloat16 where the CPU is faster so (`encode_dtype: auto`), theirs is float32.
Each has a process of its own; rounds are interleaved, after one that does not count.

sae-lens runs its `LanguageModelSAETrainingRunner` on a pre-tokenised dataset, once with the model
as it loads local folders (`AutoModelForCausalLM`) and once with TransformerLens's bridge, which
stops after the site as we do. Variance explained is on rows that neither was trained on.
"""

import argparse
import logging
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleave, report, serve, table, worker

from discovery.corpora.packaged import load_corpus
from saes.files import locate
from saes.lm.model import LM, load_lm
from saes.lm.tokens import tokenize
from saes.stream.activations import ActivationStream, StreamConfig
from saes.stream.rows import read_rows
from saes.training.architectures import SaeSpec, TrainConfig
from saes.training.export import Fit, evaluate, load
from saes.training.train import train_saes

SITE, LAYER = "blocks.4.hook_resid_post", "model.layers.4"
CONTEXT, BATCH, ROWS_A_PASS, CHUNK_ROWS = 256, 2048, 8, 256
D_SAE, K, LR, WARMUP, DECAY, DEAD_TOKENS = 4096, 32, 1e-3, 0.02, 0.5, 200_000
HELD_OUT = 32  # rows


def rows_of_corpus(lm: LM, count: int) -> np.ndarray:
    """Rows of the packaged texts, each opened by BOS."""
    corpus = load_corpus()
    ids = [
        i
        for text in tokenize(lm, [t.text for t in (*corpus.selection, *corpus.confirmation)]).ids
        for i in text[1:]
    ]
    rows = np.array(ids[: count * (CONTEXT - 1)]).reshape(-1, CONTEXT - 1)
    return np.concatenate([np.full((len(rows), 1), lm.tokenizer.bos_token_id), rows], axis=1)


def ours(lm: LM, rows: np.ndarray, tokens: int, out: Path) -> Callable[[], None]:
    """Our training, from rows to the saved folder."""

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        settings = StreamConfig(batch=BATCH, chunk_rows=CHUNK_ROWS, pass_rows=ROWS_A_PASS)
        stream = ActivationStream(lm, rows, (SITE,), settings, bos=None)
        config = TrainConfig(
            tokens=tokens, lr=LR, warmup=WARMUP, decay=DECAY, dead_tokens=DEAD_TOKENS,
            calibration_tokens=BATCH, b_dec="zero", checkpoint_steps=10**6, dtype="float32",
        )  # fmt: skip
        train_saes(stream, [SaeSpec(SITE, "topk", D_SAE, k=K)], config, out, out / "work")

    return run


def theirs(model: Any, hook: str, rows: np.ndarray, tokens: int, out: Path) -> Callable[[], None]:
    """sae-lens's runner, from the same rows to the saved folder."""
    from datasets import Dataset
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    data = Dataset.from_dict({"tokens": rows.tolist()})
    steps = tokens // BATCH

    def run() -> None:
        shutil.rmtree(out, ignore_errors=True)
        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(
                d_in=256, d_sae=D_SAE, k=K, normalize_activations="expected_average_only_in",
                decoder_init_norm=1.0,
            ),
            hook_name=hook, model_name="demo_lm", dataset_path="rows", is_dataset_tokenized=True,
            context_size=CONTEXT, training_tokens=steps * BATCH, train_batch_size_tokens=BATCH,
            store_batch_size_prompts=ROWS_A_PASS, n_batches_in_buffer=CHUNK_ROWS // ROWS_A_PASS,
            exclude_special_tokens=True, lr=LR, lr_warm_up_steps=int(steps * WARMUP) + 1,
            lr_decay_steps=int(steps * DECAY), dead_feature_window=DEAD_TOKENS // BATCH,
            n_batches_for_norm_estimate=1, n_eval_batches=0, n_checkpoints=0, verbose=False,
            checkpoint_path=None, output_path=str(out), logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        torch.manual_seed(0)
        LanguageModelSAETrainingRunner(config, override_dataset=data, override_model=model).run()

    return run


def bridge() -> Any:
    """The demo model as TransformerLens has it."""
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(locate("packaged/demo_lm")), device="cpu")


def proxy() -> Any:
    """The demo model as sae-lens loads a local folder."""
    from sae_lens.load_model import load_model

    folder = str(locate("packaged/demo_lm"))
    return load_model("AutoModelForCausalLM", folder, "cpu", {"dtype": torch.float32}, [LAYER])


RUNS = ("ours", "sae-lens", "sae-lens-bridge")


def training(name: str, lm: LM, rows: np.ndarray, tokens: int, out: Path) -> Callable[[], None]:
    """One whole training of the named trainer."""
    if name == "ours":
        return ours(lm, rows, tokens, out)
    if name == "sae-lens":
        return theirs(proxy(), LAYER, rows, tokens, out)
    return theirs(bridge(), "blocks.4.hook_out", rows, tokens, out)


def held_out_fit(lm: LM, rows: np.ndarray, folder: Path) -> Fit:
    """L0 and variance explained of a saved SAE."""
    x = read_rows(lm, rows, (SITE,), None, autocast=False)[SITE]
    return evaluate(load(folder), [x])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=61, help="steps of one training")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    lm = load_lm("packaged/demo_lm")
    tokens = args.steps * BATCH
    count = tokens // (CONTEXT - 1) + CHUNK_ROWS
    rows = rows_of_corpus(lm, count + HELD_OUT)
    train, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    if args.serve:
        serve(training(args.serve, lm, train, tokens, args.out))
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in RUNS}
        peaks: dict[str, float] = {}

        def run(name: str) -> Callable[[], None]:
            command = [sys.executable, *sys.argv, "--serve", name, "--out", str(places[name])]
            started = worker(command)

            def once() -> None:
                peaks[name] = round(started(), 1)

            return once

        seconds = interleave({name: run(name) for name in RUNS}, args.rounds)
        places["ours"] /= SITE
        fits = {name: held_out_fit(lm, held_out, place) for name, place in places.items()}
    speed = {name: tokens / s for name, s in seconds.items()}
    table(
        ("", "tokens/s", "seconds", "held-out VE", "L0"),
        [(n, speed[n], seconds[n], fits[n].variance_explained, fits[n].l0) for n in RUNS],
    )
    sys.stdout.flush()
    report(
        "train-end-to-end",
        round(speed.pop("ours"), 1),
        "tokens/s",
        {name: round(value, 1) for name, value in speed.items()},
        better="higher",
        tokens=tokens,
        peak_mib=peaks["ours"],
        peak_mib_of_peers=peaks,
        variance_explained={n: round(f.variance_explained, 4) for n, f in fits.items()},
    )


if __name__ == "__main__":
    main()
