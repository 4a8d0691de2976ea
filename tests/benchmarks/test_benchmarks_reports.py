"""What is made of results: the runner's statistics, files, regressions, plots, tables."""

from pathlib import Path

import pytest
from processes import execute

from benchmarks import __main__ as everything
from benchmarks import common, machine, plot, regress, results
from benchmarks.common import Variant
from benchmarks.models import scaling
from benchmarks.results import AGAIN

ROOT = Path(__file__).parents[2]
CPU = {"cpu": "X", "threads": 2, "gpu": None, "torch": "2.13.0", "commit": "abc"}
GPU = CPU | {"gpu": "NVIDIA H200"}


def row(ratio, spread=0.01, seconds=1e-3):
    low, high = ratio * (1 - spread), ratio * (1 + spread)
    numbers = {"ratio": ratio, "ratio_q1": low, "ratio_q3": high, "rounds": 9}
    return numbers | {
        "seconds": seconds * ratio, "seconds_q1": seconds * low, "seconds_q3": seconds * high
    }  # fmt: skip


def case(base="nn.Linear", noise=0.02, **ratios):
    rows = {base: row(1.0, 0), base + AGAIN: row(1.0, noise)}
    rows["vps cuda"] = results.empty("not here: no CUDA device")
    rows |= {name.replace("_", " "): row(ratio) for name, ratio in ratios.items()}
    return results.case(base, rows)


def section(cases, machine=CPU, **more):
    return {"machine": machine, "clocks": {}, "cases": cases, **more}


def write(path, machine=CPU, **sections):
    for name, cases in sections.items():
        results.save(path, name, section(cases, machine))
    return path


def test_measure(monkeypatch):
    """Shares and work scale times, the base runs twice, the order changes from round to round."""
    order = []
    seconds = {"a": 2.0, "b": 3.0}

    def timed(call):
        order.append(call())
        return seconds[order[-1]]

    monkeypatch.setattr(common, "timed", timed)
    variants = {"b": Variant(lambda: "b", share=0.5), "a": Variant(lambda: "a"), "c": "no reason"}
    found = common.measure(variants, "a", 30.0, work=2, least=12)
    rows = found["rows"]
    assert rows["a"]["seconds"] == 1.0 and rows["b"]["seconds"] == 3.0
    assert rows["b"]["ratio"] == rows["b"]["ratio_q1"] == rows["b"]["ratio_q3"] == 3.0
    assert rows["a" + AGAIN]["ratio"] == 1.0 and rows["c"] == {"empty": "no reason"}
    assert rows["b"]["rounds"] == 12
    rounds = ["".join(order[-3 * n - 3 : len(order) - 3 * n]) for n in range(12)]
    assert {"".join(sorted(r)) for r in rounds} == {"aab"} and len(set(rounds)) > 1


def test_a_base_that_cannot_run_leaves_the_case_empty():
    found = common.measure({"a": "why", "b": Variant(lambda: None)}, "a", 1.0)
    assert all("empty" in row for row in found["rows"].values())


def test_mean():
    mean = common.mean_case([case(vps_cpp=1.0), case(vps_cpp=4.0)])
    assert mean["rows"]["vps cpp"]["ratio"] == pytest.approx(2.0)
    assert mean["rows"]["vps cuda"]["empty"].startswith("not here")
    mean = common.mean_case([case(vps_cpp=1.0), case()])
    assert mean["rows"]["vps cpp"]["empty"]


def test_files(tmp_path):
    path = write(tmp_path / "a.json", layer={"x": case(vps_cpp=1.1)}, block={})
    write(path, block={"y": case(base="plain")})
    found = results.read(path)
    assert set(found) == {"layer", "block"} and "y" in found["block"]["cases"]
    (tmp_path / "b.json").write_text('{"results": 1}')
    with pytest.raises(ValueError, match=r"b\.json is no result file"):
        results.read(tmp_path / "b.json")
    assert set(results.read_folder(tmp_path)) == {"a"}
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no result file"):
        results.read_folder(tmp_path)


def test_lines_show_the_noise_beside_every_ratio():
    text = list(results.lines(case(vps_cpp=1.1, noise=0.02)))
    line = next(line for line in text if "vps cpp" in line)
    assert "1.100× [1.089, 1.111]" in line and "(noise 0.980 to 1.020)" in line
    assert any("vps cuda" in line and "-- not here" in line for line in text)


def test_results_of_threads_that_spin_and_that_sleep_stay_apart(monkeypatch):
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    asleep = machine.name()
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert machine.name() == f"{asleep}-spinning"


def test_machine():
    facts = machine.facts()
    assert facts["torch"] and facts["commit"] and set(machine.COMPARED) <= set(facts)
    assert machine.clocks()["load"] >= 0
    assert machine.name() == machine.name().lower() and " " not in machine.name()


@pytest.mark.parametrize(
    ("new", "code", "text"),
    [
        ({"vps_cpp": 1.10}, 0, "0 worse"),
        ({"vps_cpp": 1.13}, 0, "0 worse"),  # inside the band of both runs, 1.02 · 1.02
        ({"vps_cpp": 1.20}, 1, "SLOWER layer: x: vps cpp: 1.1 to 1.2×"),
        ({"vps_cpp": 1.00}, 0, "better: x: vps cpp"),
    ],
)
def test_regress(tmp_path, new, code, text):
    old = write(tmp_path / "old.json", layer={"x": case(vps_cpp=1.10), "gone": case()})
    fresh = write(tmp_path / "new.json", layer={"x": case(**new)})
    run = execute("-m", "benchmarks.regress", old, fresh)
    assert run.returncode == code, run.stdout + run.stderr
    assert text in run.stdout
    assert "not measured now: gone: nn.Linear: not in the new file" in run.stdout


