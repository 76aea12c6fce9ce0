"""The text of a model of several modalities is what its wrapper computes of text alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from _convert_tools import convert
from _wrapper_cases import CASES, KNOWN, make_wrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.cli.generate import chat_ids
from kvtool.convert import planning
from kvtool.convert.verify import verify
from kvtool.errors import CheckpointError, PlanError, UnsupportedModelError
from kvtool.evaluate.throughput import load_rival
from kvtool.factors import finish_of
from kvtool.inspection import inspect_checkpoint
from kvtool.layout import FAMILIES, describe
from kvtool.plan import Plan, base_of
from kvtool.runtime import Engine
from kvtool.wrappers import SECTIONED, WRAPPERS, text_config

Made = tuple[nn.Module, dict[str, Path]]
AGES = ("saved", "named")
CONVERSIONS: dict[str, dict[str, Any]] = {
    "mla": {"method": "exact"},
    "gqa": {"to": "gqa", "kv_heads": 1, "tokens": 1024},
}
KINDS = [name for name in KNOWN if CASES[name][2] in (*FAMILIES, *SECTIONED)]
"""Those whose decoder kvtool knows."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """``made(name)``: a wrapper in memory, and its folder of each age, not to be changed."""
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = make_wrapper(name, tmp_path_factory.mktemp("wrapper"))
        return known[name]

    return get


@pytest.fixture
def llava(made, tmp_path: Path) -> Path:
    """A folder to be changed."""
    return Path(shutil.copytree(made("llava")[1]["saved"], tmp_path / "llava"))


def tokens(count: int) -> Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def expected(wrapper: Any, ids: Tensor) -> Tensor:
    """Logits of transformers' wrapper, `[T, V]`.

    It leaves out what the decoder's own class multiplies them by, as Cohere's and Granite's do.
    """
    logits = wrapper(input_ids=ids[None], use_cache=False).logits[0]
    return logits * finish_of(wrapper.config.get_text_config(decoder=True)).factor


def same(got: Tensor, wanted: Tensor) -> None:
    assert float(wanted.std()) > 1e-2, "the model says the same of everything"
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.std()))


def decoded(engine: Engine, ids: Tensor, prompt: int = 40) -> Tensor:
    cache = engine.new_cache(1, len(ids))
    found = [engine.extend(cache, ids[:prompt], all_logits=True)]
    found += [engine.decode(cache, token[None]) for token in ids[prompt:]]
    return torch.cat(found)


def edit(folder: Path, change: Callable[[dict[str, Any]], object], what: str = "config") -> None:
    """Rewrites `config.json`, its text section, or the weights after `change` edited them."""
    if what == "weights":
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    config = json.loads((folder / "config.json").read_text())
    change(config if what == "config" else config["text_config"])
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, kind: type[Exception] = UnsupportedModelError) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint.open(str(folder))
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_wrapper_has_a_case() -> None:
    assert {kind for kind, *_ in CASES.values()} == set(WRAPPERS)


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("name", KINDS)
def test_the_runtime_computes_what_the_wrapper_computes(made, name: str, age: str) -> None:
    wrapper, folders = made(name)
    ids = tokens(60)
    same(decoded(Engine.load(Checkpoint.open(str(folders[age]))), ids), expected(wrapper, ids))


@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_streamed_layers_compute_what_the_wrapper_computes(made, name: str) -> None:
    wrapper, folders = made(name)
    ids, stream = tokens(50), LayerStream(Checkpoint.open(str(folders["saved"])))
    hidden = stream.embed(ids[None])
    for index in range(len(stream)):
        layer = stream.layer(index)
        layer.run(hidden, stream.exact_attention(layer))
    same(stream.logits(hidden)[0], expected(wrapper, ids))


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("name", KNOWN)
@torch.inference_mode()
def test_transformers_runs_its_text_alone(made, name: str, age: str) -> None:
    wrapper, folders = made(name)
    checkpoint, ids = Checkpoint.open(str(folders[age])), tokens(50)
    model = checkpoint.load_transformers(torch.float32)
    same(model(ids[None]).logits[0], expected(wrapper, ids))
    assert type(model).__name__ == checkpoint.config["architectures"][0]
    assert not any("vision" in name or "audio" in name for name in checkpoint.tensors)


@pytest.mark.parametrize("name", KNOWN)
def test_the_config_is_what_transformers_reads_in_the_wrapper(made, name: str) -> None:
    folder = made(name)[1]["saved"]
    checkpoint = Checkpoint.open(str(folder))
    own = AutoConfig.from_pretrained(folder).get_text_config(decoder=True).to_dict()
    got = checkpoint.hf_config().to_dict()
    for field in ("model_type", "architectures", "tie_word_embeddings", "dtype"):
        own.pop(field, None)
    own["rope_parameters"].pop("mrope_section", None)
    assert {field: got.get(field) for field in own} == own


def test_what_the_wrapper_says_of_tokens_counts(llava: Path) -> None:
    edit(llava, lambda text: text.pop("eos_token_id"), "text_config")
    edit(llava, lambda config: config.update(eos_token_id=[5, 7], bos_token_id=3))
    (llava / "generation_config.json").unlink()
    checkpoint = Checkpoint.open(str(llava))
    assert Engine.load(checkpoint).eos_ids == {5, 7}
    assert checkpoint.hf_config().bos_token_id == 3
    GenerationConfig(eos_token_id=[9]).save_pretrained(llava)
    assert Engine.load(checkpoint).eos_ids == {9}


def test_the_dtype_is_that_of_the_text_and_else_of_the_wrapper(llava: Path) -> None:
    edit(llava, lambda config: config.update(dtype="bfloat16"))
    assert Checkpoint.open(str(llava)).hf_config().dtype == torch.float32
    edit(llava, lambda text: text.pop("dtype"), "text_config")
    assert Checkpoint.open(str(llava)).hf_config().dtype == torch.bfloat16


def test_fields_that_only_the_wrapper_knows_are_filled_in(made, tmp_path: Path) -> None:
    if "voxtral" not in KNOWN:
        pytest.skip("this transformers has no such wrapper")
    folder = Path(shutil.copytree(made("voxtral")[1]["saved"], tmp_path / "model"))
    edit(folder, lambda config: config.update(text_config={"vocab_size": 300}))
    config = json.loads((folder / "config.json").read_text())
    whole = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    text = text_config(folder, config)
    assert text["model_type"] == "llama"
    assert (text["num_key_value_heads"], text["vocab_size"]) == (whole.num_key_value_heads, 300)
    assert whole.num_key_value_heads == 8 != transformers.LlamaConfig().num_key_value_heads


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_config_with_the_fields_of_its_text_beside_it_is_read(made, tmp_path, name) -> None:
    wrapper, folders = made(name)
    folder = Path(shutil.copytree(folders["saved"], tmp_path / "model"))

    def flatten(config: dict[str, Any]) -> None:  # as they were published
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        own = {key: config[key] for key in ("model_type", "architectures", "tie_word_embeddings")}
        config.update(text | old | own)

    edit(folder, flatten)
    checkpoint, ids = Checkpoint.open(str(folder)), tokens(50)
    assert not any("vision" in key for key in checkpoint.config)
    same(decoded(Engine.load(checkpoint), ids), expected(wrapper, ids))


def test_a_head_that_is_there_is_not_replaced_by_the_embedding(made, tmp_path: Path) -> None:
    wrapper, folders = made("internvl, qwen3, tied")
    folder = Path(shutil.copytree(folders["named"], tmp_path / "model"))
    edit(folder, lambda w: w.update({"lm_head.weight": torch.randn(300, 64)}), "weights")
    ids, checkpoint = tokens(50), Checkpoint.open(str(folder))
    own = type(wrapper).from_pretrained(folder)
    assert not torch.equal(own.lm_head.weight, own.get_input_embeddings().weight)
    same(decoded(Engine.load(checkpoint), ids), expected(own, ids))
    stream = LayerStream(checkpoint)
    assert not stream.config.tie_word_embeddings


def test_its_identity_is_that_of_its_text(made, llava: Path, tmp_path: Path) -> None:
    saved, named = (Checkpoint.open(str(made("llava")[1][age])) for age in AGES)
    assert base_of(saved) == base_of(named)
    edit(llava, lambda config: config["vision_config"].update(hidden_act="relu"))
    edit(llava, lambda w: [t.mul_(2) for n, t in w.items() if "vision" in n], "weights")
    assert base_of(Checkpoint.open(str(llava))) == base_of(saved)
    edit(llava, lambda w: w["language_model.model.norm.weight"].mul_(2), "weights")
    other = base_of(Checkpoint.open(str(llava)))
    assert other != base_of(saved)
    edit(llava, lambda w: w["language_model.model.norm.weight"].div_(2), "weights")
    edit(llava, lambda text: text.update(rms_norm_eps=1e-4), "text_config")
    assert base_of(Checkpoint.open(str(llava))) not in (other, base_of(saved))


def test_a_plan_for_its_text_is_made_and_run(made, llava: Path, tmp_path: Path) -> None:
    saved, named = (str(made("llava")[1][age]) for age in AGES)
    file = tmp_path / "heads.plan"
    command = ["calibrate", "retrieval-heads", saved, "-o", str(file), "--method", "entropy", "-q"]
    assert run_command([*command, "--sink", "4", "--window", "28"]) == 0
    plan = Plan.read(file)
    assert any(any(layer.streaming) for layer in plan.layers)
    ids = tokens(60)
    got = [decoded(Engine.load(Checkpoint.open(x), plan=plan), ids) for x in (saved, named)]
    assert torch.equal(*got)
    whole = decoded(Engine.load(Checkpoint.open(saved)), ids)
    same(got[0][:20], whole[:20])
    assert not torch.allclose(got[0][-1], whole[-1], atol=1e-2)  # the heads that stream are felt
    edit(llava, lambda w: w["language_model.model.norm.weight"].mul_(2), "weights")
    with pytest.raises(PlanError):
        plan.check_base(Checkpoint.open(str(llava)))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("paligemma", "both directions"), ("mllama", "layers of their own"), ("gemma3n", "gemma3n")],
)
def test_wrappers_whose_text_is_not_alone_are_refused(llava: Path, kind: str, reason: str) -> None:
    edit(llava, lambda config: config.update(model_type=kind))
    message = refused(llava)
    assert reason in message
    assert "several modalities" in message


def test_a_decoder_that_kvtool_does_not_know_is_refused_by_its_name(llava: Path) -> None:
    edit(llava, lambda text: text.update(model_type="gpt_neox"), "text_config")
    with pytest.raises(UnsupportedModelError, match="gpt_neox"):
        describe(Checkpoint.open(str(llava)).hf_config())
    edit(llava, lambda text: text.update(model_type="t5"), "text_config")
    assert "t5" in refused(llava)


def test_a_damaged_config_is_one_sentence(llava: Path) -> None:
    edit(llava, lambda text: text.update(hidden_size="wide"), "text_config")
    assert "config" in refused(llava, CheckpointError)


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_quantised_wrappers_are_refused(llava: Path, where: str) -> None:
    edit(llava, lambda own: own.update(quantization_config={"quant_method": "hqq"}), where)
    assert "hqq" in refused(llava)


def test_the_text_of_a_quantised_wrapper_is_read_as_numbers(llava: Path) -> None:
    before = Checkpoint.open(str(llava))
    ending = "layers.1.mlp.up_proj.weight"
    x = before.read(f"model.{ending}").clone()  # the file is written anew

    def quantise(weights: dict[str, Any]) -> None:
        (name,) = (name for name in weights if name.endswith(ending) and "vision" not in name)
        weights[name] = (weights[name] / 0.01).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.tensor(0.01)

    edit(llava, quantise, "weights")
    edit(llava, lambda own: own.update(quantization_config={"quant_method": "fp8"}))
    after = Checkpoint.open(str(llava))
    assert after.quantised == "fp8"
    assert after.tensors.keys() == before.tensors.keys()
    assert after.config == before.config
    assert 0 < float((x - after.read(f"model.{ending}")).abs().max()) < 0.1 * float(x.abs().max())
    after.load_transformers(torch.float32)


def test_tensors_that_are_of_nothing_known_are_refused(llava: Path) -> None:
    one = {"speech.weight": torch.zeros(2)}
    edit(llava, lambda w: w.update(one), "weights")
    assert "speech.weight" in refused(llava, CheckpointError)
    two = {"model.language_model.norm.weight": torch.ones(64)}
    edit(llava, lambda w: (w.pop("speech.weight"), w.update(two)), "weights")
    message = refused(llava, CheckpointError)
    assert "language_model.model.norm.weight and model.language_model.norm.weight" in message


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_loading_checks_every_weight_of_its_text(llava: Path, kind: str) -> None:
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    changes: dict[str, Callable[[dict[str, Tensor]], object]] = {
        "missing": lambda w: w.pop(name),
        "unexpected": lambda w: w.update({name.replace("up", "side"): torch.zeros(2)}),
        "mismatched": lambda w: w.update({name: torch.zeros(5, 7)}),
    }
    edit(llava, changes[kind], "weights")
    checkpoint = Checkpoint.open(str(llava))
    with pytest.raises(CheckpointError, match=rf"{kind}: model\.layers\.1"):
        checkpoint.load_transformers(torch.float32)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1"):
        LayerStream(checkpoint)


def test_a_head_that_is_neither_there_nor_tied_is_missed(llava: Path) -> None:
    edit(llava, lambda w: w.pop("language_model.lm_head.weight"), "weights")
    with pytest.raises(CheckpointError, match=r"lm_head"):
        LayerStream(Checkpoint.open(str(llava)))


PARTS = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_a_template_of_the_processor_that_reads_parts_is_given_parts(llava: Path) -> None:
    (llava / "chat_template.jinja").unlink()
    template = {"chat_template": PARTS}
    (llava / "chat_template.json").write_text(json.dumps(template))
    tokenizer = Checkpoint.open(str(llava)).tokenizer()
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    ids = chat_ids(tokenizer, [*turns, {"role": "user", "content": "where?"}], "model")
    wanted = "USER: the fox\nASSISTANT: jumps\nUSER: where?\nASSISTANT:"
    assert tokenizer.decode(ids) == wanted
    parted = [{"role": "user", "content": [{"type": "text", "text": "a part"}]}]
    assert "a part" in tokenizer.apply_chat_template(parted, tokenize=False)


def test_a_template_that_reads_text_is_left_alone(llava: Path) -> None:
    before = (llava / "chat_template.jinja").read_text()
    (llava / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    assert Checkpoint.open(str(llava)).tokenizer().chat_template == before


def test_a_conversion_gives_stock_tokenizers_the_template_of_the_processor(llava: Path) -> None:
    (llava / "chat_template.jinja").unlink()
    (llava / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    output = llava.with_name("converted")
    convert(llava, output, **CONVERSIONS["gqa"])
    tokenizer = AutoTokenizer.from_pretrained(output)
    turns = [{"role": "user", "content": "the fox"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "USER: the fox\n"


@pytest.mark.parametrize(
    ("change", "kind", "reason"),
    [
        ({"text_config": []}, CheckpointError, "text_config is not an object"),
        ({"text_config": {"model_type": "qwen9"}}, UnsupportedModelError, "type qwen9"),
        ({"architectures": -1}, CheckpointError, "not a list of names"),
        ({"model_type": []}, CheckpointError, "model_type is not a name"),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(llava: Path, change, kind, reason) -> None:
    edit(llava, lambda config: config.update(change))
    assert reason in refused(llava, kind)


@pytest.mark.parametrize("to", ["mla", "gqa"])
def test_its_text_is_converted_alone(made, llava: Path, tmp_path: Path, to: str) -> None:
    for file in ("preprocessor_config.json", "processor_config.json"):
        (llava / file).write_text("{}")
    recommended = '{"do_sample": true, "temperature": 0.7, "eos_token_id": 1}'
    (llava / "generation_config.json").write_text(recommended)
    output, checkpoint = tmp_path / "out", Checkpoint.open(str(llava))
    result = convert(llava, output, **CONVERSIONS[to])
    assert verify(output, checkpoint, long_prompt=False).passed
    assert result.plan["text_of"] == checkpoint.wrapper is not None
    assert (
        f"the text of `{llava}` (LlavaForConditionalGeneration)"
        in (output / "README.md").read_text()
    )
    assert not list(output.glob("*processor*"))
    assert (output / "generation_config.json").read_text() == recommended
    converted, ids = Checkpoint.open(str(output)), tokens(50)
    assert converted.wrapper is None
    assert converted.config["dtype"] == checkpoint.config["dtype"] == "float32"
    got, wanted = decoded(Engine.load(converted), ids), expected(made("llava")[0], ids)
    if to == "mla":
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-2 * float(wanted.std()))


SCALED = {"gemma4": "named", "idefics3": "saved", "llava": "named", "qwen3_5_moe": "saved"}


@pytest.mark.parametrize(("name", "age"), [x for x in SCALED.items() if x[0] in KINDS])
def test_scales_for_its_cache_lie_beside_all_of_it(made, tmp_path, name: str, age: str) -> None:
    wrapper, folders = made(name)
    source = Path(shutil.copytree(folders[age], tmp_path / "source"))
    for file in ("preprocessor_config.json", "processor_config.json"):
        (source / file).write_text("{}")
    recommended = '{"do_sample": true, "temperature": 0.7, "eos_token_id": 1}'
    (source / "generation_config.json").write_text(recommended)
    output, checkpoint = tmp_path / "out", Checkpoint.open(str(source))
    result = convert(source, output, to="fp8-kv", smooth=True)
    assert verify(output, checkpoint).passed
    assert len(list(output.glob("*processor*"))) == 2
    assert (output / "generation_config.json").read_text() == recommended
    assert result.plan["text_of"] is None
    before, after = (load_file(x / "model.safetensors") for x in (source, output))
    assert result.plan["output_bytes"] == sum(x.nbytes for x in after.values())
    beside = {n.rsplit(".", 2)[0] for n in before if n.endswith("self_attn.o_proj.weight")}
    layers = {x for x in beside if "vis" not in x}
    assert after.keys() - before.keys() == {f"{x}.{s}_scale" for x in layers for s in ("k", "v")}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all(n.startswith(tuple(f"{x}." for x in layers)) for n in changed)
    scheme = json.loads((output / "hf_quant_config.json").read_text())["kv_cache_scheme"]
    assert (scheme["type"], scheme["strategy"]) == ("float", "tensor")
    config = json.loads((output / "config.json").read_text())
    del config["kvtool"]
    assert config == json.loads((source / "config.json").read_text())
    own, info = type(wrapper).from_pretrained(output, output_loading_info=True)
    assert all(x.endswith(("k_scale", "v_scale")) for x in info.pop("unexpected_keys"))
    assert not any(info.values())
    ids = tokens(50)
    same(expected(own, ids), expected(wrapper, ids))
    same(decoded(Engine.load(Checkpoint.open(str(output))), ids), expected(wrapper, ids))
    edit(output, lambda w: w[next(n for n in w if "vis" in n)].add_(1), "weights")
    report = verify(output, checkpoint, long_prompt=False)
    (check,) = (x for x in report.checks if x.name == "untouched tensors")
    assert not check.passed


def test_scales_that_nothing_would_read_are_refused(made) -> None:
    if "voxtral" not in KNOWN:
        pytest.skip("this transformers has no such wrapper")
    checkpoint = Checkpoint.open(str(made("voxtral")[1]["saved"]))
    with pytest.raises(UnsupportedModelError, match="Mistral's own format"):
        planning.plan(checkpoint, planning.ConvertOptions(to="fp8-kv"))
    (item,) = (
        x for x in inspect_checkpoint(checkpoint).applications if x.command.endswith("fp8-kv")
    )
    assert "Mistral's own format" in item.reasons[0]


def test_inspect_says_that_its_text_is_meant(llava: Path, capfd) -> None:
    assert run_command(["inspect", str(llava)]) == 0
    said = capfd.readouterr().out
    assert "llama (LlamaForCausalLM)" in said
    assert "of LlavaForConditionalGeneration" in said
    assert run_command(["inspect", str(llava), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["text_of"] == "LlavaForConditionalGeneration"
    assert told["parameters"] == sum(
        w.numel()
        for name, w in load_file(llava / "model.safetensors").items()
        if name.startswith("language_model.")
    )


def test_transformers_generates_from_its_text(llava: Path) -> None:
    checkpoint, prompts = Checkpoint.open(str(llava)), [tokens(20).tolist()]
    rival = load_rival(checkpoint, torch.float32, "cpu")
    ours = [row for (row,) in Engine.load(checkpoint).generate(prompts, max_new_tokens=6)]
    theirs = rival.generate(torch.tensor(prompts), max_new_tokens=6)[0, 20:]
    assert ours == theirs.tolist()[: len(ours)]


def test_tables_of_positions_in_old_files_are_passed_over(made, llava: Path) -> None:
    name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(llava, lambda w: w.update({name: torch.ones(8)}), "weights")
    checkpoint, ids = Checkpoint.open(str(llava)), tokens(50)
    same(decoded(Engine.load(checkpoint), ids), expected(made("llava")[0], ids))
    LayerStream(checkpoint)


def test_experts_that_lie_transposed_are_turned(made, tmp_path: Path) -> None:
    """As in the published checkpoints of Qwen3-VL-MoE."""
    source = made("qwen3_vl_moe")[1]["named"]
    turned = Path(shutil.copytree(source, tmp_path / "turned"))

    def turn(weights: dict[str, Any]) -> None:
        for name, x in weights.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                weights[name] = x.mT.contiguous()

    edit(turned, turn, "weights")
    upright, found = (Checkpoint.open(str(x)) for x in (source, turned))
    assert {name: x.shape for name, x in upright.tensors.items()} == {
        name: x.shape for name, x in found.tensors.items()
    }
    assert any(x.stored[""].shape != x.shape for x in found.tensors.values())
    states = [x.load_transformers(torch.float32).state_dict() for x in (upright, found)]
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
