"""Rotary position embedding in the one form that everything here knows.

Frequency `l` turns channels `l` and `l + D/2` of a head of size D. Models that pair other channels
(neighbours, as Cohere and GLM do), or turn only some of them, get the channels of their queries and
keys into an order in which that is so (:func:`channel_order`), and frequency 0 for what is not
turned. A score is a sum over channels: it does not ask in which order they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding with fixed frequencies.

    Attributes:
        inv_freq: `[N]` fp32, radians per position; frequency `l` turns dims `l` and `l + N`.
        scale: Factor that the model puts on cos and sin (1 but for yarn).
    """

    inv_freq: Tensor
    scale: float = 1.0

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of integer `positions [...]`, each `[..., 2N]` fp32."""
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.scale, angles.sin() * self.scale

    def to(self, device: torch.device) -> Rope:
        """The same on a device."""
        return Rope(self.inv_freq.to(device), self.scale)

    def equals(self, other: Rope) -> bool:
        """Whether both turn alike, on the same device."""
        return self.scale == other.scale and torch.equal(self.inv_freq, other.inv_freq)

    def over(self, head_dim: int) -> Rope:
        """The same for heads of that size: what lies beyond its channels is not turned."""
        return Rope(F.pad(self.inv_freq, (0, head_dim // 2 - len(self.inv_freq))), self.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates `x [..., 2N]` by tables of the same trailing shape; dims `l`, `l + N` are a pair."""
    real, imag = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-imag, real), dim=-1), sin)


def channel_order(head_dim: int, turned: int, interleaved: bool) -> Tensor | None:
    """Which channel of a head goes where, so that `l` and `l + D/2` are turned together.

    Args:
        head_dim: D. turned: The first so many channels are turned.
        interleaved: They are paired with their neighbours, and not over half of them.

    Returns:
        `[D]`; None if they lie so.
    """
    channels = torch.arange(head_dim)
    own, rest = channels[:turned], channels[turned:]
    pairs = own.view(-1, 2).T if interleaved else own.view(2, -1)
    order = torch.cat((pairs, rest.view(2, -1)), dim=1).flatten()
    return None if torch.equal(order, channels) else order
