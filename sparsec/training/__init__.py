"""Training under a pattern, on the program's own graph.

`engine` knows no training loop: `loop` drives it plainly, `trainer_callback` from the transformers Trainer. A method is
a criterion, a schedule and an update (`parts`), put together in one file of `passes/`; `losses` are what is minimised.
"""
