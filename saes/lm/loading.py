"""A model and its tokenizer through transformers, with a plain word on what failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from saes.errors import UserError
from saes.files import locate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DeviceMap = str | dict[str, int | str | torch.device]


@dataclass(frozen=True)
class Placement:
    """Where a model's weights go, and as what."""

    device: str | None = None
    """A torch device; None is the CPU, or where a model object already is."""
    dtype: str | None = None
    """float32, bfloat16 or float16; None is float32, or what a model object already has."""
    device_map: DeviceMap | None = None
    """Spread over devices by accelerate: `auto`, or a device for each module."""
    quantize: str | None = None
    """8bit or 4bit: quantise the weights while loading, through bitsandbytes."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")
        if self.quantize not in (None, "8bit", "4bit"):
            raise UserError(f"unknown quantize {self.quantize!r}; choose 8bit or 4bit")
        if self.device is not None and self.device_map is not None:
            raise UserError(
                f"give either device={self.device!r} or device_map={self.device_map!r}, not both"
            )
        for option, package in (("quantize", "bitsandbytes"), ("device_map", "accelerate")):
            if getattr(self, option) is not None and find_spec(package) is None:
                raise UserError(
                    f"{option}={getattr(self, option)!r} needs the package {package}, which is "
                    f"not installed; pip install {package}, or leave {option} out"
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype to load weights in."""
        return DTYPES[self.dtype or "float32"]

    def arguments(self) -> dict[str, Any]:
        """What `from_pretrained` is given."""
        given: dict[str, Any] = {"dtype": self.torch_dtype}
        if self.device_map is not None:
            given["device_map"] = self.device_map
        if self.quantize is not None:
            given["device_map"] = self.device_map or {"": self.device or "cpu"}
            given["quantization_config"] = (
                BitsAndBytesConfig(load_in_8bit=True)
                if self.quantize == "8bit"
                else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=self.torch_dtype)
            )
        return given


def resolve(name: str | Path) -> tuple[str, str]:
    """(what transformers loads, the name to record).

    Raises:
        UserError: a folder that is missing or holds no model.
    """
    text = str(name)
    folder = locate(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{text} holds no model: config.json is missing")
        return str(folder), text if text.startswith("packaged/") else folder.resolve().name
    looks_local = isinstance(name, Path) or text.count("/") > 1
    if looks_local or text.startswith((".", "/", "~", "packaged/")):
        raise UserError(f"no model folder {text}; give an existing folder or a hub name")
    return text, text


def load_tokenizer(source: str, label: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        UserError: there is none, or none that can be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except Exception as error:  # tokenizers raises a bare one for a damaged tokenizer.json
        if not Path(source).is_dir():
            raise UserError(_unreachable(label, revision, error)) from None
        raise UserError(f"model {label} has no usable tokenizer: {first_line(error)}") from None
    # transformers makes an empty tokenizer of the configured class where the files are missing
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"model {label} comes without a tokenizer (tokenizer.json); save one beside it"
        )
    return tokenizer


def load_model(
    source: str, label: str, placement: Placement, revision: str | None
) -> PreTrainedModel:
    """A model with all its weights.

    Raises:
        UserError: it cannot be loaded, or weights are missing.
    """
    try:
        with _bars_on_a_terminal():
            model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
                source,
                revision=revision or "main",
                output_loading_info=True,
                **placement.arguments(),
            )
    except Exception as error:  # transformers raises many types; each means it cannot be loaded
        if not Path(source).is_dir():
            raise UserError(_unreachable(label, revision, error)) from None
        raise UserError(f"cannot load model {label}: {first_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"the weights of {label} lack {missing[0]} (and {len(missing) - 1} more); "
            "the folder is incomplete or of another architecture"
        )
    return model


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Within the block, transformers shows progress bars only where somebody can watch them."""
    before = logging.set_tqdm_hook(
        lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": None})
    )
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def place(model: PreTrainedModel, placement: Placement, *, loaded: bool) -> PreTrainedModel:
    """Move a model where it is asked for, in eval mode and without gradients.

    Args:
        loaded: it was loaded here with this placement; otherwise it is the caller's, and stays
            where and as it is unless the placement says otherwise.

    Raises:
        UserError: the device cannot be used, or a quantised model is to change.
    """
    kept = placement.quantize is not None or placement.device_map is not None
    to: dict[str, Any] = {}
    if not (loaded and kept):
        if placement.device is not None or loaded:
            to["device"] = placement.device or "cpu"
        if placement.dtype is not None and not loaded:
            to["dtype"] = placement.torch_dtype
    try:
        if to:
            cast("Any", model).to(**to)
    except (RuntimeError, AssertionError, ValueError) as error:
        wanted = " and ".join(f"{key} {str(value)!r}" for key, value in to.items())
        raise UserError(f"cannot use {wanted}: {first_line(error)}") from None
    return cast("Any", model).eval().requires_grad_(False)


def _unreachable(label: str, revision: str | None, error: Exception) -> str:
    at = "" if revision is None else f" at revision {revision}"
    return (
        f"no model {label}{at}: it is neither a folder nor a hub name that could be fetched "
        f"({first_line(error)})"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
