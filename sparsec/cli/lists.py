"""Commands that list what can be chosen: passes, patterns, backends."""

from __future__ import annotations

from sparsec.cli.terminal import Json, print_json, reporting, starting


def passes(as_json: Json = False) -> None:
    """List the passes with their options."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import catalogue, show

            found = catalogue.passes()
        if as_json:
            return print_json({"passes": found})
        rows = [(p["name"], p["summary"] or p["status"], p["options"], p["from"]) for p in found]
        show.catalogue(rows, "pass", "what it does", "options = defaults", "from")


def patterns(as_json: Json = False) -> None:
    """List the patterns with what they keep."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import catalogue, show

            found = catalogue.patterns()
        if as_json:
            return print_json({"patterns": found})
        rows = [(p["text"], p["words"], p["bytes"]) for p in found]
        show.catalogue(rows, "pattern", "in words", "bytes of dense fp32")


def backends(as_json: Json = False) -> None:
    """List the backends, and why one is not available here."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import catalogue, show

            found = catalogue.backends()
        if as_json:
            return print_json({"backends": found})
        rows = [(b["name"], b["describes"], b["status"], b["from"]) for b in found]
        show.catalogue(rows, "backend", "what it writes", "here", "from")
