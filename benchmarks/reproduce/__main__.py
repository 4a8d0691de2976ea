"""Run the study of docs/reproduction.md and report: ``python -m benchmarks.reproduce``.

Killed and started again, it goes on where it was; what is finished is not run again. ``--quick``
runs a subset of ten minutes, ``--pilot`` the questions on which sizes were chosen, which the study
leaves out. ``--report`` runs nothing: it reports again what is finished in ``--out``, such as the
kept results in benchmarks/results/reproduction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vps
from benchmarks.reproduce import cells
from benchmarks.reproduce.report import write_report
from vps import VPSConfig
from vps.model.loading import load_model

OUT = Path(".cache/reproduce")
QUICK = Path(".cache/reproduce-quick")


def main() -> None:
    """Run what is not finished, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--out", type=Path, help=f"{OUT}, or {QUICK} of the subset")
    parser.add_argument("--quick", action="store_true", help="a subset of ten minutes")
    parser.add_argument("--pilot", action="store_true", help="the pilot alone")
    parser.add_argument("--report", action="store_true", help="report again, run nothing")
    parser.add_argument("--only", nargs="+", metavar="PART", help="those parts alone")
    given = parser.parse_args()
    out = given.out or (QUICK if given.quick else OUT)
    if given.report:
        print(write_report(out))
        return
    known = {"pilot": cells.pilot()} if given.pilot else cells.parts(given.quick)
    wrong = sorted(set(given.only or ()) - set(known))
    if wrong:
        parser.error(f"--only: no part {', '.join(wrong)}; expected {', '.join(known)}")
    model, tokenizer = load_model(given.model)
    vps.patch(model, VPSConfig())
    for name, part in known.items():
        if given.only is None or name in given.only:
            done = cells.run(part, model, tokenizer, given.model, out / name)
            print(f"{name}: {done.evaluated} cells, {done.skipped} before, {done.failed} failed")
    if not given.pilot:
        print(write_report(out))


if __name__ == "__main__":
    main()
