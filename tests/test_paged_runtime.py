"""Paged memory: what its kernels compute is what the contiguous stores compute."""

import gc
from dataclasses import replace

import pytest
import torch
from _code_tools import WINDOWED, coded
from _family_cases import CASES, LATENTS
from _hybrid_tools import write_hybrid
from _kernel_tools import DEVICE
from test_floats import SCALES, floats

from kvtool.bits import Bits
from kvtool.checkpoint import Checkpoint
from kvtool.cli.serve import room
from kvtool.convert import conversion, planning
from kvtool.errors import UsageError
from kvtool.kernels.dispatch import VARIABLE
from kvtool.kernels.quantise import BITS
from kvtool.latent_bits import LatentPlan
from kvtool.layer_plan import LayerPlan
from kvtool.plan import Plan, base_of, whole_layers
from kvtool.runtime import Engine, paged_split
from kvtool.runtime import coded as coded_store
from kvtool.runtime.graphs import PagedMemory, waits_for_experts
from kvtool.runtime.memory import RowMemory
from kvtool.runtime.packed_latents import PackedLatentAttention
from kvtool.runtime.pages import Pages, Place
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.runtime.stores import PAGE

pytest.importorskip("triton")

KINDS = [
    "qwen3", "streaming", "streaming-sparse", "packed", "packed-sparse", "codes", "codes-narrow",
    "mla", "mla-packed", "mla-packed-streamed", "hybrid", "budgets", "budgets-mixed",
    "qwen3_5_text", "qwen3_5_text, budgets", "qwen3_5_text, packed", "gemma4_text, keys are values",
    "starcoder2, window", "gemma3_text", "gemma3_text, budgets", "gemma3_text, codes",
    "smollm3", "glm4", "ministral3", "gpt_oss, budgets", "gpt_oss, codes", "gpt_oss, packed",
    "deepseek_v2", "minicpm3", "fp8", "fp8, streamed", "fp8 alone", "fp8, window", "gpt_oss, fp8",
    "gpt_oss, fp8, window", "gemma4_text, shared", "gemma4_text, shared, packed",
    "gemma4_text, shared, streamed", "gemma4_text, shared, fp8", "gemma4_text, shared, fp8, window",
]  # fmt: skip


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed))


def budgeted(checkpoint: Checkpoint, mixed: bool) -> Plan:
    """Budgets of every kind: within a page, of several, and more than any prompt has."""
    layers = [LayerPlan((False, False), budget=n) for n in ((7, 70), (64, 30), (500, 1))]
    if mixed:
        layers = [
            LayerPlan((True, False), 3, 9, budget=(None, 70)),
            LayerPlan((False, False)),
            LayerPlan((False, False), budget=(5, None)),
        ]
    policy = "expected" if mixed else "snapkv"
    return Plan(base_of(checkpoint), tuple(layers), prefill="dense", policy=policy)


def packed_latents(checkpoint: Checkpoint, prefill: str) -> Plan:
    """Random widths; in some layers all, in others one."""
    generator, layers = torch.Generator().manual_seed(0), []
    for attention in Engine.load(checkpoint, device=DEVICE).attentions:
        rank, rope = attention.stages.rank, attention.stages.rope_dim
        widths = torch.tensor(BITS if len(layers) else (4,))
        drawn = widths[torch.randint(len(widths), (rank + rope,), generator=generator)]
        bits, odd = tuple(drawn.tolist()), len(layers) % 2
        kept = LatentPlan(rank, rope, bits, 32 if odd else 64, window=6 if odd else 5)
        layers.append(LayerPlan((), kept=kept))
    return Plan(base_of(checkpoint), tuple(layers), prefill=prefill)


