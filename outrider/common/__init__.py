"""Small tools that every other part may use: averages, callers, mailboxes, compiled code on disk.

Knows: the standard library, numpy and numba. Does not know: models, messages, services or anything else of the project.
Begin with `mailbox.py`, and with `compiling.py` for the compiled code.
"""
