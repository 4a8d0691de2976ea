"""``vps doctor``: versions, devices and backends of this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor", parents=[common], help="versions, devices and backends of this machine"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the facts."""
    from vps.doctor import diagnose

    facts = diagnose()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for section, entries in facts.items():
        print(section)
        width = max(14, *map(len, entries))
        for name, value in entries.items():
            print(f"  {name:<{width}} {value}")
