"""One generation with both services: what is said to each, in which order, and what happens when one fails.

Knows: rules, text, and the messages of `outrider.v1`. Does not know: sockets, threads, or where time comes from.
Begin with `conversation.py`; `committed.py` holds what all others read.
"""
