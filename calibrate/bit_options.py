"""What a calibration of bits is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from kvtool.bits import Bits, Tier, Turned
from kvtool.calibrate.projections import Read
from kvtool.errors import PlanError, UsageError
from kvtool.kernels.quantise import BITS
from kvtool.sizes import parse_share
from kvtool.states import CHUNKS

Method = Literal["aware", "kivi", "rotatekv", "zipcache", "mikv", "gear", "mustafar", "fp8"]
METHODS: tuple[Method, ...] = get_args(Method)
FP8 = "fp8"
"""As bits: numbers are e4m3, with static scales. It is a method of its own."""
SALIENT: dict[Method, float] = {"zipcache": 0.6, "mikv": 0.5}
"""Of methods with two tiers of tokens, the share of the upper one."""
RANK = 2
"""Of gear, as GEAR's code has for blocks that come while it decodes."""
AUTO = "auto"
"""As many bits as a budget allows."""


class _Usual(NamedTuple):
    """What is asked for if nothing is said."""

    group: int = 64
    sink: int = 4
    window: int = 64


_USUAL: dict[Method, _Usual] = {
    "kivi": _Usual(sink=0, window=128),
    "zipcache": _Usual(group=128),
    "mikv": _Usual(group=128),
    "fp8": _Usual(window=0),
}
"""Of methods that differ from most."""


@dataclass(frozen=True)
class QuantizationOptions:
    """Everything that determines the bits besides the model and the plan of its heads.

    Attributes:
        bits: Of keys and of values; of `aware` their mean, as bytes. None if a budget says it. Of
            mustafar, both are those of keys.
        group: See :class:`~kvtool.bits.Bits`.
        rest: Of a method with two tiers of tokens, the bits of the lower one, 2 if not given.
        salient: Tokens of a block of `group` that are in the upper one; :data:`SALIENT` if not
            given.
        rank: Of gear; :data:`RANK` if not given.
        kept: Of mustafar, which needs it: numbers of each value that are kept.
        read: Whether keys are stored after RoPE and read as they are, or before it and rebuilt.
        context: Tokens of the sequence that a budget is for.
        sink, window: Tokens that are kept exactly.
        states: Bits of the states of Mamba-2 layers.
        heads: Whether heads are packed: those of a hybrid may be left as they are.
    """

    method: Method = "aware"
    bits: tuple[int, int] | None = (4, 4)
    group: int = 64
    read: Read = "absorbed"
    context: int = 4096
    sink: int = 4
    window: int = 64
    data: str | None = None
    tokens: int = 16384
    seed: int = 0
    rest: tuple[int, int] | None = None
    salient: int | None = None
    rank: int | None = None
    states: int | None = None
    heads: bool = True
    kept: int | None = None

    @classmethod
    def asked(
        cls, method: Method, bits: str, *, group: int | None = None, read: Read | None = None,
        sink: int | None = None, window: int | None = None, salient: str | None = None,
        **others: Any,
    ) -> QuantizationOptions:  # fmt: skip
        """What the words of a user mean, before a model is known.

        Args:
            bits: Such as `auto`, `K4V2`, `4/2`, `fp8` or `4S8`; of `S8` alone, heads are left as
                they are.
            group, read, sink, window: None for what is usual with the method.
            salient: A share of a group.
            others: Fields that need no reading.

        Raises:
            UsageError: They mean nothing.
        """
        of_heads, states = split_states(bits)
        if of_heads == FP8:
            if method != "aware":
                raise UsageError(
                    f"--bits fp8 is a method of its own, and --method {method} another"
                )
            blocks = {"--group": group, "--read": read, "--sink": sink}
            if given := [name for name, value in blocks.items() if value is not None]:
                raise UsageError(f"--bits fp8 stores every token alike, and has no {given[0]}")
            method, of_heads = "fp8", "8"
        upper, rest = parse_tiers(of_heads if of_heads or states is None else "4")
        if upper is None and method != "aware":
            raise UsageError(
                f"--bits auto is for --method aware, {method} has the same bits everywhere"
            )
        usual = _USUAL.get(method, _Usual())
        group = usual.group if group is None else group
        return cls(
            method,
            upper,
            group,
            read or ("rebuilt" if method == "rotatekv" else "absorbed"),
            sink=usual.sink if sink is None else sink,
            window=usual.window if window is None else window,
            rest=rest,
            salient=None if salient is None else parse_share(salient, group),
            states=states,
            heads=bool(of_heads),
            **others,
        )

    @property
    def named(self) -> str:
        """How a user asks for the method."""
        return f"--bits {FP8}" if self.method == FP8 else f"--method {self.method}"

    def check(self) -> None:
        """Raises UsageError if the options do not go together."""
        method = self.method
        if (self.rest is not None or self.salient is not None) and method not in SALIENT:
            raise UsageError(
                f"{self.named} has the same bits for all tokens",
                hint=f"--method {' or '.join(SALIENT)}",
            )
        if self.rank is not None and method != "gear":
            raise UsageError(f"{self.named} has no factors", hint="--method gear")
        sparse = method == "mustafar"
        if self.kept is not None and not sparse:
            raise UsageError(f"{self.named} keeps all numbers of a value", hint="--method mustafar")
        if sparse and not self.kept:
            raise UsageError(
                "--method mustafar keeps some numbers of each value, so --sparsity is below 100%"
            )
        if sparse and self.bits is not None and self.bits[0] != self.bits[1]:
            raise UsageError(
                "--method mustafar keeps numbers of values exactly: --bits are those of keys, "
                "such as 4"
            )
        if method == FP8:  # which has no blocks
            return
        try:
            self.everywhere()
        except PlanError as error:
            raise UsageError(f"{self.named}: {error}") from error

    def everywhere(self) -> Bits:
        """The same for every layer, at 4 bits if there are none; of all methods but fp8.

        Raises:
            PlanError: They are out of range.
        """
        keys, values = self.bits or (4, 4)
        turned: Turned = "both" if self.method == "rotatekv" else "none"
        rest = None
        if self.method in SALIENT:
            salient = self.salient
            if salient is None:
                salient = int(SALIENT[self.method] * self.group)
            rest = Tier(self.group - salient, *(self.rest or (2, 2)))
        return Bits(
            keys,
            values if self.kept is None else 16,
            self.group,
            "token" if self.method in ("rotatekv", "mikv") else "channel",
            "unrotated" if self.read == "rebuilt" else "rotated",
            turned,
            sink=self.sink,
            window=self.window,
            rest=rest,
            rank=(RANK if self.rank is None else self.rank) if self.method == "gear" else 0,
            kept=self.kept,
        )


