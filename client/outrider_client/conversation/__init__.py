"""One generation with both services: which messages each is sent, in which order, and what happens on failures.

Knows: rules, text, and the messages of `outrider.v1`. Does not know: sockets, threads, or where time comes from.
Begin with `conversation.py`; all others read `committed.py`.
"""
