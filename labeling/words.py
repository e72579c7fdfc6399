"""Numbers and names in words: one way to write them, for pages, report, terminal and figures."""

import math
from collections.abc import Sequence

from labeling.summary import Mean

MINUS, DASH, TIMES = "−", "–", "×"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """Fixed decimals with a true minus sign; a dash for what is missing or not finite.

    >>> number(-0.125, 3), number(0.5, sign=True), number(None)
    ('−0.125', '+0.50', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    if not any(c in "123456789" for c in text):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def probability(value: float | None) -> str:
    """A p or q value: three decimals from 0.001 up, below that a power of ten.

    >>> probability(0.0321), probability(4.2e-7)
    ('0.032', '4 × 10⁻⁷')
    """
    if value is None or not math.isfinite(value):
        return DASH
    if value >= 0.001 or value <= 0:
        return f"{value:.3f}"
    digits, exponent = f"{value:.0e}".split("e")
    return f"{digits} {TIMES} 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def interval(mean: Mean, digits: int = 3, *, sign: bool = False) -> str:
    """`0.812 (0.804 to 0.820)`, or the mean alone where there is no interval.

    Values that are all equal have an interval of no width, which says nothing about others: then
    `1.000 (no spread)`.
    """
    text = number(mean.mean, digits, sign=sign)
    if mean.low is None or mean.high is None:
        return text
    if mean.low == mean.high:
        return f"{text} (no spread)"
    return (
        f"{text} ({number(mean.low, digits, sign=sign)} to {number(mean.high, digits, sign=sign)})"
    )


def plural(count: int, noun: str) -> str:
    """`1 concept`, `2 concepts`.

    >>> plural(1, "concept"), plural(0, "concept")
    ('1 concept', '0 concepts')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def method_name(method: str, k: int | None) -> str:
    """A method in words; `k` is the size of a set."""
    names = {
        "latent": "best single latent",
        "set": f"set of {k} latents" if k else "set of latents",
        "vector": "contrastive vector",
        "probe": "dense probe",
        "embedding": "embedding layer",
        "tfidf": "TF-IDF",
        "random": "random latents of like density",
        "untrained": "latent of an untrained SAE",
        "untrained set": "set of an untrained SAE",
        "randomised": "latent of a randomised model",
        "randomised set": "set of a randomised model",
    }
    return names.get(method, method)


def join(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
