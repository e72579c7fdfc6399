"""What a training will take of memory and disk, before it starts."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from saes.errors import UserError
from saes.files import check_space, size
from saes.training.architectures import FAST, SaeSpec, TrainConfig

if TYPE_CHECKING:
    import torch

    from saes.stream.activations import About

# Tensors of [batch, d_sae] in float32 that live at the peak of a step with dead latents, measured
# (tests/test_budget.py) at d_in 256, d_sae 8192, k 32, batch 2048.
STEP_COPIES_FAST = {"topk": 0.6, "batchtopk": 0.9, "matryoshka_batchtopk": 1.2}
STEP_COPIES = {  # of sae-lens's own steps
    "standard": 6.6,
    "gated": 9.8,
    "jumprelu": 10.5,
    "topk": 3.6,
    "abstopk": 6.0,
    "batchtopk": 7.9,
    "matryoshka_batchtopk": 7.8,
    "matching_pursuit": 2.8,  # and those of every iteration
}
PURSUIT_COPIES = 0.42  # of one iteration of matching pursuit, of which there are k at most
FIT_BATCHES = 8  # batches that training looks at before its first step
DEFAULT = TrainConfig()
CGROUPS = Path("/sys/fs/cgroup")


@runtime_checkable
class Shape(Protocol):
    """What of `Activations` decides how much is needed."""

    @property
    def sites(self) -> Sequence[str]: ...
    @property
    def batch(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def buffer_tokens(self) -> int: ...
    @property
    def device(self) -> "torch.device": ...


class Planned(NamedTuple):
    """The `Shape` of activations that are not there yet."""

    sites: Sequence[str]
    batch: int
    d_model: int
    buffer_tokens: int
    device: "torch.device"
    about: "About"
    """What of `Activations` a trainer is built with, beside."""


class Budget(NamedTuple):
    """Bytes, beside the language model and what is loaded already."""

    weights: int
    """Weights of all SAEs, their gradients, and two moments of Adam: 16 bytes a parameter."""
    step: int
    """Intermediate tensors of one step of the widest SAE."""
    buffer: int
    """Activations at every site: those shuffled together, those that the start or the setting of
    thresholds looks at, and held-out ones."""
    checkpoints: int
    """On disk: weights and moments, 12 bytes a parameter; three files at the peak."""

    @property
    def memory(self) -> int:
        """All of it in memory."""
        return self.weights + self.step + self.buffer


def budget(
    activations: Shape,
    specs: Collection[SaeSpec],
    config: TrainConfig = DEFAULT,
    *,
    held_out_tokens: int = 0,
) -> Budget:
    """Memory and disk that training these SAEs takes; within about a third.

    Args:
        held_out_tokens: held-out tokens whose residuals are not loaded yet.
    """
    d_in, batch = activations.d_model, activations.batch
    parameters = sum((2 * d_in + 3) * spec.d_sae for spec in specs)
    step = max(_step(spec, batch, fast=config.fast) for spec in specs)
    sample = max(config.calibration_tokens, FIT_BATCHES * batch)
    tokens = activations.buffer_tokens + sample + 2 * batch + held_out_tokens
    buffer = 4 * d_in * len(activations.sites) * tokens
    return Budget(16 * parameters, step, buffer, 3 * 12 * parameters)


def _step(spec: SaeSpec, batch: int, *, fast: bool) -> int:
    """Bytes of the intermediate tensors of one step."""
    fast = fast and spec.architecture in FAST
    copies = (STEP_COPIES_FAST if fast else STEP_COPIES)[spec.architecture]
    if spec.architecture == "matching_pursuit":
        copies += PURSUIT_COPIES * int(spec.k or 0)
    return int(4 * batch * copies * spec.d_sae)


def check_budget(
    activations: Shape,
    specs: Collection[SaeSpec],
    work: Path,
    config: TrainConfig = DEFAULT,
    *,
    held_out_tokens: int = 0,
) -> str:
    """The estimate in a line, after comparing it with what this machine has.

    Args:
        work: folder of the checkpoints; those that are there need no more room.
        held_out_tokens: held-out tokens whose residuals are not loaded yet.

    Raises:
        UserError: the device has less memory, or the disk less room, than it clearly takes.
    """
    need = budget(activations, specs, config, held_out_tokens=held_out_tokens)
    free, what = _free_memory(activations)
    if need.memory > free:
        raise UserError(
            f"training {len(specs)} SAEs takes about {size(need.memory)} of memory, but {what} has "
            f"{size(free)} left; train fewer or narrower ones, or lower the batch or the chunk"
        )
    there = sum(path.stat().st_size for path in work.glob("*step_*.pt*") if path.is_file())
    disk = max(0, need.checkpoints - there)
    check_space(work, disk, "training, for its checkpoints,")
    return (
        f"training takes about {size(need.memory)} of memory beside the model (weights and Adam "
        f"{size(need.weights)}, a step {size(need.step)}, activations {size(need.buffer)}; "
        f"{size(free)} are left) and {size(disk)} more of disk for checkpoints"
    )


def check_room(shards: Path, activations: Shape, tokens: int, dtype: "torch.dtype") -> None:
    """Whether the disk holds a harvest that has not begun; one that goes on sees for itself.

    Args:
        shards: their folder.
        tokens: content tokens that will be harvested, about.

    Raises:
        UserError: the disk is too small.
    """
    if not (shards / "manifest.json").exists():
        values = tokens * activations.d_model * len(activations.sites)
        check_space(shards, values * dtype.itemsize, f"harvesting {tokens:,} tokens")


def _free_memory(activations: Shape) -> tuple[int, str]:
    """Bytes that can still be had where the SAEs are trained, and the name of the place."""
    import torch

    if activations.device.type == "cuda":
        return torch.cuda.mem_get_info(activations.device)[0], str(activations.device)
    return available_memory(), "this machine"


def available_memory(cgroups: Path = CGROUPS) -> int:
    """Bytes of main memory that programs can still get, files cached by the system included.

    Args:
        cgroups: where the limit of this container is, if it has one.
    """
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_left_in_cgroups(cgroups)])


def _left_in_cgroups(root: Path) -> list[int]:
    """Bytes under the limits of version 2 and 1; cached files are given back when needed."""
    left: list[int] = []
    for folder, limit, used, cached in (
        (root, "memory.max", "memory.current", ("inactive_file", "active_file")),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
         ("total_inactive_file", "total_active_file")),
    ):  # fmt: skip
        try:
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            stat = dict(line.split(" ", 1) for line in lines)
            left.append(max(0, most - taken + sum(int(stat.get(name, 0)) for name in cached)))
        except (OSError, ValueError):  # no such file, or `max`: no limit
            continue
    return left