@pytest.fixture(scope="module")
def engines(tiny, tmp_path_factory):
    """``engines(kind)``: the engine with contiguous stores, and the one with paged ones."""
    made = {}

    def get(kind: str) -> tuple[Engine, Engine]:
        if kind not in made:
            family, more = (CASES | LATENTS).get(kind, ("llama", {}))
            checkpoint, plan = Checkpoint.open(str(tiny(family, **more))), None
            if kind.startswith("streaming"):
                layers = [(True, False), (True, True), (False, False)]
                prefill = "sparse" if kind.endswith("sparse") else "dense"
                plan = Plan(
                    base_of(checkpoint),
                    tuple(LayerPlan(streams, 3, 9) for streams in layers),
                    prefill=prefill,
                )
            elif kind.startswith("gemma4_text, shared, "):
                checkpoint = Checkpoint.open(str(tiny("gemma4_text", **CASES[kind[:19]][1])))
                layers, fp8 = list(whole_layers(checkpoint)), "fp8" in kind
                scales = replace(SCALES, window=6 * kind.endswith("window")) if fp8 else None
                bits = Bits(8, 3, 64, hadamard="values", window=6), Bits(4, 2, 64, window=5)
                for layer, own in zip((1, 3), bits, strict=True):  # 3 is read by later layers
                    own = None if fp8 else own if kind.endswith("streamed") else bits[0]
                    layers[layer] = replace(layers[layer], bits=own, scales=scales)
                prefill = "dense" if kind.endswith("packed") else "streamed"
                plan = Plan(base_of(checkpoint), tuple(layers), prefill)
            elif kind == "qwen3_5_text, packed":
                checkpoint = Checkpoint.open(str(tiny("qwen3_5_text", **CASES["qwen3_5_text"][1])))
                state, heads = whole_layers(checkpoint)[:2]
                layers = [replace(heads, bits=Bits(4, 2, 64, window=n)) for n in (5, 6)]
                plan = Plan(base_of(checkpoint), (state, layers[0], state, layers[1]))
            elif kind.startswith("fp8"):
                prefill = "dense" if kind == "fp8" else "streamed"
                streams = ((True, False), (False, False), (True, True))
                if kind.endswith("alone"):
                    streams = ((False, False),) * 3
                plan = floats(checkpoint, prefill, streams, window=6 * kind.endswith("window"))
            elif kind.startswith("gpt_oss, fp8"):
                checkpoint = Checkpoint.open(str(tiny("gpt_oss", **CASES["gpt_oss"][1])))
                window, heads = whole_layers(checkpoint)[:2]
                scales = replace(SCALES, window=6 * kind.endswith("window"))
                some = LayerPlan((False, True), 3, 9, scales=scales)
                whole = replace(heads, scales=scales)
                plan = Plan(base_of(checkpoint), (window, some, window, whole), "streamed")
            elif kind == "gpt_oss, packed":
                checkpoint = Checkpoint.open(str(tiny("gpt_oss", **CASES["gpt_oss"][1])))
                window, heads = whole_layers(checkpoint)[:2]
                some = LayerPlan((False, True), 3, 9, bits=Bits(4, 2, 64, window=5))
                plan = Plan(base_of(checkpoint), (window, some, window, heads))
            elif kind.endswith(("_text, budgets", "gpt_oss, budgets")):
                name = kind.removesuffix(", budgets")
                checkpoint = Checkpoint.open(str(tiny(name, **CASES[name][1])))
                layers = whole_layers(checkpoint)
                first = (None, 70) if name == "gpt_oss" else (7, 70)
                some = [replace(layers[1], budget=first), LayerPlan((True, False), 3, 9)]
                plan = Plan(
                    base_of(checkpoint),
                    (layers[0], some[0], layers[2], replace(some[1], budget=(None, 30))),
                    policy="snapkv",
                )
            elif kind.startswith("budgets"):
                plan = budgeted(checkpoint, mixed=kind.endswith("mixed"))
            elif kind.startswith("packed"):
                bits = Bits(4, 2, 64, window=5), Bits(8, 3, 64, hadamard="values", window=6), None
                layers = [((False, True), bits[0]), ((False, False), bits[1]), ((True,) * 2, None)]
                plan = Plan(
                    base_of(checkpoint),
                    tuple(LayerPlan(streams, 3, 9, bits=own) for streams, own in layers),
                    prefill="sparse" if kind.endswith("sparse") else "dense",
                )
            elif kind.endswith(", codes"):
                name = kind.removesuffix(", codes")
                family, more = WINDOWED[name] if name in WINDOWED else CASES[name]
                checkpoint = Checkpoint.open(str(tiny(family, **more)))
                plan = coded(checkpoint, share=0.5)
            elif kind.startswith("codes"):
                plan = coded(checkpoint, share=0.5 if kind.endswith("narrow") else 1.0)
            elif kind.startswith("mla"):
                output = tmp_path_factory.mktemp("latent") / "mla"
                options = planning.ConvertOptions(
                    method="transmla",
                    target="transformers",
                    kv_budget="60%",
                    freqfold="2",
                    tokens=2048,
                )
                conversion.convert(checkpoint, output, options)
                checkpoint = Checkpoint.open(str(output))
                if kind != "mla":
                    prefill = "streamed" if kind.endswith("streamed") else "dense"
                    plan = packed_latents(checkpoint, prefill)
            elif kind == "hybrid":
                folder = tmp_path_factory.mktemp("hybrid") / "model"
                write_hybrid(tiny("llama"), folder, [0, 2])
                checkpoint = Checkpoint.open(str(folder))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(VARIABLE, "reference")
                contiguous = Engine.load(checkpoint, plan=plan, device=DEVICE)
                patch.setenv(VARIABLE, "triton")
                made[kind] = contiguous, Engine.load(checkpoint, plan=plan, device=DEVICE)
        made[kind][1].memory = None  # which another test may have opened
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_rows_decode_as_in_contiguous_memory(engines, monkeypatch, kind):
    contiguous, paged = engines(kind)
    assert paged.paged
    assert not contiguous.paged
    prompts = [tokens(n, seed=n) for n in (136, 5)]  # the next two tokens fill blocks
    found = []
    for engine in (contiguous, paged):
        monkeypatch.setenv(VARIABLE, "triton" if engine is paged else "reference")
        cache = engine.new_cache(2, 136)
        logits = [torch.stack([engine.extend(cache, ids, row) for row, ids in enumerate(prompts)])]
        logits += [engine.decode(cache, tokens(2, seed=step)) for step in range(2)]
        later = [engine.extend(cache, tokens(3), row) for row in range(2)]
        found.append(torch.stack([*logits, torch.stack(later)]))
    # Some numbers lie on the edge between two codes, which in e4m3 are an eighth apart.
    edges = kind == "gemma4_text, shared, fp8"
    torch.testing.assert_close(found[1], found[0], atol=1e-2 if edges else 2e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["streaming", "fp8, window"])
