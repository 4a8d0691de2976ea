"""A saved tiny model whose words are numbers, and the command run on it."""

import pytest
from tiny import number_llama, number_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    number_tokenizer().save_pretrained(path)
    number_llama().save_pretrained(path)
    return path


@pytest.fixture
def generate(run, folder):
    """The same of ``vps generate`` on the model, as JSON."""

    def generate(*arguments, model=folder):
        return run("generate", "--model", model, "--max-new-tokens", 12, "--json", *arguments)

    return generate


@pytest.fixture
def refine(run, folder):
    """Exit code, output and errors of ``vps refine`` on the model."""

    def refine(*arguments):
        weights = '{"numeric": 1, "units": 0.5}'
        common = ("--model", folder, "--max-new-tokens", 5, "--weights", weights)
        return run("refine", *common, *arguments)

    return refine


@pytest.fixture
def refuse(run):
    """What the command says, in one line, to arguments that it cannot use."""

    def refuse(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "") and err.startswith("vps: error: "), (arguments, err)
        assert err.count("\n") == 1
        return err

    return refuse
