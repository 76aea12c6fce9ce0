"""Plans: sizes are exact, slices are nested, and no file can do more than be refused."""

import copy
import errno
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _code_tools
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config

from kvtool.bits import Bits
from kvtool.checkpoint import Checkpoint
from kvtool.codes import CodePlan, code_shapes
from kvtool.errors import PlanError, UnsupportedModelError, UsageError
from kvtool.fp8 import Scales
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Base, Plan, base_of, check_can_drop
from kvtool.plan_file import FORMAT_VERSION, check_plan_output
from kvtool.sizes import parse_budget, parse_share
from kvtool.slices import compose, cut, ring_of, stream_heads
from kvtool.sparse import SparseReading
from kvtool.states import StatePlan

Tiny = Callable[..., Path]
BASE = Base("m", "f", "c", layers=3, kv_heads=2, head_dim=16)
FULL = LayerPlan((False, False))
SPARSE = SparseReading(((3, 1), (0, 15)), 32)
READ = replace(FULL, sparse=SPARSE)
SCORES = torch.tensor([[0.5, 0.1], [0.1, 0.9], [0.2, 0.3]])
SCORED = Plan(BASE, (FULL,) * 3, scores=SCORES, provenance=({"method": "duo", "seed": 0},))
BUDGETS = Plan(
    BASE,
    (LayerPlan((False, False), budget=(5, None)), FULL, LayerPlan((False, False), budget=(7, 9))),
    policy="snapkv",
    provenance=({"method": "budgets"},),
)

names = st.text(st.characters(codec="utf-8"), max_size=8)
numbers = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | names
objects = st.dictionaries(
    names, st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(names, x), max_leaves=4)
)
tokens = st.integers(1, 2**20)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers, heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    planned = []
    for _ in range(layers):
        streaming = tuple(draw(st.lists(st.booleans(), min_size=heads, max_size=heads)))
        budget = tuple(None if s else draw(st.none() | tokens) for s in streaming)
        reading = None
        if not any(budget) and draw(st.booleans()):
            reading = SparseReading(((0,),) * heads, draw(st.integers(64, 2**20)), 8, 32)
        sink, window = draw(st.integers(0, 64)), draw(tokens)
        planned.append(LayerPlan(streaming, sink, window, budget, sparse=reading))
    scores = None
    if draw(st.booleans()):
        values = st.floats(allow_nan=False, allow_infinity=False, width=32)
        flat = draw(st.lists(values, min_size=layers * heads, max_size=layers * heads))
        scores = torch.tensor(flat, dtype=torch.float32).view(layers, heads)
    return Plan(
        Base(draw(names), draw(names), draw(names), layers, heads, draw(st.integers(1, 256))),
        tuple(planned),
        draw(st.sampled_from(["dense", "streamed"])),
        "expected" if any(layer.budget for layer in planned) else None,
        tuple(draw(st.lists(objects, max_size=2))),
        scores,
    )


@st.composite
def coded_plans(draw: st.DrawFn) -> Plan:
    base = Base("m", "f", "c", draw(st.integers(1, 4)), draw(st.integers(1, 2)), 2)
    codes: list[CodePlan] = []
    tensors: dict[str, torch.Tensor] = {}
    left = base.layers
    while left:
        layers, kind = draw(st.integers(1, left)), draw(st.sampled_from(["rotated", "unrotated"]))
        parts = draw(st.integers(1, 2))
        full = layers * base.channels * 2 // parts
        rows = [draw(st.integers(1, full)) for _ in range(parts)]
        widths = tuple(draw(st.integers(1, n)) for n in rows)
        code = CodePlan(kind, layers, widths, draw(st.integers(0, 64)), draw(st.integers(1, 64)))
        for name, shape in code_shapes(len(codes), code, base.channels, rows).items():
            tensors[name] = torch.full(shape, float(draw(st.integers(-3, 3))))
        codes.append(code)
        left -= layers
    plain = LayerPlan((False,) * base.kv_heads)
    return Plan(
        base,
        (plain,) * base.layers,
        codes=tuple(codes),
        allocation=draw(st.sampled_from(["even", "spectrum"])),
        tensors=tensors,
    )


