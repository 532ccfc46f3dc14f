"""Start two models as a pair on this machine, and measure whether the draft pays.

python examples/own_pair.py TARGET_MODEL DRAFT_MODEL

A model is a hub id, a directory or a .gguf file; without any, it is the embedded pair.
"""

import statistics
import sys

from outrider import SamplingParams, SpeculativeClient, local_pair

PROMPTS = ("Once upon a time", "The old man opened the door and", "One day, a little bird")
target_model, draft_model = sys.argv[1:] or ("builtin:target", "builtin:draft")

with local_pair(target_model, draft_model) as pair, SpeculativeClient(pair.target, pair.draft) as client:
    mismatch = client.info().mismatch
    if mismatch:
        sys.exit(mismatch)
    sampling = SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True)
    speeds: dict[str, list[float]] = {"autoregressive": [], "speculative": []}
    for prompt in PROMPTS * 3:
        for method, measured in speeds.items():  # in turns: a machine's speed changes from minute to minute
            measured.append(client.generate(prompt, sampling, method=method).stats.tokens_per_s)

alone, together = (statistics.median(speeds[method]) for method in ("autoregressive", "speculative"))
print(f"target only {alone:.0f} tokens/s, the pair {together:.0f}: {together / alone:.2f} times as fast")
