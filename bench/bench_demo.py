"""`qlorag demo` as a user runs it: how long it takes, what it needs, and whether it still tells its story.

    python bench/bench_demo.py [--json FILE]

Everything but the wall time is the demo's own account (`qlorag demo --json`). Exits with 1 if an answer is not the
one that training or the documents should have brought.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import child


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "qlorag.recipes.cli", "demo", "--out", f"{folder}/demo", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=child.environment(child.default_threads()))
        seconds = time.perf_counter() - began
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return 1
    told = json.loads(done.stdout)
    told.pop("out")
    told["training"].pop("adapter_path")
    told["seconds"] = seconds
    right = (
        told["after"] == told["fused"] == "A software developer from Cyprus" and "developer" in told["with_documents"]
    )
    print(f"{seconds:.0f} s, {told['training']['tokens_per_second']:.0f} tokens/s in training")
    for name in ("before", "after", "fused", "kept_after", "alone", "with_documents"):
        print(f"  {name:15} {' '.join(told[name].split())[:90]}")
    if args.json:
        child.write_json(args.json, told)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
