"""Train the packaged demo language model and its tokenizer, from plain text to a Hugging Face folder.

    python scripts/train_demo_lm.py --data ../shared/data --work /tmp/demo_lm --out saes/data/demo_lm

A small Llama (8 layers, d_model 256, context 256, 8k byte-level BPE) on public-domain and openly
licensed narrative and everyday text. Labels that some of the sources carry are never read. Whole
books are held out for validation. On two CPU cores one epoch takes about 80 minutes; on a GPU raise
`--epochs`, and the checkpoint with the lowest validation loss is the one that is exported.

Safe to interrupt: the same command goes on from the last checkpoint and ends with the same weights
on the same machine (the order of the blocks depends on the seed and the epoch alone).

Optimiser: Muon for the hidden matrices (Jordan et al. 2024, with the AdamW-matched scale of Liu et
al. 2025, arXiv 2502.16982), AdamW for the rest; linear decay to zero (Bergsma et al. 2025, arXiv
2502.15938).
"""

import argparse
import csv
import hashlib
import io
import json
import lzma
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VALIDATION_BOOKS = (  # whole books, by hash order, drawn once
    "standardebooks/kate-chopin_short-fiction",
    "standardebooks/virginia-woolf_mrs-dalloway",
    "ELTeC-eng/ENG18410_Sinclair",
    "ELTeC-eng/ENG18450_Disraeli",
)


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


# ---------------------------------------------------------------------------------------- text


