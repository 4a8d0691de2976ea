"""What vLLM answers when it is sharpened: the tokens of transformers patched with vps."""

import pytest
from vllm_cases import PROMPTS, TOKENS, answers, expected

from vps import VPSConfig

STRONG = dict(gamma=2.0, adaptive_gamma=False, tau=None)
NGRAM = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=2)
CONFIGS = {
    "token": VPSConfig(scope="token"),
    "token, sc, order 2": VPSConfig(scope="token", builder="sc", order=2),
    "token, uncoupled, strong": VPSConfig(scope="token", qk_coupling=False, **STRONG),
    "token, clamp": VPSConfig(scope="token", clamp=0.5, clip="spectral"),
    "some layers": VPSConfig(
        scope="token", target_modules=["v_proj", "up_proj"], layers_to_transform=[1], **STRONG
    ),
    "random": VPSConfig(scope="token", builder="random", seed=3, **STRONG),
    "sequence": VPSConfig(),
    "sequence, sc": VPSConfig(builder="sc", **STRONG),
    "prompt": VPSConfig(scope="prompt"),
    "prompt, sc, strong": VPSConfig(scope="prompt", builder="sc", **STRONG),
    "prompt, clamp": VPSConfig(scope="prompt", clamp=0.5, clip="spectral"),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers(engine, request, family, name):
    folder = request.getfixturevalue(family)
    config = CONFIGS[name]
    want = expected(folder, config)
    assert want != expected(folder, None), "the config changes nothing: this would test nothing"
    llm = engine(folder, config)
    assert answers(llm, PROMPTS) == want
    assert [answers(llm, [prompt])[0] for prompt in PROMPTS] == want  # one at a time


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gamma_0_has_the_bits_of_the_plain_engine(engine, request, family):
    folder = request.getfixturevalue(family)

    def logprobs(config):
        from vllm import SamplingParams

        llm = engine(folder, config, max_logprobs=128)
        sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=128)
        inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        return [
            [{token: entry.logprob for token, entry in step.items()} for step in out.logprobs]
            for result in llm.generate(inputs, sampling, use_tqdm=False)
            for out in result.outputs
        ]

    plain = logprobs(None)
    assert len(plain[0]) == TOKENS and len(plain[0][0]) == 128
    assert logprobs(VPSConfig(gamma=0.0, adaptive_gamma=False)) == plain
    assert logprobs(VPSConfig(scope="token")) != plain


def test_chunks_cached_prefixes_and_preemption_change_no_token(engine, llama):
    """With scope="token": prompts in chunks of 16 tokens between other requests' answers."""
    config = VPSConfig(scope="token")
    prefix = [(7 * index) % 120 + 2 for index in range(40)]
    prompts = PROMPTS + [prefix + [index, 5] for index in range(2, 8)]
    want = expected(llama, config, prompts, 30)
    llm = engine(
        llama,
        config,
        max_num_batched_tokens=16,
        block_size=32,
        num_gpu_blocks_override=8,
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    assert answers(llm, prompts, 30) == want
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counted["vllm:prefix_cache_hits"] > 0
    assert counted["vllm:num_preemptions"] > 0


def test_whole_prompts_only(engine, llama):
    """With scope="sequence": as many requests at once as fit, the others wait."""
    config = VPSConfig()
    prefix = [(7 * index) % 120 + 2 for index in range(40)]
    prompts = PROMPTS + [prefix + [index, 5] for index in range(2, 8)]
    want = expected(llama, config, prompts, 30)
    llm = engine(
        llama,
        config,
        max_num_batched_tokens=128,
        block_size=32,
        num_gpu_blocks_override=13,  # of which one stays empty: 3 requests of 128 tokens
        enable_prefix_caching=True,
        disable_log_stats=False,
    )
    assert llm.llm_engine.engine_core.engine_core.scheduler.max_num_active_reqs == 3
    assert answers(llm, prompts, 30) == want
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counted["vllm:prefix_cache_hits"] == counted["vllm:num_preemptions"] == 0


def test_compiled(engine, llama):
    """torch.compile, and no graph of other settings: vLLM keeps graphs by this hash."""
    hashes = set()
    for config in (
        VPSConfig(scope="token", gamma=0.0, adaptive_gamma=False),
        VPSConfig(scope="token", target_modules=["down_proj", "q_proj"]),
        VPSConfig(),
        VPSConfig(scope="prompt"),
    ):
        llm = engine(llama, config, enforce_eager=False)
        assert answers(llm, PROMPTS) == expected(llama, config)
        hashes.add(llm.llm_engine.vllm_config.compute_hash())
        del llm
    assert len(hashes) == 4


# The last test: vLLM 0.32 cannot start another engine where ngram has loaded numba.
@pytest.mark.parametrize(("blocks", "drafts"), [(64, None), (8, None), (8, NGRAM)])
def test_a_prompt_decides_for_its_request_alone(engine, llama, blocks, drafts):
    """Requests join, leave, and with 8 blocks are stopped and computed again with their answers."""
    config = VPSConfig(scope="prompt", **STRONG)
    prefix = [(7 * index) % 120 + 2 for index in range(40)]
    prompts = PROMPTS + [prefix + [index, 5] for index in range(2, 8)]
    tokens = [30, 3, 25, 1, 30, 12, 30, 30, 7, 30]
    want = expected(llama, config, prompts, tokens)
    assert want != expected(llama, None, prompts, tokens)
    llm = engine(
        llama,
        config,
        max_num_seqs=5,
        block_size=32,
        num_gpu_blocks_override=blocks,
        enable_prefix_caching=True,
        disable_log_stats=False,
        speculative_config=drafts,
    )
    assert answers(llm, prompts, tokens) == want
    counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    assert counted["vllm:prefix_cache_hits"] == 0
    assert (counted["vllm:num_preemptions"] > 0) == (blocks == 8)
    assert (counted.get("vllm:spec_decode_num_accepted_tokens", 0) > 0) == (drafts is not None)
    core = llm.llm_engine.engine_core.engine_core
    core.step()  # which tells the model runner that the last requests have finished
    kept = core.model_executor.driver_worker.worker.model_runner.vps_decisions
    assert kept.of == kept.stacked == {}
    assert answers(llm, prompts[:4], tokens[:4]) == want[:4]