def packed(document: Any, tensors: dict[str, Any] | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with any header and data whatsoever."""
    text = document if isinstance(document, str) else json.dumps(document)
    header = json.dumps({"__metadata__": {"kvtool_plan": text}} | (tensors or {})).encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path to write to again and again."""
    return tmp_path_factory.mktemp("plans") / "any.plan"


@pytest.fixture(scope="module")
def valid(file: Path) -> bytes:
    """The bytes of a plan that has everything."""
    plan = replace(stream_heads(SCORED, 2, 4, 8), layers=(FULL, *SCORED.layers[1:]))
    plan = compose(plan, BUDGETS)
    first, second, third = plan.layers
    plan = replace(plan, layers=(first, replace(second, sparse=SPARSE), third))
    plan.write(file, overwrite=True)
    return file.read_bytes()


@pytest.fixture(scope="module")
def document(valid: bytes) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(header_of(valid)["__metadata__"]["kvtool_plan"])
    return content


def header_of(content: bytes) -> dict[str, Any]:
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    return header


def coded_plan() -> Plan:
    """Two layers that share a code of keys and one of values, and one whose code is of both."""
    codes = (CodePlan("rotated", 2, (3, 2)), CodePlan("rotated", 1, (4,)))
    tensors = {
        name: torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        for index, (code, rows) in enumerate(zip(codes, ([4, 3], [6]), strict=True))
        for name, shape in code_shapes(index, code, 4, rows).items()
    }
    base = replace(BASE, head_dim=2)
    return Plan(base, (FULL,) * 3, codes=codes, allocation="even", tensors=tensors)


@pytest.fixture(scope="module")
def coded(file: Path) -> bytes:
    """The bytes of a plan of codes."""
    file.unlink(missing_ok=True)
    coded_plan().write(file)
    return file.read_bytes()


# --------------------------------------------------------------------------------- the file


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plan=plans())
def test_what_is_written_is_read_back_and_written_again_with_the_same_bytes(
    plan: Plan, file: Path
) -> None:
    file.unlink(missing_ok=True)
    plan.write(file)
    written = file.read_bytes()
    again = Plan.read(file)
    assert (again.base, again.base.source) == (plan.base, plan.base.source)
    assert again.layers == plan.layers
    assert (again.prefill, again.policy) == (plan.prefill, plan.policy)
    assert again.provenance == plan.provenance
    assert (again.scores is None) == (plan.scores is None)
    if plan.scores is not None and again.scores is not None:
        assert again.scores.equal(plan.scores)
    again.write(file, overwrite=True)
    assert file.read_bytes() == written


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plan=coded_plans())
def test_codes_are_read_back_and_written_again_with_the_same_bytes(plan: Plan, file: Path) -> None:
    file.unlink(missing_ok=True)
    plan.write(file)
    written = file.read_bytes()
    again = Plan.read(file)
    assert (again.base, again.layers, again.codes) == (plan.base, plan.layers, plan.codes)
    assert again.allocation == plan.allocation
    assert again.tensors.keys() == plan.tensors.keys()
    assert all(tensor.equal(plan.tensors[name]) for name, tensor in again.tensors.items())
    again.write(file, overwrite=True)
    assert file.read_bytes() == written


def test_only_a_plan_with_something_new_needs_a_new_kvtool(tmp_path: Path) -> None:
    read = replace(SCORED, layers=(FULL, READ, FULL))
    for name, plan, version in (("heads", SCORED, 1), ("codes", coded_plan(), 3), ("few", read, 6)):
        plan.write(tmp_path / name)
        header = header_of((tmp_path / name).read_bytes())
        document = json.loads(header["__metadata__"]["kvtool_plan"])
        assert document["format_version"] == version
        assert ("codes" in document) == (version == 3)
        assert ["sparse" in layer for layer in document["layers"]] == [False, version == 6, False]


def test_the_order_of_keys_does_not_change_the_file(tmp_path: Path) -> None:
    for name, entry in (("a", {"x": 1, "y": 2}), ("b", {"y": 2, "x": 1})):
        replace(SCORED, provenance=(entry,)).write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plans_that_mean_the_same_are_equal() -> None:
    assert LayerPlan((False,), 4, 8, (None,)) == LayerPlan((False,))
    assert LayerPlan((False,)).plain
    assert not LayerPlan((True,), 4, 8).plain
    assert not LayerPlan((False,), budget=(3,)).plain
    assert not READ.plain


