"""The settings of a training run, as configs/train.yaml explains them. No torch."""

from dataclasses import dataclass, field
from typing import Literal

from saes.errors import UserError
from saes.text.prepare import TextConfig
from saes.track import TrackConfig
from saes.training.architectures import SaeGrid, SaeSpec, TrainConfig, name_specs


@dataclass(frozen=True)
class ModelConfig:
    """The language model whose residuals are reconstructed."""

    name: str
    """Hub name, local folder, or packaged/NAME."""
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Literal["8bit", "4bit"] | None = None
    """Load it quantised, through bitsandbytes."""
    device_map: Literal["auto"] | None = None
    """Spread a model that is larger than one device over all of them, instead of `device`."""
    revision: str | None = None
    """Branch, tag or commit of a hub name; None is its main branch."""
    threads: int = 2
    """CPU threads; part of the result, since they decide the order of floating-point sums."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"threads must be at least 1, not {self.threads}")


@dataclass(frozen=True)
class StreamSettings:
    """Order and size of the batches: `StreamConfig` of the stream, readable without torch."""

    batch: int = 2048
    """Tokens of a batch."""
    chunk_rows: int = 256
    """Rows whose tokens are shuffled together."""
    pass_rows: int = 8
    """Rows of one pass through the model: few are faster on a CPU, many on a GPU."""
    seed: int = 0
    """Seed of the order."""
    autocast: bool = False
    """Run the model in bfloat16 where that is safe."""

    def __post_init__(self) -> None:
        for name in ("batch", "chunk_rows", "pass_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class TrainRunConfig:
    """A whole training run. Every field is explained in configs/train.yaml."""

    run: str
    model: ModelConfig
    saes: tuple[SaeGrid, ...]
    text: TextConfig = field(default_factory=TextConfig)
    stream: StreamSettings = field(default_factory=StreamSettings)
    shards: str | None = None
    start_from: tuple[str, ...] = ()
    train: TrainConfig = field(default_factory=TrainConfig)
    watch_rows: int = 32
    quality_rows: int = 400
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        self.specs()
        if self.train.tokens > self.text.tokens:
            raise UserError(
                f"train.tokens is {self.train.tokens} but text.tokens prepares for "
                f"{self.text.tokens}; raise text.tokens (text.epochs says how often each is seen)"
            )
        batch, rows, context = self.stream.batch, self.stream.chunk_rows, self.text.context
        if batch > rows * (context - 1):
            raise UserError(
                f"stream.batch is {batch} but chunk_rows = {rows} rows of {context} tokens hold "
                f"{rows * (context - 1)} at most; raise stream.chunk_rows or lower stream.batch"
            )
        for name, tokens in (
            ("train.tokens", self.train.tokens),
            ("text.tokens / text.epochs", self.text.tokens // self.text.epochs),
        ):
            if tokens < batch:
                raise UserError(f"{name} is {tokens}, less than a batch of {batch}")
        for name in ("watch_rows", "quality_rows"):
            rows = getattr(self, name)
            if rows < 0:
                raise UserError(f"{name} = {rows} must not be negative")
            if rows and not self.text.held_out_tokens:
                raise UserError(f"{name} is {rows} but text.held_out_tokens is 0; set one to match")

    def specs(self) -> tuple[SaeSpec, ...]:
        """All SAEs, in the order of the grids."""
        specs = tuple(spec for grid in self.saes for spec in grid.specs())
        name_specs(specs)
        return specs
