"""What mod.study.bench measured, beside the formulas: Markdown tables and a figure."""

import statistics
from pathlib import Path

import torch
from matplotlib.figure import Figure

from mod.config import ModelConfig
from mod.study.costs import dense, frame_flops, kv_bytes
from mod.study.plots import BLUE, ORANGE, VERMILION, save


def straightness(points: list[dict], name: str) -> float:
    """How far, at most, a model's latencies lie from one straight line in the context, as a share of the latency."""
    contexts, seconds = [p["context"] for p in points], [p["seconds"][name] for p in points]
    slope, start = statistics.linear_regression(contexts, seconds)
    return max(abs(start + slope * c - s) / s for c, s in zip(contexts, seconds, strict=True))


def two_digits(part: dict, *keys: str) -> list[str]:
    """These entries of `part`; "-" for one that was not measured."""
    return [f"{part[key]:.2f}" if key in part else "-" for key in keys]


def report(results: dict) -> str:
    """The results as Markdown tables."""
    lines = [f"{results['device']}, {results['dtype']}{', compiled' if results['compile'] else ''}, "
             f"torch {results['torch']}, threads: {results['threads']}. Ratios are MoD / full computation.", "",
             "| decoder | tokens of a step | step time | its FLOPs | peak memory | saved activations (formula) | "
             "our full step / transformers' Llama |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, size in results["sizes"].items():
        step, memory = size["training"], size["memory"] or {}
        cells = [name, f"{step['rows']} × {step['tokens']}", *two_digits(step, "time_ratio", "flop_ratio")]
        cells += two_digits(memory, "peak_ratio", "saved_ratio") + two_digits(step, "ours_to_transformers")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| decoder | context, tokens | time of one more frame | its FLOPs | KV bytes | "
              "transformers' dense Llama, dynamic cache: its time / full | its time / MoD |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, size in results["sizes"].items():
        for point in size["streaming"]:
            cells = [name, f"{point['context']:,}", *two_digits(point, "time_ratio", "flop_ratio")]
            cells += [f"{point['kv_bytes']['mod'] / point['kv_bytes']['full']:.3f}"]
            cells += two_digits(point, "transformers_to_full", "transformers_to_mod")
            lines.append(f"| {' | '.join(cells)} |")
    points = list(results["sizes"].values())[-1]["streaming"]
    if len(points) > 2:
        bend = {name: f"{straightness(points, name):.0%}" for name in ("mod", "full")}
        off = f"at most {bend['mod']} (MoD) and {bend['full']} (full)"
        lines += ["", f"Latency of the largest decoder is a straight line in the context, but for {off}."]
        lines += ["Each ratio is a median over turns of its own."]
    mib, frames = results["filled"]["budget_bytes"] / 2**20, results["filled"]["frames"]
    held = f"{frames['mod']} frames with MoD, {frames['full']} with full computation"
    lines += ["", f"A cache of {mib:.0f} MiB holds {held}: {results['filled']['ratio']:.2f} times as many."]
    return "\n".join(lines) + "\n"


def plot_steps(axis, sizes: dict[str, dict]) -> None:
    """Time and peak memory of a training step on one axis, every size."""
    bars = []  # label, measured, promised
    for name, size in sizes.items():
        step, memory = size["training"], size["memory"]
        bars.append((f"{name}\nstep time", step["time_ratio"], step["flop_ratio"]))
        if memory:
            bars.append((f"{name}\npeak memory", memory["peak_ratio"], memory["saved_ratio"]))
    labels, measured, promised = zip(*bars, strict=True)
    axis.bar(range(len(bars)), measured, color=BLUE, label="measured")
    axis.plot(range(len(bars)), promised, "_", color=VERMILION, markersize=28, markeredgewidth=2.5,
              label="formula: FLOPs, saved activations")  # fmt: skip
    axis.set_xticks(range(len(bars)), labels, fontsize=7, rotation=30)
    axis.set(title="A training step, MoD / full computation", ylabel="ratio", ylim=(0, 1.1))


def plot(results: dict, path: Path) -> None:
    """Training steps of all sizes; for the largest, measured latency and cache on the formula's lines."""
    name, size = list(results["sizes"].items())[-1]
    config, number_bytes = ModelConfig(**size["model"]), getattr(torch, results["dtype"]).itemsize
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    step, latency, cache = figure.subplots(1, 3)
    plot_steps(step, results["sizes"])
    contexts = [point["context"] for point in size["streaming"]]
    line = [contexts[-1] * i / 40 for i in range(1, 41)]
    largest = size["streaming"][-1]
    pace = largest["seconds"]["full"] / largest["flops"]["full"]
    for key, variant, colour in (("full", dense(config), ORANGE), ("mod", config, BLUE)):
        frames = [round(tokens / config.frame_tokens) for tokens in line]
        latency.plot(line, [1e3 * pace * frame_flops(variant, n, 0) for n in frames], color=colour, alpha=0.7,
                     label=f"{key}: its FLOPs at full computation's pace")  # fmt: skip
        latency.plot(contexts, [1e3 * point["seconds"][key] for point in size["streaming"]], "o", color=colour,
                     label=f"{key}: measured")  # fmt: skip
        held = [kv_bytes(variant, n, 0, number_bytes) / 2**20 for n in frames]
        cache.plot(line, held, color=colour, label=f"{key}: formula")
        cache.plot(contexts, [point["kv_bytes"][key] / 2**20 for point in size["streaming"]], "o", color=colour,
                   label=f"{key}: the real tensors")  # fmt: skip
    latency.set(title=f"One more frame ({name})", xlabel="context, tokens of full computation", ylabel="time (ms)")
    cache.set(title=f"KV cache ({name})", xlabel="context, tokens of full computation", ylabel="keys and values (MiB)")
    for axis in (step, latency, cache):
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, loc="upper right" if axis is step else "upper left", markerscale=0.5)
    save(figure, path)
