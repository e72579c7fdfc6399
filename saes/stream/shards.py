"""Residuals harvested to disk, and a stream that reads them back shuffled.

Shards hold the content tokens of consecutive rows. The stream cuts them into blocks of consecutive
tokens and mixes these as `saes.stream.activations` mixes rows: every epoch permutes all blocks of
all shards, a buffer takes the tokens of so many blocks, and these are permuted together. With the
defaults a batch of 2,048 is drawn from 65,536 tokens of 1,024 places of the whole text.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor
from tqdm import tqdm

from saes.config import digest
from saes.errors import UserError
from saes.files import check_space, locked, size, writing
from saes.lm.loading import DTYPES
from saes.lm.model import LM, weights_hash
from saes.stream import shard_files
from saes.stream.activations import About, Runs, ShuffledStream, about_rows
from saes.stream.rows import check_finite, check_rows, content_tokens, read_rows, rows_sha256
from saes.stream.shard_files import Manifest, Shard, ShardWriter, read_manifest, write_manifest

TOGETHER = 64  # blocks read at a time


@dataclass(frozen=True)
class HarvestConfig:
    """How residuals are read and stored."""

    shard_rows: int = 1024
    """Rows of a shard; what an interruption costs at most."""
    pass_rows: int = 8
    """Rows of one pass through the model: few are faster on a CPU, many on a GPU."""
    dtype: str | None = None
    """float32, bfloat16 or float16; null: as the model runs."""
    autocast: bool = False
    """Run the model in bfloat16 where that is safe (faster; residuals differ by about 0.5 %)."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        for name in ("shard_rows", "pass_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")


class Estimate(NamedTuple):
    """What a harvest will write."""

    tokens: tuple[int, ...]
    """Content tokens of each shard."""
    bytes: int
    """On disk, all sites."""


def estimate(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    sites: tuple[str, ...],
    config: HarvestConfig,
    *,
    bos: int | None,
) -> Estimate:
    """How much `harvest` will write, to the byte; reads the tokens, not the model.

    Raises:
        UserError: a site that the model does not have, or rows longer than its context.
    """
    check_rows(lm, rows, sites, bos)
    parts = _parts(rows, config.shard_rows)
    tokens = tuple(int(content_tokens(lm, part, bos).sum()) for part in parts)
    if not all(tokens):
        raise UserError(f"{config.shard_rows} rows hold no content token; give another text")
    dtype = _dtype(lm, config)
    files = sum(shard_files.shard_bytes((n, lm.d_model), dtype) for n in tokens)
    return Estimate(tokens, files * len(sites))


def harvest(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    sites: tuple[str, ...],
    out: Path,
    config: HarvestConfig,
    *,
    bos: int | None,
    text: str = "",
) -> Manifest:
    """Write the residuals of the content tokens of all rows at all sites to shards in `out`.

    Safe to interrupt: the same call checks the shards that are finished, keeps them, makes damaged
    ones again and ends with the same bytes as without the interruption.

    Args:
        rows, sites, bos, text: as for `saes.stream.activations.ActivationStream`.

    Raises:
        UserError: a site that the model does not have, a disk that is too small or fills up, a
            residual that is not finite, another process is harvesting there, or `out` holds shards
            of something else.
    """
    plan = estimate(lm, rows, sites, config, bos=bos)
    fresh = _fresh(lm, rows, sites, config, bos, text, len(plan.tokens))
    if (found := _finished_before(out, fresh)) is not None:
        return found
    if not out.exists():
        check_space(out, plan.bytes, f"harvesting {sum(plan.tokens):,} tokens")
        out.mkdir(parents=True)
    with locked(out):
        return _harvest(lm, rows, out, config, bos, plan, _begin(out, fresh))


def _harvest(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    out: Path,
    config: HarvestConfig,
    bos: int | None,
    plan: Estimate,
    manifest: Manifest,
) -> Manifest:
    """Write the shards that the manifest lacks."""
    sites = manifest.sites
    missing = [i for i, shard in enumerate(manifest.shards) if shard is None]
    left = sum(plan.tokens[i] for i in missing)
    total = sum(plan.tokens)
    check_space(out, plan.bytes * left // total, f"harvesting {left:,} tokens")
    tqdm.write(
        f"harvesting takes {size(plan.bytes)} of disk: {total:,} tokens at {len(sites)} sites in "
        f"{len(plan.tokens)} shards, of which {len(plan.tokens) - len(missing)} are there",
        file=sys.stderr,
    )
    for site in sites:
        (out / site).mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=total,
        initial=total - left,
        unit="tok",
        unit_scale=True,
        mininterval=2,
        desc="harvest",
        file=sys.stderr,
    ) as bar:
        for i in missing:
            part = _parts(rows, config.shard_rows)[i]
            shard = _write_shard(lm, part, sites, out, config, bos, i, plan.tokens[i], bar)
            shards = (*manifest.shards[:i], shard, *manifest.shards[i + 1 :])
            manifest = dataclasses.replace(manifest, shards=shards)
            write_manifest(out, manifest)
    return manifest


