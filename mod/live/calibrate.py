"""When to speak: how talkative a trained run is at every threshold, how often rightly, and which threshold is best.

`python stream_tiny.py --calibrate` sweeps the threshold over validation streams, free-running: what the model says at
one threshold is the context of its next decision. It writes calibration.json, from which a live stream takes its
default from then on, and calibration.png into the run's folder.

Read next: watch.py
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from tqdm import tqdm

from mod.config import UserError
from mod.data import Clip
from mod.evaluate import free_running
from mod.layout import Vocabulary
from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.live.saved import fingerprint
from mod.run import to_json, write_text
from mod.videollm import VideoLLM

THRESHOLDS = (0.01, 0.02, 0.05, *(number / 10 for number in range(1, 10)), 0.95, 0.98, 0.99)
AS_GOOD = 0.002  # of F1: thresholds that are this close to the best count as equally good


def counts(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], threshold: float, max_words: int) -> dict:
    """What free-running does at a threshold, in frames at which a decision is judged (not before a user's question).

    talkative  share of frames at which it spoke      due  frames at which it should have
    missed     share of due frames that were silent   false  share of the other frames at which it spoke
    f1         of speaking at exactly the due frames: harmonic mean of precision and recall
    """
    streams, silent = free_running(model, words, clips, threshold, max_words=max_words)
    timed = [turn for turns in streams for turn in turns if turn.timed]
    on_time, due, quiet = sum(turn.spoke[-1] for turn in timed), len(timed), len(silent)
    false = quiet - sum(silent)
    return {
        "threshold": threshold,
        "talkative": (on_time + false) / max(1, due + quiet),
        "missed": (due - on_time) / max(1, due),
        "false": false / max(1, quiet),
        "f1": 2 * on_time / max(1, due + on_time + false),
        "due": due,
        "frames": due + quiet,
    }


def best(rows: Sequence[dict]) -> float:
    """The middle one of the thresholds whose F1 is as good as the best: far from where it falls on either side."""
    most = max(row["f1"] for row in rows)
    return statistics.median_low(row["threshold"] for row in rows if row["f1"] >= most - AS_GOOD)


def sweep(model: VideoLLM, words: Vocabulary, clips: Sequence[Clip], max_words: int) -> dict:
    rows = [counts(model, words, clips, threshold, max_words)
            for threshold in tqdm(THRESHOLDS, unit="threshold", leave=False, disable=None)]
    return {"threshold": best(rows), "clips": len(clips), "rows": rows}


def table(result: dict) -> str:
    """The sweep for people."""
    lines = [f"{'threshold':>9} {'talkative':>10} {'missed':>8} {'false':>8} {'timing F1':>10}"]
    for row in result["rows"]:
        mark = "  <- the default from now on" if row["threshold"] == result["threshold"] else ""
        values = f"{row['talkative']:>10.3f} {row['missed']:>8.3f} {row['false']:>8.3f} {row['f1']:>10.3f}"
        lines.append(f"{row['threshold']:>9.2f} {values}{mark}")
    return "\n".join(lines)


def draw(result: dict) -> Figure:
    rows = result["rows"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    styles = {
        "f1": ("timing F1", BLUE, "o-"),
        "missed": ("missed narrations", VERMILION, "v--"),
        "false": ("false narrations", ORANGE, "^:"),
        "talkative": ("frames at which it spoke", GREEN, "s-."),
    }
    for name, (label, colour, style) in styles.items():
        axis.plot([row["threshold"] for row in rows], [row[name] for row in rows], style, color=colour, label=label,
                  markersize=4)
    due = rows[0]["due"] / max(1, rows[0]["frames"])
    axis.axhline(due, color="grey", linewidth=1, label="frames at which it should have")
    axis.axvline(result["threshold"], color="black", linewidth=1, label=f"calibrated: {result['threshold']:g}")
    axis.set(title="When to speak, free-running on validation streams", ylim=(-0.02, 1.02), ylabel="share",
             xlabel="threshold on the probability of silence")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0.9))  # where no curve goes
    return figure


def write(result: dict, folder: Path) -> None:
    write_text(folder / "calibration.json", to_json(result | {"run": fingerprint(folder)}, indent=1) + "\n")
    save(draw(result), folder / "calibration.png")


def calibrated(folder: Path) -> float | None:
    """The threshold that a run was calibrated to, if it was; not that of other weights, which were there before.

    Raises UserError when the file is damaged.
    """
    path = folder / "calibration.json"
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        threshold, run = float(held["threshold"]), held["run"]
        if not 0 <= threshold <= 1:
            raise ValueError
        return threshold if run == fingerprint(folder) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path} is no calibration; write it anew with --calibrate or pass --threshold") from None
