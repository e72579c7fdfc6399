"""Train the demo model's two SAEs in one pass over it, and judge them on held-out books.

    python scripts/train_demo_saes.py --work WORK --lm saes/data/demo_lm \
        --out saes/data/demo_saes

`--work` is the folder that scripts/train_demo_lm.py left (its train.npy and valid.npy are read);
the checkpoint goes into `saes/` in it. TopK, k = 32, 4,096 latents, after blocks 3 and 5 of 8. The
default is 4 M tokens on a CPU and 50 M on a GPU.

Safe to interrupt: the same command goes on from the last checkpoint and ends with the same bytes on
the same machine with the same number of threads.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from saes.files import write_text
from saes.lm.model import LM, load_lm
from saes.pretrained import load_sae
from saes.quality import Quality, qualities
from saes.stream.activations import ActivationStream, StreamConfig, rows_of
from saes.training.architectures import SaeSpec, TrainConfig
from saes.training.train import train_saes

SITES = ("blocks.3.hook_resid_post", "blocks.5.hook_resid_post")
CONTEXT = 256
SPECS = tuple(SaeSpec(site, "topk", 4096, k=32, seed=i) for i, site in enumerate(SITES))
COLUMNS = ("l0", "variance_explained", "ce_clean", "ce_sae", "recovered_mean", "recovered_zero",
           "dead", "dense")  # fmt: skip


CARD = """# SAEs of the demo model

TopK SAEs of the residual stream of the demo language model, one a folder, in sae-lens's format:
`SAE.load_from_disk(folder, dtype="float32")` loads one. {d_sae:,} latents, k = {k}, trained by
`scripts/train_demo_saes.py` on {tokens:,} tokens of the model's own training text (Adam, peak rate
{lr}, auxiliary loss for latents that are dead for {dead_tokens:,} tokens). Weights in
bf16; decoder rows have length 1, so a latent is in the units of the residual's norm.

On {n:,} tokens of books that neither the model nor the SAEs were trained on:

{table}
`variance_explained` is over all tokens; `ce_clean` and `ce_sae` are nats a token without and with
the reconstruction in place; `recovered_mean` and `recovered_zero` are the share of the gap to mean
or zero ablation that is closed; `dead` latents never fired on these tokens and `dense` ones fired
on more than a tenth. Licence: Apache-2.0.
"""


def held_out(lm: LM, valid: np.ndarray, rows: int) -> np.ndarray:
    """Rows of the validation books, evenly spread, each opened by BOS."""
    whole = rows_of(valid, CONTEXT - 1)
    spread = whole[np.linspace(0, len(whole) - 1, min(rows, len(whole))).astype(int)]
    bos = np.full((len(spread), 1), lm.tokenizer.bos_token_id)
    return np.concatenate([bos, spread.astype(np.int64)], axis=1)


def table(results: dict[str, Quality]) -> str:
    lines = ["| site | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for site, result in results.items():
        figures = result._asdict()
        lines.append(f"| {site} | " + " | ".join(f"{figures[c]:.3f}" for c in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lm", default="packaged/demo_lm", help="the language model's folder")
    parser.add_argument("--work", type=Path, required=True, help="folder of train_demo_lm.py")
    parser.add_argument("--out", type=Path, required=True, help="where the SAE folders go")
    parser.add_argument("--tokens", type=int, help="default: 4 M on a CPU, 50 M on a GPU")
    parser.add_argument("--rows", type=int, default=400, help="held-out rows to judge on")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = args.tokens or (4_000_000 if device == "cpu" else 50_000_000)
    lm = replace(load_lm(args.lm, device=device), name="packaged/demo_lm")
    rows = rows_of(np.load(args.work / "train.npy", mmap_mode="r"), CONTEXT - 1)
    stream = ActivationStream(
        lm, rows, SITES, StreamConfig(autocast=True), bos=lm.model.config.bos_token_id
    )
    config = TrainConfig(tokens=tokens, autocast=True)
    folders = train_saes(stream, SPECS, config, args.out, args.work / "saes")

    text = held_out(lm, np.load(args.work / "valid.npy", mmap_mode="r"), args.rows)
    saes = {s: load_sae(f, d_model=lm.d_model, device=device) for s, f in folders.items()}
    results = qualities(lm, saes, text)
    for spec in SPECS:
        figures = {
            name: None if value != value else round(value, 5)
            for name, value in results[spec.site]._asdict().items()
        }
        record = {"held_out": figures, "sae": asdict(spec), "train": asdict(config)}
        record |= {"stream": asdict(stream.config)}
        written = json.dumps(record, indent=1, allow_nan=False) + "\n"
        write_text(folders[spec.site] / "quality.json", written)
    card = CARD.format(
        table=table(results), n=next(iter(results.values())).tokens, d_sae=SPECS[0].d_sae,
        k=SPECS[0].k, **asdict(config)
    )  # fmt: skip
    write_text(args.out / "README.md", card)
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
