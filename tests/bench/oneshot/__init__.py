"""What tests/bench/peers.py is made of: flows of each tool, one process a run, and the evaluation common to all."""