def test_regress_knows_bytes_and_wrong_results(tmp_path):
    old = results.case("plain", {"plain": {"bytes": 100}, "vps cpp": {"bytes": 100}})
    new = results.case("plain", {"plain": {"bytes": 100}, "vps cpp": {"bytes": 150}})
    slower, _ = regress.compare({"memory": section({"x": old})}, {"memory": section({"x": new})})
    assert slower == ["memory: x: vps cpp: 100 to 150 bytes, a factor of 1.500 (noise 1.010)"]
    wrong = case(vps_cpp=1.1)
    wrong["rows"]["vps cpp"] = results.empty("wrong: AssertionError")
    slower, _ = regress.compare(
        {"layer": section({"x": case(vps_cpp=1.1)})}, {"layer": section({"x": wrong})}
    )
    assert len(slower) == 1 and "wrong: AssertionError" in slower[0]
    with pytest.raises(ValueError, match="no section in common"):
        regress.compare({"a": section({})}, {"b": section({})})


def test_regress_refuses_other_machines(tmp_path):
    old = write(tmp_path / "old.json", layer={"x": case(vps_cpp=1.1)})
    new = write(tmp_path / "new.json", GPU, layer={"x": case(vps_cpp=2.0)})
    run = execute("-m", "benchmarks.regress", old, new)
    assert run.returncode == 2 and "different machines: gpu None and 'NVIDIA H200'" in run.stdout
    run = execute("-m", "benchmarks.regress", old, new, "--other-machine")
    assert run.returncode == 1


def test_ratios_table(tmp_path):
    """From a section, and from the command line for the cases that match."""
    cases = {"x": case(vps_cpp=1.1), "y": case(vps_torch=2.0)}
    text = results.ratios(section(cases), "")
    assert text.splitlines()[0] == "| | noise | vps cpp | vps torch |"
    assert "| x | 0.98 to 1.02 | 1.10 [1.09, 1.11] |  |" in text
    write(tmp_path / "a.json", layer=cases)
    run = execute("-m", "benchmarks.results", tmp_path, "x", "--variants", "vps cpp")
    assert run.stdout.splitlines()[-1] == "| x | 0.98 to 1.02 | 1.10 [1.09, 1.11] |", run.stderr


def filled(folder, machine):
    """A result file with something in every section."""
    kind = "gpu" if machine["gpu"] else "cpu"
    titles = {
        "cpu": ["geometric mean, N = 1, float32", "geometric mean, N = 32, float32"],
        "gpu": ["7 linears of Qwen2.5-7B, N = 1, bfloat16"],
    }[kind]
    path = write(
        folder / f"{kind}.json",
        machine,
        layer={title: case(vps_cpp=1.1, peft_lora=1.2) for title in titles},
        block={"block of Qwen2.5-7B, N = 1, bfloat16": case(base="plain", vps_cpp=0.9)},
        model={"M, prefill of 512 tokens, float32": case(base="plain", vps_torch=12.0)},
        memory={
            "forward, x": results.case(
                "plain", {"plain": {"bytes": 1}, "vps cpp": {"bytes": 2**20}}
            )
        },
    )
    points = [scaling.Point("over N at d = 512", "N", 512, 1, n, None) for n in (1, 4, 16)]
    cases = {p.title(): case(vps_cpp=1.3) | {"at": {**p._asdict(), "value": 1}} for p in points}
    for point in points:
        cases[point.title()]["at"]["value"] = point.value()
        cases[point.title()]["rows"][scaling.LIMIT] = {"ratio": 1.1, "modelled": True}
    results.save(path, "scaling", section(cases, machine))
    return path


def test_plot(tmp_path):
    filled(tmp_path, CPU)
    filled(tmp_path, GPU)
    run = execute("-m", "benchmarks.plot", tmp_path, "--out", tmp_path / "docs")
    assert run.returncode == 0, run.stderr
    made = {path.name for path in (tmp_path / "docs").iterdir()}
    assert made == {
        f"{name}-{kind}.png"
        for name in ("layer", "model", "scaling", "memory")
        for kind in ("cpu", "gpu")
    }
    assert all((tmp_path / "docs" / name).stat().st_size > 3000 for name in made)


def test_plot_draws_only_what_was_measured(tmp_path):
    write(tmp_path / "a.json", layer={"x": results.case("a", {"a": results.empty("no")})})
    assert plot.draw(results.merged(tmp_path, gpu=False), "cpu", tmp_path / "docs") == []


def test_tables(tmp_path):
    path = filled(tmp_path, CPU)
    results.save(path, "ops", section({}, CPU, peaks={"copy": 1e9}))
    everything.write_tables(path)
    text = path.with_suffix(".md").read_text()
    for part in ("## layer", "## ops", "| forward, x | 0.00 | 1.00 |", "1.10 [1.09"):
        assert part in text


def test_everything_saves_each_section_and_goes_on(tmp_path, monkeypatch):
    def run(name, seconds, model_dir):
        if name == "block":
            raise RuntimeError("no memory")
        wrong = results.case("a", {"a": results.empty("wrong: AssertionError: far off")})
        return section({name: wrong if name == "ops" else case()}, CPU, peaks={"copy": 1e9})

    monkeypatch.setattr(everything, "run", run)
    failed = everything.everything(tmp_path, 0.01, tmp_path, [])
    assert sorted(failed) == [
        "block: RuntimeError: no memory",
        "ops: a: wrong: AssertionError: far off",
    ]
    found = results.read(tmp_path / f"{machine.name()}.json")
    assert set(found) == {"ops", "memory", "layer", "model", "backward", "scaling"}
    assert (tmp_path / f"{machine.name()}.md").exists()
