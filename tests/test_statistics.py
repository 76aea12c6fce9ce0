"""Statistics: what the numbers are, that a killed run leaves the same, and what is reused."""

import dataclasses
import gc
import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from _convert_tools import edited_copy
from _family_cases import EXPERTS, GPT_OSS
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvtool.calibrate import layer_sums, statistics
from kvtool.calibrate.layer_sums import matrix_entropy, pack, unpack
from kvtool.calibrate.statistics import StatisticsOptions, collect, plan
from kvtool.calibrate.statistics_file import Statistics, join
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.cli.calibrate_statistics import statistics as command
from kvtool.corpus import calibration_text
from kvtool.errors import CalibrationError, ResourceError, UsageError
from kvtool.rope import rotate

Tiny = Callable[..., Path]
SMALL = {"tokens": 300, "window": 60, "context": 400}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "statistics"


def measure(model: Path, **options: Any) -> Statistics:
    return collect(Checkpoint.open(str(model)), StatisticsOptions(**{**SMALL, **options}))


# ------------------------------------------------------------------------------- the numbers


class Oracle:
    """The same text through stock transformers in float64, everything written out."""

    def __init__(self, model: Path, **options: Any) -> None:
        asked = StatisticsOptions(**{**SMALL, **options})
        checkpoint = Checkpoint.open(str(model))
        work = statistics._Pass(checkpoint, asked)
        self.starts, self.sinks = work.starts, asked.sinks
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        self.seen: list[dict[str, Tensor]] = []
        for layer in loaded.model.layers:
            self._listen(layer.self_attn)
        positions = self.starts[:, None] + torch.arange(asked.window)
        with torch.inference_mode():
            out = loaded(work.ids, position_ids=positions, output_attentions=True, use_cache=False)
        self.attentions = out.attentions  # [B, Q, T, T] each
        # fp32 as every model has them; the oracle is about sums, not about tables.
        self.cos, self.sin = (t[:, None].double() for t in work.stream.rope.tables(positions))
        self.heads = work.stream.layouts[0].heads
        self.sinked = work.stream.layouts[0].sink_logits

    def _listen(self, attention: Any) -> None:
        seen: dict[str, Tensor] = {}
        self.seen.append(seen)
        parts = {"q": "q_norm", "k": "k_norm", "v": "v_proj"}
        for key, name in parts.items():
            if not hasattr(attention, name):
                name = f"{key}_proj"
            getattr(attention, name).register_forward_hook(
                lambda module, x, y, key=key: seen.update({key: y})
            )
        attention.o_proj.register_forward_hook(
            lambda module, x, y: seen.update({"outputs": x[0], "written": y})
        )
        self.size, self.output = attention.head_dim, attention.o_proj

    def vectors(self, index: int) -> dict[str, Tensor]:
        """Per kind `[G, B, T, W]`."""
        seen = self.seen[index]
        q, k, v = (seen[x].reshape(*seen["v"].shape[:2], -1, self.size) for x in "qkv")
        turned = [rotate(x.transpose(1, 2), self.cos, self.sin) for x in (q, k)]
        return {
            "queries": q.permute(2, 0, 1, 3),
            "rotated_queries": turned[0].transpose(0, 1),
            "joint": torch.cat((k.flatten(2), v.flatten(2)), -1)[None],
            "rotated_keys": turned[1].transpose(1, 2).flatten(2)[None],
            "outputs": seen["outputs"][None],
        }


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within a share of the largest value."""
    expected = expected.reshape(got.shape).to(got.dtype)
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


THREE_LAYERS = {
    **GPT_OSS[1],
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
MODELS = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {"num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 20}),
    ("gpt_oss", THREE_LAYERS),
]


@pytest.fixture(params=MODELS, ids=lambda case: case[0])
def both(request, tiny) -> tuple[Statistics, Oracle]:
    family, overrides = request.param
    model = tiny(family, **overrides)
    return measure(model), Oracle(model)


def test_moments_are_those_of_the_stock_model_in_float64(both):
    measured, oracle = both
    assert len(measured) == 3
    for index in range(3):
        layer, sinks = measured.layer(index), measured.layer(index).sinks
        for kind, x in oracle.vectors(index).items():
            moments = getattr(layer, kind)
            bulk, first = (part.flatten(1, 2) for part in (x[:, :, 4:], x[:, :, :4]))
            assert (moments.tokens, sinks[kind].tokens) == (5 * 56, 5 * 4)
            assert moments.second.dtype == moments.mean.dtype == torch.float64
            close(moments.second, bulk.mT @ bulk)
            close(moments.mean, bulk.mean(dim=1))
            close(moments.peak, bulk.abs().amax(dim=1))
            close(sinks[kind].mean, first.mean(dim=1))
            close(sinks[kind].peak, first.abs().amax(dim=1))
            squeezed = bulk.squeeze(0)
            if squeezed.ndim == 2:
                close(moments.covariance, torch.cov(squeezed.T, correction=0))
        everything = oracle.vectors(index)["joint"].flatten(0, 2)
        close(layer.joint_moment, everything.T @ everything)


def test_sums_are_exact_but_for_float64_rounding():
    x = torch.randn(3, 5000, 8, generator=torch.Generator().manual_seed(0)) + 10
    sums = layer_sums.Sums(3, 8, second=True)
    for part in x.double().split(700, dim=1):
        sums.add(part)
    exact = torch.einsum("gti,gtj->gij", x.double(), x.double())
    assert ((sums.second - exact).abs() / exact.abs()).max() < 1e-13
    in_float32 = (x.mT @ x).double()
    assert ((in_float32 - exact).abs() / exact.abs()).max() > 1e-9  # the test would see it


def test_attention_mass_is_that_of_the_stock_model(both):
    measured, oracle = both
    window, rows = 60, range(60 - 32, 60)
    for index, attention in enumerate(oracle.attentions):
        layer = measured.layer(index)
        by_distance = torch.zeros_like(layer.distance_mass)
        for row in rows:
            for key in range(row + 1):
                distance = row - key
                bucket = 0 if distance == 0 else 1 + int(math.log2(distance))
                where = -1 if key < 4 else bucket
                by_distance[:, where] += attention[:, :, row, key].mean(dim=0) / len(rows)
        close(layer.distance_mass, by_distance)
        left = attention[:, :, rows].sum(dim=-1).mean(dim=(0, 2))  # 1, but for sink logits
        assert oracle.sinked or bool((left - 1).abs().max() < 1e-6)
        close(layer.distance_mass.sum(dim=-1), left)

        groups = attention[:, :, rows].unflatten(1, (len(layer.budget_mass), -1)).mean(dim=(2, 3))
        assert measured.budgets[-1] == window
        for at, budget in enumerate(measured.budgets):
            kept = groups.topk(budget).values.sum(dim=-1).mean(dim=0)
            close(layer.budget_mass[:, at], kept)


def test_tokens_count_in_the_attended_moment_by_what_attention_they_get(both):
    measured, oracle = both
    for index, attention in enumerate(oracle.attentions):
        received = attention[:, :, 4 :: layer_sums.EVERY].mean(dim=(1, 2))  # [B, T]
        x = oracle.vectors(index)["joint"][0]  # [B, T, W]
        expected = torch.einsum("bt,bti,btj->ij", received, x, x) / len(x)
        attended = measured.layer(index).attended
        assert attended.dtype == torch.float64
        assert torch.equal(attended, attended.T)
        close(attended, expected)


def test_what_keys_receive_is_what_queries_behind_the_sinks_give(tiny, monkeypatch):
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, heads, 50, 16, generator=generator) for heads in (4, 2))
    whole = layer_sums.received_mass(q, k, stream.layouts[0], sinks=4)
    close(whole.sum(dim=1), torch.ones(3))
    scores = q.double() @ k.double().repeat_interleave(2, dim=1).mT * stream.layouts[0].scaling
    future = torch.ones(50, 50, dtype=torch.bool).triu(1)
    mass = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    close(whole, mass[:, :, 4 :: layer_sums.EVERY].mean(dim=(1, 2)))
    monkeypatch.setattr(layer_sums, "_ROWS", 7)  # not all queries at once
    close(layer_sums.received_mass(q, k, stream.layouts[0], sinks=4), whole, 1e-6)


@pytest.mark.parametrize(("family", "more"), [("qwen2", {}), ("gpt_oss", THREE_LAYERS)])
def test_eviction_error_is_the_change_of_the_modules_output(tiny, family, more):
    model = tiny(family, **more)
    measured, oracle = measure(model), Oracle(model)
    for index, attention in enumerate(oracle.attentions):
        values = oracle.seen[index]["v"].unflatten(-1, (-1, 16)).transpose(1, 2)
        values = values.repeat_interleave(2, dim=1)  # [B, Q, T, D]
        checkpoint, name = Checkpoint.open(str(model)), f"model.layers.{index}.self_attn.o_proj."
        weight, bias = checkpoint.read(name + "weight").double(), 0
        if name + "bias" in checkpoint.tensors:
            bias = checkpoint.read(name + "bias").double()
        errors = []
        for window in range(len(values)):
            top = attention[window][:, -32:].mean(dim=(0, 1)).topk(32).indices
            for row in range(28, 60):
                kept = torch.zeros(60, dtype=torch.bool)
                kept[top] = True
                kept[max(0, row - 7) : row + 1] = True
                few = attention[window][:, row] * kept
                held = 1 - attention[window][:, row].sum(dim=-1, keepdim=True)  # by sink logits
                few = few / (few.sum(dim=-1, keepdim=True) + held)
                context = torch.einsum("qt,qtd->qd", few, values[window]).flatten()
                full = oracle.seen[index]["written"][window, row]
                errors.append((weight @ context + bias - full).norm() / (full.norm() + 1e-5))
        assert measured.layer(index).eviction_error == pytest.approx(
            float(torch.stack(errors).mean()), rel=1e-4
        )


def test_attention_that_is_all_at_one_place_leaves_numbers(tiny, tmp_path):
    def sharpen(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "q_proj" in name:
                tensor.mul_(1e4)

    model = edited_copy(tiny("llama"), tmp_path / "sharp", sharpen)
    measured = measure(model, window=256)
    for index in range(len(measured)):
        layer = measured.layer(index)
        assert 0 < layer.eviction_error < 2
        assert bool(layer.reach.isfinite().all())
    only_sinks = torch.tensor([[0.0, 0, 0, 1]], dtype=torch.float64)
    assert dataclasses.replace(layer, distance_mass=only_sinks).reach.tolist() == [0]


def test_query_entropy_is_that_of_the_published_code(tiny):
    model = tiny("llama")
    measured, oracle = measure(model), Oracle(model)
    x = oracle.vectors(1)["rotated_queries"][:, :, 4:]  # [Q, B, T, D]
    x = x - x.mean(dim=2, keepdim=True)
    x = x / x.norm(dim=-1, keepdim=True)
    a = x.mT @ x / x.shape[2]
    sigma = torch.linalg.svdvals(a / a.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])[..., :4]
    expected = -(sigma * sigma.log()).sum(dim=-1) / math.log(16)
    close(measured.layer(1).query_entropy, expected.mean(dim=1))


def test_entropy_grows_with_the_directions_that_queries_use():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 16, dtype=torch.float64, generator=generator)
    narrow, wide = x.clone(), x
    narrow[:, 2:] = 0
    assert 0 < matrix_entropy(narrow) < matrix_entropy(wide) < 1
    assert matrix_entropy(torch.zeros(5, 16, dtype=torch.float64)) == 0


@pytest.mark.parametrize("sinks", [0, 1])
def test_other_numbers_of_sinks(tiny, sinks):
    layer = measure(tiny("llama"), sinks=sinks).layer(0)
    assert layer.queries.tokens == 300 - 5 * sinks
    assert layer.sinks["queries"].tokens == 5 * sinks
    close(layer.joint_moment, measure(tiny("llama")).layer(0).joint_moment)


# ------------------------------------------------------------------------------------ positions


def test_windows_at_the_start_go_through_the_exact_attention_bit_by_bit(tiny):
    model = tiny("qwen3")
    work = statistics._Pass(Checkpoint.open(str(model)), StatisticsOptions(tokens=300, window=60))
    assert work.starts.any()
    layer, hidden = work.stream.layer(1), torch.randn(5, 60, 64)
    with torch.inference_mode():
        expected = work.stream.exact_attention(layer)(hidden)
        at_zero = torch.zeros_like(work.starts)
        assert torch.equal(layer_sums.watched(work.stream, layer, at_zero, [])(hidden), expected)
        moved = layer_sums.watched(work.stream, layer, work.starts, [])(hidden)
    # Attention sees differences of positions only.
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=1e-3)


def test_a_context_as_long_as_the_window_moves_nothing(tiny):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    fixed = statistics._Pass(checkpoint, StatisticsOptions(tokens=300, window=60, context=60))
    assert not fixed.starts.any()
    moved = statistics._Pass(checkpoint, StatisticsOptions(tokens=6000, window=60, context=70))
    assert set(moved.starts.tolist()) == set(range(11))


def test_moving_changes_rotated_keys_and_nothing_else(tiny):
    fixed, moved = (measure(tiny("llama"), context=c).layer(1) for c in (60, 500))
    for kind in ("queries", "joint", "outputs"):
        close(getattr(moved, kind).second, getattr(fixed, kind).second, 1e-4)
    close(moved.distance_mass, fixed.distance_mass, 1e-4)
    ratio = (moved.rotated_keys.second - fixed.rotated_keys.second).norm()
    assert ratio > 0.05 * fixed.rotated_keys.second.norm()


# ------------------------------------------------------------------------- killed, and reused


class Killed(BaseException):
    """As a signal would end it."""


def kill_at(monkeypatch, point: str) -> Callable[[str, int, int], None]:
    """Makes a run end at a point; returns what to report progress to."""

    def report(stage: str, done: int, total: int) -> None:
        if point == "between" and done == 2:
            raise Killed

    if point == "within":  # a layer has changed some of the states
        add = layer_sums.LayerSums.add

        def second_layer(sums, layer, seen):
            add(sums, layer, seen)
            if layer.index == 1:
                raise Killed

        monkeypatch.setattr(layer_sums.LayerSums, "add", second_layer)
    if point in ("torn", "unsaved"):  # while, and before, a finished layer is saved

        def save(tensors, file, *rest):
            if file.name.startswith("layer-00001"):
                if point == "torn":
                    file.write_bytes(b"half a file")
                raise Killed
            save_file(tensors, file, *rest)

        monkeypatch.setattr(statistics, "save_file", save)
    if point == "joined":

        def half(files, target, metadata):
            target.write_bytes(b"half a file")
            raise Killed

        monkeypatch.setattr(statistics, "join", half)
    return report


@pytest.mark.parametrize("point", ["between", "within", "torn", "unsaved", "joined"])
def test_a_killed_run_ends_with_the_same_bits(tiny, monkeypatch, home, point):
    model = tiny("llama")
    checkpoint, options = Checkpoint.open(str(model)), StatisticsOptions(**SMALL)
    with monkeypatch.context() as patched:
        report = kill_at(patched, point)
        with pytest.raises(Killed):
            collect(checkpoint, options, report)
    assert not plan(checkpoint, options)["reused"]
    steps: list[int] = []
    resumed = collect(checkpoint, options, lambda stage, done, total: steps.append(done))
    assert steps[0] == {"between": 2, "joined": 3}.get(point, 1)
    assert {file.name for file in resumed.path.parent.iterdir()} == {
        "statistics.safetensors",
        "lock",
    }
    whole = resumed.path.read_bytes()
    assert collect(checkpoint, options, resume=False).path.read_bytes() == whole


def test_what_is_there_is_not_measured_again(tiny, monkeypatch):
    first = measure(tiny("llama"))
    monkeypatch.setattr(statistics._Pass, "run", lambda *_: pytest.fail("measured again"))
    assert measure(tiny("llama")).path == first.path
    assert measure(tiny("llama"), tokens=359).path == first.path  # the same five windows


def test_another_text_model_or_option_is_measured_by_itself(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of another text." for i in range(200)))
    changes = [{"seed": 1}, {"window": 50}, {"context": 399}, {"sinks": 3}, {"chat": 0.5}]
    changes.append({"data": str(text)})
    found = [measure(tiny("llama"), **change).path for change in [{}, *changes]]
    found.append(measure(tiny("llama", rms_norm_eps=1e-5)).path)
    assert len(set(found)) == len(found)


def test_a_changed_weight_is_noticed_even_where_the_fingerprint_does_not_look(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda _: "the same")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1

    first = measure(edited_copy(tiny("llama"), tmp_path / "a", lambda tensors: None))
    assert measure(edited_copy(tiny("llama"), tmp_path / "b", change)).path != first.path


def test_the_same_text_elsewhere_is_the_same_text(tiny, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        text = "\n\n".join(f"Paragraph {i} of another text." for i in range(200))
        (tmp_path / folder / "text.txt").write_text(text)
    a, b = (measure(tiny("llama"), data=str(tmp_path / f / "text.txt")) for f in ("a", "b"))
    assert a.path == b.path


def test_a_disk_that_is_too_small_is_noticed_before_work_starts(tiny, monkeypatch):
    free = dataclasses.make_dataclass("usage", ["free"])
    monkeypatch.setattr(statistics.shutil, "disk_usage", lambda _: free(1000))
    monkeypatch.setattr(LayerStream, "layer", lambda *_: pytest.fail("work started"))
    with pytest.raises(ResourceError, match=r"needs 0\.\d\d MB of disk"):
        measure(tiny("llama"))


# --------------------------------------------------------------------------------------- files


def test_packed_moments_are_unpacked_to_the_same():
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    for second in (x.mT @ x, x[0].T @ x[0], x[:1, :, :1].mT @ x[:1, :, :1]):
        second = (second + second.mT) / 2
        assert torch.equal(unpack(pack(second)), second)
    assert unpack(pack(torch.eye(576))).shape == (576, 576)


def test_joined_files_hold_the_tensors_of_all(tmp_path):
    parts = {
        f"{name}.": {"a": torch.randn(3), "b": torch.randn(2, 5, dtype=torch.float64)}
        for name in "xyz"
    }
    for name, tensors in parts.items():
        save_file(tensors, tmp_path / f"{name}st", {"left": "behind"})
    join({name: tmp_path / f"{name}st" for name in parts}, tmp_path / "all", {"who": "we"})
    joined = load_file(tmp_path / "all")
    assert len(joined) == 6
    for name, tensors in parts.items():
        for key, tensor in tensors.items():
            assert torch.equal(joined[name + key], tensor)


def test_a_copy_is_read_wherever_it_lies(tiny, tmp_path):
    measured = measure(tiny("llama"))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(measured.path.read_bytes())
    opened = Statistics.open(str(copy))
    assert opened.fingerprint == Checkpoint.open(str(tiny("llama"))).fingerprint()
    assert (len(opened), opened.tokens) == (3, 300)
    assert torch.equal(opened.layer(2).outputs.second, measured.layer(2).outputs.second)
    assert {key.split(".")[0] for key in load_file(copy)} == {"layers"}


def test_a_file_that_is_not_statistics_is_refused(tiny, tmp_path):
    file = tmp_path / "file"
    with pytest.raises(UsageError, match="no statistics at"):
        Statistics.open(file)
    file.write_bytes(measure(tiny("llama")).path.read_bytes()[:5000])
    with pytest.raises(CalibrationError, match="damaged"):
        Statistics.open(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(CalibrationError, match="does not hold statistics"):
        Statistics.open(file)
    save_file({"a": torch.ones(1)}, file, {"kvtool": json.dumps({"statistics": 99})})
    with pytest.raises(CalibrationError, match="format 99"):
        Statistics.open(file)


def test_predicted_sizes_are_the_real_ones(tiny, home):
    checkpoint, options = Checkpoint.open(str(tiny("llama"))), StatisticsOptions(**SMALL)
    planned = plan(checkpoint, options)
    assert not home.exists()
    measured = collect(checkpoint, options)
    assert planned["file"] == str(measured.path)
    header = int.from_bytes(measured.path.read_bytes()[:8], "little")
    assert abs(measured.path.stat().st_size - header - planned["bytes"]) < 3 * 2000


class Held(TorchDispatchMode):
    """Looks at every operation for the storages that are in use.

    Attributes:
        most: Bytes of those that were in use together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most, self.storages = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and not x.is_meta:
                storage = x.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {i: x for i, x in self.storages.items() if not x[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return out


def test_the_memory_in_which_experts_are_put_together_is_foreseen(tiny):
    wide = {**EXPERTS, "intermediate_size": 512, "dtype": "bfloat16"}
    stream = LayerStream(Checkpoint.open(str(tiny("mixtral", **wide))))
    with Held() as held:
        stream.layer(0)
    assert held.most <= statistics.layer_memory(stream) < 1.2 * held.most
    assert held.most < statistics.memory_bytes(stream, tokens=1)


# -------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 500}, "--window 500 is longer than the context of 400"),
        ({"context": 513}, "--context 513 is more than the 512 positions"),
        ({"window": 513, "context": None}, "--window 513 is more than the 512 positions"),
        ({"sinks": 60}, "--sinks 60 leaves nothing of a window of 60"),
        ({"chat": 1.5}, "--chat-share 1.5 is not a share between 0 and 1"),
        ({"chat": float("nan")}, "--chat-share nan is not a share"),
        ({"tokens": 59}, "--tokens 59 is less than one window of 60"),
        ({"tokens": 10**7}, "fewer than the"),
    ],
)
def test_an_impossible_option_is_refused_before_any_work(tiny, home, options, message):
    with pytest.raises(UsageError, match=message):
        measure(tiny("llama"), **options)
    assert not home.exists()


