"""The model runner that both services share: loading, packed attention, caches, forward passes. Knows no gRPC."""
