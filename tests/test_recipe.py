"""Recipes: strict, with errors that name the line, and a faithful record of a conversion."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from kvtool.checkpoint import sha256_file
from kvtool.cli import calibrate_budgets as budgets_command
from kvtool.cli import calibrate_double_sparsity as double_sparsity_command
from kvtool.cli import calibrate_heads as heads_command
from kvtool.cli import calibrate_projections as projections_command
from kvtool.cli import calibrate_quantization as quantization_command
from kvtool.cli import calibrate_receptive_field as receptive_field_command
from kvtool.cli import calibrate_statistics as statistics_command
from kvtool.cli import convert as convert_command
from kvtool.cli import evaluate as evaluate_command
from kvtool.cli import run_command
from kvtool.cli import verify as verify_command
from kvtool.convert.options import ConvertOptions
from kvtool.errors import RecipeError
from kvtool.recipe import (
    BudgetsStep,
    ConvertStep,
    DoubleSparsityStep,
    EvaluateStep,
    HeadsStep,
    ProjectionsStep,
    QuantizationStep,
    ReceptiveFieldStep,
    Recipe,
    StatisticsStep,
    VerifyStep,
    dump_recipe,
    load_recipe,
    parse_recipe,
)

REPOSITORY = Path(__file__).resolve().parent.parent
VALID = """\
kvtool: 1
model: smollm2
steps:
  - uses: convert
    to: mla
    method: transmla
    kv_budget: 50%
  - uses: evaluate
    max_kl: 0.5
