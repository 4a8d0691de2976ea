"""Who computes a sharpened layer. In reading order:

- ``dispatch``: which backend takes a call, asked with ``vps.backends()``
- ``operator``: ``torch.ops.vps.linear``, its fake and its gradient
- ``cpp``: finds and loads csrc for CPUs
- ``triton_backend``: calls the kernels of ``vps.kernels``
- ``cuda``, ``cuda_build``: one token in a single launch, and its compilation
- ``one_group``, ``column_sums``, ``threads``: a CPU without a compiler, one group in few calls
- ``sharing``, ``traced_sharing``: one input selection for the layers that read one x
- ``transforms``: layers inside ``torch.func``
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
