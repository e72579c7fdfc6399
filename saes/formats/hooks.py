"""From the hook names of every format to this package's sites."""

import re
from typing import Literal

from saes.errors import UserError
from saes.lm.model import Site

KINDS: tuple[Literal["post", "pre"], ...] = ("post", "pre")
POST = (
    r"blocks\.(\d+)\.hook_(?:resid_post|out)",  # TransformerLens, its bridge
    r"(?:\w+\.)*(?:layers|h|blocks)[._](\d+)(?:\.output)?",  # modules of Hugging Face models
    r"resid_post_layer_?(\d+)",  # dictionary_learning
    r"resid_out_layer_?(\d+)",
)
PRE = (
    r"blocks\.(\d+)\.hook_(?:resid_pre|in)",
    r"(?:\w+\.)*(?:layers|h|blocks)[._](\d+)\.input",
    r"resid_pre_layer_?(\d+)",
)
# What block 0 reads, in models that add no position embedding
EMBEDDING = r"hook_embed|embed|(?:\w+\.)*embed_(?:tokens|in)"
OTHER = (
    (r"transcoder|_?clt\b", "replaces an MLP rather than reconstructing a residual"),
    (r"att(?:n|ention)?(?![a-z])|self_attn|hook_z|o_proj", "reads an attention layer"),
    (r"mlp|feedforward|ln2", "reads an MLP"),
    (r"resid_mid", "reads between the attention layer and the MLP of a block"),
)


def site_of(hook: str, label: str) -> str:
    """The site that a hook name of any format means.

    >>> site_of("gpt_neox.layers.3", "an SAE")
    'blocks.3.hook_resid_post'

    Raises:
        UserError: it is no site of the residual stream; the message says what it is.
    """
    for kind, patterns in zip(KINDS, (POST, PRE), strict=True):
        for pattern in patterns:
            if found := re.fullmatch(pattern, hook):
                return str(Site(int(found[1]), kind))
    if re.fullmatch(EMBEDDING, hook):
        return str(Site(0, "pre"))
    for pattern, what in OTHER:
        if re.search(pattern, hook):
            raise UserError(f"SAE {label} {what} (hook {hook!r}); take one of the residual stream")
    raise UserError(
        f"SAE {label} reads at {hook!r}, which is not a residual-stream site; sites are named "
        "blocks.L.hook_resid_post or blocks.L.hook_resid_pre, or layers.L as a folder of sparsify"
    )
