"""The command line: exit codes, one meaning per flag, and clean streams for scripts."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors import safe_open
from safetensors.torch import save_file

from kvtool import __version__
from kvtool.checkpoint import Checkpoint
from kvtool.cli import _console, app, run_command
from kvtool.errors import ResourceError

COMMANDS = (
    *("inspect", "convert", "verify", "evaluate", "compare", "bench", "generate", "chat", "run"),
    *("calibrate", "plan", "recipe", "serve-local", "doctor"),
)
CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
# Flags that say the same thing of different objects, and so are worded by each command.
WORDED_BY_COMMAND = {"--output", "--against", "--help", "--seed", "--method", "--kv-budget"}
WORDED_BY_COMMAND |= {"--context", "--sink", "--window", "--prefill", "--length"}
WORDED_BY_COMMAND |= {"--streaming-heads", "--bits", "--read", "--steps", "--rank"}
# Which layers `convert` replaces; that `evaluate` measures layers one by one. What `convert`
# writes; what others compute in.
WORDED_BY_COMMAND |= {"--layers", "--dtype"}
# What a calibration adds to; what others obey. Where `convert` teaches.
WORDED_BY_COMMAND |= {"--plan", "--device"}
# Not all methods of `calibrate retrieval-heads` can go on.
WORDED_BY_COMMAND |= {"--resume"}


def parameters(group: Any = None, path: str = "") -> Iterator[tuple[str, Any]]:
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from parameters(command, f"{path}{name} ")
        for parameter in command.params:
            yield f"{path}{name}", parameter


def test_every_command_is_listed() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == set(COMMANDS)


def test_every_option_has_a_help_text() -> None:
    assert [f"{c} {p.name}" for c, p in parameters() if not p.help and p.name != "help"] == []


def test_a_flag_means_the_same_in_every_command() -> None:
    meanings: dict[str, set[Any]] = {}
    for _, parameter in parameters():
        for flag in (*parameter.opts, *parameter.secondary_opts):
            long = max(parameter.opts, key=len)
            if flag.startswith("-"):
                shown = "" if long in WORDED_BY_COMMAND else parameter.help
                meanings.setdefault(flag, set()).add((long, shown))
    assert {flag: said for flag, said in meanings.items() if len(said) > 1} == {}


def test_every_command_that_has_a_result_gives_it_to_machines() -> None:
    commands = {path for path, _ in parameters()}
    machines = {path for path, parameter in parameters() if "--json" in parameter.opts}
    assert commands - machines == {"chat", "serve-local"}


def test_a_budget_says_of_what_it_is_a_share() -> None:
    said = {path: option.help for path, option in parameters() if option.name == "kv_budget"}
    assert "what every token may add to the cache" in said.pop("convert")
    assert len(said) == 5
    meaning = "ize of the cache of one sequence of --context tokens in bfloat16, with all"
    assert [path for path, words in said.items() if meaning not in words] == []
    contexts = {path for path, option in parameters() if option.name == "context"}
    assert contexts >= said.keys()


def test_automatic_precision_says_what_it_is() -> None:
    said = {path: option.help for path, option in parameters() if option.name == "dtype"}
    assert "as it was" in said.pop("convert")
    assert len(said) > 3
    assert all("float32 on the CPU, bfloat16 on a GPU" in words for words in said.values())


def test_a_seed_that_no_generator_takes_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seeds = [path for path, option in parameters() if option.name == "seed"]
    assert {"generate", "calibrate statistics", "convert", "evaluate"} <= set(seeds)
    for path in seeds:
        assert run_command([*path.split(), "nowhere", "--seed", str(2**64)]) == 2
        assert "less than or equal to" in capsys.readouterr().err, path


def test_version_names_the_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"kvtool {__version__}"
    assert [line.split()[0] for line in lines] == ["kvtool", "torch", "transformers", "triton"]


def test_nothing_asked_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([]) == 2
    captured = capsys.readouterr()
    assert "Usage: kvtool" in captured.out
    assert captured.err == ""


def damaged(source: Path, folder: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other values in its config."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))
    return folder


def fails(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must end in *code*, with one sentence and nothing on stdout."""
    assert run_command(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines[0]


def test_a_choice_that_is_none_is_named_beside_those_that_are(capsys) -> None:
    assert run_command(["convert", "smollm2", "--to", "nonsense", "-o", "x"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: Invalid value for '--to': 'nonsense' is not one of 'mla', ")
    assert said[1:] == ["hint: 'kvtool convert --help' lists what is accepted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "nowhere/at/all", "--to", "mla", "-o", "OUT"], "nowhere/at/all"),
        (["inspect", "./nowhere.gguf"], "nowhere.gguf"),
        (["inspect", ""], "named by nothing"),
        (["convert", "some/model", "--to", "mla", "-o", "OUT", "--offline"], "some/model"),
        (["convert", "MODEL", "--to", "mla", "-o", "OUT", "--kv-budget", "200%"], "200%"),
        (["convert", "MODEL", "--to", "mla", "-o", "OUT", "--rank", "4096"], "4096"),
        (["convert", "MODEL", "--to", "mla", "-o", "MODEL"], "MODEL"),
        (["convert", "MODEL", "--to", "mla", "-o", "OUT", "--dtype", "int3"], "int3"),
        (["convert", "MODEL", "--to", "squid", "-o", "OUT"], "squid"),
        (["convert", "MODEL", "--to", "mla"], "--output"),
        (["convert", "MODEL", "--to", "mla", "-o", "OUT", "--frobnicate"], "--frobnicate"),
        (["evaluat", "MODEL"], "evaluat"),
    ],
)
def test_a_wrong_request_is_exit_code_2_and_writes_nothing(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    paths = {"MODEL": str(tiny("llama")), "OUT": str(tmp_path / "out")}
    error = fails([paths.get(a, a) for a in arguments], 2, capsys)
    assert paths.get(message, message) in error
    assert list(tmp_path.iterdir()) == []


def test_an_unsupported_model_is_exit_code_4(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert = damaged(tiny("llama"), tmp_path / "b", model_type="bert", architectures=["BertModel"])
    fails(["convert", str(bert), "--to", "mla", "-o", str(tmp_path / "out")], 4, capsys)
    qwen3 = ["convert", str(tiny("qwen3")), "--to", "mla", "-o", str(tmp_path / "out")]
    assert "norm" in fails(qwen3, 4, capsys)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 0}, "has no layers"),
        ({"num_attention_heads": -4}, "negative dimension"),
        ({"max_position_embeddings": 0}, "a context of 0 tokens (max_position_embeddings)"),
        ({"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, "nonsense"),
    ],
)
def test_an_impossible_config_is_told_and_no_traceback(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    said: str,
) -> None:
    model = str(damaged(tiny("llama"), tmp_path / "m", **config))
    assert said in fails(["generate", model, "Hello"], 4, capsys)
    assert said in fails(["convert", model, "--to", "mla", "-o", str(tmp_path / "o")], 4, capsys)
    assert run_command(["inspect", model, "--json"]) == 0
    assert said in json.loads(capsys.readouterr().out)["unsupported"]


def test_a_damaged_checkpoint_is_exit_code_1(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = damaged(tiny("llama"), tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in fails(["inspect", str(cut)], 1, capsys)
    noted = damaged(tiny("llama"), tmp_path / "noted", kvtool=["target"])
    assert "kvtool is not an object" in fails(["generate", str(noted), "Hello"], 1, capsys)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("generation_config.json", b'{"eos_token_id": [1, ', "is not readable JSON"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "neither a token id nor a list"),
        ("generation_config.json", b'{"eos_token_id": [[1]]}', "neither a token id nor a list"),
        ("tokenizer_config.json", b'{"model_max_length": "512"}', "'512' and no number"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "of Git LFS"),
    ],
)
def test_a_damaged_file_beside_the_config_is_named(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes,
    said: str,
) -> None:
    model = damaged(tiny("llama"), tmp_path / "m")
    (model / name).write_bytes(content)
    error = fails(["generate", str(model), "Hello"], 1, capsys)
    assert said in error
    assert str(model / name) in error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 5, "error: the machine ran out of memory\n"),
        (torch.OutOfMemoryError("CUDA"), 5, "error: the GPU ran out of memory\n"),
        (RuntimeError("not enough memory: x"), 5, "error: the machine ran out of memory\n"),
        (RuntimeError("can't allocate memory"), 5, "error: the machine ran out of memory\n"),
        (OSError(errno.ENOSPC, "No space left"), 5, "error: the disk is full: [Errno 28]"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "error: [Errno 13]"),
        (ResourceError("too big", hint="buy more"), 5, "error: too big\nhint: buy more\n"),
    ],
)
def test_each_kind_of_end_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Checkpoint, "open", interrupted)
    assert run_command(["inspect", "smollm2"]) == code
    captured = capsys.readouterr().err
    assert captured.startswith(said)
    assert "Traceback" not in captured


