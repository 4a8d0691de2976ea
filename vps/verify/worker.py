"""The process that runs sympy: one JSON request a line in, one JSON answer a line out.

It is started by path, not by name, since ``vps`` imports torch and this process must not. It
inherits no environment, cannot write files or start processes, has 1 GB of address space and
the CPU time of its request; its parent kills it when it is late.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import types
from pathlib import Path
from typing import Any, TextIO

FORBIDDEN = ("torch", "numpy", "transformers", "triton")
FORBIDDEN_EVENTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.kill",
    "shutil.",
    "socket.",
    "subprocess.",
    "ctypes.",
    "urllib.",
)


def stub_packages(path: list[str]) -> None:
    """Make ``vps.verify`` importable without running ``vps/__init__``, and torch not at all."""
    sys.path[:0] = [entry for entry in path if entry not in sys.path]
    folder = Path(__file__).resolve().parent
    for name, where in (("vps", folder.parent), ("vps.verify", folder)):
        package = types.ModuleType(name)
        package.__path__ = [str(where)]
        sys.modules[name] = package
    for name in FORBIDDEN:
        sys.modules[name] = None  # type: ignore[assignment]


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: nothing is written, started or connected, whatever a library tries."""
    if event == "open":
        flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            raise PermissionError("vps.verify: the worker writes no files")
    elif event.startswith(FORBIDDEN_EVENTS):
        raise PermissionError(f"vps.verify: the worker does no {event}")


def limit_resources(memory: int) -> None:
    """Address space, files and core dumps, where the system knows such limits."""
    try:
        import resource
    except ImportError:  # no such limits on Windows
        return
    for kind, amount in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(kind, (amount, amount))
        except (ValueError, OSError):  # a lower one is set, or the system has none
            continue


def limit_processor(seconds: float) -> None:
    """Let the system end this process if it goes on when its parent is gone."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def warm() -> list[str]:
    """Import what requests need; the names of packages that are missing."""
    absent = []
    for name in ("sympy", "latex2sympy2_extended"):
        try:
            __import__(name)
        except ImportError:
            absent.append(name)
    if not absent:
        from vps.verify import symbolic

        symbolic.compare(["latex", "x^{2}-1"], ["symbol", "x"])
    return absent


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request; an error makes it undecided."""
    from vps.verify import symbolic

    limit_processor(float(request["seconds"]))
    try:
        return {"verdict": symbolic.compare(request["left"], request["right"])}
    except MemoryError:
        return {"verdict": symbolic.UNDECIDED, "exhausted": True}
    except Exception as error:  # a library's error on hostile input may be any
        return {"verdict": symbolic.UNDECIDED, "error": type(error).__name__}


def private_streams() -> tuple[TextIO, TextIO]:
    """The pipes to the parent, out of reach of anything that prints or reads."""
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
    stub_packages(start["path"])
    absent = warm()
    limit_resources(start["memory"])
    sys.addaudithook(refuse)
    gc.collect()
    gc.freeze()
    print(json.dumps({"missing": absent}), file=answers, flush=True)
    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
