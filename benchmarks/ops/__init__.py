"""The ops by themselves, beside the same in plain torch: ``python -m benchmarks.ops``.

In reading order:

- ``roofline``: bytes and operations of an op, and measured peaks
- ``problem``: one op on one layer: inputs, implementations, oracle, cost
- ``kernels``: a case of every Triton kernel
- ``linear``: the whole operator, for many tokens and for one
- ``__main__``: checks, then times them; ``test_ops`` does for pytest-benchmark
"""
