"""Studies: what training under a pattern brings on real data. `python -m examples.studies NAME` runs one.

A study is a file here: its arms as data, and how a seed's dense model, its data and its judge are made. `study.py` runs
whatever has no result yet and reports. Data are read from the folder that SPARSEC_DATA or --data names.
"""
