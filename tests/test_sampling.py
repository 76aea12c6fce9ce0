"""The next tokens of several texts are those that each would get alone."""

import pytest
import torch

from kvtool.runtime.sampling import GREEDY, Sampler, Sampling, draw

KINDS = [
    GREEDY,
    Sampling(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01),
    Sampling(repetition_penalty=1.3),
    Sampling(presence_penalty=0.5, frequency_penalty=0.5, temperature=1.0),
    Sampling(logit_bias={3: 9.0}),
]
CPU = torch.device("cpu")


def samplers() -> list[Sampler]:
    made = [Sampler(sampling, 7, CPU, prompt=3) for sampling in KINDS]
    return [*made, Sampler(GREEDY, None, CPU, prompt=3, least=9, stops=[5])]


def test_texts_drawn_together_are_drawn_as_alone():
    torch.manual_seed(0)
    logits = torch.randn(6, 40)
    logits[5, 5] = 50.0  # would end the text before it may
    texts = [([1, 2, 3], [4] * n) for n in range(6)]
    together = draw(samplers(), logits, texts)
    alone = [
        sampler(row, *text) for sampler, row, text in zip(samplers(), logits, texts, strict=True)
    ]
    joined = [
        sampler(row, [*text[0], *text[1]])
        for sampler, row, text in zip(samplers(), logits, texts, strict=True)
    ]
    assert together == alone == joined
    assert together[0] == logits[0].argmax()
    assert together[5] != 5


class Unread(list):
    """A text whose tokens nobody may ask for."""

    def __iter__(self):
        raise AssertionError("a long text was read for nothing")


@pytest.mark.parametrize("kind", [0, 1, 4])
def test_what_does_not_depend_on_the_text_does_not_read_it(kind):
    draw([Sampler(KINDS[kind], 1, CPU)], torch.randn(1, 40), [(Unread([1] * 9),)])


@pytest.mark.parametrize("kind", [2, 3])
def test_penalties_read_it(kind):
    with pytest.raises(AssertionError):
        draw([Sampler(KINDS[kind], 1, CPU)], torch.randn(1, 40), [(Unread([1] * 9),)])
