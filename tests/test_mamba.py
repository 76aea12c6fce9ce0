"""`convert --to mamba`: a stock hybrid that says what was meant, beside its controls."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from _convert_tools import weights
from conftest import make_model

from kvtool.calibrate import statistics
from kvtool.calibrate.statistics import StatisticsOptions
from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.convert import mamba, mamba_planning, teaching
from kvtool.convert.mamba import convert
from kvtool.convert.mamba_planning import MambaOptions
from kvtool.convert.verify import verify
from kvtool.corpus import calibration_text, evaluation_text
from kvtool.errors import UnsupportedModelError, UsageError
from kvtool.hybrid import Judged

SMALL = {"tokens": 1024}
GOT_WORSE = teaching.got_worse


@pytest.fixture(scope="module", autouse=True)
def short():
    """Texts of 128 tokens, and what is taught is kept, however little it was."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (mamba, mamba_planning):
            patch.setattr(module, "WINDOW", 128)
        patch.setattr(teaching, "got_worse", lambda closed, taught: False)
        yield


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """Source, output and result of a short conversion of layer 1."""
    output = tmp_path_factory.mktemp("mamba") / "out"
    options = MambaOptions((1,), heal="1k", **SMALL)
    return tiny("llama"), output, convert(Checkpoint.open(str(tiny("llama"))), output, options)


def test_the_result_is_what_verification_asks_for(done):
    source, output, _ = done
    report = verify(output, Checkpoint.open(str(source)))
    assert report.passed, [check for check in report.checks if not check.passed]
    names = {check.name for check in report.checks}
    assert {"untouched tensors", "as converted", "decode", "cache bytes"} <= names
    assert report.measured["bytes_per_token"] == 2 * 2 * 2 * 16 * 2