@pytest.mark.parametrize(("more", "promised"), [([], True), (["--no-resume"], False)])
def test_an_interrupted_conversion_says_how_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
    promised: bool,
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "open", interrupted)
    command = ["convert", "smollm2", "--to", "mla", "-o", str(tmp_path / "out"), *more]
    assert run_command(command) == 130
    expected = "interrupted; the same command goes on where it stopped\n"
    assert capsys.readouterr().err == (expected if promised else "interrupted\n")


@pytest.mark.parametrize(
    ("more", "promised"),
    [
        ([], True),
        (["--method", "duo"], True),
        (["--method", "entropy"], False),
        (["--method=attention"], False),
        (["--no-resume"], False),
    ],
)
def test_an_interrupted_search_for_heads_says_whether_it_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    more: list[str],
    promised: bool,
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "open", interrupted)
    command = ["calibrate", "retrieval-heads", "smollm2", "-o", str(tmp_path / "h.plan"), *more]
    assert run_command(command) == 130
    assert ("goes on" in capsys.readouterr().err) == promised


def test_a_closed_stdout_is_no_error(tiny: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "kvtool", "inspect", str(tiny("llama"))]
    closed = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True
    )
    assert (closed.returncode, closed.stderr) == (0, "")


def test_what_a_message_quotes_is_no_page_and_obeyed_by_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    amount = "a\n\x1b[31m" + "b" * 9999
    said = fails(["convert", "m", "--to", "mla", "--heal", amount, "-o", "out"], 2, capsys)
    assert said.startswith(r"error: --heal a\n\x1b[31mbbb")
    assert said.endswith("nor 'auto'")
    assert len(said) < 2000


