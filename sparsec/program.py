"""Program: the one object between a model and its artifact. Passes change it, backends read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import _fx, graph, modes, store
from sparsec.errors import ArtifactError, GraphError, UsageError
from sparsec.pattern import Pattern, Strip
from sparsec.selection import Selection
from sparsec.selection_checks import check_rows, check_selection
from sparsec.sites import Exclusion, Site, SiteTable
from sparsec.view import WeightView

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import GraphModule

FACTS = frozenset({"traced", "selected", "masked", "permuted", "trained", "frozen", "lowered"})
FORMAT = "sparsec-program"
_SELECTIONS, _EXAMPLE = "selections.safetensors", "example.safetensors"
_SHARED = "shared_rows"  # table of `Site.rows`


@dataclass(frozen=True)
class Program:
    """A traced model: its graph, its sites, what has been done to it. `module` is edited only on a clone."""

    module: GraphModule
    sites: SiteTable
    inputs: dict[str, Tensor]
    """Example inputs by name; every dynamic size is at least 2 in them."""
    dims: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    """Dynamic sizes by name: smallest and largest legal value (None: no limit)."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Where the model came from: name, class, config; plain data."""
    facts: frozenset[str] = frozenset({"traced"})
    history: tuple[dict[str, Any], ...] = ()

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the graph; inputs by position or by name. Returns the outputs by name."""
        outputs: dict[str, Tensor] = self.module(*bind(list(self.inputs), args, kwargs))
        return outputs

    def replace(self, **changes: Any) -> Program:
        """A program with some fields changed, sharing all others."""
        return dataclasses.replace(self, **changes)

    def with_sites(self, changed: Iterable[Site]) -> Program:
        """A program in which the sites of the same names are replaced."""
        return self.replace(sites=self.sites.replace(changed))

    def clone(self) -> Program:
        """Copy the graph, share the tensors: editing the copy, or writing its sites, leaves this program as it is."""
        from sparsec import late  # it is built on torch

        return self.replace(module=late.copy_of(self.module))

    def set_mode(self, mode: modes.Mode) -> None:
        """Switch the graph to `train` or `eval`, in place."""
        modes.set_mode(self.module, mode)

    def verify(self) -> None:
        """Raise GraphError unless graph, sites and facts fit together."""
        _fx.check(self.module)
        if unknown := self.facts - FACTS:
            raise GraphError(f"unknown facts: {', '.join(sorted(unknown))}")
        nodes = {node.name: node for node in self.module.graph.nodes}
        for site in self.sites:
            for user in site.users:
                if user not in nodes:
                    raise GraphError(f"{site.name}: its user {user} is not in the graph")
            if site.mask and not _fx.has_tensor(self.module, site.mask):
                raise GraphError(f"{site.name}: its mask {site.mask} is not in the graph")
            if "lowered" not in self.facts:
                self._verify_weight(site)

    def _verify_weight(self, site: Site) -> None:
        if not _fx.has_tensor(self.module, site.name):
            raise GraphError(f"{site.name}: the weight is not in the graph")
        found = tuple(_fx.get_tensor(self.module, site.name).shape)
        if found != site.view.parameter:
            raise GraphError(f"{site.name}: expected a weight of shape {site.view.parameter}, found {found}")

    def dump(self, hashes: bool = False) -> str:
        """The program as text: sizes, sites, then the graph, one line each. For people; it is never parsed.

        `hashes` adds the first 8 hex digits of each tensor's SHA-256, so that two dumps show which weights changed.
        """
        lines = [f"program {self.origin.get('class', 'model')}  facts: {', '.join(sorted(self.facts))}"]
        lines += [f"  size {name}: {low}..{high or ''}" for name, (low, high) in self.dims.items()]
        lines += [_site_line(site) for site in self.sites]
        return "\n".join(lines) + "\n" + graph.dump(self.module, hashes) + "\n"

    def write_back(self, model: nn.Module) -> None:
        """Copy the program's parameters and buffers into the model it was traced from (same names and shapes).

        Buffers count: a permuted batch norm has permuted statistics.
        """
        import torch

        if self.facts & {"masked", "lowered"}:
            raise UsageError(
                "write_back: the program must be frozen, not masked or lowered; run the freeze pass, not lower"
            )
        targets = dict(model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if name not in targets or targets[name].shape != parameter.shape:
                    raise UsageError(f"write_back: the model has no parameter {name} of shape {tuple(parameter.shape)}")
                targets[name].copy_(parameter)
            buffers = dict(model.named_buffers())
            for name, buffer in self.module.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffers[name].copy_(buffer)

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write the program to a folder: graph.json, weights.safetensors, its sites and history in manifest.json."""
        out = Path(path)
        with store.writing(out, force) as folder:
            write_graph(folder, self.module)
            selections = {
                f"{site.name}:{table}": tensor
                for site in self.sites
                if site.selection
                for table, tensor in site.selection.tensors().items()
            }
            selections |= {f"{site.name}:{_SHARED}": site.rows for site in self.sites if site.rows is not None}
            store.save_tensors(folder / _SELECTIONS, selections)
            store.save_tensors(folder / _EXAMPLE, self.inputs)
            state = {
                "inputs": list(self.inputs),
                "dims": self.dims,
                "origin": self.origin,
                "facts": sorted(self.facts),
                "history": self.history,
                "sites": [_site_to_json(site) for site in self.sites],
                "exclusions": [dataclasses.asdict(exclusion) for exclusion in self.sites.exclusions],
            }
            store.seal(folder, FORMAT, {"program": state})
        return out

    @staticmethod
    def load(path: str | Path) -> Program:
        """Read a program that `save` wrote. Raises ArtifactError or GraphError when it is damaged."""
        folder = Path(path)
        manifest = store.read(folder, FORMAT)
        selections, example = store.load_tensors(folder / _SELECTIONS), store.load_tensors(folder / _EXAMPLE)
        try:
            state = manifest["program"]
            if missing := [name for name in state["inputs"] if name not in example]:
                raise ArtifactError(f"{folder}: {_EXAMPLE} has no tensor {missing[0]!r}; save the program again")
            program = Program(
                module=read_graph(folder),
                sites=SiteTable(
                    tuple(_site_from_json(entry, selections) for entry in state["sites"]),
                    tuple(Exclusion(**entry) for entry in state["exclusions"]),
                ),
                inputs={name: example[name] for name in state["inputs"]},
                dims={name: (low, high) for name, (low, high) in state["dims"].items()},
                origin=state["origin"],
                facts=frozenset(state["facts"]),
                history=tuple(state["history"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{folder}: the program cannot be read: {type(error).__name__}: {error}") from error
        program.verify()
        return program


def bind(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Order inputs given by position or by name; raises UsageError naming what is missing or unknown."""
    given = dict(zip(names, args, strict=False)) | kwargs
    unknown, missing = [n for n in kwargs if n not in names], [n for n in names if n not in given]
    if len(args) > len(names) or unknown or missing or set(names[: len(args)]) & set(kwargs):
        raise UsageError(
            f"expected the inputs {', '.join(names)}, found {len(args)} by position and {sorted(kwargs)} by name"
        )
    return [given[name] for name in names]


def check_sizes(kinds: Mapping[str, str], values: Sequence[Any]) -> None:
    """Raise UsageError where an input does not have the sizes of its type, such as `int64[batch, 40]`, in order."""
    for (name, kind), value in zip(kinds.items(), values, strict=True):
        sizes = [size for size in kind[kind.index("[") + 1 : -1].split(", ") if size]
        found = list(getattr(value, "shape", sizes))
        if len(found) != len(sizes) or any(
            size.isdigit() and int(size) != own for size, own in zip(sizes, found, strict=True)
        ):
            raise UsageError(
                f"input {name}: expected {kind}, found the sizes {found}. Sizes that are numbers there were fixed when "
                f"the model was traced: compile it again and name those that vary, such as "
                f"dynamic={{'{name}': {{0: 'batch'}}}}"
            )


def write_graph(folder: Path, module: GraphModule) -> None:
    """Write graph.json and weights.safetensors of a module."""
    data = graph.to_json(module)
    (folder / store.GRAPH).write_text(json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n")
    store.save_tensors(folder / store.WEIGHTS, {name: _fx.get_tensor(module, name) for name in data["tensors"]})


def read_graph(folder: Path) -> GraphModule:
    """The module that `write_graph` wrote; its files must have been checked by `store.read`."""
    return graph.from_json(store.load_json(folder / store.GRAPH), store.load_tensors(folder / store.WEIGHTS))


def _site_line(site: Site) -> str:
    what = f"pattern={site.pattern}" if site.pattern else f"dense ({site.excluded})" if site.excluded else "dense"
    shape = ", ".join(map(str, site.shape if site.shape[0] > 1 else site.shape[1:]))
    mask = f" mask=@{site.mask}" if site.mask else ""
    aliases = f" aliases={','.join(site.aliases)}" if site.aliases else ""
    return f"  site {site.name} [{shape}] {site.role} users={','.join(site.users)} {what}{mask}{aliases}"


def _site_to_json(site: Site) -> dict[str, Any]:
    kept = ("selection", "pattern", "view", "rows")
    entry = {f.name: getattr(site, f.name) for f in dataclasses.fields(site) if f.name not in kept}
    entry["view"] = dataclasses.asdict(site.view)
    return {**entry, "pattern": str(site.pattern) if site.pattern else None, "selected": site.selection is not None}


def _site_from_json(entry: dict[str, Any], selections: dict[str, Tensor]) -> Site:
    fields = dict(entry)
    pattern, selected = fields.pop("pattern"), fields.pop("selected")
    name = fields["name"]
    if selected and f"{name}:positions" not in selections:
        raise ArtifactError(f"{_SELECTIONS} has no table of {name}; the folder is incomplete: save the program again")
    selection = Selection.of(selections, f"{name}:") if selected else None
    for key in ("users", "aliases"):
        fields[key] = tuple(fields[key])
    axes, parameter = tuple(fields["view"].pop("axes")), tuple(fields["view"].pop("parameter"))
    fields["view"] = view = WeightView(axes, parameter, **fields["view"])
    parsed = Pattern.parse(pattern) if pattern else None
    if parsed and selection:
        check_selection(parsed, selection, view.shape, name)
    rows = selections.get(f"{name}:{_SHARED}")
    if rows is not None:
        if not isinstance(parsed, Strip) or rows.shape != view.shape[:2] or rows.dtype.itemsize != 4:
            raise ArtifactError(f"{name}: rows that share strips, found for {pattern} of shape {view.shape}")
        check_rows(rows, parsed.v, name)
    return Site(**fields, pattern=parsed, selection=selection, rows=rows)
