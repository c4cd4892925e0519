"""What other tools made, read as sparsec's own: their recipes, their compressed checkpoints, their masked weights.

No package of theirs is needed, and no code of their files is run.
"""
