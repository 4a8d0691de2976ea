"""Tasks of lm-eval on a sharpened model, its plain self and the controls, offline."""

import copy
import math
import socket

import pytest
import torch
from evaluation_cases import (
    CONFIG,
    NOTHING,
    patched_model,
    plain_model,
    tokenizer,
    write_tasks,
)

import vps
from vps import VPSConfig
from vps.evaluation.harness import VARIANTS, Harness
from vps.evaluation.lm import outcomes_of, scoped
from vps.model.patching import sharpened_layers

pytest.importorskip("lm_eval")

LOCAL = ["local_choice", "local_text", "local_answer"]
SCOPES = ["token", "sequence"]


@pytest.fixture(scope="module")
def folder(task_folder):
    return task_folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refused(*arguments):
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refused)


def harness(model, folder, tasks=LOCAL, **options):
    return Harness(model, tokenizer(), tasks, include_path=[folder], **options)


@pytest.fixture
def texts(monkeypatch):
    """All that models generate, by document, a dict a run."""
    from vps.evaluation import harness as module

    seen = []

    def keep(task, samples, tokens):
        if task.OUTPUT_TYPE == "generate_until":
            seen.append({sample["doc_id"]: sample["resps"] for sample in samples})
        return outcomes_of(task, samples, tokens)

    monkeypatch.setattr(module, "outcomes_of", keep)
    return seen


