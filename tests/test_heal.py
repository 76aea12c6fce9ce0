"""Healing: where it starts, what it changes, and that stopping it changes nothing."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from _convert_tools import (
    MANIFEST,
    PROJECTIONS,
    YARN,
    convert,
    digests,
    edit_json,
    logits,
    mean_kl,
    one_thread,
    plan,
    random_ids,
    stock,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor

from kvtool import distill
from kvtool.calibrate import lessons as lessons_of
from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.convert import aware, conversion, gqa, heal, planning
from kvtool.convert.exact import exact_factors
from kvtool.convert.fitting import ConvertedLayer, converted_attention, converted_stages
from kvtool.convert.heal import ConvertedStudent
from kvtool.convert.verify import verify
from kvtool.distill import LOG, STATE, Amount, Training, train
from kvtool.errors import CalibrationError, UsageError

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3")},
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "bias-everywhere": ("llama", {"attention_bias": True}),
}
CLOSE = {"kv_budget": "50%", "target": "kvtool"}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short windows of text, few of them, all in float32, and a state at every second step."""
    monkeypatch.setattr(heal, "WINDOW", 64)
    monkeypatch.setattr(heal, "BATCH", 2)
    monkeypatch.setattr(lessons_of, "RECALL", 0.0)  # recall tasks are longer than these windows
    monkeypatch.setattr(lessons_of, "_HAYSTACK", 20_000)
    monkeypatch.setattr(heal, "fast_bfloat16", lambda _: False)
    monkeypatch.setattr(heal, "Training", partial(Training, save_every=2))


def checkpoint_of(model: Path) -> Checkpoint:
    return Checkpoint.open(str(model))


