"""Attention whose softmax has one more logit per query head, which has no value.

There is no kernel of its own: those of `decode_attention`, `packed_attention` and
`streaming_attention` take such logits.
"""

from kvtool.kernels.sink_logits.reference import attention, softmax

__all__ = ["attention", "softmax"]
