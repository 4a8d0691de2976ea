"""What one sharpened layer computes, in torch (SPEC §2–§6, §8). In reading order:

- ``settings``: what a config asks of a layer of some shape
- ``policy``: decides γ, rank and order of a group of tokens
- ``selection``: scores the features of a layer and selects the best
- ``coupling``: selects features of a query and a key together
- ``weight``: what the other files ask of W, and W as a matrix
- ``core``: builds policy, SC, clip and second order into an r × r matrix
- ``fixed``: what a prompt decided, and the change of x that later tokens get by it
- ``flow``: selects, projects, decides and updates, for a layer or for a query and a key
- ``lbfgs``: the L-BFGS memory of a refinement
- ``gradient``: the backward pass of compiled backends
- ``tracing``: which tracer, compiler or transform runs
"""
