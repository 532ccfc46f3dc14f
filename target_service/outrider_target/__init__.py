"""The target service: runs the large model and verifies the proposals of many sessions in shared forward passes.

Knows: `outrider`. Does not know: the draft, the client, or which proposals are accepted.
Begin with `scheduler.py`; the servicer only reads and writes messages.
"""
