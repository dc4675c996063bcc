"""One measurement in a process of its own, and what it found.

    child.run(__file__, Job("load", {"folder": "DIR"}), threads=2)  ->  the dict that load(folder="DIR") returned,
                                                                        with "peak_rss_mib" added

A file whose jobs are run this way calls `child.serve(load, ...)` before its own `main()`. A process for each
measurement means that no library's imports, allocations or threads stand in another's figures.

Peak memory is VmHWM of the child, not ru_maxrss: Linux hands the latter down through fork and exec, so that a child
of a process that once held 800 MiB reports 800 MiB whatever it does itself.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ANSWER = "ANSWER "  # before the line that is the result: libraries print too

# What qlorag.recipes.training.memory sets from within, for libraries that do not: freed memory is kept
# for the next tensor, instead of being returned to the kernel and faulted in again page by page.
TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(32 * 2**20),
}

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# Set for one machine, these would make the figures another machine's.
_CLEARED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", *TUNED_MALLOC)


@dataclass(frozen=True, eq=False)
class Job:
    """A function that a script serves, its arguments, and the variables its process gets besides."""

    name: str
    arguments: Mapping[str, Any]
    env: Mapping[str, str] = field(default_factory=dict)


def environment(threads: int, extra: Mapping[str, str] = {}) -> dict[str, str]:
    """The variables of a measuring process: the user's own, less those that tune it unasked."""
    kept = {name: value for name, value in os.environ.items() if name not in _CLEARED}
    return kept | _QUIET | {"OMP_NUM_THREADS": str(threads), **extra}


def run(script: str, job: Job, *, threads: int) -> dict[str, Any]:
    """The job's answer.

    Raises SystemExit: the process failed; its last lines are in the message.
    """
    command = [sys.executable, script, "--job", job.name, json.dumps(job.arguments, default=str)]
    done = subprocess.run(command, env=environment(threads, job.env), capture_output=True, text=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if done.returncode or not answers:
        raise SystemExit(f"{job.name} failed with status {done.returncode}:\n" + done.stderr[-2000:])
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(_ANSWER))
    return answer


def run_rounds(script: str, jobs: Mapping[str, Job], *, rounds: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Every job's answers, one per round; each round begins with another job, so that drift favours none."""
    names = list(jobs)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
            answers[name].append(run(script, jobs[name], threads=threads))
    return answers


def serve(*jobs: Callable[..., dict[str, Any]]) -> None:
    """If this process was started by `run`, do the job, print the answer and end; otherwise nothing."""
    if sys.argv[1:2] != ["--job"]:
        return
    name, arguments = sys.argv[2:]
    answer = {job.__name__: job for job in jobs}[name](**json.loads(arguments))
    print(_ANSWER + json.dumps(answer | {"peak_rss_mib": peak_rss_bytes() / 2**20}))
    sys.exit()


def peak_rss_bytes() -> int:
    """The most memory this process, since its exec, has held resident."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes, and not handed down
    return peak if sys.platform == "darwin" else peak * 1024


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, else the processors this process may use."""
    if wanted := os.environ.get("OMP_NUM_THREADS"):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pulled(name: str) -> Path:
    """The folder of a model that `qlorag pull` knows, fetched if need be."""
    command = [sys.executable, "-m", "qlorag.recipes.cli", "pull", name, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return Path(json.loads(done.stdout)["folder"])


def write_json(path: Path, value: Any) -> None:
    """`value` in `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
