"""The Llama family on a CPU, as one call of compiled code a pass."""
