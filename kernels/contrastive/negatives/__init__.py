"""Hard negatives for image-text matching, drawn by similarity while the logits stream by.

Where another operator already has a block of logits, `Draw` samples from it:

    draw = Draw(len(query), k, seed, logits.dtype)
    draw.add(logits, one, ids, key_ids, row=i, col=j)    # any number of blocks, in any order
    draw.result()                                        # [B, k]
"""

from mmfuse.kernels.contrastive.negatives.draw import Draw
from mmfuse.kernels.contrastive.negatives.op import hard_negatives

__all__ = ["Draw", "hard_negatives"]
