"""The names that other programs give a decoder's tensors, brought to the ones that this decoder has.

transformers loads all of these, so folders with them exist:
- without "model." in front: saved from the base class (LlamaModel), which has no head;
- a tied head stored alone, as lm_head.weight, and no embedding;
- a part for multi-token prediction, under "mtp" or as one layer more with tensors of its own (eh_proj): trained with
  the model, and not needed to run it. It is left out with a warning.
"""

from __future__ import annotations

import re
import warnings

from .weights import Checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(eh_proj|enorm|hnorm|shared_head)\.")
_MTP = re.compile(r"(^|\.)mtp[_.]")


def use_known_names(checkpoint: Checkpoint, *, layers: int, tied: bool) -> None:
    """Renames and leaves out tensors of `checkpoint`, see the file's head.

    layers: how many config.json counts.  tied: whether it ties the head to the embedding.
    """
    names = checkpoint.names()
    if EMBED not in checkpoint and EMBED.removeprefix("model.") in checkpoint:
        checkpoint.rename({name: f"model.{name}" for name in names if not name.startswith(("model.", "lm_head."))})
    if tied and EMBED not in checkpoint and HEAD in checkpoint:
        checkpoint.rename({HEAD: EMBED})
    mtp_layers = {int(at[1]) for name in checkpoint.names() if (at := _LAYER.match(name)) and int(at[1]) >= layers}
    prefixes = tuple(f"model.layers.{i}." for i in mtp_layers)
    extra = [name for name in checkpoint.names() if _MTP.search(name) or name.startswith(prefixes)]
    if extra:
        warnings.warn(
            f"{checkpoint.folder}: left out {len(extra)} tensors for multi-token prediction, such as {extra[0]}",
            stacklevel=4,
        )
        checkpoint.drop(extra)
