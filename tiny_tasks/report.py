"""Tables and pictures of a run of dopd.py, from its metrics.jsonl.

    python tiny_tasks/report.py [runs/NAME]        # without a folder: the newest run

Prints and writes report.md (what was tested), tokens.svg (completions, every token with its
regime), curves.png (the students on the way) and router.png (where the tokens go).
"""

import argparse
import itertools
import json
import os
import shlex
import sys
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # that of a notebook may not be there

import pandas
import transformers
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside dopd.py
import dopd  # noqa: E402

REGIMES = {
    "LH": ("#8fd18f", "LH: low gap, high sum"),
    "LL": ("#c8c8c8", "LL: low gap, low sum"),
    "HT": ("#8ab8f5", "HT: high gap, teacher surer"),
    "HS": ("#ffb061", "HS: high gap, student surer"),
}
OTHER_COLOURS = ["#e3b7e8", "#f2e58f", "#9fdede", "#f2a6a6", "#d2b48c"]
RECIPE_COLOURS = ["#555555", "#c2185b", "#00695c", "#5e35b1", "#795548", "#9e9d24"]
COLUMNS = """
- exact match: share of right completions that ended by themselves, sampled without the hint
- with the hint: the same, when the policy may read the hint
- skips (tiny tasks): share of completions that leave out the steps, and write only the last value
- ended (own data): share of completions that ended by themselves, not at --max_new_tokens. If it is
  low: raise it, or check the end tokens in the generation_config.json of both models
- entropy: of the prediction of the next token, in nats; near 0 the policy is sure of everything

What to look for: does a student end above `opd`, whose teacher reads no hint? Does it skip like the
teacher with the hint? Then it has copied a habit that only the hint explains.
"""


def read_run(folder: Path) -> tuple[dict, list[dict], list[dict]]:
    """The flags of a run, what was tested, and its training steps."""
    try:
        lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = json.loads(Path(folder, "config.json").read_text())
    except OSError as error:
        print(f"report.py: no run in {folder}: {error}", file=sys.stderr)
        sys.exit(2)
    log = [json.loads(line) for line in lines]
    tested, steps = [row for row in log if "tested" in row], [row for row in log if "step" in row]
    if "teacher, with the hint" not in [row["tested"] for row in tested]:
        print(f"report.py: {folder}: the run ended before its first tests", file=sys.stderr)
        sys.exit(2)
    return config, tested, steps


def colours_of(regimes) -> dict[str, str]:
    """The paper's regimes have fixed colours; those of another router get the next ones."""
    spare = itertools.cycle(OTHER_COLOURS)
    return {name: REGIMES[name][0] if name in REGIMES else next(spare) for name in regimes}


def habit_of(grades: dict) -> str:
    """The grade beside exact match: `skips` of a task that knows it."""
    return "skips" if "skips" in grades["teacher"] else "ended"


def result_tables(tested: list[dict], recipes: list[str]) -> list[Table]:
    """Policies that are tested as they are, then the students."""
    grades = {row["tested"]: row["test"] for row in tested}
    before = ["student before", "teacher", "teacher, with the hint"]
    after = [name for name in recipes if name in grades]
    habit = habit_of(grades)
    tables = []
    for head, names in (("tested as it is", before), ("student trained with", after)):
        columns = ("exact match", "with the hint", habit, "entropy")
        table = Table(head, *columns, box=box.MARKDOWN)
        for name in names:
            hinted = grades.get(f"{name}, with the hint", {})
            cells = {**grades[name], "with the hint": hinted.get("exact match")}
            table.add_row(name, *[number(cells.get(column)) for column in columns])
        tables.append(table)
    return tables


def command_of(config: dict) -> str:
    """The script, and the flags that are not the defaults."""
    known = config["task"] in dopd.TASKS and {*config["recipe"]} <= {*dopd.RECIPES}
    script = "dopd.py" if known else "(the script that adds this recipe or task)"
    flags = []
    for name, value in vars(dopd.Config(**config)).items():
        if value != getattr(dopd.Config, name) and name != "out":
            flags.append(f"--{name}")
            flags += [str(each) for each in (value if isinstance(value, list) else [value])]
    return f"python {script} {shlex.join(flags)}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def task_of(config: dict):
    """None for a task of another script."""
    if config["data"]:
        return dopd.OwnData(dopd.Config(**config))
    return dopd.TASKS.get(config["task"])


