"""What vLLM refuses when it starts, and where it reads its settings."""

import pytest
from vllm_cases import PROMPTS, SCHEDULER, answers, expected

from vps import VPSConfig

TOKEN = VPSConfig(scope="token")


def test_settings_of_a_file(engine, llama, tmp_path, monkeypatch):
    config = VPSConfig(scope="token", gamma=2.0, adaptive_gamma=False, tau=None)
    (tmp_path / "settings.json").write_text(config.to_json())
    monkeypatch.setenv("VPS_CONFIG", str(tmp_path / "settings.json"))
    assert answers(engine(llama, None, quantization="vps"), PROMPTS) == expected(llama, config)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("/nowhere/settings.json", "VPS_CONFIG=/nowhere/settings.json: expected the path"),
        ('{"gama": 1}', "VPS_CONFIG: VPSConfig.from_json: unknown key 'gama'; did you mean"),
        ('{"gamma": -1}', "VPS_CONFIG: VPSConfig.gamma is -1"),
        ('{"scope": "batch"}', "VPS_CONFIG: scope='batch'"),
    ],
)
def test_bad_settings(engine, llama, monkeypatch, value, said):
    monkeypatch.setenv("VPS_CONFIG", value)
    with pytest.raises(Exception, match="VPS_CONFIG") as caught:
        engine(llama, None, quantization="vps")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (VPSConfig(), dict(scheduler_cls=None), f"--scheduler-cls {SCHEDULER}"),
        (VPSConfig(), dict(max_num_batched_tokens=64), "--max-num-batched-tokens"),
        (VPSConfig(scope="token"), dict(enable_lora=True), "--enable-lora"),
        (TOKEN.replace(target_modules=["lm_head"]), {}, "lm_head: it is a ParallelLMHead"),
        (TOKEN.replace(target_modules=["Wqkv"]), {}, "vLLM names down_proj, gate_up_proj, o_proj"),
    ],
)
def test_refused(engine, llama, config, options, said):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        engine(llama, config, **options)
    assert said in str(caught.value)


def test_a_running_request_is_not_stopped(engine, llama):
    llm = engine(llama, VPSConfig())
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    with pytest.raises(RuntimeError, match="cannot stop a running request"):
        scheduler._preempt_request(None, 0.0)
