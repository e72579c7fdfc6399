"""One training step of a TopK SAE: ours, sae-lens's and sparsify's; then the same loss curve.

    make bench NAME=topk-step
    python scripts/bench/topk_step.py --d-in 2304 --d-sae 65536 --k 64 --batch 4096 --device cuda

`ours`, `sae-lens` and `sae-lens-autocast` are `SAETrainer.step` with no dead latents: forward,
backward, clipping, Adam, firing statistics. `sparsify` is its own forward, backward and Adam.
`kernel` is our forward and backward without the trainer. `encode-matmul` is the float32 matmul of
the encoder alone. Each has a process of its own; rounds are interleaved; the figure is the median.

The loss curve is trained at a smaller shape on residuals of the packaged model (after block 5, on
the packaged stories); variance explained is on stories that were held out.
"""

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
from harness import interleave, report, serve, table, worker
from sae_lens import SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from tqdm import tqdm

from saes.sparse_topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, fuse_optimizer

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 5  # as the site `blocks.5.hook_resid_post`


class Shape(NamedTuple):
    """Of an SAE and its batches."""

    d_in: int
    d_sae: int
    k: int
    batch: int


CURVE = Shape(256, 2048, 16, 512)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.serve:
        run = step_run(args.serve, args)
        serve(waiting(run, args.device))
        return
    explained = loss_curves(args.steps, args.device) if args.steps else {}
    if explained:
        sys.stdout.write(f"Loss curve: {args.steps} steps, {CURVE}\n")
        table(("trainer", "variance explained"), list(explained.items()))
    names = [name for name in RUNS if not args.only or name in {"ours", "kernel", *args.only}]
    runs = {name: worker([sys.executable, *sys.argv, "--serve", name]) for name in names}
    seconds = interleave(runs, args.rounds, warmup=2)
    peaks = {name: round(run(), 1) for name, run in runs.items()}
    ms = {name: round(1000 * value, 2) for name, value in seconds.items()}
    sys.stdout.write(
        f"\nStep: {args.d_in} to {args.d_sae}, k = {args.k}, batch {args.batch}, {args.device}, "
        f"{args.threads} threads, median of {args.rounds} rounds\n"
    )
    base = ms.get("encode-matmul", float("nan"))
    rows = [(name, ms[name], ms[name] / ms["ours"], ms[name] / base, peaks[name]) for name in ms]
    table(("", "ms", "times ours", "times encode matmul", "peak MiB"), rows)
    report(
        "topk-step",
        ms["ours"],
        "ms",
        {name: value for name, value in ms.items() if name not in ("ours", "kernel")},
        kernel=ms["kernel"],
        shape={name: getattr(args, name) for name in Shape._fields},
        device=args.device,
        variance_explained={name: round(value, 5) for name, value in explained.items()},
        peak_mib=peaks["ours"],
        peak_mib_of_peers=peaks,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.split("\n")[0])
    parser.add_argument("--d-in", type=int, default=512, help="width of the residual stream")
    parser.add_argument("--d-sae", type=int, default=16384, help="latents")
    parser.add_argument("--k", type=int, default=32, help="latents that fire on a token")
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each")
    parser.add_argument("--encode-dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument(
        "--steps", type=int, default=1000, help="of the loss curve; 0 leaves it out"
    )
    parser.add_argument("--only", nargs="+", choices=RUNS, help="peers to time")
    parser.add_argument("--serve", choices=RUNS, help=argparse.SUPPRESS)
    return parser.parse_args()


RUNS = ("ours", "kernel", "sae-lens", "sae-lens-autocast", "sparsify", "encode-matmul")


def step_run(name: str, args: argparse.Namespace) -> Callable[[], object]:
    """One step of the named trainer, always on the same batch."""
    torch.manual_seed(0)
    shape = Shape(args.d_in, args.d_sae, args.k, args.batch)
    x = torch.randn(args.batch, args.d_in, device=args.device)
    if name == "encode-matmul":
        w_enc = torch.randn(args.d_in, args.d_sae, device=args.device)
        return lambda: x @ w_enc
    if name == "sparsify":
        return sparsify_step(shape, x)
    if name.startswith("sae-lens"):
        dense = dense_trainer(shape, args.device, autocast=name.endswith("autocast"))
        return lambda: dense.step(x)
    sparse = sparse_trainer(shape, args.device, encode_dtype=args.encode_dtype)
    if name == "kernel":
        return lambda: forward_backward(sparse.sae, x)
    return lambda: sparse.step(x)


