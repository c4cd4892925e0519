"""One page about an artifact, for people: a single HTML file that needs no network.

`page.py` makes it from what `facts.py` says (the manifest), what `stored.py` reads (the tables), and `charts.py` draws.
"""