def parse_tiers(text: str) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Bits from what :func:`parse_bits` reads, or from two of them such as `4/2`: those of the
    tokens with most attention, and of the others.

    Raises:
        UsageError: It is none of them.
    """
    upper, *lower = text.split("/")
    found = [parse_bits(x) for x in (upper, *lower)]
    if len(found) > 2 or (lower and None in found):
        raise UsageError(f"--bits {text} is not possible: two tiers have bits such as 4/2")
    most, rest = found[0], found[-1]
    if (
        most is not None
        and rest is not None
        and any(x < y for x, y in zip(most, rest, strict=True))
    ):
        raise UsageError(f"--bits {text} gives tokens with more attention fewer bits")
    return found[0], found[1] if lower else None


def split_states(text: str) -> tuple[str, int | None]:
    """What a text such as `K4V2S8` says of heads, and of states: None where it does not."""
    found = re.fullmatch(r"(.*)[sS](\d)", text)
    if not found:
        return text, None
    heads, bits = found[1], int(found[2])
    if bits not in CHUNKS:
        raise UsageError(f"--bits {text} is not possible: states have 4 or 8 bits")
    return heads, bits


def parse_bits(text: str) -> tuple[int, int] | None:
    """Bits of keys and values from `4`, `K4V2` or `auto`.

    Raises:
        UsageError: It is none of them.
    """
    if text == AUTO:
        return None
    found = re.fullmatch(r"(\d)|[kK](\d)[vV](\d)", text)
    if found:
        both, keys, values = found.groups()
        pair = int(keys or both), int(values or both)
        if all(bits in BITS for bits in pair):
            return pair
    raise UsageError(
        f"--bits {text} is not possible: it is 2, 3, 4 or 8, keys and values apart such as K4V2, "
        f"{AUTO}, or {FP8} for all tokens, keys and values alike"
    )