def _fresh(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    sites: tuple[str, ...],
    config: HarvestConfig,
    bos: int | None,
    text: str,
    shards: int,
) -> Manifest:
    """The manifest of a harvest that has no shard yet."""
    made_of: dict[str, Any] = {
        "model": weights_hash(lm),
        "model_dtype": str(lm.model.dtype),
        "rows": rows_sha256(rows),
        "bos": bos,
        "config": asdict(config),
    }
    return Manifest(
        made_of=made_of,
        **about_rows(lm, rows, bos, text)._asdict(),
        d_model=lm.d_model,
        dtype=shard_files.NAMES[_dtype(lm, config)],
        sites=sites,
        shards=(None,) * shards,
    )


def _finished_before(out: Path, fresh: Manifest) -> Manifest | None:
    """The manifest of a whole, sound harvest that has these residuals, whoever made it.

    More sites and other cuts into shards and passes do not matter: residuals of different passes
    differ by rounding alone.
    """
    if not (out / shard_files.MANIFEST).exists():
        return None
    found = read_manifest(out)
    if not found.complete or _deciding(found) != _deciding(fresh):
        return None
    if not set(fresh.sites) <= set(found.sites):
        return None
    files = [s.files[site] for s in found.shards if s is not None for site in fresh.sites]
    for problem in shard_files.faults(out, files).values():
        if _same(found, fresh):
            return None  # made anew
        raise UserError(f"{problem}; it was harvested with other settings: delete {out}")
    return found


def _deciding(manifest: Manifest) -> dict[str, Any]:
    """What decides the stored residuals, but for rounding."""
    made_of = {key: value for key, value in manifest.made_of.items() if key != "config"}
    return {**made_of, "dtype": manifest.dtype, "autocast": manifest.made_of["config"]["autocast"]}


def _same(a: Manifest, b: Manifest) -> bool:
    """Whether two harvests write the same bytes."""
    return (a.made_of, a.sites) == (b.made_of, b.sites)


def _begin(out: Path, fresh: Manifest) -> Manifest:
    """The manifest to go on from: of finished, sound shards, or the fresh one."""
    if not (out / shard_files.MANIFEST).exists():
        return fresh
    found = read_manifest(out)
    if not _same(found, fresh):
        raise UserError(
            f"{out} holds shards of another model, text, sites or settings; delete it or go "
            "elsewhere"
        )
    done = [file for shard in found.shards if shard is not None for file in shard.files.values()]
    wrong = shard_files.faults(out, done)
    kept = tuple(
        shard if shard and not any(f.name in wrong for f in shard.files.values()) else None
        for shard in found.shards
    )
    return dataclasses.replace(fresh, shards=kept)


def _write_shard(
    lm: LM,
    rows: Integer[np.ndarray, "rows width"],
    sites: tuple[str, ...],
    out: Path,
    config: HarvestConfig,
    bos: int | None,
    number: int,
    tokens: int,
    bar: "tqdm[Any]",
) -> Shard:
    """Read some rows and write one file a site, pass by pass."""
    dtype = _dtype(lm, config)
    names = {site: f"{site}/{number:05d}.safetensors" for site in sites}
    with ExitStack() as files:
        writers = {
            site: ShardWriter(files.enter_context(writing(out / name)), (tokens, lm.d_model), dtype)
            for site, name in names.items()
        }
        for part in _parts(rows, config.pass_rows):
            read = read_rows(lm, part, sites, bos, autocast=config.autocast)
            stored = {site: x.to(dtype) for site, x in read.items()}
            check_finite(stored, f"rows of shard {number}")
            for site, x in stored.items():
                writers[site].add(x)
            bar.update(len(stored[sites[0]]))
    return Shard(tokens, {site: writers[site].record(names[site]) for site in sites})


def _parts(
    rows: Integer[np.ndarray, "rows width"], n: int
) -> list[Integer[np.ndarray, "part width"]]:
    return [rows[i : i + n] for i in range(0, len(rows), n)]


def _dtype(lm: LM, config: HarvestConfig) -> torch.dtype:
    return lm.model.dtype if config.dtype is None else DTYPES[config.dtype]


# ----------------------------------------------------------------------------------- reading back