def waiting(run: Callable[[], object], device: str) -> Callable[[], None]:
    """A run that returns when the GPU has done its work."""

    def run_and_wait() -> None:
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return run_and_wait


def dense_trainer(shape: Shape, device: str, steps: int = 1000, *, autocast: bool = False) -> Any:
    """sae-lens's trainer and TopK SAE, with its defaults."""
    torch.manual_seed(0)
    config = sae_lens.TopKTrainingSAEConfig(
        d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, device=device
    )
    return trainer_of(sae_lens.TopKTrainingSAE(config), shape, device, steps, autocast=autocast)


def sparse_trainer(
    shape: Shape, device: str, steps: int = 1000, *, encode_dtype: Any = "auto"
) -> Any:
    """sae-lens's trainer with our SAE and optimizer, with the same settings."""
    torch.manual_seed(0)
    config = SparseTopKTrainingSAEConfig(
        d_in=shape.d_in, d_sae=shape.d_sae, k=shape.k, device=device, encode_dtype=encode_dtype
    )
    trainer = trainer_of(SparseTopKTrainingSAE(config), shape, device, steps, autocast=False)
    fuse_optimizer(trainer)
    return trainer


def trainer_of(sae: Any, shape: Shape, device: str, steps: int, *, autocast: bool) -> Any:
    config = SAETrainerConfig(
        total_training_samples=steps * shape.batch,
        train_batch_size_samples=shape.batch,
        lr=3e-4,
        lr_end=3e-5,
        device=device,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, iter(()))


def forward_backward(sae: SparseTopKTrainingSAE, x: torch.Tensor) -> None:
    step = TrainStepInput(
        sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )
    sae.training_forward_pass(step).loss.backward()
    sae.zero_grad()


def sparsify_step(shape: Shape, x: torch.Tensor) -> Callable[[], object]:
    """EleutherAI's sparsify: its loss, with the Adam of its trainer."""
    with contextlib.redirect_stdout(io.StringIO()):  # it announces on import that it lacks Triton
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    config = SparseCoderConfig(num_latents=shape.d_sae, k=shape.k)
    coder = SparseCoder(shape.d_in, config, device=x.device, dtype=torch.float32)
    adam = torch.optim.Adam(coder.parameters(), lr=3e-4)

    def step() -> None:
        coder(x).fvu.backward()
        adam.step()
        adam.zero_grad()

    return step


def loss_curves(steps: int, device: str) -> dict[str, float]:
    """Variance explained on held-out tokens, by trainer, after the same batches."""
    x = residuals().to(device)
    x = (x - x.mean(0)) / x.std()
    train, held_out = x[: -len(x) // 10], x[-len(x) // 10 :]
    explained = {}
    makers = {"ours": sparse_trainer, "sae-lens": dense_trainer}
    for name, make in makers.items():
        trainer = make(CURVE, device, steps)
        for batch in tqdm(batches(train, steps), desc=name, total=steps, mininterval=2):
            trainer.step(batch)
            trainer.n_training_steps += 1
        with torch.no_grad():
            left = (trainer.sae.eval()(held_out) - held_out).pow(2).sum()
        explained[name] = 1 - float(left / (held_out - held_out.mean(0)).pow(2).sum())
    return explained


def batches(x: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield x[torch.randint(len(x), (CURVE.batch,), generator=generator).to(x.device)]


def residuals(n_texts: int = 400, width: int = 256) -> torch.Tensor:
    """Residuals of the packaged model on packaged stories, put end to end in rows; BOS left out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "saes" / "data" / "demo_lm"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lines = (ROOT / "discovery" / "data" / "corpus" / "stories.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines[:n_texts]]
    ids = torch.tensor(
        [i for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row]
    )
    rows = ids[: len(ids) // (width - 1) * (width - 1)].view(-1, width - 1)
    rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], 1)
    found = []
    for part in tqdm(rows.split(16), desc="residuals", mininterval=2):
        with torch.no_grad():
            states = model(part, output_hidden_states=True).hidden_states
        found.append(states[BLOCK + 1][:, 1:].flatten(0, 1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
