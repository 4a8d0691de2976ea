"""Data files for the command, and a stand-in for lm-eval."""

import json
import random
import types

from vps.evaluation.paired import Outcome

FAST = ("--steps", 4, "--batch-size", 4, "--learning-rate", "0.1", "--no-chat")


def rows(count, seed=0):
    rng = random.Random(seed)
    prompts = [" ".join(str(rng.randrange(90)) for _ in range(5)) for _ in range(count)]
    return [{"prompt": prompt, "answer": "7 8 9"} for prompt in prompts]


def write(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


class StubHarness:
    """Records how it is called; its numbers depend on config, control and draw."""

    made: list = []

    def __init__(self, model, tokenizer, tasks, **options):
        self.model, self.tasks, self.options, self.calls = model, tasks, options, []
        StubHarness.made.append(self)
        if "nonsense" in tasks:
            raise ValueError("evaluation: no task 'nonsense'")

    def run(self, config=None, variant="sharpened", seed=0):
        self.calls.append((config, variant, seed))
        gamma = 0.0 if variant == "baseline" else config.gamma
        outcomes = [
            Outcome(self.tasks[0], str(i), "acc", float((i + round(10 * gamma) + seed) % 2))
            for i in range(10)
        ]
        scopes = {} if variant == "baseline" else {"generate_until": config.scope}
        return types.SimpleNamespace(outcomes=outcomes, scopes=scopes)
