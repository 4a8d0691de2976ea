"""One short visit to a lent GPU: ``make gpu-smoke``, then ``make gpu``.

In reading order:

- ``__main__``: the steps of both visits, each with a deadline, and the table at the end
- ``compiling``: compiles the kernels of the models, a share in each of many processes
- ``right``: results, bits, captures and streams before anything is timed
- ``timing``: limits of the GPU, each kernel alone, a block of layers, the host
- ``watching``: sanitizers, many replays and ncu; ``harness.cu`` runs without torch
"""
