"""How fast each backend is against everything a user might run instead.

In reading order:

- ``shapes``: layers of published models, and which are run where
- ``machine``: where, with what and at which clocks a measurement was made
- ``results``: result files and tables of them
- ``common``: the runner: variants in turns, a noise band, a budget of time
- ``checks``: random layers of clear selection, and the float64 oracle
- ``baselines``: what a user might run instead
- ``variants``: every way to run a list of layers, checked
- ``ops/``, ``models/``: what is timed
- ``plot``, ``regress``: figures, and what got slower
- ``aot``: kernels compiled ahead of time
- ``study/``: does fitted sharpening beat its controls; do the claims of the paper hold;
  ``grids/``: ablations for ``vps ablate``
- ``__main__``: everything, within a time
"""