def test_a_paged_memory_grows_and_keeps_what_it_has(engines, monkeypatch, kind):
    contiguous, paged = engines(kind)
    ids = tokens(3 * PAGE + 5)
    expected = contiguous.extend(contiguous.new_cache(1, 1), ids, all_logits=True)
    monkeypatch.setenv(VARIABLE, "triton")
    cache = paged.new_cache(1, 1)
    assert cache.capacity == PAGE
    found = paged.extend(cache, ids[:PAGE], all_logits=True, prompt=len(ids))
    more = paged.extend(cache, ids[PAGE:], all_logits=True, prompt=len(ids))
    torch.testing.assert_close(torch.cat((found, more)), expected, atol=2e-3, rtol=1e-3)
    assert cache.capacity >= len(ids)
    count = cache.memory.pages.rows  # more rows than there are, which have rings of their own
    other = cache.memory.new_cache(count, PAGE)
    last = paged.extend(other, ids[:PAGE], count - 1)
    torch.testing.assert_close(last, expected[PAGE - 1], atol=2e-3, rtol=1e-3)


def test_rows_and_pages_return_with_the_cache(engines, monkeypatch):
    _, paged = engines("streaming")
    monkeypatch.setenv(VARIABLE, "triton")
    paged.open_memory(2**20, rows=2)
    memory = paged.memory
    pages, rows = len(memory.pages._free_pages), len(memory.pages._free_rows)
    cache = paged.new_cache(1, 3 * PAGE)
    assert cache.allocated_bytes == 3 * memory.page_bytes + memory.row_bytes
    assert (len(memory.pages._free_pages), len(memory.pages._free_rows)) == (
        pages - 3,
        rows - 1,
    )
    cache.resize(PAGE)
    assert len(memory.pages._free_pages) == pages - 1
    del cache
    gc.collect()
    assert (len(memory.pages._free_pages), len(memory.pages._free_rows)) == (pages, rows)


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "streaming",
        "packed",
        "mla-packed",
        "budgets-mixed",
        "fp8",
        "fp8, window",
        "gemma4_text, shared, packed",
        "gemma4_text, shared, fp8, window",
    ],
)
def test_the_scheduler_answers_from_shared_pages(engines, monkeypatch, kind):
    contiguous, paged = engines(kind)
    prompts = [tokens(n, seed=n).tolist() for n in (150, 20, 3)]
    answers = []
    for engine in (contiguous, paged):
        monkeypatch.setenv(VARIABLE, "triton" if engine is paged else "reference")
        scheduler = Scheduler(engine, 2**22)
        requests = [Request(prompt, 3, ignore_eos=True) for prompt in prompts]
        for request in [*requests, Request(prompts[0], 3, ignore_eos=True)]:
            scheduler.add(request)
        while not scheduler.idle:
            scheduler.step()
        answers.append([request.tokens for request in requests])
        scheduler.forget_prefixes()
        assert scheduler.used == 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "streaming",
        "packed",
        "mla-packed",
        "gemma3_text, codes",
        "gemma4_text, shared",
        "gemma4_text, shared, packed",
        "fp8",
        "fp8, window",
    ],
)
def test_what_a_row_takes_of_shared_pages_is_foreseen(engines, monkeypatch, kind):
    """Pages have room for packed blocks: they are not counted again, nor is what a row takes."""
    monkeypatch.setenv(VARIABLE, "triton")
    _, paged = engines(kind)
    memory = RowMemory(paged)
    for length in (PAGE, 5 * PAGE):
        assert memory.holding(length, length) == paged.new_cache(1, length).allocated_bytes
        if kind.startswith("fp8"):
            assert memory.holding(length, length) == paged.plan.cache_bytes(length, 4)
        paged.memory = None
    assert memory.bytes_per_token * PAGE == memory.page_bytes
    scheduler = Scheduler(paged, 20 * memory.holding(4 * PAGE, 4 * PAGE), max_running=4)
    pool, counted = paged.memory, scheduler.memory
    assert counted.holding(PAGE, PAGE) + pool.row_bytes == memory.holding(PAGE, PAGE)
    assert counted.holding(4 * PAGE, PAGE) == 4 * pool.page_bytes


