"""Recipes: calibrations, conversions and checks, written down so that they can be repeated.

A recipe is YAML with a strict schema. An unknown key is an error that names its line and the key
that was probably meant; nothing in a recipe can name code.
"""

from __future__ import annotations

import difflib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from kvtool.errors import RecipeError, UsageError
from kvtool.sizes import MAX_SEED, parse_budget, token_budget

SCHEMA_VERSION = 1
_MOST_VALUES = 10_000  # few lines of YAML whose aliases name aliases stand for billions


def _number_as_text(value: Any) -> Any:
    """YAML reads ``kv_budget: 11520`` as a number; on the command line it is text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _one_as_list(value: Any) -> Any:
    """A single file needs no list around it."""
    return [value] if isinstance(value, str) else value


def _check_reports(files: list[str]) -> list[str]:
    if any(Path(file).suffix not in (".json", ".html") for file in files):
        raise ValueError("a report ends in .json or .html")
    return files


def _read_by(parse: Callable[[str], Any]) -> AfterValidator:
    """Text that the command line can read, which says itself what is wrong with any other."""

    def check(text: str) -> str:
        try:
            parse(text)
        except UsageError as error:
            raise ValueError(error) from error
        return text

    return AfterValidator(check)


DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
TextOrNumber = Annotated[str, BeforeValidator(_number_as_text)]
Budget = Annotated[TextOrNumber, _read_by(lambda text: parse_budget(text, native=100))]
TokenBudget = Annotated[TextOrNumber, _read_by(token_budget)]
ReportFiles = Annotated[list[str], BeforeValidator(_one_as_list), AfterValidator(_check_reports)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ConvertStep(_Strict):
    """``kvtool convert``; fields are its flags. ``output`` may be given when the recipe is run."""

    uses: Literal["convert"]
    to: Literal["mla", "gqa", "mamba", "fp8-kv"]
    output: str | None = None
    method: Literal["aware", "transmla", "exact"] = "aware"
    target: Literal["transformers", "vllm", "kvtool"] = "transformers"
    kv_heads: Positive | None = None
    kv_budget: TokenBudget | None = None
    rope_dim: Annotated[int, Field(ge=2)] | None = None
    rank: Positive | None = None
    freqfold: TextOrNumber = "auto"
    layers: TextOrNumber | None = None
    heal: TextOrNumber | None = None
    teacher: str | None = None
    loss: Literal["forward-kl", "reverse-kl"] = "forward-kl"
    scales: Literal["tensor", "head"] = "tensor"
    smooth: bool = False
    turn_values: bool = False
    data: str | None = None
    tokens: Positive = 16384
    seed: Seed = 0
    dtype: DtypeName = "auto"
    shard_size: str = "2GB"
    verify: bool = True


class VerifyStep(_Strict):
    """``kvtool verify`` of the last conversion against the recipe's model."""

    uses: Literal["verify"]
    long_prompt: bool = True


class StatisticsStep(_Strict):
    """``kvtool calibrate statistics``; later steps find them in kvtool's cache."""

    uses: Literal["calibrate statistics"]
    data: str | None = None
    tokens: Positive = 16384
    window: Positive | None = None
    context: Positive | None = None
    sinks: Natural = 4
    chat_share: Share = 0.25
    seed: Seed = 0


class HeadsStep(_Strict):
    """``kvtool calibrate retrieval-heads``; ``output`` may be given when the recipe is run."""

    uses: Literal["calibrate retrieval-heads"]
    output: str | None = None
    method: Literal["ablation", "duo", "attention", "semantic", "entropy"] = "ablation"
    streaming_heads: TextOrNumber | None = None
    kv_budget: Budget | None = None
    context: Positive | None = None
    sink: Natural = 16
    window: Positive = 256
    prefill: Literal["dense", "streamed"] = "dense"
    lengths: list[Positive] | None = None
    samples: Positive | None = None
    data: str | None = None
    steps: Positive | None = None
    mix: Literal["self", "teacher"] | None = None
    penalty: NotNegative | None = None
    device: str = "auto"
    seed: Seed = 0


class BudgetsStep(_Strict):
    """``kvtool calibrate budgets``; ``output`` may be given when the recipe is run."""

    uses: Literal["calibrate budgets"]
    output: str | None = None
    kv_budget: Budget
    method: Literal["uniform", "pyramidkv", "adakv", "prefixkv", "compresskv", "uncomp", "mass"] = (
        "adakv"
    )
    policy: Literal["snapkv", "expected"] = "snapkv"
    context: Positive | None = None
    minimum: Positive = 64
    data: str | None = None
    tokens: Positive = 16384
    seed: Seed = 0


