"""How the proposals of a round are judged.

Knows: distributions on supports, and addressed random numbers. Does not know: conversations.
Begin with `rules.py`; `acceptance.py` has the mathematics.
"""
