"""MatryoshkaKV (arXiv 2410.14731): trained orthogonal bases per head, and its greedy rank search.

Keys after RoPE and values of each head are stored as their first r coordinates in an orthogonal
basis Q [D, D], about a mean μ:

    k̂ = (k - μ) Q[:, :r] Q[:, :r]ᵀ + μ

1. *Start*: principal components (`pca.py`), Q = Q₀.
2. *Training* (section 3.3): Q = Q₀ · Cayley(A) with A skew, from A = 0; the published code inverts
   the Cayley map at Q₀ instead, which explodes where Q₀ has eigenvalues near -1. At every step each
   head draws a rank of keys and one of values, uniformly from {D/8, 2D/8, ..., D}. Loss as its code
   has it: 0.25 KL(teacher ‖ student) + 0.75 cross-entropy of the text.
3. *Ranks* (algorithm 1): from full rank, the one head, of keys or of values, whose rank costs least
   KL to lower is lowered by D/8; and again.

Real GQA: one basis per KV head, where the published code repeats heads before it projects.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from kvtool.calibrate.past import Past, beside
from kvtool.calibrate.students import CodeStudent
from kvtool.calibrate.tail import Attend, TailModel, divergence
from kvtool.codes import Fitted, Part, Projection
from kvtool.progress import Progress

PARTS: tuple[Part, ...] = ("keys", "values")
TRUTH = 0.75
"""Share of the cross-entropy in the loss."""
STEPS = 8
"""Ranks are multiples of D / 8, rounded down where that is no whole number."""
RATE = 1e-3
"""Learning rate of the published run, for bases and means."""
SEARCHED = 64
"""Tokens at the ends of the windows that ranks are searched on."""


class _Basis(nn.Module):
    """Orthogonal bases `[H, D, D]`, first columns kept longest, and means `[H, D]`."""

    def __init__(self, start: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        self.mean = nn.Parameter(mean)
        parametrizations.orthogonal(self, "weight", "cayley", use_trivialization=True)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        """`[..., H, S, D]` as it is read back, from the columns in `kept [..., H, D]` (0 or 1)."""
        mean = self.mean[:, None]
        q = self.weight
        return ((x - mean) @ q * kept[..., None, :]) @ q.mT + mean


class MatryoshkaStudent(CodeStudent):
    """Step 2.

    Args:
        pca: The start, of every layer that sees the whole past.
        heads: H.
        ring: Sink and window, exact tokens.
    """

    def __init__(
        self,
        model: TailModel,
        pca: Sequence[Mapping[Part, Fitted]],
        heads: int,
        ring: tuple[int, int],
    ) -> None:
        super().__init__(model, TRUTH)
        self.heads, self.ring = heads, ring
        self.bases = nn.ModuleList()
        for layer in pca:
            for part in PARTS:
                start = layer[part].projection
                size = len(start.mean) // heads
                # Rows of PCA take turns among heads: row i of head h is row i·H + h.
                rows = start.encode.view(size, heads, heads, size)
                own = torch.stack([rows[:, h, h].T for h in range(heads)])
                basis = _Basis(own.float(), start.mean.view(heads, size).float())
                self.bases.append(basis.to(model.device))

    @property
    def layers(self) -> list[int]:
        """Those that have bases; what counts them below says `place`."""
        return self.model.planned_layers

    def basis(self, place: int, part: int) -> _Basis:
        """Of the keys (part 0) or the values (1) of a layer."""
        basis = self.bases[2 * place + part]
        assert isinstance(basis, _Basis)
        return basis

    def attends(self, past: Past) -> Sequence[Attend | None]:
        size = past.keys[self.layers[0]].shape[-1]
        drawn = torch.randint(1, STEPS + 1, (len(self.layers), 2, self.heads)) * size // STEPS
        found: list[Attend | None] = [None] * len(past.keys)
        for place, ranks in enumerate(drawn):
            found[self.layers[place]] = self.attend(past, place, ranks)
        return found

    def attend(self, past: Past, place: int, ranks: Tensor) -> Attend:
        """One layer at `ranks [..., 2, H]` of its keys and values."""
        layer = self.layers[place]
        kept = torch.arange(past.keys[layer].shape[-1]) < ranks[..., None]  # [..., 2, H, D]
        kept = kept.to(self.model.device, torch.float32)
        keys, values = (
            self.basis(place, part)(x, kept[..., part, :, :])
            for part, x in enumerate((past.keys[layer], past.values[layer]))
        )
        scaling, logits = self.model.layouts[layer].scaling, self.model.sink_logits(layer)
        return beside(scaling, keys, values, *self.ring, logits)

    @torch.no_grad()
    def fitted(self) -> list[dict[Part, Fitted]]:
        """The bases as they are now; heads take turns."""
        found: list[dict[Part, Fitted]] = []
        for place in range(len(self.layers)):
            parts: dict[Part, Fitted] = {}
            for which, part in enumerate(PARTS):
                basis = self.basis(place, which)
                q = basis.weight.detach().cpu().double()
                size = q.shape[-1]
                encode = torch.zeros(size, self.heads, self.heads, size, dtype=torch.float64)
                for head in range(self.heads):
                    encode[:, head, head] = q[head].T
                rows = encode.reshape(self.heads * size, -1)
                mean = basis.mean.detach().cpu().double().flatten()
                turns = torch.arange(size, 0, -1.0).repeat_interleave(self.heads)
                parts[part] = Fitted(Projection(rows, rows.T, mean), turns)
            found.append(parts)
        return found


@torch.no_grad()
def greedy_ranks(student: MatryoshkaStudent, past: Past, report: Progress) -> Tensor:
    """Step 3, down to D/8 everywhere.

    A trial changes one layer, so it starts there, from the hidden states below. Costs of all heads
    are not computed anew after every step: a cost only grows when others are lowered, so an old one
    is a bound, and the least is found when the least bound has been brought up to date.

    Returns:
        `[layers, 2, H, 8]`: the step at which the i-th eighth of a head's rank was taken, later
        steps being higher numbers; the first eighths, never taken, have the highest.
    """
    layers, heads = len(student.layers), student.heads
    size = past.keys[student.layers[0]].shape[-1]
    eighths = torch.full((layers, 2, heads), STEPS)  # that are left
    removal = torch.zeros(layers, 2, heads, STEPS)
    model = student.model
    with parametrize.cached():
        attends = [model.dense(i) for i in range(len(model.layers))]
        for place, own in enumerate(eighths):
            attends[student.layers[place]] = student.attend(past, place, own * size // STEPS)
        states = list(past.states)  # the end in front of every layer, at the ranks reached

        def cost(entry: tuple[int, int, int]) -> float:
            """KL(original ‖ student) with one more eighth of this head gone."""
            layer, trial = student.layers[entry[0]], eighths[entry[0]].clone()
            trial[entry[1:]] -= 1
            tried = student.attend(past, entry[0], trial * size // STEPS)
            hidden = states[layer]
            for i in range(layer, len(attends)):
                attend = tried if i == layer else attends[i]
                hidden = model.layer(i, hidden, past.reading, attend)
            return float(divergence(past.expected, model.predictions(hidden)[0]))

        entries = [(i, p, h) for i in range(layers) for p in (0, 1) for h in range(heads)]
        bounds = [(cost(entry), entry) for entry in entries]
        heapq.heapify(bounds)
        total = len(entries) * (STEPS - 1)
        report("searching ranks", 0, total)
        for step in range(total):
            _, entry = heapq.heappop(bounds)
            while bounds and (now := cost(entry)) > bounds[0][0]:
                _, entry = heapq.heappushpop(bounds, (now, entry))
            layer = student.layers[entry[0]]
            eighths[entry] -= 1
            removal[(*entry, int(eighths[entry]))] = step + 1
            attends[layer] = student.attend(past, entry[0], eighths[entry[0]] * size // STEPS)
            for i in range(layer, len(attends) - 1):
                states[i + 1] = model.layer(i, states[i], past.reading, attends[i])
            if eighths[entry] > 1:
                heapq.heappush(bounds, (bounds[0][0] if bounds else 0.0, entry))
            report("searching ranks", step + 1, total)
    return removal.masked_fill(removal == 0, total + 1)


def ranked(fitted: Sequence[Mapping[Part, Fitted]], removal: Tensor) -> list[dict[Part, Fitted]]:
    """Codes whose rows stand in the order in which the search kept them longest.

    Args:
        removal: See :func:`greedy_ranks`.
    """
    found: list[dict[Part, Fitted]] = []
    for layer, parts in enumerate(fitted):
        ordered: dict[Part, Fitted] = {}
        for place, part in enumerate(PARTS):
            one = parts[part].projection
            size = len(one.mean) // removal.shape[2]
            widths = (torch.arange(STEPS + 1) * size // STEPS).diff()  # of the eighths
            worth = removal[layer, place].repeat_interleave(widths, dim=1)  # [H, D]
            worth = worth.T.flatten()  # heads take turns
            order = worth.argsort(descending=True, stable=True)
            rows = one.encode[order]
            ordered[part] = Fitted(Projection(rows, rows.T, one.mean), worth[order].double())
        found.append(ordered)
    return found