def test_defaults_fit_the_model(tiny):
    checkpoint = Checkpoint.open(str(tiny("llama")))
    used = plan(checkpoint)
    assert (used["window"], used["context"], used["sinks"]) == (512, 512, 4)
    assert (used["tokens"], used["chat"]) == (16384, 0.25)
    windows = calibration_text().windows(checkpoint.tokenizer(), 512, 32, chat=0.25)
    assert torch.equal(statistics._Pass(checkpoint, StatisticsOptions()).ids, windows)


def test_without_a_chat_template_any_share_of_conversations_is_none(tiny, tmp_path):
    model = edited_copy(tiny("llama"), tmp_path / "model", lambda tensors: None)
    assert measure(model).metadata["options"]["chat"] == 0.25
    (model / "chat_template.jinja").unlink()
    measured = measure(model)
    assert measured.metadata["options"]["chat"] == 0
    assert measure(model, chat=0.0).path == measured.path
    assert "in conversations none" in " ".join(call(model, "--dry-run").stdout.split())


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_values_that_are_not_finite_are_named_by_layer(tiny, tmp_path, part):
    def spoil(tensors):
        tensors[f"model.layers.1.{part}.weight"][3, 5] = float("nan")

    model = edited_copy(tiny("llama"), tmp_path / "model", spoil)
    with pytest.raises(CalibrationError, match="layer 1 produces values that are not finite"):
        measure(model)
    assert not plan(Checkpoint.open(str(model)), StatisticsOptions(**SMALL))["reused"]


