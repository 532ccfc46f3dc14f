"""Ask the gateway with OpenAI's own client; what speculation did stands in `usage.outrider`."""

import os

from openai import OpenAI

base_url = os.environ.get("OUTRIDER_GATEWAY", "http://127.0.0.1:8000")
client = OpenAI(base_url=f"{base_url}/v1", api_key=os.environ.get("OUTRIDER_API_KEY", "none"))
model = client.models.list().data[0].id

stream = client.completions.create(
    model=model,
    prompt="Once upon a time, there was a little",
    max_tokens=60,
    seed=7,
    stream=True,
    stream_options={"include_usage": True},
)
for event in stream:
    for choice in event.choices:
        print(choice.text, end="", flush=True)
    if event.usage:
        print(f"\n\n{event.usage.model_dump_json(indent=2)}")
