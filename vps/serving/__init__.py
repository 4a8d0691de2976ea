"""Sharpening inside a serving engine: ``vllm serve MODEL --quantization vps``. In reading order:

- ``limits``: the settings, and what an engine cannot be sharpened with
- ``requests``: the tokens of each request in a batch, and the layers inside a fused layer
- ``plugin``, ``linear_method``, ``scheduler``: what vLLM calls, which alone imports them
"""
