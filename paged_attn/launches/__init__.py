"""The launches of plans, on addresses: no memory, no CuPy. Their owner is a backend, and may be XLA."""
