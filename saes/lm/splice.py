"""Go on from a site with another residual, running only the blocks above it."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from saes.lm.capture import capture, forward
from saes.lm.edit import edit
from saes.lm.model import LM, Site
from saes.lm.tokens import Batch, pad


class Onward:
    """The upper part of a model, from any site to what leaves the last block.

    Gives the same bytes as a whole pass with the residual rewritten by `saes.lm.edit.edit`.
    """

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.last = str(Site(lm.n_layers - 1, "post"))
        self._outputs = _outputs(lm)

    def __call__(
        self, batch: Batch, site: str, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What leaves the last block when `residual` is what passes `site`.

        Raises:
            UserError: an unknown site, or one out of range.
        """
        where = self.lm.site(site)
        if site == self.last:
            return residual
        below = self.lm.blocks[: where.layer + (where.kind == "post")]
        # The answer of the last of them is overwritten by the edit; of the others it is not read.
        answer = (residual, *[None] * (self._outputs - 1)) if self._outputs else residual
        with _answering(below, answer), edit(self.lm, site, lambda _: residual):
            return capture(self.lm, batch, [self.last])[self.last]


@contextmanager
def _answering(blocks: Iterable[nn.Module], answer: object) -> Iterator[None]:
    """Within the block, these modules return `answer` whatever they are given, and do no work."""
    with ExitStack() as stack:
        for block in blocks:
            # A forward of the instance's own hides the class's; accelerate sets one too. Through
            # the dictionary, because a bridge's blocks hand attributes on to what they wrap.
            own = vars(block)
            stack.callback(_put_back, own, own.get("forward"))
            own["forward"] = lambda *_, **__: answer
        yield


def _put_back(own: dict[str, Any], before: Any) -> None:
    if before is None:
        del own["forward"]
    else:
        own["forward"] = before


def _outputs(lm: LM) -> int:
    """How many things a block returns as a tuple; 0 if it returns the residual by itself."""
    seen: list[int] = []

    def look(_module: nn.Module, _args: object, output: object) -> None:
        seen.append(len(output) if isinstance(output, tuple) else 0)

    handle = lm.blocks[0].register_forward_hook(look)
    try:
        forward(lm, pad(lm, [[0, 0]]))
    finally:
        handle.remove()
    return seen[0]
