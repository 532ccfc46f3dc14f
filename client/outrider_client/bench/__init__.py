"""The benchmark behind `outrider bench` and `outrider demo`: what runs, in which order, and how samples become figures.

Knows: the clients and their statistics. Does not know: click, or the command line.
Begin with `grid.py` and `samples.py`; `tables.py` and `charts.py` show the result.
"""
