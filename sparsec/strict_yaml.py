"""How recipe files are read: YAML's safe loader, stricter, so that a recipe is plain data and means one thing."""

from __future__ import annotations

import re
from typing import Any

from sparsec.errors import RecipeError


def strict_loader() -> Any:
    """YAML's safe loader, stricter: no tag means anything, a key stands once, and 2:4 stays text (YAML 1.1 would read
    it as a number in base 60)."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [(key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key.value, str)]
            for i, (key, line) in enumerate(keys):
                if key in dict(keys[:i]):
                    raise RecipeError(f"line {line}: the key {key!r} stands twice; the first one would be lost")
            return super().construct_mapping(node, deep)

    def refuse(loader: yaml.SafeLoader, node: yaml.Node) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise RecipeError(
            f"line {node.start_mark.line + 1}: found the YAML tag {tag}; a recipe is plain data (text, numbers, lists, "
            "mappings) and makes no objects; nothing was run. Write the value itself, without a tag"
        )

    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    resolvers = yaml.SafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in numbers]
        for first, entries in resolvers.items()
    }
    Loader.add_constructor(None, refuse)  # None: every tag that the safe loader does not know
    Loader.add_implicit_resolver(numbers[0], re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    return Loader
