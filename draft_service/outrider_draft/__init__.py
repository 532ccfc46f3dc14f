"""The draft service: runs the small model and proposes tokens, ahead of what is being verified.

Knows: `outrider`. Does not know: the target, the client, or how proposals are judged.
Begin with `drafter.py`; the servicer only reads and writes messages.
"""