def visible(text: str) -> str:
    """Line ends and control characters, which an SVG cannot hold, as Python writes them."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def judge(example: dict, task, tokenizer) -> str:
    """Is the completion right?"""
    if task is None:
        return "not graded: its script has the task"
    if tokenizer.decode(example["ids"][-1:], skip_special_tokens=True):
        return "wrong: it was cut off"
    text = tokenizer.decode(example["ids"], skip_special_tokens=True)
    right = task.grade(example, text).get("exact match")
    return {True: "right", False: "wrong"}.get(right, "not graded: it needs a guess")


def print_rollout(example: dict, verdict: str, tokenizer, colours: dict, console, wide=10) -> None:
    """The tokens in the colours of their regimes, with its letters, and their probabilities."""
    line = Text()
    for key in ("prompt", "hint", "answer"):
        line.append(f"{key} {example[key]!r}  ")
    line.append(verdict, "bold")
    console.print()
    console.print(line)
    short = {"privileged_teacher": "q_T", "privileged_student": "q_S"}
    policies = [key for key in example if isinstance(example[key], list)]
    policies = [key for key in policies if key not in ("ids", "regimes")]
    rows = {"token": [visible(tokenizer.decode([token])) for token in example["ids"]]}
    rows["regime"] = example["regimes"]
    for policy in policies:
        rows[short.get(policy, policy)] = [f"{q:.2f}" for q in example[policy]]
    for start in range(0, min(len(example["ids"]), 4 * wide), wide):
        grid = Table.grid(padding=(0, 1))
        for head, cells in rows.items():
            line = []
            for cell, regime in list(zip(cells, example["regimes"], strict=True))[start:][:wide]:
                style = f"black on {colours[regime]}" if regime in colours else ""
                line.append(Text(f"{cell:^6}", style if head in ("token", "regime") else ""))
            grid.add_row(f"{head:>6}", *line)
        console.print(grid)


def print_tokens(steps: list[dict], config: dict, folder: Path) -> None:
    """The first and the last step of every recipe."""
    console, task = Console(record=True, width=90), task_of(config)
    for _, group in itertools.groupby(steps, key=lambda row: row["recipe"]):
        own = list(group)
        path = Path(folder, own[0]["recipe"])
        tokenizer = transformers.AutoTokenizer.from_pretrained(path if path.exists() else folder)
        colours = colours_of(own[0]["regime_share"])
        shown = [own[0], own[-1]] if len(own) > 1 else own
        for row in shown:
            title = Text(f"\n{row['recipe']}, step {row['step']}: what the student wrote ")
            for regime, colour in colours.items():
                title.append(f" {regime} ", f"black on {colour}")
            console.print(title)
            for example in row["rollouts"]:
                verdict = judge(example, task, tokenizer)
                print_rollout(example, verdict, tokenizer, colours, console)
    console.save_svg(f"{folder}/tokens.svg", title="every token in its regime")


def label_of(regime: str) -> str:
    return REGIMES[regime][1] if regime in REGIMES else regime


def plot_curves(tested: list[dict], steps: list[dict], file: Path) -> None:
    """Exact match, skips (or ended) and entropy of the students on the way."""
    grades = {row["tested"]: row["test"] for row in tested}
    shares = ("exact match", habit_of(grades))
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    names = dict.fromkeys(row["recipe"] for row in steps)
    for name, colour in zip(names, itertools.cycle(RECIPE_COLOURS), strict=False):
        own = [row for row in steps if row["recipe"] == name]
        for axis, grade in zip(axes, shares, strict=False):
            points = {0: grades["student before"].get(grade)}
            for row in own:
                if "validation" in row:
                    points[row["step"]] = row["validation"].get(grade)
            if None not in points.values():
                axis.plot([*points], [*points.values()], ".-", color=colour, label=name)
        entropy = pandas.Series([row["entropy"] for row in own], [row["step"] for row in own])
        axes[2].plot(entropy.rolling(10, min_periods=1).mean(), color=colour, label=name)
    for axis, grade in zip(axes, shares, strict=False):
        for name, style in (("teacher", "--"), ("teacher, with the hint", ":")):
            if grade in grades[name]:
                axis.axhline(grades[name][grade], color="black", linestyle=style, label=name)
        axis.set(title=f"{grade}, without the hint", xlabel="step", ylabel="share", ylim=(0, 1))
    axes[2].set(title="entropy of the student, mean of 10 steps", xlabel="step", ylabel="nats")
    axes[2].set_ylim(0, 1.1 * max(row["entropy"] for row in steps) + 0.01)
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6)
    figure.savefig(file, dpi=80)


def plot_router(steps: list[dict], file: Path) -> None:
    """For every recipe: the shares of the regimes. If its router read both privileged policies:
    every shown token at (q_S, q_T), in the first and the last quarter of the training."""
    names = dict.fromkeys(row["recipe"] for row in steps)
    figure = Figure(figsize=(14, 4.4 * len(names) + 0.4), layout="constrained")
    axes, handles = figure.subplots(len(names), 3, squeeze=False), {}
    for row_of_axes, name in zip(axes, names, strict=True):
        own = [row for row in steps if row["recipe"] == name]
        shares = pandas.DataFrame([row["regime_share"] for row in own])
        colours = colours_of(shares.columns)
        x = [row["step"] for row in own]
        areas = row_of_axes[0].stackplot(x, shares.T.values, colors=colours.values())
        handles |= zip(map(label_of, shares), areas, strict=True)
        row_of_axes[0].set(title=f"{name}: where the tokens go", ylim=(0, 1), xlim=(x[0], x[-1]))
        row_of_axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        row_of_axes[0].set(xlabel="step", ylabel="share of the tokens (white: no term)")
        quarter = max(1, len(own) // 4)
        plot_plane(row_of_axes[1], name, own[:quarter], colours)
        plot_plane(row_of_axes[2], name, own[-quarter:], colours)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=80)


def plot_plane(axis, name: str, steps: list[dict], colours: dict[str, str]) -> None:
    """Every token that metrics.jsonl keeps: how likely both privileged policies find it."""
    examples = pandas.DataFrame(itertools.chain(*[row["rollouts"] for row in steps]))
    columns = ["regimes", "privileged_student", "privileged_teacher"]
    if not {*columns} <= {*examples}:
        return axis.set_visible(False)
    dots = examples[columns].explode(columns)
    for regime, colour in colours.items():
        here = dots[dots["regimes"] == regime].replace(0, 1e-4)  # 0 has no logarithm
        style = {"s": 16, "color": colour, "edgecolor": "#555555", "linewidth": 0.3}
        axis.scatter(here["privileged_student"], here["privileged_teacher"], **style)
    axis.set(xscale="log", yscale="log", xlim=(6e-5, 1.6), ylim=(6e-5, 1.6))
    axis.set(xlabel="q_S, privileged student (0 at 1e-4)", ylabel="q_T, privileged teacher")
    axis.set_title(f"{name}, steps {steps[0]['step']} to {steps[-1]['step']}")


def main(argv: list[str]) -> None:
    runs = sorted(Path("runs").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    newest = runs[-1].parent if runs else Path("runs")
    parser = argparse.ArgumentParser(description="Tables and pictures of a run of dopd.py.")
    parser.add_argument("folder", nargs="?", default=newest, type=Path, help="default: the newest")
    folder = parser.parse_args(argv).folder
    config, tested, steps = read_run(folder)
    if steps:
        plot_curves(tested, steps, folder / "curves.png")
    routed = [row for row in steps if len(row["regime_share"]) > 1]
    if routed:
        print_tokens(routed, config, folder)
        plot_router(routed, folder / "router.png")
    tables = result_tables(tested, config["recipe"])
    with open(folder / "report.md", "w", encoding="utf-8") as file:
        print(f"`{command_of(config)}`\n", file=file)
        given = f"task {config['data'] or config['task']}, seed {config['seed']}"
        print(f"{given}, {config['steps']} steps\n", file=file)
        for console in (Console(), Console(file=file, width=100)):
            for table in tables:
                console.print(table)
        print(COLUMNS, file=file)
    files = ["report.md", "tokens.svg", "curves.png", "router.png"]
    print(*[str(folder / file) for file in files if (folder / file).exists()])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show must not end it
    main(sys.argv[1:])
