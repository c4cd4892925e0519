"""Solved sites on disk, one safetensors file each, so that long work can be interrupted and gone on with.

A file is complete or not there (written beside its place and renamed). The owner of the folder sees to it that it holds
work of the same recipe, data and versions; a file that does not fit its site is refused by name.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import ArtifactError
from sparsec.selection import Selection
from sparsec.selection_checks import check_selection

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.sites import Site


@dataclass(frozen=True)
class Entry:
    """What a site has become: weight (batch, rows, cols) with zeros in place, selection, new bias or None."""

    weight: Tensor
    selection: Selection
    bias: Tensor | None
    retained: float
    error: float | None
    note: str = ""


class Journal:
    """Entries by site name in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, site: Site, entry: Entry) -> None:
        """Store an entry; it is complete when this returns."""
        from safetensors.torch import save_file

        tensors = {"weight": entry.weight.contiguous(), **entry.selection.tensors()}
        if entry.bias is not None:
            tensors["bias"] = entry.bias
        words = {"site": site.name, "retained": entry.retained, "error": entry.error, "note": entry.note}
        path = self._path(site)
        part = path.with_suffix(f".{os.getpid()}.part")  # processes of torch.distributed write the same files
        save_file({name: value.contiguous() for name, value in tensors.items()}, part, {"entry": json.dumps(words)})
        os.replace(part, path)

    def keep(self, site: Site, entry: Entry) -> Entry:
        """Write an entry and give it as it lies in the file: mapped, its tensors take no memory of their own."""
        self.write(site, entry)
        kept = self.read(site)
        assert kept is not None
        return kept

    def read(self, site: Site) -> Entry | None:
        """The entry of a site, or None. Raises ArtifactError where the file is damaged or of another site."""
        from safetensors import SafetensorError, safe_open

        path = self._path(site)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                words: dict[str, Any] = json.loads(file.metadata()["entry"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            selection = Selection.of(tensors)
            name, rest = words["site"], (words["retained"], words["error"], words["note"])
            found = Entry(tensors["weight"], selection, tensors.get("bias"), *rest)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read ({error}); delete it and resume again") from error
        if name != site.name or tuple(found.weight.shape) != site.shape:
            raise ArtifactError(f"{path} is not of {site.name} {site.shape}; start without --resume")
        if site.pattern is not None:
            check_selection(site.pattern, selection, site.shape, str(path))
        return found

    def _path(self, site: Site) -> Path:
        return self.folder / f"{site.name}.safetensors"
