#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.Generator().manual_seed takes a 64-bit seed and uses its low 32 bits. The documentation names
# the range [-2^63, 2^64 - 1]; two seeds that differ only above bit 31 give the same numbers, and initial_seed() still
# tells them apart. So seeds made as (run << 32) + step are the same for every run.
# Seen: seeds 7 and 7 + 2^32: same numbers True, initial_seed 7 and 4294967303; seeds 7 and 8: same numbers False
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.4.6
"$work/venv/bin/pip" install -q torch==2.13.0
"$work/venv/bin/python" - <<'PY'
import torch

def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return generator.initial_seed(), torch.rand(8, generator=generator)

(a, first), (b, second), (_, other) = draw(7), draw(7 + 2**32), draw(8)
same, different = torch.equal(first, second), not torch.equal(first, other)
print(f"torch {torch.__version__}: seeds 7 and 7 + 2^32: same numbers {same}, initial_seed {a} and {b}; "
      f"seeds 7 and 8: same numbers {not different}")
raise SystemExit(0 if same and different and a != b else 1)
PY
