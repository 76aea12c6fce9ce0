"""`kvtool generate` and `kvtool chat`: streaming, limits, reproducibility, prefix reuse."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from kvtool.checkpoint import Checkpoint
from kvtool.cli import run_command
from kvtool.cli.chat import common_prefix, reuse_prefix
from kvtool.cli.generate import chat_ids
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine, Sampling
from kvtool.text import TextStream

Tiny = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("text", ["plain words", "naïve café", "日本語と 🤖🎉 emoji", "  spaces\n"])
def test_streamed_text_is_the_whole_text_in_complete_characters(text: str) -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.flush() == ""


def test_an_unfinished_character_is_marked_at_the_end_only() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a🤖")["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids) == "a"
    assert "\ufffd" in stream.flush()


def test_generate_streams_text_and_reports_on_stderr(tiny: Tiny, capfd: Capture) -> None:
    folder = str(tiny("llama"))
    prompt = "The quick brown"
    assert run_command(["generate", folder, prompt, "--max-new-tokens", "12"]) == 0
    out, err = capfd.readouterr()
    assert "prompt tokens" in err
    assert "bytes per token in float32" in err
    assert run_command(["generate", folder, prompt, "--max-new-tokens", "12", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["text"] + "\n" == out
    assert result["prompt_tokens"] == len(make_tokenizer()(prompt)["input_ids"])
    assert 0 < result["new_tokens"] <= 12
    assert result["cache_bytes_per_token"] == 3 * 2 * 2 * 16 * 4


def test_greedy_text_is_that_of_transformers(tiny: Tiny, capfd: Capture) -> None:
    folder = str(tiny("qwen3"))
    assert run_command(["generate", folder, "A language", "--max-new-tokens", "16", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    checkpoint = Checkpoint.open(folder)
    tokenizer, model = checkpoint.tokenizer(), checkpoint.load_transformers(torch.float32)
    ids = tokenizer("A language", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert result["text"] == text
    assert result["new_tokens"] == len(expected)


def test_quiet_says_nothing_on_stderr(tiny: Tiny, capfd: Capture) -> None:
    assert run_command(["generate", str(tiny("llama")), "The", "--max-new-tokens", "2", "-q"]) == 0
    assert capfd.readouterr().err == ""


def test_the_prompt_comes_from_stdin_for_a_dash(
    tiny: Tiny, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--max-new-tokens", "8", "-q"]
    assert run_command(["generate", str(tiny("llama")), "The lazy dog", *arguments]) == 0
    expected = capfd.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("The lazy dog\n"))  # as of echo
    assert run_command(["generate", str(tiny("llama")), "-", *arguments]) == 0
    assert capfd.readouterr().out == expected


@pytest.mark.parametrize("command", [["generate", "-"], ["chat", ""]])
def test_a_closed_stdin_is_named(
    tiny: Tiny, capfd: Capture, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    model = str(tiny("llama"))
    assert run_command([command[0], model, *filter(None, command[1:]), "-q"]) == 2
    assert capfd.readouterr().err == ("error: stdin is closed, and the text is read from there\n")


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a NaN in its last norm."""
    folder = make_model("llama", tmp_path_factory.mktemp("broken"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_model_that_gives_no_numbers_is_named(broken: Path, capfd: Capture, command: str) -> None:
    more = ["The lazy dog"] if command == "generate" else ["--context", "8", "--repeats", "1"]
    assert run_command([command, str(broken), *more, "-q"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"error: {broken} gives no numbers for the prompt: its logits are NaN\n"


def test_a_model_that_gives_no_numbers_can_be_reported_on(broken: Path, capfd: Capture) -> None:
    options = ["--quick", "--windows", "2", "--prefill", "48", "--continuation", "16"]
    assert run_command(["evaluate", str(broken), *options, "--no-speed", "-q", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["divergence"]["perplexity"]["value"] is None
    assert {sample["text"] for sample in result["samples"]} == {""}


def test_bytes_that_are_no_text_are_refused(tiny: Tiny, capfd: Capture) -> None:
    assert run_command(["generate", str(tiny("llama")), "half \ud83e", "--quiet"]) == 2
    assert capfd.readouterr().err == "error: the text is no Unicode: character 5 is half of one\n"


def test_a_seed_fixes_sampled_text(tiny: Tiny, capfd: Capture) -> None:
    def sample(seed: int) -> str:
        command = ["generate", str(tiny("llama")), "The", "--max-new-tokens", "16", "-q", "--json"]
        options = ["--temperature", "1.5", "--top-p", "0.95", "--top-k", "100"]
        assert run_command([*command, *options, "--seed", str(seed)]) == 0
        text = json.loads(capfd.readouterr().out)["text"]
        assert isinstance(text, str)
        return text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0},
    ],
)
def test_scores_are_processed_by_the_chain_of_transformers(
    tiny: Tiny, fields: dict[str, Any]
) -> None:
    model = Checkpoint.open(str(tiny("llama"))).load_transformers(torch.float32)
    config = GenerationConfig(
        do_sample=True, **{name: value or None for name, value in fields.items()}
    )
    theirs = model._get_logits_processor(config, input_ids_seq_length=1)
    ours = Sampling(**fields).processors()
    assert [type(process) for process in ours] == [type(process) for process in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert vars(mine) == vars(other)


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("given", "said", "hint"),
    [
        (["--top-p", "0.5"], "--top-p has no effect at temperature 0", "--temperature 1"),
        (["--top-k", "5"], "--top-k has no effect at temperature 0", "--temperature 1"),
        (["--min-p", "0.1"], "--min-p has no effect at temperature 0", "--temperature 1"),
        (["--temperature", "1e-4"], "0.0001 is too low", "--temperature 0"),
    ],
)
def test_sampling_that_would_not_happen_is_refused(
    tiny: Tiny, capfd: Capture, command: str, given: list[str], said: str, hint: str
) -> None:
    prompt = ["hello"] if command == "generate" else []
    assert run_command([command, str(tiny("llama")), *prompt, *given]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert f"hint: {hint}" in err


def test_a_seed_or_a_penalty_needs_no_temperature(tiny: Tiny) -> None:
    command = ["generate", str(tiny("llama")), "The", "--max-new-tokens", "2", "-q"]
    assert run_command([*command, "--seed", "1", "--repetition-penalty", "1.1"]) == 0


def test_the_chat_template_is_applied_on_request(tiny: Tiny, capfd: Capture) -> None:
    command = ["generate", str(tiny("llama")), "hello", "--max-new-tokens", "2", "-q", "--json"]
    assert run_command(command) == 0
    plain = json.loads(capfd.readouterr().out)["prompt_tokens"]
    assert run_command([*command, "--chat"]) == 0
    assert json.loads(capfd.readouterr().out)["prompt_tokens"] > plain


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ("x " * 600, "1", ["the prompt has", "512"]),
        ("x " * 10, "510", ["512", "510"]),
        ("", "1", ["empty"]),
    ],
)
def test_what_the_context_cannot_hold_is_refused(
    tiny: Tiny, capfd: Capture, prompt: str, new: str, words: list[str]
) -> None:
    command = ["generate", str(tiny("llama")), prompt, "--max-new-tokens", new]
    assert run_command(command) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert all(word in err for word in words)


def test_common_prefix_is_the_shared_head() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([2], [1]) == 0


def test_a_reused_prefix_gives_the_same_text_as_a_fresh_cache(tiny: Tiny) -> None:
    engine = Engine.load(Checkpoint.open(str(tiny("llama"))))
    first, second = [5, 6, 7, 8, 9], [5, 6, 7, 20, 21, 22]
    cache = engine.new_cache(1, 64)
    list(engine.generate([first], max_new_tokens=4, cache=cache, ignore_eos=True))
    assert reuse_prefix(cache, first, second) == 3
    reused = list(engine.generate([second], max_new_tokens=6, cache=cache, ignore_eos=True))
    assert reused == list(engine.generate([second], max_new_tokens=6, ignore_eos=True))


def test_an_identical_prompt_leaves_one_token_to_feed(tiny: Tiny) -> None:
    engine = Engine.load(Checkpoint.open(str(tiny("llama"))))
    cache = engine.new_cache(1, 16)
    engine.extend(cache, torch.tensor([5, 6, 7]))
    assert reuse_prefix(cache, [5, 6, 7], [5, 6, 7]) == 2
    assert cache.lengths == [2]


def chat(
    monkeypatch: pytest.MonkeyPatch, folder: Path, said: str, *options: str, new: int = 6
) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return run_command(["chat", str(folder), "--max-new-tokens", str(new), *options])


def test_a_conversation_on_a_pipe_answers_each_line_and_reuses_the_cache(
    tiny: Tiny, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(monkeypatch, tiny("llama"), "hello\n\nand again\n") == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if "reused" in line]
    assert len(notes) == 2
    assert notes[0].startswith("[0 of ")
    assert not notes[1].startswith("[0 of ")


@pytest.mark.parametrize("new", [1, 2, 6, 24])
@pytest.mark.parametrize("said", ["hello", "and you", "The quick brown fox"])
def test_the_second_answer_is_that_of_a_fresh_cache(
    tiny: Tiny, capfd: Capture, monkeypatch: pytest.MonkeyPatch, said: str, new: int
) -> None:
    folder = tiny("llama")
    assert chat(monkeypatch, folder, f"{said}\ngo on\n", new=new) == 0
    out, err = capfd.readouterr()
    reused = [int(number) for number in re.findall(r"^\[(\d+) of", err, re.MULTILINE)]

    engine = Engine.load(Checkpoint.open(str(folder)))
    messages, replies, fed, expected = list[dict[str, str]](), "", list[int](), list[int]()
    for line in (said, "go on"):
        messages.append({"role": "user", "content": line})
        ids = chat_ids(engine.tokenizer, messages, str(folder))
        expected.append(common_prefix(fed, ids))
        steps = engine.generate([ids], max_new_tokens=new)  # each time a new cache
        tokens = [token for (token,) in steps if token is not None]
        fed = [*ids, *tokens[:-1]]  # the last token is drawn but never fed
        reply = engine.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        messages.append({"role": "assistant", "content": str(reply)})
        replies += f"{reply}\n"
    assert out == replies
    assert reused == expected


def test_reset_forgets_and_exit_ends(
    tiny: Tiny, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "hello\n/reset\n/help\nother\n/exit\nnever asked\n"
    assert chat(monkeypatch, tiny("llama"), said) == 0
    err = capfd.readouterr().err
    assert "/help is no command: /reset forgets" in err
    notes = [line for line in err.splitlines() if "reused" in line]
    assert len(notes) == 2
    assert notes[1].startswith("[0 of ")


def test_a_conversation_longer_than_the_context_is_an_error_on_a_pipe(
    tiny: Tiny, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(monkeypatch, tiny("llama"), "word " * 600 + "\n") == 2
    err = capfd.readouterr().err
    assert "512" in err
    assert "/reset" in err


def test_a_model_without_a_chat_template_cannot_chat(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model("llama", tmp_path)
    (folder / "chat_template.jinja").unlink()
    assert chat(monkeypatch, folder, "hello\n") == 4
    err = capfd.readouterr().err
    assert "no chat template" in err
    assert "hint:" in err


def test_the_python_of_the_readme_runs(smollm2: Checkpoint, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    Plan(base_of(smollm2), whole_layers(smollm2)).write(tmp_path / "bits.plan")
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(" Paris.")
