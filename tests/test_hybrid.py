"""Replacements of attention: what they inherit, their closed form, and what teaching may change."""

import pytest
import torch
import torch.nn.functional as F

from kvtool.attention import GroupedQueryAttention
from kvtool.checkpoint import Checkpoint
from kvtool.distill import Training, train
from kvtool.divergence import divergence
from kvtool.hybrid import (
    Alignment,
    Distillation,
    HybridModel,
    Judged,
    judge,
)
from kvtool.layout import decoder_layers
from kvtool.mamba import Mixer
from kvtool.replacements import NEARER, Pointwise, random_mixer, seeded_mixer

TEXTS = torch.randint(0, 300, (6, 48), generator=torch.Generator().manual_seed(0))
REACH = torch.tensor([4.0, 8.0, 16.0, 32.0])


def load(path):
    return Checkpoint.open(str(path)).load_transformers(torch.float32)


def hybrid_of(path, layers=(1,), arm="mamba"):
    def make(index, attention):
        if arm == "mamba":
            return seeded_mixer(attention, REACH)
        if arm == "random":
            return random_mixer(attention, torch.Generator().manual_seed(index))
        return Pointwise(attention.layout.hidden_size)

    return HybridModel(load(path), layers, make)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_seeded_mixer_is_decaying_attention_of_the_same_heads_without_a_softmax(tiny, family):
    layer = decoder_layers(load(tiny(family)))[1]
    attention = GroupedQueryAttention(layer.self_attn, "self_attn")
    hidden = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = seeded_mixer(attention, REACH).features(hidden).unflatten(-1, (4, 16))
        q, k, v = attention.project(hidden)
    q, k = F.silu(q), F.silu(k)
    behind = torch.arange(20)[:, None] - torch.arange(20)
    for head in (0, 1, 3):  # head 2 looks at the token itself
        decay = torch.exp(-behind / (REACH[head] * NEARER[head % 2])).tril()
        scores = q[:, head] @ k[:, head // 2].mT * decay
        expected = scores @ v[:, head // 2] + 0.5 * v[:, head // 2]
        torch.testing.assert_close(features[:, :, head], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(features[:, :, 2], torch.zeros(2, 20, 16))


def test_the_closed_form_is_the_best_read_out_and_own_tokens_make_it_better(tiny):
    hybrid = hybrid_of(tiny("llama"))
    before = hybrid.fit_outputs(TEXTS)[1]
    hybrid.seed_own_tokens(TEXTS)
    after = hybrid.fit_outputs(TEXTS)[1]
    assert after < before < 1
    seen = []
    hybrid._watched(TEXTS, {1: lambda hidden, told: seen.append((hidden, told))})
    with torch.no_grad():
        made = [(hybrid.slots[1].replacement(hidden), told) for hidden, told in seen]
    wrong = sum(float((a - b).square().sum()) for a, b in made)
    assert wrong / sum(float(b.square().sum()) for _, b in made) == pytest.approx(after, rel=1e-3)


def test_a_model_without_replacements_at_work_is_the_original(tiny):
    expected = load(tiny("llama")).model(TEXTS, use_cache=False).last_hidden_state
    hybrid = hybrid_of(tiny("llama"), (0, 2))
    with torch.no_grad():
        assert torch.equal(hybrid.states(TEXTS, ()), expected)
        one = hybrid.states(TEXTS, (2,))
        assert not torch.equal(one, expected)
        assert not torch.equal(hybrid.states(TEXTS), one)


def test_alignment_holds_what_is_inherited_until_it_may_change(tiny):
    hybrid = hybrid_of(tiny("llama"))
    hybrid.fit_outputs(TEXTS)
    mixer = hybrid.slots[1].replacement
    held = slice(64, 256)  # x, B and C
    for inherited in (False, True):
        before = {n: p.detach().clone() for n, p in mixer.named_parameters()}
        student = Alignment(hybrid, inherited=inherited)
        log = train(student, lambda i: TEXTS, Training(20, 1e-2), None)
        student.release()
        assert log[-1]["loss"] < log[0]["loss"]
        changed = {n for n, p in mixer.named_parameters() if not torch.equal(p, before[n])}
        assert changed == set(before)  # every one of them has a gradient
        same = torch.equal(mixer.in_proj.weight[held], before["in_proj.weight"][held])
        assert same is not inherited


@pytest.mark.parametrize("arm", ["mamba", "random", "pointwise"])
@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl"])
def test_distillation_brings_the_predictions_nearer_and_touches_nothing_else(tiny, arm, loss):
    hybrid = hybrid_of(tiny("llama"), (1,), arm)
    hybrid.fit_outputs(TEXTS)
    replaced = hybrid.slots[1].replacement
    others = {n: p for n, p in hybrid.named_parameters() if "replacement" not in n}
    before = {n: p.detach().clone() for n, p in others.items()}
    worse = judge(hybrid, TEXTS).mean_kl
    train(Distillation(hybrid, loss=loss), lambda i: TEXTS, Training(40, 2e-2), None)
    assert judge(hybrid, TEXTS).mean_kl < 0.8 * worse
    assert all(torch.equal(p, before[n]) for n, p in others.items())
    assert all(p.requires_grad for p in replaced.parameters())


def test_another_teacher_may_teach(tiny):
    hybrid = hybrid_of(tiny("llama"))
    own = Distillation(hybrid)(TEXTS)[0].detach()
    other = load(tiny("llama", num_hidden_layers=2)).requires_grad_(False)
    assert float(Distillation(hybrid, other)(TEXTS)[0].detach()) != pytest.approx(float(own))
    assert float(Distillation(hybrid, load(tiny("llama")))(TEXTS)[0].detach()) == pytest.approx(
        float(own)
    )


@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl"])
def test_both_divergences_have_the_gradient_that_autograd_finds(loss):
    generator = torch.Generator().manual_seed(0)
    told = torch.randn(700, 12, generator=generator)  # more than a slice
    states = torch.randn(700, 8, generator=generator, requires_grad=True)
    head = torch.randn(50, 8, generator=generator)
    teacher_head = torch.randn(50, 12, generator=generator)
    q, p = (states @ head.T).log_softmax(-1), (told @ teacher_head.T).log_softmax(-1)
    one, other = (p, q) if loss == "forward-kl" else (q, p)
    expected = (one.exp() * (one - other)).sum()
    found = divergence(states, told, head, teacher_head, loss)
    torch.testing.assert_close(found, expected)
    (right,) = torch.autograd.grad(expected, states)
    (ours,) = torch.autograd.grad(found, states)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


def test_judging_compares_with_the_original_position_by_position(tiny):
    hybrid = hybrid_of(tiny("llama"))
    same = judge(hybrid, TEXTS, ())
    assert same.kl == pytest.approx([0.0] * 6, abs=1e-9)
    assert same.perplexity_ratio == pytest.approx(1)
    found = judge(hybrid, TEXTS)
    assert isinstance(found, Judged)
    with torch.no_grad():
        p, q = (
            (hybrid.states(TEXTS[:1], which)[0] @ hybrid.head.T).log_softmax(-1)
            for which in ((), None)
        )
    expected = F.kl_div(q[:-1], p[:-1], log_target=True, reduction="sum") / 47
    assert found.kl[0] == pytest.approx(float(expected), rel=1e-4)
    nll = F.nll_loss(q[:-1], TEXTS[0, 1:])
    assert found.nll[0] == pytest.approx(float(nll), rel=1e-5)


def test_a_mixer_needs_the_order_of_the_tokens(tiny):
    hybrid = hybrid_of(tiny("llama"))
    mixer = hybrid.slots[1].replacement
    assert isinstance(mixer, Mixer)
    hidden = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(2))
    shuffled = torch.cat((hidden[:, :29].flip(1), hidden[:, 29:]), dim=1)
    with torch.no_grad():
        one, other = (mixer.features(x)[:, -1] for x in (hidden, shuffled))
    assert not torch.allclose(one, other, rtol=1e-2)
