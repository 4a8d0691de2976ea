"""What one sharpened layer computes, in torch (SPEC §2–§6, §8). In reading order:

- ``policy``: how strongly: γ, rank and order of a group of tokens
- ``selection``, ``coupling``: which features, of one layer or of a query and a key together
- ``weight``, ``products``: what the rest asks of W, as a matrix or in parts
- ``clipping``: bounds on the update
- ``torch_backend``: core and update, the flow of a layer
- ``lbfgs``: the ephemeral memory of a refinement
- ``gradient``: the backward pass
- ``constants``, ``tracing``: tensors made once, and what looks on while they are made
"""
