"""The passes, one file each. To add one: its file here, its line in TABLE, its test in tests/passes."""

if __name__ != "sparsec.passes":
    raise ImportError("passes/ is imported as sparsec.passes; install the project (make dev) and import that")

TABLE = {
    "mask": "sparsec.passes.mask:Mask",
    "freeze": "sparsec.passes.freeze:Freeze",
    "lower": "sparsec.passes.lower:Lower",
}
