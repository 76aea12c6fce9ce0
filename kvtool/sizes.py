"""Sizes as users type them: shares such as `55%`, and bytes such as `300MB`."""

from __future__ import annotations

import re
from fractions import Fraction

from kvtool.errors import UsageError

BF16 = 2
"""Bytes per number of the cache that shares and budgets are stated of."""
# Generators take 64 bits, and layers, steps and choices add their number to a seed.
MAX_SEED = 2**62
LEAST_TEMPERATURE = 1e-3
"""Above 0: logits are divided by it, and far below they overflow."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_budget(text: str, native: int) -> int:
    """A number of bytes from `55%` of `native`, or from a size such as `11520`, `1.5MiB`, `2GB`.

    Raises:
        UsageError: It is neither, is zero, or is a share above 100 %.
    """
    value, unit = _number(text)
    if unit == "%" and 0 < value <= 100:
        return int(value * native / 100)
    if (size := bytes_of(text)) is None:
        raise UsageError(
            f"the budget '{text}' is neither a share of the native cache, above 0% and up to 100%, "
            "nor a size such as 300MB"
        )
    return size


def token_budget(text: str) -> tuple[Fraction, bool]:
    """What a conversion may keep of every token: a share of the native cache such as `50%`, as a
    number below 1, or bytes in all layers together such as `11520` or `11.25KiB`; and whether it is
    a share.

    Raises:
        UsageError: It is neither, is zero, or is a share of 100 % or more.
    """
    value, unit = _number(text)
    is_share = unit == "%"
    amount = value / 100 if is_share else value * _UNITS.get(unit, 0)
    if amount <= 0:
        raise UsageError(
            f"--kv-budget '{text}' is neither a share such as 50% nor bytes per token such as 11520"
        )
    if is_share and amount >= 1:
        raise UsageError(f"--kv-budget {text} does not shrink the cache: a share is below 100%")
    return amount, is_share


def bytes_of(text: str) -> int | None:
    """A size such as `11520`, `1.5MiB` or `2GB` in bytes; None if it is none, or zero."""
    value, unit = _number(text)
    size = int(value * _UNITS.get(unit, 0))
    return size if size > 0 else None


def parse_share(text: str, total: int) -> int:
    """A count from `50%` of `total` (rounded down), or from the count itself.

    Raises:
        UsageError: It is neither, or is more than `total`.
    """
    value, unit = _number(text)
    count = value * total / 100 if unit == "%" else value
    if unit not in ("", "%") or not 0 <= count <= total or (not unit and count.denominator > 1):
        raise UsageError(f"'{text}' is neither a share such as 50% nor a number up to {total}")
    return int(count)


def _number(text: str) -> tuple[Fraction, str]:
    """The number that *text* starts with, -1 if there is none, and the unit behind it."""
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z%]*)\s*", text)
    return (Fraction(found[1]), found[2].lower()) if found else (Fraction(-1), "")
