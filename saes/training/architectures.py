"""The architectures that sae-lens trains: what an SAE is to be, and sae-lens's trainer for it.

Torch and sae-lens are imported when a trainer is built, so that a config loads without them.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from saes.errors import UserError

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

    from saes.stream.activations import Activations

SPARSITY = {  # architecture: the field of SaeSpec that sets how sparse it is
    "topk": "k",
    "abstopk": "k",
    "batchtopk": "k",
    "matryoshka_batchtopk": "k",
    "matching_pursuit": "k",
    "standard": "l1",
    "gated": "l1",
    "jumprelu": "l0",
}
DEAD = {  # weight of the loss for dead latents, where there is one: sae-lens's, Anthropic's
    "topk": 1.0,
    "abstopk": 1.0,
    "batchtopk": 1.0,
    "matryoshka_batchtopk": 1.0,
    "jumprelu": 3e-6,
}


@dataclass(frozen=True)
class SaeSpec:
    """One SAE to train."""

    site: str
    """Residual-stream site, `blocks.L.hook_resid_post` or `_pre`."""
    architecture: str
    """standard, gated, jumprelu, topk, abstopk, batchtopk, matryoshka_batchtopk or
    matching_pursuit."""
    d_sae: int = 4096
    """Number of latents."""
    k: int | float | None = None
    """Latents that fire on a token: exactly (topk, abstopk), on average (batchtopk, matryoshka) or
    at most (matching pursuit)."""
    l1: int | float | None = None
    """Weight of the L1 penalty (standard, gated)."""
    l0: int | float | None = None
    """Weight of the L0 penalty (jumprelu)."""
    target_l0: int | float | None = None
    """Of jumprelu: penalise the squared distance from this L0 instead of L0 itself (Gemma Scope
    2)."""
    bandwidth: int | float | None = None
    """Of jumprelu: width of the straight-through estimator; sae-lens's 0.05 if not given."""
    widths: tuple[int, ...] = ()
    """Of matryoshka: widths of the nested dictionaries, rising; an eighth, a quarter, half and all
    of d_sae if not given."""
    dead: int | float | None = None
    """Weight of the loss that revives dead latents, where the architecture has one; its usual value
    if not given, 0 for none."""
    seed: int = 0
    """Seed of the initial weights."""

    def __post_init__(self) -> None:
        if self.architecture not in SPARSITY:
            raise UserError(
                f"unknown architecture {self.architecture!r}; known ones: {', '.join(SPARSITY)}"
            )
        if self.d_sae < 1:
            raise UserError(f"d_sae = {self.d_sae} must be at least 1")
        self._check_sparsity()
        self._check_options()

    def _check_sparsity(self) -> None:
        wanted = SPARSITY[self.architecture]
        for name in ("k", "l1", "l0"):
            if getattr(self, name) is not None and name != wanted:
                raise UserError(
                    f"{self.architecture} takes no {name}; its sparsity is set by {wanted}"
                )
        value = getattr(self, wanted)
        if value is None:
            raise UserError(f"{self.architecture} needs {wanted}, which sets its sparsity")
        if not 0 <= value < math.inf:
            raise UserError(f"{wanted} = {value:g} must not be negative")
        if wanted == "k" and not 0 < value <= self.d_sae:
            raise UserError(f"k = {value:g} must lie between 1 and d_sae = {self.d_sae}")
        if wanted == "k" and "batchtopk" not in self.architecture and value != int(value):
            raise UserError(f"k = {value:g} must be a whole number for {self.architecture}")

    def _check_options(self) -> None:
        jumprelu = self.architecture == "jumprelu"
        for name in ("target_l0", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not (jumprelu and value > 0):
                raise UserError(f"{name} = {value:g} is for jumprelu, and above 0; leave it out")
        if self.target_l0 is not None and self.target_l0 > self.d_sae:
            raise UserError(f"target_l0 = {self.target_l0:g} is above d_sae = {self.d_sae}")
        if self.dead is not None and (self.architecture not in DEAD or self.dead < 0):
            raise UserError(
                f"dead = {self.dead:g} must not be negative, and {self.architecture} must be one "
                f"of those with a loss for dead latents: {', '.join(DEAD)}"
            )
        if self.widths and self.architecture != "matryoshka_batchtopk":
            raise UserError(f"{self.architecture} takes no widths; only matryoshka_batchtopk does")
        rising = sorted({w for w in self.widths if 0 < w <= self.d_sae})
        if list(self.widths) != rising:
            raise UserError(f"widths {list(self.widths)} must rise, up to d_sae = {self.d_sae}")

    @property
    def unit_rows(self) -> bool:
        """Whether decoder rows are kept at norm 1 in training (else they are folded on saving)."""
        return SPARSITY[self.architecture] == "k"

    @property
    def has_threshold(self) -> bool:
        """Whether it is saved with a threshold for each latent."""
        return self.architecture in ("jumprelu", "batchtopk", "matryoshka_batchtopk")


@dataclass(frozen=True)
class SaeGrid:
    """SAEs that are trained together: one for each site, width, sparsity and seed."""

    architecture: str
    """standard, gated, jumprelu, topk, abstopk, batchtopk, matryoshka_batchtopk or
    matching_pursuit."""
    sites: tuple[str, ...]
    """Residual-stream sites."""
    d_sae: tuple[int, ...] = (4096,)
    """Widths."""
    k: tuple[float, ...] = ()
    """Sparsities of topk, abstopk, batchtopk, matryoshka_batchtopk, matching_pursuit."""
    l1: tuple[float, ...] = ()
    """Sparsities of standard and gated."""
    l0: tuple[float, ...] = ()
    """Sparsities of jumprelu."""
    target_l0: float | None = None
    bandwidth: float | None = None
    widths: tuple[int, ...] = ()
    dead: float | None = None
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights."""

    def __post_init__(self) -> None:
        for name in ("sites", "d_sae", "seeds"):
            if not getattr(self, name):
                raise UserError(f"{name} is empty; a grid needs at least one")
        self.specs()

    def specs(self) -> tuple[SaeSpec, ...]:
        """The SAEs of the grid: by site, then width, then sparsity, then seed."""
        return tuple(
            SaeSpec(
                site, self.architecture, d_sae, k, l1, l0, self.target_l0, self.bandwidth,
                self.widths, self.dead, seed,
            )
            for site, d_sae, k, l1, l0, seed in itertools.product(
                self.sites, self.d_sae, self.k or (None,), self.l1 or (None,), self.l0 or (None,),
                self.seeds,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How SAEs are trained, beside what they are and what they are trained on."""

    tokens: int = 4_000_000
    """Content tokens to train on."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Of the rate between warm-up and decay; cosine falls to a tenth of it."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises."""
    decay: float = 0.5
    """Share of the steps, at the end, over which it falls to 0."""
    beta1: float = 0.9
    """Of Adam."""
    beta2: float = 0.999
    """Of Adam."""
    sparsity_warmup: float = 0.05
    """Share of the steps over which an L1 or L0 penalty rises to its weight."""
    dead_tokens: int = 200_000
    """A latent that has not fired for this many tokens is dead."""
    b_dec: Literal["mean", "zero"] = "mean"
    """Where the decoder's bias starts: at the mean of the activations, or at 0 as in sae-lens."""
    autocast: bool = False
    """Train in bfloat16 where that is safe; weights and their updates stay float32."""
    fast: bool = True
    """Use the sparse step of saes.sparse_topk for topk, batchtopk and matryoshka_batchtopk; false
    for sae-lens's own, to compare."""
    calibration_tokens: int = 32_768
    """Training tokens on which thresholds are set at the end, so that the saved SAE has the L0 of
    the trained one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the saved weights."""
    checkpoint_steps: int = 200
    """Steps between checkpoints; the last two are kept."""
    snapshots: int = 0
    """SAEs that are saved on the way, at even distances, as for use."""
    log_steps: int = 20
    """Steps between points of the tracked curves."""
    held_out_steps: int = 200
    """Steps between evaluations on held-out residuals, and between density histograms."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"tokens = {self.tokens} must be at least 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr = {self.lr:g} must be above 0")
        for name in ("checkpoint_steps", "log_steps", "held_out_steps", "calibration_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("warmup", "decay", "sparsity_warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name):g} must lie between 0 and 1")
        if self.warmup + self.decay > 1:
            raise UserError(
                f"warmup {self.warmup:g} and decay {self.decay:g} overlap; their sum must not "
                "exceed 1"
            )
        if self.snapshots < 0 or self.dead_tokens < 1:
            raise UserError("snapshots must not be negative and dead_tokens must be at least 1")

    def deciding(self) -> dict[str, object]:
        """The settings that decide the weights; the others may change between resumptions."""
        free = ("checkpoint_steps", "snapshots", "log_steps", "held_out_steps", "dtype",
                "calibration_tokens")  # fmt: skip
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}


def name_specs(specs: Sequence[SaeSpec]) -> dict[str, SaeSpec]:
    """A name for each SAE, which is also its folder: the site, and what differs at that site.

    A setting that is left out has no part in the name; where that leaves none, it is `default`.

    >>> pair = SaeGrid("topk", ("blocks.0.hook_resid_post",), k=(16, 32)).specs()
    >>> list(name_specs(pair))
    ['blocks.0.hook_resid_post/k16', 'blocks.0.hook_resid_post/k32']

    Raises:
        UserError: none are given, or the same one twice.
    """
    if not specs:
        raise UserError("no SAE is asked for; give at least one")
    named: dict[str, SaeSpec] = {}
    for spec in specs:
        beside = [other for other in specs if other.site == spec.site]
        parts = [
            _part(f.name, getattr(spec, f.name))
            for f in fields(SaeSpec)
            if len({getattr(other, f.name) for other in beside}) > 1
        ]
        own = "_".join(p for p in parts if p) or "default"
        name = f"{spec.site}/{own}" if len(beside) > 1 else spec.site
        if name in named:
            raise UserError(f"the same SAE is asked for twice: {name}; change its seed")
        named[name] = spec
    inside = [a for a, b in itertools.permutations(named, 2) if a.startswith(f"{b}/")]
    assert not inside, f"folders inside others, which saving these would delete: {inside}"
    return named


_SHORT = {"architecture": "", "d_sae": "d", "seed": "s", "widths": "w", "target_l0": "target"}


def _part(field: str, value: object) -> str:
    """One setting in a folder's name; nothing for one that is not set."""
    if value is None or value == ():
        return ""
    text = "-".join(map(str, value)) if isinstance(value, tuple) else (
        f"{value:.12g}" if isinstance(value, int | float) else str(value)
    )  # fmt: skip
    return _SHORT.get(field, field) + text


def build(
    spec: SaeSpec, config: TrainConfig, activations: "Activations", *, steps: int
) -> "SAETrainer[Any, Any]":
    """sae-lens's trainer around a fresh SAE; torch is seeded here, since the trainer does not."""
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    fast = config.fast and spec.architecture in FAST
    sae_class, sae_config = _classes(spec, fast=fast)
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        sae = sae_class(sae_config(**_settings(spec, config, activations, steps, fast=fast)))
    cosine = config.schedule == "cosine"
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * activations.batch,
        train_batch_size_samples=activations.batch,
        lr=config.lr,
        lr_scheduler_name="cosineannealing" if cosine else "constant",
        lr_end=config.lr / 10 if cosine else config.lr,  # before the decay, which goes to 0
        lr_warm_up_steps=math.ceil(steps * config.warmup),
        lr_decay_steps=math.floor(steps * config.decay),
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        device=str(activations.device),
        autocast=config.autocast,
        dead_feature_window=math.ceil(config.dead_tokens / activations.batch),
    )
    trainer = SAETrainer(trainer_config, sae, iter(()))
    if config.fast:
        from saes.sparse_topk import fuse_optimizer

        fuse_optimizer(trainer)
    return trainer


