"""Rewrite the residual stream while the model runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor

from saes.lm.capture import hook
from saes.lm.model import LM

Edit = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"]]


@contextmanager
def edit(lm: LM, site: str, fn: Edit) -> Iterator[None]:
    """Within the block, every pass of the model goes on with `fn(residual)` at `site`.

    `fn` gets the residual on `lm.device`. The model is as before afterwards, also when something
    is raised. Edits nest: at one site the inner one sees what the outer one left.

    Raises:
        UserError: an unknown site, or one out of range.
    """

    def rewrite(residual: Tensor) -> Tensor:
        new = fn(residual.to(lm.device))
        assert new.shape == residual.shape, f"edit at {site}: {new.shape} != {residual.shape}"
        return new.to(residual)

    handle = hook(lm, lm.site(site), rewrite)
    try:
        yield
    finally:
        handle.remove()
