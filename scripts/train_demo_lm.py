"""Train the packaged demo language model and its tokenizer, from text to a Hugging Face folder.

    python scripts/train_demo_lm.py --data DATA --work WORK --out saes/data/demo_lm

A small Llama (8 layers, d_model 256, context 256, 8k byte-level BPE) on public-domain and openly
licensed narrative and everyday text. Labels that some of the sources carry are never read. Whole
books are held out for validation. On two CPU cores one epoch takes about 2 hours; on a GPU raise
`--epochs`, and the checkpoint with the lowest validation loss is the one that is exported.

Safe to interrupt: the same command goes on from the last checkpoint and ends with the same weights
on the same machine (the order of the blocks depends on the seed and the epoch alone).

Optimiser: Muon for the hidden matrices (Jordan et al. 2024, with the AdamW-matched scale of Liu et
al. 2025, arXiv 2502.16982), AdamW for the rest; linear decay to zero (Bergsma et al. 2025, arXiv
2502.15938).
"""

import argparse
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from demo_text import BOS, EOS, PAD, SOURCES, VALIDATION_BOOKS, prepare, token_id
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CARD = """# Demo language model

A Llama of {parameters:,} parameters ({n_layers} layers, d_model {d_model}, context {context},
{vocab} byte-level BPE tokens) that ships with Emotion Atlas so that the whole pipeline runs offline
on a CPU. Weights in bf16; `AutoModelForCausalLM.from_pretrained(folder)` loads it. Made by
`scripts/train_demo_lm.py`.

| | |
|---|---|
| validation loss | {nats:.4f} nats a token |
| bits per byte | {bits:.4f} |
| held-out text | {valid_tokens:,} tokens, whole books that were never trained on |
| training text | {train_characters:,} characters, {train_tokens:,} tokens, {epochs} epochs |
| optimiser | Muon and AdamW, linear decay to zero, batch {batch} x {context} tokens, seed {seed} |
{note}
## Data

| source | characters |
|---|---|
{sources}

Labels that some of the sources carry were not read. Typographic quotes and spaces are folded to
plain ones by the tokenizer. Held-out books:

{books}

## Samples (temperature 0.8, top 40, not chosen)

{samples}

## Limits

It writes grammatical fragments in the manner of old novels and knows nothing. Most of its text is
from before 1930, with the prejudices of its time. It is for trying methods, not for use: what it
represents of emotions says little about larger models. Licence: Apache-2.0.
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    vocab: int = 8192
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 4
    d_mlp: int = 688
    context: int = 256
    batch: int = 32
    epochs: float = 1.0
    lr_muon: float = 4e-3
    lr_adam: float = 4e-3
    weight_decay: float = 0.05
    warmup: int = 60
    seed: int = 0


def build(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab,
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.n_layers,
            num_attention_heads=recipe.n_heads,
            num_key_value_heads=recipe.n_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            initializer_range=0.02,
            rms_norm_eps=1e-5,
            bos_token_id=token_id(tokenizer, BOS),
            eos_token_id=token_id(tokenizer, EOS),
            pad_token_id=token_id(tokenizer, PAD),
        )
    )
    for name, p in model.named_parameters():  # residual branches start at zero (muP-style)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(p)
    return model


def optimisers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    hidden = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    return [
        torch.optim.Muon(
            hidden,
            lr=recipe.lr_muon,
            weight_decay=recipe.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.lr_adam, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def block_starts(n_tokens: int, recipe: Recipe, epoch: int) -> np.ndarray:
    """Starts of the non-overlapping blocks of an epoch, shuffled; a new offset each epoch."""
    rng = np.random.default_rng([recipe.seed, epoch])
    width = recipe.context - 1
    starts = np.arange(int(rng.integers(width)), n_tokens - width, width)
    rng.shuffle(starts)
    return starts


def batch_at(stream: np.ndarray, starts: np.ndarray, bos: int, width: int) -> torch.Tensor:
    """(batch, context) token ids, each row opened by BOS."""
    rows = np.stack([stream[s : s + width] for s in starts]).astype(np.int64)
    return torch.from_numpy(np.concatenate([np.full((len(rows), 1), bos), rows], axis=1))


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(
    model: LlamaForCausalLM,
    stream: np.ndarray,
    bos: int,
    recipe: Recipe,
    device: torch.device,
    blocks: int | None,
) -> float:
    """Mean loss in nats a token over the first `blocks` blocks (all when None), evenly spread."""
    width = recipe.context - 1
    starts = np.arange(0, len(stream) - width, width)
    if blocks is not None:
        starts = starts[np.linspace(0, len(starts) - 1, min(blocks, len(starts))).astype(int)]
    total = 0.0
    for i in range(0, len(starts), 64):
        rows = starts[i : i + 64]
        batch = batch_at(stream, rows, bos, width).to(device)
        total += float(loss_of(model, batch, device)) * len(rows)
    return total / len(starts)


def export(model: LlamaForCausalLM, tokenizer_file: Path, out: Path, recipe: Recipe) -> None:
    """A folder that plain `AutoModelForCausalLM.from_pretrained` loads: bf16 safetensors."""
    out.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=recipe.context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def samples(model: LlamaForCausalLM, tokenizer: Tokenizer, device: torch.device) -> list[str]:
    prompts = ("She opened the letter and", "The old man sat by the fire.", "I can't believe")
    texts = []
    for i, prompt in enumerate(prompts):
        torch.manual_seed(i)
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
        for _ in range(60):
            logits = model(input_ids=ids).logits[0, -1] / 0.8
            top = logits.topk(40)
            pick = top.indices[torch.multinomial(top.values.softmax(-1), 1)]
            ids = torch.cat([ids, pick[None]], dim=1)
        texts.append(tokenizer.decode(ids[0].tolist()))
    return texts


def checkpoint(
    path: Path, model: torch.nn.Module, opts: list[torch.optim.Optimizer], step: int, best: float
) -> None:
    part = path.with_suffix(".part")
    states = [opt.state_dict() for opt in opts]
    torch.save({"model": model.state_dict(), "opts": states, "step": step, "best": best}, part)
    part.replace(path)


def train(recipe: Recipe, work: Path, device: torch.device, stop: int | None) -> bool:
    """Train from the last checkpoint on; True when the last step was taken.

    The best checkpoint by validation loss is kept in `work/best` as a model folder.
    """
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    bos, width = token_id(tokenizer, BOS), recipe.context - 1
    tokens = np.load(work / "train.npy", mmap_mode="r")
    valid = np.load(work / "valid.npy", mmap_mode="r")
    model = build(recipe, tokenizer)
    torch.nn.Module.to(model, device)
    opts = optimisers(model, recipe)
    per_epoch = (len(tokens) // width - 1) // recipe.batch
    total = int(per_epoch * recipe.epochs)
    identity = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    path, log = work / f"checkpoint-{identity}.pt", work / f"log-{identity}.jsonl"
    step, best = 0, math.inf
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, own in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(own)
        step, best = state["step"], state["best"]
    sys.stdout.write(
        f"{model.num_parameters():,} parameters, {len(tokens):,} tokens, step {step:,} of "
        f"{total:,} with {recipe.batch * recipe.context:,} tokens each, on {device}\n"
    )
    step_loss = torch.compile(loss_of)
    last = total if stop is None else min(total, stop)
    order, epoch, losses = np.empty(0), -1, list[float]()
    with tqdm(total=last, initial=step, mininterval=10, unit="step") as bar:
        while step < last:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = block_starts(len(tokens), recipe, epoch)
            at = (step % per_epoch) * recipe.batch
            batch = batch_at(tokens, order[at : at + recipe.batch], bos, width).to(device)
            scale = min(1.0, (step + 1) / recipe.warmup) * (1 - step / total)
            for opt, base in zip(opts, (recipe.lr_muon, recipe.lr_adam), strict=True):
                for group in opt.param_groups:
                    group["lr"] = base * scale
            loss = step_loss(model, batch, device)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            step += 1
            losses = [*losses[-99:], loss.item()]
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
            bar.update()
            if step % 200 == 0 or step == last:
                nats = validate(model, valid, bos, recipe, device, blocks=256)
                with log.open("a") as file:
                    file.write(json.dumps({"step": step, "valid": nats}) + "\n")
                if nats < best:
                    best = nats
                    export(model, work / "tokenizer.json", work / "best", recipe)
                checkpoint(path, model, opts, step, best)
    return step == total


def finish(recipe: Recipe, work: Path, out: Path, device: torch.device, note: str) -> None:
    """Judge the best checkpoint on all validation books, export it, and write its card."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(work / "best", dtype=torch.float32).eval()
    torch.nn.Module.to(model, device)
    valid = np.load(work / "valid.npy", mmap_mode="r")
    bos = token_id(tokenizer, BOS)
    nats = validate(model, valid, bos, recipe, device, blocks=None)
    prepared = json.loads((work / "prepared.json").read_text())
    bits = nats * prepared["valid_tokens"] / prepared["valid_bytes"] / math.log(2)
    export(model, work / "tokenizer.json", out, recipe)
    card = CARD.format(
        parameters=model.num_parameters(),
        nats=nats,
        bits=bits,
        books="\n".join(f"- {book}" for book in VALIDATION_BOOKS),
        sources="\n".join(
            f"| {SOURCES[source]} | {characters:,} |"
            for source, characters in prepared["characters_by_source"].items()
        ),
        samples="\n\n".join(f"> {text}" for text in samples(model, tokenizer, device)),
        note=f"\n{note}\n" if note else "",
        **{**prepared, **asdict(recipe)},
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    sys.stdout.write(f"validation loss {nats:.4f} nats a token, {bits:.4f} bits a byte\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="text/, emotion/, emotion_stories/"
    )
    parser.add_argument("--work", type=Path, required=True, help="tokens, checkpoints (0.2 GB)")
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument("--stop", type=int, help="stop after so many steps, for a trial")
    parser.add_argument("--note", default="", help="a remark for the model card")
    for field, value in asdict(Recipe()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare(args.data, args.work, recipe.vocab, recipe.seed)
    if train(recipe, args.work, device, args.stop):
        finish(recipe, args.work, args.out, device, args.note)


if __name__ == "__main__":
    main()
