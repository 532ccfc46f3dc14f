"""The benchmark behind `outrider bench` and `outrider demo`: what is run, in which order, and what is made of it.

Knows: the blocking client and its figures. Does not know: click, or how a table is asked for.
Begin with `grid.py` and `samples.py`; `tables.py` and `charts.py` show the result.
"""
