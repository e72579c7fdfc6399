"""Text to rows of tokens on disk, split by document into training and held-out rows.

Documents are tokenised, joined by EOS (BOS where there is none) and cut into rows of one width;
BOS goes in front of each row when it is read. A document is wholly in the training rows or wholly
in the held-out ones: each goes to whichever of the two is less filled, so that held-out text is
spread over the corpus.

    out/train.npy, out/held_out.npy   [rows, width], uint16 where the vocabulary allows, else uint32
    out/manifest.json                 hashes and counts; written last
"""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Integer
from tqdm import tqdm

from saes.config import digest
from saes.errors import UserError
from saes.files import check_space, sha256, write_text, writing
from saes.text.documents import Piece, Source, label, pieces, source_hashes
from saes.text.row_file import RowFile

if TYPE_CHECKING:
    from saes.lm.model import LM

MANIFEST = "manifest.json"
SAMPLE = "sample"
BLOCKS = ".sampled-"  # folder of what has been sampled so far
TOGETHER = 1 << 19  # characters tokenised in one call


@dataclass(frozen=True)
class TextConfig:
    """Which text, how much of it, and in which rows."""

    source: str = SAMPLE
    """`sample`: the model writes it. Otherwise a file (.txt, .jsonl, .parquet, .gz and .xz too), a
    folder or glob of such files, `packaged/NAME`, or a dataset of the hub."""
    column: str = "text"
    """Where the text is in a line of JSONL or a row of a table."""
    split: str = "train"
    """Split of a dataset."""
    name: str | None = None
    """Configuration of a dataset, if it has several."""
    document: Literal["file", "paragraph"] = "file"
    """What a document is in text files: the whole file, or what blank lines separate."""
    tokens: int = 4_000_000
    """Content tokens that training will ask for."""
    epochs: int = 1
    """How often training sees each of them, at most; so many times less text is needed."""
    held_out_tokens: int = 100_000
    """Content tokens kept from training, of other documents; 0 for none."""
    context: int = 256
    """Tokens of a row, BOS included."""
    seed: int = 0
    """Seed of sampled text."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("epochs", 1), ("held_out_tokens", 0), ("context", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)} must be at least {least}")


class Tokens(NamedTuple):
    """Rows of tokens as memory maps, each without BOS."""

    train: Integer[np.ndarray, "rows width"]
    held_out: Integer[np.ndarray, "held_out_rows width"]
    bos: int | None
    """Goes in front of each row; None for a model without BOS."""
    context: int
    """Tokens of a row with BOS."""
    text: str
    """Where the text is from, in words."""
    tokenizer: str
    """`tokenizer_hash` of the tokenizer that made the tokens."""


def write_tokens(out: Path, lm: "LM", config: TextConfig) -> Tokens:
    """Write `out` and open it; does nothing more when it is there, made of the same.

    Safe to interrupt: nothing is half written, and the same call starts again (sampling goes on at
    the block) and ends with the same bytes.

    Raises:
        UserError: text that is missing, damaged or too short, rows longer than the model's context,
            a disk that is too small, or `out` holds tokens of another text.
    """
    if config.context > lm.context:
        raise UserError(
            f"rows of {config.context} tokens exceed the context of {lm.name}: {lm.context}"
        )
    made_of = _made_of(lm, config)
    if (out / MANIFEST).exists():
        if _manifest(out)["made_of"] != made_of:
            raise UserError(
                f"{out} holds tokens of another text or model; delete it or go elsewhere"
            )
        _forget_blocks(out)
        return open_tokens(out)
    width = config.context - (lm.tokenizer.bos_token_id is not None)
    dtype = np.dtype(np.uint16 if lm.vocab_size <= 1 << 16 else np.uint32)
    need = -(-config.tokens // config.epochs), config.held_out_tokens
    check_space(out, int(1.1 * sum(need)) * dtype.itemsize, f"text of {sum(need):,} tokens")
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=sum(need), unit="tok", unit_scale=True, mininterval=2, desc="text")
    with bar, writing(out / "train.npy") as file, writing(out / "held_out.npy") as other:
        special = _special(lm, dtype)
        train = RowFile(file, width, dtype, special, need[0], bar)
        held_out = RowFile(other, width, dtype, special, need[1], bar)
        if config.source == SAMPLE:
            _sample(out / f"{BLOCKS}{made_of[:8]}", lm, config.seed, train, held_out)
        else:
            _pack(lm, config, train, held_out)
        train.finish()
        held_out.finish()
    _write_manifest(out, made_of, lm, config, train, held_out)
    _forget_blocks(out)
    return open_tokens(out)


def open_tokens(folder: Path) -> Tokens:
    """The rows that `write_tokens` left, checked against their hashes.

    Raises:
        UserError: not such a folder, or a file in it is missing, cut off or altered.
    """
    manifest = _manifest(folder)
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing; delete {folder} and write the tokens again")
        if path.stat().st_size != file["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, {file['bytes']} were written; delete "
                f"{folder} and write the tokens again"
            )
        if sha256(path) != file["sha256"]:
            raise UserError(
                f"{path} was altered: its SHA-256 is not that of {MANIFEST}; delete {folder} and "
                "write the tokens again"
            )
    train, held_out = (np.load(folder / name, mmap_mode="r") for name in manifest["files"])
    names = ("bos", "context", "text", "tokenizer")
    return Tokens(train, held_out, *(manifest[name] for name in names))


def _pack(lm: "LM", config: TextConfig, train: RowFile, held_out: RowFile) -> None:
    """Fill both with the documents of the source."""
    source = _source(config)
    separator = lm.tokenizer.eos_token_id
    separator = lm.tokenizer.bos_token_id if separator is None else separator
    end = np.array([] if separator is None else [separator], np.int64)
    document, rows, total = -1, train, 0
    for number, ids in _tokenise(lm, pieces(source)):
        if number != document:
            if document >= 0:
                rows.add(end)
            if train.full and held_out.full:
                break
            document = number
            rows = train if train.share <= held_out.share else held_out
            rows.documents += 1
        rows.add(ids)
        total += len(ids)
        if train.full and held_out.full:
            break
    if not (train.full and held_out.full):
        raise _too_short(config, label(source), document + 1, total, train, held_out)


def _too_short(
    config: TextConfig, name: str, documents: int, total: int, train: RowFile, held_out: RowFile
) -> UserError:
    if documents == 0:
        return UserError(f"there is no text in {name}")
    if documents == 1 and held_out.need:
        return UserError(
            f"{name} is one document, and held-out text comes from other documents than training "
            "text; give more files, `document: paragraph` for text files, or `held_out_tokens: 0`"
        )
    room = train.content + held_out.content - held_out.need
    passes = (
        math.ceil(config.tokens / (0.9 * room)) if room > 0 else None
    )  # rows do not fit exactly
    advice = f"`epochs: {passes}`" if passes else "lower `held_out_tokens`"
    return UserError(
        f"{name} holds {total:,} tokens in {documents:,} documents, which gave {train.content:,} "
        f"of {train.need:,} for training and {held_out.content:,} of {held_out.need:,} held out; "
        f"give more text, ask for fewer tokens, or let training see each several times ({advice})"
    )


def _tokenise(
    lm: "LM", texts: Iterator[Piece]
) -> Iterator[tuple[int, Integer[np.ndarray, " tokens"]]]:
    """(document, token ids) of every piece, without special tokens around them."""
    held: list[Piece] = []
    length = 0
    for piece in texts:
        held.append(piece)
        length += len(piece.text)
        if length >= TOGETHER:
            yield from _encode(lm, held)
            held, length = [], 0
    if held:
        yield from _encode(lm, held)


def _encode(lm: "LM", held: list[Piece]) -> Iterator[tuple[int, Integer[np.ndarray, " tokens"]]]:
    tokens = lm.tokenizer([p.text for p in held], add_special_tokens=False, verbose=False)
    for piece, ids in zip(held, tokens["input_ids"], strict=True):
        yield piece.document, np.asarray(ids, np.int64)


def _sample(work: Path, lm: "LM", seed: int, train: RowFile, held_out: RowFile) -> None:
    """Fill both with rows that the model writes; blocks of rows are kept until all are there."""
    from saes.text.sampling import sample_block

    work.mkdir(exist_ok=True)
    for number, rows in enumerate((train, held_out)):
        block = 0
        while not rows.full:
            path = work / f"{number}-{block:06d}.npy"
            if not path.exists():
                with writing(path) as file:
                    ids = sample_block(lm, rows.width, seed=(seed, number, block))
                    np.save(file, ids.astype(rows.dtype))
            before, ids = rows.rows, np.load(path)
            rows.add(ids.reshape(-1))
            rows.documents += rows.rows - before
            block += 1
            if block == 20 and rows.content == 0:
                raise UserError(f"{lm.name} writes nothing but special tokens; give it a text")


def _forget_blocks(out: Path) -> None:
    for folder in out.glob(f"{BLOCKS}*"):
        shutil.rmtree(folder)


def _source(config: TextConfig) -> Source:
    return Source(config.source, config.column, config.split, config.name, config.document)


def _special(lm: "LM", dtype: np.dtype[Any]) -> Bool[np.ndarray, " vocab"]:
    """True at the ids of special tokens, which are no content."""
    special = np.zeros(max(lm.vocab_size, len(lm.tokenizer)), bool)
    assert len(special) <= np.iinfo(dtype).max + 1
    special[lm.tokenizer.all_special_ids] = True
    return special


def _made_of(lm: "LM", config: TextConfig) -> str:
    """A hash of all that decides the tokens: settings, tokenizer, and the model or the files."""
    name = SAMPLE if config.source == SAMPLE else label(_source(config))  # wherever it lies
    settings = asdict(replace(config, source=name))
    parts: dict[str, object] = {"config": settings, "tokenizer": tokenizer_hash(lm.tokenizer)}
    if config.source == SAMPLE:
        from saes.lm.model import weights_hash

        parts["model"] = weights_hash(lm)
    else:
        parts["files"] = source_hashes(config.source)
    return digest(parts)


def tokenizer_hash(lm_tokenizer: Any) -> str:
    """A hash of a tokenizer, without the padding and truncation that the last call left in it."""
    backend = getattr(lm_tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest(lm_tokenizer.get_vocab())
    tree = json.loads(backend.to_str())
    return digest({key: tree[key] for key in tree if key not in ("padding", "truncation")})


def _write_manifest(
    out: Path, made_of: str, lm: "LM", config: TextConfig, train: RowFile, held_out: RowFile
) -> None:
    sampled = config.source == SAMPLE
    files = {
        name: {"sha256": sha256(out / name), "bytes": (out / name).stat().st_size}
        for name in ("train.npy", "held_out.npy")
    }
    manifest = {
        "format": 1,
        "text": f"sampled from {lm.name}" if sampled else label(_source(config)),
        "bos": lm.tokenizer.bos_token_id,
        "context": config.context,
        "tokenizer": tokenizer_hash(lm.tokenizer),
        "vocabulary": lm.vocab_size,
        "documents": {"train": train.documents, "held_out": held_out.documents},
        "rows": {"train": train.rows, "held_out": held_out.rows},
        "content_tokens": {"train": train.content, "held_out": held_out.content},
        "made_of": made_of,
        "files": files,
    }
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        names = ("bos", "context", "text", "tokenizer", "made_of", "files")
        return {name: manifest[name] for name in names}
    except FileNotFoundError:
        raise UserError(f"{folder} holds no tokens: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}); delete {folder}") from None