def test_verification_is_not_told_of_packages_that_would_be_faster(done):
    source, output, _ = done
    told = subprocess.run(
        [sys.executable, "-m", "kvtool", "verify", str(output), "--against", str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stderr == ""


def test_verification_sees_a_changed_row_and_a_wrong_decay(done, tmp_path):
    import shutil

    from _convert_tools import edit

    source, output, _ = done
    for i, name in enumerate(("mamba.A_log", "shared_mlp.input_linear.weight")):
        damaged = tmp_path / str(i)
        shutil.copytree(output, damaged)
        key = f"model.layers.1.{name}"
        edit(damaged, lambda tensors, key=key: tensors[key].add_(0.5))
        assert not verify(damaged, Checkpoint.open(str(source))).passed


def test_all_arms_are_taught_on_the_same_text_and_told(done):
    _, output, result = done
    assert set(result.arms) == {"mamba", "random", "pointwise"}
    assert set(result.beaten) == {"random", "pointwise"}
    lines = [json.loads(x) for x in (output / "kvtool" / "healing.jsonl").read_text().splitlines()]
    for arm in result.arms:
        stages = {x["stage"]: x["step"] for x in lines if x["arm"] == arm}  # the last step of each
        assert stages == {"mimic": 1, "align": 2, "distil": 4}
    assert result.arms["mamba"]["learned"]
    manifest = json.loads((output / "kvtool_manifest.json").read_text())
    assert manifest["arms"]["mamba"]["kl"] == result.arms["mamba"]["kl"]
    assert manifest["plan"]["replaced_layers"] == [1]
    assert "control that inherits nothing" in (output / "README.md").read_text()


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(done, tmp_path, monkeypatch):
    source, output, result = done
    again, taught = tmp_path / "again", []

    def run(stop_at):
        def report(stage, finished, total):
            taught.append(stage)
            if (stage, finished) == stop_at:
                raise KeyboardInterrupt

        options = MambaOptions((1,), heal="1k", **SMALL)
        return convert(Checkpoint.open(str(source)), again, options, report=report)

    for stop_at in (("mamba: distil", 3), ("random: align", 1)):
        with pytest.raises(KeyboardInterrupt):
            run(stop_at)
        assert not again.exists()
    taught.clear()
    assert run(None).arms == result.arms
    assert not any(stage.startswith("mamba:") for stage in taught)
    ours, theirs = weights(again), weights(output)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("better", [True, False])
def test_teaching_that_makes_it_worse_is_dropped(tiny, monkeypatch, better):
    """Of the closed form and what was taught, the one nearer to the original on held-out text."""
    judged = iter((2.0, 1.0 if better else 3.0))
    states = []

    def judge(hybrid, windows):
        states.append(teaching._copied(hybrid)[1])
        return Judged([next(judged)], [0.0], [0.0])

    monkeypatch.setattr(teaching, "judge", judge)
    monkeypatch.setattr(teaching, "got_worse", GOT_WORSE)
    checkpoint = Checkpoint.open(str(tiny("llama")))
    ids = torch.arange(4 * 32).view(4, 32) % 60
    lessons = teaching.Lessons(ids, ids, ids)
    taught = teaching.Teacher(
        checkpoint, {1: torch.full((4,), 8.0)}, lessons, teaching.Steps(1, 1, 1, 2)
    ).teach("mamba")
    assert taught.learned == better
    assert taught.judged.mean_kl == (1.0 if better else 2.0)
    found = teaching._copied(taught.hybrid)[1]
    closed, end = (all(torch.equal(found[n], x) for n, x in state.items()) for state in states)
    assert (closed, end) == (not better, better)


def test_without_teaching_only_read_outs_are_fitted(tiny, tmp_path):
    source = tiny("qwen2", dtype="bfloat16")
    output = tmp_path / "out"
    convert(Checkpoint.open(str(source)), output, MambaOptions((0, 2), heal="0", **SMALL))
    tensors = weights(output)
    assert tensors["model.layers.0.mamba.A_log"].dtype == torch.float32
    assert tensors["model.layers.0.mamba.in_proj.weight"].dtype == torch.bfloat16
    assert not (output / "kvtool" / "healing.jsonl").exists()
    report = verify(output, Checkpoint.open(str(source)))
    assert report.passed, [check for check in report.checks if not check.passed]


def test_another_teacher_and_loss_and_a_time_are_taken(tiny, tmp_path):
    source, output = tiny("llama"), tmp_path / "out"
    make_model("llama", tmp_path / "teacher", num_hidden_layers=2)
    options = MambaOptions(
        (1,), heal="0.02min", teacher=str(tmp_path / "teacher"), loss="reverse-kl", **SMALL
    )
    with pytest.raises(UsageError, match="neither a number of tokens"):  # below a second
        mamba_planning.plan(Checkpoint.open(str(source)), MambaOptions((1,), heal="0.001min"))
    result = convert(Checkpoint.open(str(source)), output, options)
    assert result.plan["healing"]["seconds"] == pytest.approx(1.2)


def test_a_result_no_better_than_a_control_is_exit_code_6(tiny, tmp_path, monkeypatch, capsys):
    arguments = [
        *("convert", str(tiny("llama")), "--to", "mamba", "--layers", "1,", "--heal", "0"),
        *("--tokens", "1024", "--no-verify", "--quiet", "-o", str(tmp_path / "out")),
    ]
    monkeypatch.setattr(mamba, "beats", lambda result, control: False)
    assert run_command(arguments) == 6
    assert "of no use" in capsys.readouterr().err
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("ours", "theirs", "better"),
    [
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.6], True),  # always a little, however texts differ
        ([1.0, 2.0, 3.0], [0.5, 2.5, 3.6], False),  # only on average
        ([1.0, 1.0], [1.0, 1.0], False),
    ],
)
def test_a_control_is_beaten_text_by_text(ours, theirs, better):
    one, other = (Judged(kl, [], []) for kl in (ours, theirs))
    assert teaching.beats(one, other) is better


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "needs --layers"),
        (["--layers", "x"], 2, "neither a number"),
        (["--layers", "3"], 2, "one has to keep its attention"),
        (["--layers", "0,1,2"], 2, "replaces all 3 layers"),
        (["--layers", "1,7"], 2, "7 is none of the 3 layers"),
        (["--layers", "1,1"], 2, "--layers names a layer twice"),
        (["--layers", "1,1"], 2, "twice"),
        (["--layers", "auto"], 2, "needs --kv-budget"),
        (["--layers", "auto", "--kv-budget", "20%"], 2, "leaves attention in 0 of 3 layers"),
        (["--layers", "1", "--kv-budget", "50%"], 2, "--layers auto"),
        (["--layers", "1", "--rank", "4"], 2, "--rank has no place"),
        (["--layers", "1,", "--dtype", "float16"], 4, "underflows"),
        (["--layers", "1,", "--heal", "0", "--teacher", "TEACHER"], 2, "nobody does"),
    ],
)
def test_a_wrong_request_is_refused_before_the_work(tiny, tmp_path, capsys, arguments, code, words):
    model = str(tiny("llama"))
    arguments = [model if x == "TEACHER" else x for x in arguments]
    output = tmp_path / "out"
    base = ["convert", model, "--to", "mamba", "-o", str(output), "--quiet"]
    assert run_command([*base, *arguments]) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_two_processes_teach_one_model(tiny, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["--layers", "1", "--heal", "2k", "--tokens", "1024", "--no-verify", "--quiet"]
    command = [sys.executable, "-m", "kvtool", "convert", str(tiny("llama")), "--to", "mamba"]
    both = [
        subprocess.Popen(
            [*command, *arguments, "-o", str(tmp_path / "out"), "--json"],
            env=os.environ
            | {
                "ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank,
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    # So little teaching may lose to a control, which is exit code 6.
    assert {process.returncode for process in both} <= {0, 6}, said
    assert len(json.loads(said[0][0])["plan"]["replaced_layers"]) == 1
    assert not said[1][0]  # the first process alone speaks
    assert Checkpoint.open(str(tmp_path / "out")).hf_config().model_type == "granitemoehybrid"


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("qwen3", {}, "q/k norm"),
        ("llama", {"mlp_bias": True}, "no bias in its MLP"),
        ("llama", {"head_dim": 32}, "not as wide as the hidden states"),
        ("llama", {"hidden_act": "gelu"}, "applies 'gelu'"),
        ("mistral", {"sliding_window": 64}, "sliding-window attention"),
    ],
)
def test_what_the_class_cannot_express_is_refused(tiny, family, overrides, words):
    with pytest.raises(UnsupportedModelError, match=words):
        mamba_planning.require(Checkpoint.open(str(tiny(family, **overrides))))


def test_a_dry_run_says_what_it_costs(tiny, tmp_path, capsys):
    arguments = ["--to", "mamba", "--layers", "auto", "--kv-budget", "70%", "--dry-run", "--json"]
    output = str(tmp_path / "out")
    assert run_command(["convert", str(tiny("llama")), *arguments, "-o", output]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["replaced_layers"] == "1, to be ranked"
    assert (plan["bytes_per_token_before"], plan["bytes_per_token_after"]) == (384, 256)
    assert plan["constant_bytes"] == 4 * 4 * 16 * 16 + 2 * 3 * 192
    assert plan["healing"]["tokens"] == mamba_planning.AUTO
    arguments.remove("--json")
    assert run_command(["convert", str(tiny("llama")), *arguments, "-o", output]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"bytes per sequence {plan['constant_bytes']:,} of states" in said
    assert f"healing {mamba_planning.AUTO:,} tokens, " in said
    assert not (tmp_path / "out").exists()


def test_smollm2_loses_little_in_two_layers_before_any_teaching(smollm2):
    found = statistics.collect(smollm2, StatisticsOptions(tokens=512, window=512))
    reach = {index: found.layer(index).reach for index in (13, 24)}
    tokenizer = smollm2.tokenizer()
    lessons = teaching.Lessons(
        solve=calibration_text(None).windows(tokenizer, 512, 4, 0, 0.0),
        learn=torch.empty(0, 512, dtype=torch.long),
        judge=evaluation_text(None).windows(tokenizer, 512, 1),
    )
    teacher = teaching.Teacher(smollm2, reach, lessons, None)
    assert teacher.teach("mamba").judged.mean_kl < 0.15  # with nothing in their place it is 0.41
