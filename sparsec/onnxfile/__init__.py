"""Files of .onnx models that anybody wrote: their weights found, looked at, and pruned where they lie.

`opened.py` reads a file and maps its external data, `scopes.py` says who reads which value, `weights.py` finds what
Gemm, MatMul and Conv multiply, `routes.py` how it gets there, `packed.py` sparsec's own packed weights, `roles.py`
which layers stay dense by default. `writing.py` writes the pruned file, `running.py` makes inputs for it, `checks.py`
proves it from disk. The job is `sparsec/onnxcompile.py`.
"""
