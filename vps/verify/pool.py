"""Warm worker processes behind a time limit: a late one is killed, another takes its place."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
MEMORY = 1 << 30
MAX_ANSWER = 1 << 16
# Seconds that a worker may take to start; requests do not kill it before.
STARTING = 60.0
# Less than a pipe holds, so that writing never waits for the worker.
MAX_REQUEST = 60_000
logger = logging.getLogger("vps.verify")
# What a Python needs to start; nothing else of the environment is passed on.
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL")
# What reading from a worker and writing to it raise where it ended or sent nonsense.
GONE = (OSError, EOFError, ValueError, TypeError)


class Worker:
    """One process and the pipes to it; used by one thread at a time."""

    def __init__(self, script: Path, memory: int) -> None:
        if not sys.executable:
            raise OSError("no Python to start a worker with (sys.executable)")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            cwd=os.path.abspath(os.sep),
            bufsize=0,
            start_new_session=True,
        )
        self.ready: dict[str, Any] | None = None  # its first message
        self.patience = time.monotonic() + STARTING
        path = [os.path.abspath(entry) for entry in sys.path if entry and os.path.exists(entry)]
        path[:0] = [root for root in (str(WORKER.parents[2]),) if root not in path]
        with suppress(*GONE):  # the first request finds out
            self.send({"path": path, "memory": memory})

    def send(self, message: dict[str, Any]) -> None:
        """Write one line; raise one of ``GONE`` where nobody reads it."""
        self.process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]

    def receive(self, deadline: float) -> dict[str, Any]:
        """Read one line; kill the process where it is not there by then.

        Args:
            deadline: in ``time.monotonic()``.

        Raises:
            OSError, EOFError, ValueError, TypeError: the process ended, or sent no answer.
        """
        late = threading.Timer(max(0.0, deadline - time.monotonic()), self.process.kill)
        late.daemon = True
        late.start()
        try:
            return dict(json.loads(self.process.stdout.readline(MAX_ANSWER)))  # type: ignore[union-attr]
        finally:
            late.cancel()

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Return the answer to a request, or the first message where that names missing packages.

        Raises:
            TimeoutError: the worker is still starting.
            OSError, EOFError, ValueError, TypeError: as for :meth:`receive`.
        """
        if self.ready is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
            self.ready = {"ready": True} | self.receive(deadline)
        if self.ready.get("missing"):
            return self.ready
        self.send(request | {"seconds": max(0.0, deadline - time.monotonic())})
        return self.receive(deadline)

    def close(self) -> None:
        """Close the pipes to the process."""
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def kill(self) -> None:
        """End the process, collect it and close its pipes.

        A verdict waits for this, within the share that is left for it.
        """
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # stuck in the system; collected later
            self.process.wait(timeout=0.15)
        self.close()


class Pool:
    """Workers for any number of threads, started when they are needed.

    Args:
        size: most workers at a time.
        memory: address space of each, in bytes.
        script: what they run.
    """

    def __init__(self, size: int = 2, memory: int = MEMORY, script: Path = WORKER) -> None:
        if size < 1:
            raise ValueError(f"vps.verify.Pool: size must be at least 1, got {size}")
        self.size, self.memory, self.script = size, memory, script
        self.closed = False
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)
        atexit.register(self.close)

    def forget(self) -> None:
        """Begin without workers; after a fork those from before are the parent's."""
        for worker in getattr(self, "workers", ()):
            worker.process.returncode = 0  # so that Popen does not wait for it, or warn
            worker.close()
        self.workers: set[Worker] = set()
        # A place for each worker, with one that waits or without; the last that came goes first.
        self.places: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(self.size):
            self.places.put(None)

    def start(self) -> None:
        """Start one worker, if there is none, and do not wait for it."""
        if not self.workers:
            with suppress(queue.Empty):
                self.places.put(self.places.get_nowait() or self.add())

    def add(self) -> Worker | None:
        """Start a worker; ``None`` where that fails, which the log tells."""
        if self.closed:
            return None
        try:
            worker = Worker(self.script, self.memory)
        except OSError as error:
            logger.warning("no worker could be started: %s", error)
            return None
        self.workers.add(worker)
        return worker

    def successor(self, worker: Worker | None, found: dict[str, Any] | None) -> Worker | None:
        """Return a worker that may go on or is starting, or end it and start another.

        One that never got ready has no successor, which would not either.
        """
        if worker is None or found and not found.get("exhausted") and not self.closed:
            return worker
        if worker.ready is None and time.monotonic() < worker.patience and not self.closed:
            if worker.process.poll() is None:
                return worker
        self.workers.discard(worker)
        worker.kill()
        return self.add() if worker.ready else None

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any] | None:
        """Return the answer of a worker; ``None`` if there is none at ``deadline``.

        A worker that died is replaced and the next one asked, one that is late is killed.

        Args:
            request: what :func:`vps.verify.worker.answer` takes.
            deadline: in ``time.monotonic()``.

        Raises:
            ImportError: a package that the worker needs is not installed.
        """
        if self.closed or len(json.dumps(request)) > MAX_REQUEST:
            return None
        # All waiting workers may have been killed from outside.
        for _ in range(self.size + 1):
            try:
                worker = self.places.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            worker, found = worker or self.add(), None
            try:
                found = worker.ask(request, deadline) if worker else None
            except GONE:
                if time.monotonic() < deadline:
                    continue
            finally:
                self.places.put(self.successor(worker, found))
            if found and found.get("missing"):
                raise ImportError(
                    f"vps.verify: algebra needs {' and '.join(found['missing'])}, which is not "
                    "installed: pip install 'vps-kernels[verify]'"
                )
            return found
        logger.warning("workers end while they start or work")
        return None

    def warm(self, timeout: float = 60.0) -> None:
        """Wait until a worker is ready, so that the first verdict does not wait for it.

        Raises:
            TimeoutError: it did not start in time.
            ImportError: a package that the worker needs is not installed.
        """
        if self.ask({"prediction": "x", "gold": "x"}, time.monotonic() + timeout) is None:
            raise TimeoutError(f"vps.verify: no worker was ready within {timeout:g} s")

    def processes(self) -> list[int]:
        """List the process ids of the living workers."""
        return [worker.process.pid for worker in list(self.workers)]

    def close(self) -> None:
        """Kill all workers; requests after that are not answered."""
        self.closed = True
        for worker in list(self.workers):
            worker.process.kill()  # its pipes may be in use by another thread
        with suppress(queue.Empty):
            for _ in range(self.size):
                waiting = self.places.get_nowait()
                if waiting is not None:
                    waiting.kill()


def check_timeout(timeout: float) -> float:
    """Return a time limit in seconds.

    Raises:
        TypeError, ValueError: not a positive number.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"vps.verify: timeout must be a number, got {type(timeout).__name__}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"vps.verify: timeout must be positive and finite, got {timeout!r}")
    return float(timeout)


_default: Pool | None = None
_default_lock = threading.Lock()


def unlock() -> None:
    """Make a new lock after a fork, where the old one stays locked if a thread held it."""
    global _default_lock
    _default_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=unlock)


def default_pool() -> Pool:
    """Return the pool that verdicts use where none is named."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = Pool()
        return _default
