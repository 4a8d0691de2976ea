"""Sharpening inside a serving engine: ``vllm serve MODEL --quantization vps``.

``plugin``, ``linear_method`` and ``scheduler`` import vllm, and vLLM alone imports them.
"""