def fitted(model: Path, rank: int = 10, rope_dim: int = 8) -> list[ConvertedLayer]:
    """The layers as `aware` fits them, their output projections scaled to be told from the own."""
    checkpoint = checkpoint_of(model)
    stream = LayerStream(checkpoint)
    measured = collect(checkpoint, StatisticsOptions(tokens=512, window=128, context=128))
    layers = []
    for index, layout in enumerate(stream.layouts):
        components = aware.rope_components(measured.layer(index), layout, stream.rope)
        kept = aware.most_damaging(components.damage, rope_dim // 2)
        basis = aware.basis_of(components, kept)
        output = stream.layer(index).attention.o_proj.weight
        factors = aware.latent_factors(measured.layer(index), basis, output, stream.rope, rank)
        layers.append(ConvertedLayer(factors, {"o_proj.weight": 0.9 * output}))
    return layers


def student_of(model: Path, layers: list[ConvertedLayer]) -> ConvertedStudent:
    checkpoint = checkpoint_of(model)
    loaded = checkpoint.load_transformers(torch.float32)
    return ConvertedStudent(loaded, layers, LayerStream(checkpoint).rope)


def healed(model: Path, folder: Path, amount: Amount, **options: Any) -> list[ConvertedLayer]:
    """Heals the fitted layers of a model."""
    folder.mkdir(exist_ok=True)
    layers = options.pop("layers", None) or fitted(model)
    checkpoint = checkpoint_of(model)
    given = {"data": None, "teacher": None, "device": "cpu", "seed": 0}
    given["report"] = lambda stage, done, total: None
    rope = LayerStream(checkpoint).rope
    return heal.heal(checkpoint, layers, rope, amount, folder, **(given | options))


@torch.no_grad()
def divergence(student: ConvertedStudent, ids: Tensor) -> float:
    return float(student(ids)[0])


def steps(count: int) -> Amount:
    return Amount(tokens=count * heal.BATCH * heal.WINDOW)


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def tensors_of(layer: ConvertedLayer) -> dict[str, Tensor]:
    return {**(vars(layer.factors) if layer.factors else {}), **layer.weights}


def same_bits(ours: list[ConvertedLayer], theirs: list[ConvertedLayer]) -> bool:
    return all(
        tensors_of(a).keys() == tensors_of(b).keys()
        and all(torch.equal(t, tensors_of(b)[name]) for name, t in tensors_of(a).items())
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def model(request, tiny) -> Path:
    """A checkpoint of every layout."""
    family, overrides = request.param
    return tiny(family, **overrides)


@pytest.fixture
def llama(tiny) -> Path:
    return tiny("llama")


MERGED = {name: FAMILIES[name] for name in ("llama", "qwen2", "mha", "yarn", "bias-everywhere")}


def merged(model: Path) -> list[ConvertedLayer]:
    """The layers with one KV head each."""
    checkpoint = checkpoint_of(model)
    stream = LayerStream(checkpoint)
    measured = collect(checkpoint, StatisticsOptions(tokens=512, window=128, context=128))
    layers = []
    for index, layout in enumerate(stream.layouts):
        own = stream.layer(index).attention
        found = gqa.merge(measured.layer(index), layout, own.o_proj.weight, 1)
        layers.append(ConvertedLayer(None, gqa.fold(own, found)))
    return layers


# -------------------------------------------------------------------------------- the first step


def test_healing_starts_at_the_divergence_of_the_fitted_layers(model):
    layers, ids = fitted(model), random_ids(96).view(2, 48)
    stream = LayerStream(checkpoint_of(model))
    states = stream.embed(ids)
    for index, converted in enumerate(layers):
        layer = stream.layer(index)
        layer.run(states, converted_attention(layer, converted, stream.rope))
    original = stock(model)
    expected = [
        mean_kl(logits(original, w), stream.logits(s)) for w, s in zip(ids, states, strict=True)
    ]
    loss = divergence(student_of(model, layers), ids)
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert loss > 0.01


@pytest.mark.parametrize(("family", "overrides"), MERGED.values(), ids=MERGED)
def test_healing_of_merged_heads_starts_where_they_are(tiny, family, overrides):
    model, ids = tiny(family, **overrides), random_ids(96).view(2, 48)
    layers, stream = merged(model), LayerStream(checkpoint_of(model))
    states = stream.embed(ids)
    for index, converted in enumerate(layers):
        layer = stream.layer(index)
        layer.run(states, converted_attention(layer, converted, stream.rope))
    original = stock(model)
    expected = [
        mean_kl(logits(original, w), stream.logits(s)) for w, s in zip(ids, states, strict=True)
    ]
    student = student_of(model, layers)
    assert divergence(student, ids) == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert same_bits(student.converted(), layers)
    student(ids)[0].backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in student.named_parameters() if p.requires_grad}
    parts = {"qkv.weight", "o_proj.weight"}
    parts |= {"qkv.bias"} if stream.layouts[0].qkv_bias else set()
    parts |= {"o_proj.bias"} if stream.layouts[0].output_bias else set()
    prefix = "model.model.layers.{}.self_attn.converted.gqa."
    assert trained == {prefix.format(i) + part for i in range(3) for part in parts}


def test_exact_factors_have_nothing_to_learn_from_the_stock_model(model):
    stream = LayerStream(checkpoint_of(model))
    layers = [ConvertedLayer(exact_factors(layout, stream.rope)) for layout in stream.layouts]
    student, ids = student_of(model, layers), random_ids(96).view(2, 48)
    assert abs(divergence(student, ids)) < 1e-6
    with torch.inference_mode():
        told = student.model.lm_head(student.hidden(ids, True))
    expected = torch.stack([logits(stock(model), window) for window in ids])
    torch.testing.assert_close(told, expected, atol=1e-3, rtol=1e-3)


def test_layers_that_were_not_trained_come_back_as_they_were(model):
    layers = fitted(model)
    for before, after in zip(layers, student_of(model, layers).converted(), strict=True):
        for name, tensor in tensors_of(before).items():
            got = tensors_of(after)[name]
            assert torch.equal(got.float(), tensor.float()), name


# ------------------------------------------------------------------------------- what it trains


def test_attention_is_trained_and_nothing_else(model):
    student = student_of(model, fitted(model))
    student(random_ids(96).view(2, 48))[0].backward()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in student.named_parameters() if p.grad is not None}
    parts = ("down", "rope", "rope_query", "key_up", "value_up")
    parts += tuple(f"gqa.{name}.weight" for name in ("qkv", "o_proj"))
    for index in range(3):
        prefix = f"model.model.layers.{index}.self_attn.converted."
        names = {name.removeprefix(prefix) for name in trained if name.startswith(prefix)}
        assert {name for name in names if not name.endswith("bias")} == set(parts)
        biases = weights(model).keys()
        expected = (
            {"gqa.qkv.bias"} if f"model.layers.{index}.self_attn.k_proj.bias" in biases else set()
        )
        if f"model.layers.{index}.self_attn.o_proj.bias" in biases:
            expected |= {"gqa.o_proj.bias"}
        assert {name for name in names if name.endswith("bias")} == expected
    assert all(".self_attn.converted." in name for name in trained)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name


