"""vLLM in this process, on tiny models; run by ``make test-vllm`` alone."""

import gc
import os

# Before vLLM is imported: a small cache, the engine in this process, and its own folder.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    HF_HUB_OFFLINE="1",
)

import pytest
from vllm_cases import SCHEDULER, make_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen2"), "Qwen2")


@pytest.fixture
def engine(monkeypatch):
    """Start vLLM on a model folder with a config, or plain with ``None``; one engine at a time."""
    from vllm import LLM

    def start(folder, config, **options):
        if config is not None:
            monkeypatch.setenv("VPS_CONFIG", config.to_json())
            options.setdefault("quantization", "vps")
            if config.scope != "token":
                options.setdefault("scheduler_cls", SCHEDULER)
        defaults = dict(dtype="float32", max_model_len=128, max_num_seqs=8, enforce_eager=True)
        return LLM(folder, **{**defaults, **options})

    yield start
    gc.collect()