"""
COMMANDS = {
    StatisticsStep: statistics_command.statistics,
    HeadsStep: heads_command.retrieval_heads,
    BudgetsStep: budgets_command.budgets,
    ProjectionsStep: projections_command.projections,
    QuantizationStep: quantization_command.quantization,
    ReceptiveFieldStep: receptive_field_command.receptive_field,
    DoubleSparsityStep: double_sparsity_command.double_sparsity,
    ConvertStep: convert_command.convert,
    VerifyStep: verify_command.verify,
    EvaluateStep: evaluate_command.evaluate,
}


def error_of(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize("file", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=str)
def test_shipped_recipes_follow_the_schema(file: Path) -> None:
    assert load_recipe(file).steps


def test_unknown_key_is_named_with_its_line_and_the_likely_one() -> None:
    assert error_of(VALID.replace("kv_budget", "kv_buget")) == (
        "r.yaml:7:5: unknown key 'kv_buget' (did you mean 'kv_budget'?)"
    )


def test_flags_spelled_as_on_the_command_line_lead_to_the_key() -> None:
    assert "did you mean 'kv_budget'?" in error_of(VALID.replace("kv_budget", "kv-budget"))


@pytest.mark.parametrize(
    ("step", "key"),
    [
        (step, key)
        for step in COMMANDS
        for key in step.model_fields
        if len(key) > 2 and key not in ("uses", "to")
    ],
)
def test_a_letter_left_out_is_found_for_every_key(step: type, key: str) -> None:
    uses = step.model_fields["uses"].annotation.__args__[0]
    typo = key[:-2] + key[-1]
    text = f"kvtool: 1\nmodel: m\nsteps:\n  - {{uses: convert, to: mla}}\n  - uses: {uses}\n"
    text += "    to: mla\n" * (uses == "convert") + f"    {typo}: 1\n"
    assert f"unknown key '{typo}' (did you mean '{key}'?)" in error_of(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kvtool: 1", "kvtool: 2", "r.yaml:1:1: this kvtool reads recipes of version 1, not 2"),
        ("model: smollm2\n", "", "r.yaml:1:1: the key 'model' is missing"),
        ("model:", "modell:", "r.yaml:2:1: unknown key 'modell' (did you mean 'model'?)"),
        ("    to: mla\n", "", "r.yaml:4:5: the key 'to' is missing"),
        ("uses: evaluate", "uses: evaluat", "r.yaml:8:5: unknown step 'evaluat'"),
        ("uses: evaluate", "data: x.txt", "r.yaml:8:5: the key 'uses' is missing"),
        ("method: transmla", "method: magic", "r.yaml:6:5: 'method' is 'magic': input should be"),
        ("max_kl: 0.5", "max_kl: low", "r.yaml:9:5: 'max_kl' is 'low': input should be a valid"),
        ("max_kl: 0.5", "max_kl: -1", "r.yaml:9:5: 'max_kl' is -1: input should be greater"),
        ("max_kl: 0.5", "min_recall: 1.5", "r.yaml:9:5: 'min_recall' is 1.5: input should be less"),
        ("model: smollm2", "model: 7", "r.yaml:2:1: 'model' is 7: input should be a valid string"),
        ("uses: evaluate", "uses: 'evaluate", "r.yaml:"),
        ("model: smollm2", "model: [a", "r.yaml:3:"),
        ("model: smollm2", "model: a\nmodel: b", "r.yaml:3:1: not valid YAML: found duplicate key"),
        (
            "model: smollm2",
            "model: 2026-11-31",
            "r.yaml:2:8: not valid YAML: '2026-11-31' is no",
        ),
        ("max_kl: 0.5", "max_kl: !!float low", "r.yaml:9:13: not valid YAML: 'low' is no float"),
        (
            "max_kl: 0.5",
            "quick: !!bool perhaps",
            "r.yaml:9:12: not valid YAML: 'perhaps' is",
        ),
        ("max_kl: 0.5", f"seed: {'9' * 5000}", "r.yaml:9:11: not valid YAML: '999"),
        (
            "  - uses: convert\n    to: mla\n",
            "  - convert\n  - to: mla\n",
            "r.yaml:4:5: step 1 is 'c",
        ),
        ("kvtool: 1\nmodel: smollm2", "&m\nkvtool: 1\nmodel: *m", "r.yaml: not a recipe: an alias"),
        ("  - uses: convert\n    to: mla\n", "  - uses: verify\n", "r.yaml:5:5: unknown key"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(old: str, new: str, message: str) -> None:
    assert old in VALID
    assert error_of(VALID.replace(old, new)).startswith(message)


@pytest.mark.parametrize("budget", ["150%", "0%", "half", "0", "-5%"])
def test_a_budget_that_no_calibration_takes_is_refused_with_its_line(budget: str) -> None:
    step = f"  - uses: calibrate budgets\n    kv_budget: {budget}\n"
    message = error_of(f"kvtool: 1\nmodel: smollm2\nsteps:\n{step}")
    assert message.startswith("r.yaml:5:5: 'kv_budget' is")
    assert "neither a share of the native cache" in message


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("150%", "--kv-budget 150% does not shrink the cache: a share is below 100%"),
        ("100%", "--kv-budget 100% does not shrink the cache: a share is below 100%"),
        ("0%", "--kv-budget '0%' is neither a share such as 50% nor bytes per token such as 11520"),
        ("half", "--kv-budget 'half' is neither"),
        ("-5%", "--kv-budget '-5%' is neither"),
    ],
)
def test_a_budget_that_no_conversion_takes_is_refused_with_its_line(budget: str, why: str) -> None:
    message = error_of(VALID.replace("kv_budget: 50%", f"kv_budget: {budget}"))
    assert message.startswith(f"r.yaml:7:5: 'kv_budget' is '{budget}': {why}")


@pytest.mark.parametrize("given", ["r.html", "[r.html]", "\n      - r.html"])
def test_one_report_or_several_may_be_written(given: str) -> None:
    step = parse_recipe(VALID + f"    output: {given}\n", "r.yaml").steps[-1]
    assert isinstance(step, EvaluateStep)
    assert step.output == ["r.html"]
    both = parse_recipe(VALID + "    output: [r.html, r.json]\n", "r.yaml").steps[-1]
    assert isinstance(both, EvaluateStep)
    assert both.output == ["r.html", "r.json"]


@pytest.mark.parametrize("given", ["r.txt", "[r.json, r]"])
def test_a_report_of_no_known_kind_is_refused_with_its_line(given: str) -> None:
    message = error_of(VALID + f"    output: {given}\n")
    assert message.startswith("r.yaml:10:5: 'output' is ")
    assert message.endswith("a report ends in .json or .html")


@pytest.mark.parametrize("text", ["", "- 1\n", "just words\n", "7\n"])
def test_a_document_that_is_no_mapping_is_refused(text: str) -> None:
    assert error_of(text).startswith("r.yaml:1:1: a recipe is a mapping")


def test_a_step_with_nothing_to_look_at_is_refused() -> None:
    text = "kvtool: 1\nmodel: m\nsteps:\n  - uses: verify\n"
    assert error_of(text).startswith("r.yaml:4:5: 'verify' comes before any 'convert' step")


def test_yaml_tags_cannot_name_code() -> None:
    message = error_of(VALID.replace("smollm2", "!!python/object/apply:os.getcwd []"))
    assert message.startswith("r.yaml:2:1:")


def test_missing_recipe_file_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "nowhere.yaml"]) == 3
    said = "error: nowhere.yaml: cannot be read as a recipe: No such file or directory\n"
    assert capsys.readouterr().err == said


names = st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,12}", fullmatch=True)
convert_steps = st.fixed_dictionaries(
    {"uses": st.just("convert"), "to": st.just("mla")},
    optional={
        "method": st.sampled_from(["exact", "transmla"]),
        "target": st.sampled_from(["transformers", "vllm", "kvtool"]),
        "kv_budget": st.integers(1, 10**6).map(str) | st.integers(1, 99).map("{}%".format),
        "rope_dim": st.none() | st.integers(2, 128),
        "rank": st.none() | st.integers(1, 4096),
        "freqfold": st.just("auto") | st.integers(1, 64).map(str),
        "data": st.none() | names,
        "tokens": st.integers(1, 10**7),
        "seed": st.integers(0, 2**31),
        "shard_size": names,
        "verify": st.booleans(),
    },
)
evaluate_steps = st.fixed_dictionaries(
    {"uses": st.just("evaluate")},
    optional={
        "quick": st.booleans(),
        "max_kl": st.floats(0, 10),
        "device": names,
        "output": st.none() | st.lists(names.map("{}.html".format)),
    },
)


@given(
    first=convert_steps,
    others=st.lists(convert_steps | evaluate_steps, max_size=3),
    model=names,
    revision=st.none() | names,
)
def test_what_is_written_reads_back_the_same(
    first: dict[str, Any], others: list[dict[str, Any]], model: str, revision: str | None
) -> None:
    steps = [first, *others]
    recipe = parse_recipe(dump_recipe(model, steps, revision), "r.yaml")
    expected = {"kvtool": 1, "model": model, "revision": revision, "steps": steps}
    assert recipe == Recipe.model_validate(expected)
    again = [step.model_dump() for step in recipe.steps]
    assert parse_recipe(dump_recipe(model, again, revision), "r.yaml") == recipe


def test_a_path_is_written_so_that_it_holds_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    text = dump_recipe("model", [{"uses": "convert", "to": "mla"}])
    assert parse_recipe(text, "r.yaml").model == str(tmp_path / "model")


@pytest.mark.parametrize("step", COMMANDS)
def test_steps_have_the_flags_of_their_command_with_the_same_defaults(step: type) -> None:
    parameters = inspect.signature(COMMANDS[step]).parameters
    for name, field in step.model_fields.items():
        if name in ("uses", "output"):
            continue
        default = parameters[name].default
        assert field.is_required() == (default is inspect.Parameter.empty), name
        assert field.is_required() or field.default == default, name


def choices(annotation: Any) -> set[Any]:
    """All values of the literals in a type."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*map(choices, get_args(annotation)))


