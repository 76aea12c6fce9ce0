"""Many requests in one memory: each as if it were alone, and never a byte more than allowed."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _code_tools import WINDOWED, coded
from _convert_tools import one_thread
from _family_tools import open_case
from _hybrid_tools import write_hybrid
from _packed import assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_coded_bits import coded as packed
from test_floats import floats
from test_packed import packed as few_bits
from test_packed_latents import planned as packed_latents
from test_packed_states import planned as packed_states
from test_sparse_store import sparse
from test_split_store import MIXED, SINK, WINDOW, make_plan

from kvtool.checkpoint import Checkpoint
from kvtool.cli.serve import room
from kvtool.convert import conversion, planning
from kvtool.errors import ResourceError, UsageError
from kvtool.kernels.dispatch import VARIABLE
from kvtool.kernels.native import compiler
from kvtool.runtime import Engine, Sampling
from kvtool.runtime.requests import Request
from kvtool.runtime.scheduler import Scheduler
from kvtool.runtime.stores import whole_pages

one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)

PLANS = (
    "split",
    "split, streamed",
    "budgeted",
    "coded",
    "shared codes",
    "packed codes",
    "few bits",
    "two tiers",
    "gear",
    "sparse",
    "fp8",
    "fp8, streamed",
    "fp8 alone",
    "fp8, window",
)
MLA = ("mla", "kvtool-mla", "packed mla")
DROPPING = (
    "split", "coded", "shared codes", "packed codes", "few bits", "two tiers", "gear", "packed mla",
)  # fmt: skip
STREAMED = [f"{kind}, streamed" for kind in DROPPING]
KINDS = ("dense", "windowed", "some windows", "shared layers", *PLANS, *MLA, "packed states")
KINDS += tuple(kind for kind in STREAMED if kind not in KINDS)
MARKED = (
    "windowed", "some windows", "shared layers", "hybrid", "packed states", "fp8, streamed",
    "fp8, window", *STREAMED,
)  # fmt: skip
PIECE = 16
GIGABYTE = 2**30
RING, HEADS = SINK + WINDOW, 6  # of a streaming head, and of all layers of the plans
OPTIONS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory):
    """``engine(kind)``: one of every kind of store."""
    made: dict[str, Engine] = {}

    def load(kind: str) -> Engine:
        # Wide enough that a product of few rows adds up in another order than one of many.
        checkpoint = Checkpoint.open(str(tiny("llama", intermediate_size=1536)))
        if kind.endswith(", streamed"):
            dense = get(kind.removesuffix(", streamed"))
            assert dense.plan is not None
            return Engine.load(dense.checkpoint, plan=replace(dense.plan, prefill="streamed"))
        if kind == "windowed":
            return Engine.load(Checkpoint.open(str(tiny("mistral", sliding_window=24))))
        if kind == "some windows":
            family, more = WINDOWED["gemma3_text"]
            return Engine.load(Checkpoint.open(str(tiny(family, **more))))
        if kind == "shared layers":
            return Engine.load(open_case(tiny, "gemma4_text, shared"))
        if kind == "hybrid":
            path = tmp_path_factory.mktemp("hybrid")
            write_hybrid(tiny("llama", intermediate_size=1536), path, [0, 2])
            return Engine.load(Checkpoint.open(str(path)))
        if kind == "split":
            return Engine.load(checkpoint, plan=make_plan(checkpoint, MIXED))
        if kind == "budgeted":
            nothing = ([False, False],) * 3
            budgets = ((9, None), (5, 7), (None, None))
            plan = make_plan(checkpoint, nothing, budgets=budgets, policy="snapkv")
            return Engine.load(checkpoint, plan=plan)
        if kind == "sparse":
            return Engine.load(checkpoint, plan=sparse(checkpoint, streaming=MIXED))
        if kind == "coded":
            return Engine.load(checkpoint, plan=coded(checkpoint, "rotated", share=0.5))
        if kind == "shared codes":
            plan = coded(checkpoint, "unrotated", together=3, share=0.5)
            return Engine.load(checkpoint, plan=plan)
        if kind == "packed codes":
            return Engine.load(checkpoint, plan=packed(checkpoint, "rotated", 4, share=0.5))
        if kind.startswith("fp8"):
            heads = ([False, False],) * 3 if kind.endswith("alone") else MIXED
            prefill = "dense" if kind == "fp8" else "streamed"
            window = 5 if kind.endswith("window") else 0
            plan = floats(checkpoint, prefill, heads, window=window)
            return Engine.load(checkpoint, plan=plan)
        if kind in ("few bits", "two tiers", "gear"):
            way = "turned" if kind == "few bits" else kind
            return Engine.load(checkpoint, plan=few_bits(checkpoint, way, streaming=MIXED))
        if kind == "packed mla":
            latents = get("mla").checkpoint
            return Engine.load(latents, plan=packed_latents(latents))
        if kind == "packed states":
            path = tmp_path_factory.mktemp("hybrid")
            write_hybrid(tiny("llama", intermediate_size=1536), path, [0, 2])
            hybrid = Checkpoint.open(str(path))
            return Engine.load(hybrid, plan=packed_states(hybrid))
        if kind.endswith("mla"):
            target = "kvtool" if kind == "kvtool-mla" else "transformers"
            options = planning.ConvertOptions(
                method="transmla", target=target, kv_budget="60%", freqfold="2", tokens=2048
            )
            output = tmp_path_factory.mktemp(kind) / "out"
            conversion.convert(checkpoint, output, options)
            return Engine.load(Checkpoint.open(str(output)))
        return Engine.load(checkpoint)

    def get(kind: str) -> Engine:
        if kind not in made:
            made[kind] = load(kind)
        return made[kind]

    return get


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def allocated(scheduler: Scheduler) -> int:
    """What the caches really take, beside what the scheduler has computed."""
    owners = [*scheduler._rows(), *scheduler._prefixes]
    marks = [x for owner in owners for mark in owner.marks for y in mark.saved for x in y]
    return sum(owner.cache.allocated_bytes for owner in owners) + sum(x.nbytes for x in marks)


Bits = dict[Request, list[tuple[int, float]]]


def drain(scheduler: Scheduler, later: Sequence[tuple[int, Request]] = ()) -> Bits:
    """Runs all requests, and `later` ones after so many steps.

    Returns:
        Tokens and, where asked for, their log-probabilities: any other rounding would show.
    """
    waiting, bits = list(later), Bits()
    for step in range(3000):
        while waiting and waiting[0][0] <= step:
            scheduler.add(waiting.pop(0)[1])
        if scheduler.idle and not waiting:
            return bits
        for item in scheduler.step():
            if item.scored is not None:
                bits.setdefault(item.request, []).append(item.scored[:2])
        assert allocated(scheduler) == scheduler.used <= scheduler.budget
    raise AssertionError("requests that never end")


def alone(engine: Engine, request: Request, **options: Any) -> list[int]:
    """The tokens of a request that nothing disturbs."""
    scheduler = Scheduler(engine, GIGABYTE, piece=PIECE, **options)
    scheduler.add(request)
    drain(scheduler)
    return request.tokens


def bits_alone(engine: Engine, request: Request) -> list[tuple[int, float]]:
    scheduler = Scheduler(engine, GIGABYTE, piece=PIECE, share_prefixes=False)
    return drain(scheduler, [(0, request)])[request]


LENGTHS = st.integers(1, 150)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, **OPTIONS)
@given(data=st.data())
def test_text_is_the_same_alone_and_in_any_batch(engine, kind, data):
    runtime = engine(kind)
    arrivals = data.draw(
        st.lists(
            st.tuples(st.integers(0, 12), LENGTHS, st.integers(0, 2), st.integers(1, 20)),
            min_size=2,
            max_size=5,
        )
    )

    def request(length: int, seed: int, new: int) -> Request:
        # Equal seeds give prompts that start alike.
        hot = Sampling(temperature=1.0, top_k=50) if seed == 2 else Sampling()
        return Request(prompt(length, seed), new, hot, seed=length, ignore_eos=True, logprobs=1)

    memory = Scheduler(runtime, GIGABYTE).memory
    least = max(max(memory.reading(n), memory.holding(n + new, n)) for _, n, _, new in arrivals)
    scheduler = Scheduler(runtime, int(1.5 * least), piece=PIECE)
    requests = [request(*what) for _, *what in arrivals]
    order = sorted(range(len(requests)), key=lambda i: arrivals[i][0])
    found = drain(scheduler, [(arrivals[i][0], requests[i]) for i in order])
    for one, (_, *what) in zip(requests, arrivals, strict=True):
        assert found[one] == bits_alone(runtime, request(*what))


@pytest.mark.parametrize(
    "kind",
    ["dense", "windowed", "some windows", "shared layers", "split", "budgeted", "few bits",
     "fp8 alone", "fp8, window", "coded", "shared codes", "mla", "kvtool-mla"],
)  # fmt: skip
def test_kernels_in_c_predict_what_plain_torch_does(engine, kind, monkeypatch):
    own, ids = engine(kind), torch.tensor(prompt(150))

    def predicted(kernels: str) -> torch.Tensor:
        monkeypatch.setenv(VARIABLE, kernels)
        cache = own.new_cache(2, len(ids))
        for row, length in enumerate((90, 70)):
            own.extend(cache, ids[:length], row)
        return torch.stack([own.decode(cache, pair) for pair in ids[90:].view(-1, 2)])

    if compiler() is None:
        pytest.skip("there is no C compiler")
    assert_same(predicted("native"), predicted("reference"))


@pytest.mark.parametrize(
    "kind", ["dense", "mla", "coded", "shared codes", "budgeted", "two tiers, streamed", "sparse"]
)
def test_a_preempted_request_goes_on_from_the_same_bits(engine, kind):
    runtime = engine(kind)
    hot = Sampling(temperature=1.0)

    def make(length: int) -> Request:
        ids = prompt(length, length)
        return Request(ids, 150, hot, seed=length, ignore_eos=True, logprobs=1)

    memory = Scheduler(runtime, GIGABYTE).memory
    scheduler = Scheduler(runtime, memory.holding(210, 60) + memory.holding(70, 30), piece=PIECE)
    requests = [make(30), make(60)]
    found = drain(scheduler, [(0, request) for request in requests])
    assert scheduler.counters.preemptions > 0
    for request in requests:
        assert found[request] == bits_alone(runtime, make(len(request.prompt)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, **OPTIONS)
@given(
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("add"), LENGTHS, st.integers(0, 30)),
            st.tuples(st.sampled_from(["cancel", "finish"]), st.integers(0, 9), st.just(0)),
            st.tuples(st.just("step"), st.integers(1, 8), st.just(0)),
        ),
        max_size=25,
    ),
    slack=st.floats(1.0, 3.0),
)
def test_memory_is_within_the_budget_and_returns(engine, kind, actions, slack):
    runtime = engine(kind)
    memory = Scheduler(runtime, GIGABYTE).memory
    largest = max(memory.reading(150), memory.holding(180, 150))
    scheduler = Scheduler(runtime, int(slack * largest), piece=PIECE, max_running=4)
    requests: list[Request] = []
    for action, number, new in actions:
        if action == "add":
            requests.append(Request(prompt(number, number % 3), new))
            scheduler.add(requests[-1])
        elif action == "step":
            for _ in range(number):
                scheduler.step()
        elif requests:
            chosen = requests[number % len(requests)]
            getattr(scheduler, action)(chosen)
            assert action == "finish" or chosen not in [*scheduler.running, *scheduler.waiting]
        assert allocated(scheduler) <= scheduler.used <= scheduler.budget
    drain(scheduler)
    scheduler.forget_prefixes()
    assert allocated(scheduler) == scheduler.used == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "new"), [(1, 1), (5, 70), (64, 1), (65, 64), (150, 100)])
def test_bytes_are_known_before_they_are_allocated(engine, kind, length, new):
    scheduler = Scheduler(engine(kind), GIGABYTE, piece=PIECE)
    request = Request(prompt(length), new, ignore_eos=True)
    scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
        assert allocated(scheduler) == scheduler.used


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_the_most_tokens_are_what_fits_and_not_one_more(engine, kind, length):
    memory = Scheduler(engine(kind), GIGABYTE).memory
    for budget in range(0, 2 * memory.holding(512, length), 9973):
        most = memory.most_tokens(budget, length, 512)
        if most:
            assert max(memory.reading(length), memory.holding(most, length)) <= budget
            assert most == 512 or memory.holding(most + 1, length) > budget
        else:
            assert max(memory.reading(length), memory.holding(length, length)) > budget


@pytest.mark.parametrize("kind", ["dense", "mla", "fp8 alone"])
def test_prompts_that_start_alike_are_read_once(engine, kind):
    scheduler = Scheduler(engine(kind), GIGABYTE, piece=PIECE)
    first, ids = Request(prompt(70), 4, ignore_eos=True), prompt(70)
    scheduler.add(first)
    drain(scheduler)
    assert scheduler.shared == scheduler.used == scheduler.memory.holding(64, 64)
    longer = Request([*ids[:50], *prompt(40, seed=1)], 4, ignore_eos=True)
    same = Request(ids[:64], 4, ignore_eos=True)
    for request in (longer, same):
        scheduler.add(request)
    drain(scheduler)
    # Only whole pieces are shared, and the last token is always read.
    assert (first.cached, longer.cached, same.cached) == (0, 48, 48)
    for request in (longer, same):
        fresh = Request(request.prompt, 4, ignore_eos=True)
        assert request.tokens == alone(engine(kind), fresh, share_prefixes=False)


@pytest.mark.parametrize("kind", [*DROPPING, "fp8", "budgeted", "sparse"])
def test_what_a_prompt_loses_at_its_end_is_not_shared(engine, kind):
    """Another prompt would have read it as it was."""
    scheduler, ids = Scheduler(engine(kind), GIGABYTE, piece=PIECE), prompt(70)
    for text in (ids, [*ids, 5]):
        request = Request(text, 2, ignore_eos=True)
        drain(scheduler, [(0, request)])
        assert request.cached == scheduler.shared == 0


@pytest.mark.parametrize("kind", MARKED)
def test_what_cannot_go_back_is_shared_from_marks(engine, kind):
    """Where a prompt ended, and where another parted from it."""
    runtime, ids = engine(kind), prompt(70)
    scheduler = Scheduler(runtime, GIGABYTE, piece=PIECE)
    texts = [
        (ids, 0),
        (ids, 64),
        ([*ids, *prompt(30, seed=1)], 64),  # a later turn
        (ids, 64),
        ([*ids[:50], *prompt(40, seed=2)], 0),  # it parts at 48, where nothing was marked yet
        ([*ids[:50], *prompt(60, seed=3)], 48),
        ([*ids[:50], *prompt(60, seed=3), 5], 96),
        (ids[:40], 0),
        (ids[:40], 32),
        (ids[:60], 48),
    ]
    for text, cached in texts:
        request = Request(text, 4, ignore_eos=True, logprobs=1)
        found = drain(scheduler, [(0, request)])[request]
        assert request.cached == cached
        assert found == bits_alone(runtime, Request(text, 4, ignore_eos=True, logprobs=1))
    for prefix in scheduler._prefixes:
        assert len(prefix.marks) <= 2
        tokens = whole_pages(len(prefix.ids))  # without rings, which are in the marks
        assert prefix.held <= scheduler.memory.bytes_per_token * tokens


@pytest.mark.parametrize("kind", MARKED)
def test_marks_go_where_memory_is_needed(engine, kind):
    runtime = engine(kind)
    memory = Scheduler(runtime, GIGABYTE, piece=PIECE).memory
    scheduler = Scheduler(runtime, memory.holding(64, 50) + memory.holding(128, 120), piece=PIECE)
    running = Request(prompt(50), 14, ignore_eos=True)
    scheduler.add(running)
    while not running.tokens:
        scheduler.step()
    (row,) = scheduler._running
    assert [mark.length for mark in row.marks] == [48]
    assert scheduler.shared == row.marks[0].nbytes > 0
    large = Request(prompt(120, seed=1), 8, ignore_eos=True)
    scheduler.add(large)
    scheduler.step()
    assert large in scheduler.running
    assert not row.marks
    drain(scheduler)
    tight = Scheduler(runtime, memory.holding(64, 50), piece=PIECE)
    drain(tight, [(0, Request(prompt(50), 9, ignore_eos=True))])  # there is no room for marks
    assert not tight._prefixes


@pytest.mark.parametrize("kind", MARKED)
def test_marks_of_a_running_request_are_there_until_they_are_forgotten(engine, kind):
    scheduler = Scheduler(engine(kind), GIGABYTE, piece=PIECE)
    twins = [Request(prompt(50), 30, ignore_eos=True) for _ in range(2)]
    for request in twins:
        scheduler.add(request)
        while not request.tokens:
            scheduler.step()
    assert [request.cached for request in twins] == [0, 48]
    assert scheduler.shared > 0
    scheduler.forget_prefixes()
    assert scheduler.shared == 0
    drain(scheduler)
    assert not scheduler._prefixes
    assert twins[0].tokens == twins[1].tokens


def test_who_waits_in_vain_takes_no_prefixes(engine):
    """Where even all prefixes would not make room, they stay."""
    memory = Scheduler(engine("dense"), GIGABYTE, piece=PIECE).memory
    budget = memory.holding(64, 64) + memory.holding(128, 128) + memory.holding(64, 64) // 2
    scheduler = Scheduler(engine("dense"), budget, piece=PIECE)
    scheduler.add(Request(prompt(64), 1, ignore_eos=True))
    drain(scheduler)
    assert len(scheduler._prefixes) == 1
    running = Request(prompt(100, seed=1), 20, ignore_eos=True)
    scheduler.add(running)
    while not running.tokens:
        scheduler.step()
    scheduler.add(Request(prompt(120, seed=2), 1, ignore_eos=True))
    scheduler.step()
    assert len(scheduler.waiting) == len(scheduler._prefixes) == 1


def test_a_prefix_that_is_about_to_be_read_goes_last(engine):
    memory = Scheduler(engine("dense"), GIGABYTE, piece=PIECE).memory
    scheduler = Scheduler(engine("dense"), 3 * memory.holding(64, 64), piece=PIECE)
    for seed in (1, 2):
        scheduler.add(Request(prompt(64, seed), 1, ignore_eos=True))
        drain(scheduler)
    assert len(scheduler._prefixes) == 2
    again = Request([*prompt(64, 1), *prompt(30, 3)], 1, ignore_eos=True)  # the older of them
    scheduler.add(again)
    drain(scheduler)
    assert again.cached == 64


def test_where_the_prefix_has_to_go_a_running_request_shares(engine):
    page = Scheduler(engine("dense"), GIGABYTE, piece=64).memory.holding(64, 64)
    scheduler = Scheduler(engine("dense"), 9 * page, piece=64)
    start = prompt(64)
    scheduler.add(Request([*start, *prompt(64, 1)], 1, ignore_eos=True))
    drain(scheduler)
    running = Request([*start, *prompt(56, 2)], 60, ignore_eos=True)
    scheduler.add(running)
    while not running.tokens:
        scheduler.step()
    last = Request([*start, *prompt(290, 3)], 1, ignore_eos=True)
    scheduler.add(last)
    drain(scheduler)
    assert last.cached == 64


def test_a_running_request_shares_its_prompt_too(engine):
    scheduler = Scheduler(engine("dense"), GIGABYTE, piece=PIECE)
    twins = [Request(prompt(40), 30, ignore_eos=True) for _ in range(2)]
    for request in twins:
        scheduler.add(request)
    drain(scheduler)
    assert [request.cached for request in twins] == [0, 32]
    assert twins[0].tokens == twins[1].tokens


def test_what_plans_have_dropped_is_not_shared(engine):
    scheduler = Scheduler(engine("split"), GIGABYTE, piece=PIECE)
    twins = [Request(prompt(40), 5, ignore_eos=True) for _ in range(2)]
    for request in twins:
        scheduler.add(request)
    drain(scheduler)
    assert [request.cached for request in twins] == [0, 0]
    assert scheduler.used == 0


def test_what_plans_drop_is_counted(engine):
    dropped = {}
    for kind in ("dense", "split", "split, streamed", "budgeted"):
        scheduler = Scheduler(engine(kind), GIGABYTE, piece=PIECE)
        scheduler.add(Request(prompt(40), 5, ignore_eos=True))
        drain(scheduler)
        dropped[kind] = scheduler.counters.dropped_tokens
        cancelled = Request(prompt(40, seed=1), 5)
        scheduler.add(cancelled)
        scheduler.step()  # 16 tokens of the prompt
        scheduler.cancel(cancelled)
        more = scheduler.counters.dropped_tokens - dropped[kind]
        assert more == (3 * (PIECE - RING) / HEADS if kind == "split, streamed" else 0)
    # 44 tokens were stored.
    assert dropped["dense"] == 0
    assert dropped["split"] == dropped["split, streamed"] == 3 * (44 - RING) / HEADS
    assert dropped["budgeted"] == (31 + 35 + 33) / HEADS


def test_decoding_goes_on_while_a_long_prompt_is_read(engine):
    scheduler = Scheduler(engine("dense"), GIGABYTE, piece=PIECE)
    running = Request(prompt(5), 40, ignore_eos=True)
    scheduler.add(running)
    scheduler.step()
    before = len(running.tokens)
    scheduler.add(Request(prompt(150, 1), 1))
    for _ in range(5):
        scheduler.step()
    assert len(running.tokens) == before + 5


def test_a_request_ends_at_a_stop_token_but_not_before_its_least_tokens(engine):
    runtime = engine("dense")
    free = alone(runtime, Request(prompt(9), 12, ignore_eos=True))
    stop = frozenset({free[3]})
    first = free.index(free[3]) + 1
    assert alone(runtime, Request(prompt(9), 12, stop_ids=stop)) == free[:first]
    later = alone(runtime, Request(prompt(9), 12, min_new_tokens=8, stop_ids=stop))
    assert len(later) >= 8
    assert not stop & set(later[:7])


@pytest.mark.parametrize("length", [1, PIECE, PIECE + 1, 40])
def test_logprobs_are_those_of_the_model_for_prompt_and_answer(engine, length):
    runtime = engine("dense")
    ids = prompt(length)
    scheduler = Scheduler(runtime, GIGABYTE, piece=PIECE)
    request = Request(ids, 3, logprobs=2, prompt_logprobs=2, ignore_eos=True)
    scheduler.add(request)
    scored = [item.scored for _ in range(5) for item in scheduler.step()]
    text = torch.tensor([*ids, *request.tokens])
    logits = runtime.extend(runtime.new_cache(1, len(text)), text, all_logits=True)
    expected = torch.log_softmax(logits, dim=-1)
    assert len(request.scored) == len(ids) - 1
    for position, one in enumerate([*request.scored, *scored]):
        assert one.token == text[position + 1]
        assert one.logprob == pytest.approx(float(expected[position, one.token]), abs=1e-3)
        assert one.top[0][1] == pytest.approx(float(expected[position].max()), abs=1e-3)
        assert len(one.top) == 2


def test_penalties_count_the_answer_only_and_a_bias_decides(engine):
    runtime = engine("dense")
    ids = prompt(9)
    free = alone(runtime, Request(ids, 30, ignore_eos=True))
    never_twice = Sampling(frequency_penalty=1000.0)
    penalised = alone(runtime, Request(ids, 30, never_twice, ignore_eos=True))
    assert penalised[0] == free[0]
    assert len(set(penalised)) == 30
    assert set(penalised) & set(ids), "tokens of the prompt stay free"
    biased = Sampling(logit_bias={7: 1000.0})
    assert alone(runtime, Request(ids, 3, biased, ignore_eos=True)) == [7, 7, 7]
    once = Sampling(presence_penalty=2000.0, logit_bias={7: 1000.0})
    assert alone(runtime, Request(ids, 3, once, ignore_eos=True)).count(7) == 1


def test_what_can_never_run_is_refused(engine):
    scheduler = Scheduler(engine("dense"), 100_000)
    with pytest.raises(UsageError, match="empty"):
        scheduler.add(Request([], 1))
    with pytest.raises(UsageError, match=r"520.*512"):
        scheduler.add(Request(prompt(500), 20))
    with pytest.raises(ResourceError, match=r"147,456 bytes.*100,000"):
        scheduler.add(Request(prompt(150), 20))
    scheduler.add(Request(prompt(100), scheduler.room(100)))
    drain(scheduler)


def test_packed_weights_give_the_same_logits_and_are_not_kept_twice(engine, tiny):
    checkpoint = Checkpoint.open(str(tiny("llama", tie_word_embeddings=True)))
    plain, packed = Engine.load(checkpoint), Engine.load(checkpoint)
    packed.pack()
    assert packed.model.lm_head.weight.numel() == 0
    assert packed.model.model.embed_tokens.weight.numel() > 0
    ids = torch.tensor(prompt(20))
    for length in (1, 20):
        expected, got = (
            one.extend(one.new_cache(1, length), ids[:length]) for one in (plain, packed)
        )
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-4)


def test_plans_that_stream_prompts_take_no_more_while_they_read(engine):
    streamed = Scheduler(engine("split, streamed"), GIGABYTE).memory
    assert streamed.reading(100) == streamed.holding(100, 100)
    dense = Scheduler(engine("split"), GIGABYTE).memory
    assert dense.reading(100) > dense.holding(100, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_says_what_really_fits(engine, kind):
    memory = Scheduler(engine(kind), GIGABYTE).memory
    few = Scheduler(engine(kind), memory.holding(100, 1))
    count, longest = map(int, re.findall(r"^(\d+) sequences? of up to (\d+) token", room(few))[0])
    assert longest == few.longest >= 100
    behind = few.roomiest
    few.check(behind, longest - behind)
    with pytest.raises((ResourceError, UsageError)):
        few.check(behind, longest - behind + 1)
    each = memory.holding(longest, behind)
    assert 0 <= few.budget - (count - 1) * each - max(each, memory.reading(behind)) < each
    if behind == 1:
        assert ("bytes and" in room(few)) == (memory.constant_bytes > 0)
    else:
        assert f", {behind} of them a prompt: each takes {each:,} bytes" in room(few)


def test_stop_tokens_outside_the_vocabulary_forbid_nothing(tiny, tmp_path):
    path = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    (path / "generation_config.json").write_text('{"eos_token_id": [-1, 5, 99999999]}')
    runtime = Engine.load(Checkpoint.open(str(path)))
    assert runtime.eos_ids == {5}
    scheduler = Scheduler(runtime, 10**7)
    request = Request([1, 2, 3], 4, min_new_tokens=4)
    scheduler.add(request)
    while not scheduler.idle:
        scheduler.step()
    assert len(request.tokens) == 4
