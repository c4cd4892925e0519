"""Artifacts to report on, and what a page holds when a parser, not a browser, reads it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from models import made, random
from torch import nn

import sparsec
from sparsec import store
from sparsec.api import Options

VOID = {"meta", "link", "img", "input", "br", "hr", "path", "use", "rect"}


def compiled(out: Path, pattern: str = "16:2:5", **options: Any) -> Path:
    """A net of two sparse sites and a head that stays dense, in `out`."""
    net = made(lambda: nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 3)))
    quick = Options(measure_speed=False)
    return sparsec.compile(net, [random(6, 20)], pattern=pattern, out=out, options=quick, **options).root


def changed(folder: Path, out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an artifact whose manifest was changed by somebody who can also write its hash."""
    shutil.copytree(folder, out)
    manifest = json.loads((out / store.MANIFEST).read_text())
    change(manifest)
    text = json.dumps(manifest)
    (out / store.MANIFEST).write_text(text)
    (out / store.MANIFEST_HASH).write_text(hashlib.sha256(text.encode()).hexdigest())
    return out


class Page(HTMLParser):
    """All elements of a page as (tag, attributes, text inside), and its text without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.elements[self._open[-1]][0] == tag, f"</{tag}> closes {self.elements[self._open[-1]][0]}"
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for place in self._open:
            self.elements[place][2].append(data)

    def all(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        """The elements of a tag with these attributes: their attributes and text."""
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [
            (attrs, " ".join("".join(texts).split()))
            for name, attrs, texts in self.elements
            if name == tag and all(attrs.get(key) == value for key, value in wanted.items())
        ]

    def text(self, tag: str = "main", **attributes: str) -> str:
        """The text of the only element of this kind."""
        (found,) = self.all(tag, **attributes)
        return found[1]
