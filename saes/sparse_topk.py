"""Training classes for sae-lens that compute on the chosen latents alone; same losses, same files.

Each is a sae-lens class with another training step, and everything else about it is sae-lens's:
`SAETrainer` trains it, its weights have the same names and shapes, and `save_inference_model`
writes a plain `topk` or `jumprelu` SAE. Importing this module registers them: `sparse_topk`,
`sparse_batchtopk` and `sparse_matryoshka`.

TopK and the auxiliary loss: Gao et al. 2024 (arXiv 2406.04093), sections 2.3 and 2.4, appendix A.2.
BatchTopK: Bussmann et al. 2024 (arXiv 2412.06410). Matryoshka: Bussmann et al. 2025
(arXiv 2503.17547).

What a step does not do: it calls no hook of sae-lens but `hook_sae_input` and `hook_sae_recons`,
ignores autocast (`encode_dtype` says what runs in bfloat16), gives its input no gradient, and hands
out `feature_acts` and
`hidden_pre` as sparse COO tensors without gradient, with the chosen pairs in them and no others.
Outside a training step (`encode`, `decode`, `forward`) these are the dense classes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from torch import Tensor

from saes.errors import UserError
from saes.fused_adam import FusedAdam, keep_freed_memory
from saes.sparse_kernels import (
    Autoencode,
    Encoder,
    Pairs,
    choose_per_batch,
    choose_per_row,
    pair_up,
    top_per_row,
)

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

FEW_DEAD = 8  # times k_aux: up to here the auxiliary loss is faster dense in the dead latents


@dataclass
class SparseSettings:
    """How the sparse step finds the latents that fire."""

    encode_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoder's matmul runs in. float32: the choice of latents is exact. bfloat16:
    candidates are found in bfloat16 and computed again in full precision; a latent is missed only
    if rounding to 8 bits lets `candidate_margin` worse ones overtake it. auto: bfloat16 where the
    processor has instructions for it."""
    candidate_margin: int = 8
    """In bfloat16, candidates a row beyond k."""

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
        _check(self)


def _check(cfg: Any) -> None:
    """Raise UserError for settings that cannot be trained with."""
    if not 0 < cfg.k <= cfg.d_sae:
        raise UserError(f"k = {cfg.k} must lie above 0 and at most at d_sae = {cfg.d_sae}")
    if cfg.dtype not in ("float32", "float64"):
        raise UserError(f'dtype {cfg.dtype}: weights are trained in "float32" (or "float64")')
    if cfg.encode_dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f'encode_dtype {cfg.encode_dtype!r}: give "auto", "float32" or "bfloat16"')
    if cfg.candidate_margin < 0:
        raise UserError(f"candidate_margin = {cfg.candidate_margin} must not be negative")


@dataclass
class SparseTopKTrainingSAEConfig(SparseSettings, TopKTrainingSAEConfig):
    """Settings of sae-lens's TopK training class, and of the sparse step."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@dataclass
class SparseBatchTopKTrainingSAEConfig(SparseSettings, BatchTopKTrainingSAEConfig):
    """Settings of sae-lens's BatchTopK training class, and of the sparse step."""

    @classmethod
    def architecture(cls) -> str:
        return "sparse_batchtopk"


