"""The passes, one file each. To add one: its file here, its line in TABLE, its test in tests/passes."""

if __name__ != "sparsec.passes":
    raise ImportError("passes/ is imported as sparsec.passes; install the project (make dev) and import that")

TABLE = {
    "choose-vm": "sparsec.passes.choose_vm:ChooseVM",
    "permute": "sparsec.passes.permute:Permute",
    "mask": "sparsec.passes.mask:Mask",
    "oneshot": "sparsec.passes.oneshot:Oneshot",
    "fixed-mask": "sparsec.passes.fixed_mask:FixedMask",
    "admm": "sparsec.passes.admm:Admm",
    "sr-ste": "sparsec.passes.sr_ste:SrSte",
    "gradual": "sparsec.passes.gradual:Gradual",
    "imp": "sparsec.passes.imp:Imp",
    "seven-pre": "sparsec.passes.seven_pre:SevenPre",
    "seven-dyn": "sparsec.passes.seven_dyn:SevenDyn",
    "platon": "sparsec.passes.platon:Platon",
    "movement": "sparsec.passes.movement:Movement",
    "s-ste": "sparsec.passes.s_ste:SSte",
    "gumbel-mask": "sparsec.passes.gumbel_mask:GumbelMask",
    "mask-training": "sparsec.passes.mask_training:MaskTraining",
    "dcil": "sparsec.passes.dcil:Dcil",
    "three-stage-lora": "sparsec.passes.three_stage_lora:ThreeStageLora",
    "adopt": "sparsec.passes.adopt:Adopt",
    "merge-adapter": "sparsec.passes.merge_adapter:MergeAdapter",
    "freeze": "sparsec.passes.freeze:Freeze",
    "lower": "sparsec.passes.lower:Lower",
}
