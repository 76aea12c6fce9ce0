"""What holds of every store that packs what it keeps, however it packs it."""

from collections.abc import Callable
from typing import Any

import torch
from _convert_tools import random_ids
from torch import Tensor

from kvtool.checkpoint import Checkpoint
from kvtool.evaluate.protocol import cache_size
from kvtool.plan import Plan
from kvtool.runtime import Engine

TOKENS = (1, 8, 9, 23, 24, 25, 64, 300)
"""That a cache is allocated for: around where blocks of 16 and pages begin."""


def logits(engine: Engine, ids: Tensor, *pieces: int) -> Tensor:
    """Of all tokens, fed in pieces: the first is the prompt; at last one by one."""
    cache = engine.new_cache(1, len(ids))
    fed = [engine.extend(cache, x, all_logits=True) for x in ids[: sum(pieces)].split(pieces)]
    fed += [engine.decode(cache, token[None]) for token in ids[sum(pieces) :]]
    return torch.cat(fed)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """But for a number on the edge between two codes, which other sums may round to the other."""
    apart = (found - expected).abs()
    assert apart.median() < 1e-4
    assert apart.mean() < 5e-3


def check_arrival(checkpoint: Checkpoint, planned: Callable[[Any], Plan], ids: Tensor) -> None:
    """One by one, in pieces or all at once, the same is predicted; `planned` takes the prefill."""
    for prefill in ("streamed", "dense"):
        engine = Engine.load(checkpoint, plan=planned(prefill))
        expected = logits(engine, ids, 30)
        for pieces in ((30, 1, 40), (30, 66), (30, 2, 33, 31)):
            assert_same(logits(engine, ids, *pieces)[30:], expected[30:])
    # A prompt is read exactly where it is read densely.
    dense = logits(Engine.load(checkpoint), ids, len(ids))
    torch.testing.assert_close(logits(engine, ids, len(ids)), dense, rtol=1e-4, atol=1e-4)


def check_prompt_in_pieces(engine: Engine, ids: Tensor) -> None:
    """And two rows that have read so decode together as one that has read it at once."""
    expected = logits(engine, ids, 70)[70:]
    caches = [engine.new_cache(1, 64) for _ in range(2)]
    for cache in caches:
        for piece in ids[:70].split(30):
            engine.extend(cache, piece, prompt=70)
    found = [engine.decode_rows(caches, [int(token)] * 2) for token in ids[70:]]
    for row in range(2):
        assert_same(torch.stack([x[row] for x in found]), expected)


def check_rows(engine: Engine) -> None:
    """Rows of different lengths in one cache are what each is alone."""
    texts = [random_ids(n) for n in (70, 30)]
    cache = engine.new_cache(2, 70)
    for row, ids in enumerate(texts):
        engine.extend(cache, ids[:-20], row)
    for step in range(20):
        found = engine.decode(cache, torch.stack([ids[step - 20] for ids in texts]))
    for row, ids in enumerate(texts):
        assert_same(found[row], logits(engine, ids, len(ids) - 20)[-1])


def check_crop(engine: Engine, ids: Tensor, stored: int) -> None:
    """A row goes back where it can, and starts over where it cannot."""
    expected = logits(engine, ids, 1)
    went = 0
    for back in range(1, 30):
        cache = engine.new_cache(1, len(ids))
        engine.extend(cache, ids[:stored])
        cache.crop(0, stored - back)
        if start := cache.lengths[0]:
            went += 1
            found = engine.extend(cache, ids[start:], all_logits=True)
            assert_same(found, expected[start:])
    assert went >= 1  # the last token is always let go of


def check_snapshot(engine: Engine, ids: Tensor) -> None:
    """A row that is put back goes on with the same bits, whatever it has read since."""
    cache = engine.new_cache(1, len(ids))
    engine.extend(cache, ids[:40])
    saved = cache.snapshot(0)
    expected = [engine.decode(cache, token[None]) for token in ids[40:80]]
    cache.restore(0, saved)
    engine.extend(cache, random_ids(30))
    cache.restore(0, saved)
    found = [engine.decode(cache, token[None]) for token in ids[40:80]]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def check_bytes(engine: Engine, item: int) -> None:
    """What is allocated is what the plan says, also as a cache grows, and token by token."""
    plan = engine.plan
    assert plan is not None
    for tokens in TOKENS:
        cache = engine.new_cache(1, tokens)
        assert cache.allocated_bytes == plan.cache_bytes(tokens, item)
    cache.reserve([301])
    assert cache.allocated_bytes == plan.cache_bytes(cache.capacity, item)
    slope = plan.cache_bytes(1600, 2) - plan.cache_bytes(1440, 2)
    assert slope == 160 * cache_size(engine).bytes_per_token_bf16
    assert -(-slope // 160) == plan.bytes_per_token(2)
