"""``python -m tests.conformance DIR... [--json]``: replays recorded traces and prints the tally.

Exit code 0: nothing is unmatched; 1: something is; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from tests.conformance.deviations import RULES
from tests.conformance.runner import find, platform, replay_all


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description="Replay recorded traces.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="folders of traces, or trace files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rules", action="store_true", help="print the deviation rules and stop")
    parser.add_argument(
        "--platform",
        choices=("chip", "simple"),
        default="chip",
        help="chip: a flash image file and the engine (default); simple: slots in memory",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print every difference of an unmatched trace")
    given = parser.parse_args(arguments)
    if given.rules:
        for rule in RULES:
            print(f"{rule.id}: {rule.text}")
        return 0
    if not given.folders:
        parser.error("name at least one folder")
    missing = [str(folder) for folder in given.folders if not folder.exists()]
    if missing:
        parser.error(f"no such folder: {', '.join(missing)}")
    logging.getLogger("rmaker_ota").addHandler(logging.NullHandler())  # failures are what is replayed
    tally = replay_all(find(given.folders), platform(given.platform))
    if given.json:
        json.dump(tally.to_json(), sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        print("\n".join(f"matched       {name}" for name in tally.matched))
        print("\n".join(f"deviates      {name}: {', '.join(rules)}" for name, rules in tally.deviates.items()))
        print("\n".join(f"not replayed  {name}: {why}" for name, why in tally.not_replayed.items()))
        for name, why in tally.unmatched.items():
            print(f"UNMATCHED     {name}: {why}")
            if given.verbose:
                print("\n".join(f"              {line}" for line in tally.details.get(name, [])))
        for name, notes in tally.notes.items():
            print(f"note          {name}: the HTTP twin acted as the reference's client: {'; '.join(notes)}")
        print(", ".join(f"{count} {kind}" for kind, count in tally.counts.items()))
    return 1 if tally.unmatched else 0


if __name__ == "__main__":
    sys.exit(main())
