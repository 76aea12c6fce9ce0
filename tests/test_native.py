"""Kernels in C against plain torch, and what compiles them."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from _kernel_tools import TOLERANCE, packed_memory, rms_ratio
from hypothesis import strategies as st

from kvtool.checkpoint import Checkpoint
from kvtool.doctor import examine
from kvtool.errors import UsageError
from kvtool.kernels import native
from kvtool.kernels.decode_attention import (
    Run,
    decode_attention,
    decode_rows,
    decode_runs,
    e4m3,
    fits,
    reference,
)
from kvtool.kernels.decode_attention.native import WIDEST
from kvtool.kernels.dispatch import VARIABLE
from kvtool.kernels.latent_attention import latent_decode_attention, latent_decode_rows
from kvtool.kernels.latent_attention import reference as latent_reference
from kvtool.kernels.native import PART
from kvtool.kernels.packed_attention import packed_attention, paged
from kvtool.kernels.packed_attention.native import packed_attention as packed_kernel
from kvtool.runtime import Engine

compiled = pytest.mark.skipif(native.compiler() is None, reason="there is no C compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {**TOLERANCE, torch.float16: TOLERANCE[torch.bfloat16], torch.uint8: 1e-5}
LENGTHS = (1, 2, 15, 16, 17, 100, PART - 1, PART, PART + 1, 2 * PART + 5)


def random_codes(*shape: int) -> torch.Tensor:
    """Of e4m3 numbers, as bytes."""
    return torch.randn(shape).to(torch.float8_e4m3fn).view(torch.uint8)


@compiled
@hypothesis.given(
    width=st.integers(1, WIDEST), heads=st.integers(1, 3), group=st.integers(1, 9),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES), sink=st.booleans(),
)  # fmt: skip
@hypothesis.settings(max_examples=40, deadline=None)
def test_rows_are_read_as_by_plain_torch(width, heads, group, lengths, dtype, sink):
    shape = (len(lengths), heads, max(lengths) + 3, width)
    keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    for b, n in enumerate(lengths):
        for plane in (keys, values):
            plane[b, :, :n] = torch.randn(heads, n, width)
    q = torch.randn(len(lengths), heads * group, width).to(dtype)
    logits = torch.randn(heads * group) if sink else None
    exact = (x.float() for x in (q, keys, values))
    expected = reference.decode_attention(*exact, lengths, width**-0.5, logits)
    found = decode_attention(q, keys, values, lengths, width**-0.5, logits)
    assert found.dtype == dtype
    assert rms_ratio(found, expected) < TOLERANCES[dtype]
    apart = [[x[None] for x in plane] for plane in (keys, values)]
    assert torch.equal(decode_rows(q, *apart, lengths, width**-0.5, logits), found)


@compiled
@pytest.mark.parametrize("width", [8, 64, 80, 100])
def test_runs_of_any_dtypes_are_one_softmax(width):
    counts = (5, 0, PART + 1)  # of heads behind each other
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)])
    scales = torch.tensor([0.5, 2.0, 1.5]), torch.tensor([2.0, 1.0, 0.3])
    kept = torch.randn(sum(counts), width), torch.randn(sum(counts), width)
    codes = random_codes(3, 300, width), random_codes(3, 300, width)
    near = tuple(torch.randn(3, 9, width).bfloat16() for _ in range(2))
    q = torch.randn(1, 6, width)
    runs = [Run(*kept, max(counts), starts), Run(*codes, 300, scales=scales), Run(*near, 9)]
    found = decode_runs(q, [runs], 3, 0.2)[0][0]
    for head, n in enumerate(counts):
        own = slice(starts[head], starts[head] + n)
        keys, values = (
            torch.cat((x[own], e4m3.widen(c[head]) * s[head], y[head].float()))
            for x, c, s, y in zip(kept, codes, scales, near, strict=True)
        )
        asked = q[0, 2 * head : 2 * head + 2]
        expected = torch.softmax(asked @ keys.T * 0.2, dim=-1) @ values
        assert rms_ratio(found[2 * head : 2 * head + 2], expected) < 1e-5


@compiled
@hypothesis.given(
    heads=st.integers(1, 3), group=st.integers(1, 10), dtype=st.sampled_from(DTYPES),
    widths=st.tuples(*[st.sampled_from((1, 8, 24, 64, 96, 130, WIDEST))] * 2), sink=st.booleans(),
    lengths=st.lists(st.sampled_from((0, 1, 40, PART + 3)), min_size=1, max_size=3),
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None)
def test_keys_and_values_of_any_width_and_the_mass_of_their_scores(
    heads, group, dtype, widths, sink, lengths
):
    """Two runs of each row, in lines and heads that lie apart."""
    q = torch.randn(len(lengths), heads * group, widths[0]).to(dtype)
    logits = torch.randn(heads * group) if sink else None
    planes = [
        torch.randn(len(lengths), 700, heads, n + 5).to(dtype).transpose(1, 2) for n in widths
    ]
    keys, values = (plane[..., 2:-3] for plane in planes)
    read = [
        [Run(k[:, 100:], v[:, 100:], n), Run(k, v, min(n, 9))]
        for k, v, n in zip(keys, values, lengths, strict=True)
    ]
    found, mass = decode_runs(q, read, heads, 0.1, logits)
    # The same from each run by itself, the first of which the second is told.
    first = decode_runs(q, [runs[:1] for runs in read], heads, 0.1)
    told, its_mass = decode_runs(q, [runs[1:] for runs in read], heads, 0.1, logits, first)
    torch.testing.assert_close(its_mass, mass, rtol=1e-6, atol=1e-6)
    if max(lengths):
        assert rms_ratio(told, found) < 2 * TOLERANCES[dtype]
    for b, n in enumerate(lengths):
        at = [*range(100, 100 + n), *range(min(n, 9))]
        k, v = keys[b][:, at].float(), values[b][:, at].float()
        scores = 0.1 * q[b].float().unflatten(0, (heads, group)) @ k.mT
        if sink:
            scores = torch.cat((scores, logits.view(heads, group, 1)), dim=-1)
            v = torch.cat((v, torch.zeros(heads, 1, widths[1])), dim=1)
        torch.testing.assert_close(mass[b], scores.logsumexp(-1).flatten(), rtol=1e-5, atol=1e-5)
        if n:
            assert rms_ratio(found[b], (scores.softmax(-1) @ v).flatten(0, 1)) < TOLERANCES[dtype]
        else:
            assert not found[b].any()


@compiled
@pytest.mark.parametrize("queries", [0, 9, 14])
def test_a_row_is_the_same_beside_any_others(queries):
    """And with threads for its query heads alone, where there are fewer parts than threads."""
    lengths, width = [300, 1, 0, PART + 1], 96
    keys, values = torch.randn(4, 1, 600, width), torch.randn(4, 1, 600, 40)
    q = torch.randn(4, queries, width)
    other = torch.randn(4, queries, 40), torch.randn(4, queries)
    read = [[Run(k, v, n)] for k, v, n in zip(keys, values, lengths, strict=True)]
    before = torch.get_num_threads()
    for beside in (None, other):
        torch.set_num_threads(1)
        together = decode_runs(q, read, 1, 0.1, None, beside)
        for threads in (1, 5):
            torch.set_num_threads(threads)
            for b in range(4):
                own = beside and tuple(x[b : b + 1] for x in beside)
                alone = decode_runs(q[b : b + 1], read[b : b + 1], 1, 0.1, None, own)
                for one, all_of_them in zip(alone, together, strict=True):
                    assert torch.equal(one[0], all_of_them[b])
    torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "rank", "rope"), [(9, 160, 32), (1, 8, 0), (20, 512, 64), (5, 7, 3)]
)
def test_latents_are_read_as_by_plain_torch(heads, rank, rope, dtype):
    lengths = [PART + 9, 1, 70]
    latents = torch.full((3, PART + 20, rank + rope), torch.nan)
    for plane, n in zip(latents, lengths, strict=True):
        plane[:n] = torch.randn(n, rank + rope)
    latents, q = latents.to(dtype), torch.randn(3, heads, rank + rope).to(dtype)
    args = (rank, lengths, 0.1)
    expected = latent_reference.latent_decode_attention(q.float(), latents.float(), *args)
    found = latent_decode_attention(q, latents, *args)
    assert found.dtype == dtype
    assert rms_ratio(found, expected) < TOLERANCES[dtype]
    assert torch.equal(latent_decode_rows(q, latents.split(1), *args), found)


@compiled
def test_a_row_without_tokens_is_zeros():
    keys = torch.full((1, 4, 8), torch.nan)
    full = [Run(torch.ones(1, 4, 8), torch.ones(1, 4, 8), 4)]
    found = decode_runs(torch.ones(2, 2, 8), [[Run(keys, keys, 0)], full], 1, 1.0, torch.ones(2))[0]
    assert not found[0].any()
    assert found[1].all()


@compiled
def test_every_e4m3_number_is_read():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    run = Run(torch.zeros_like(values), values, 1)
    found = decode_runs(torch.zeros(1, 1, 256), [[run]], 1, 1.0)[0][0]
    expected = values[0].view(torch.float8_e4m3fn).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["keys", "values"])
def test_not_a_number_is_not_lost(place, dtype):
    for at in (0, 7, PART, PART + 30):
        planes = {x: torch.randn(1, 1, PART + 40, 24).to(dtype) for x in ("keys", "values")}
        planes[place][0, 0, at, 5] = torch.nan
        q = torch.ones(1, 2, 24).to(dtype)
        found = decode_attention(q, planes["keys"], planes["values"], [PART + 40], 1.0)
        assert found[..., 5].isnan().all()


@compiled
def test_nothing_behind_the_memory_is_read():
    """The last numbers end where the machine allows no reading."""
    size, width, tokens = mmap.PAGESIZE, 7, 21
    memory = mmap.mmap(-1, 3 * size)
    buffer = (ctypes.c_char * (3 * size)).from_buffer(memory)
    start = ctypes.addressof(buffer)
    libc = ctypes.CDLL(None, use_errno=True)
    for itemsize, dtype in ((4, torch.float32), (2, torch.bfloat16), (1, torch.uint8)):
        used = width * tokens * itemsize
        plane = torch.frombuffer(memory, dtype=dtype, count=width * tokens, offset=2 * size - used)
        keys = plane.view(1, tokens, width)
        keys.fill_(1)
        assert libc.mprotect(ctypes.c_void_p(start + 2 * size), size, 0) == 0
        found = decode_runs(torch.ones(1, 1, width), [[Run(keys, keys, tokens)]], 1, 1.0)[0]
        assert libc.mprotect(ctypes.c_void_p(start + 2 * size), size, 3) == 0
        assert (found == (1 if itemsize > 1 else 2**-9)).all()


@compiled
def test_threads_do_not_change_a_bit():
    ring, blocks, lengths = packed_memory(4, 3, lengths=(1200, 70))
    keys = torch.randn(2, 3, 1500, 80)
    q, asked = torch.randn(2, 6, 80), torch.randn(2, 6, 64)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(decode_attention(q, keys, keys, [1500, 700], 0.1))
        found.append(packed_attention(asked, ring, blocks, lengths, 0.1))
    torch.set_num_threads(before)
    for one, other in zip(found[:2] * 2, found[2:], strict=True):
        assert torch.equal(one, other)


@compiled
@hypothesis.given(
    bits=st.tuples(*[st.sampled_from((2, 3, 4, 8))] * 2), size=st.sampled_from((16, 32, 64)),
    width=st.sampled_from((8, 24, 64, 80, 96, 128, 192, 512)), group=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES), sink=st.booleans(), turned=st.booleans(),
    length=st.sampled_from((0, 1, 7, 100, 217, 700)),
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None)
def test_packed_heads_are_read_as_by_plain_torch(
    bits, size, width, group, dtype, sink, turned, length
):
    hypothesis.assume(width * length <= 60_000)
    ring, blocks, lengths = packed_memory(
        *bits, size=size, width=width, lengths=(length, 90), dtype=dtype
    )
    blocks = blocks._replace(turned=turned)
    q = torch.randn(2, 2 * group, width).to(dtype)
    logits = torch.randn(2 * group) if sink else None
    expected = paged.packed_attention(q.float(), ring, blocks, lengths, 0.1, logits)
    found = packed_kernel(q, ring, blocks, lengths, 0.1, logits)
    assert found.dtype == dtype
    assert rms_ratio(found, expected) < TOLERANCES[dtype]


@compiled
def test_what_a_kernel_cannot_read_runs_in_plain_torch():
    keys = torch.randn(1, 2, 5, 8)
    assert fits(keys, keys, keys)
    assert fits(keys, keys, keys[..., :4])
    assert not fits(keys, keys, keys[:, :, :4])
    assert not fits(keys, keys, keys.bfloat16())
    assert not fits(keys, *[keys.double()] * 2)
    assert not fits(*[torch.randn(1, 2, 5, WIDEST + 1)] * 2, keys)
    assert not fits(keys, keys, torch.randn(1, 2, 5, WIDEST + 1))
    assert not fits(keys.clone().requires_grad_(), keys, keys)
    assert not fits(keys, keys.clone().requires_grad_(), keys)
    assert not fits(keys.to("meta"), keys, keys)
    assert not fits(keys, keys.mT.contiguous().mT, keys)
    assert not fits(keys, *[torch.randn(1, 2, 5, 16)[..., ::2]] * 2)
    assert not fits(keys, *[torch.ones(1, 2, 5, 8, dtype=torch.uint8)] * 2)
    assert not fits(keys[..., :4], keys, keys)
    q, between = keys[:, :, 0], torch.randn(1, 5, 2, 8).transpose(1, 2)
    expected = decode_attention(q, between.contiguous(), between.contiguous(), [5], 0.3)
    torch.testing.assert_close(decode_attention(q, between, between, [5], 0.3), expected)
    with pytest.raises(AssertionError):
        decode_attention(q, keys, keys, [6], 0.3)


@compiled
@pytest.mark.parametrize("change", ["wide", "small blocks", "double", "mixed", "part", "learns"])
def test_packed_heads_that_a_kernel_cannot_read_run_in_plain_torch(change):
    size, width = (8 if change == "small blocks" else 32), (576 if change == "wide" else 24)
    ring, blocks, lengths = packed_memory(8, 8, size=size, width=width, lengths=(90,))
    q = torch.randn(1, 4, width, requires_grad=change == "learns")
    if change == "double":
        ring = ring._replace(keys=ring.keys.double(), values=ring.values.double())
    if change == "mixed":
        ring = ring._replace(values=ring.values.bfloat16())
    if change == "part":
        ring = ring._replace(values=torch.cat((ring.values,) * 2, dim=-1)[..., :width])
    expected = paged.packed_attention(q, ring, blocks, lengths, 0.1)
    found = packed_attention(q, ring, blocks, lengths, 0.1)
    assert torch.equal(found, expected)
    assert found.requires_grad == (change == "learns")


@compiled
def test_scores_without_end_are_weights_of_zero():
    """A part whose scores are all -inf adds nothing, and hides nothing that is no number."""
    keys, values = torch.ones(1, 1, PART + 1, 8), torch.ones(1, 1, PART + 1, 8)
    q = torch.ones(1, 1, 8)
    for at in (5, PART):
        keys[0, 0, at] = -torch.inf
        assert (decode_attention(q, keys, values, [PART + 1], 1.0) == 1).all()
    assert decode_attention(q, keys[:, :, PART:], values[:, :, PART:], [1], 1.0).isnan().all()
    keys[0, 0, PART] = torch.nan
    assert decode_attention(q, keys, values, [PART + 1], 1.0).isnan().all()


@compiled
def test_small_numbers_are_read_where_subnormal_ones_are_flushed():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    halves = torch.arange(-40, 41).mul(2.0**-24).half().view(1, 1, 81)
    expected = codes[0].view(torch.float8_e4m3fn).float()
    assert torch.set_flush_denormal(True)
    run = Run(torch.zeros_like(codes), codes, 1)
    found = decode_runs(torch.zeros(1, 1, 256), [[run]], 1, 1.0)[0][0]
    read = decode_runs(torch.zeros(1, 1, 81), [[Run(halves * 0, halves, 1)]], 1, 1.0)[0][0]
    torch.set_flush_denormal(False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(read, halves[0].float())


@pytest.fixture
def forgetful():
    """Forgets which compiler there is, before and after."""
    caches = (native._found, native._own_folder)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def kernels_found() -> str:
    return next(x.found for x in examine() if x.name == "kernels")


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler_plain_torch_runs(forgetful, tiny, monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_COMPILERS", ())
    assert native.compiler() is None
    keys = torch.randn(1, 2, 5, 8)
    assert not fits(keys, keys, keys)
    assert decode_attention(torch.randn(1, 4, 8), keys, keys, [5], 1.0).isfinite().all()
    assert "no C compiler" in kernels_found()
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(ValueError, match="needs a C compiler"):
        fits(keys, keys, keys)
    with pytest.raises(UsageError, match="needs a C compiler"):
        Engine.load(Checkpoint.open(str(tiny("llama"))))


@compiled
def test_what_was_compiled_is_kept_and_mended(forgetful, monkeypatch, tmp_path):
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path))
    assert native.compiler() is not None
    (kept,) = (tmp_path / "kernels").iterdir()
    content, compiled_anew = kept.read_bytes(), []

    def build(command: list[str], folder: Path) -> Path:
        made = folder / f"kernels-{kept.stem.rpartition('-')[2]}.so"
        made.write_bytes(content)
        compiled_anew.append(made)
        return made

    monkeypatch.setattr(native, "_build", build)
    for broken in (b"", b"no library", content[:4096], content[: len(content) // 2]):
        kept.unlink()
        kept.write_bytes(broken)  # as a full disk leaves it
        native._found.cache_clear()
        assert native.compiler() is not None
        assert kept.read_bytes() == content
    assert len(compiled_anew) == 4
    native._found.cache_clear()  # as in the next process
    assert "in C" in kernels_found()
    assert len(compiled_anew) == 4


@compiled
def test_a_home_that_cannot_be_written_is_done_without(forgetful, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "file"))
    assert native.compiler() is not None
    native._found.cache_clear()
    monkeypatch.setattr(native, "home", raising_nobody)
    assert native.compiler() is not None
    native._found.cache_clear()
    native._own_folder.cache_clear()
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert native.compiler() is None


def raising_nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_compiler_that_hangs_is_stopped_once(forgetful, monkeypatch, tmp_path):
    hanging = tmp_path / "cc"
    hanging.write_text(f"#!/bin/sh\necho >> {tmp_path}/runs\nsleep 1000\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("CC", str(hanging))
    monkeypatch.setenv("KVTOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(native, "_SECONDS", 0.5)
    assert native.compiler() is None
    assert native.compiler() is None
    assert (tmp_path / "runs").read_text() == "\n"


@compiled
def test_processes_and_threads_may_compile_at_once(tmp_path):
    code = (
        "import threading, torch\n"
        "from kvtool.kernels.decode_attention import decode_attention\n"
        "k = torch.ones(1, 2, 5, 8)\n"
        "run = lambda: decode_attention(torch.ones(1, 4, 8), k, k, [5], 1.0)\n"
        "threads = [threading.Thread(target=run) for _ in range(2)]\n"
        "[x.start() for x in threads]; [x.join() for x in threads]\n"
        "assert (run() == 1).all()\n"
    )
    own = os.environ | {"KVTOOL_HOME": str(tmp_path), VARIABLE: "native"}
    running = [subprocess.Popen([sys.executable, "-c", code], env=own) for _ in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]


@compiled
def test_there_is_one_openmp_runtime():
    decode_attention(torch.ones(1, 1, 8), *[torch.ones(1, 1, 5, 8)] * 2, [5], 1.0)
    try:
        maps = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        pytest.skip("this system does not say what a process has loaded")
    assert len({line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}) <= 1