def test_nothing_is_replaced_unless_asked_for_and_then_only_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan"
    SCORED.write(path)
    with pytest.raises(UsageError, match="exists already") as caught:
        SCORED.write(path)
    assert "--overwrite" in str(caught.value.hint)
    BUDGETS.write(path, overwrite=True)
    assert Plan.read(path).policy == "snapkv"
    for content in (b"", b"text", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="not a plan"):
            SCORED.write(path, overwrite=True)
        assert path.read_bytes() == content
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="not a plan"):
        SCORED.write(path, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]


def test_an_impossible_output_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="folder"):
        check_plan_output(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="does not exist"):
        check_plan_output(tmp_path / "missing" / "plan")
    check_plan_output(tmp_path / "plan")
    # Permissions of files do not bind whoever runs tests as root.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UsageError, match="permission is denied"):
        check_plan_output(tmp_path / "plan")


def test_a_provenance_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    for value in (math.nan, math.inf, torch.zeros(1), {1: 0, "1": 0}, {"a"}):
        with pytest.raises(PlanError, match="JSON"):
            replace(SCORED, provenance=({"x": value},))
    deep: Any = 0
    for _ in range(500):
        deep = [deep]
    with pytest.raises(PlanError):
        replace(SCORED, provenance=({"x": deep},)).write(tmp_path / "plan")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- the fuzz


def read_or_refuse(file: Path, content: bytes) -> bool:
    """Whether `content` is a plan; if it is, it works, and if not, the refusal names the file."""
    file.write_bytes(content)
    try:
        plan = Plan.read(file)
    except PlanError as error:
        refusal = str(error)
    else:
        plan.cache_bytes(4096, 2)
        plan.write(file, overwrite=True)
        return True
    assert refusal.startswith(f"{file}: ")
    assert len(refusal) < 1000 + len(str(file))
    return False


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "delete"]), st.floats(0, 1), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=3,
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(edits=edits, codes=st.booleans())
def test_a_damaged_file_is_refused(
    edits: list[Any], codes: bool, file: Path, valid: bytes, coded: bytes
) -> None:
    content = bytearray(coded if codes else valid)
    for kind, where, data in edits:
        at = int(where * (len(content) - 1)) if content else 0
        if kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = data
        elif kind == "delete":
            del content[at : at + 1 + len(data)]
        else:
            content[at : at + len(data)] = data
    read_or_refuse(file, bytes(content))


@settings(derandomize=True, deadline=None, max_examples=100)
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(content: bytes, file: Path) -> None:
    assert not read_or_refuse(file, content)


odd = st.sampled_from(
    [
        *(None, True, -1, 0, 1, 2**31, 2**63, 10**4000, 1.5, math.nan, math.inf, "", "full"),
        *([], {}, [[]], [None], [1, 2, 3], {"kind": "streaming"}, {"kind": "full", "sink": 1}),
    ]
)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(data=st.data(), codes=st.booleans())
def test_a_document_with_anything_anywhere_is_refused_or_works(
    data: st.DataObject, codes: bool, file: Path, document: dict[str, Any], coded: bytes
) -> None:
    changed = json.loads(json.dumps(document))
    stored, tail = {}, b""
    if codes:
        stored = header_of(coded)
        changed = json.loads(stored.pop("__metadata__")["kvtool_plan"])
        tail = coded[8 + struct.unpack("<Q", coded[:8])[0] :]
    for _ in range(data.draw(st.integers(1, 2))):
        node = changed
        while True:
            key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(3)))
            inside = node.get(key) if isinstance(node, dict) else node[key % len(node)]
            if not isinstance(inside, dict | list) or not inside or data.draw(st.booleans()):
                break
            node = inside
        if isinstance(node, list):
            key %= len(node)
        action = data.draw(st.sampled_from(["set", "delete", "repeat", "rename"]))
        if action == "set":
            node[key] = copy.deepcopy(data.draw(odd))
        elif isinstance(node, list):
            node[key:] = [] if action == "delete" else node[key:] * 2
        else:
            taken = node.pop(key)
            if action != "delete":
                node[data.draw(names)] = taken
        if not changed:
            break
    read_or_refuse(file, packed(changed, stored, tail))


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        ("format_version", f"{FORMAT_VERSION + 1}", "newer kvtool"),
        ("format_version", "2", "whose codes are not read"),
        ("format_version", "0", "no kvtool has written"),
        ("allocation", '"even"', "come together"),
        ("codes", "[{}]", "codes"),
        ("format_version", "true", "format_version"),
        ("prefill", '"lazy"', "prefill"),
        ("policy", "null", "no policy"),
        ("policy", '"random"', "policy"),
        ("layers", "[]", "0 layers are planned"),
        ("layers", "{}", "layers"),
        ("more", "1", "more"),
        ("provenance", "[NaN]", "provenance"),
        ("provenance", '[{"x": NaN}]', "JSON"),
        ("provenance", '[{"x": -Infinity}]', "JSON"),
        ("provenance", '[{"x": 1e999}]', "JSON"),
        ("provenance", '[{"x": "\\ud800"}]', "JSON"),
        ("provenance", '[{"x": ' + "9" * 5000 + "}]", "JSON"),
        ("provenance", '[{"x": ' + "[" * 10**5 + "]" * 10**5 + "}]", "recursion"),
        ("provenance", '{"x": ' * 10**5, "recursion"),
    ],
)
def test_a_document_that_breaks_the_rules_is_refused_with_the_reason(
    where: str, value: str, complaint: str, file: Path, document: dict[str, Any]
) -> None:
    text = json.dumps({**document, where: "@"}).replace('"@"', value)
    file.write_bytes(packed(text))
    with pytest.raises(PlanError, match=complaint) as caught:
        Plan.read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", ["-1", "8.0", '"8"', "true", "null", "2147483648", "9" * 4000])