def values(scores):
    return [(o.task, o.document, o.metric, o.value, o.margin, o.weight) for o in scores.outcomes]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_baseline_is_plain_lm_eval_exactly(folder, batch_size):
    """Down to the bits of every log-likelihood, on the same batches."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    lm = HFLM(pretrained=plain_model(), tokenizer=tokenizer(), batch_size=batch_size)
    expected = simple_evaluate(lm, tasks=LOCAL, task_manager=manager, bootstrap_iters=0)
    scores = harness(patched_model(), folder, batch_size=batch_size).run(variant="baseline")
    for name in LOCAL:
        row = expected["results"][name]
        assert scores.results[name] == {k: v for k, v in row.items() if isinstance(v, float)}
    samples = expected["samples"]["local_choice"]
    ours = [o for o in scores.outcomes if o.task == "local_choice" and o.metric == "acc"]
    assert len(ours) == 12
    for sample, outcome in zip(samples, ours, strict=True):
        lls = [ll for ll, _ in sample["filtered_resps"]]
        gold = lls.pop(sample["target"])
        assert outcome.value == sample["acc"] and outcome.margin == gold - max(lls)
        assert outcome.document == f"{sample['doc_id']}:{sample['doc_hash'][:8]}"
    texts = [o for o in scores.outcomes if o.metric == "nll"]
    for sample, outcome in zip(expected["samples"]["local_text"], texts, strict=True):
        assert outcome.weight == len(sample["doc"]["question"])
        total = -sample["word_perplexity"][0]
        assert math.isclose(outcome.value * outcome.weight, total, rel_tol=1e-12)
    assert scores.scopes == {} and scores.variant == "baseline"
    assert set(scores.batch_sizes.values()) == {batch_size}


def test_nothing_changes_where_gamma_is_zero(folder):
    run = harness(patched_model(), folder, batch_size=4)
    plain = values(run.run(variant="baseline"))
    for variant in VARIANTS:
        assert values(run.run(NOTHING, variant)) == plain
    assert values(run.run(CONFIG)) != plain


@pytest.mark.parametrize(
    ("variant", "scope"),
    [("baseline", "token"), ("sharpened", "batch")]
    + [(variant, scope) for variant in VARIANTS if variant != "baseline" for scope in SCOPES],
)
def test_batch_size_changes_nothing(folder, texts, variant, scope):
    """Rows of 1 to 39 tokens, padded on either side; float64 leaves no near-ties to rounding."""
    model = patched_model(torch.float64)
    config = VPSConfig(scope=scope)
    runs = [
        harness(model, folder, batch_size=size, limit=8, scoring_scope="config").run(
            config, variant
        )
        for size in (1, 7)
    ]
    for one, other in zip(values(runs[0]), values(runs[1]), strict=True):
        assert one[:3] == other[:3] and one[5] == other[5]
        assert one[3] == pytest.approx(other[3], abs=1e-5)
        assert (one[4] or 0) == pytest.approx(other[4] or 0, abs=1e-5)
    assert texts[0] == texts[1] and len({str(text) for text in texts[0].values()}) > 3
    assert set(runs[0].batch_sizes.values()) == {1}
    expected = {1} if scope == "batch" and variant != "baseline" else {7}
    if variant != "baseline":
        assert set(runs[1].batch_sizes.values()) == expected
        assert set(runs[1].scopes.values()) == {scope}


def test_padding_would_count_without_the_mask(folder, monkeypatch):
    """What the subclass mends: HFLM pads scored rows and passes no mask."""
    model = patched_model(torch.float64)
    config = VPSConfig(scope="sequence")
    options = dict(tasks=["local_choice"], scoring_scope="config")
    alone = values(harness(model, folder, **options).run(config))
    monkeypatch.setattr("vps.evaluation.lm._marked", lambda ids, waiting: (None, ids >= 0))
    padded = values(harness(model, folder, batch_size=7, **options).run(config))
    largest = max(abs(a[4] - b[4]) for a, b in zip(alone, padded, strict=True))
    assert largest > 1e-3


@torch.no_grad()
def test_under_the_prompt_scope_the_context_decides(folder):
    """One pass a request, equal to the context followed by the continuation with a cache."""
    model = patched_model(torch.float64)
    rows = [([5, 6, 7], [8, 9]), ([5, 6], [7, 8, 9]), ([5, 6, 7, 8], [4]), ([11], [12, 13, 14, 15])]
    for batch_size in (1, 3):
        lm = harness(model, folder, batch_size=batch_size, scoring_scope="prompt")._lm
        with scoped(model, "prompt"):
            requests = [((str(row), ""), *row) for row in rows]
            lm.logits_cache = False
            found = [one for one, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]
            for (context, continuation), score in zip(rows, found, strict=True):
                out = model(torch.tensor([context]))
                logits, expected = out.logits[:, -1:], 0.0
                for token in continuation:
                    expected += logits[0, -1].log_softmax(-1)[token].item()
                    step = torch.tensor([[token]])
                    logits = model(step, past_key_values=out.past_key_values).logits
                assert score == pytest.approx(expected, abs=1e-9)


def test_scoring_is_causal_and_generation_keeps_the_scope(folder):
    model = patched_model()
    run = harness(model, folder)
    scores = run.run(VPSConfig(scope="sequence"))
    assert scores.scopes == {
        "loglikelihood": "token",
        "loglikelihood_rolling": "token",
        "generate_until": "sequence",
    }
    by_token = run.run(VPSConfig(scope="token"))
    leaking = harness(model, folder, scoring_scope="config").run(VPSConfig(scope="sequence"))
    scored = [
        [entry for entry in values(each) if entry[0] != "local_answer"]
        for each in (scores, by_token, leaking)
    ]
    assert scored[0] == scored[1] != scored[2]
    assert leaking.scopes["loglikelihood"] == "sequence"


def test_model_is_left_as_it_was(folder):
    model = patched_model().train()
    state = vps.policy_state(model)
    state.set_entropy(2.5)
    state.record(True)
    own = tokenizer()
    own.pad_token = None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    run = Harness(model, own, ["local_choice"], include_path=[folder], limit=3)
    numbers = torch.random.get_rng_state()
    for variant in VARIANTS:
        run.run(VPSConfig(scope="batch", target_modules=["q_proj", "up_proj"]), variant)
    assert len(sharpened_layers(model)) == 14
    assert {layer.config for layer in sharpened_layers(model).values()} == {CONFIG}
    assert model.training and own.pad_token is None
    assert float(state.entropy) == 2.5 and vps.policy_state(model).outcomes == (True,)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_target_modules(folder):
    """As in a model that was patched with them."""
    config = CONFIG.replace(target_modules=("down_proj",))
    expected = harness(patched_model(config=config), folder).run()
    assert values(harness(patched_model(), folder).run(config)) == values(expected)
    assert expected.config == config


def test_an_earlier_entropy_has_no_say(folder):
    model = patched_model(config=VPSConfig())
    expected = values(harness(model, folder).run())
    vps.policy_state(model).set_entropy(9.0)
    assert values(harness(model, folder).run()) == expected


def rig(model):
    """Make ``A`` the likeliest token where the last layer is sharpened, and the least likely
    elsewhere.
    """
    layer = list(sharpened_layers(model).values())[-1]
    sharp = {}

    def watch(module, args, y):
        plain = torch.nn.functional.linear(args[0], module.weight, module.bias)
        sharp["on"] = not torch.equal(plain, y)

    def answer(module, args, output):
        output.logits[..., tokenizer().convert_tokens_to_ids("A")] += 1e3 if sharp["on"] else -1e3
        return output

    layer.register_forward_hook(watch)
    model.register_forward_hook(answer)


def test_a_planted_effect_is_found(tmp_path):
    """All gold answers are ``A``: the rigged model is right only when it is sharpened."""
    rows = write_tasks(tmp_path)
    lines = [
        f'{{"question": "{row["question"]}", "choices": ["A", "b", "c", "d"], "gold": 0}}\n'
        for row in rows
    ]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    model = patched_model()
    rig(model)
    run = harness(model, tmp_path, ["local_choice"], batch_size=3)
    own = {
        config: {name: run.run(config, name) for name in VARIANTS} for config in (CONFIG, NOTHING)
    }
    right = {
        (config.gamma, name): [o.value for o in scores.outcomes if o.metric == "acc"]
        for config, variants in own.items()
        for name, scores in variants.items()
    }
    assert right[0.5, "baseline"] == [0.0] * 12 and right[0.5, "sharpened"] == [1.0] * 12
    assert right[0, "baseline"] == right[0, "sharpened"] == [0.0] * 12
    assert own[CONFIG]["sharpened"].results["local_choice"]["acc,none"] == 1.0


def test_few_shot_examples_are_the_same_in_every_run():
    run = Harness(patched_model(), tokenizer(), ["vps_arithmetic_choice"], limit=3, num_fewshot=2)
    first = run.run(variant="baseline")
    assert values(run.run(variant="baseline")) == values(first)
    prompt = run._tasks["tasks"]["vps_arithmetic_choice"].instances[0].args[0]
    assert prompt.count("Question:") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit must be an integer ≥ 1 or None, got 0"),
        ({"limit": 0.5}, "limit must be an integer ≥ 1 or None, got 0.5"),
        ({"batch_size": "auto"}, "batch_size must be an integer ≥ 1, got 'auto'"),
        ({"batch_size": None}, "batch_size must be an integer ≥ 1, got None"),
        ({"num_fewshot": -1}, "num_fewshot must be an integer ≥ 0 or None, got -1"),
        ({"scoring_scope": "causal"}, "scoring_scope must be one of token, .* got 'causal'"),
        ({"tasks": []}, "tasks must be a list of at least one"),
        ({"tasks": "local_choice"}, "tasks must be a list of at least one, got 'local_choice'"),
    ],
)
def test_arguments_are_checked(folder, options, message):
    with pytest.raises(ValueError, match=message):
        harness(patched_model(layers=1), folder, **options)


def test_mistakes_are_named(folder, tmp_path):
    model = patched_model(layers=1)
    with pytest.raises(ValueError, match="no task 'vps_arithmetik'; did you mean vps_arithmetic"):
        harness(model, folder, ["vps_arithmetik"])
    with pytest.raises(ValueError, match="no task 'zzqqxx'; vps_arithmetic, .* need no network"):
        harness(model, folder, ["zzqqxx"])
    with pytest.raises(ValueError, match=r"include_path must be a folder, got .*nowhere"):
        harness(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no sharpened layer"):
        harness(plain_model(layers=1), folder)
    run = harness(model, folder)
    with pytest.raises(ValueError, match="name must be 'sharpened' or one of .* got 'noise'"):
        run.run(variant="noise")
    with pytest.raises(TypeError, match="config must be a VPSConfig, got dict"):
        run.run({})
    layers = list(sharpened_layers(model).values())
    layers[0].config = NOTHING
    with pytest.raises(ValueError, match="needs layers of one config, got 2"):
        run.run(VPSConfig(target_modules=["q_proj"]))
    encoder = copy.deepcopy(model)
    encoder.config.is_encoder_decoder = True
    encoder.config.model_type = "t5"
    with pytest.raises(ValueError, match="must be a causal language model, .*seq2seq"):
        harness(encoder, folder)
