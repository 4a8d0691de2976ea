"""What one sharpened layer computes, in torch (SPEC §2–§6, §8). In reading order:

- ``policy``: how strongly: γ, rank and order of a group of tokens
- ``selection``, ``coupling``: which features, of one layer or of a query and a key together
- ``weight``: what the rest asks of W, of which several kinds exist
- ``core``: policy, SC, clip and second order in an r × r matrix
- ``flow``: select, project, decide, update: a layer, or a query and a key
- ``lbfgs``: the ephemeral memory of a refinement
- ``gradient``: the backward pass of compiled backends
- ``constants``, ``tracing``: tensors made once, and what looks on while they are made
"""
