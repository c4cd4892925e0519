"""One-shot pruning: choose weights, and change those that stay, from a few calibration samples and no training.

`engine` walks once through a program's graph with all samples side by side (`stream`). Where weights are about to be
used, it takes the moments of their inputs (`operands`, `moments`), lets a solver (`solvers`: `sweep`, `alps`, `refit`)
or a score (`scores`) choose, puts the new weight in place, and walks on with what the pruned layers give.
"""
