"""Reading residuals: `saes.lm.capture` against the bare forward and TransformerBridge.

The packaged model stops after 5 of its 8 blocks, on the packaged corpus, in batches of 2,048 tokens
and in the ones of 8,192 that `discovery.pooling` makes. All peers get the same tokens.
`bare-forward` is the model body cut to 5 blocks, without hooks. `bridge` is TransformerBridge's
`run_with_cache` as fast as it goes: one name, stopped after the same block, no cache object;
`bridge-unstopped` leaves `stop_at_layer` out, as most code does. All take turns at each batch, so
that a busy moment of the machine slows all of them alike. `capture`'s time of a batch is its median
over rounds; a peer's speed is that of `capture` times the median, over all turns of all batches, of
the ratio of two times that were taken next to each other.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from harness import report, table, turns

from saes.lm.capture import capture
from saes.lm.model import LM, load_lm
from saes.lm.tokens import Batch, batches, tokenize

CORPUS = Path(__file__).resolve().parents[2] / "discovery" / "data" / "corpus"
MODEL, BLOCKS = "packaged/demo_lm", 5
SITE = f"blocks.{BLOCKS - 1}.hook_resid_post"
FOUR = [f"blocks.{layer}.hook_resid_post" for layer in range(1, BLOCKS)]
TEXTS, THREADS = 48, 2
SIZES = (2048, 8192)  # tokens of a batch; the first is the headline
PEERS = ("bare-forward", "bridge", "bridge-unstopped")
# In this order, since whoever follows the bridge finds the processor's caches as it left them.
RUNS = ("bridge", "bridge-unstopped", "capture, backend bridge", "bare-forward", "capture",
        "capture, 4 sites")  # fmt: skip


def main() -> None:
    """Time all of them, and report tokens a second."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--texts", type=int, default=TEXTS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    lm = load_lm(MODEL)
    readers = {name: reader(name, lm) for name in RUNS}
    speeds: dict[int, dict[str, float]] = {}
    for size in SIZES:
        speeds[size] = measure(readers, corpus_batches(lm, args.texts, size), args.rounds)
        sys.stdout.write(f"\nBatches of {size} tokens, median of {args.rounds} rounds\n")
        ours = speeds[size]["capture"]
        rows = [(name, speed, ours / speed) for name, speed in speeds[size].items()]
        table(("", "tokens/s", "capture is x times"), rows)
    best, large = (speeds[size] for size in SIZES)
    report(
        "capture",
        best["capture"],
        "tokens/s",
        {name: best[name] for name in PEERS},
        better="higher",
        four_sites_take_times_as_long=round(best["capture"] / best["capture, 4 sites"], 3),
        batches_of_8192=large,
    )


def corpus_batches(lm: LM, texts: int, size: int) -> list[Batch]:
    """The first texts of the packaged corpus in batches."""
    lines = (CORPUS / "stories.jsonl").read_text(encoding="utf-8").splitlines()
    ids = tokenize(lm, [json.loads(line)["text"] for line in lines[:texts]]).ids
    return list(batches(lm, ids, batch_tokens=size))


def measure(
    readers: Mapping[str, Callable[[Batch], object]], blocks: Sequence[Batch], rounds: int
) -> dict[str, float]:
    """By name, tokens a second, padding not counted."""
    seconds, ratios = 0.0, {name: [] for name in readers}
    for batch in blocks:
        timed = turns({name: partial(read, batch) for name, read in readers.items()}, rounds)
        ours = timed["capture"]
        seconds += statistics.median(ours)
        for name, values in timed.items():
            ratios[name] += [own / other for own, other in zip(ours, values, strict=True)]
    speed = sum(int(batch.attention.sum()) for batch in blocks) / seconds
    return {name: round(speed * statistics.median(found), 1) for name, found in ratios.items()}


def body() -> Any:
    """The transformers model without its later blocks, final norm and unembedding."""
    model = cast("Any", load_lm(MODEL).model).model
    model.layers, model.norm = model.layers[:BLOCKS], torch.nn.Identity()
    return model


def reader(name: str, lm: LM) -> Callable[[Batch], object]:
    """What the named one does with a batch."""
    if name == "capture":
        return lambda batch: capture(lm, batch, [SITE])
    if name == "capture, 4 sites":
        return lambda batch: capture(lm, batch, FOUR)
    if name == "bare-forward":
        return partial(forward, body())
    bridged = load_lm(MODEL, backend="bridge")
    if name == "capture, backend bridge":
        return lambda batch: capture(bridged, batch, [SITE])
    return partial(bridge, bridged, stop=BLOCKS if name == "bridge" else None)


@torch.no_grad()
def forward(bare: Any, batch: Batch) -> None:
    mask = batch.attention.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    bare(input_ids=batch.ids, attention_mask=mask, position_ids=positions, use_cache=False)


@torch.no_grad()
def bridge(bridged: LM, batch: Batch, *, stop: int | None) -> None:
    assert bridged.bridge is not None
    name = f"blocks.{BLOCKS - 1}.hook_out"  # the hook itself; its alias costs a look-up more
    bridged.bridge.run_with_cache(
        batch.ids,
        names_filter=name,
        stop_at_layer=stop,
        return_cache_object=False,
        use_cache=False,
    )


if __name__ == "__main__":
    main()
