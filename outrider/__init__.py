"""What the draft service, the target service and the client share; imports none of the three.

Only `outrider.engine` and `outrider.probs` import torch.
"""

from importlib.metadata import version

__version__ = version("outrider")