def test_every_parameter_moves_by_a_share_of_its_own_size(llama):
    student = student_of(llama, fitted(llama))
    rates = student.rates()
    parameters = dict(student.named_parameters())
    trained = [name for name, p in parameters.items() if p.requires_grad]
    before = {name: parameters[name].detach().clone() for name in trained}
    for name in trained:
        assert rates[name] == pytest.approx(float(before[name].square().mean().sqrt()), rel=1e-5)
    optimizer_steps = Training(1, 0.01, warmup=0, cooldown=0)
    train(student, lambda _: random_ids(96).view(2, 48), optimizer_steps, None)
    for name in trained:
        moved = (parameters[name].detach() - before[name]).abs().median()
        assert float(moved) == pytest.approx(0.01 * rates[name], rel=0.02), name


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "tied"])
def test_the_divergence_falls_and_shared_weights_stay(tiny, tmp_path, monkeypatch, name):
    model = tiny(FAMILIES[name][0], **FAMILIES[name][1])
    students: list[ConvertedStudent] = []
    converted = ConvertedStudent.converted
    monkeypatch.setattr(ConvertedStudent, "converted", lambda s: students.append(s) or converted(s))
    before, one = fitted(model), lessons_of.lessons(checkpoint_of(model), None, 2, 64, 0)
    monkeypatch.setattr(heal, "lessons", lambda *_: one.repeat(8, 1))  # the same at every step
    after = healed(model, tmp_path, steps(8), layers=before)
    losses = [record["loss"] for record in logged(tmp_path)]
    assert len(losses) == 8
    assert losses[-1] < 0.95 * losses[0]
    assert divergence(student_of(model, after), one) < 0.95 * losses[0]
    assert not same_bits(before, after)
    own = weights(model)
    kept = {
        name: t for name, t in students[0].model.state_dict().items() if "self_attn" not in name
    }
    assert kept
    assert all(torch.equal(t, own.get(name, t)) for name, t in kept.items())
    for index in range(3):  # the teacher is still the original
        teacher = students[0].attentions[index].original.gqa
        for name, rows in zip(PROJECTIONS, teacher.qkv.weight.split(teacher.sizes), strict=True):
            assert torch.equal(rows, own[f"model.layers.{index}.self_attn.{name}.weight"])
        assert torch.equal(
            teacher.o_proj.weight, own[f"model.layers.{index}.self_attn.o_proj.weight"]
        )


# ---------------------------------------------------------------------------------- its lessons


def test_lessons_are_text_with_every_fourth_window_a_recall_task(llama, monkeypatch):
    monkeypatch.setattr(lessons_of, "RECALL", 0.25)
    checkpoint = checkpoint_of(llama)
    windows = lessons_of.lessons(checkpoint, None, 8, 512, 0)
    tokenizer = checkpoint.tokenizer()
    texts = tokenizer.batch_decode(windows)
    assert windows.shape == (8, 512)
    recalled = ["The code of" in text or "passkey" in text for text in texts]
    assert recalled == [False, False, False, True] * 2
    assert torch.equal(lessons_of.lessons(checkpoint, None, 8, 512, 0), windows)
    assert not torch.equal(lessons_of.lessons(checkpoint, None, 8, 512, 1), windows)


def test_text_that_is_too_short_is_read_again(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} of another text." for i in range(500)))
    windows = lessons_of.lessons(checkpoint_of(llama), str(text), 40, 512, 0)
    assert windows.shape == (40, 512)
    assert 1 < len({tuple(window.tolist()) for window in windows}) < 40


