"""`kvtool calibrate explain`: what codes keep and lose, as table, page and picture."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from kvtool.cli import run_command
from kvtool.codes import CodePlan, code_shapes
from kvtool.errors import UsageError
from kvtool.evaluate.explain import BLOCKS, explain
from kvtool.evaluate.pictures import LIGHT, style
from kvtool.evaluate.spectra import code_pictures, spectra_panel
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Base, Plan

Capture = pytest.CaptureFixture[str]
BASE = Base("a $m$ & <b>", "f", "c", layers=5, kv_heads=2, head_dim=8)
JUDGED = {
    "predicted": [1.0, 2.0, 3.0],
    "measured": [0.02, 0.03, 0.05],
    "measured_together": 0.125,
    "widths": [[20, 10], [20], [8, 8]],
}


def a_plan(joint: bool = True, **provenance: Any) -> Plan:
    """Codes of two, two and one of five layers with K = 16."""
    codes = []
    tensors = {}
    for index, (layers, share) in enumerate(((2, 1 / 2), (2, 1), (1, 1 / 4))):
        full = layers * 16 * (2 if joint else 1)
        code = CodePlan("rotated", layers, (int(share * full),) * (1 if joint else 2))
        for name, shape in code_shapes(index, code, 16, [full] * len(code.widths)).items():
            tensors[name] = torch.ones(shape)
            if name.endswith("spectrum"):
                tensors[name] = 2.0 ** -torch.arange(full, dtype=torch.float32)
        codes.append(code)
    return Plan(
        BASE,
        (LayerPlan((False, False)),) * 5,
        provenance=({"method": "aware", **provenance},),
        codes=tuple(codes),
        allocation="spectrum",
        tensors=tensors,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    a_plan(**JUDGED).write(tmp_path / "codes.plan")
    return tmp_path / "codes.plan"


def command(*arguments: str | Path) -> int:
    return run_command(["calibrate", "explain", *map(str, arguments)])


@pytest.mark.parametrize("joint", [True, False])
def test_what_is_lost_is_the_spectrum_behind_the_cut(joint: bool) -> None:
    plan = a_plan(joint, **JUDGED)
    explained = explain(plan, "p")
    assert [code.layers for code in explained.codes] == [[0, 1], [2, 3], [4]]
    assert [code.name for code in explained.codes] == ["0–1", "2–3", "4"]
    assert sum(code.bytes_per_token for code in explained.codes) == plan.bytes_per_token(2)
    few = replace(plan, codes=tuple(replace(code, bits=4) for code in plan.codes))
    packed = explain(few, "p")
    assert packed.bytes_per_token == few.bytes_per_token(2) < plan.bytes_per_token(2)
    assert sum(code.bytes_per_token for code in packed.codes) == packed.bytes_per_token
    for code, planned in zip(explained.codes, plan.codes, strict=True):
        assert [part.part for part in code.parts] == list(planned.parts)
        assert tuple(part.width for part in code.parts) == planned.widths
        tail = sum(2.0**-row for part in code.parts for row in range(part.width, part.full))
        whole = sum(2.0**-row for part in code.parts for row in range(part.full))
        assert code.predicted == pytest.approx(tail, rel=1e-6)
        assert code.lost_share == pytest.approx(tail / whole, rel=1e-6)
    assert explained.codes[1].predicted == 0.0  # it is whole
    assert [code.measured for code in explained.codes] == JUDGED["measured"]
    assert [code.measured_width for code in explained.codes] == [30, 20, 16]


def test_additivity_is_the_sum_of_the_parts_over_the_whole() -> None:
    explained = explain(a_plan(**JUDGED), "p")
    assert explained.additivity == pytest.approx(0.1 / 0.125)
    assert "0.1 nats in all, together 0.125: a ratio of 0.80" in explained.words()
    alone = explain(a_plan(), "p")
    assert alone.additivity is None
    assert not alone.nats
    assert "not known" in alone.words()


@pytest.mark.parametrize(
    "said",
    [
        *(None, "x", {}, True, [], [1.0], [1.0, 2.0], [1.0, "x", 2.0], [1.0, None, 2.0]),
        *([True, 1.0, 2.0], [[], {}, ""]),
    ],
)
def test_a_provenance_may_say_anything(said: Any) -> None:
    for name in ("measured", "measured_together"):
        explained = explain(a_plan(**(JUDGED | {name: said})), "p")
        assert explained.additivity is None
        assert "not known" in explained.words()
        assert explained.table().row_count == 3
    widths = [
        code.measured_width for code in explain(a_plan(**(JUDGED | {"widths": said})), "p").codes
    ]
    assert all(width is None or width in (1, 2) for width in widths)
    assert explain(replace(a_plan(), provenance=()), "p").method == "unknown"


def test_what_was_not_measured_is_drawn_as_far_as_it_is_known() -> None:
    for plan in (a_plan(), a_plan(**(JUDGED | {"measured": [1.0, None, 2.0]}))):
        with style():
            assert len(code_pictures(explain(plan, "p"))) == 2


def test_a_spectrum_of_zeros_can_be_explained(tmp_path: Path) -> None:
    plan = a_plan(**JUDGED)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in plan.tensors.items()}
    replace(plan, tensors=nothing).write(tmp_path / "p")
    assert command(tmp_path / "p", "-o", tmp_path / "p.svg") == 0
    assert [code.lost_share for code in explain(replace(plan, tensors=nothing), "p").codes] == [
        0.0
    ] * 3


def test_the_table_has_a_row_per_code_and_the_picture_a_column_per_layer(
    file: Path, capsys: Capture
) -> None:
    assert command(file) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert "208 bytes per token (native 320)" in lines[0]
    rule = next(index for index, line in enumerate(lines) if line.startswith("───"))
    first, second, _, after = (line.split() for line in lines[rule + 1 : rule + 5])
    numbers = ["32", "64", "64", "2.3e-08", "%", "4.66e-10", "0.02", "30"]
    assert first == ["0–1", "after", "RoPE", *numbers]
    assert second[3:8] == ["64", "64", "128", "0", "%"]
    assert after[0] == "measured"
    assert "a ratio of 0.80" in shown
    picture = next(line for line in lines if line.startswith("joint "))
    assert picture == f"joint {BLOCKS[4] * 2}{BLOCKS[7] * 2}{BLOCKS[2]}"


def test_keys_and_values_have_rows_and_spectra_of_their_own(tmp_path: Path) -> None:
    explained = explain(a_plan(joint=False), "p")
    first, second, _ = explained.picture().splitlines()
    assert first.split() == ["keys", f"{BLOCKS[4] * 2}{BLOCKS[7] * 2}{BLOCKS[2]}"]
    assert second.split()[0] == "values"
    with style():
        titles = [picture.title for picture in code_pictures(explained)]
    assert titles == ["Spectrum of keys", "Spectrum of values", "Loss by code"]


def test_json_is_one_object_with_everything(file: Path, capsys: Capture) -> None:
    assert command(file, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["plan"], said["method"], said["nats"]) == (str(file), "aware", True)
    assert said["additivity"] == pytest.approx(0.8)
    assert [code["measured"] for code in said["codes"]] == JUDGED["measured"]
    assert [len(code["parts"][0]["spectrum"]) for code in said["codes"]] == [64, 64, 32]
    assert math.fsum(code["bytes_per_token"] for code in said["codes"]) == said["bytes_per_token"]


def test_pictures_and_pages_are_drawn_alike_every_time(file: Path, capsys: Capture) -> None:
    for suffix in ("html", "svg", "png"):
        drawn = []
        for name in ("a", "b"):
            output = file.with_name(f"{name}.{suffix}")
            assert command(file, "-o", output) == 0
            drawn.append(output.read_bytes())
        assert drawn[0] == drawn[1]
    height, width, _ = matplotlib.image.imread(file.with_name("a.png")).shape
    assert width > 2 * height > 400
    page = file.with_name("a.html").read_text()
    assert "a $m$ &amp; &lt;b&gt;" in page
    assert "<b>" not in page
    assert "mathdefault" not in page
    assert page.count("<svg") == 2
    assert "stroke: var(--ours)" in page
    for forbidden in ("<script", "http:", "https:", "@import", "url(http"):
        assert forbidden not in page.replace("http://www.w3.org/", "")


@pytest.mark.parametrize("marked", ["joint", "separate"])
def test_every_spectrum_is_marked_where_it_is_cut(marked: str) -> None:
    explained = explain(a_plan(joint=marked == "joint", **JUDGED), "p")
    with style():
        for part in {part.part for code in explained.codes for part in code.parts}:
            axes = Figure().subplots()
            spectra_panel(axes, explained, part)
            cuts = [line for line in axes.lines if line.get_color() == LIGHT["lost"]]
            found = [(float(x), float(y)) for line in cuts for x, y in line.get_xydata()]
            wanted = []
            for code in explained.codes:
                (own,) = (x for x in code.parts if x.part == part)
                layers = len(code.layers)
                wanted.append((own.width / layers, own.spectrum[own.width - 1]))
            assert found == wanted


def test_a_plan_of_heads_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    heads = Plan(BASE, (LayerPlan((True, False), 1, 2),) * 5)
    heads.write(tmp_path / "heads.plan")
    with pytest.raises(UsageError, match="a plan of heads"):
        explain(heads, "heads.plan")
    assert command(tmp_path / "heads.plan") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path / 'heads.plan'} has no codes to explain")
    assert command(tmp_path / "missing.plan") == 3
    assert "no such file" in capsys.readouterr().err


def test_an_output_of_no_known_kind_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: Capture
) -> None:
    assert command(tmp_path / "missing.plan", "-o", tmp_path / "x.pdf") == 2
    assert "it must end in .html or .svg or .png" in capsys.readouterr().err
