"""Benchmarks: `python -m bench decode` and `python -m bench prefill`, on a machine with an NVIDIA GPU."""
