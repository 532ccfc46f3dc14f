"""Proposals without a model: what followed the last time that the text read as it ends now.

Knows: token ids, and what rounds took. Does not know: rules, messages, conversations.
Begin with `lookup.py`; `index.py` finds matches, `experience.py` says what one is worth.
"""
