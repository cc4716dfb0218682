"""A table as it is shown: means with standard errors, orderings judged by paired tests, in Markdown; and its figure."""

import math
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from mod.study.plots import BLUE, GREEN, ORANGE, PURPLE, VERMILION, save
from mod.study.tables import GOOD, PLACES, TABLES, VARIANTS, Table


def mean_error(known: list[float]) -> tuple[float, float]:
    """Mean and standard error; no error of a single value."""
    return statistics.mean(known), statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0


def mean_and_error(numbers: list[float | None]) -> str:
    """mean ± standard error; with the number of runs that count when some have no value."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "-"
    mean, error = mean_error(known)
    digits = 0 if max(known) > 10 else 3  # steps, or shares
    text = f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(known) > 1 else "")
    return text if len(known) == len(numbers) else f"{text} ({len(known)} of {len(numbers)})"


def judge(one: dict[str, float | None], other: dict[str, float | None]) -> str:
    """The difference of two variants in one measure, seed by seed: mean ± standard error (p of a paired t-test); bold
    when p is below 0.05, and then "reversed" when it is negative. Both map a seed to its value, or to None. No p is
    given for fewer than three seeds, nor when all differ alike, as at a ceiling."""
    seeds = [seed for seed in sorted(set(one) & set(other)) if one[seed] is not None and other[seed] is not None]
    gaps = [one[seed] - other[seed] for seed in seeds]
    if len(gaps) < 2:
        return "-"
    mean, error = mean_error(gaps)
    text = f"{mean:+.3f} ± {error:.3f}"
    if len(gaps) < 3 or error < 1e-9:
        return text
    p = float(ttest_rel([one[s] for s in seeds], [other[s] for s in seeds]).pvalue)
    return f"**{text} (p {p:.3f}{', reversed' if mean < 0 else ''})**" if p < 0.05 else f"{text} (p {p:.2f})"


def report(number: int, data: dict) -> str:
    """The table in Markdown, from what is in its JSON file; variants without a finished run are named and left out."""
    table, values = TABLES[number], data["values"]
    rows = [name for name in table.rows if name in values]
    seeds = {len(values[name]["narration"]) for name in rows}
    count = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    costs_too = " | FLOPs | KV cache | step time" if table.with_costs else ""
    legend = "; costs as a share of full computation" if table.with_costs else ""
    legend += f"; quality: an LM loss of {GOOD} nats" if "steps to quality" in table.columns else ""
    if "recall" in table.columns:
        legend += "; recall: sprite patches kept, mean over routed layers and training"
    lines = [
        f"**Table {number}. {table.title}.** Mean ± standard error over {count} seeds, {data['steps']} steps each, on "
        f"{data['clips']} validation clips{legend}.",
        "",
        "| | " + " | ".join(table.columns) + costs_too + " | seeds |",
        "|---" * (len(table.columns) + 2 + 3 * table.with_costs) + "|",
    ]
    for name in rows:
        cells = [f"`{name}` {VARIANTS[name].title}"]
        cells += [mean_and_error(list(values[name][measure].values())) for measure in table.columns]
        if table.with_costs:
            cost = data["costs"][name]
            cells += [f"{cost['flops']:.2f}", f"{cost['kv']:.2f}", f"{data['times'][name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {len(values[name]['narration'])} |")
    claims = [claim for claim in table.claims if claim[0] in values and claim[1] in values]
    tests = len(claims) * len(table.judged)
    lines += ["", "Orderings: difference, seed by seed (p of a paired t-test); bold where p < 0.05, as chance alone "
              f"makes about {0.05 * tests:.2g} of these {tests}; not bold is not a proof of equality:", "",
              "| ordering | who says so | " + " | ".join(table.judged) + " |",
              "|---" * (len(table.judged) + 2) + "|"]  # fmt: skip
    for better, worse, source in claims:
        gaps = [judge(values[better][measure], values[worse][measure]) for measure in table.judged]
        lines.append(f"| `{better}` > `{worse}` | {source} | " + " | ".join(gaps) + " |")
    if waiting := [name for name in table.rows if name not in values]:
        lines += ["", f"Not run yet: {', '.join(waiting)}."]
    return "\n".join(lines) + "\n"


def plot_quality(table: Table, data: dict, path: Path) -> None:
    """Tables 1 to 3: quality against cost, mean and standard error over seeds."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    colours = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, "grey"]
    for axis, measure in zip(figure.subplots(1, 3), ("free-running narration", "silence", "spark"), strict=True):
        for place, name in enumerate(name for name in table.rows if name in data["values"]):
            mean, error = mean_error(list(data["values"][name][measure].values()))
            aside = 0.008 * (place % 3 - 1)  # so that variants of equal cost do not hide each other
            axis.errorbar(data["costs"][name]["flops"] + aside, mean, error, capsize=3, label=name, linestyle="none",
                          marker="os^vD*XP<>h"[place % 11], color=colours[place % 6])  # fmt: skip
        axis.set(title=measure, xlabel="decoder FLOPs (share of full computation)",
                 ylabel="share right, mean ± standard error over seeds")  # fmt: skip
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(f"{table.title} (variants of equal cost are drawn side by side)")
    save(figure, path)


def plot_recall(results: dict, path: Path) -> None:
    """Table 4: the routers' recall over training, mean and range over seeds."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    styles = {"update": VERMILION, "mod": BLUE, "taught": GREEN, "random": "grey", "uniform": PURPLE, "oracle": ORANGE}
    for axis, everywhere in zip(figure.subplots(1, 2), (False, True), strict=True):
        for name, colour in styles.items():
            key = {"mod": "all"}.get(name, f"all-{name}") if everywhere else name
            if key not in results:
                continue  # not run yet, or no auxiliary target without a dense layer
            curves = [
                {point["step"]: statistics.mean(point["recall"].values()) for point in run["curve"] if "lm" in point}
                for run in results[key].values()
            ]
            steps = sorted(set.intersection(*(set(one) for one in curves)))
            columns = [[one[step] for one in curves] for step in steps]
            axis.plot(steps, list(map(statistics.mean, columns)), color=colour, label=f"{key} ({len(curves)} seeds)")
            axis.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.12)
        axis.set(title=f"Routers in {'all layers' if everywhere else 'layers 1 and 3'}: mean and range over seeds",
                 xlabel="training step", ylabel="sprite patches kept (share)", ylim=(-0.02, 1.05))  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    save(figure, path)


def plot_places(data: dict, path: Path) -> None:
    """Table 5: recall with the two gates, place by place."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axis = figure.subplots()
    for shift, gate, colour, marker in ((-0.12, "value", BLUE, "o"), (0.12, "update", VERMILION, "s")):
        for row, place in enumerate(PLACES):
            if f"{place}-{gate}" not in data["values"]:
                continue
            mean, error = mean_error(list(data["values"][f"{place}-{gate}"]["recall"].values()))
            axis.errorbar(mean, row + shift, xerr=error, capsize=3, color=colour, marker=marker,
                          label=f"{gate} gate" if row == 0 else None)  # fmt: skip
    axis.set_yticks(range(len(PLACES)), [place.title for place in PLACES.values()])
    axis.invert_yaxis()
    axis.set(title="What the routers keep: mean over layers and training, ± standard error over seeds",
             xlabel="sprite patches kept (share)", xlim=(-0.02, 1.05))  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
