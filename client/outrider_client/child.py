"""`python -m outrider_client.child MODULE ARGUMENTS`: a program that ends with whoever started it.

It is sent SIGTERM when its standard input ends, as it does however the other process ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _end_with_the_input() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