@pytest.mark.parametrize("where", ["sink", "window", "budget", "kv_heads"])
def test_what_counts_tokens_or_heads_is_a_whole_number_of_sensible_size(
    where: str, value: str, file: Path, document: dict[str, Any]
) -> None:
    ring = {"kind": "streaming", "sink": 4, "window": 8} | {where: "@"}
    layer: dict[str, Any] = {"heads": [ring, {"kind": "full"}], "budget": None}
    if where == "budget":
        layer = {"heads": [{"kind": "full"}] * 2, "budget": ["@", 8]}
    if where == "kv_heads":
        layer = document["layers"][2]
        document = {**document, "base": {**document["base"], "kv_heads": "@"}}
    document = {**document, "layers": [*document["layers"][:2], layer]}
    file.write_bytes(packed(json.dumps(document).replace('"@"', value)))
    if (where, value) == ("budget", "null"):
        assert Plan.read(file).layers[2].budget == (None, 8)
        return
    with pytest.raises(PlanError, match=where):
        Plan.read(file)


def test_a_refusal_stays_short_whatever_the_file_holds(
    file: Path, document: dict[str, Any]
) -> None:
    long = "x" * 10**5
    assert not read_or_refuse(file, packed({**document, long: 1}))
    assert not read_or_refuse(file, packed(document, {long: tensors([2])["layers.0.heads.score"]}))


def test_heads_of_a_layer_that_stream_differently_are_refused(
    file: Path, document: dict[str, Any]
) -> None:
    rings = [{"kind": "streaming", "sink": 4, "window": window} for window in (8, 9)]
    document = {**document, "layers": [*document["layers"][:2], {"heads": rings, "budget": None}]}
    file.write_bytes(packed(document))
    with pytest.raises(PlanError, match="layer 2: its streaming heads differ"):
        Plan.read(file)


