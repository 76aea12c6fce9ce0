"""The algebra of TransMLA: what is exact, what is nested, what is lost."""

from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES

from kvtool.calibrate.stream import LayerStream
from kvtool.checkpoint import Checkpoint
from kvtool.convert import transmla
from kvtool.convert.exact import exact_factors
from kvtool.convert.fitting import ConvertedLayer, converted_attention
from kvtool.convert.targets import freqfold_candidates
from kvtool.latent import FactoredAttention, LatentFactors, query_blocks
from kvtool.rope import Rope

CASES = [(family, {}) for family in FAMILIES] + [
    ("llama", {"num_key_value_heads": 1}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"head_dim": 24}),
    ("qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def layer_of(request, tiny):
    """A stream, one of its layers, and hidden states that go into it."""
    family, overrides = request.param
    stream = LayerStream(Checkpoint.open(str(tiny(family, **overrides))))
    hidden = torch.randn(4, 60, 64, generator=torch.Generator().manual_seed(0)) * 3
    return stream, stream.layer(1), hidden


def random_rotations(heads: int, pairs: int) -> torch.Tensor:
    """Random orthogonal U_l `[N, H, H]`."""
    generator = torch.Generator().manual_seed(1)
    return torch.linalg.qr(
        torch.randn(pairs, heads, heads, dtype=torch.float64, generator=generator)
    ).Q


def rotated_exact(layout, rope: Rope, real: torch.Tensor, imag: torch.Tensor) -> LatentFactors:
    """The exact embedding with its RoPE components mixed across heads by U_l `[N, H, H]`."""
    exact = exact_factors(layout, rope)
    heads, pairs = layout.kv_heads, layout.head_dim // 2
    rows = exact.rope.view(2, heads, pairs, -1)
    mixed = torch.stack(
        [torch.einsum("leh,hlk->elk", u, part) for u, part in zip((real, imag), rows, strict=True)]
    )
    rope = mixed.reshape_as(exact.rope)
    return replace(exact, rope=rope, rope_query=query_blocks(rope, heads))


def outputs(stream, layer, hidden, factors):
    """Attention outputs of the original and of the factors, on normed hidden states."""
    with torch.inference_mode():
        expected = stream.exact_attention(layer)(hidden)
        converted = converted_attention(layer, ConvertedLayer(factors), stream.rope)
        return expected, converted(hidden)


def test_exact_factors_reproduce_the_layer(layer_of):
    stream, layer, hidden = layer_of
    factors = exact_factors(layer.attention.layout, stream.rope)
    expected, got = outputs(stream, layer, hidden, factors)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_rotating_heads_alike_in_real_and_imaginary_part_commutes_with_rope(layer_of):
    stream, layer, hidden = layer_of
    layout = layer.attention.layout
    u = random_rotations(layout.kv_heads, layout.head_dim // 2)
    expected, got = outputs(stream, layer, hidden, rotated_exact(layout, stream.rope, u, u))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_rotating_real_and_imaginary_part_differently_does_not(tiny):
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    layer, hidden = stream.layer(1), torch.randn(2, 60, 64)
    layout = layer.attention.layout
    u = random_rotations(layout.kv_heads, layout.head_dim // 2)
    factors = rotated_exact(layout, stream.rope, u, u.flip(0))
    expected, got = outputs(stream, layer, hidden, factors)
    assert (got - expected).abs().max() > 0.05


@pytest.mark.parametrize("collapse", [1, 2])
def test_full_rank_equals_the_model_that_lost_its_rope(layer_of, collapse):
    stream, layer, hidden = layer_of
    layout = layer.attention.layout
    rope_dim = layout.head_dim // collapse
    basis, moment = measured(stream, layer, hidden, rope_dim, fold=2 * collapse)
    width = layout.kv_heads * layout.head_dim
    factors = transmla.latent_factors(
        moment, basis, stream.rope, layout.kv_heads, 2 * width - rope_dim
    )
    with torch.inference_mode():
        expected = transmla.partial_rope_attention(stream, layer, basis)(hidden)
        got = converted_attention(layer, ConvertedLayer(factors), stream.rope)(hidden)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def measured(stream, layer, hidden, rope_dim, fold):
    """Basis and joint moment of a layer whose inputs are `hidden`, already normed."""
    layout = layer.attention.layout
    width = layout.kv_heads * layout.head_dim
    moment = torch.zeros(2 * width, 2 * width, dtype=torch.float64)

    def observe(q, k, v):
        joint = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], dim=-1)
        moment.add_(torch.einsum("bti,btj->ij", joint.double(), joint.double()))

    with torch.inference_mode():
        stream.exact_attention(layer, observe)(hidden)
    gram = transmla.key_gram(moment[:width, :width], layout.kv_heads)
    return transmla.RotatedBasis(gram, rope_dim, fold), moment


@pytest.mark.parametrize("fold", [1, 2, 4, 8])
def test_basis_is_orthonormal_and_its_kept_energy_is_that_of_the_projected_keys(tiny, fold):
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    layer, hidden = stream.layer(0), torch.randn(4, 50, 64)
    layout = layer.attention.layout
    basis, moment = measured(stream, layer, hidden, layout.head_dim, fold)
    identity = torch.eye(layout.head_dim, dtype=torch.float64)
    torch.testing.assert_close(basis.rope @ basis.rope.T, identity, atol=1e-12, rtol=0)
    width = layout.kv_heads * layout.head_dim
    keys = moment[:width, :width]
    kept = (basis.rope @ keys @ basis.rope.T).trace() / keys.trace()
    assert basis.kept == pytest.approx(float(kept), rel=1e-9)


def test_folding_more_frequencies_keeps_more_energy(tiny):
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    layer, hidden = stream.layer(0), torch.randn(4, 50, 64)
    kept = [measured(stream, layer, hidden, 16, fold)[0].kept for fold in (1, 2, 4, 8)]
    assert kept == sorted(kept)
    # One of two components per frequency: PCA keeps at least half.
    assert kept[0] >= 0.5


@pytest.mark.parametrize(("rope_dim", "fold"), [(16, 1), (16, 4), (8, 2), (8, 8), (4, 4)])
def test_kept_frequencies_are_every_cth_of_the_model(tiny, rope_dim, fold):
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    layer, hidden = stream.layer(0), torch.randn(2, 50, 64)
    basis, _ = measured(stream, layer, hidden, rope_dim, fold)
    assert basis.frequency.tolist() == list(range(0, 8, 16 // rope_dim))


def test_a_smaller_rank_is_a_slice_and_loses_just_the_dropped_eigenvalues(layer_of):
    stream, layer, hidden = layer_of
    layout = layer.attention.layout
    basis, moment = measured(stream, layer, hidden, layout.head_dim, 2)
    width = layout.kv_heads * layout.head_dim
    full = transmla.latent_factors(moment, basis, stream.rope, layout.kv_heads, 2 * width)
    # In the balanced coordinates of the PCA, the latent's second moment is the spectrum.
    spectrum = (full.down @ moment @ full.down.T).diagonal()
    assert torch.all(spectrum[:-1] >= spectrum[1:] - 1e-9 * spectrum[0])
    previous = torch.inf
    for rank in (1, 5, 9, full.rank):
        small = transmla.latent_factors(moment, basis, stream.rope, layout.kv_heads, rank)
        torch.testing.assert_close(small.down, full.down[:rank])
        torch.testing.assert_close(small.value_up, full.value_up[..., :rank])
        lost = spectrum[rank:].sum()
        assert lost <= previous
        previous = lost
        residual = moment - reconstructed(small, moment, width)
        values = residual[width:, width:].trace()
        keys = ((residual[:width, :width]).trace()) / balance(full, width) ** 2
        torch.testing.assert_close(keys + values, lost, rtol=1e-9, atol=1e-9 * spectrum[0])


def balance(factors: LatentFactors, width: int) -> float:
    """α, read off the factors: key_up carries it, down its inverse. 1 where no key is unrotated."""
    if factors.rope.shape[0] == width:
        return 1.0
    up = factors.key_up.flatten(0, 1)
    down = factors.down[:, :width]
    return float((up.norm() / down.norm()).sqrt())


def reconstructed(factors: LatentFactors, moment: torch.Tensor, width: int) -> torch.Tensor:
    """Second moment of what the factors keep of the unrotated keys and the values."""
    up = torch.cat((factors.key_up.flatten(0, 1), factors.value_up.flatten(0, 1)))
    nope = torch.eye(width, dtype=torch.float64) - factors.rope.T @ factors.rope
    select = torch.block_diag(nope, torch.eye(width, dtype=torch.float64))
    kept = up @ factors.down
    # E‖x - kept x‖² needs the cross terms: return M such that moment - M is the error's moment.
    error = select - kept
    return moment - error @ moment @ error.T


def test_noise_directions_are_not_stored(tiny):
    stream = LayerStream(Checkpoint.open(str(tiny("llama"))))
    layer = stream.layer(0)
    hidden = torch.randn(4, 50, 5) @ torch.randn(5, 64)  # keys and values span 5 directions
    basis, moment = measured(stream, layer, hidden, 16, 1)
    factors = transmla.latent_factors(moment, basis, stream.rope, 2, 40)
    assert factors.rank == 5


def test_freqfold_candidates_are_multiples_of_the_collapse():
    assert freqfold_candidates(64, 64) == [1, 2, 4, 8]
    assert freqfold_candidates(64, 32) == [2, 4, 8, 16]
    assert freqfold_candidates(24, 24) == [1, 2, 4]


def test_factored_attention_keeps_the_norm_of_qwen3_in_front_of_the_latent(tiny):
    stream = LayerStream(Checkpoint.open(str(tiny("qwen3"))))
    layer = stream.layer(0)
    stages = FactoredAttention(layer.attention, exact_factors(layer.attention.layout, stream.rope))
    hidden = torch.randn(1, 3, 64)
    with torch.inference_mode():
        shared = stages.query_and_compress(hidden)[2]
        doubled = stages.query_and_compress(2 * hidden)[2]
    # RMSNorm removes the scale; a latent taken in front of the norm would double.
    torch.testing.assert_close(shared, doubled, atol=1e-4, rtol=1e-4)
