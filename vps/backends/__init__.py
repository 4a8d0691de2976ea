"""Who computes a sharpened layer. In reading order:

- ``call``: what travels to a backend, and what each backend must answer
- ``dispatch``: chooses the backend for a call; ``vps.backends()`` lists them
- ``torch_backend``: computes by the flow of ``vps.algorithm``
- ``reference_backend``: computes by the literal algorithm
- ``operator``: declares ``torch.ops.vps.linear``, its fake and its gradient, for compiled backends
- ``cpp``: computes by csrc on CPUs
- ``triton``: says which calls the kernels of ``vps.kernels`` take
- ``triton_backend``: puts these kernels together to a layer
- ``cuda``, ``cuda_build``: decodes one token in a single launch; compiles the code for that
- ``sharing``: shares one input selection between layers that read one x, and holds kept plans
"""

import sys
from types import ModuleType


class _Backends(ModuleType):
    """The package, and the function ``vps.backends()`` that had this name first."""

    def __call__(self) -> dict[str, str | None]:
        """Return backend names, each with ``None`` or the reason why it cannot run."""
        from vps.backends import dispatch

        return dispatch.backends()


sys.modules[__name__].__class__ = _Backends