# ----------------------------------------------------------------------------------------- amount


@pytest.mark.parametrize(
    ("text", "tokens", "seconds"),
    [
        ("200k", 200_000, None),
        ("1.5M", 1_500_000, None),
        ("40000", 40_000, None),
        (" 8K ", 8000, None),
        ("20min", None, 1200),
        ("2h", None, 7200),
        ("0.5 H", None, 1800),
        ("auto", heal.AUTO, None),
    ],
)
def test_an_amount_is_tokens_or_a_time(text, tokens, seconds):
    assert Amount.parse(text, "--heal", heal.AUTO) == Amount(tokens, seconds)


@pytest.mark.parametrize("text", ["", "k", "much", "-5", "0", "0h", "nan", "inf", "1e999", "2hk"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match=f"--heal {text} is neither"):
        Amount.parse(text, "--heal", heal.AUTO)


def test_tokens_are_divided_into_steps(llama, tmp_path):
    healed(llama, tmp_path / "a", Amount(tokens=4 * 64))
    assert len(logged(tmp_path / "a")) == 2
    healed(llama, tmp_path / "b", Amount(tokens=1))
    assert len(logged(tmp_path / "b")) == 1


def test_a_time_becomes_steps_once(llama, tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0])  # the second step takes 2 seconds
    with monkeypatch.context() as patched:
        patched.setattr(distill.time, "perf_counter", lambda: next(clock, 12.0))
        healed(llama, tmp_path, Amount(seconds=7))
    assert len(logged(tmp_path)) == 3
    with monkeypatch.context() as patched:
        patched.setattr(
            ConvertedStudent, "forward", lambda *_: pytest.fail("measured or trained again")
        )
        healed(llama, tmp_path, Amount(seconds=7))
    assert len(logged(tmp_path)) == 3


# ----------------------------------------------------------------------------------------- killed


def stopping_at(step: int) -> Callable[[str, int, int], None]:
    def report(stage: str, done: int, total: int) -> None:
        if stage == "healing" and done == step:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_killed_healing_goes_on_to_the_same_bits(llama, tmp_path, step):
    told: list[int] = []
    whole = healed(llama, tmp_path / "whole", steps(5))
    with pytest.raises(KeyboardInterrupt):
        healed(llama, tmp_path / "half", steps(5), report=stopping_at(step))
    resumed = healed(
        llama, tmp_path / "half", steps(5), report=lambda _, done, __: told.append(done)
    )
    assert told[0] == {0: 0, 1: 0, 3: 2, 5: 5}[step]
    assert same_bits(resumed, whole)
    states = [load_file(tmp_path / part / STATE) for part in ("whole", "half")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())


def test_a_killed_conversion_with_healing_ends_with_the_same_bytes(llama, tmp_path, monkeypatch):
    options = {**CLOSE, "heal": "600"}  # 4 steps
    convert(llama, tmp_path / "whole", **options)
    assert len((tmp_path / "whole" / "kvtool" / "healing.jsonl").read_text().splitlines()) == 4
    save = ConvertedLayer.save

    def first_healed(layer: ConvertedLayer, file: Path) -> None:
        if file.name.startswith("healed-00001"):
            raise KeyboardInterrupt
        save(layer, file)

    for point in ("healing", "converting", "saving"):
        output = tmp_path / point

        def report(stage: str, done: int, total: int, point: str = point) -> None:
            if (stage, done) == (point, 2):
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            if point == "saving":  # some of the healed layers are there
                patched.setattr(ConvertedLayer, "save", first_healed)
            with pytest.raises(KeyboardInterrupt):
                convert(llama, output, report=report, **options)
        assert not output.exists()
        convert(llama, output, **options)
        assert digests(output) == digests(tmp_path / "whole"), point


# ------------------------------------------------------------------------------------- conversion

