"""Write forty texts at once on one event loop; the target verifies all of them in shared passes."""

import asyncio
import os
import time

from outrider import AsyncSpeculativeClient, SamplingParams

NAMES = ("Lily", "Tom", "Anna", "Ben")
target = os.environ.get("OUTRIDER_TARGET", "localhost")
draft = os.environ.get("OUTRIDER_DRAFT", "localhost")


async def main() -> None:
    async with AsyncSpeculativeClient(target, draft=draft) as client:
        begin = time.perf_counter()
        prompts = [f"One day {NAMES[number % len(NAMES)]} went to the park and" for number in range(40)]
        samplings = [SamplingParams(temperature=0.8, seed=number, max_new_tokens=40) for number in range(40)]
        calls = [client.generate(prompt, sampling) for prompt, sampling in zip(prompts, samplings, strict=True)]
        results = await asyncio.gather(*calls)
        seconds = time.perf_counter() - begin
    num_tokens = sum(len(result.token_ids) for result in results)
    print(f"{prompts[0]}{results[0].text}\n")
    print(f"{len(results)} texts, {num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:.0f} tokens/s")


asyncio.run(main())
