"""The runtime: the only thing that actually saves the memory.

The host model is transformers' own, with its attention modules swapped for ours; the stores, the
positions and the decode loop are ours.
"""

from kvtool.runtime.cache import KVCache
from kvtool.runtime.engine import Engine
from kvtool.runtime.sampling import Sampling

__all__ = ["Engine", "KVCache", "Sampling"]
