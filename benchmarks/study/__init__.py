"""The study of docs/guides/calibration.md: does fitted sharpening beat its controls?

In reading order:

- ``report``: its cells, and what they found
- ``calibration``: fits and compares them, ``python -m benchmarks.study.calibration``
"""
