"""Tokens to text and back: tokenizers, chat templates, and where a text ends.

Knows: the tokenizer that the target sends. Does not know: services, rounds, or drafts.
Begin with `text.py`.
"""