class ProjectionsStep(_Strict):
    """``kvtool calibrate projections``; ``output`` may be given when the recipe is run."""

    uses: Literal["calibrate projections"]
    output: str | None = None
    method: Literal["aware", "matryoshka", "cskv", "xkv", "palu", "asvd", "pca"] = "aware"
    kv_budget: Budget = "50%"
    context: Positive | None = None
    read: Literal["absorbed", "rebuilt"] | None = None
    layers_together: Positive | None = None
    bits: Positive | None = None
    train: TextOrNumber | None = None
    search_ranks: bool = False
    sink: Natural = 4
    window: Positive = 64
    prefill: Literal["dense", "streamed"] = "dense"
    data: str | None = None
    tokens: Positive = 16384
    seed: Seed = 0


class QuantizationStep(_Strict):
    """``kvtool calibrate quantization`` of the plan that a step before it made, if there is one."""

    uses: Literal["calibrate quantization"]
    output: str | None = None
    bits: TextOrNumber | None = None
    method: Literal["aware", "kivi", "rotatekv", "zipcache", "mikv", "gear", "mustafar"] = "aware"
    salient: TextOrNumber | None = None
    rank: Positive | None = None
    sparsity: TextOrNumber | None = None
    kv_budget: Budget | None = None
    context: Positive | None = None
    group: Positive | None = None
    read: Literal["absorbed", "rebuilt"] | None = None
    sink: Natural | None = None
    window: Natural | None = None
    prefill: Literal["dense", "streamed"] | None = None
    data: str | None = None
    tokens: Positive = 16384
    seed: Seed = 0


class ReceptiveFieldStep(_Strict):
    """``kvtool calibrate receptive-field`` of the plan of a step before it, if there is one."""

    uses: Literal["calibrate receptive-field"]
    output: str | None = None
    length: Annotated[int, Field(ge=2)]
    taught: Positive | None = None
    data: str | None = None
    tokens: Positive = 16384
    seed: Seed = 0


class DoubleSparsityStep(_Strict):
    """``kvtool calibrate double-sparsity`` of the plan of a step before it, if there is one."""

    uses: Literal["calibrate double-sparsity"]
    output: str | None = None
    channels: Positive = 16
    tokens_read: Positive = 256
    data: str | None = None
    tokens: Positive = 16384
    seed: Seed = 0


class EvaluateStep(_Strict):
    """``kvtool evaluate`` of the last plan or conversion against the recipe's model.

    ``output`` is one file or several.
    """

    uses: Literal["evaluate"]
    output: ReportFiles | None = None
    data: str | None = None
    windows: Positive | None = None
    prefill: Positive | None = None
    continuation: Positive | None = None
    quick: bool = False
    lengths: list[Positive] | None = None
    layers: bool = True
    chat_prompts: bool = True
    speed: bool = True
    max_kl: NotNegative | None = None
    max_ppl_ratio: NotNegative | None = None
    min_recall: Share | None = None
    min_chat_end: Share | None = None
    dtype: DtypeName = "auto"
    device: str = "auto"
    seed: Seed = 0


Step = Annotated[
    ConvertStep
    | VerifyStep
    | StatisticsStep
    | HeadsStep
    | BudgetsStep
    | ProjectionsStep
    | QuantizationStep
    | ReceptiveFieldStep
    | DoubleSparsityStep
    | EvaluateStep,
    Field(discriminator="uses"),
]
USES: dict[str, type[_Strict]] = {
    get_args(step.model_fields["uses"].annotation)[0]: step for step in get_args(get_args(Step)[0])
}
"""The step that each ``uses`` names."""
_PLANNING = {uses for uses in USES if uses.startswith("calibrate ")} - {"calibrate statistics"}


class Recipe(_Strict):
    """A model and the steps to take, in order.

    Conversions are of the model; steps behind one look at what it wrote.
    """

    kvtool: Literal[1]
    model: str
    revision: str | None = None
    steps: list[Step] = Field(min_length=1)


class _Constructor(RoundTripConstructor):
    """Says where a value is that only looks like a date or a number."""

    def construct_non_recursive_object(self, node: Any, tag: str | None = None) -> Any:
        """As in ruamel, which lets errors of Python through."""
        try:
            return super().construct_non_recursive_object(node, tag)
        except (ValueError, KeyError) as error:
            kind = node.tag.rpartition(":")[2]
            what = f"{_shown(node.value)} is no {kind}"
            raise ConstructorError(None, None, what, node.start_mark) from error


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file.

    Raises:
        RecipeError: The file is missing, not YAML, or does not follow the schema; the message
            starts with ``file:line:column``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"{path}: cannot be read as a recipe: {why}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str) -> Recipe:
    """Reads a recipe from *text*; *name* is what errors call it."""
    try:
        yaml = YAML(typ="rt")
        yaml.Constructor = _Constructor
        document = yaml.load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark is not None else name
        raise RecipeError(f"{where}: not valid YAML: {error.problem or error.context}") from error
    except YAMLError as error:
        raise RecipeError(f"{name}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: not a recipe: it is nested too deeply") from error
    if not isinstance(document, CommentedMap):
        raise RecipeError(
            f"{name}:1:1: a recipe is a mapping with the keys {_listed(_keys(Recipe))}"
        )
    try:
        recipe = Recipe.model_validate(_plain(document, itertools.count()))
    except ValidationError as error:
        raise _first_error(error, document, name) from error
    except RecursionError as error:
        raise RecipeError(f"{name}: not a recipe: an alias in it names what it lies in") from error
    except OverflowError as error:
        raise RecipeError(f"{name}: not a recipe: {error}") from error
    made: set[str] = set()
    for index, step in enumerate(recipe.steps):
        needed = {"verify": {"convert"}, "evaluate": {"convert", *_PLANNING}}.get(step.uses)
        if needed is not None and not needed & made:
            line, column = _position(document, ("steps", index))
            makers = " or ".join(f"'{maker}'" for maker in sorted(needed, reverse=True))
            raise RecipeError(
                f"{name}:{line}:{column}: '{step.uses}' comes before any {makers} step,"
                " so there is nothing to look at"
            )
        made.add(step.uses)
    return recipe


