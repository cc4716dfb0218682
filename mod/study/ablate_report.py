"""A table as it is shown: means with standard errors, orderings judged by paired tests, in Markdown; and its figure."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import ttest_rel

from mod.live.picture import BLUE, GREEN, ORANGE, VERMILION, save
from mod.study.common import PURPLE, markdown
from mod.study.tables import GOOD, PLACES, TABLES, VARIANTS, Table

Values = dict[str, float | None]  # of one measure: seed -> value


def mean_error(values: Values) -> tuple[float, float]:
    """Mean and standard error of the values that are there; no error of a single one."""
    known = pd.Series(values, dtype=float).dropna()
    return known.mean(), known.sem() if len(known) > 1 else 0.0


def mean_and_error(values: Values) -> str:
    """mean ± standard error; with the number of runs that count when some have no value."""
    known = pd.Series(values, dtype=float).dropna()
    if known.empty:
        return "-"
    (mean, error), digits = mean_error(values), 0 if known.max() > 10 else 3  # steps, or shares
    text = f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(known) > 1 else "")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def judge(one: Values, other: Values) -> str:
    """The difference of two variants in one measure, seed by seed: mean ± standard error (p of a paired t-test); bold
    when p is below 0.05, and then "reversed" when it is negative. No p is given for fewer than three seeds, nor when
    all differ alike, as at a ceiling."""
    pairs = pd.DataFrame({"one": one, "other": other}, dtype=float).dropna()
    gaps = pairs["one"] - pairs["other"]
    if len(gaps) < 2:
        return "-"
    text = f"{gaps.mean():+.3f} ± {gaps.sem():.3f}"
    if len(gaps) < 3 or gaps.sem() < 1e-9:
        return text
    p = ttest_rel(pairs["one"], pairs["other"]).pvalue
    return f"**{text} (p {p:.3f}{', reversed' if gaps.mean() < 0 else ''})**" if p < 0.05 else f"{text} (p {p:.2f})"


def means(values: dict[str, dict[str, Values]], rows: dict[str, str], columns: Sequence[str]) -> pd.DataFrame:
    """Mean and error of every variant in every measure: one row for each of `rows` (name -> what it is called)."""
    cells = [[mean_and_error(values[name][column]) for column in columns] for name in rows]
    return pd.DataFrame(cells, index=list(rows.values()), columns=list(columns))


def number_of_seeds(values: dict[str, dict[str, Values]]) -> str:
    """How many runs stand behind a table's rows."""
    seeds = {len(found["narration"]) for found in values.values()}
    return f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"


def report(number: int, data: dict) -> str:
    """The table in Markdown, from what is in its JSON file; variants without a finished run are named and left out."""
    table = TABLES[number]
    values = {name: data["values"][name] for name in table.rows if name in data["values"]}
    rows = means(values, {name: f"`{name}` {VARIANTS[name].title}" for name in values}, table.columns)
    legend = ""
    if table.with_costs:
        legend += "; costs as a share of full computation"
        for column, key in (("FLOPs", "flops"), ("KV cache", "kv")):
            rows[column] = [f"{data['costs'][name][key]:.2f}" for name in values]
        rows["step time"] = [f"{data['times'][name]:.2f}" for name in values]
    if "steps to quality" in table.columns:
        legend += f"; quality: an LM loss of {GOOD} nats"
    if "recall" in table.columns:
        legend += "; recall: sprite patches kept, mean over routed layers and training"
    rows["seeds"] = [str(len(found["narration"])) for found in values.values()]
    claims = [claim for claim in table.claims if claim[0] in values and claim[1] in values]
    gaps = {f"`{better}` > `{worse}`": {"who says so": source} | {
                measure: judge(values[better][measure], values[worse][measure]) for measure in table.judged}
            for better, worse, source in claims}
    orderings = pd.DataFrame.from_dict(gaps, orient="index").rename_axis("ordering")
    tests, waiting = len(claims) * len(table.judged), [name for name in table.rows if name not in values]
    parts = [
        f"**Table {number}. {table.title}.** Mean ± standard error over {number_of_seeds(values)} seeds, "
        f"{data['steps']} steps each, on {data['clips']} validation clips{legend}.\n",
        markdown(rows),
        f"Orderings: difference, seed by seed (p of a paired t-test); bold where p < 0.05, as chance alone makes about "
        f"{0.05 * tests:.2g} of these {tests}; not bold is not a proof of equality:\n",
        markdown(orderings),
    ]
    return "\n".join([*parts, f"Not run yet: {', '.join(waiting)}.\n"] if waiting else parts)


def plot_quality(table: Table, data: dict, path: Path) -> None:
    """Tables 1 to 3: quality against cost, mean and standard error over seeds."""
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    colours = [BLUE, VERMILION, GREEN, ORANGE, PURPLE, "grey"]
    for axis, measure in zip(figure.subplots(1, 3), ("free-running narration", "silence", "spark"), strict=True):
        for place, name in enumerate(name for name in table.rows if name in data["values"]):
            mean, error = mean_error(data["values"][name][measure])
            aside = 0.008 * (place % 3 - 1)  # so that variants of equal cost do not hide each other
            axis.errorbar(data["costs"][name]["flops"] + aside, mean, error, capsize=3, label=name, linestyle="none",
                          marker="os^vD*XP<>h"[place % 11], color=colours[place % 6])
        axis.set(title=measure, xlabel="decoder FLOPs (share of full computation)",
                 ylabel="share right, mean ± standard error over seeds")
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
            points = pd.DataFrame([{"seed": seed, "step": point["step"]} | point["recall"]
                                   for seed, run in results[key].items() for point in run["curve"] if "lm" in point])
            layers = points.set_index(["step", "seed"]).mean(axis=1).unstack("seed").dropna()
            axis.plot(layers.index, layers.mean(axis=1), color=colour, label=f"{key} ({layers.shape[1]} seeds)")
            axis.fill_between(layers.index, layers.min(axis=1), layers.max(axis=1), color=colour, alpha=0.12)
        axis.set(title=f"Routers in {'all layers' if everywhere else 'layers 1 and 3'}: mean and range over seeds",
                 xlabel="training step", ylabel="sprite patches kept (share)", ylim=(-0.02, 1.05))
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
            mean, error = mean_error(data["values"][f"{place}-{gate}"]["recall"])
            axis.errorbar(mean, row + shift, xerr=error, capsize=3, color=colour, marker=marker,
                          label=f"{gate} gate" if row == 0 else None)
    axis.set_yticks(range(len(PLACES)), [place.title for place in PLACES.values()])
    axis.invert_yaxis()
    axis.set(title="What the routers keep: mean over layers and training, ± standard error over seeds",
             xlabel="sprite patches kept (share)", xlim=(-0.02, 1.05))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
