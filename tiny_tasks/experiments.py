"""Runs the experiments; writes results/NAME.csv, and the figures and tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py situations           # names of EXPERIMENTS
    python tiny_tasks/experiments.py --draw situations    # only draw what is finished

A run is one seed of one setting, in runs/NAME/SETTING-seedN. A finished run is skipped; an
interrupted one begins again. To add a method or a situation: a line in RECIPES or TASKS, and its
name in METHODS or SITUATIONS.
"""

import copy
import io
import json
import math
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import pandas
import recipes  # makes dopd.py known, and adds its methods
import seaborn
import torch
import vision  # noqa: F401  (adds its tasks)
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.nn import functional

import dopd
from dopd import RECIPES, STRONG, TASKS, WEAK, Policy, Rules

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"
CHARACTERS = ["", *Rules.characters]  # of ids; 0 is the end


# --- 1. situations: kinds of teachers and hints
class Mistaken(Rules):
    """Without the hint the teacher is sure of a wrong digit for two names."""

    def digit(self, name, knows, rng):
        if knows == self.teacher.knows and name in "be":
            return {"b": 2, "e": 0}[name]
        return super().digit(name, knows, rng)


class HintsIgnored(Rules):
    """In this share of its solutions the teacher does not look at the hint."""

    ignored = 1.0

    def solution(self, row, hinted, author, rng):
        if author == self.teacher and rng.random() < self.ignored:
            hinted = False
        return super().solution(row, hinted, author, rng)


class HalfIgnored(HintsIgnored):
    ignored = 0.5


class WrongHints(Rules):
    """In a third of the hints two digits have changed places."""

    def problem(self, rng):
        row = super().problem(rng)
        if rng.random() < 0.33:
            first, second, *others = row["hint"]
            row["hint"] = "".join([second, first, *others])
        return row


def skipping(teacher: float, student: float) -> Rules:
    """The teacher leaves out the steps if it has the hint; the student with and without it."""
    weak = WEAK._replace(skips_hinted=student, skips=student)
    return Rules(STRONG._replace(skips_hinted=teacher), weak)


TASKS["teacher skips 95%"] = skipping(0.95, 0.0)
TASKS["both skip"] = skipping(0.7, 0.3)
TASKS["mistaken"] = Mistaken(STRONG, WEAK)
TASKS["hints ignored"] = HintsIgnored(STRONG, WEAK)
TASKS["half ignored"] = HalfIgnored(STRONG, WEAK)
TASKS["wrong hints"] = WrongHints(STRONG, WEAK)
TASKS["six names"] = Rules(STRONG, WEAK, max_new_tokens=13, length=6)
TASKS["pictures"] = TASKS["vision_box"]
SITUATIONS = ["rules", "shortcut", "teacher skips 95%", "both skip", "mistaken"]
SITUATIONS += ["hints ignored", "half ignored", "wrong hints", "six names", "pictures"]
BOTH = ["shortcut", "rules"]

# --- 2. more methods
METHODS = ["opd", "privileged_opd", "dopd", "dopd_99", "dopd_frozen", "half", "where_unsure"]
METHODS += ["agree", "by chance", "sft"]
OURS = ["opd", "privileged_opd", "dopd", "dopd_frozen", "half", "where_unsure", "agree"]
ROUTED = ["dopd", "dopd_frozen", "agree"]
PARTS = [name for name in RECIPES if name not in METHODS]

AGREE = RECIPES["agree"]
first, second, third = AGREE.terms
light = {"support": "top_k", "weight": 0.6}
paper = [first._replace(**light), second._replace(**light), third._replace(objective="js")]
AGREE_PARTS = {
    "agree, log gap": recipes.agree(threshold=1.1, gap_of=lambda logp: logp),
    "agree, live anchor": AGREE._replace(anchor_decay=0.0),
    "agree, slow anchor": AGREE._replace(anchor_decay=0.99),
    "agree, no teacher": AGREE._replace(terms=AGREE.terms[:2]),  # such tokens teach nothing
    "agree, no student": recipes.agree(student_may_teach=False),
    "agree, below 0.7": recipes.agree(threshold=0.7),
    "agree, paper's terms": AGREE._replace(terms=paper),
}