VERIFIED = {
    "llama-bfloat16": ("llama", "transformers", {"dtype": "bfloat16"}, {}),
    "qwen2": ("qwen2", "transformers", {}, {}),
    "bias-everywhere": ("llama", "transformers", {"attention_bias": True}, {}),
    "vllm": ("llama", "vllm", {}, {}),
    "transmla": ("llama", "transformers", {}, {"method": "transmla", "freqfold": "2"}),
    "qwen3-kvtool": ("qwen3", "kvtool", {}, {}),
    "yarn-kvtool": ("llama", "kvtool", {"rope_parameters": YARN}, {}),
}


@pytest.mark.parametrize(
    ("family", "target", "overrides", "options"), VERIFIED.values(), ids=VERIFIED.keys()
)
def test_a_healed_checkpoint_verifies(tiny, tmp_path, family, target, overrides, options):
    model, output = tiny(family, **overrides), tmp_path / "out"
    convert(model, output, kv_budget="50%", target=target, heal="512", **options)
    report = verify(output, checkpoint_of(model))
    assert report.passed, report.checks
    manifest = json.loads((output / MANIFEST).read_text())
    assert manifest["replaced"] == [*PROJECTIONS, "rotary_emb", "o_proj"]
    before, after = weights(model), weights(output)
    for name, tensor in before.items():
        projection = any(f".{part}." in name for part in (*PROJECTIONS, "o_proj"))
        if not projection:
            assert torch.equal(after[name], tensor), name
        elif name in after and name.endswith("weight"):
            assert after[name].shape != tensor.shape or not torch.equal(after[name], tensor), name


@pytest.mark.parametrize(("family", "overrides"), MERGED.values(), ids=MERGED)
def test_merged_heads_are_healed_and_verify(tiny, tmp_path, monkeypatch, family, overrides):
    model, output = tiny(family, **overrides), tmp_path / "out"
    one = lessons_of.lessons(checkpoint_of(model), None, 2, 64, 0)
    monkeypatch.setattr(heal, "lessons", lambda *_: one.repeat(8, 1))  # the same at every step
    convert(model, output, to="gqa", kv_heads=1, heal=str(8 * 2 * 64))
    log = (output / "kvtool" / "healing.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert len(losses) == 8
    assert losses[-1] < 0.95 * losses[0]
    report = verify(output, checkpoint_of(model))
    assert report.passed, report.checks
    before, after = weights(model), weights(output)
    assert before.keys() == after.keys()
    for name in before:
        assert ("self_attn" in name) != torch.equal(before[name], after[name]), name


def test_the_plan_predicts_the_size_of_a_healed_output(tiny, tmp_path):
    model, options = tiny("qwen2"), {**CLOSE, "heal": "128"}
    convert(model, tmp_path / "out", **options)
    actual = sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())
    assert plan(model, tokens=1024, **options)["output_bytes"] == pytest.approx(actual, rel=0.01)


# ----------------------------------------------------------------------------------------- teacher


def test_another_model_with_the_same_tokenizer_teaches(tiny, tmp_path):
    llama, teacher = tiny("llama"), tiny("qwen3", num_hidden_layers=2)
    ids, layers = random_ids(96).view(2, 48), fitted(llama)
    loaded = checkpoint_of(teacher).load_transformers(torch.float32).requires_grad_(False)
    rope = LayerStream(checkpoint_of(llama)).rope
    own = checkpoint_of(llama).load_transformers(torch.float32)
    loss = divergence(ConvertedStudent(own, layers, rope, loaded), ids)
    start = student_of(llama, layers)
    with torch.inference_mode():
        ours = start.model.lm_head(start.hidden(ids, False))
    expected = mean_kl(torch.stack([logits(loaded, window) for window in ids]), ours)
    assert loss == pytest.approx(expected, rel=1e-4)

    taught = healed(llama, tmp_path / "a", steps(2), layers=layers, teacher=checkpoint_of(teacher))
    alone = healed(llama, tmp_path / "b", steps(2), layers=layers)
    assert not same_bits(taught, alone)
    state = load_file(tmp_path / "a" / STATE)
    assert state.keys() == load_file(tmp_path / "b" / STATE).keys()  # nothing of the teacher


