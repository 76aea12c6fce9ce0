"""The algebra of the score-aware method: what is exact, what is optimal, what is lost."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _convert_tools import YARN, edited_copy
from torch import Tensor

from kvtool.calibrate.statistics import StatisticsOptions, collect
from kvtool.calibrate.statistics_file import LayerStatistics
from kvtool.calibrate.stream import LayerStream, StreamedLayer
from kvtool.checkpoint import Checkpoint
from kvtool.convert import aware
from kvtool.convert.exact import exact_factors
from kvtool.convert.fitting import ConvertedLayer, converted_attention, converted_stages
from kvtool.convert.targets import default_inv_freq
from kvtool.latent import FactoredAttention
from kvtool.layout import AttentionLayout
from kvtool.rope import Rope, rotate

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3")},
    "mha": ("llama", {"num_key_value_heads": 4}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "bias-everywhere": ("llama", {"attention_bias": True}),
}
SMALL = StatisticsOptions(tokens=1024, window=128, context=128)


class Case:
    """A layer, its statistics and components, and hidden states that go into it."""

    def __init__(self, model: Any) -> None:
        checkpoint = Checkpoint.open(str(model))
        self.stream = LayerStream(checkpoint)
        self.measured = collect(checkpoint, SMALL)
        self.statistics: LayerStatistics = self.measured.layer(1)
        self.layout, self.rope = self.stream.layouts[1], self.stream.rope
        self.width = self.layout.kv_heads * self.layout.head_dim
        self.components = aware.rope_components(self.statistics, self.layout, self.rope)
        self.hidden = 3 * torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(0))

    def layer(self) -> StreamedLayer:
        """Fresh, as some tests change it."""
        return self.stream.layer(1)

    def basis(self, rope_dim: int) -> aware.Basis:
        kept = aware.most_damaging(self.components.damage, rope_dim // 2)
        return aware.basis_of(self.components, kept)

    def factors(self, rope_dim: int, rank: int) -> Any:
        output = self.layer().attention.o_proj.weight
        return aware.latent_factors(self.statistics, self.basis(rope_dim), output, self.rope, rank)

    def stages(self, rope_dim: int = 8, rank: int = 10) -> tuple[StreamedLayer, FactoredAttention]:
        layer = self.layer()
        converted = ConvertedLayer(self.factors(rope_dim, rank))
        return layer, converted_stages(layer.attention, converted, self.rope)


@pytest.fixture(scope="module")
def cases(tiny):
    """``cases(name)``: made once, not to be changed."""
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            family, overrides = CASES[name]
            made[name] = Case(tiny(family, **overrides))
        return made[name]

    return get


@pytest.fixture(params=CASES)
def case(request, cases) -> Case:
    """One of every layout."""
    return cases(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# ------------------------------------------------------------------------------ which rotations


def test_keeping_every_rotation_at_full_rank_reproduces_the_layer(case):
    factors = case.factors(case.width, case.width)
    layer = case.layer()
    with torch.inference_mode():
        expected = case.stream.exact_attention(layer)(case.hidden)
        converted = converted_attention(layer, ConvertedLayer(factors), case.rope)
        got = converted(case.hidden)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_all_components_are_an_exact_change_of_basis(case):
    heads = case.layout.kv_heads
    whole = torch.einsum("lef,leg->lfg", case.components.decode, case.components.encode)
    identity = torch.eye(heads, dtype=torch.float64).expand_as(whole)
    torch.testing.assert_close(whole, identity, atol=1e-9, rtol=0)


def test_kept_components_are_read_without_each_other(case):
    basis = case.basis(8)
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(basis.encode @ basis.decode.T, identity, atol=1e-9, rtol=0)


ROPE = Rope(torch.tensor([1.0, 0.3, 0.05, 0.002]))
BUCKETS = ([0], [1], [2, 3], [4, 5, 6, 7])  # what the buckets of `distance_mass` mean


def sampled(heads: int, group: int) -> tuple[Any, AttentionLayout, Tensor, Tensor]:
    """Statistics of a few keys `[S, H, 2, N]` and queries `[S, Q, 2, N]`, and those themselves."""
    pairs, queries = len(ROPE.inv_freq), heads * group
    mixed = random(heads, heads, seed=1) @ random(25, heads, 2 * pairs, seed=2)
    keys = mixed.unflatten(-1, (2, pairs))
    asked = random(15, queries, 2, pairs, seed=3) * (1 + torch.arange(queries)[:, None, None])
    flat = keys.flatten(1)
    moment = torch.block_diag(flat.T @ flat, flat.T @ flat)
    by_head = asked.flatten(2).transpose(0, 1)  # [Q, S, D]
    mass = random(queries, len(BUCKETS) + 1, seed=4).abs()  # and one for sinks
    statistics = SimpleNamespace(
        joint_moment=moment,
        joint=SimpleNamespace(tokens=len(keys), second=moment),
        queries=SimpleNamespace(tokens=len(asked), second=by_head.mT @ by_head),
        distance_mass=mass / mass.sum(dim=1, keepdim=True),
    )
    layout = AttentionLayout("gqa", 64, queries, heads, 2 * pairs, 1.0)
    return statistics, layout, keys, asked


def lags(distance_mass: Tensor) -> Tensor:
    """`[Q, 8]`: the attention by distance that buckets stand for, sinks left out."""
    bulk = distance_mass[:, :-1] / distance_mass[:, :-1].sum(dim=1, keepdim=True)
    rows = [bulk[:, b] / len(within) for b, within in enumerate(BUCKETS) for _ in within]
    return torch.stack(rows, dim=1)


def test_the_turn_by_distance_is_that_of_every_distance_alone():
    statistics, _, _, _ = sampled(2, 2)
    probability = lags(statistics.distance_mass)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i, lag, pair in itertools.product(range(4), range(8), range(4)):
        turn = torch.polar(torch.ones((), dtype=torch.float64), lag * ROPE.inv_freq[pair].double())
        expected[i, pair] += probability[i, lag] * (1 - turn).abs().square()
    torch.testing.assert_close(aware.turned(statistics.distance_mass, ROPE), expected)


@pytest.mark.parametrize(("heads", "group"), [(1, 3), (2, 2), (3, 1)])
def test_damage_is_the_score_error_of_independent_queries_and_keys(heads, group):
    statistics, layout, keys, asked = sampled(heads, group)
    found = aware.rope_components(statistics, layout, ROPE)
    probability = lags(statistics.distance_mass)  # [Q, lag]
    k, q = (torch.complex(x[:, :, 0], x[:, :, 1]) for x in (keys, asked))
    angle = torch.arange(8, dtype=torch.float64)[:, None] * ROPE.inv_freq.double()
    wrong = 1 - torch.polar(torch.ones_like(angle), angle)  # [lag, N]
    pairs = len(ROPE.inv_freq)
    for seed in range(4):
        dropped = random(pairs, heads, seed=seed) > 0 if seed else torch.ones(pairs, heads) > 0
        encoded = torch.einsum("leh,shl->sel", found.encode.to(k), k) * dropped.T
        lost = torch.einsum("leh,sel->shl", found.decode.to(k), encoded)
        lost = lost.repeat_interleave(group, dim=1)  # [S, Q, N]
        error = torch.einsum("aql,dl,sql->aqdsl", q.conj(), wrong, lost).abs().square()
        expected = (error.mean(dim=(0, 3)).sum(dim=-1) * probability).sum()
        torch.testing.assert_close(found.damage[dropped].sum(), expected, rtol=1e-9, atol=1e-12)


def test_no_other_choice_has_a_smaller_damage():
    statistics, layout, _, _ = sampled(3, 1)
    damage = aware.rope_components(statistics, layout, ROPE).damage
    assert torch.all(damage[:, :-1] >= damage[:, 1:])
    for pairs in (1, 5, 11):
        kept = aware.most_damaging(damage, pairs)
        saved = sum(float(damage[at, :count].sum()) for at, count in enumerate(kept.tolist()))
        every = itertools.combinations(damage.flatten().tolist(), pairs)
        assert int(kept.sum()) == pairs
        assert saved == pytest.approx(max(sum(choice) for choice in every), rel=1e-12)


def test_a_basis_takes_the_worst_components_and_rotates_pairs_alike(case):
    kept = torch.tensor([1, 0, case.layout.kv_heads, 1, 0, 0, 0, 1])
    basis = aware.basis_of(case.components, kept)
    half = int(kept.sum())
    assert basis.frequency.tolist() == sorted([0, 3, 7] + [2] * case.layout.kv_heads)
    for part, mixed in (("encode", basis.encode), ("decode", basis.decode)):
        blocks = mixed.view(2, half, case.layout.kv_heads, 2, 8)  # part of a row, of a column
        assert torch.equal(blocks[0, :, :, 0], blocks[1, :, :, 1])
        assert not blocks[0, :, :, 1].any()
        assert not blocks[1, :, :, 0].any()
        first = getattr(case.components, part)[0, 0]
        assert torch.equal(blocks[0, 0, :, 0, 0], first)


def test_layers_share_one_choice_in_which_each_has_the_same_say(cases):
    case = cases("llama")
    layers = [
        aware.rope_components(case.measured.layer(i), case.layout, case.rope) for i in range(3)
    ]
    kept = aware.shared_by_layers(layers, 5)
    frequencies = [aware.basis_of(layer, kept).frequency.tolist() for layer in layers]
    assert frequencies == [frequencies[0]] * 3
    assert len(frequencies[0]) == 5
    share = torch.stack([layer.damage / layer.damage.sum() for layer in layers]).sum(dim=0)
    saved = sum(float(share[at, :count].sum()) for at, count in enumerate(kept.tolist()))
    assert saved == pytest.approx(float(share.flatten().topk(5).values.sum()), rel=1e-12)


def test_a_loud_layer_has_no_more_say_than_a_quiet_one():
    nothing = torch.zeros(2, 2, 2)
    quiet, loud = (
        aware.Components(torch.tensor(damage, dtype=torch.float64), nothing, nothing)
        for damage in ([[0.0, 0.0], [5.0, 4.0]], [[6e6, 5e6], [1e6, 0.0]])
    )
    assert aware.shared_by_layers([quiet, loud], 2).tolist() == [1, 1]


@pytest.mark.parametrize("rope_dim", [2, 4, 8, 16])
def test_one_component_per_frequency_has_the_frequencies_that_theta_gives(cases, rope_dim):
    case = cases("llama")
    basis = aware.basis_of(case.components, aware.one_per_frequency(16, rope_dim))
    frequencies = case.rope.inv_freq[basis.frequency]
    torch.testing.assert_close(frequencies, default_inv_freq(10000.0, rope_dim))


# --------------------------------------------------------------------------- the decomposition


def partly_rotated(case: Case, layer: StreamedLayer, basis: aware.Basis) -> Tensor:
    """The layer with keys whose kept part turns in its own heads and whose rest never does."""
    stages, layout = layer.attention, case.layout
    q, k, v = (x.double() for x in stages.project(case.hidden))
    q, k = (x.double() for x in stages.normalise(q.float(), k.float()))
    flat = k.transpose(1, 2).flatten(2)
    kept = (flat @ basis.encode.T @ basis.decode).unflatten(2, (layout.kv_heads, -1))
    kept = kept.transpose(1, 2)
    cos, sin = (t.double() for t in case.rope.tables(torch.arange(case.hidden.shape[1])))
    group = layout.heads // layout.kv_heads
    kept, rest, v = (x.repeat_interleave(group, dim=1) for x in (kept, k - kept, v))
    scores = rotate(q, cos, sin) @ rotate(kept, cos, sin).mT + case.rope.scale**2 * q @ rest.mT
    future = torch.ones_like(scores[0, 0]).triu(1).bool()
    mass = (scores * layout.scaling).masked_fill(future, -torch.inf).softmax(dim=-1)
    return stages.output((mass @ v).float(), case.hidden)


@pytest.mark.parametrize("rope_dim", [4, 10])
def test_at_full_rank_nothing_but_rotations_is_lost(case, rope_dim):
    layer, factors = case.layer(), case.factors(rope_dim, 2 * case.width - rope_dim)
    # Keys and values of as many heads as there are queries are twice as wide as what they read.
    assert factors.rank == min(2 * case.width - rope_dim, 64)
    with torch.inference_mode():
        expected = partly_rotated(case, layer, case.basis(rope_dim))
        original = case.stream.exact_attention(layer)(case.hidden)
        got = converted_attention(layer, ConvertedLayer(factors), case.rope)(case.hidden)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert (expected - original).abs().max() > 0.05  # another layer than the original


def test_the_loss_is_the_dropped_eigenvalues_and_a_smaller_rank_is_a_slice(case):
    width, size, rope_dim = case.width, case.layout.head_dim, 8
    basis, statistics = case.basis(rope_dim), case.statistics
    output = case.layer().attention.o_proj.weight.double()
    identity = torch.eye(width, dtype=torch.float64)
    unrotated = torch.block_diag(identity - basis.decode.T @ basis.encode, identity)
    # What the output projection makes of a value, head by head, summed over those that read it.
    reads = output.unflatten(1, (case.layout.heads, size)).unbind(dim=1)
    grams = [o.T @ o for o in reads]
    group = case.layout.heads // case.layout.kv_heads
    values = torch.block_diag(*(sum(grams[i : i + group]) for i in range(0, len(grams), group)))
    tokens = unrotated @ statistics.joint.second @ unrotated.T
    alpha = (values @ tokens[width:, width:]).trace() / tokens[:width, :width].trace()
    metric = torch.block_diag(alpha * identity, values)
    attended = unrotated @ statistics.attended @ unrotated.T
    spectrum = torch.linalg.eigvals(metric @ attended).real.sort(descending=True).values
    full = case.factors(rope_dim, 2 * width)
    previous = torch.inf
    for rank in (1, 3, 7, full.rank):
        small = case.factors(rope_dim, rank)
        torch.testing.assert_close(small.down, full.down[:rank])
        torch.testing.assert_close(small.key_up, full.key_up[..., :rank])
        torch.testing.assert_close(small.value_up, full.value_up[..., :rank])
        keys = small.key_up.flatten(0, 1) / case.rope.scale**2
        up = torch.cat((keys, small.value_up.flatten(0, 1)))
        missed = unrotated - up @ small.down
        loss = (metric @ missed @ statistics.attended @ missed.T).trace()
        torch.testing.assert_close(loss, spectrum[rank:].sum(), rtol=1e-6, atol=1e-6 * spectrum[0])
        assert loss <= previous
        previous = loss + 1e-9 * spectrum[0]


# --------------------------------------------------------------------- the output projection


def drifted(case: Case) -> tuple[Tensor, Tensor]:
    """Hidden states `[10, 40, hidden]` of the original, more than go together, and ours."""
    original = random(10, 40, 64, seed=5).float()
    return original, original + 0.3 * random(10, 40, 64, seed=6).float()


def refit(case: Case, original: Tensor, converted: Tensor, **widths: int) -> Any:
    """The new projection, and what it was solved for: z `[n, Q·D]`, targets and W_o."""
    layer, stages = case.stages(**widths)
    with torch.inference_mode():
        z = stages.context(layer.normed(converted), case.rope.scale).flatten(2)
        target = case.stream.exact_attention(layer)(layer.normed(original))
        target = target + aware.DRIFT * (original - converted)
    before, bias = stages.gqa.o_proj.weight.double(), stages.gqa.o_proj.bias
    target = target if bias is None else target - bias
    z, target = (x[:, aware.SINKS :].flatten(0, 1).double() for x in (z, target))
    weight = aware.refit_output(case.stream, layer, stages, original.clone(), converted.clone())
    return weight, z, target, before


def test_the_refitted_projection_solves_the_ridge_regression(case):
    weight, z, target, before = refit(case, *drifted(case))
    ridge = aware.RIDGE * z.square().sum() / z.shape[1]
    identity = torch.eye(z.shape[1], dtype=torch.float64)
    rows = torch.cat((z, ridge.sqrt() * identity))
    wanted = torch.cat((target, ridge.sqrt() * before.T))
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert weight.dtype == torch.float32
    assert (weight.double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_refitted_projection_is_never_worse_on_its_own_text(case):
    weight, z, target, before = refit(case, *drifted(case))
    old, new = ((z @ w.double().T - target).square().sum() for w in (before, weight))
    assert new < old


def test_without_loss_and_drift_the_projection_stays(case):
    original, _ = drifted(case)
    layer = case.layer()
    before = layer.attention.o_proj.weight.clone()
    stages = FactoredAttention(layer.attention, exact_factors(case.layout, case.rope))
    copies = original.clone(), original.clone()
    weight = aware.refit_output(case.stream, layer, stages, *copies)
    assert (weight - before).abs().max() < 1e-3
    torch.testing.assert_close(*copies, atol=1e-3, rtol=1e-3)


def test_both_texts_go_through_the_layer_each_in_its_own_way(case):
    original, converted = drifted(case)
    layer, stages = case.stages()
    fresh = case.layer()
    expected = original.clone()
    fresh.run(expected, case.stream.exact_attention(fresh))
    ours, states = converted.clone(), original.clone()
    weight = aware.refit_output(case.stream, layer, stages, states, ours)
    torch.testing.assert_close(states, expected)
    fitted = ConvertedLayer(case.factors(8, 10), {"o_proj.weight": weight})
    fresh.run(converted, converted_attention(fresh, fitted, case.rope))
    torch.testing.assert_close(ours, converted, atol=1e-4, rtol=1e-4)


def test_a_layer_without_any_query_keeps_finite_factors(tiny, tmp_path):
    def silence(tensors):
        tensors["model.layers.1.self_attn.q_proj.weight"].zero_()

    silent = Case(edited_copy(tiny("llama"), tmp_path / "model", silence))
    assert silent.components.encode.isfinite().all()
    assert silent.components.decode.isfinite().all()
