"""The settings of the labeling stages. Nothing heavy is imported."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LabelConfig:
    """Names and evidence."""

    contexts: int = 4
    """Top texts shown per feature."""
    promoted: int = 10
    """Tokens shown per direction and feature."""

    def __post_init__(self) -> None:
        for name in ("contexts", "promoted"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
