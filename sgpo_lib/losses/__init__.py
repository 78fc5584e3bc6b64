"""Pure losses: tensors in, `LossOutput` out. No model, no tokenizer, no global, no argument is written to.

Every loss is a sum over tokens with explicit weights, so that gradient accumulation over micro-batches (or
workers) gives exactly one large batch: the counts that normalise are passed in, never taken from a micro-batch.
"""

from sgpo_lib.losses.masked import LossOutput

__all__ = ["LossOutput"]
