"""The commands of `outrider`. Results go to standard output, progress and errors to standard error.

Knows: click, rich and the client. Does not know: gRPC, or how a text is generated.
Begin with `generate.py`; `options.py` has what several commands share.
"""