def test_a_home_that_cannot_be_written_is_said(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot be written") as caught:
        measure(tiny("llama"))
    assert "KVTOOL_HOME" in (caught.value.hint or "")


# ------------------------------------------------------------------------------ command line


def call(*arguments: str | Path) -> Any:
    app = typer.Typer()
    app.command()(command)
    flags = ["--tokens", "300", "--window", "60"]
    return CliRunner().invoke(app, [*map(str, arguments), *flags])


def test_the_command_says_what_it_left_and_where(tiny, tmp_path):
    output = tmp_path / "out.safetensors"
    first = json.loads(call(tiny("llama"), "--json", "-q", "-o", output).stdout)
    assert first["file"] == str(output)
    assert (first["tokens"], first["window"], first["context"]) == (300, 60, 512)
    assert first["chat"] == 0.25
    assert first["bytes"] == os.path.getsize(output)  # noqa: PTH202
    assert first["seconds"] > 0
    assert first["peak_memory_bytes"] > 10**8
    assert not first["reused"]
    assert len(Statistics.open(output)) == 3
    second = json.loads(call(tiny("llama"), "--json", "-q").stdout)
    assert second["reused"]
    assert Path(second["file"]).read_bytes() == output.read_bytes()
    assert not json.loads(call(tiny("llama"), "--json", "-q", "--no-resume").stdout)["reused"]


def test_a_dry_run_writes_nothing(tiny, home):
    shown = call(tiny("llama"), "--dry-run", "--chat-share", "0.4").stdout
    assert "300 tokens: 5 windows of 60" in shown
    assert "in conversations 40%" in " ".join(shown.split())
    assert "memory needed" in shown
    assert not home.exists()


def test_an_output_in_the_way_is_kept(tiny, tmp_path, home):
    output = tmp_path / "out"
    output.write_text("mine")
    assert isinstance(call(tiny("llama"), "-o", output).exception, UsageError)
    assert output.read_text() == "mine"
    assert not home.exists()
    call(tiny("llama"), "-o", output, "--overwrite")
    assert len(Statistics.open(output)) == 3
    for wrong in (tmp_path, tmp_path / "no" / "file", tiny("llama") / "statistics.safetensors"):
        assert isinstance(call(tiny("llama"), "-o", wrong).exception, UsageError)


def test_nothing_of_a_layer_outlives_its_use(tiny: Callable[..., Path]) -> None:
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    hidden = stream.embed(torch.arange(20)[None])
    gc.collect()
    gc.disable()  # what needs the collector to go away is still in memory when the next layer comes
    try:
        layer = stream.layer(0)
        weights = weakref.ref(layer.attention.qkv.weight)
        layer.run(hidden, stream.exact_attention(layer))
        del layer
        assert weights() is None
    finally:
        gc.enable()
