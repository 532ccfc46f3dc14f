"""Hold a conversation of three turns in the model's own chat format."""

import os

from outrider import SamplingParams, SpeculativeClient

TURNS = ("Name three birds.", "Which of them can swim?", "Say that in one word.")
target = os.environ.get("OUTRIDER_TARGET", "localhost")
draft = os.environ.get("OUTRIDER_DRAFT", "localhost")

with SpeculativeClient(target, draft=draft) as client:
    messages = [{"role": "system", "content": "You answer briefly."}]
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        answer = client.generate(messages, SamplingParams(temperature=0, max_new_tokens=60))
        messages.append({"role": "assistant", "content": answer.text})
        print(f"> {turn}\n{answer.text}\n")
