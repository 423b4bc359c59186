"""The last number of a response, compared exactly."""

from __future__ import annotations

import re
from fractions import Fraction

from pydantic import Field

from ondol.errors import OndolError
from ondol.records import Problem
from ondol.rewards.base import Verifier

_DIGITS = 4000  # longer numbers and exponents are not read: they are never meant, and Python refuses them at 4,300

# A number not glued to a word before it ("step2" and "m2" hold none). Signs count only where no operand stands before
# them: "7-5" ends in 5. Currency signs may stand between sign and digits.
_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_NUMBER = re.compile(
    rf"(?:(?<![A-Za-z0-9_)\]}}%])(?P<sign>[-+−]))?(?<![A-Za-z_0-9])[$€£]?(?P<top>{_UNSIGNED})(?:\s?/\s?(?P<bottom>[0-9]+)(?![0-9.]))?"
)


class Numeric(Verifier):
    """1 when the last number of the response equals the gold answer's; units and percent signs after it are ignored.

    Thousands commas, decimals, scientific notation and fractions a/b are read; everything is compared as exact
    fractions. Both tolerances are 0 by default; a number within either is right.
    """

    tolerance: float = Field(default=0.0, ge=0, description="allowed difference")
    relative: float = Field(default=0.0, ge=0, description="allowed difference as a share of the gold answer")

    def score(self, problem: Problem, response: str) -> float:
        gold, given = self._gold(problem), last_number(response)
        if given is None:
            return 0.0
        slack = max(Fraction(str(self.tolerance)), Fraction(str(self.relative)) * abs(gold))
        return float(abs(given - gold) <= slack)

    def near_misses(self, problem: Problem) -> list[str]:
        gold = self._gold(problem)
        slack = max(Fraction(str(self.tolerance)), Fraction(str(self.relative)) * abs(gold))
        off = [
            str(gold + 2 * slack + 1),
            str(gold - 2 * slack - 1),
            f"{problem.answer}, or rather {gold + 2 * slack + 1}",
        ]
        return ["", "no number", *off]

    def _gold(self, problem: Problem) -> Fraction:
        gold = last_number(problem.answer)
        if gold is None:
            raise OndolError(
                f"the gold answer {problem.answer!r:.80} holds no number",
                "use the verifier 'exact' or 'math'",
            )
        return gold


def last_number(text: str) -> Fraction | None:
    """The last number in `text`, exactly; None without one, or when it is absurdly long or divides by zero."""
    match = last_match(text)
    if match is None:
        return None
    top = match["top"].replace(",", "").lower()
    mantissa, _, exponent = top.partition("e")
    if (
        len(mantissa) > _DIGITS
        or len(match["bottom"] or "") > _DIGITS
        or len(exponent) > 5
        or abs(int(exponent or 0)) > _DIGITS
    ):
        return None
    value = Fraction(top)
    if match["bottom"] is not None:
        if int(match["bottom"]) == 0:
            return None
        value /= int(match["bottom"])
    return -value if match["sign"] in ("-", "−") else value


def is_number(text: str) -> bool:
    """Whether `text` is one number and nothing else."""
    return _NUMBER.fullmatch(text) is not None


def last_match(text: str) -> re.Match[str] | None:
    """Where the last number stands; groups `sign`, `top` and `bottom` (of a fraction)."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007
        pass
    return match
