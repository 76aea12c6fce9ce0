"""Which kernels may be trusted, by the assembler that Triton takes."""

import pytest
import torch

pytest.importorskip("triton")

from kvtool.kernels import tiles

HOPPER = 90


@pytest.fixture
def assembler(monkeypatch, tmp_path):
    """``assembler(said)``: puts one that says this of itself in the place of every ptxas."""

    def put(said: str) -> None:
        program = tmp_path / said.replace(" ", "-")
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
        for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):  # which, Triton decides
            monkeypatch.setenv(name, str(program))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        tiles.ptxas_version.cache_clear()

    yield put
    tiles.ptxas_version.cache_clear()


@pytest.mark.parametrize(
    ("version", "sound"),
    [("12.8", False), ("12.9", True), ("12.10", True), ("13.0", True), ("11.9", False)],
)
def test_an_old_assembler_is_not_trusted(assembler, version, sound):
    assembler(f"Cuda compilation tools, release {version}, V{version}.93")
    assert tiles.ptxas_version(HOPPER) == tuple(map(int, version.split(".")))
    assert tiles.has_sound_assembler(torch.device("cuda")) is sound


def test_an_assembler_that_does_not_say_its_version_is_old(assembler, monkeypatch):
    assembler("Cuda compilation tools, release 13.0")
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    monkeypatch.delattr(compiler, "get_ptxas")
    assert tiles.ptxas_version(HOPPER) == ()
    assert not tiles.has_sound_assembler(torch.device("cuda"))


def test_where_nothing_is_assembled_every_size_is_right(assembler):
    assembler("Cuda compilation tools, release 12.8")
    assert tiles.has_sound_assembler(torch.device("cpu"))