def tensors(shape: list[int], dtype: str = "F32", layers: int = 3, size: int = 8) -> dict[str, Any]:
    return {
        f"layers.{i}.heads.score": {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(layers)
    }


@pytest.mark.parametrize(
    ("stored", "data", "complaint"),
    [
        (tensors([2], layers=2), b"\0" * 16, "layers.2.heads.score is missing"),
        (tensors([2], layers=4), b"\0" * 32, "a tensor that no plan has: layers.3"),
        (tensors([1, 2]), b"\0" * 24, "instead of"),
        (tensors([1], "F64"), b"\0" * 24, "instead of"),
        (tensors([2], "I32"), b"\0" * 24, "instead of"),
        (tensors([16], "F4"), b"\0" * 24, "instead of"),
        (tensors([2**62, 0], size=0), b"", "instead of"),
        (tensors([2]), b"\0" * 20 + struct.pack("<f", math.nan), "not all finite"),
        (tensors([2]), b"\0" * 20 + struct.pack("<f", math.inf), "not all finite"),
        (tensors([2]), b"\0" * 23, "no safetensors file"),
    ],
)
def test_scores_that_do_not_fit_the_model_are_refused(
    stored: dict[str, Any], data: bytes, complaint: str, file: Path, document: dict[str, Any]
) -> None:
    file.write_bytes(packed(document, stored, data))
    with pytest.raises(PlanError, match=complaint):
        Plan.read(file)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"codes.0.keys.spectrum": None}, "codes.0.keys.spectrum is missing, though a code needs"),
        ({"codes.1.joint.mean": None}, "codes.1.joint.mean is missing, though a code needs it"),
        ({"codes.1.joint.encode": torch.ones(6, 7)}, "instead of F32"),
        ({"codes.1.joint.encode": torch.ones(6, 8).half()}, "is F16"),
        ({"codes.1.joint.spectrum": torch.ones(())}, "instead of F32"),
        ({"codes.1.joint.spectrum": torch.ones(3)}, "instead of F32"),
        ({"codes.2.joint.spectrum": torch.ones(3)}, "a tensor that no plan has: codes.2"),
        ({"codes.0.joint.mean": torch.ones(3)}, "a tensor that no plan has: codes.0.joint"),
        ({"layers.0.heads.score": torch.ones(2)}, "layers.1.heads.score is missing"),
        ({"codes.1.joint.mean": torch.full((8,), torch.inf)}, "not finite"),
    ],
)
def test_tensors_that_no_code_has_are_refused(
    change: dict[str, Any], complaint: str, file: Path, coded: bytes
) -> None:
    text = header_of(coded)["__metadata__"]["kvtool_plan"]
    merged = dict(coded_plan().tensors) | change
    stored = {name: tensor.contiguous() for name, tensor in merged.items() if tensor is not None}
    save_file(stored, file, {"kvtool_plan": text})
    with pytest.raises(PlanError, match=complaint):
        Plan.read(file)


def test_what_is_no_plan_at_all_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    huge = tmp_path / "huge"
    huge.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    weights = tiny("llama") / "model.safetensors"
    for path in (tmp_path, tmp_path / "missing", tmp_path / ("x" * 300), loop, huge, weights):
        with pytest.raises(PlanError) as caught:
            Plan.read(path)
        assert str(caught.value).startswith(f"{path}: ")


# ----------------------------------------------------------------------------------- sizes


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plan=plans(), prompt=st.integers(0, 2**21), itemsize=st.sampled_from([1, 2, 4]))
def test_bytes_are_those_of_every_head_added_up(plan: Plan, prompt: int, itemsize: int) -> None:
    each = 2 * itemsize * plan.base.head_dim  # a key and a value
    total = further = 0
    for layer in plan.layers:
        for head in range(plan.base.kv_heads):
            if layer.streaming[head]:
                total += each * (layer.sink + layer.window)
                continue
            budget = layer.budget[head] if layer.budget is not None else None
            total += each * (prompt if budget is None or budget > prompt else budget)
            further += each
    assert plan.cache_bytes(prompt, itemsize) == total
    assert plan.bytes_per_token(itemsize) == further
    full = Plan(plan.base, (LayerPlan((False,) * plan.base.kv_heads),) * plan.base.layers)
    assert full.cache_bytes(prompt, itemsize) == full.native_bytes(prompt, itemsize)
    assert full.native_bytes(1, itemsize) == full.bytes_per_token(itemsize)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plan=coded_plans(), tokens=st.integers(0, 2**21), itemsize=st.sampled_from([1, 2, 4]))
def test_bytes_of_codes_are_those_of_every_token_and_ring(
    plan: Plan, tokens: int, itemsize: int
) -> None:
    rings = sum(
        ring.sink + ring.window for ring in plan.rings
    )  # one in each layer, of keys and values
    stored = sum(width for code in plan.codes for width in code.widths)
    total = stored * tokens + 2 * plan.base.channels * rings
    assert plan.cache_bytes(tokens, itemsize) == itemsize * total
    assert plan.bytes_per_token(itemsize) == itemsize * stored


