"""Runs the methods of kvpress on the cases of `cases.py` and writes what they did with them.

python press.py CASES ANSWERS [METHOD ...]

Runs in kvpress' environment with the repository on PYTHONPATH: the divergence is kvtool's own.
"""

import argparse
import json
import platform
import sys
from contextlib import nullcontext
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    BasePress,
    DuoAttentionPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses import duo_attention_press
from pandas import DataFrame
from torch import Tensor
from transformers import AutoModelForCausalLM, BatchEncoding, DynamicCache
from transformers.utils.logging import disable_progress_bar

from kvtool.evaluate.protocol import judge, mean

SCORERS = {
    "StreamingLLM": StreamingLLMPress,
    "SnapKV": SnapKVPress,
    "PyramidKV": PyramidKVPress,
    "ExpectedAttention": ExpectedAttentionPress,
    "TOVA": TOVAPress,
    "KeyDiff": KeyDiffPress,
    "AdaKV + ExpectedAttention": lambda removed: AdaKVPress(ExpectedAttentionPress(removed)),
}
SMALL_SINK, SMALL_WINDOW = 16, 256

# Fed token by token. Masked keys are replaced by one that every query of the call ignores, which is
# searched for and need not exist for many queries; and transformers makes one mask for all layers,
# as wide as the first one's cache, while PyramidKV leaves layers of different lengths.
ONE_BY_ONE = (AdaKVPress, DuoAttentionPress, PyramidKVPress)


class SmallDuoAttentionPress(DuoAttentionPress):
    """DuoAttention whose streaming heads keep fewer tokens than its 128 first and 256 last."""

    def post_init_from_model(self, model: Any) -> None:
        super().post_init_from_model(model)
        self.sink_size, self.recent_size = SMALL_SINK, SMALL_WINDOW


def methods() -> dict[str, BasePress | None]:
    """Every method at every size, the uncompressed model first."""
    found: dict[str, BasePress | None] = {"uncompressed": None}
    for kept in (0.5, 0.25):
        for name, press in SCORERS.items():
            found[f"{name} {kept:.0%}"] = press(1 - kept)
    for name, press, share in (
        ("128+256", DuoAttentionPress, 0.5),
        (f"{SMALL_SINK}+{SMALL_WINDOW}", SmallDuoAttentionPress, 0.5),
        (f"{SMALL_SINK}+{SMALL_WINDOW}", SmallDuoAttentionPress, 0.75),
    ):
        found[f"DuoAttention {share:.0%} of heads {name}"] = press(share, on_the_fly_scoring=True)
    return found


def score_heads(model: Any, texts: list[list[int]]) -> None:
    """DuoAttention's scores of this model, for which no pattern is published.

    They are made from token ids in place of BookSum, and kept by kvpress for every later press.
    """

    def tokenizer(ids: list[int], return_tensors: str) -> BatchEncoding:
        return BatchEncoding({"input_ids": [ids]}, tensor_type=return_tensors)

    table = SimpleNamespace(to_pandas=lambda: DataFrame({"chapter": texts}))
    duo_attention_press.load_dataset = lambda *_, **__: table
    duo_attention_press.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _: tokenizer)
    duo_attention_press.duo_attention_on_the_fly(model)


def prefill(model: Any, press: BasePress | None, ids: list[int]) -> DynamicCache:
    """The cache that a press leaves of a text."""
    cache = DynamicCache()
    with press(model) if press is not None else nullcontext():
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return cache


def feed(
    model: Any, press: BasePress | None, cache: DynamicCache, ids: list[int], start: int
) -> Tensor:
    """Feeds `ids` at positions from `start` on, as a short cache cannot tell: logits [T, V]."""
    logits = []
    for part in torch.tensor(ids).split(1 if isinstance(press, ONE_BY_ONE) else len(ids)):
        positions = torch.arange(start, start + len(part))[None]
        output = model(input_ids=part[None], past_key_values=cache, position_ids=positions)
        logits.append(output.logits[0])
        start += len(part)
    return torch.cat(logits)


def answer(
    model: Any,
    press: BasePress | None,
    cache: DynamicCache,
    question: list[int],
    start: int,
    count: int,
) -> list[int]:
    """Greedy tokens behind a question to a copy of the cache, as `kvtool.evaluate.retrieval`."""
    cache = deepcopy(cache)
    token = int(feed(model, press, cache, question, start)[-1].argmax())
    start += len(question)
    tokens: list[int] = []
    while token != model.generation_config.eos_token_id:
        tokens.append(token)
        if len(tokens) == count:
            break
        token = int(feed(model, press, cache, [token], start)[-1].argmax())
        start += 1
    return tokens


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes that the tensors of a cache hold in memory."""
    tensors = (tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def attended(model: Any, cache: DynamicCache, tokens: int) -> float:
    """Share of a text's keys that a later token can see: those that are there and not masked."""
    seen = 0
    for layer, kept in zip(model.model.layers, cache.layers, strict=True):
        masked = layer.self_attn.masked_key_indices
        seen += kept.keys[..., 0].numel() - (0 if masked is None else len(masked[0]))
    heads = len(cache.layers) * model.config.num_key_value_heads
    return seen / (heads * tokens)


@torch.inference_mode()
def measure(model: Any, presses: dict[str, BasePress | None], cases: dict[str, Any]) -> list[Any]:
    """All methods in turn on every window and every case."""
    rows: dict[str, dict[str, Any]] = {
        name: {"method": name, "seconds": 0.0, "windows": [], "answers": []} for name in presses
    }
    split = cases["settings"]["prefill"]
    full = 0
    for number, window in enumerate(cases["windows"]):
        base = None
        for name, press in presses.items():
            row, start = rows[name], perf_counter()
            cache = prefill(model, press, window[:split])
            row["bytes"], row["kept"] = cache_bytes(cache), attended(model, cache, split)
            logits = feed(model, press, cache, window[split:-1], split)
            row["seconds"] += perf_counter() - start
            if base is None:
                base, full = logits, row["bytes"]
            row["frees_memory"] = row["bytes"] < full
            scores = mean(judge(logits, base, torch.tensor(window[split + 1 :])))
            row["windows"].append((scores.base_nll, scores.nll, scores.kl))
        print(f"window {number + 1} of {len(cases['windows'])}", file=sys.stderr)
    for number, case in enumerate(cases["cases"]):
        length = len(case["context"])
        for name, press in presses.items():
            row, start = rows[name], perf_counter()
            cache = prefill(model, press, case["context"])
            row["answers"].append(
                [
                    answer(model, press, cache, question["ids"], length, cases["answer_tokens"])
                    for question in case["questions"]
                ]
            )
            row["seconds"] += perf_counter() - start
        print(f"case {number + 1} of {len(cases['cases'])}", file=sys.stderr)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("methods", nargs="*", help="names of methods, or how they begin")
    arguments = parser.parse_args()
    disable_progress_bar()
    cases = json.loads(arguments.cases.read_text())
    # Eager attention, the alternative, knows no masked heads.
    model = AutoModelForCausalLM.from_pretrained(
        cases["model"], dtype=torch.float32, attn_implementation="sdpa"
    )
    presses = {
        name: press
        for name, press in methods().items()
        if press is None or name.startswith(tuple(arguments.methods or [""]))
    }
    if any(isinstance(press, DuoAttentionPress) for press in presses.values()):
        score_heads(model, cases["calibration"])
    answers = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvpress", "torch", "transformers")},
        },
        "threads": torch.get_num_threads(),
        "methods": measure(model, presses, cases),
    }
    arguments.answers.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
