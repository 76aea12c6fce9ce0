"""The speed comparison: both sides do the same work, and the floor is what a step must read."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _family_cases import CASES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.errors import UsageError
from kvtool.evaluate import throughput
from kvtool.evaluate.protocol import cache_size
from kvtool.runtime import Engine

CPU = torch.device("cpu")
PROMPTS = [[3, 4, 5, 6], [7, 8, 9, 10]]


def test_both_sides_call_back_once_per_token(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    sides = [
        throughput.engine_generation(Engine.load(checkpoint), PROMPTS, 5),
        throughput.transformers_generation(
            throughput.load_rival(checkpoint, torch.float32, "cpu"), PROMPTS, 5
        ),
    ]
    for runs in throughput.in_turn(sides, 2, CPU):
        assert len(runs) == 2
        for stamps in runs:
            assert len(stamps) == 5
            assert stamps == sorted(stamps)


def test_sides_take_turns() -> None:
    order = []

    def side(name: str) -> throughput.Generation:
        def run(on_token: Callable[[], None]) -> None:
            order.append(name)
            on_token()

        return run

    throughput.in_turn([side("ours"), side("theirs")], 3, CPU)
    assert order == ["ours", "theirs"] * 3


@pytest.mark.parametrize(
    "name", [name for name, (_, more) in CASES.items() if "num_experts_per_tok" in more]
)
def test_a_step_reads_as_many_experts_as_a_token_takes(
    tiny: Callable[..., Path], name: str
) -> None:
    family, more = CASES[name]
    engine = Engine.load(Checkpoint.open(str(tiny(family, **more))))
    named = list(engine.model.named_parameters())
    experts = sum(p.nbytes for n, p in named if ".experts." in n)
    rest = sum(p.nbytes for n, p in named if ".experts." not in n)
    rest -= engine.model.model.embed_tokens.weight.nbytes
    assert experts
    assert throughput.weight_bytes(engine) == rest + experts * 2 // 4


def test_a_window_that_is_not_full_is_not_read_whole(tiny: Callable[..., Path]) -> None:
    engine = Engine.load(Checkpoint.open(str(tiny("mistral", sliding_window=100))))
    store, token = cache_size(engine), 3 * 2 * 2 * 16 * 4
    for tokens in (10, 100, 300):
        found = throughput._cache_bytes(engine, store, tokens)
        assert found == token * min(tokens, 100)


def test_a_slow_start_is_prefill_and_not_decode() -> None:
    def run(on_token: Callable[[], None]) -> None:
        time.sleep(0.05)
        for _ in range(4):
            on_token()

    (runs,) = throughput.in_turn([run], 1, CPU)
    timing = throughput.timing(runs, context=100, batch=1)
    assert timing.prefill_seconds >= 0.05
    assert timing.step_seconds < 0.01


def test_timing_takes_medians_over_repeats_and_counts_the_batch() -> None:
    timing = throughput.timing([[1.0, 1.5, 2.0], [3.0, 3.5, 9.0], [2.0, 2.5, 3.0]], 10, 2)
    assert timing.prefill_seconds == 2.0
    assert timing.prefill_tokens_per_second == 10.0
    assert timing.step_seconds == 0.5
    assert timing.decode_tokens_per_second == 4.0


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_every_weight_but_the_untied_embedding(
    tiny: Callable[..., Path], tied: bool
) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama", tie_word_embeddings=tied)))
    model = checkpoint.load_transformers(torch.float32)
    parameters = sum(p.numel() for p in model.parameters())  # a tied table is listed once
    unread = 0 if tied else model.get_input_embeddings().weight.numel()
    engine = Engine.load(checkpoint, dtype=torch.bfloat16)
    assert throughput.weight_bytes(engine) == 2 * (parameters - unread)


@pytest.mark.parametrize("target", ["transformers", "kvtool"])
def test_a_step_reads_every_matrix_of_a_latent_model_once(
    tiny: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    command = ["convert", str(tiny("llama")), "--to", "mla", "-o", str(tmp_path / "out")]
    options = ["--method", "exact", "--target", target, "--dtype", "float32"]
    assert run_command([*command, *options, "--no-verify", "-q"]) == 0
    engine = Engine.load(Checkpoint.open(str(tmp_path / "out")))
    absorbed = [t for a in engine.attentions for t in (a.absorb_query, a.absorb_value)]
    buffers = [b for name, b in engine.model.named_buffers() if not name.endswith("inv_freq")]
    held = [t for t in [*engine.model.parameters(), *buffers, *absorbed] if t.nbytes]
    sizes = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in held}
    cache = engine.new_cache(1, 4)
    with Reads() as reads:
        engine.decode(cache, torch.tensor([3]))
    assert throughput.weight_bytes(engine) == sum(sizes[p] for p in reads.storages & set(sizes))


class Reads(TorchDispatchMode):
    """Collects the storages that operations read whole: all but a look-up of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.embedding.default:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor):
                    self.storages.add(value.untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def test_bandwidth_is_a_plausible_number() -> None:
    bandwidth = throughput.measure_bandwidth(CPU, nbytes=2**22)
    assert 1e7 < bandwidth.best < 1e13
    assert bandwidth.best == max(bandwidth.matrix_vector, bandwidth.sum)


def test_default_lengths_shrink_to_the_context_and_requested_ones_do_not() -> None:
    assert throughput.fit_contexts(None, 32, 8192) == ([512, 4096, 8000], None)
    lengths, note = throughput.fit_contexts(None, 32, 4200)
    assert lengths == [512, 4096]
    assert note is not None
    assert "4200" in note
    assert throughput.fit_contexts(None, 32, 256)[0] == [224]
    assert throughput.fit_contexts([64], 32, 96) == ([64], None)
    with pytest.raises(UsageError, match=r"64 tokens.*context is 95"):
        throughput.fit_contexts([64], 32, 95)
    with pytest.raises(UsageError, match="at least one"):
        throughput.fit_contexts([0], 32, 95)
    with pytest.raises(UsageError, match="32 new tokens"):
        throughput.fit_contexts(None, 32, 32)


def test_bench_reports_ratio_floor_and_circumstances(
    tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    code = run_command(
        [
            "bench",
            str(tiny("llama")),
            "--context",
            "16,64",
            "--new-tokens",
            "4",
            "--batch",
            "2",
            *["--repeats", "2", "--dense", "--json", "--quiet"],
        ]
    )
    assert code == 0
    result = json.loads(capfd.readouterr().out)
    assert result["environment"]["versions"]["torch"]
    assert result["environment"]["dtype"] == "float32"
    assert [speed["context"] for speed in result["speeds"]] == [16, 64]
    for speed in result["speeds"]:
        assert speed["dense"] is not None
        assert speed["batch"] == 2
        # 3 layers of 2 KV heads of 16 keys and values in fp32, two rows, half of the new tokens
        assert speed["cache_bytes"] == 2 * (speed["context"] + 2) * 3 * 2 * 2 * 16 * 4
        floor = (speed["weight_bytes"] + speed["cache_bytes"]) / max(result["bandwidth"].values())
        assert speed["floor_seconds"] == pytest.approx(floor)
        share = floor / speed["ours"]["step_seconds"]
        assert speed["share_of_floor"] == pytest.approx(share)
        ratio = speed["transformers"]["step_seconds"] / speed["ours"]["step_seconds"]
        assert speed["decode_ratio"] == pytest.approx(ratio)


def test_bench_prints_a_table(tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--new-tokens", "4", "--repeats", "1", "--quiet"]
    assert run_command(["bench", str(tiny("llama")), "--context", "32", *options]) == 0
    out, _ = capfd.readouterr()
    assert "share of" in out
    assert "…" not in out
    assert "GB/s" in out


@pytest.mark.parametrize(
    ("context", "words"), [("600", ["600", "512"]), ("many", ["many", "--context"])]
)
def test_bench_refuses_impossible_lengths(
    tiny: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    context: str,
    words: list[str],
) -> None:
    assert run_command(["bench", str(tiny("llama")), "--context", context]) == 2
    err = capfd.readouterr().err
    assert all(word in err for word in words)