@pytest.mark.parametrize("kind", ["budgets", "budgets-mixed"])
def test_heads_with_budgets_take_pages_of_their_own(engines, monkeypatch, kind):
    """As many as are foreseen, before the prompt, behind it, and in later turns."""
    contiguous, paged = engines(kind)
    ids, later = tokens(200), tokens(71, seed=1)
    monkeypatch.setenv(VARIABLE, "reference")
    expected = contiguous.new_cache(1, 1)
    logits = [contiguous.extend(expected, ids), contiguous.extend(expected, later)]
    logits.append(contiguous.decode(expected, tokens(1))[0])
    monkeypatch.setenv(VARIABLE, "triton")
    memory, cache = RowMemory(paged), paged.new_cache(1, len(ids))
    paged.extend(cache, ids[:90], prompt=len(ids))
    found = [paged.extend(cache, ids[90:], prompt=len(ids))]
    assert cache.allocated_bytes == memory.holding(len(ids), len(ids))
    found.append(paged.extend(cache, later))
    found.append(paged.decode(cache, tokens(1))[0])
    torch.testing.assert_close(torch.stack(found), torch.stack(logits), atol=2e-3, rtol=1e-3)
    assert cache.allocated_bytes == memory.holding(272, len(ids))
    dense = 2 * 2 * paged.plan.base.head_dim * 4 * 3  # keys and values of two heads in three layers
    assert cache.allocated_bytes < 0.75 * 320 * dense
    pages = cache.memory.pages
    taken = sum(len(pages) for pages in pages.owned[cache.rows[0]])
    assert taken + len(pages._free_pages) == pages.count - 1


