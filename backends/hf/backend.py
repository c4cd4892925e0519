"""The hf backend: writes a folder that plain transformers loads, exact zeros in place, and proves it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict
from sparsec.errors import RecipeError

if TYPE_CHECKING:
    from sparsec.backends.hf.model import HfModule
    from sparsec.cost import TokenRange
    from sparsec.layout import Values
    from sparsec.program import Program

FOLDER = "hf"
_DENSE = "transformers multiplies the zeros too; the weights hold exact zeros in place"


@dataclass(frozen=True)
class HfBackend(Backend):
    """A Hugging Face folder, `hf/`: sharded safetensors, the origin's configuration and tokenizer, its dtype.

    1. One shard is in memory at a time, at most `shard_megabytes` or one tensor.
    2. Parameters that the graph does not read come from the origin's folder, so that nothing is lost.
    3. `config.json` is the origin's, with `sparsec_config` added; never a `quantization_config`, which loaders act on.
    4. `README.md`, a model card for hubs, says what was done and what it cost; the origin's license is in it.
    """

    name: ClassVar[str] = "hf"
    describes: ClassVar[str] = "a Hugging Face folder for transformers: exact zeros in dense weights, any dtype"

    shard_megabytes: int = 1000

    def __post_init__(self) -> None:
        if self.shard_megabytes < 1:
            raise RecipeError(f"backend hf: shard_megabytes is {self.shard_megabytes}; expected 1 or more")

    def unavailable(self) -> str | None:
        """None, or that transformers is missing."""
        found = importlib.util.find_spec("transformers")
        return None if found else "transformers is missing; pip install transformers"

    def refuses(self, program: Program) -> str | None:
        """Only a model that came from a Hugging Face folder has a configuration and names that transformers knows."""
        folder = program.origin.get("folder")
        if not folder:
            found = program.origin.get("model", "this model")
            return f"{found} is no Hugging Face model; name one as MODEL, or leave hf out of --backend"
        if not (Path(folder) / "config.json").is_file():
            return f"the folder it came from, {folder}, is gone; put it back, or leave hf out of --backend"
        if "quantization_config" in program.origin.get("config", {}):
            return "its config.json has a quantization_config; start from the model that was not quantized"
        return None

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """Every site runs dense."""
        return tuple(Verdict(site.name, False, "dense", _DENSE) for site in program.sites.sparse)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write `hf/` of a frozen program."""
        from sparsec.backends.hf.writing import write

        return write(program, folder / FOLDER, self.shard_megabytes * 10**6)

    def finish(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Write the model card (rule 4)."""
        from sparsec.backends.hf.card import card

        (folder / FOLDER / "README.md").write_text(card(manifest))

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Re-read the shards: patterns and weights bit for bit, and what transformers makes of them."""
        from sparsec.backends.hf.checks import verify

        return verify(folder / FOLDER, manifest, check)

    def load(self, folder: Path, manifest: dict[str, Any]) -> HfModule:
        """The model as transformers loads it, called like every artifact."""
        from sparsec.backends.hf.model import HfModule, pretrained

        facts = manifest["backends"][self.name]
        return HfModule(pretrained(folder / FOLDER, facts["class"], facts["dtype"])[0], manifest)
