"""What every gRPC server here has: options, admission, limits, health, errors as statuses, shutdown.

Knows: gRPC, and an engine as a thing that is loaded and closed. Does not know: what a draft or a target does.
Begin with `service.py`.
"""