@dataclass(frozen=True)
class ShardStreamConfig:
    """What decides the order and the size of the batches."""

    batch: int = 2048
    """Tokens of a batch."""
    buffer: int = 65_536
    """Tokens that are shuffled together; they are in memory at every site."""
    block: int = 64
    """Tokens that are read together: fewer mix better, more read faster from a slow disk."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= self.buffer or not 1 <= self.block <= self.buffer:
            raise UserError(
                f"batch = {self.batch} and block = {self.block} must lie between 1 and buffer = "
                f"{self.buffer}"
            )


class ShardStream(ShuffledStream):
    """Endless shuffled batches of the residuals of a folder of shards.

    Args:
        sites: some of the folder's sites; all if not given.
        lm: refused if the shards are of another model.
        device: where the buffer and the batches are.
        checked: what `harvest` gave, whose shards are sound; they are then not read once more.

    Raises:
        UserError: an unfinished harvest, a missing, cut off or altered shard, a site, model or
            width that the shards are not of, or a value that is not finite.
    """

    def __init__(
        self,
        folder: Path,
        config: ShardStreamConfig,
        *,
        sites: tuple[str, ...] | None = None,
        lm: LM | None = None,
        device: str | torch.device = "cpu",
        checked: Manifest | None = None,
    ) -> None:
        manifest = read_manifest(folder) if checked is None else checked
        self._shards = _finished(folder, manifest)
        sites = manifest.sites if sites is None else sites
        for site in sites:
            if site not in manifest.sites:
                there = ", ".join(manifest.sites)
                raise UserError(f"{folder} has no residuals of {site}; there are: {there}")
        if lm is not None:
            _check_model(folder, manifest, lm)
        files = [shard.files[site] for shard in self._shards for site in sites]
        for problem in shard_files.faults(folder, files if checked is None else []).values():
            raise UserError(f"{problem}; start the harvest again, it makes this shard anew")
        tokens = np.array([shard.tokens for shard in self._shards])
        blocks = -(-tokens // config.block)
        self._first = np.concatenate([[0], np.cumsum(blocks)])
        lengths = np.full(blocks.sum(), config.block)
        lengths[self._first[1:] - 1] = tokens - (blocks - 1) * config.block
        super().__init__(
            sites, lengths=lengths, together=config.buffer, batch=config.batch, seed=config.seed
        )
        self.folder, self.config, self.manifest = folder, config, manifest
        self.d_model, self.device = manifest.d_model, torch.device(device)
        self.about = About(manifest.model, manifest.context, manifest.prepend_bos, manifest.text)

    def identity(self) -> dict[str, object]:
        """Everything that decides the bytes, as JSON."""
        return {
            "model": self.manifest.made_of["model"],
            "shards": digest([s.files[site].sha256 for s in self._shards for site in self.sites]),
            "sites": list(self.sites),
            "stream": asdict(self.config),
        }

    def _read(self, runs: Runs) -> Iterator[dict[str, Tensor]]:
        """Runs in the order of the disk: the buffer is shuffled anyway."""
        runs = runs.take(np.lexsort((runs.start, runs.block)))
        shard = np.searchsorted(self._first, runs.block, side="right") - 1
        start = (runs.block - self._first[shard]) * self.config.block + runs.start
        cuts = np.flatnonzero(np.diff(shard)) + 1
        for group in np.split(np.arange(len(shard)), cuts):
            for i in range(0, len(group), TOGETHER):
                some = group[i : i + TOGETHER]
                yield self._read_some(int(shard[some[0]]), start[some], runs.length[some])

    def _read_some(
        self, shard: int, start: Int[np.ndarray, " some"], length: Int[np.ndarray, " some"]
    ) -> dict[str, Tensor]:
        dtype = shard_files.DTYPES[self.manifest.dtype]
        part: dict[str, Tensor] = {}
        for site in self.sites:
            x = torch.empty((int(length.sum()), self.d_model), dtype=dtype)
            name = self._shards[shard].files[site].name
            runs = list(x.split(length.tolist()))
            shard_files.read_runs(self.folder / name, start.tolist(), runs, dtype)
            check_finite({site: x}, f"shard {name}")
            part[site] = x.to(self.device)
        return part


def _finished(folder: Path, manifest: Manifest) -> tuple[Shard, ...]:
    done = tuple(shard for shard in manifest.shards if shard is not None)
    if len(done) < len(manifest.shards):
        raise UserError(
            f"the harvest in {folder} is not finished: {len(done)} of {len(manifest.shards)} "
            "shards; start it again, it goes on"
        )
    return done


def _check_model(folder: Path, manifest: Manifest, lm: LM) -> None:
    if manifest.d_model != lm.d_model:
        raise UserError(
            f"the residuals in {folder} are {manifest.d_model} wide, those of {lm.name} "
            f"{lm.d_model}; harvest with this model"
        )
    if manifest.made_of["model"] != weights_hash(lm):
        raise UserError(
            f"the residuals in {folder} are of {manifest.model}, whose weights are not those of "
            f"{lm.name} in this dtype; harvest with this model"
        )