def streaming(plan: Plan) -> set[tuple[int, int]]:
    """The (layer, head) that stream."""
    return {
        (index, head)
        for index, layer in enumerate(plan.layers)
        for head in range(plan.base.kv_heads)
        if layer.streaming[head]
    }


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plan=plans())
def test_the_lowest_scores_stream_and_slices_are_nested(plan: Plan) -> None:
    if plan.scores is None:
        return
    plan = replace(plan, policy=None, layers=tuple(replace(x, budget=None) for x in plan.layers))
    smaller: set[tuple[int, int]] = set()
    for count in range(plan.planned_heads + 1):
        sliced = stream_heads(plan, count, 4, 8)
        chosen = streaming(sliced)
        assert len(chosen) == sliced.streaming_heads == count
        assert smaller <= chosen
        rest = {divmod(i, plan.base.kv_heads) for i in range(plan.planned_heads)} - chosen
        assert plan.scores is not None
        if chosen and rest:
            assert max(plan.scores[i] for i in chosen) <= min(plan.scores[i] for i in rest)
        for layer in sliced.layers:
            assert (layer.sink, layer.window) == ((4, 8) if any(layer.streaming) else (0, 0))
        assert sliced.scores is plan.scores
        smaller = chosen


def test_among_equal_scores_the_earlier_head_streams_first() -> None:
    assert streaming(stream_heads(SCORED, 1, 4, 8)) == {(0, 1)}
    assert streaming(stream_heads(SCORED, 2, 4, 8)) == {(0, 1), (1, 0)}


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    like=st.integers(0, 6),
    off=st.sampled_from([-1, 0, 1]),
    context=st.integers(1, 40),
    count=st.integers(1, 6),
)
def test_a_cut_fits_its_budget_and_one_streaming_head_less_would_not(
    like: int, off: int, context: int, count: int
) -> None:
    plan = stream_heads(SCORED, count, 4, 8)
    sizes = [stream_heads(plan, n, 4, 8).cache_bytes(context, 2) for n in range(7)]
    budget = sizes[like] + off
    fitting = [n for n, size in enumerate(sizes) if size <= budget]
    if not fitting:
        with pytest.raises(UsageError, match="too small"):
            cut(plan, budget, context, 2)
        return
    smaller = cut(plan, budget, context, 2)
    assert smaller.streaming_heads == min(fitting)
    assert smaller.cache_bytes(context, 2) == sizes[min(fitting)]


