"""``python -m paged_attn demo``: a real language model served by continuous batching through a paged KV cache.

It uses the public names of ``paged_attn`` only, so that it can be copied: ``engine.py`` is the serving loop,
``models.py`` the forward pass, ``view.py`` what a person sees.
"""