FAST = ("topk", "batchtopk", "matryoshka_batchtopk")


def _classes(spec: SaeSpec, *, fast: bool) -> tuple[Any, Any]:
    """Training class and config class."""
    import sae_lens  # noqa: F401  # registers its classes
    from sae_lens.registry import get_sae_training_class

    if fast:
        import saes.sparse_topk  # noqa: F401  # registers ours

        short = spec.architecture.removesuffix("_batchtopk")
        return get_sae_training_class(f"sparse_{short}")
    return get_sae_training_class(spec.architecture)


def _settings(
    spec: SaeSpec, config: TrainConfig, activations: "Activations", steps: int, *, fast: bool
) -> dict[str, Any]:
    """Arguments of sae-lens's config class."""
    from sae_lens.saes.sae import SAEMetadata

    about = activations.about
    settings: dict[str, Any] = {
        "d_in": activations.d_model,
        "d_sae": spec.d_sae,
        "device": str(activations.device),
        "metadata": SAEMetadata(
            model_name=about.model,
            hook_name=spec.site,
            context_size=about.context,
            prepend_bos=about.prepend_bos,
            dataset=about.text,
            training_tokens=steps * activations.batch,
            seed=spec.seed,
        ),
    }
    warm_up = math.ceil(steps * config.sparsity_warmup)
    dead = DEAD.get(spec.architecture) if spec.dead is None else spec.dead
    if spec.unit_rows:
        settings |= {"decoder_init_norm": 1.0}
    if spec.architecture in ("standard", "gated"):
        settings |= {"l1_coefficient": spec.l1, "l1_warm_up_steps": warm_up}
    elif spec.architecture == "jumprelu":
        settings |= {"l0_coefficient": spec.l0, "l0_warm_up_steps": warm_up}
        settings |= {"pre_act_loss_coefficient": dead or None}
        if spec.bandwidth is not None:
            settings |= {"jumprelu_bandwidth": spec.bandwidth}
        if spec.target_l0 is not None:
            settings |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": spec.target_l0}
    elif spec.architecture == "matching_pursuit":
        assert spec.k is not None
        settings |= {"max_iterations": int(spec.k)}
    else:
        assert spec.k is not None
        batchwise = "batchtopk" in spec.architecture
        settings |= {"k": float(spec.k) if batchwise else int(spec.k), "aux_loss_coefficient": dead}
        settings |= {"rescale_acts_by_decoder_norm": False}  # rows are kept at norm 1
        settings |= {"use_sparse_activations": spec.architecture == "topk" and not fast}
        if spec.architecture == "matryoshka_batchtopk":
            settings |= {"matryoshka_widths": _widths(spec)}
    return settings


def _widths(spec: SaeSpec) -> list[int]:
    """Widths of the nested dictionaries, the whole one last."""
    widths = spec.widths or tuple(spec.d_sae // part for part in (8, 4, 2))
    return [*(w for w in widths if 0 < w < spec.d_sae), spec.d_sae]