@dataclass
class SparseMatryoshkaTrainingSAEConfig(SparseSettings, MatryoshkaBatchTopKTrainingSAEConfig):
    """Settings of sae-lens's Matryoshka BatchTopK training class, and of the sparse step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise UserError(
                f'normalize_activations = "{self.normalize_activations}" does not work with '
                'Matryoshka levels; give "none" or "expected_average_only_in"'
            )

    @classmethod
    def architecture(cls) -> str:
        return "sparse_matryoshka"


class _SparseStep(TopKTrainingSAE):
    """The training step that the three classes share.

    W_enc keeps its shape, but lies in memory latent by latent: so its rows for chosen latents can
    be read in one piece, and its gradient is a sum of such rows. Whatever leaves through
    `state_dict` has the usual layout.
    """

    cfg: Any

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.W_enc.data = _by_latent(self.W_enc.data)
        self.register_state_dict_post_hook(_usual_layout)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _by_latent(state_dict["W_enc"])

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Losses as sae-lens's class of the same kind has them, with the same gradients."""
        with torch.autocast(self.W_enc.device.type, enabled=False):
            return self._sparse_forward_pass(step_input)

    def _sparse_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        sae_in = step_input.sae_in
        x = self.process_sae_in(sae_in)
        encoder = self._encoder()
        with torch.no_grad():
            pairs, z = self._choose(x, encoder)
        levels = self._reconstruct(x, pairs, z)
        names = ["mse_loss", *(f"inner_mse_loss_{width}" for width in self._inner_widths())]
        ordered = [levels[-1], *levels[:-1]]  # the outermost first, as sae-lens has it
        losses = {
            name: self.mse_loss_fn(level, sae_in).sum(-1).mean()
            for name, level in zip(names, ordered, strict=True)
        }
        losses["auxiliary_reconstruction_loss"] = self._aux_loss(
            sae_in, x, encoder, levels, step_input.dead_neuron_mask
        )
        pre = z if encoder.scale is None else z * encoder.scale[pairs.latents]
        return TrainStepOutput(
            sae_in=sae_in,
            sae_out=levels[-1],
            feature_acts=_coo(pairs, pre.relu(), self.cfg.d_sae),
            hidden_pre=_coo(pairs, pre, self.cfg.d_sae),
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def _encoder(self) -> Encoder:
        """The encoder as the choice of latents needs it.

        The decoder's norms decide which latents fire but not the reconstruction: a value is
        multiplied by its row's norm, then divided by it. So they have no part in the gradient.
        """
        scale = self.W_dec.detach().norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        return Encoder(self.W_enc.detach().t().contiguous(), self.b_enc.detach(), scale)

    def _choose(self, x: Tensor, encoder: Encoder) -> tuple[Pairs, Tensor]:
        """The latents that fire, and their pre-activations before scaling."""
        return choose_per_row(x, encoder, self.cfg.k, **self._search())

    def _search(self) -> dict[str, Any]:
        return {
            "margin": self.cfg.candidate_margin,
            "bfloat16": _in_bfloat16(self.cfg.encode_dtype, self.W_enc.device),
        }

    def _inner_widths(self) -> list[int]:
        """Widths of the levels inside the whole SAE; none but for Matryoshka."""
        return []

    def _reconstruct(self, x: Tensor, pairs: Pairs, z: Tensor) -> list[Float[Tensor, "batch d_in"]]:
        """The reconstruction by each level, the whole SAE last."""
        widths, n = self._inner_widths(), x.shape[0]
        if widths:  # levels lie below each other, as further rows
            edges = torch.tensor(widths, device=x.device)
            rows = torch.bucketize(pairs.latents, edges, right=True) * n + pairs.rows
            pairs, order = pair_up(rows, pairs.latents, (len(widths) + 1) * n, self.cfg.d_sae)
            z = z[order]
        parts = self._decode_pairs(x, pairs, z, rectify=True)
        sums = parts.view(-1, *x.shape).cumsum(0) if widths else parts.unsqueeze(0)
        return [
            self.run_time_activation_norm_fn_out(self.hook_sae_recons(level + self.b_dec))
            for level in sums.unbind()
        ]

    def _aux_loss(
        self,
        sae_in: Tensor,
        x: Tensor,
        encoder: Encoder,
        levels: list[Tensor],
        dead: Bool[Tensor, "latents"] | None,
    ) -> Float[Tensor, ""]:
        """The auxiliary loss on what the whole SAE leaves over."""
        return self._aux_loss_of(sae_in, x, encoder, levels[-1], dead)

    def _aux_loss_of(
        self,
        sae_in: Tensor,
        x: Tensor,
        encoder: Encoder,
        sae_out: Tensor,
        dead: Bool[Tensor, "latents"] | None,
    ) -> Float[Tensor, ""]:
        """How far the k_aux dead latents with the largest pre-activations miss the residual."""
        latents = torch.empty(0) if dead is None else dead.nonzero().flatten()
        if latents.numel() == 0:
            return sae_out.new_tensor(0.0)
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise UserError(
                f'normalize_activations = "{self.cfg.normalize_activations}" does not work with '
                "the auxiliary loss for dead latents, which has set in; "
                'give "none" or "expected_average_only_in"'
            )
        k_aux = x.shape[1] // 2
        scale = min(latents.numel() / k_aux, 1.0)
        k_aux = min(k_aux, latents.numel())
        few = latents.numel() <= FEW_DEAD * k_aux
        decode = self._decode_few_dead if few else self._decode_many_dead
        residual = (sae_in - sae_out).detach()
        loss = (decode(x, encoder, latents, k_aux) - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * scale * loss

    def _decode_few_dead(self, x: Tensor, encoder: Encoder, dead: Tensor, k: int) -> Tensor:
        """What the best k dead latents of each row decode to, dense in the dead ones."""
        z = F.linear(x, self.W_enc.t()[dead], self.b_enc[dead])
        if k < dead.numel():
            pre = z.detach() if encoder.scale is None else z.detach() * encoder.scale[dead]
            z = z * torch.zeros_like(z).scatter_(1, top_per_row(pre, k), 1.0)
        return z @ self.W_dec[dead]

    def _decode_many_dead(self, x: Tensor, encoder: Encoder, dead: Tensor, k: int) -> Tensor:
        """The same, on the chosen pairs alone."""
        with torch.no_grad():
            scale = None if encoder.scale is None else encoder.scale[dead]
            part = Encoder(encoder.weight[dead], encoder.bias[dead], scale)
            pairs, z = choose_per_row(x, part, k, **self._search())
            pairs = pairs._replace(latents=dead[pairs.latents])
        return self._decode_pairs(x, pairs, z, rectify=False)

    def _decode_pairs(self, x: Tensor, pairs: Pairs, z: Tensor, *, rectify: bool) -> Tensor:
        """For each row of the pairs, what its latents decode to, without b_dec."""
        shift = self.b_dec if self.cfg.apply_b_dec_to_input else None
        out = Autoencode.apply(
            x.detach(), shift, self.W_enc, self.b_enc, self.W_dec, z, pairs, rectify
        )
        assert isinstance(out, Tensor)
        return out


class SparseTopKTrainingSAE(_SparseStep):
    """`sae_lens.TopKTrainingSAE` with a sparse training step."""


class SparseBatchTopKTrainingSAE(_SparseStep, BatchTopKTrainingSAE):
    """`sae_lens.BatchTopKTrainingSAE` with a sparse training step."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """As in sae-lens: the threshold follows the smallest value that fired."""
        output = super().training_forward_pass(step_input)
        self.update_topk_threshold(output.feature_acts.values())
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    def _choose(self, x: Tensor, encoder: Encoder) -> tuple[Pairs, Tensor]:
        n = int(self.cfg.k * x.shape[0])
        return choose_per_batch(x, encoder, n, **self._search())


class SparseMatryoshkaTrainingSAE(SparseBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """`sae_lens.MatryoshkaBatchTopKTrainingSAE` with a sparse training step."""

    def _inner_widths(self) -> list[int]:
        return self.cfg.matryoshka_widths[:-1]

    def _aux_loss(
        self,
        sae_in: Tensor,
        x: Tensor,
        encoder: Encoder,
        levels: list[Tensor],
        dead: Bool[Tensor, "latents"] | None,
    ) -> Float[Tensor, ""]:
        """As the base class has it, or a loss for each level's own dead latents and residual."""
        if dead is None or not self.cfg.use_matryoshka_aux_loss:
            return super()._aux_loss(sae_in, x, encoder, levels, dead)
        edges = torch.tensor(self._inner_widths(), device=dead.device)
        level_of = torch.bucketize(
            torch.arange(self.cfg.d_sae, device=dead.device), edges, right=True
        )
        losses = [
            self._aux_loss_of(sae_in, x, encoder, level, dead & (level_of == i))
            for i, level in enumerate(levels)
        ]
        return torch.stack(losses).sum()


def _in_bfloat16(encode_dtype: str, device: torch.device) -> bool:
    """Whether the encoder's matmul runs in bfloat16 there."""
    if encode_dtype != "auto":
        return encode_dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _by_latent(w_enc: Float[Tensor, "d_in latents"]) -> Float[Tensor, "d_in latents"]:
    """The same matrix, each latent's column in one piece of memory."""
    return w_enc.t().contiguous().t()


def _usual_layout(
    _module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    state_dict[f"{prefix}W_enc"] = state_dict[f"{prefix}W_enc"].contiguous()


def _coo(pairs: Pairs, values: Float[Tensor, "pairs"], d_sae: int) -> Tensor:
    """The pairs as a sparse [batch, d_sae] tensor, outside the gradient."""
    return torch.sparse_coo_tensor(
        torch.stack([pairs.rows, pairs.latents]),
        values.detach(),
        (pairs.starts.shape[0] - 1, d_sae),
        is_coalesced=True,
        check_invariants=False,
    )


def fuse_optimizer(trainer: "SAETrainer[Any, Any]") -> None:
    """Give a trainer a fused Adam, with the state and learning-rate schedule that it has now.

    On a CPU it also calls `keep_freed_memory`.
    """
    if trainer.sae.device.type == "cpu":
        keep_freed_memory()
    cfg, old, schedule = trainer.cfg, trainer.optimizer, trainer.lr_scheduler.state_dict()
    trainer.optimizer = FusedAdam(
        trainer.sae.parameters(), lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2)
    )
    assert cfg.lr_end is not None
    trainer.lr_scheduler = get_lr_scheduler(
        cfg.lr_scheduler_name,
        lr=cfg.lr,
        optimizer=trainer.optimizer,
        warm_up_steps=cfg.lr_warm_up_steps,
        decay_steps=cfg.lr_decay_steps,
        training_steps=cfg.total_training_steps,
        lr_end=cfg.lr_end,
        num_cycles=cfg.n_restart_cycles,
    )
    trainer.optimizer.load_state_dict(old.state_dict())
    trainer.lr_scheduler.load_state_dict(schedule)


register_sae_training_class("sparse_topk", SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
register_sae_training_class(
    "sparse_batchtopk", SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig
)
register_sae_training_class(
    "sparse_matryoshka", SparseMatryoshkaTrainingSAE, SparseMatryoshkaTrainingSAEConfig
)