def dump_recipe(model: str, steps: Sequence[Mapping[str, Any]], revision: str | None = None) -> str:
    """The YAML text of a recipe; options that are None are left out.

    Paths are made absolute, so that the recipe replays the run from any folder.
    """
    document: dict[str, Any] = {"kvtool": SCHEMA_VERSION, "model": _absolute(model)}
    if revision is not None:
        document["revision"] = revision
    document["steps"] = [
        {
            key: _absolute(value) if key == "data" else value
            for key, value in step.items()
            if value is not None
        }
        for step in steps
    ]
    stream = io.StringIO()
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(document, stream)
    text = stream.getvalue()
    parse_recipe(text, "recipe")  # what cannot be read back must not be written
    return text


def _absolute(source: str) -> str:
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


def _plain(node: Any, seen: Iterator[int]) -> Any:
    """The same document in the built-in types that a strict schema insists on.

    Raises:
        OverflowError: Aliases of aliases make it larger than any recipe.
    """
    if next(seen) >= _MOST_VALUES:
        raise OverflowError(f"with its aliases written out it has over {_MOST_VALUES} values")
    if isinstance(node, Mapping):
        return {key: _plain(value, seen) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value, seen) for value in node]
    for builtin in (bool, int, float, str):
        if isinstance(node, builtin):
            return builtin(node)
    return node


def _first_error(error: ValidationError, document: CommentedMap, name: str) -> RecipeError:
    """The error to show: unknown keys first, since a typo also makes the right key missing."""
    found = []
    for details in error.errors():
        line, column = _position(document, details["loc"])
        found.append((details["type"] != "extra_forbidden", line, column, _message(details)))
    _, line, column, message = min(found)
    return RecipeError(f"{name}:{line}:{column}: {message}")


def _message(details: ErrorDetails) -> str:
    location, kind = details["loc"], details["type"]
    key = location[-1] if location else ""
    if kind == "extra_forbidden":
        known = _keys_at(location)
        close = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
        advice = f"did you mean '{close[0]}'?" if close else f"known are {_listed(known)}"
        return f"unknown key {_shown(key)} ({advice})"
    if kind == "missing":
        return f"the key '{key}' is missing"
    if kind == "union_tag_not_found":
        return f"the key 'uses' is missing; it names the step: {_listed(USES)}"
    if kind == "union_tag_invalid":
        given = (details.get("ctx") or {}).get("tag")
        return f"unknown step {_shown(given)} (known are {_listed(USES)})"
    if key == "kvtool":
        given = _shown(details["input"])
        return f"this kvtool reads recipes of version {SCHEMA_VERSION}, not {given}"
    wanted = details["msg"].removeprefix("Value error, ")
    wanted = wanted[:1].lower() + wanted[1:]
    if len(wanted) > 240:  # it quotes the value, too
        wanted = f"{wanted[:80]} … {wanted[-120:]}"
    if kind == "model_attributes_type":
        wanted = "a step is a mapping with the key 'uses'"
    what = f"step {key + 1}" if isinstance(key, int) and len(location) == 2 else f"'{key}'"
    return f"{what} is {_shown(details['input'])}: {wanted}"


def _shown(value: Any) -> str:
    """As Python writes it, cut where it fills more than a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


def _position(document: CommentedMap, location: Iterable[str | int]) -> tuple[int, int]:
    """Line and column, from 1, of the deepest part of *location* that the document has."""
    node: Any = document
    line, column = 0, 0
    for part in location:
        if isinstance(node, CommentedMap) and part in node:
            line, column = node.lc.key(part)
        elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
            line, column = node.lc.item(part)
        else:
            # The name of the step's kind, which pydantic puts into the path, or a missing key.
            continue
        node = node[part]
    return line + 1, column + 1


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    return _keys(USES[str(location[2])] if len(location) > 3 else Recipe)


def _keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
