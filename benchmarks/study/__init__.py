"""Studies of what sharpening does to a model; both run as ``python -m benchmarks.study.NAME``.

In reading order:

- ``report``: cells of docs/guides/calibration.md, and what they found
- ``calibration``: does fitted sharpening beat its controls?
- ``claims``: the claims of docs/reproduction.md that need no answers
"""