def test_what_cannot_be_sliced_is_refused_with_the_reason() -> None:
    for plan, complaint in (
        (replace(SCORED, scores=None), "no scores"),
        (compose(stream_heads(SCORED, 2, 4, 8), BUDGETS), "token budgets"),
        (replace(SCORED, layers=(replace(FULL, bits=Bits(4, 4)),) * 3), "bits of the plan"),
    ):
        with pytest.raises(PlanError, match=complaint):
            stream_heads(plan, 1, 4, 8)
    for count in (-1, 7):
        with pytest.raises(UsageError, match="6"):
            stream_heads(SCORED, count, 4, 8)
    with pytest.raises(PlanError, match="no head streams"):
        cut(SCORED, 10**6, 4096, 2)
    for plan in (replace(SCORED, scores=None), BUDGETS):
        with pytest.raises(PlanError) as caught:
            cut(plan, 10**6, 4096, 2)
        assert "can be cut" in (caught.value.hint or "")
    mixed = (LayerPlan((True, False), 4, 8), LayerPlan((True, False), 4, 9), FULL)
    with pytest.raises(PlanError, match="different windows"):
        cut(replace(SCORED, layers=mixed), 10**6, 4096, 2)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (((True,), 4, 0), "window"),
        (((True,), -1, 8), "sinks"),
        (((True,), 4, 8, (5,)), "streams"),
        (((False,), 0, 0, (0,)), "budget of 0"),
        (((False,), 0, 0, (1, 2)), "2 budgets"),
        (((False,), 0, 0, None, None, None, SPARSE), "label channels of 2 heads for 1"),
        (((False, True), 4, 8, (5, None), None, None, SPARSE), "not read sparsely"),
        (((False,) * 2, 0, 0, None, Bits(4, 4), None, SPARSE), "not read sparsely"),
        (((), 0, 0, None, None, StatePlan(1, 1, 1, 1, 1), SPARSE), "label channels of 2 heads"),
    ],
)
def test_a_layer_that_contradicts_itself_cannot_be_made(layer: Any, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        LayerPlan(*layer)


@pytest.mark.parametrize(
    ("reading", "complaint"),
    [
        (((), 32), "at least one"),
        ((((), ()), 32), "at least one"),
        ((((1, 2), (3,)), 32), "as many label channels"),
        ((((1, 2), (3, 3)), 32), "twice"),
        ((((1,),), 0), "0 tokens are too few"),
        ((((1,),), 19), "19 tokens are too few"),
        ((((1,),), 19, -1), "-1 sinks"),
        ((((1,),), 19, 4, 0), "window of 0"),
    ],
)
def test_a_sparse_reading_out_of_range_cannot_be_made(reading: Any, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        SparseReading(*reading)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers": (FULL,) * 2}, "2 layers"),
        ({"layers": (LayerPlan((False,)),) * 3}, "1 KV heads of 2"),
        ({"policy": "snapkv"}, "no token budget"),
        ({"layers": BUDGETS.layers}, "no policy"),
        ({"scores": SCORES.double()}, "float64"),
        ({"scores": SCORES.T}, r"\[2, 3\]"),
        ({"scores": SCORES / 0}, "finite"),
        ({"base": replace(BASE, head_dim=0)}, "size 0"),
        ({"base": replace(BASE, head_dim=15), "layers": (READ,) * 3}, "label channel 15 of 15"),
    ],
)
def test_a_plan_that_contradicts_itself_cannot_be_made(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        replace(SCORED, **change)


# --------------------------------------------------------------------------------- together


def test_composing_takes_heads_from_one_plan_and_budgets_from_the_other() -> None:
    heads = stream_heads(SCORED, 3, 4, 8)  # the second head of layer 0, the first of 1 and 2
    both = compose(heads, BUDGETS)
    assert both.layers == (
        LayerPlan((False, True), 4, 8, (5, None)),
        LayerPlan((True, False), 4, 8),
        LayerPlan((True, False), 4, 8, (None, 9)),
    )
    assert both.policy == "snapkv"
    assert both.provenance == heads.provenance + BUDGETS.provenance
    assert both.scores is heads.scores
    assert compose(heads, replace(SCORED, scores=None)).layers == heads.layers


def test_the_heads_say_how_prompts_are_read() -> None:
    streamed = replace(stream_heads(SCORED, 3, 4, 8), prefill="streamed")
    assert compose(streamed, BUDGETS).prefill == "streamed"


def test_a_plan_without_streaming_heads_is_sliced_with_what_it_was_calibrated_for() -> None:
    measured = replace(SCORED, provenance=({"options": {"sink": 2, "window": 16}},))
    assert ring_of(measured) == (2, 16)
    assert ring_of(stream_heads(measured, 3, *ring_of(measured))) == (2, 16)
    for options in (None, [], {"sink": "2", "window": 16}, {"sink": 2, "window": 0}):
        with pytest.raises(PlanError, match="no head streams"):
            _ = ring_of(replace(SCORED, provenance=({"options": options},)))


def test_label_channels_stay_whatever_heads_stream_and_are_not_composed() -> None:
    read = replace(SCORED, layers=(READ,) * 3)
    sliced = stream_heads(read, 3, 4, 8)
    assert [layer.sparse for layer in sliced.layers] == [SPARSE] * 3
    assert sliced.streaming_heads == 3
    assert [x.streaming for x in stream_heads(SCORED, 3, 4, 8).layers] == [
        x.streaming for x in sliced.layers
    ]
    assert cut(sliced, sliced.cache_bytes(4096, 2), 4096, 2).layers == sliced.layers
    for one, other in ((read, BUDGETS), (stream_heads(SCORED, 3, 4, 8), read)):
        with pytest.raises(PlanError, match="label channels come last"):
            compose(one, other)


def test_a_policy_goes_with_the_last_budget() -> None:
    everything = compose(stream_heads(SCORED, 6, 4, 8), BUDGETS)
    assert everything.policy is None
    assert all(layer.budget is None for layer in everything.layers)


def test_plans_that_do_not_belong_together_are_refused() -> None:
    heads = stream_heads(SCORED, 3, 4, 8)
    for one, other, complaint in (
        (heads, replace(BUDGETS, base=replace(BASE, fingerprint="g")), "different models"),
        (heads, heads, "both plans choose heads"),
        (BUDGETS, BUDGETS, "both plans have token budgets"),
        (compose(heads, BUDGETS), heads, "both plans choose heads"),
        (compose(heads, BUDGETS), BUDGETS, "both plans have token budgets"),
        (BUDGETS, heads, "wrong order"),
        (SCORED, heads, "wrong order"),
        (BUDGETS, SCORED, "wrong order"),
    ):
        with pytest.raises(PlanError, match=complaint):
            compose(one, other)
    renamed = replace(BUDGETS, base=replace(BASE, source="another name of the same model"))
    assert compose(heads, renamed).base.source == "m"


# ---------------------------------------------------------------------------------- the model


def full_plan(base: Base) -> Plan:
    return Plan(base, (LayerPlan((False,) * base.kv_heads),) * base.layers)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_plan_knows_its_model_and_no_other(family: str, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny(family)))
    base = base_of(checkpoint)
    assert (base.layers, base.kv_heads, base.head_dim) == (3, 2, 16)
    plan = full_plan(base)
    plan.check_base(checkpoint)
    for overrides, complaint in (
        ({"num_key_value_heads": 4}, "3 layers, 2 KV heads of size 16, the model has 3 layers, 4"),
        ({"rms_norm_eps": 1e-5}, "not their configs"),
    ):
        other = Checkpoint.open(str(tiny(family, **overrides)))
        with pytest.raises(PlanError, match=complaint) as caught:
            plan.check_base(other)
        assert checkpoint.source in str(caught.value)
        assert other.source in str(caught.value)
        assert "Calibrate again" in str(caught.value.hint)


