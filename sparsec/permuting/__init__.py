"""Channel permutation: orders of rows and columns in which patterns keep more of the weights' scores.

objective    what a pattern keeps of a matrix, and what it would keep with rows or columns exchanged
search       freedoms (things that may change places, in several matrices at once) and the search over them
outputs      which rows share a strip of a V:N:M@strip pattern
places       the variables of `sparsec.axes` as freedoms
scoring      what weights are worth
proof        the float64 proof that a permuted program computes what it did
"""
