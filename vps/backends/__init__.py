"""Who computes a sharpened layer. In reading order:

- ``call``: what travels to a backend, and what each must answer
- ``dispatch``: which backend takes a call, asked with ``vps.backends()``
- ``torch_backend``, ``reference_backend``: the flow of ``vps.algorithm``; the literal algorithm
- ``operator``: ``torch.ops.vps.linear``, its fake and its gradient, for compiled backends
- ``cpp``: csrc, for CPUs
- ``triton``, ``triton_backend``: which calls the kernels of ``vps.kernels`` take, and their layer
- ``cuda``, ``cuda_build``: one token in a single launch, and its compilation
- ``sharing``: one input selection for the layers that read one x, and the plan that a layer keeps
"""

import sys
from types import ModuleType


class _Backends(ModuleType):
    """The package, and the function ``vps.backends()`` that had this name first."""

    def __call__(self) -> dict[str, str | None]:
        """Backend names, each with ``None`` when it can run or the reason why it cannot."""
        from vps.backends import dispatch

        return dispatch.backends()


sys.modules[__name__].__class__ = _Backends
