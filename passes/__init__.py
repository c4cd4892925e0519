"""The passes, one file each. To add one: its file here, its line in TABLE, its test in tests/passes."""

if __name__ != "sparsec.passes":
    raise ImportError("passes/ is imported as sparsec.passes; install the project (make dev) and import that")

TABLE = {
    "choose-vm": "sparsec.passes.choose_vm:ChooseVM",
    "mask": "sparsec.passes.mask:Mask",
    "oneshot": "sparsec.passes.oneshot:Oneshot",
    "fixed-mask": "sparsec.passes.fixed_mask:FixedMask",
    "admm": "sparsec.passes.admm:Admm",
    "sr-ste": "sparsec.passes.sr_ste:SrSte",
    "gradual": "sparsec.passes.gradual:Gradual",
    "freeze": "sparsec.passes.freeze:Freeze",
    "lower": "sparsec.passes.lower:Lower",
}
