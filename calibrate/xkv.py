"""xKV (arXiv 2503.18893), offline: a subspace for the keys of some layers, one for the values.

The paper factors the keys before RoPE of m layers, concatenated along features, by an SVD of each
prompt, and stores factors per prompt. Here the right factor is found once, from calibration text,
so nothing belongs to a prompt and generated tokens are coded too. Nothing is weighted.
"""

from __future__ import annotations

from kvtool.calibrate.cskv import principal
from kvtool.calibrate.felt import Felt
from kvtool.codes import Fitted, Part


def fit(felt: Felt) -> dict[Part, Fitted]:
    """Principal directions of keys, and of values, of all layers of a group."""
    second = felt.second / felt.tokens
    width = len(second) // 2
    return {"keys": principal(second[:width, :width]), "values": principal(second[width:, width:])}