@pytest.mark.parametrize("encoding", ["ascii", "ascii:surrogateescape"])  # as of LC_ALL=C
def test_a_terminal_without_the_characters_of_a_table_is_no_error(
    tiny: Callable[..., Path], tmp_path: Path, encoding: str
) -> None:
    model = tmp_path / "modèle"
    model.symlink_to(tiny("llama"))
    done = subprocess.run(
        [sys.executable, "-m", "kvtool", "inspect", str(model)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"mod?le" in done.stdout


def test_what_transformers_dislikes_in_a_config_that_works_is_not_printed(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In a process of its own: each warning is given once."""
    model = damaged(tiny("llama"), tmp_path / "m", pad_token_id=-1)
    command = [sys.executable, "-m", "kvtool", "inspect", str(model)]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_may_be_chosen_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(["convert", "smollm2", "-o", "out"], 2, capsys)
    assert "Choose from: mla, gqa, mamba, fp8-kv\n" in said + "\n"


def test_a_failed_allocation_of_torch_is_exit_code_5(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Checkpoint, "open", lambda *_, **__: torch.empty(2**55))
    assert fails(["inspect", "smollm2"], 5, capsys) == "error: the machine ran out of memory"


def test_other_runtime_errors_are_bugs_and_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Checkpoint, "open", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        run_command(["inspect", "smollm2"])


@pytest.mark.parametrize("command", ["evaluate", "bench", "generate", "chat"])
@pytest.mark.parametrize("device", ["foo", "cuda:x", "cuda", "cuda:7"])
def test_a_device_that_is_not_there_is_a_usage_error(
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    device: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda:7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    prompt = ["hello"] if command == "generate" else []
    assert device in fails([command, str(tiny("llama")), *prompt, "--device", device], 2, capsys)


def test_debugging_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVTOOL_DEBUG", "1")
    assert run_command(["inspect", "nowhere/at/all", "--offline"]) == 2
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert "\nerror: " in captured


def test_dry_run_tells_the_cost_and_writes_nothing(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(tiny("llama")), "--to", "mla", "-o", str(tmp_path / "out")]
    command += ["--kv-budget", "50%", "--dry-run", "--json"]
    assert run_command(command) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_per_token_after"] <= plan["bytes_per_token_before"] // 2
    assert plan["disk_bytes"] > 0
    assert plan["memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_convert_checks_its_output_and_verify_finds_later_damage(
    tiny: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tiny("llama")), tmp_path / "out"
    command = ["convert", model, "--to", "mla", "--method", "exact", "-o", str(out)]
    assert run_command([*command, "--json"]) == 0
    captured = capfd.readouterr()
    summary = json.loads(captured.out)
    assert summary["verify"]["passed"]
    assert summary["plan"]["bytes_per_token_after"] == summary["plan"]["bytes_per_token_before"]
    assert captured.err == ""  # no progress where nobody looks
    measured = json.loads((out / "kvtool_manifest.json").read_text())["measured"]
    assert measured == summary["verify"]["measured"]
    assert 0 <= measured["kl"] <= 1e-6
    card = (out / "README.md").read_text()
    assert "| perplexity ratio | 1.0000 |" in card
    assert "Not verified" not in card

    assert run_command([*command]) == 2, "the output exists now"
    capfd.readouterr()
    assert run_command([*command, "--overwrite", "--quiet"]) == 0
    captured = capfd.readouterr()
    assert "bytes per token" in captured.out
    assert "converting" not in captured.err

    assert run_command(["verify", str(tmp_path / "nowhere"), "--against", model]) == 2
    assert f"There is no folder {tmp_path / 'nowhere'}." in capfd.readouterr().err

    weights = out / "model.safetensors"
    with safe_open(weights, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.5
    save_file(tensors, weights, metadata)
    assert run_command(["verify", str(out), "--against", model, "--quiet"]) == 6
    captured = capfd.readouterr()
    assert "FAILED" in captured.out
    assert captured.err.startswith("error: ")


def test_a_pipe_gets_no_control_codes(tiny: Callable[..., Path], tmp_path: Path) -> None:
    forced = {"FORCE_COLOR": "1", "GITHUB_ACTIONS": "true", "TERM": "xterm-256color"}
    environment = os.environ | forced
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    convert = ["convert", str(tiny("llama")), "--to", "mla", "-o", str(tmp_path / "out")]
    commands = [["--help"], ["frobnicate"], [*convert, "--method", "exact", "--no-verify"]]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "kvtool", *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not CONTROL_CODES.findall(done.stdout + done.stderr), (command, done.stderr)


def test_json_has_no_numbers_that_json_lacks() -> None:
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}}
    assert json.loads(_console.dump_json(value)) == {"a": None, "b": [None, 1.5], "c": {"d": None}}


def test_a_sentence_is_one_line_of_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "a word and " * 30
    _console._console(stderr=True).print(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_silent_when_nobody_looks(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with _console.progress(quiet) as report, _console.waiting("loading", quiet):
        report("layers", 1, 1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "command", [["generate", "M", "hi"], *([name, "M"] for name in ("chat", "evaluate", "bench"))]
)
def test_what_runs_a_model_takes_a_revision_of_it(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    words = [str(tiny("llama")) if word == "M" else word for word in command]
    assert run_command([*words, "--revision", "v1"]) == 2
    assert "revision" in capsys.readouterr().err