@pytest.mark.parametrize("step", COMMANDS)
def test_steps_know_every_choice_of_their_command(step: type) -> None:
    hints = get_type_hints(COMMANDS[step])
    for name, field in step.model_fields.items():
        if name not in ("uses", "output", "to"):
            assert choices(field.annotation) == choices(hints[name]), name


def refused(step: type[BaseModel], name: str, number: int) -> bool:
    """Whether a field takes no such number, nor a list of it."""
    wrong = []
    for value in (number, [number]):
        try:
            step.model_validate({name: value})
        except ValidationError as error:
            wrong.append(any(one["loc"][0] == name for one in error.errors()))
    return wrong == [True, True]


@pytest.mark.parametrize("step", COMMANDS)
def test_steps_refuse_the_numbers_that_their_command_refuses(step: type[BaseModel]) -> None:
    hints = get_type_hints(COMMANDS[step], include_extras=True)
    for name in step.model_fields:
        option = getattr(hints.get(name), "__metadata__", (None,))[0]
        least, most = getattr(option, "min", None), getattr(option, "max", None)
        if name != "uses" and least is not None:
            assert not refused(step, name, least), name
            assert refused(step, name, least - 1), name
            assert most is None or refused(step, name, most + 1), name


def test_a_step_of_codes_is_the_command_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    known = set(inspect.signature(projections_command.projections).parameters)
    monkeypatch.setattr(
        projections_command,
        "projections",
        lambda *arguments, **options: given.append((arguments, options)),
    )
    asked = {"method": "xkv", "layers_together": 2, "kv_budget": "25%", "sink": 0}
    read = {"method": "aware", "read": "rebuilt"}
    steps = [
        {"uses": "calibrate projections", "output": f"{name}.plan", **options}
        for name, options in (("xkv", asked), ("aware", read))
    ]
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe("m", steps))
    assert run_command(["run", str(file), "--quiet"]) == 0
    for (arguments, options), name, wanted in zip(
        given, ("xkv", "aware"), (asked, read), strict=True
    ):
        assert arguments == ("m", Path(f"{name}.plan"))
        assert options.items() >= wanted.items()
        assert known >= set(options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("method: matrix", "'method' is 'matrix': input should be 'aware', 'matryoshka'"),
        ("read: sideways", "'read' is 'sideways': input should be 'absorbed' or 'rebuilt'"),
        ("layers_together: 0", "'layers_together' is 0: input should be greater"),
    ],
)
def test_options_that_no_code_has_are_errors_of_the_recipe(line: str, message: str) -> None:
    step = "kvtool: 1\nmodel: m\nsteps:\n  - uses: calibrate projections\n    "
    assert message in error_of(step + line + "\n")


