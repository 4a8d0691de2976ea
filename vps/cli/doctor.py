"""``vps doctor``: what this machine can run."""

import json
from dataclasses import dataclass

from vps.cli.options import Command, Json


@dataclass(kw_only=True)
class Doctor(Command):
    """Show versions, devices and backends of this machine."""

    as_json: Json = False

    def run(self) -> None:
        """Print the facts."""
        from vps.doctor import diagnose

        facts = diagnose()
        if self.as_json:
            print(json.dumps(facts, indent=2))
            return
        for section, entries in facts.items():
            print(section)
            width = max(14, *map(len, entries))
            for name, value in entries.items():
                print(f"  {name:<{width}} {value}")
