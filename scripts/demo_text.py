"""The text behind the demo language model: documents, tokenizer, token streams.

Labels that some of the sources carry are never read. Whole books are held out for validation.
"""

import csv
import io
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
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

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ENOUGH = 30_000_000  # characters that settle an 8k vocabulary
SOURCES = {
    "standardebooks": "Standard Ebooks, 22 books, stories and chapters (public domain, CC0)",
    "ELTeC-eng": "ELTeC-eng, 99 novels of 1840-1920 (public domain; markup CC BY 4.0)",
    "global-asp": "Global African Storybook Project, English picture books (CC BY)",
    "emotionscope": "EmotionScope stories and dialogues, written by a language model (MIT)",
    "goemotions": "GoEmotions, texts of the training split (CC BY 4.0)",
    "xed": "XED, English subtitles (CC BY 4.0)",
    "empathic_reactions": "Empathic Reactions, messages (CC BY 4.0)",
}
VALIDATION_BOOKS = (  # whole books, by hash order, drawn once
    "standardebooks/kate-chopin_short-fiction",
    "standardebooks/virginia-woolf_mrs-dalloway",
    "ELTeC-eng/ENG18410_Sinclair",
    "ELTeC-eng/ENG18450_Disraeli",
)


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
        special_tokens=[(BOS, token_id(tokenizer, BOS))],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def prepare(data: Path, work: Path, vocab: int, seed: int) -> None:
    """Tokenizer and token streams (uint16) in `work`; skipped when they are there.

    Documents are shuffled and joined by EOS. prepared.json, written last, counts what there is.
    """
    done, made_with = work / "prepared.json", {"vocab": vocab, "seed": seed}
    if done.exists():
        stored = json.loads(done.read_text())
        if made_with != {key: stored.get(key, value) for key, value in made_with.items()}:
            raise SystemExit(f"{work} was prepared with another vocab or seed; give another --work")
        return
    train: list[str] = []
    valid: list[str] = []
    by_source: dict[str, int] = {}
    for source, text in tqdm(documents(data), desc="read", unit="doc", mininterval=5):
        if source in VALIDATION_BOOKS:
            valid.append(text)
            continue
        train.append(text)
        kind = source.split("/")[0]
        by_source[kind] = by_source.get(kind, 0) + len(text)
    random.Random(seed).shuffle(train)
    sizes = np.cumsum([len(text) for text in train])
    tokenizer = train_tokenizer(iter(train[: int(np.searchsorted(sizes, ENOUGH)) + 1]), vocab)
    tokenizer.save(str(work / "tokenizer.json"))
    counts = {}
    for name, texts in (("train", train), ("valid", valid)):
        stream = encode(tokenizer, texts, name)
        np.save(work / f"{name}.npy", stream)
        counts[f"{name}_tokens"] = len(stream)
    stats = {
        **made_with,
        **counts,
        "train_characters": sum(by_source.values()),
        "train_documents": len(train),
        "valid_bytes": sum(len(tokenizer.normalizer.normalize_str(t).encode()) for t in valid),
        "characters_by_source": by_source,
    }
    done.write_text(json.dumps(stats, indent=1) + "\n")


def encode(tokenizer: Tokenizer, texts: list[str], name: str) -> np.ndarray:
    """The texts as one stream of uint16 tokens, each closed by EOS."""
    eos = token_id(tokenizer, EOS)
    parts: list[np.ndarray] = []
    for start in tqdm(range(0, len(texts), 512), desc=f"tokenize {name}", mininterval=5):
        batch = texts[start : start + 512]
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, eos], np.uint16))
    return np.concatenate(parts)
