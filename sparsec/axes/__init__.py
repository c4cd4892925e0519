"""Channel axes: which channels of a graph may be permuted together, and how to fold a permutation into its weights.

`analyse(program)` finds the permutation variables; `apply(program, variable, permutation)` folds one in. An operator
without a rule fixes everything it touches: nothing is assumed, and every variable can be proven by running both graphs.

    sizes, atoms      what an axis is made of: products and sums of atoms, in classes that move together
    calls, rules      one small rule for each operator, by name; views, products and stacks hold families of them
    structure         an axis as the tree of atoms that a permutation moves
    analysis, moves   variables, and the gathers on parameters that carry them out
"""

from __future__ import annotations

from sparsec.axes.analysis import Axes, Move, Variable, analyse
from sparsec.axes.moves import apply

__all__ = ["Axes", "Move", "Variable", "analyse", "apply"]
