"""Sizes of axes as products: a number times the names of dynamic sizes, read from the text of a node's type."""

from __future__ import annotations

import ast
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Size:
    """A size: a number times symbols, such as 12 * batch. A sum of symbols counts as one symbol."""

    count: int
    symbols: tuple[str, ...] = ()

    def __mul__(self, other: Size) -> Size:
        return Size(self.count * other.count, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Size) -> Size | None:
        """The exact quotient, or None.

        >>> Size.parse("12*batch").over(Size(4))
        Size(count=3, symbols=('batch',))
        """
        mine, theirs = Counter(self.symbols), Counter(other.symbols)
        if not other.count or self.count % other.count or theirs - mine:
            return None
        return Size(self.count // other.count, tuple(sorted((mine - theirs).elements())))

    @property
    def static(self) -> bool:
        """Whether the size is a plain number."""
        return not self.symbols

    @staticmethod
    @cache
    def parse(text: str) -> Size:
        """Read a size as types spell it.

        >>> Size.parse("768*length + 768")
        Size(count=768, symbols=('length + 1',))
        """
        terms = {names: count for names, count in _terms(ast.parse(text, mode="eval").body).items() if count}
        if len(terms) < 2:
            return Size(*next(((count, names) for names, count in terms.items()), (0, ())))
        common = Counter(next(iter(terms)))
        for names in terms:
            common &= Counter(names)
        divisor = math.gcd(*terms.values())
        rest = {tuple(sorted((Counter(names) - common).elements())): n // divisor for names, n in terms.items()}
        spelt = ["*".join([str(n)] * (n != 1 or not names) + list(names)) for names, n in sorted(rest.items())[::-1]]
        return Size(divisor, tuple(sorted([*common.elements(), " + ".join(spelt)])))


ONE = Size(1)
_Terms = dict[tuple[str, ...], int]


def _terms(tree: ast.expr) -> _Terms:
    """A size as a sum: symbols of a term -> its number. What is neither sum nor product becomes a symbol."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return {(): tree.value}
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        return {names: -count for names, count in _terms(tree.operand).items()}
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, (ast.Add, ast.Sub)):
        sign = 1 if isinstance(tree.op, ast.Add) else -1
        left, right = _terms(tree.left), _terms(tree.right)
        return {names: left.get(names, 0) + sign * right.get(names, 0) for names in left | right}
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Mult):
        return _product(_terms(tree.left), _terms(tree.right))
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Pow) and isinstance(tree.right, ast.Constant):
        exponent = tree.right.value
        if isinstance(exponent, int) and 0 < exponent < 5:
            power = base = _terms(tree.left)
            for _ in range(exponent - 1):
                power = _product(power, base)
            return power
    return {(ast.unparse(tree),): 1}


def _product(left: _Terms, right: _Terms) -> _Terms:
    result: _Terms = {}
    for names, count in left.items():
        for others, factor in right.items():
            key = tuple(sorted(names + others))
            result[key] = result.get(key, 0) + count * factor
    return result
