"""Whatever a file says, it is read, or refused by an error that is meant for the user."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from kvtool.checkpoint import Checkpoint
from kvtool.errors import KvtoolError
from kvtool.evaluate.compare import compare
from kvtool.factored import model_config
from kvtool.recipe import parse_recipe
from kvtool.rope import ropes_of

STEPS: list[dict[str, Any]] = [
    {"uses": "convert", "to": "mla", "kv_budget": "50%", "verify": False},
    {"uses": "evaluate", "output": ["r.json"], "max_kl": 0.5},
]
RECIPE = {"kvtool": 1, "model": "smollm2", "steps": STEPS}
REPORT = {
    "format_version": 3,
    "source": "a",
    "base": "m",
    "settings": {"windows": 1, "prefill": 64, "passkey_lengths": [64]},
    "environment": {"dtype": "float32"},
    "cache": {"bytes_per_token_bf16": 8},
    "divergence": {
        "kl": {"value": 0.1, "standard_error": 0.01},
        "perplexity_ratio": {"value": 1.1, "standard_error": None},
        "base_perplexity": {"value": 9.0},
        "base_cache_bytes": 100,
    },
    "speed": {"ours": {"decode_tokens_per_second": 3.0}, "dense": None},
    "chat": {"max_new_tokens": 4, "prompts": ["a"]},
    "bytes_share": 0.5,
    "recall_share": 1.0,
    "chat_share": None,
}


def mutations(document: Any) -> Iterator[tuple[str, Any]]:
    """The document with each of its values left out, or replaced by one of another kind."""
    for path in paths(document):
        yield f"{path} left out", changed(document, path)
        for value in (None, -1, 2**70, float("nan"), "x" * 5000, {"a": [None]}):
            yield f"{path} is {str(value)[:20]}", changed(document, path, value)


def paths(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from paths(child, (*path, key))


def changed(document: Any, path: tuple[Any, ...], *value: Any) -> Any:
    """With that value; without a value, without the key."""
    node = document = copy.deepcopy(document)
    for key in path[:-1]:
        node = node[key]
    if value:
        node[path[-1]] = value[0]
    else:
        del node[path[-1]]
    return document


def refused(said: str, read: Callable[[], object]) -> str | None:
    """How it is refused, if it is; whatever else goes wrong is a bug, at this mutation."""
    try:
        read()
    except KvtoolError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(said) from error
    return None


def test_a_config_of_any_values(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny("llama"), model)
    file = model / "config.json"

    def read() -> None:
        ropes_of(model_config(Checkpoint.open(str(model))))

    assert refused("unchanged", read) is None
    for said, config in mutations(json.loads(file.read_text())):
        if "num_hidden_layers" not in said:  # so many as it says are built, one by one
            file.write_text(json.dumps(config))
            refused(said, read)


def test_a_recipe_of_any_values() -> None:
    for said, recipe in mutations(RECIPE):
        text = json.dumps(recipe).replace("NaN", ".nan")  # YAML knows JSON
        message = refused(said, partial(parse_recipe, text, "r.yaml"))
        assert len(message or "") < 400, said  # it lists what is known
        assert message is None or message.startswith("r.yaml:1:"), said


def test_a_report_of_any_values(tmp_path: Path) -> None:
    file, other = tmp_path / "a.json", tmp_path / "b.json"
    other.write_text(json.dumps(REPORT))
    assert refused("unchanged", partial(compare, [other, other])) is None
    for said, report in mutations(REPORT):
        file.write_text(json.dumps(report))
        refused(said, lambda: compare([file, other]).table())