def test_a_row_with_budgets_may_start_over(engines, monkeypatch):
    """With another prompt, or with none; and go back to what its prompt left."""
    contiguous, paged = engines("budgets")
    found = []
    for engine in (contiguous, paged):
        monkeypatch.setenv(VARIABLE, "triton" if engine is paged else "reference")
        cache = engine.new_cache(1, 40)
        engine.extend(cache, tokens(150))
        cache.crop(0, 149)
        assert cache.lengths == [0]
        logits = [engine.extend(cache, tokens(80, seed=1)), engine.extend(cache, tokens(3, seed=2))]
        cache.crop(0, 81)
        assert cache.lengths == [81]
        logits.append(engine.extend(cache, tokens(4, seed=3)))
        cache.crop(0, 0)
        logits += [engine.decode(cache, tokens(1, seed=n))[0] for n in range(2)]
        found.append(torch.stack(logits))
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "room"), [("llama", 6), ("streaming", 8), ("budgets", 36), ("budgets-mixed", 36)]
)
def test_shared_pages_stay_within_the_budget_and_all_return(engines, monkeypatch, kind, room):
    """Also when requests are preempted, or cancelled in the middle of a prompt."""
    _, paged = engines(kind)
    monkeypatch.setenv(VARIABLE, "triton")
    probe = PagedMemory(paged, 0, 0)
    page, row, table = probe.page_bytes, probe.row_bytes, probe.pages.table_bytes
    nbytes = room * page + 4 * row + 13 * table  # prefixes that are kept are rows as well
    scheduler = Scheduler(paged, nbytes, max_running=3)
    memory = paged.memory
    pages, rows = memory.pages.count, memory.pages.rows
    assert pages * page + rows * (row + table) <= nbytes
    requests = [Request(tokens(n, seed=n).tolist(), 5, ignore_eos=True) for n in (124, 126, 150)]
    for request in requests:
        scheduler.add(request)
    scheduler.step()
    scheduler.cancel(requests[0])
    while not scheduler.idle:
        scheduler.step()
    assert kind != "llama" or scheduler.counters.preemptions
    assert all(len(request.tokens) == 5 for request in requests[1:])
    scheduler.forget_prefixes()
    assert (memory.pages.count, memory.pages.rows) == (pages, rows)
    assert len(memory.pages._free_pages) == pages - 1
    assert len(memory.pages._free_rows) == rows - 1
    stores = [
        part
        for store in memory.stores
        for part in (store, getattr(store, "streaming", None), getattr(store, "budgeted", None))
    ]
    for held in ("prompt", "selector"):
        assert all(getattr(store, held, None) is None for store in stores)


