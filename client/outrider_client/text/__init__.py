"""Tokens to text and back: tokenizers, chat templates, and where a text ends.

Knows: what the target sends of its tokenizer. Does not know: services, rounds, or drafts.
Begin with `text.py`.
"""
