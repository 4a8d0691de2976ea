"""A whole model: patched, run, watched, saved. In reading order:

- ``matching``: which modules a config names
- ``patching``: sharpens these layers of a model, and makes them plain again
- ``snapshot``: puts a model back when a patch fails
- ``attention_mask``: carries the masks of a model to its layers
- ``prompt_cache``: keeps what a prompt decided with the cache of its sequences
- ``capture``: records outputs and gradients of layers, for a refinement
- ``statistics``: what each layer decides, and how large its update is
- ``loading``: loads a model by its name
- ``generation``: generates text, and tells the entropy of the next token to the policy
- ``calibration``: a γ for each layer, kept in a file
- ``settings``: how a model is sharpened, kept in a file
"""
