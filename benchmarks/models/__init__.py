"""Layers, blocks and models, each ``python -m benchmarks.models.NAME``.

In reading order:

- ``layer``: linear layers alone, and the seven of a block
- ``scaling``: overhead over tokens, width, rank and sequences, with a modelled limit
- ``whole``: models in every variant, checked
- ``block``: decoder blocks
- ``model``: greedy tokens and a prefill of whole models
- ``backward``: the backward pass of a whole frozen model
- ``memory``: peak bytes for patching, forward, forward and backward
"""
