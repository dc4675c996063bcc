"""Every benchmark in turn, each in a process of its own; all results in one file, the headlines in one table.

    python -m bench.run_all [--only train nf4] [--json bench/results.json]

A benchmark is a file bench_NAME.py beside this one that writes its results where --json says; there is no other
registry. Each chooses its own number of threads and states it. One that fails is named, the others still run, and the
exit status is 1.

The file holds what this run measured and nothing older: {"date", "commit", "machine", "results": {NAME: ...},
"failed": [...]}. Run it on a machine that does nothing else; the load at the start is recorded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # under -m, the folder of this file is not where its neighbours are looked for

from harness import child, hardware  # noqa: E402
from harness.summary import Headline, headlines  # noqa: E402


def run(name: str) -> tuple[dict[str, Any] | None, bool]:
    """What bench_NAME.py found (None: it wrote nothing), and whether it ended well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / f"bench_{name}.py"), "--json", str(path)]
        began = time.perf_counter()
        done = subprocess.run(command, env=child.environment(child.default_threads()))
        if not path.exists():
            return None, False
        result: dict[str, Any] = json.loads(path.read_text())
        return result | {"seconds": time.perf_counter() - began}, done.returncode == 0


def commit() -> str | None:
    """The commit checked out, marked if files differ from it; None where there is no git."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--abbrev=12", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    names = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all of them")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    machine = hardware.machine(child.default_threads())
    collected: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine,
        "results": {},
        "failed": [],
    }
    table: list[Headline] = []
    for name in args.only:
        print(f"\n=== {name}", flush=True)
        result, well = run(name)
        if result is not None:
            collected["results"][name] = result
            table += headlines(name, result)
        if not well:
            collected["failed"].append(name)
        if args.json:  # after each, so that an interrupted run keeps what it measured
            child.write_json(args.json, collected)
    print(f"\n=== summary\n{hardware.heading(machine)}")
    print(f"{'':46} {'ours':>10} {'beside':>10} {'ratio':>8} {'of limit':>9}")
    print("\n".join(headline.line() for headline in table))
    if collected["failed"]:
        print(f"failed: {', '.join(collected['failed'])}: see above")
    return 1 if collected["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
