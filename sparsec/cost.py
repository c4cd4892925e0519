"""What speed means to passes and commands: seconds by shape, pattern and tokens, as a backend knows them, compared."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from sparsec.errors import UsageError
from sparsec.pattern import Dense, Pattern

if TYPE_CHECKING:
    from sparsec.layout import Values

Basis = Literal["measured", "model"]
"""What a prediction rests on: measurements on the machine it is for, or a formula with assumed constants."""
DENSE = Dense()
UNDECLARED = "1-512"  # tokens that layers are taken to see where a decision needs a range and none was declared
MOST_TOKENS = 4096  # break-even is looked for up to here


class Cost(Protocol):
    """Seconds of a product on this machine, with torch's thread count of now."""

    def __call__(self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values) -> float:
        """`tokens` vectors times each matrix of a weight (batch, rows, cols); `Dense()`: the dense product."""


@dataclass(frozen=True)
class TokenRange:
    """How many vectors a layer is expected to see in one call; from 1 token to 512: `1-512`.

    >>> TokenRange.parse("1-512"), str(TokenRange.parse("32")), TokenRange(3, 40).counts
    (TokenRange(low=1, high=512), '32', (3, 4, 8, 16, 32, 40))
    """

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> TokenRange:
        """Read `LOW-HIGH` or one number; raises UsageError."""
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise UsageError(f"token range {text!r} cannot be read; expected LOW-HIGH such as 1-512, or one number")
        return TokenRange(int(match[1]), int(match[2] or match[1]))

    def __str__(self) -> str:
        return f"{self.low}-{self.high}" if self.high > self.low else str(self.low)

    @property
    def counts(self) -> tuple[int, ...]:
        """The ends, and the powers of two between them: each range of twice the tokens weighs the same."""
        inside = {2**i for i in range(self.high.bit_length()) if self.low < 2**i < self.high}
        return tuple(sorted({self.low, self.high} | inside))


def speed(
    cost: Cost, shape: tuple[int, int, int], pattern: Pattern, counts: tuple[int, ...], values: Values = "fp32"
) -> float:
    """How many times faster than dense a layer is predicted to be: the geometric mean over the token counts."""
    logs = [math.log(cost(shape, DENSE, n, values) / cost(shape, pattern, n, values)) for n in counts]
    return math.exp(sum(logs) / len(logs))


def break_even(
    cost: Cost, shape: tuple[int, int, int], pattern: Pattern, values: Values = "fp32", factor: float = 1.0
) -> int:
    """The largest power of two of tokens, up to MOST_TOKENS, at which a layer is not slower than dense; 0: none.

    `factor`: how many times faster it is in its model than `cost` says, because its kernel does more than the product.
    """
    counts = [2**i for i in range(MOST_TOKENS.bit_length())]
    return max((n for n in counts if factor * speed(cost, shape, pattern, (n,), values) >= 1), default=0)


def slow(speed: float, tokens: TokenRange, basis: Basis, where: str = "this machine") -> str:
    """Why a layer is not to run sparse, in words."""
    source = "measured kernels" if basis == "measured" else "a model, not measured"
    return f"predicted {speed:.2f}x at {tokens} tokens on {where} ({source})"
