"""Conversions that are killed go on to the same bits."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _convert_tools import (
    convert,
    digests,
    one_thread,
)

from kvtool.checkpoint import Checkpoint
from kvtool.convert import aware
from kvtool.convert.verify import verify

Tiny = Callable[..., Path]
one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)


KILLED = {
    method: {"kv_budget": "50%", "shard_size": "100KB", "tokens": 1024, "method": method}
    for method in ("transmla", "aware")
}
_LATER = ("layer", "torn", "probe", "writing", "shard", "manifest", "commit")
POINTS = {"transmla": ("search", *_LATER), "aware": ("fit", "states", *_LATER)}
KILLS = [(method, point) for method, points in POINTS.items() for point in points]
# One process imports everything once; a child of it is killed at each point.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from kvtool import _staging
from kvtool.checkpoint import Checkpoint
from kvtool.convert import artifact, conversion, fitting, planning

model, folder, points, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(), sys.argv[4]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(point, output):
    '''Makes the run die at a point; returns what to report progress to.'''
    steps = {"search": ("choosing FreqFold", 2, 3), "layer": ("converting", 2, 3)}
    steps |= {"fit": ("fitting", 2, 3), "writing": ("writing", 0, 1)}
    if point == "states":  # the second layer is there, the states behind it are not
        keep, kept = fitting.save, []
        def first(tensors, file, *rest):
            if file.name.startswith("streams"):
                kept.append(file)
                if len(kept) == 2:
                    die()
            keep(tensors, file, *rest)
        fitting.save = first
    if point == "torn":  # in the middle of writing the second layer
        save = fitting.save_file
        def torn(tensors, file, *rest):
            if file.name.startswith("layer-00001"):
                file.write_bytes(b"half a file")
                die()
            save(tensors, file, *rest)
        fitting.save_file = torn
    if point == "probe":  # weights are there, nothing else is
        artifact.write_probe = die
    if point == "shard":  # between two shards
        sort, done = _staging._sort_metadata, []
        def second(file):
            done.append(file)
            if len(done) == 2:
                die()
            sort(file)
        _staging._sort_metadata = second
    if point == "manifest":  # everything is written, nothing is renamed
        _staging.Staging.commit = die
    if point == "commit":  # a part of the scratch folder is already removed
        unlink, gone = Path.unlink, []
        def second(file, *rest):
            if gone:
                die()
            gone.append(file)
            unlink(file, *rest)
        Path.unlink = second
    return lambda *step: die() if step == steps.get(point) else None

asked = planning.ConvertOptions(**eval(options))
conversion.convert(Checkpoint.open(model), folder / "whole", asked)
for point in points:
    child = os.fork()
    if not child:
        report = arm(point, folder / point)
        conversion.convert(Checkpoint.open(model), folder / point, asked, report=report)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(point, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
"""


@pytest.fixture(scope="module")
def killed(tiny, tmp_path_factory) -> Callable[[str], Path]:
    """``killed(method)``: a folder with what conversions left that were killed at `POINTS`."""
    folders: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in folders:
            folder, points = tmp_path_factory.mktemp("killed"), POINTS[method]
            options = repr(KILLED[method])
            command = [sys.executable, "-c", KILLER, tiny("llama"), folder, " ".join(points)]
            done = subprocess.run([*command, options], capture_output=True, text=True, check=False)
            expected = [f"{point} {signal.SIGKILL:d}" for point in points]
            assert done.stdout.split("\n")[:-1] == expected, done.stderr
            folders[method] = folder
        return folders[method]

    return get


@pytest.fixture
def leftover(killed, tmp_path) -> Callable[[str, str], Path]:
    """``leftover(method, point)``: the output of a conversion killed there, with its leavings."""

    def get(method: str, point: str) -> Path:
        shutil.copytree(killed(method) / f"{point}.partial", tmp_path / f"{point}.partial")
        return tmp_path / point

    return get


@pytest.mark.parametrize("method", KILLED)
def test_two_processes_give_the_same_bits(converted, killed, method):
    _, output = converted("llama", {}, **KILLED[method])
    assert digests(killed(method) / "whole") == digests(output)


@pytest.mark.parametrize(("method", "point"), KILLS)
def test_a_killed_conversion_leaves_no_output_and_resumes_to_the_same_bits(
    converted, killed, leftover, method, point
):
    model, whole = converted("llama", {}, **KILLED[method])
    assert not (killed(method) / point).exists()
    output = leftover(method, point)
    convert(model, output, **KILLED[method])
    assert digests(output) == digests(whole)
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(("method", "point"), [("transmla", "writing"), ("aware", "manifest")])
def test_what_was_resumed_verifies(converted, leftover, method, point):
    model, _ = converted("llama", {}, **KILLED[method])
    output = leftover(method, point)
    convert(model, output, **KILLED[method])
    report = verify(output, Checkpoint.open(str(model)))
    assert report.passed, report.checks


def steps_of(model: Path, output: Path, **options: Any) -> list[tuple[str, int, int]]:
    steps: list[tuple[str, int, int]] = []
    convert(model, output, report=lambda *step: steps.append(step), **options)
    return steps


@pytest.mark.parametrize(("point", "repeated"), [("fit", [2]), ("states", [1, 2]), ("layer", [])])
def test_a_resumed_conversion_does_not_repeat_finished_layers(
    tiny, leftover, monkeypatch, point, repeated
):
    solved: list[int] = []
    refit = aware.refit_output
    monkeypatch.setattr(
        aware,
        "refit_output",
        lambda stream, layer, *rest: solved.append(layer.index) or refit(stream, layer, *rest),
    )
    steps = steps_of(tiny("llama"), leftover("aware", point), **KILLED["aware"])
    assert solved == repeated
    fitted, written = 3 - len(repeated), 2 if point == "layer" else 0
    assert steps == [
        *(("fitting", done, 3) for done in range(fitted, 4)),
        *(("converting", done, 3) for done in range(written, 4)),
        ("writing", 0, 1),
        ("writing", 1, 1),
    ]


@pytest.mark.parametrize("change", [{"resume": False}, {"seed": 1}, {"kv_budget": "60%"}])
def test_a_new_start_or_other_options_repeat_everything(tiny, leftover, change):
    options = {**KILLED["transmla"], **change}
    steps = steps_of(tiny("llama"), leftover("transmla", "layer"), **options)
    assert ("choosing FreqFold", 1, 3) in steps
    assert ("fitting", 0, 3) in steps
    assert ("converting", 0, 3) in steps


def test_another_model_does_not_resume_what_the_first_left(tiny, leftover):
    other = tiny("llama", rms_norm_eps=1e-5)
    steps = steps_of(other, leftover("aware", "layer"), **KILLED["aware"])
    assert ("fitting", 0, 3) in steps
    assert ("converting", 0, 3) in steps
