"""Write a text as it comes; what the draft proposed is green, what the target chose itself is yellow."""

import os

from outrider import SamplingParams, SpeculativeClient

GREEN, YELLOW, PLAIN = "\033[32m", "\033[33m", "\033[0m"

target = os.environ.get("OUTRIDER_TARGET", "localhost")
draft = os.environ.get("OUTRIDER_DRAFT", "localhost")
prompt = "Once upon a time, there was a little girl named Lily. She loved to"

with SpeculativeClient(target, draft=draft) as client:
    sampling = SamplingParams(temperature=0.8, seed=7, max_new_tokens=100)
    print(prompt, end="")
    with client.stream(prompt, sampling) as stream:
        for chunk in stream:
            for segment in chunk.segments:
                print(f"{GREEN if segment.is_drafted else YELLOW}{segment.text}{PLAIN}", end="", flush=True)
    stats = stream.partial.stats
    print(f"\n\n{stats.tokens_per_s:.0f} tokens/s, {stats.acceptance_rate:.0%} of the proposals accepted")