def test_tables_of_a_long_context_leave_room_for_requests(tiny, monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    checkpoint = Checkpoint.open(str(tiny("llama", max_position_embeddings=1_000_000)))
    engine = Engine.load(checkpoint, plan=budgeted(checkpoint, mixed=False), device=DEVICE)
    scheduler = Scheduler(engine, 2**24)
    pool = engine.memory
    assert pool.pages.count * pool.page_bytes + pool.fixed_bytes(pool.pages.rows - 1) <= 2**24 + (
        pool.page_bytes
    )
    assert scheduler.room(200) > 200


@pytest.mark.parametrize("kind", ["gemma3_text", "hybrid"])
def test_what_cannot_go_back_is_not_shared_from_pages(engines, monkeypatch, kind):
    for engine in engines(kind):
        monkeypatch.setenv(VARIABLE, "triton" if engine.paged else "reference")
        assert Scheduler(engine, 2**24).share_prefixes != engine.paged


def test_prefixes_leave_rows_for_requests(engines, monkeypatch):
    """No row is made while requests run: what was recorded would have to be recorded again."""
    _, paged = engines("llama")
    monkeypatch.setenv(VARIABLE, "triton")
    scheduler = Scheduler(paged, 2**24, max_running=1, piece=PAGE)
    rows = paged.memory.pages.rows
    for seed in range(6):
        scheduler.add(Request(tokens(PAGE + 1, seed=seed).tolist(), 1, ignore_eos=True))
        while not scheduler.idle:
            scheduler.step()
    assert len(scheduler._prefixes) == 3
    assert paged.memory.pages.rows == rows


def test_caches_of_several_memories_are_not_mixed(engines, monkeypatch):
    _, paged = engines("llama")
    monkeypatch.setenv(VARIABLE, "triton")
    caches = [paged.new_cache(1, 9) for _ in range(2)]
    for cache in caches:
        paged.extend(cache, tokens(5))
    with pytest.raises(ValueError, match="share one memory"):
        paged.decode_rows(caches, [5, 6])


def test_a_row_that_begins_by_decoding_remembers_nothing(engines, monkeypatch):
    contiguous, paged = engines("hybrid")
    found = []
    for engine in (contiguous, paged):
        monkeypatch.setenv(VARIABLE, "triton" if engine is paged else "reference")
        cache = engine.new_cache(1, 40)
        engine.extend(cache, tokens(30))
        cache.crop(0, 0)
        found.append(engine.decode(cache, tokens(1)))
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=1e-3)


def test_a_cache_may_be_larger_than_the_context(engines, monkeypatch):
    _, paged = engines("llama")
    monkeypatch.setenv(VARIABLE, "triton")
    assert paged.new_cache(1, 2 * paged.max_context).capacity == 2 * paged.max_context


@pytest.mark.parametrize(
    ("kernels", "interpret", "said"),
    [
        ("cuda", "1", "can be reference, native or triton"),
        ("triton", "0", "needs TRITON_INTERPRET=1"),
    ],
)
def test_kernels_that_cannot_run_are_refused(tiny, monkeypatch, kernels, interpret, said):
    monkeypatch.setenv(VARIABLE, kernels)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(UsageError, match=said):
        Engine.load(Checkpoint.open(str(tiny("llama"))))


