"""Give the text before an edit as a prediction: what stays the same is then verified many tokens at a time.

No draft model takes part. The text is the target's own whether the prediction is right or wrong.
"""

import os

from outrider import SamplingParams, SpeculativeClient

target = os.environ.get("OUTRIDER_TARGET", "localhost")
prompt = "One day, a dog named Max found a red ball in the garden."

with SpeculativeClient(target) as client:
    sampling = SamplingParams(temperature=0, max_new_tokens=80)
    first = client.generate(prompt, sampling, method="autoregressive")
    again = client.generate(prompt, sampling, prediction=first.text)

assert again.token_ids == first.token_ids
print(f"{prompt}{again.text}\n")
for name, result in (("without", first), ("with", again)):
    tokens = result.stats.mean_acceptance_length
    print(f"{name:7} a prediction: {result.stats.tokens_per_s:5.0f} tokens/s, {tokens:.1f} tokens per target pass")