# A frozen anchor, copied anew. For dopd.py a decay above 1 is frozen; `watched` copies.
RENEWED = {}
for name in ("dopd_frozen", "agree"):
    for every in (40, 80):
        RENEWED[f"{name}, renewed every {every}"] = RECIPES[name]._replace(anchor_decay=every)
RECIPES |= AGREE_PARTS | RENEWED
RECIPES["sft"] = SFT = dopd.Recipe(RECIPES["opd"].terms)  # `watched` does something else


# --- 3. experiments
class Experiment(NamedTuple):
    """Every setting with every seed."""

    settings: dict  # label: flags of dopd.py; {seed} in a path is filled in
    methods: list[str]  # of RECIPES
    seeds: range = range(3)


def same(task: str, **flags) -> dict:
    """The flags to start from the policies of a situation with the same seed: run it first."""
    folder = f"{ROOT}/runs/situations/{task.replace(' ', '_')}-seed{{seed}}"
    return {"task": task, "teacher": f"{folder}/teacher", "student": f"{folder}/student"} | flags


five = ["shortcut", "teacher skips 95%", "both skip", "mistaken", "hints ignored"]
every = {name: same(name) for name in SITUATIONS}
papers = {"shortcut, paper's rate": same("shortcut", lr=5e-6, steps=200)}
long, renewed = {}, {}
for task in BOTH:
    long[task] = same(task, steps=360)
    for steps in (160, 360):
        renewed[f"{task}, {steps} steps"] = same(task, steps=steps)
EXPERIMENTS = {
    "situations": Experiment({name: {"task": name} for name in SITUATIONS}, METHODS, range(5)),
    "agree_parts": Experiment({name: every[name] for name in five}, [*AGREE_PARTS]),
    "agree_30": Experiment(every, ["agree_30"], range(5)),
    "papers_rate": Experiment(papers, ["dopd"]),
    "renewed": Experiment(renewed, ["dopd_frozen", "agree", *RENEWED]),
    "long": Experiment(long, ["opd", "privileged_opd", "opsd", "dopd", "dopd_frozen", "agree"]),
    "methods": Experiment({task: same(task) for task in BOTH}, PARTS),
}


# --- 4. runs
def folder_of(name: str, setting: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{setting.replace(' ', '_')}-seed{seed}"


def config_of(name: str, setting: str, seed: int):
    flags = {"batch_size": 32, "out": str(folder_of(name, setting, seed))}
    flags |= EXPERIMENTS[name].settings[setting]
    for role in ("teacher", "student"):
        flags[role] = flags.get(role, "").format(seed=seed)
    return dopd.Config(recipe=EXPERIMENTS[name].methods, seed=seed, **flags)


def run(name: str, setting: str, seed: int) -> None:
    """One run. job.json, written last, has its grades."""
    config, begun = config_of(name, setting, seed), time.time()
    commit = ["git", "rev-parse", "--short", "HEAD"]
    found = {"commit": subprocess.check_output(commit, text=True, cwd=ROOT).strip()}
    dopd.distill_step = watched(dopd.distill_step)
    found["grades"] = grade_all(dopd.run(config), config)
    found["seconds"] = round(time.time() - begun)
    Path(config.out, "job.json").write_text(json.dumps(found))


def supervised_step(student: Policy, optimizer, rows: list[dict]) -> dict:
    """Learns from right solutions in the student's own form."""
    solutions = [[*map(CHARACTERS.index, row["answer"]), 0] for row in rows]
    logp = dopd.score(student, rows, solutions)[:]  # (N, V)
    loss = functional.nll_loss(logp, torch.tensor(sum(solutions, [])))
    loss.backward()
    dopd.clip_gradient(student.model)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item(), "rollouts": []}