def test_what_is_kept_exactly_fits_into_the_context_of_the_model(tiny: Tiny) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))  # of 512 tokens
    base, scales = base_of(checkpoint), Scales((1.0, 1.0), (1.0, 1.0))

    def kept(exact: int) -> list[Plan]:
        layers = (
            LayerPlan((True, False), 12, exact - 12),
            replace(FULL, bits=Bits(4, 4, group=64, sink=4, window=exact - 68)),
            replace(FULL, scales=replace(scales, window=exact)),
        )
        code = _code_tools.coded(checkpoint, sink=12, window=exact - 12)
        return [code, *(Plan(base, (layer,) * 3) for layer in layers)]

    for plan in kept(512):
        plan.check_context(checkpoint)
    for plan in kept(513):
        with pytest.raises(PlanError, match="layer 0 keeps 513 tokens exactly, more than the 512"):
            plan.check_context(checkpoint)


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with another config."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_plan_notices_other_weights_but_not_another_folder(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(tiny("llama")))
    plan = full_plan(base_of(checkpoint))
    moved = copied(checkpoint.path, tmp_path / "moved", transformers_version="9.9.9")
    plan.check_base(Checkpoint.open(str(moved)))
    trained = copied(checkpoint.path, tmp_path / "trained")
    weights = trained / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(PlanError, match="not their weights"):
        plan.check_base(Checkpoint.open(str(trained)))
    changed = replace(plan, base=replace(plan.base, source=str(trained)))
    said = f"{trained} is not what it was when the plan was made: their configs agree, but not"
    with pytest.raises(PlanError, match=re.escape(said)):
        changed.check_base(Checkpoint.open(str(trained)))


def test_heads_that_share_one_latent_cannot_be_planned(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        vocab_size=30,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="latent"):
        check_can_drop(Checkpoint.open(str(tmp_path)))


# ------------------------------------------------------------------------------ what users type


def test_a_budget_is_a_share_or_a_size() -> None:
    native = 1003
    for text, wanted in (
        ("50%", 501),
        (" 12.5 % ", 125),
        ("100%", 1003),
        ("11520", 11520),
        ("11520B", 11520),
        ("1.5kB", 1500),
        ("2MiB", 2 * 2**20),
        ("3GB", 3 * 10**9),
    ):
        assert parse_budget(text, native) == wanted
    for text in ("", "%", "0", "0%", "101%", "-5%", "half", "nan%", "1e3", "0.5", "5 m", "٥%"):
        with pytest.raises(UsageError, match="budget"):
            parse_budget(text, native)


def test_a_share_is_a_percentage_or_a_count() -> None:
    for text, wanted in (("0", 0), ("6", 6), ("50%", 3), ("99%", 5), ("100%", 6), ("0%", 0)):
        assert parse_share(text, 6) == wanted
    for text in ("", "7", "101%", "-1", "1.5", "3B", "all", "9" * 5000):
        with pytest.raises(UsageError, match="share"):
            parse_share(text, 6)
    for total, percent in itertools.product((1, 7, 90), range(101)):
        assert parse_share(f"{percent}%", total) == percent * total // 100


def test_a_plan_that_cannot_be_written_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        coded_plan().write(tmp_path / "codes.plan")
    assert list(tmp_path.iterdir()) == []