def test_conversion_options_have_one_default() -> None:
    for name, field in ConvertOptions.__dataclass_fields__.items():
        if name != "to":  # the command always asks for it
            assert ConvertStep.model_fields[name].default == field.default, name


def files_by_hash(folder: Path) -> dict[str, str]:
    """Hashes of everything but the files that tell how long the run took."""
    timed = {"kvtool_manifest.json", "README.md"}
    return {
        str(file.relative_to(folder)): sha256_file(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in timed
    }


def test_the_recipe_in_an_output_replays_the_run_to_the_same_bytes(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--kv-budget", "50%", "--tokens", "1024", "--seed", "3", "--quiet", "--no-verify"]
    convert = ["convert", str(tiny("llama")), "--to", "mla", "-o", str(first), *options]
    assert run_command(convert) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    replay = ["run", str(first / "recipe.yaml"), "-o", str(second), "--quiet"]
    assert run_command(replay) == 0
    assert files_by_hash(first) == files_by_hash(second)
    assert "recipe.yaml" in files_by_hash(first)


def test_dry_run_of_a_recipe_writes_nothing(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe(str(tiny("llama")), [{"uses": "convert", "to": "mla"}]))
    assert run_command(["run", str(file), "-o", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "bytes per token" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("steps", "arguments", "message"),
    [
        (1, [], "does not say where an output goes"),
        (2, ["-o", "out"], "has 2 outputs, so --output cannot name them all"),
    ],
)
def test_unclear_output_is_a_usage_error(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    arguments: list[str],
    message: str,
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe("smollm2", [{"uses": "convert", "to": "mla"}] * steps))
    assert run_command(["run", str(file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_outputs_are_judged_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = [
        {"uses": "calibrate budgets", "kv_budget": "50%", "output": name} for name in ("a", "b")
    ]
    file = tmp_path / "r.yaml"
    file.write_text(dump_recipe("nowhere", steps))
    Path("b").touch()
    assert run_command(["run", str(file)]) == 2
    assert "The output b exists already." in capsys.readouterr().err
    file.write_text(dump_recipe("nowhere", [steps[0], steps[0]]))
    assert run_command(["run", str(file), "--overwrite"]) == 2
    assert "two steps write a" in capsys.readouterr().err


def test_the_reports_of_a_recipe_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(convert_command, "convert", lambda *arguments, **options: None)
    monkeypatch.setattr(
        evaluate_command, "evaluate", lambda *arguments, **options: given.append(options["output"])
    )
    file = tmp_path / "r.yaml"
    step = {"uses": "evaluate", "output": ["r.json", "r.html"]}
    file.write_text(dump_recipe("m", [{"uses": "convert", "to": "mla"}, step]))
    assert run_command(["run", str(file), "-o", str(tmp_path / "out")]) == 0
    assert given == [[Path("r.json"), Path("r.html")]]


def test_validate_says_what_a_recipe_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(VALID)
    assert run_command(["recipe", "validate", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: valid (convert, evaluate)\n"


def test_validate_gives_machines_all_that_the_recipe_says_and_leaves_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(VALID)
    assert run_command(["recipe", "validate", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said.pop("recipe") == str(file)
    assert said == load_recipe(file).model_dump()
    assert [step["uses"] for step in said["steps"]] == ["convert", "evaluate"]
    file.write_text(VALID.replace("50%", "150%"))
    assert run_command(["recipe", "validate", str(file), "--json"]) == 3
    assert capsys.readouterr().out == ""


def test_a_plan_of_codes_can_be_evaluated() -> None:
    text = "kvtool: 1\nmodel: m\nsteps:\n  - uses: calibrate projections\n  - uses: evaluate\n"
    assert [step.uses for step in parse_recipe(text, "r.yaml").steps][-1] == "evaluate"
    assert "'context' is 0" in error_of(
        text.replace("projections\n", "projections\n    context: 0\n")
    )


def test_a_recipe_that_is_nested_too_deeply_is_refused() -> None:
    assert error_of("[" * 100_000) == "r.yaml: not a recipe: it is nested too deeply"


def test_aliases_of_aliases_are_refused_before_they_are_written_out() -> None:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    text = "\n".join(["a0: &a0 [x]", *lines])
    assert "with its aliases written out it has over 10000 values" in error_of(text)