def test_a_teacher_whose_vocabulary_is_padded_to_another_size_teaches(tiny, tmp_path):
    teacher = checkpoint_of(tiny("llama", vocab_size=320))
    healed(tiny("llama"), tmp_path, steps(1), teacher=teacher)
    assert len(logged(tmp_path)) == 1


@pytest.fixture
def foreigner(tiny, tmp_path) -> Path:
    """A model whose tokenizer has another vocabulary."""

    def rename(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        merge = max(vocabulary, key=vocabulary.get)
        content["model"]["merges"] = content["model"]["merges"][:-1]
        content["added_tokens"] += [
            {**content["added_tokens"][0], "id": vocabulary.pop(merge), "content": "<|other|>"}
        ]

    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "foreigner"))
    return edit_json(folder, "tokenizer.json", rename)


def test_a_teacher_with_another_tokenizer_is_refused(llama, foreigner, tmp_path):
    with pytest.raises(UsageError, match="different tokenizers"):
        healed(llama, tmp_path / "out", steps(1), teacher=checkpoint_of(foreigner))


# ----------------------------------------------------------------------- refused before any work


@pytest.mark.parametrize("amount", ["banana", "0", "-3h"])
def test_an_impossible_amount_is_refused_by_the_plan(llama, amount):
    with pytest.raises(UsageError, match="--heal"):
        plan(llama, heal=amount)


def test_an_impossible_teacher_is_refused_by_the_plan(llama, foreigner):
    with pytest.raises(UsageError, match="different tokenizers"):
        plan(llama, heal="1k", teacher=str(foreigner))
    with pytest.raises(UsageError, match="--teacher"):
        plan(llama, teacher=str(llama))


# ------------------------------------------------------------------------------ command and recipe


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[planning.ConvertOptions, str]]:
    """Options and devices of the conversions that were asked for; none is done."""
    asked: list[tuple[planning.ConvertOptions, str]] = []

    def convert(checkpoint, output, options, *, device, **_):
        asked.append((options, device))
        raise UsageError("enough")

    monkeypatch.setattr(conversion, "convert", convert)
    return asked


def test_the_command_hands_on_how_to_heal(llama, tmp_path, given):
    arguments = [
        "convert",
        str(llama),
        "--to",
        "mla",
        "-o",
        str(tmp_path / "out"),
        "--heal",
        "20min",
    ]
    assert run_command([*arguments, "--teacher", str(llama), "--device", "cpu"]) == 2
    [(options, device)] = given
    assert (options.heal, options.teacher, device) == ("20min", str(llama), "cpu")
    assert options.method == "aware"


@pytest.mark.parametrize(("written", "read"), [("200k", "200k"), ("40000", "40000")])
def test_a_recipe_hands_on_how_to_heal(llama, tmp_path, given, written, read):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"kvtool: 1\nmodel: {llama}\nsteps:\n  - uses: convert\n    to: mla\n    heal: {written}\n"
        f"    teacher: {llama}\n"
    )
    assert run_command(["run", str(recipe), "-o", str(tmp_path / "out")]) == 2
    assert (given[0][0].heal, given[0][0].teacher) == (read, str(llama))


def test_a_device_for_nothing_is_refused(llama, tmp_path, capsys):
    arguments = ["convert", str(llama), "--to", "mla", "-o", str(tmp_path / "out")]
    assert run_command([*arguments, "--device", "cpu"]) == 2
    assert "--device says where while healing: give --heal" in capsys.readouterr().err


def test_a_process_that_waits_for_one_that_stopped_says_so(monkeypatch):
    class Alone:
        def wait_for_everyone(self) -> None:
            raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distill, "_accelerator", Alone)
    with pytest.raises(CalibrationError, match="Another process stopped"):
        distill.wait_for_everyone()


def test_replaced_weights_go_where_their_module_is(llama):
    stream = LayerStream(checkpoint_of(llama))
    own, layout = stream.layer(0).attention, stream.layouts[0]
    weight = own.o_proj.weight.detach().clone()
    layer = ConvertedLayer(exact_factors(layout, stream.rope), {"o_proj.weight": weight})
    stages = converted_stages(own.to("meta"), layer, stream.rope)
    assert {p.device.type for p in stages.gqa.parameters()} == {"meta"}
