"""Reference pages written from the code itself, so that they cannot be stale. Each function returns Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import typer.main

import sparsec
from sparsec import catalogue, registry
from sparsec.cli import app
from sparsec.pipeline import quote

WIDTH = 88  # of a line of code on a page


def commands() -> str:
    """Every command with its arguments, options and defaults."""
    text = ["# Commands", "", "As `sparsec COMMAND --help` prints them. `sparsec --version` tells the version,"]
    text += ["`sparsec --install-completion` lets your shell complete commands and options."]
    for name, command in typer.main.get_group(app).commands.items():
        arguments = [one for one in command.params if one.param_type_name == "argument"]
        usage = " ".join([name, *(one.name.upper() if one.required else f"[{one.name.upper()}]" for one in arguments)])
        text += ["", f"## sparsec {name}", "", _line(command.help), "", f"`sparsec {usage}`", ""]
        rows = []
        for one in command.params:
            names = [one.name.upper()] if one in arguments else [*one.opts, *one.secondary_opts]
            shown = "" if one.required or one.default in (None, False) else f"`{one.default}`"
            rows.append((f"`{', '.join(names)}`", shown, _line(one.help)))
        text += _table(("argument or option", "default", "what it is"), rows)
    return "\n".join(text) + "\n"


def passes() -> str:
    """Every pass of sparsec with its rules and options."""
    text = ["# Passes", "", "What `--passes`, recipes and `sparsec opt` take, as in `mask{pattern=64:2:5} | freeze`."]
    text += ["`sparsec passes` lists them too, with those of other distributions."]
    for entry in _ours(registry.passes()):
        cls = registry.pass_class(entry)
        text += ["", f"## {entry}", "", _prose(cls.__doc__), ""]
        text += [f"Needs: {_facts(cls.requires)}. Leaves: {_facts(cls.establishes)}. Outputs: {cls.equivalence}.", ""]
        options = [f"`{one.name}={_quoted(one)}`" for one in dataclasses.fields(cls)]
        text += [f"Options: {', '.join(options)}." if options else "No options."]
    return "\n".join(text) + "\n"


def patterns() -> str:
    """Examples of every family of patterns, in words and bytes, and the rules."""
    from sparsec import pattern

    rows = [(f"`{one['text']}`", one["words"], one["bytes"]) for one in catalogue.patterns()]
    text = ["# Patterns", "", "`sparsec patterns` lists these. *Bytes*: of a weight of 3072 x 768, stored packed, as a"]
    text += ["share of dense fp32. What they look like: [concepts](../concepts.md).", ""]
    text += _table(("pattern", "in words", "bytes"), rows)
    _, meaning, families, tails, *_ = inspect.cleandoc(pattern.__doc__ or "").split("\n\n")
    text += ["", "## Rules", "", meaning, "", "```text", inspect.cleandoc(families), "```", "", _prose(tails)]
    return "\n".join(text) + "\n"


def backends() -> str:
    """Every backend of sparsec. Whether it is available is another machine's matter."""
    rows = [(f"`{name}`", registry.backend_class(name).describes) for name in _ours(registry.backends())]
    text = ["# Backends", "", "`sparsec backends` says which are available on your machine, and what to install."]
    return "\n".join([*text, "", *_table(("backend", "what it writes"), rows)]) + "\n"


def python() -> str:
    """The stable names of the package."""
    text = [
        "# Python",
        "",
        "These names are stable: one is removed or changed only with a new major version. All else may move.",
    ]
    for name in sparsec.__all__:
        found = getattr(sparsec, name)
        if name.startswith("__"):
            continue
        text += ["", f"## sparsec.{name}", ""]
        if not (inspect.isclass(found) and issubclass(found, Exception)):
            text += ["```python", _signature(name, found), "```", ""]
        text += [_prose(found.__doc__)]
        if inspect.isclass(found):
            fields = getattr(found, "__dataclass_fields__", {})
            public = [one for one in vars(found) if not one.startswith("_") and one not in fields]
            methods = [(one, getattr(found, one).__doc__) for one in public if callable(getattr(found, one))]
            text += ["", *_table(("method", "does"), [(f"`{one}`", _first(says)) for one, says in methods if says])]
    return "\n".join(text) + "\n"


PAGES = {
    "reference/commands.md": commands,
    "reference/passes.md": passes,
    "reference/patterns.md": patterns,
    "reference/backends.md": backends,
    "reference/python.md": python,
}


def _ours(table: dict[str, registry.Entry]) -> list[str]:
    return [name for name, entry in table.items() if entry.distribution == registry.OURS]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; nothing where there are no rows. Bars would end a cell, inside code too."""
    lines = [head, ("---",) * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines] if rows else []


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _first(text: str | None) -> str:
    return _line(inspect.cleandoc(text or "").partition("\n\n")[0])


def _prose(text: str | None) -> str:
    """A docstring as Markdown: stars and angles outside of code mean themselves; lists need an empty line."""
    parts = inspect.cleandoc(text or "").split("`")
    parts[::2] = [part.replace("*", "&#42;").replace("<", "&lt;") for part in parts[::2]]
    return re.sub(r"(?m)^(?=1\. )", "\n", "`".join(parts))


def _signature(name: str, found: Any) -> str:
    """`name(...)` as one writes it: a parameter a line where it is long, functions among the defaults by name."""
    signature = inspect.signature(found)
    if len(text := f"{name}{signature}") > WIDTH:
        parameters = "".join(f"    {one},\n" for one in signature.parameters.values())
        returns = "" if inspect.isclass(found) else f" -> {signature.return_annotation}"
        text = f"{name}(\n{parameters}){returns}"
    return re.sub(r"<function (\w+) at \w+>", r"\1", text.replace("'", ""))


def _facts(names: frozenset[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _quoted(field: dataclasses.Field[Any]) -> str:
    """The default as pass text has it."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return quote(made)