def test_an_engine_whose_layers_have_no_pages_is_not_paged(tiny, monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")

    def paged(checkpoint: Checkpoint, plan: Plan | None = None) -> bool:
        return Engine.load(checkpoint, plan=plan, device=DEVICE).paged

    checkpoint = Checkpoint.open(str(tiny("llama")))
    assert paged(checkpoint)
    assert not paged(checkpoint, coded(checkpoint, "unrotated"))
    plan = coded(checkpoint)
    packed = replace(plan, codes=tuple(replace(x, bits=4) for x in plan.codes))
    assert not paged(checkpoint, packed)
    budgets = budgeted(checkpoint, mixed=True)
    bits = replace(budgets.layers[1], bits=Bits(4, 4, 64))
    mixed = replace(budgets, layers=(budgets.layers[0], bits, budgets.layers[2]))
    assert not paged(checkpoint, mixed)


def test_latents_in_blocks_longer_than_a_page_are_not_paged(engines):
    attention = engines("mla-packed")[1].attentions[0]
    plan = replace(attention.plan, group=2 * PAGE)
    other = PackedLatentAttention(attention.stages, 0, 1.0, plan, dense_prompt=True)
    assert other.new_paged_store(Pages(0, 0, 1, torch.device(DEVICE))) is None


def test_what_two_streams_read_is_there_before_they_part(engines, monkeypatch):
    """What one of them made for the whole step, the other would take for finished."""
    _, paged = engines("packed")
    made: dict[str, list[tuple[int, int]]] = {"before": [], "beside": []}
    where, ring = ["before"], Place.ring

    def watched(at, sink, window):
        if (sink, window) not in at._rings:
            made[where[-1]].append((sink, window))
        return ring(at, sink, window)

    def parted(device, one, other):
        where.append("beside")
        first = one()
        where.pop()
        return first, other()

    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(Place, "ring", watched)
    monkeypatch.setattr(paged_split, "at_once", parted)
    cache = paged.new_cache(1, 9)
    paged.extend(cache, tokens(5))
    paged.decode(cache, tokens(1))
    assert (3, 9) in made["before"]
    assert not made["beside"]


def test_a_prompt_of_one_token_is_read_in_a_row_behind_all_pages(engines, monkeypatch):
    _, paged = engines("codes")
    monkeypatch.setenv(VARIABLE, "triton")
    found = []
    for row in (0, 3):
        cache = paged.new_cache(4, 0)
        found.append(paged.extend(cache, tokens(1), row))
    assert torch.equal(*found)


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA has streams")
@pytest.mark.parametrize("kind", ["streaming", "packed", "codes", "budgets-mixed"])
def test_a_recorded_step_gives_what_its_kernels_give_one_by_one(engines, monkeypatch, kind):
    """Its branches do, too. A step that is run again writes the same."""
    _, paged = engines(kind)
    cache = paged.new_cache(2, 2 * PAGE)
    for row in range(2):
        paged.extend(cache, tokens(PAGE + 4 + row, seed=row), row)
    for seed in range(5):
        starts, ids = list(cache.lengths), tokens(2, seed=seed)
        recorded = paged.decode(cache, ids)
        fed = torch.tensor([cache.rows, starts, ids.tolist()]).to(DEVICE)
        with monkeypatch.context() as patch, torch.inference_mode():
            for module in (paged_split, coded_store):
                patch.setattr(module, "at_once", lambda device, one, other: (one(), other()))
            alone = cache.memory._step(*fed)
        torch.testing.assert_close(recorded, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA can be waited for")
@pytest.mark.parametrize(
    "kind", ["llama", "streaming", "codes", "mla", "mla-packed", "budgets-mixed"]
)
def test_a_decode_step_waits_for_nothing(engines, kind):
    _, paged = engines(kind)
    cache = paged.new_cache(2, 2 * PAGE)
    for row in range(2):
        paged.extend(cache, tokens(PAGE), row)
    ids = tokens(2).pin_memory()
    paged.decode(cache, ids)  # records it
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            paged.decode(cache, ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("kind", "memory", "rows"), [("starcoder2, window", 3.5, 2), ("gemma3_text", 20.0, 9)]
)
def test_rings_are_of_as_many_rows_as_memory_has_room_for(tiny, monkeypatch, kind, memory, rows):
    monkeypatch.setenv(VARIABLE, "triton")
    family, more = CASES[kind]
    checkpoint = Checkpoint.open(str(tiny(family, **{**more, "sliding_window": 200})))
    paged = Engine.load(checkpoint, device=DEVICE)
    probe = PagedMemory(paged, 0, 0)
    each = probe.row_bytes + probe.pages.table_bytes
    scheduler = Scheduler(paged, int(memory * each), max_running=40)
    assert scheduler.max_running == rows
    assert ("2 sequences of up to 512 tokens" in room(scheduler)) is (rows == 2)
    assert scheduler.budget == int(memory * each) - paged.memory.fixed_bytes(rows)
    scheduler.check(100, 100)
    for seed in range(rows + 1):
        scheduler.add(Request(tokens(5, seed).tolist(), 3))
    monkeypatch.setattr(scheduler, "_decode", list)  # prompts alone
    scheduler.step()
    assert len(scheduler.running) == rows
    assert paged.memory.pages.rows == rows + 1


@pytest.mark.parametrize(
    ("family", "dtype", "capability", "waits"),
    [
        ("mixtral", torch.bfloat16, (9, 0), False),
        ("mixtral", torch.bfloat16, (8, 0), True),
        ("mixtral", torch.float32, (9, 0), True),
        ("granitemoe", torch.float16, (10, 0), True),
        ("llama", torch.float32, (8, 0), False),
    ],
)
def test_a_step_that_waits_for_experts_is_not_recorded(
    tiny, monkeypatch, family, dtype, capability, waits
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    checkpoint = Checkpoint.open(str(tiny(family, **CASES[family][1])))
    assert waits_for_experts(checkpoint.load_transformers(dtype)) is waits
