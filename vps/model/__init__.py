"""A whole model: patched, run, watched, saved. In reading order:

- ``patching``, ``matching``, ``snapshot``: sharpen the layers that a config names, and take it back
- ``attention_mask``: the model's tokens and masks, for the statistics of its layers
- ``capture``, ``statistics``: what layers put out, what a refinement lends them, what they decide
- ``entropy``: the next token's, for the policy
- ``loading``, ``generation``: a model by name, and its text
- ``settings``, ``calibration``: how a model is sharpened, kept in a file
"""
