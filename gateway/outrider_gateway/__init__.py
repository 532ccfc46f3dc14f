"""The gateway: OpenAI's HTTP in front of pairs of draft and target services.

Knows: the asyncio client, and HTTP. Does not know: gRPC, torch, models, or how proposals are judged.
Begin with `app.py`, which has the routes; `fields.py` says what a request means, `texts.py` runs it.
"""