def documents(data: Path) -> Iterator[tuple[str, str]]:
    """(source, text) of every document, in a fixed order; labels are not read."""
    for name in ("standardebooks", "eltec_eng", "children_stories_ccby"):
        with lzma.open(data / "text" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row.get("lang", "en") == "en":
                    yield row["source"], row["text"]
    for name in ("emotion_stories", "two_speaker_dialogues"):
        path = data / "emotion_stories" / f"emotionscope_{name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield "emotionscope", row["text"] if "text" in row else row["dialogue"]
    for row in csv.reader(
        io.StringIO((data / "emotion/goemotions/train.tsv").read_text(encoding="utf-8")),
        delimiter="\t",
        quoting=csv.QUOTE_NONE,
    ):
        yield "goemotions/train", row[0]
    for name, column in (("en-annotated.tsv", 0), ("neu_en.txt", 1)):
        for line in (data / "emotion/xed" / name).read_text(encoding="utf-8").splitlines():
            yield "xed", line.split("\t")[column].strip()
    with (data / "emotion/empathic_reactions/messages.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        for row in csv.DictReader(file):
            yield "empathic_reactions", row["essay"]


def train_tokenizer(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Byte-level BPE; typographic quotes, dashes and spaces are folded to their plain forms."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC()]
        + [
            normalizers.Replace(old, new)
            for old, new in {
                "\u201c": '"',
                "\u201d": '"',
                "\u2018": "'",
                "\u2019": "'",
                "\u2060": "",
                "\u00a0": " ",
                "\u200a": "",
                "\u2009": " ",
                "\u202f": " ",
                "\ufeff": "",
            }.items()
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[PAD, BOS, EOS],
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def prepare(data: Path, work: Path, recipe: Recipe) -> None:
    """Tokenizer and token streams (uint16) in `work`; skipped when they are there."""
    if (work / "prepared.json").exists():
        return
    train, valid = [], []
    for source, text in tqdm(documents(data), desc="read", unit="doc", mininterval=5):
        (valid if source in VALIDATION_BOOKS else train).append((source, text))
    characters = sum(len(text) for _, text in train)
    sys.stdout.write(f"{characters:,} training characters, {len(train):,} documents\n")
    rng = random.Random(recipe.seed)
    sample = [text for _, text in rng.sample(train, len(train))]
    kept, total = [], 0
    for text in sample:  # 30 M characters settle an 8k vocabulary
        kept.append(text)
        total += len(text)
        if total > 30_000_000:
            break
    tokenizer = train_tokenizer(iter(kept), recipe.vocab)
    tokenizer.save(str(work / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    stats = {"train_characters": characters, "train_documents": len(train)}
    for name, rows in (
        ("train", [sample[i] for i in range(len(sample))]),
        ("valid", [t for _, t in valid]),
    ):
        parts, size = [], 0
        for start in tqdm(range(0, len(rows), 512), desc=f"tokenize {name}", mininterval=5):
            batch = rows[start : start + 512]
            size += sum(
                len(tokenizer.normalizer.normalize_str(t).encode()) if name == "valid" else 0
                for t in batch
            )
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                parts.append(np.array([*encoding.ids, eos], np.uint16))
        stream = np.concatenate(parts)
        np.save(work / f"{name}.npy", stream)
        stats[f"{name}_tokens"] = len(stream)
        if name == "valid":
            stats["valid_bytes"] = size
    by_source: dict[str, int] = {}
    for source, text in train:
        key = source.split("/")[0]
        by_source[key] = by_source.get(key, 0) + len(text)
    stats["characters_by_source"] = by_source
    (work / "prepared.json").write_text(json.dumps(stats, indent=1))


# ---------------------------------------------------------------------------------------- model


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
            bos_token_id=tokenizer.token_to_id(BOS),
            eos_token_id=tokenizer.token_to_id(EOS),
            pad_token_id=tokenizer.token_to_id(PAD),
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
        total += float(loss_of(model, batch_at(stream, rows, bos, width).to(device), device)) * len(
            rows
        )
    return total / len(starts)


def export(model: LlamaForCausalLM, tokenizer_file: Path, out: Path, recipe: Recipe) -> None:
    """A folder that plain `AutoModelForCausalLM.from_pretrained` loads: bf16 safetensors + tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
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


def save_checkpoint(
    path: Path, model: torch.nn.Module, opts: list[torch.optim.Optimizer], step: int, best: float
) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "opts": [o.state_dict() for o in opts],
            "step": step,
            "best": best,
        },
        part,
    )
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with text/, emotion/, emotion_stories/"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="tokens and checkpoints (about 0.2 GB)"
    )
    parser.add_argument("--out", type=Path, required=True, help="where the finished model goes")
    parser.add_argument(
        "--steps", type=int, default=None, help="stop early, for a trial; the schedule is unchanged"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    for field, value in asdict(Recipe()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    recipe = Recipe(**{k: getattr(args, k) for k in asdict(Recipe())})
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare(args.data, work, recipe)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    bos, width = tokenizer.token_to_id(BOS), recipe.context - 1
    train, valid = (
        np.load(work / "train.npy", mmap_mode="r"),
        np.load(work / "valid.npy", mmap_mode="r"),
    )

    model = build(recipe, tokenizer).to(device)
    opts = optimisers(model, recipe)
    per_epoch = (len(train) // width - 1) // recipe.batch
    total = int(per_epoch * recipe.epochs)
    identity = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    checkpoint, log = work / f"checkpoint-{identity}.pt", work / f"log-{identity}.jsonl"
    step, best = 0, math.inf
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, s in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(s)
        step, best = state["step"], state["best"]
        sys.stdout.write(f"resumed at step {step:,}\n")
    sys.stdout.write(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train):,} tokens, "
        f"{total:,} steps of {recipe.batch * recipe.context:,}, on {device}\n"
    )
    step_loss = torch.compile(loss_of) if args.compile else loss_of
    last = total if args.steps is None else min(total, args.steps)
    bar, order, epoch = tqdm(total=last, initial=step, mininterval=30, unit="step"), np.empty(0), -1
    began = time.time()
    first, smooth = step, None
    while step < last:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = block_starts(len(train), recipe, epoch)
        at = (step % per_epoch) * recipe.batch
        tokens = batch_at(train, order[at : at + recipe.batch], bos, width).to(device)
        scale = min(1.0, (step + 1) / recipe.warmup) * (1 - step / total)
        for opt, base in zip(opts, (recipe.lr_muon, recipe.lr_adam), strict=True):
            for group in opt.param_groups:
                group["lr"] = base * scale
        loss = step_loss(model, tokens, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        smooth = float(loss) if smooth is None else 0.98 * smooth + 0.02 * float(loss)
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(
                loss=f"{smooth:.3f}",
                tok_s=f"{(step - first) * recipe.batch * recipe.context / (time.time() - began):.0f}",
            )
        if step % 200 == 0 or step == last:
            nats = validate(model, valid, bos, recipe, device, blocks=256)
            with log.open("a") as file:
                file.write(
                    json.dumps(
                        {
                            "step": step,
                            "train": smooth,
                            "valid": nats,
                            "seconds": time.time() - began,
                        }
                    )
                    + "\n"
                )
            if nats < best:
                best = nats
                export(model, work / "tokenizer.json", work / "best", recipe)
            save_checkpoint(checkpoint, model, opts, step, best)
    bar.close()
    if step < total:
        return
    model = LlamaForCausalLM.from_pretrained(work / "best", dtype=torch.float32).to(device).eval()
    nats = validate(model, valid, bos, recipe, device, blocks=None)
    prepared = json.loads((work / "prepared.json").read_text())
    figures = {
        "validation_loss_nats_per_token": round(nats, 4),
        "validation_bits_per_byte": round(
            nats * prepared["valid_tokens"] / prepared["valid_bytes"] / math.log(2), 4
        ),
        "validation_books": list(VALIDATION_BOOKS),
        "steps": step,
        "recipe": asdict(recipe),
        **prepared,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(device),
        "samples": samples(model, tokenizer, device),
    }
    export(model, work / "tokenizer.json", args.out, recipe)
    (args.out / "training.json").write_text(
        json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    )
    sys.stdout.write(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