def watched(distill_step):
    """A training step that renews the anchor of RENEWED, and measures every tenth time how far the
    anchor has moved: its KL from the first copy, with the hint, on four completions."""
    first = {}

    def step(recipe, policies, optimizer, rows, config) -> dict:
        if recipe is SFT:
            return supervised_step(policies["student"], optimizer, rows)
        anchor = policies["privileged_student"]
        done = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        if done == 0:
            first["policy"] = Policy(copy.deepcopy(anchor.model), "hinted")
        if recipe.anchor_decay > 1 and done % recipe.anchor_decay == 0:
            anchor.model.load_state_dict(policies["student"].model.state_dict())
        metrics = distill_step(recipe, policies, optimizer, rows, config)
        if done % 10 == 9:
            completions = [example["ids"] for example in metrics["rollouts"]]
            with torch.no_grad():
                now = dopd.score(anchor, rows[:4], completions)[:]
                before = dopd.score(first["policy"], rows[:4], completions)[:]
            metrics["anchor moved"] = dopd.reverse_kl(now, before).mean().item()
        return metrics

    return step


def grade_all(ready, config) -> dict:
    """The final test of every policy, and finer grades."""
    loading = getattr(ready.task, "load", dopd.load)
    known, grades = {}, {}
    for line in Path(config.out, "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        known[row.get("tested")] = row.get("test")
    for name in ["student before", "teacher", *config.recipe]:
        folder = f"{config.out}/{name}"
        model = {"student before": ready.student, "teacher": ready.teacher}.get(name)
        if model is None:
            given = replace(config, teacher=folder, student=folder)
            model = loading(given, ready.task.max_new_tokens)[-1]
        hinted, finer = known[f"{name}, with the hint"], finer_grades(model, ready, config)
        grades[name] = known[name] | {"with the hint": hinted["exact match"]} | finer
        grades[name]["skips with the hint"] = hinted["skips"]
    return grades


def kinds_of(row: dict, completion: str) -> list[str]:
    """What every character is. A sum is right or wrong for the digit that is written."""
    kinds, value, names = [], row["prompt"][0], row["prompt"][1:-1]
    if completion.startswith("="):
        return ["skip"] + ["after a skip"] * (len(completion) - 1)
    for place, character in enumerate(completion[: 2 * len(names)]):
        right = character == row["answer"][place]
        if place % 2:
            known = f"{value}{completion[place - 1]}"
            right = known.isdigit() and character == str(sum(map(int, known)) % 10)
            kinds.append(f"execute, {'right' if right else 'wrong'}")
            value = character
        elif names[place // 2] in "klm":
            kinds.append("wild digit")
        else:
            kinds.append(f"recall, {'right' if right else 'wrong'}")
    return kinds


@torch.no_grad()
def finer_grades(model, ready, config) -> dict:
    """Shares of right digits and sums where the steps are written; the entropy on wild digits."""
    torch.manual_seed(config.seed)
    policy, rows, kinds = Policy(model, "plain"), ready.splits["test"][:400], []
    completions = dopd.rollout(policy, rows)
    tokens = torch.tensor(sum(completions, []))
    entropies = dopd.token_scores(dopd.score(policy, rows, completions), tokens).entropy
    for row, ids in zip(rows, completions, strict=True):
        of_row = kinds_of(row, ready.tokenizer.decode(ids, skip_special_tokens=True))
        kinds += of_row + ["end"] * (len(ids) - len(of_row))
    kinds, entropies = pandas.Series(kinds), pandas.Series(entropies.tolist())
    grades = {"entropy, wild": entropies[kinds == "wild digit"].mean()}
    for part in ("recall", "execute"):
        grades[part] = kinds[kinds.str.startswith(part)].str.endswith("right").mean()
    return grades


# --- 5. from runs to CSV files
def jobs_of(name: str) -> list[tuple]:
    """All settings with one seed, then with the next."""
    experiment, jobs = EXPERIMENTS[name], []
    for seed in experiment.seeds:
        jobs += [(name, setting, seed) for setting in experiment.settings]
    return jobs


def is_done(job: tuple) -> bool:
    return Path(folder_of(*job), "job.json").exists()


def collect(name: str):
    """One line per finished run and tested policy."""
    lines = []
    for job in filter(is_done, jobs_of(name)):
        found = json.loads(Path(folder_of(*job), "job.json").read_text())
        for method, grades in found.pop("grades").items():
            where = {"setting": job[1], "seed": job[2], "method": method}
            lines.append(where | grades | found)
    return pandas.DataFrame(lines)


def logs(name: str, methods: list):
    """Where a step was made, and its metrics: of all finished runs and these methods."""
    for job in filter(is_done, jobs_of(name)):
        for line in Path(folder_of(*job), "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row.get("recipe") in methods:
                where = {"setting": job[1], "seed": job[2], "method": row["recipe"]}
                yield where | {"step": row["step"]}, row


def tokens_of(settings: list):
    """Every token that metrics.jsonl keeps: its true kind, and where it went."""
    lines = []
    for where, row in logs("situations", ROUTED):
        for example in row["rollouts"] if where["setting"] in settings else ():
            text = "".join(CHARACTERS[token] for token in example["ids"])
            early = len(text) < len(example["answer"]) and not text.startswith("=")
            kinds = [*kinds_of(example, text), "ends early" if early else "end"]
            for place, regime in enumerate(example["regimes"]):
                token = {"kind": kinds[place], "regime": regime}
                for name in recipes.BOTH_HINTED:
                    token[name.removeprefix("privileged_")] = example[name][place]
                lines.append(where | token)
    return pandas.DataFrame(lines)


def landed():
    """Tokens per kind and regime, and how many both policies find unlikely."""
    frame = tokens_of(["shortcut", "rules", "mistaken"])
    frame["both unlikely"] = (frame.teacher < 0.1) & (frame.student < 0.1)
    by = frame.groupby(["setting", "method", "kind", "regime"])["both unlikely"]
    return by.agg(["size", "sum"]).set_axis(["tokens", "both unlikely"], axis=1).reset_index()


def planes():
    """Tokens on the plane of the two privileged policies."""
    frame = tokens_of(["mistaken"])
    frame = frame[(frame.method == "dopd_frozen") & (frame.seed == 0)]
    return frame.sample(2000, random_state=0)[["regime", "teacher", "student"]]


def over_time(name: str, methods: list):
    lines = []
    for where, row in logs(name, methods):
        if row["step"] % 10 == 0:
            exact = row.get("validation", {}).get("exact match")
            more = {name: row.get(name) for name in ("entropy", "anchor moved")}
            lines.append(where | more | {"exact match": exact})
    return pandas.DataFrame(lines)


def cost(rounds: int = 5, steps: int = 20):
    """Time of one core for a step. Needs the policies of situations."""
    torch.set_num_threads(1)
    config = replace(config_of("long", "shortcut", 0), steps=steps, eval_every=steps + 1)
    config.out, task, lines = f"{ROOT}/runs/cost", TASKS["shortcut"], []
    Path(config.out).mkdir(parents=True, exist_ok=True)
    tokenizer, *models = dopd.load(config, task.max_new_tokens)
    rows = [task.problem(random.Random(i)) for i in range(32 * steps)]
    dopd.encode(rows, tokenizer, models, task.hint_template)
    ready = dopd.Ready(task, {"train": rows, "validation": rows[:1]}, tokenizer, *models)
    for method in OURS * rounds:
        begun, log = time.process_time(), io.StringIO()
        dopd.train(method, ready, log, config)
        seconds = time.process_time() - begun
        tokens = sum(json.loads(line)["tokens"] for line in log.getvalue().splitlines())
        line = {"milliseconds of a step": 1000 * seconds / steps}
        lines.append({"method": method} | line | {"tokens per second": tokens / seconds})
    return pandas.DataFrame(lines)


# CSV file: experiment, function
FILES = {name: (name, partial(collect, name)) for name in EXPERIMENTS} | {
    "landed": ("situations", landed),
    "planes": ("situations", planes),
    "moved": ("situations", partial(over_time, "situations", ["dopd"])),
    "moved_at_papers_rate": ("papers_rate", partial(over_time, "papers_rate", ["dopd"])),
    "curves": ("long", partial(over_time, "long", [*RECIPES])),
    "cost": ("cost", cost),
}


# --- 6. tables
def spread(values: pandas.Series) -> str:
    if len(values) == 1:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {values.std():.2f}"


def grid(frame):
    """Exact match: a line per method, a column per setting."""
    frame["setting"] = frame.setting.str.split(":").str[0]
    table = frame.pivot_table("exact match", "method", "setting", spread, sort=False).fillna("")
    return table.drop(index=["student before", "teacher"]).reset_index()


def exact_of(frame):
    """Mean exact match: methods, the best on average first, x situations (number of seeds)."""
    means = frame.pivot_table("exact match", "method", "setting")
    means = means.drop(["student before", "teacher"])
    seeds = frame.groupby("setting").seed.nunique()
    order = means.mean(axis=1).sort_values(ascending=False).index
    names = {name: f"{name} ({seeds[name]})" for name in SITUATIONS if name in means}
    return means.loc[order, [*names]].rename(columns=names)


def summary(frame):
    """Regret: how far a method is below the best method of a situation."""
    exact = exact_of(frame)
    regret = exact.max() - exact
    table = pandas.DataFrame({"mean": exact.mean(axis=1), "worst regret": regret.max(axis=1)})
    new = exact_of(frame[frame.seed > 2])  # agree_30 was chosen on the other seeds
    table["mean, seeds 3 and 4"] = new.mean(axis=1)
    table["regret, seeds 3 and 4"] = (new.max() - new).max(axis=1)
    table = table.map("{:.2f}".format)
    table.insert(2, "in the situation", regret.idxmax(axis=1))
    return table.reset_index()


def claims(frames: dict):
    """Holds: higher in every seed. In part: the mean is higher. From situations, if possible."""
    table = frames["claims"]
    for i, claim in table.iterrows():
        for task in BOTH:
            both = {claim.higher, claim.lower}
            frame = frames["situations" if both <= {*METHODS} else "methods"]
            exact = frame[frame.setting == task].pivot(
                index="seed", columns="method", values="exact match"
            )
            pair = exact[[claim.higher, claim.lower]].dropna()
            high, low = pair[claim.higher], pair[claim.lower]
            verdict = "in part" if high.mean() > low.mean() else "no"
            if (high > low).all():
                verdict = "holds"
            table.loc[i, f"`{task}`"] = (
                f"**{verdict}**: `{claim.higher}` {high.mean():.2f}, `{claim.lower}` "
                f"{low.mean():.2f}; {(high > low).sum()} of {len(pair)}"
            )
    return table.drop(columns=["higher", "lower"])


def where_they_land(frame):
    """Percentages of a kind of tokens."""
    values, index = ["tokens", "both unlikely"], ["kind"]
    counts = frame.pivot_table(values, index, "regime", "sum", fill_value=0)
    tokens, unlikely = counts["tokens"], counts["both unlikely"]
    of_kind, of_unlikely = tokens.sum(axis=1), unlikely.sum(axis=1)
    shares = (100 * tokens.div(of_kind, axis=0)).map("{:.0f}".format)
    high = 100 * unlikely[["HT", "HS"]].sum(axis=1) / of_unlikely
    table = shares[["LH", "LL", "HT", "HS"]].agg(" ".join, axis=1).rename("LH LL HT HS").to_frame()
    table["both unlikely"] = (100 * of_unlikely / of_kind).map("{:.0f}".format)
    table["of these, high gap"] = high.map("{:.0f}".format).where(of_unlikely >= 20, "")
    return table.reset_index()


def bookkeeping(frames: dict):
    lines = []
    for name, frame in frames.items():
        if "commit" in frame:
            line = {"file": name, "methods": frame.method.nunique(), "seeds": frame.seed.nunique()}
            seconds = frame.groupby(["setting", "seed"]).seconds.first().sum()
            line["minutes of one core"] = f"{seconds / 60:.0f}"
            lines.append(line | {"commits": " ".join(frame.commit.unique())})
    return pandas.DataFrame(lines)


def write_tables(frames: dict) -> None:
    """Every table between <!-- NAME --> and <!-- /NAME --> in both READMEs."""
    tables = {"claims": claims(frames), "summary": summary(frames["situations"])}
    tables["bookkeeping"] = frames["bookkeeping"]
    for name, frame in frames.items():
        if "commit" in frame:
            table = grid(frame)
            tables[name] = table.iloc[:, :6]
            tables[f"{name}, more"] = table.iloc[:, [0, *range(6, table.shape[1])]]
    for (setting, method), frame in frames["landed"].groupby(["setting", "method"]):
        if method != "agree":
            tables[f"landed, {setting}, {method}"] = where_they_land(frame)
    tables["cost"] = frames["cost"].groupby("method", sort=False).agg(spread).reset_index()
    for file in (ROOT / "README.md", RESULTS / "README.md"):
        text = file.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if begin in text:
                before, rest = text.split(begin)
                written = table.to_markdown(index=False, tablefmt="github", disable_numparse=True)
                text = f"{before}{begin}{written}\n{end}{rest.split(end)[1]}"
        file.write_text(text)


# --- 7. figures
def heat(axis, exact, opd, best) -> None:
    """Frames the best, hatches what is below opd."""
    shown = {"annot": True, "fmt": ".2f", "vmin": 0, "vmax": 1, "cmap": "viridis"}
    seaborn.heatmap(exact, ax=axis, cbar=False, **shown)
    below = {"hatch": "//", "edgecolor": "#ffffff70"}
    first = {"edgecolor": "red", "lw": 3, "zorder": 3}
    for cells, look in ((exact < opd - 0.005, below), (exact > best - 0.005, first)):
        for line, column in zip(*cells.to_numpy().nonzero(), strict=True):
            axis.add_patch(Rectangle((column + 0.04, line + 0.06), 0.92, 0.88, fill=False, **look))


def draw_situations(frame):
    exact, figure = exact_of(frame), Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    heat(left, exact, exact.loc["opd"], exact.max())
    title = "exact match, means (number of seeds). Frame: the best. Hatched: below opd."
    left.set(xlabel="", ylabel="student trained with", title=title)
    left.set_xticks(left.get_xticks(), left.get_xticklabels(), rotation=30, ha="right")
    places = [line + 0.5 for line in range(len(exact))]
    regret = (exact.max() - exact).max(axis=1)
    right.scatter(exact.mean(axis=1), places, 60, "black", label="mean")
    right.scatter(regret, places, 60, "orange", marker="X", label="worst regret")
    right.set(title="over all situations", xlim=(-0.03, 1), xlabel="exact match")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.savefig(RESULTS / "situations.png", dpi=80)


def draw_dots(frames: dict):
    code = {"this code": frames["situations"], "before": frames["methods"]}
    frame = pandas.concat(code, names=["code"]).reset_index()
    shown = {"x": "exact match", "y": "method", "col": "setting", "col_order": BOTH}
    shown |= {"order": exact_of(frames["situations"]).index, "hue": "code", "s": 60}
    palette = {"this code": "#00695c", "before": "#c0c0c0"}
    grid = seaborn.catplot(frame, height=4, aspect=1.4, jitter=False, palette=palette, **shown)
    grid.set_titles("{col_name}: a dot is a seed").set(xlim=(0, 1), ylabel="student trained with")
    grid.savefig(RESULTS / "dots.png", dpi=80)


def draw_planes(frame):
    """The same tokens, by both gaps."""
    frame[["q_S", "q_T"]] = frame[["student", "teacher"]].clip(lower=1e-4)
    near = (frame.q_T - frame.q_S).abs() < 0.5
    frame["gap of probabilities"] = near.map({True: "below 1/2", False: "1/2 or more"})
    colours = {"LH": "#8fd18f", "LL": "#c8c8c8", "HT": "#8ab8f5", "HS": "#ffb061"}
    two = {"below 1/2": "#ad1457", "1/2 or more": "#f2e58f"}
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = {"regime": colours, "gap of probabilities": two}
    for axis, (hue, palette) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        shown = {"palette": palette, "s": 20, "edgecolor": "grey", "linewidth": 0.3}
        seaborn.scatterplot(frame, x="q_S", y="q_T", hue=hue, hue_order=palette, ax=axis, **shown)
        axis.set(xscale="log", yscale="log", xlabel="q_S, privileged student")
        axis.set(ylabel="q_T, privileged teacher", title=f"the same tokens, by the {hue}")
        axis.axvline(0.1, color="grey", linestyle=":")
        axis.axhline(0.1, color="grey", linestyle=":")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    figure.savefig(RESULTS / "planes.png", dpi=80)


def draw_seeds(frame, values: list, label: str, name: str, **axes) -> None:
    frame = frame.melt(frame.columns.difference(values), values, "which", label).dropna(
        subset=label
    )
    shown = {"kind": "line", "units": "seed", "estimator": None, "alpha": 0.7}
    grid = seaborn.relplot(frame, x="step", y=label, height=3, aspect=1.4, **shown, **axes)
    grid.set_titles("{col_name}: {row_name}").savefig(RESULTS / f"{name}.png", dpi=80)


def draw_map(frame):
    """By how often both leave out the steps."""
    x, y = "teacher skips, with the hint", "student skips"
    frame[[x, y]] = frame.setting.str.split(" ", expand=True)
    exact = {name: part.pivot_table("exact match", y, x) for name, part in frame.groupby("method")}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, method in zip(figure.subplots(2, 3).flat, OURS, strict=False):
        heat(axis, exact[method], exact["opd"], math.inf)
        axis.set_title(method)
    figure.suptitle("exact match; hatched and outlined: below opd")
    figure.savefig(RESULTS / "map.png", dpi=80)


def draw() -> None:
    """All figures and tables."""
    files = sorted(RESULTS.glob("*.csv"))
    frames = {file.stem: pandas.read_csv(file, dtype={"commit": str}) for file in files}
    frames["bookkeeping"] = bookkeeping(frames)
    whole = pandas.concat([frames["situations"], frames["agree_30"]])
    whole = whole.drop_duplicates(["setting", "method", "seed"])
    frames["situations"] = whole
    agree = whole.query("method in ['agree', 'agree_30'] and setting in @five and seed < 3")
    frames["agree_parts"] = pandas.concat([agree, frames["agree_parts"]])
    write_tables(frames)
    seaborn.set_theme(style="whitegrid")
    draw_situations(frames["situations"])
    draw_dots(frames)
    draw_planes(frames["planes"])
    draw_map(frames["map"])
    axes = {"hue": "which", "col": "method", "row": "first token"}
    both = ["teacher", "student"]
    draw_seeds(frames["first_tokens"], both, "probability", "anchor", **axes)
    axes = {"hue": "method", "col": "setting", "row": "which", "facet_kws": {"sharey": "row"}}
    both = ["exact match", "entropy"]
    draw_seeds(frames["curves"], both, "share, or nats", "long", **axes)
    axes = {"hue": "setting", "col": "method", "row": "which"}
    draw_seeds(frames["moved"], ["anchor moved"], "KL, nats", "moved", **axes)


# --- 8. the command line
def launch(job: tuple) -> None:
    """log.txt has what a run prints. One that fails does not end the others."""
    shutil.rmtree(folder_of(*job), ignore_errors=True)
    folder_of(*job).mkdir(parents=True)
    with open(folder_of(*job) / "log.txt", "a") as log:
        command = [sys.executable, __file__, "--run", *map(str, job)]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    print(*job, "failed: see its log.txt" if code else "done", flush=True)


def main(names: list[str]) -> None:
    if names[:1] == ["--run"]:
        return run(names[1], names[2], int(names[3]))
    if not {*names} <= {*EXPERIMENTS, "cost", "--draw"}:
        sys.exit(f"choose from {', '.join(EXPERIMENTS)}, cost; or --draw")
    jobs = []
    for name in EXPERIMENTS:
        if name in names and "--draw" not in names:
            jobs += [job for job in jobs_of(name) if not is_done(job)]
    with ThreadPool(2) as pool:
        pool.map(launch, jobs, chunksize=1)
    for file, (name, function) in FILES.items():
        if name in names:
            frame = function()
            if len(frame):
                frame.round(4).to_csv(RESULTS / f"{file}.csv", index=False)
    draw()


if __name__ == "__main__":
    main(sys.argv[1:])
