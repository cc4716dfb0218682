"""Does it hold on every seed? Train the default and what it is compared with on several seeds, and write one table.

    python -m mod.study.seeds                  # 5 seeds of each variant, two at a time; about an hour on two cores
    python -m mod.study.seeds --seeds 1        # one seed

Finished runs are kept in runs/seeds and never repeated; a run that was cut off is resumed. Writes results/seeds.json
and results/seeds.md, which is the README's table.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from mod.checkpoint import read_config, to_json, write_text
from mod.config import PRESETS, UserError
from mod.flags import Parser, run_script

VARIANTS = {  # title in the table: folder, what differs from the default model
    "MoD, value gate (the default)": ("value", {}),
    "full computation": ("full", {"layers": "none"}),
    "MoD, update gate (the paper's)": ("update", {"gate": "update"}),
}
COLUMNS = {
    "narration": ("narration_exact",),
    "questions": ("question_accuracy",),
    "speak": ("speak_accuracy",),
    "silence": ("silence_accuracy",),
    "free-running narration": ("free_running", "narration_exact"),
}
EARLY = 60  # step at which the routers' early recall is read off the log
RUNS, RESULTS = Path("runs/seeds"), Path("results")


def train_one(name: str, changes: dict, seed: int) -> dict:
    """Metrics of one run, trained on one core unless it is there already.

    Raises UserError when the folder holds a run with other settings, RuntimeError when training fails.
    """
    out, base = RUNS / f"{name}-{seed}", PRESETS["tiny"]
    wanted = replace(base, model=replace(base.model, **changes), train=replace(base.train, seed=seed))
    begun = (out / "config.json").is_file()
    if begun and read_config(out) != wanted:
        raise UserError(f"{out} holds a run with other settings than today's; move it away and start again")
    if not (out / "metrics.json").is_file():
        flags = [f"--seed={seed}", *(f"--{key.replace('_', '-')}={value}" for key, value in changes.items())]
        command = [sys.executable, "train_tiny.py", "--out", str(out), *(["--resume"] if begun else flags)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    early = next(entry for entry in entries if entry["kind"] == "train" and entry["step"] >= EARLY)
    return json.loads((out / "metrics.json").read_text(encoding="utf-8")) | {"recall_early": early["recall"]}


def pick(metrics: dict, path: tuple[str, ...]) -> float:
    for key in path:
        metrics = metrics[key]
    return metrics


def table(results: dict[str, list[dict]]) -> str:
    """Worst seed, mean and standard deviation of every column, as a Markdown table."""
    first = next(iter(results.values()))
    lines = [
        f"Worst of {len(first)} seeds (mean ± standard deviation) after {first[0]['steps']} steps, on unseen clips:",
        "",
        "| | " + " | ".join(COLUMNS) + f" | recall at step {EARLY} | recall at the end | decoder FLOPs | KV cache |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for title, runs in results.items():
        cells = []
        for path in COLUMNS.values():
            values = [pick(run, path) for run in runs]
            spread = f" ({statistics.mean(values):.3f} ± {statistics.stdev(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{min(values):.3f}{spread}")
        for key in ("recall_early", "recall"):
            recalls = [[run[key][layer] for run in runs] for layer in runs[0][key]]
            cells.append(", ".join(f"{min(values):.2f} to {max(values):.2f}" for values in recalls) or "-")
        cells += [f"{runs[0]['flop_ratio']:.2f}", f"{runs[0]['kv_ratio']:.2f}"]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(arguments) -> int:
    if arguments.seeds < 1 or arguments.jobs < 1:
        raise UserError(f"seeds and jobs must be at least 1, got {arguments.seeds} and {arguments.jobs}")
    jobs = [
        (title, name, changes, seed) for title, (name, changes) in VARIANTS.items() for seed in range(arguments.seeds)
    ]
    left = sum(not (RUNS / f"{name}-{seed}" / "metrics.json").is_file() for _, name, _, seed in jobs)
    print(f"{len(jobs)} runs, {left} of them still to train, {arguments.jobs} at a time, some minutes each")
    results: dict[str, list[dict]] = {title: [] for title in VARIANTS}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        metrics = pool.map(lambda job: train_one(*job[1:]), jobs)
        for (title, *_), one in zip(jobs, tqdm(metrics, total=len(jobs), unit="run", disable=None), strict=True):
            results[title].append(one)
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "seeds.json", to_json(results, indent=1) + "\n")
    write_text(RESULTS / "seeds.md", table(results))
    print(table(results))
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="mod.study.seeds", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this minus 1 (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (default: %(default)s)")
    return run_script(run, parser.parse_args(argv), "mod.study.seeds")


if __name__ == "__main__":
    sys.exit(main())
