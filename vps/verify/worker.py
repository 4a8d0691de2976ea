"""The process that runs Math-Verify: one JSON request a line in, one JSON answer a line out.

It inherits no environment, cannot write files or start processes, imports no torch, has 1 GB of
address space and the CPU time of its request; its parent kills it when it is late.
"""

from __future__ import annotations

import gc
import json
import os
import select
import sys
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TextIO

PACKAGES = ("sympy", "latex2sympy2_extended", "math_verify")
FORBIDDEN_IMPORTS = ("torch", "numpy", "transformers", "triton")
FORBIDDEN_EVENTS = (
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "subprocess."),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "shutil.", "socket.", "ctypes.", "urllib."),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What the parser meets before the first request; the first one loads most of sympy.
EXAMPLES = [
    (r"\frac{x^{2}-1}{x-1}", "x+1"),
    (r"2\sqrt{3}+\pi", r"\sqrt{12}+\pi"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\{1, 2\}", "1, 2"),
    (r"(-\infty, 3] \cup [5, \infty)", "x > 3"),
    ("(1, 2, 3)", "(1, 2)"),
    ("y = 2x + 1", "x = 5, y = 3"),
    ("3 < x < 5", "(3, 5)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"),
    (r"e^{2\ln x}", r"|x-1| + \log_2 8 + n!"),
]


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse whatever a library tries to write, start or connect to."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or event.startswith(FORBIDDEN_EVENTS):
        raise PermissionError(f"vps.verify: the worker does no {event}")


def limit(memory: int | None = None, seconds: float = 0.0) -> None:
    """Limit address space and files, or the processor's time.

    The system then ends this process if it goes on when its parent is gone.
    """
    with suppress(ImportError):  # no such limits on Windows
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime + seconds) + 2
        limits = {resource.RLIMIT_CPU: (soft, resource.getrlimit(resource.RLIMIT_CPU)[1])}
        if memory is not None:
            limits = {resource.RLIMIT_AS: (memory, memory)}
            limits |= dict.fromkeys((resource.RLIMIT_FSIZE, resource.RLIMIT_CORE), (0, 0))
        for kind, sizes in limits.items():
            with suppress(ValueError, OSError):  # a lower one is set, or the system has none
                resource.setrlimit(kind, sizes)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request; an error makes it undecided."""
    from vps.verify import symbolic

    limit(seconds=float(request["seconds"]))
    try:
        return {"verdict": symbolic.compare(request["prediction"], request["gold"])}
    except MemoryError:
        return {"verdict": symbolic.UNDECIDED, "exhausted": True}
    except Exception as error:  # a library's error on hostile input may be any
        return {"verdict": symbolic.UNDECIDED, "error": type(error).__name__}


def learn(requests: TextIO) -> None:
    """Read examples as long as no request waits: what a parser has met before is fast."""
    for prediction, gold in EXAMPLES[1:]:
        if select.select([requests], [], [], 0)[0]:
            return
        found = answer({"prediction": prediction, "gold": gold, "seconds": 60})
        if found["verdict"] == "undecided":  # the limit of memory is lower than usual
            return


def private_streams() -> tuple[TextIO, TextIO]:
    """Return the pipes to the parent, out of reach of anything that prints or reads."""
    requests = os.fdopen(os.dup(0), "r", encoding="ascii")
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    return requests, answers


def main() -> None:
    """Answer requests until the parent closes its end."""
    requests, answers = private_streams()
    start = json.loads(requests.readline())
    sys.path[:] = start["path"]
    import_module("vps.verify")
    sys.modules.update(dict.fromkeys(FORBIDDEN_IMPORTS))  # type: ignore[arg-type]
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if not absent:
        from vps.verify import symbolic

        symbolic.compare(*EXAMPLES[0])
    limit(start["memory"])
    sys.addaudithook(refuse)
    gc.collect()
    gc.freeze()
    print(json.dumps({"missing": absent}), file=answers, flush=True)
    if not absent:
        learn(requests)
    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
