"""Runs the experiments; writes results/NAME.csv, the figures beside it, and the tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py main rules        # names of EXPERIMENTS, or all; two at a time
    python tiny_tasks/experiments.py --draw            # tables and figures again, from the CSV files that are there

A run is one seed of one setting: its own tiny policies, then every recipe. It goes into runs/NAME/SETTING-seedN. A
finished run is not repeated: delete its folder after changing the code. To add one, add an entry to EXPERIMENTS.
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")                           # before torch comes in
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import joblib  # noqa: E402
import pandas  # noqa: E402
import seaborn  # noqa: E402
import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from scipy import stats  # noqa: E402

import dopd  # noqa: E402
import recipes  # noqa: E402
import vision  # noqa: E402

dopd.TASKS["vision"] = vision.Vision(*dopd.TASKS["rules"])
BEFORE = dict(vars(dopd))                                               # as it is before a run changes it
TOKENS = ["<eos>", *dopd.Rules.CHARACTERS]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"


# ------------------------------------------------------------------------------------------------------ 1. experiments
class Experiment(NamedTuple):
    """Every setting with every seed: flags of dopd.py, and the recipes that are compared."""
    settings: dict                 # label: flags of dopd.py, or what `run` takes out of them; up to a colon: its column
    recipes: list[str]
    seeds: range = range(3)
    start: bool = False            # from the tiny policies of main and rules


# Twenty pairs of neighbouring names, and the prompts that have one.
PAIRS = {first + "abcdefghij"[(place + far) % 10] for place, first in enumerate("abcdefghij") for far in (3, 7)}
PAIRED = {f"{start}{''.join(names)}=" for start in range(10) for names in itertools.product("abcdefghijklm", repeat=3)
          if {names[0] + names[1], names[1] + names[2]} & PAIRS}


class Dials(dopd.Rules):
    """`rules` with more forms of the hint, and dials: more wild names, wrong hints, a teacher that ignores its hint,
    and pairs that only the test has."""
    dials = {}

    def problem(self, rng):
        row = super().problem(rng)
        if rng.random() < self.dials.get("more_wild", 0):               # one more name is wild
            start, names, place = row["prompt"][0], [*row["prompt"][1:-1]], rng.randrange(3)
            names[place] = rng.choice("klm")
            worked = self.work(int(start), self.recall("".join(names), 10, rng))
            row = {"prompt": f"{start}{''.join(names)}=", "answer": worked, "hints": {"steps": worked[::2], "none": ""}}
        worked = row["answer"]
        row["hints"] |= {"execution": worked, "answer": worked[-1], "summary": str(sum(map(int, worked[::2])))}
        if rng.random() < self.dials.get("wrong_hints", 0):             # two of its digits have changed places
            row["hints"]["steps"] = worked[2] + worked[0] + worked[4]
        if self.dials.get("pairs"):        # a row goes where its `split_by` falls: 2 to the test, 1 to the training
            draw = random.Random(row["prompt"]).random()
            row["split_by"] = 2 if row["prompt"] in PAIRED else 1 if draw >= 0.85 else row["prompt"]
        return row

    def solution(self, row, form, author, rng):
        if form == "none" or author == self.teacher and rng.random() < self.dials.get("doubts", 0):
            return super().solution(row, "none", author, rng)
        told = row["hints"][form] if form == "steps" else row["answer"][::2]      # also where the hint is wrong
        return self.work(int(row["prompt"][0]), [int(digit) for digit in told], author.slips, rng)


# Methods that need more than a table get policies of their own: see `step`. Minus the log-prob of a sampled token is a
# forward KL from a "policy" that is sure of this token; weighted by a log-ratio, it has the gradient of a reverse KL.
SURE_OF_IT = dopd.Row(dopd.Regime.ALL, "sampled", "forward_kl", "full", 1.0)
OTHERS = {
    "sft": dopd.Recipe([SURE_OF_IT]),                                   # on the right solutions, not on samples
    "grpo": dopd.Recipe([SURE_OF_IT._replace(weight=lambda scores: scores["judge"].logp)], None, ("judge",)),
    # RLCSD (arXiv 2606.11709), our reading: plain + (right hint - wrong hint), all three as log-probs of the teacher.
    "rlcsd": dopd.Recipe([recipes.VANILLA, recipes.PRIVILEGED,
                          recipes.PRIVILEGED._replace(source="misled_teacher", weight=-1.0)])}
for name, source in (("vanilla", "teacher"), ("privileged_teacher", "privileged_teacher")):
    row = SURE_OF_IT._replace(weight=lambda scores, source=source: scores[source].logp - scores["student"].logp)
    OTHERS[f"{name}, sampled token"] = dopd.Recipe([row], None, ("student", source))
dopd.RECIPES |= OTHERS

METHODS = ["vanilla", "privileged_teacher", "dopd", "dopd_frozen"]
OURS = [*METHODS, "half", "where_unsure"]
MAIN = ["vanilla", "privileged_teacher", "privileged_student", "dopd", "dopd_98", "dopd_99", "dopd_995", "dopd_frozen",
        "eopd", "tip", "demopsd", "half_25", "half", "half_75", "where_unsure", "dopd_half", "dopd_half_frozen",
        "by chance"]
PARTS = [name for name in dopd.RECIPES if "HT" in name and name != "LH+LL+HT+HS"] + [
    "forward_kl top_k", "forward_kl full", "reverse_kl top_k", "js top_k", "js full",
    "without teacher", "one objective", "one support", "without hint"]
TASKS = {task: {"task": task, "test_prompts": 600} for task in ("shortcut", "rules")}
EXPERIMENTS = {
    "main": Experiment({"shortcut": {"task": "shortcut"}}, MAIN, range(5)),
    "rules": Experiment({"rules": {"task": "rules"}}, MAIN, range(5)),
    "vision": Experiment({f"vision, {hint}": {"task": "vision", "test_prompts": 600, "hint": hint}
                          for hint in ("steps", "box", "none")}, OURS),
    "anchor": Experiment({"shortcut": {"task": "shortcut"}}, ["dopd", "dopd_frozen"], range(5), start=True),
    "map": Experiment({f"{teacher} {student}": {
        "test_prompts": 600, "fields": {"teacher": dopd.STRONG._replace(skips_hinted=teacher),
                                        "student": dopd.WEAK._replace(skips=student, skips_hinted=student)}}
        for teacher in (0.35, 0.7, 0.95) for student in (0.0, 0.1, 0.3)}, OURS),
    "rates": Experiment({f"{task} {lr}": TASKS[task] | {"lr": lr} for task in TASKS for lr in (1e-4, 4e-4)},
                        [*OURS, "dopd_half"], range(5), start=True),
    "parts": Experiment(TASKS, PARTS, start=True),
    "betas": Experiment(TASKS, [name for name in dopd.RECIPES if name.startswith("light")], start=True),
    "tokens": Experiment(TASKS, [name for name in dopd.RECIPES if name.startswith("vanilla without")], start=True),
    "others": Experiment(TASKS, [*OTHERS], start=True),
    "hints": Experiment({hint: TASKS["rules"] | {"hint": hint, "dials": {}}
                         for hint in ("execution", "summary", "answer", "none")}, METHODS[1:4]),
    "sizes": Experiment({f"{task}, student of {layers} layers": TASKS[task] | {
        "fields": {"student": dopd.TASKS[task].student._replace(layers=layers)}}
        for task in TASKS for layers in (1, 4)}, METHODS),
    "chains": Experiment({f"{names} names": {
        "task": "rules", "fields": {"names": names, "max_new_tokens": 2 * names + 1}} for names in (2, 6, 10)}, OURS),
    "pairs": Experiment({"pairs that only the test has": TASKS["rules"] | {"dials": {"pairs": True}}}, OURS),
    "continual": Experiment({f"{first}, then {second}: {method}": TASKS[second] | {
        "recipe": [method], "student": f"{ROOT}/runs/{start}/{first}-seed{{seed}}/{method}"} for method in OURS
        for start, first, second in (("rules", "rules", "shortcut"), ("main", "shortcut", "rules"))}, OURS, start=True),
    "dials": Experiment({label: TASKS["rules"] | {"dials": dials} for label, dials in {
        "half of the prompts with one more wild name": {"more_wild": 0.5},
        "a third of the hints wrong": {"wrong_hints": 0.33},
        "teacher ignores half of its hints": {"doubts": 0.5},
        "teacher ignores all hints": {"doubts": 1.0}}.items()}, OURS),
    "long": Experiment({task: TASKS[task] | {"steps": 360} for task in TASKS},
                       ["privileged_teacher", "privileged_student", "dopd", "dopd_frozen"], start=True),
    "long_hinted": Experiment({task: TASKS[task] | {"steps": 360, "student_reads": "hinted"} for task in TASKS},
                              ["privileged_teacher"], start=True),
}


# ------------------------------------------------------------------------------------------------------------- 2. runs
def sampled(rows, completions):
    """Log-probs of a "policy" that is sure of the sampled tokens."""
    tokens = torch.tensor(sum(completions, []))
    return lambda index: torch.full((len(index), len(TOKENS)), -torch.inf).scatter(1, tokens[index, None], 0.0)


def judge(rows, completions):
    """GRPO's advantage, in place of log-probs: right or not, less the mean of the prompt's four, by their deviation."""
    texts = ["".join(TOKENS[i] for i in ids) for ids in completions]
    right = torch.tensor([float(text.endswith("<eos>") and bool(dopd.TASKS["rules"].check(row, text[:-5])))
                          for row, text in zip(rows, texts)]).view(-1, 4)
    advantage = (right - right.mean(1, keepdim=True)) / (right.std(1, keepdim=True) + 1e-4)
    each = advantage.flatten().repeat_interleave(torch.tensor([len(ids) for ids in completions]))
    return lambda index: each[index, None].expand(-1, len(TOKENS))


def first_tokens(regimes, scores: dict, completions: list[list[int]]) -> dict:
    """What DOPD's router sees of the first tokens, of completions that skip the working and of others."""
    lengths = torch.tensor([len(ids) for ids in completions])
    first, skips = lengths.cumsum(0) - lengths, torch.tensor([TOKENS[ids[0]] == "=" for ids in completions])
    found = {"share of skips": skips.float().mean().item()}
    for kind, chosen in (("skip", skips), ("work", ~skips)):
        if chosen.any():
            found |= {f"{kind} q_{who}": scores[name].logp[first[chosen]].exp().mean().item()
                      for who, name in (("T", "privileged_teacher"), ("S", "privileged_student"))}
            found |= {f"{kind} {regime.name}": (regimes[first[chosen]] == regime).float().mean().item()
                      for regime in list(dopd.Regime)[:4]}
    return found


def run(name: str, label: str, seed: int) -> None:
    """One run, unless it is there. Its log.txt has what it prints; first.json, what the router sees of first tokens."""
    experiment, folder = EXPERIMENTS[name], folder_of(name, label, seed)
    if Path(folder, "job.json").exists():
        return
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip()
    flags = {"task": "shortcut", "recipe": experiment.recipes} | experiment.settings[label]
    task, dials, reads = dopd.TASKS[flags["task"]], flags.pop("dials", None), flags.pop("student_reads", "plain")
    Dials.dials, task = dials or {}, task if dials is None else Dials(*task)
    tasks = dopd.TASKS | {flags["task"]: task._replace(**flags.pop("fields", {}))}
    if experiment.start:
        there = folder_of({"shortcut": "main"}.get(flags["task"], "rules"), flags["task"], seed)
        flags = {role: str(there / role) for role in ("teacher", "student")} | flags
        flags["student"] = flags["student"].format(seed=seed)
    shutil.rmtree(folder, ignore_errors=True)                           # an unfinished run begins anew
    folder.mkdir(parents=True)
    seen, drawn, begun = [], None, time.time()

    def assign(recipe, scores, lengths):
        regimes, weights = BEFORE["assign"](recipe, scores, lengths)
        if recipe.router == recipes.by_advantage_gap:
            known = next(key for key, value in dopd.RECIPES.items() if value is recipe)
            seen.append({"recipe": known} | first_tokens(regimes, scores, drawn))
        return regimes, weights

    def score(policy, rows, completions, micro_batch=0):
        if policy.model in (sampled, judge):
            return policy.model(rows, completions)
        return BEFORE["score"](policy, rows, completions, micro_batch)

    def warm_start(task, role, config, held_out):
        return BEFORE["warm_start"](task, role, config, held_out | (PAIRED if Dials.dials.get("pairs") else set()))

    def step(recipe, policies, optimizer, rows, config):
        hints = [row["hinted"][:len(row["hinted"]) - len(row["plain"])] for row in rows]     # the next row's is wrong
        rows = [row | {"misled": hint + row["plain"]} for row, hint in zip(rows, hints[1:] + hints[:1])]
        more = {"student": policies["student"]._replace(reads=reads), "judge": dopd.Policy(judge, ""),
                "misled_teacher": policies["teacher"]._replace(reads="misled"), "sampled": dopd.Policy(sampled, "")}

        def rollout(policy, prompts, micro_batch):
            nonlocal drawn
            solutions = recipe is dopd.RECIPES["sft"]
            drawn = [[*map(TOKENS.index, row["answer"]), 0] for row in prompts] if solutions else BEFORE["rollout"](
                policy, prompts, micro_batch)
            return drawn
        with mock.patch.object(dopd, "rollout", rollout):               # not that of evaluations
            return BEFORE["distill_step"](recipe, policies | more, optimizer, rows, config)

    changed = {"assign": assign, "score": score, "distill_step": step, "warm_start": warm_start, "TASKS": tasks}
    if flags["task"] == "vision":
        changed["load"] = vision.load
    with open(folder / "log.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), \
            mock.patch.multiple(dopd, **changed):
        try:
            dopd.run(dopd.Config(**flags, seed=seed, out=str(folder)))
        except SystemExit:                 # it would end the worker without a word
            raise RuntimeError(f"the last line of {folder}/log.txt says why") from None
    Path(folder, "first.json").write_text(json.dumps(seen))
    Path(folder, "checkpoint.pt").unlink(missing_ok=True)
    Path(folder, "job.json").write_text(json.dumps({"seconds": round(time.time() - begun), "commit": commit}))


def folder_of(name: str, label: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{label.replace(' ', '_')}-seed{seed}"


def folders(name: str) -> list[tuple]:
    """Every run of an experiment: its setting, seed and folder."""
    experiment = EXPERIMENTS[name]
    return [(label, seed, folder_of(name, label, seed)) for seed in experiment.seeds for label in experiment.settings]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def collect(name: str) -> pandas.DataFrame:
    """One line per run and policy: setting, seed, the final test, seconds and commit."""
    lines = []
    for label, seed, folder in folders(name):
        job = json.loads(Path(folder, "job.json").read_text())
        lines += [{"setting": label, "seed": seed, "policy": row["recipe"], **row["test"], **job}
                  for row in read_log(folder) if "test" in row]
    return pandas.DataFrame(lines)


# ----------------------------------------------------------------------------------------------- 3. where tokens land
def audit(name: str) -> pandas.DataFrame:
    """How many tokens of every kind went to which regime, over the rollouts that metrics.jsonl keeps."""
    return pandas.DataFrame([
        {"setting": label, "policy": row["recipe"], "kind": kind, "regime": dopd.Regime(regime).name}
        for label, _, folder in folders(name) for row in read_log(folder) if row["recipe"] in ("dopd", "dopd_frozen")
        for prompt, ids, regimes in row.get("rollouts", []) for kind, regime in zip(kinds_of(prompt, ids), regimes)
    ]).value_counts(sort=False).rename("tokens").reset_index()


def kinds_of(prompt: str, ids: list[int]) -> list[str]:
    """What every token of a completion is: a name's digit, right or wrong; a sum, right or wrong; part of a skip."""
    task, tokens = dopd.TASKS["rules"], [TOKENS[i] for i in ids]
    answer = task.work(int(prompt[0]), task.recall(prompt[1:-1], 10, random.Random(0)))
    kinds = ["skip"] + ["after a skip"] * (len(ids) - 1) if tokens[0] == "=" else ["end"] * len(ids)
    for place, kind, right in task.grade({"prompt": prompt, "answer": answer}, tokens)[1:]:
        kinds[place] = "wild digit" if kind == "unlearnable" else f"{kind}, {'right' if right else 'wrong'}"
    return kinds


def anchor(name: str) -> pandas.DataFrame:
    """What the router sees of the first tokens, every tenth step."""
    frames = [pandas.read_json(folder / "first.json").assign(seed=seed) for _, seed, folder in folders(name)]
    frame = pandas.concat(frames)
    frame["step"] = frame.groupby(["seed", "recipe"]).cumcount() + 1
    return frame[frame.step % 10 == 1]


def curves(name: str) -> pandas.DataFrame:
    """Entropy and exact match (validation) on the way, every twentieth step."""
    return pandas.DataFrame([
        {"setting": label, "seed": seed, "policy": row["recipe"] + ", hinted student" * (name == "long_hinted"),
         "step": row["step"], "entropy": row["entropy"], "exact match": row.get("validation", {}).get("exact match")}
        for label, seed, folder in folders(name) for row in read_log(folder) if row.get("step", 1) % 20 == 0])


# name of the CSV file: function, and the experiments whose runs it reads
EXTRAS = {"audit": (audit, ["main", "rules"]), "first_tokens": (anchor, ["anchor"]),
          "curves": (curves, ["long", "long_hinted"])}


# ------------------------------------------------------------------------------------------------ 4. tables and figures
SUMMARY = ["student before", "teacher", "vanilla", "privileged_teacher", "dopd", "dopd_99", "dopd_frozen", "by chance",
           "half", "where_unsure", "rlcsd", "grpo", "sft"]
COLUMNS = ["exact match", "with hint", "skips", "recall", "execute", "entropy, wild (best 1.28)"]


def spread(values: pandas.Series) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"


def methods(frames: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Every policy on both tasks: mean ± standard deviation over the seeds, and exact match seed by seed."""
    parts, known = [], pandas.concat(frames[name] for name in ("main", "rules", "others"))
    known = known.drop_duplicates(["setting", "seed", "policy"])
    for task, columns in (("shortcut", COLUMNS), ("rules", ["exact match", "with hint", COLUMNS[-1]])):
        by = known[known.setting == task].groupby("policy", sort=False)
        part = by[columns].agg(spread)
        part.insert(1, "seed by seed", by["exact match"].agg(lambda each: " ".join(f"{value:.2f}" for value in each)))
        parts.append(part.add_prefix(f"`{task}`: "))
    return pandas.concat(parts, axis=1)


def grid(frame: pandas.DataFrame, column: str = "exact match") -> pandas.DataFrame:
    """A line per method, a column per setting."""
    trained = frame[~frame.policy.isin(["student before", "teacher"])].replace({"setting": {": .*": ""}}, regex=True)
    return trained.pivot_table(index="policy", columns="setting", values=column, aggfunc=spread, sort=False)


def landed(frame: pandas.DataFrame) -> pandas.DataFrame:
    """For every kind of token: its share of all tokens; of these, the percentages in LH, LL, HT and HS."""
    counts = frame.pivot_table(index=["setting", "policy", "kind"], columns="regime", values="tokens", fill_value=0)
    total = counts.sum(axis=1)
    of_all = (total / total.groupby(["setting", "policy"]).transform("sum")).map("{:.0%}: ".format)
    shares = (100 * counts[["LH", "LL", "HT", "HS"]].div(total, axis=0)).map("{:.0f}".format)
    cells = (of_all + shares.agg(" ".join, axis=1)).unstack(["setting", "policy"])
    return cells.set_axis([", ".join(names) for names in cells.columns], axis=1)


# claim; the paper's figures; the policy that should be higher; the one that should be lower
CLAIMS = [
    ("DOPD beats vanilla", "51.4 > 43.9 (table 1)", "dopd", "vanilla"),
    ("the privileged teacher on every token: below vanilla", "figure 3", "vanilla", "privileged_teacher"),
    ("DOPD beats the privileged teacher on every token", "49.8 > 41.9", "dopd", "privileged_teacher"),
    ("self distillation collapses", "figure 3", "vanilla", "privileged_student"),
    ("DOPD beats EOPD", "51.4 > 46.1 (table 1)", "dopd", "eopd"),
    ("DOPD beats TIP", "51.4 > 44.8 (table 1)", "dopd", "tip"),
    ("tokens of a high gap matter most", "figure 4", "vanilla without random", "vanilla without highest"),
    ("all four regimes beat HT and LH alone", "49.8 > 47.9 (table 6)", "dopd", "HT+LH"),
    ("DOPD beats uniform JS on the top-K", "49.8 > 41.3 (table 6)", "dopd", "js top_k"),
    ("adaptive beats uniform on HT and HS", "47.6 > 44.5 (table 6)", "HT+HS", "HT+HS uniform"),
    ("one source: JS beats reverse KL", "42.5 > 41.9 (table 7)", "js full", "privileged_teacher"),
    ("reverse KL beats its sampled token", "41.9 > 40.6", "privileged_teacher", "privileged_teacher, sampled token"),
    ("DOPD needs the teacher as a source", "49.8 > 41.2 (table 8)", "dopd", "without teacher"),
    ("DOPD needs the hint", "49.8 > 38.3 (table 8)", "dopd", "without hint"),
    ("DOPD needs more than one objective", "49.8 > 46.7 (table 8)", "dopd", "one objective"),
    ("DOPD needs more than one support", "49.8 > 46.1 (table 8)", "dopd", "one support"),
    ("weights 0.6 and 0.3 beat 1 and 1", "figure 10", "dopd", "light 1.0, weak 1.0"),
    ("DOPD beats its own regimes dealt by chance", "-", "dopd", "by chance"),
    ("a frozen anchor beats the live one", "-", "dopd_frozen", "dopd"),
    ("a slow anchor (0.99) beats the live one", "-", "dopd_99", "dopd"),
    ("half (AR-OPD, our reading) beats DOPD", "-", "half", "dopd"),
    ("where_unsure (ours) beats DOPD", "-", "where_unsure", "dopd"),
    ("where_unsure (ours) beats the privileged teacher", "-", "where_unsure", "privileged_teacher"),
    ("DOPD beats supervised learning on right solutions", "-", "dopd", "sft"),
    ("DOPD beats GRPO on the checker", "-", "dopd", "grpo"),
]


def verdicts(frames: dict[str, pandas.DataFrame]) -> pandas.DataFrame:
    """Holds: higher in every seed. In part: the mean is higher. p: paired t-test over the seeds, two-sided."""
    found = pandas.DataFrame([claim[:2] for claim in CLAIMS], columns=["claim", "paper"])
    known = pandas.concat(frames.values()).drop_duplicates(["setting", "seed", "policy"])      # main's are the first
    exact = known.pivot(index=["setting", "seed"], columns="policy", values="exact match")
    for number, (_, _, higher, lower) in enumerate(CLAIMS):
        for task in ("shortcut", "rules"):
            pair = exact.loc[task].reindex(columns=[higher, lower]).dropna()
            above, means = (pair[higher] > pair[lower]).sum(), pair.mean()
            verdict = "holds" if above == len(pair) else "in part" if means[higher] > means[lower] else "no"
            p = stats.ttest_rel(pair[higher], pair[lower]).pvalue
            found.loc[number, f"`{task}`"] = "not run" if pair.empty else (
                f"**{verdict}**: {means[higher]:.2f} against {means[lower]:.2f}, {above} of {len(pair)}, p = {p:.1g}")
    return found.set_index("claim")


def draw_map(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """Exact match of every method, by how often the teacher and the student skip the working."""
    frame = frames["map"]
    frame[["teacher skips, with the hint", "student skips"]] = frame.setting.str.split(" ", expand=True)
    figure, axes = pyplot.subplots(1, len(METHODS), figsize=(3 * len(METHODS), 3.4), sharey=True, layout="constrained")
    for axis, method in zip(axes, METHODS):
        means = frame[frame.policy == method].pivot_table(
            index="student skips", columns="teacher skips, with the hint", values="exact match")
        seaborn.heatmap(means, ax=axis, vmin=0, vmax=1, annot=True, fmt=".2f", cmap="viridis",
                        cbar=method == METHODS[-1])
        axis.set(title=method, ylabel="student skips" if axis is axes[0] else "")
    figure.savefig(file, dpi=100)


def draw_anchor(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """The first tokens on `shortcut`: how sure the two privileged policies are of them, live and frozen anchor."""
    frame = frames["first_tokens"]
    known = frame.melt(["recipe", "seed", "step"], [f"{kind} q_{who}" for kind in ("skip", "work") for who in "TS"])
    known[["first token", "policy"]] = known.variable.str.split(" ", expand=True)
    known = known.replace({"q_T": "privileged teacher", "q_S": "privileged student", "skip": "skips", "work": "works"})
    grid = seaborn.relplot(known, x="step", y="value", hue="policy", col="recipe", row="first token", kind="line",
                           errorbar=("pi", 100), height=2.8, aspect=1.5)
    grid.set(ylabel="probability of the first token", ylim=(0, 1))
    grid.savefig(file, dpi=100)


def draw_long(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """Figure 3 of the paper."""
    known = frames["curves"].melt(["setting", "seed", "policy", "step"], ["exact match", "entropy"]).dropna()
    grid = seaborn.relplot(known, x="step", y="value", hue="policy", col="setting", row="variable", kind="line",
                           errorbar=("pi", 100), height=2.8, aspect=1.6, facet_kws={"sharey": "row"})
    grid.set_titles("{col_name}: {row_name}")
    grid.set(ylabel="exact match, or nats")
    grid.savefig(file, dpi=100)


def markdown(frame: pandas.DataFrame) -> str:
    return frame.reset_index().fillna("").to_markdown(tablefmt="github", disable_numparse=True, index=False)


def draw() -> None:
    """All figures, and all tables between <!-- NAME --> and <!-- /NAME --> in both READMEs, from the CSV files."""
    frames = {file.stem: pandas.read_csv(file, dtype={"commit": str}) for file in RESULTS.glob("*.csv")}
    runs = {name: frames[name] for name in EXPERIMENTS if name in frames}
    everything, tables = methods(runs), {}
    for name, frame in runs.items():
        minutes = frame.groupby(["setting", "seed"]).seconds.first().sum() / 60
        note = f"{frame.seed.nunique()} seeds; {minutes:.0f} minutes of one core"
        tables[name] = f"{markdown(grid(frame))}\n\n*{note}; commit {', '.join(sorted({*frame.commit}))}.*"
    for name, frame in {
            "verdicts": verdicts(runs), "methods": everything, "audit": landed(frames["audit"]),
            "summary": everything.loc[SUMMARY].filter(regex="exact match|seed by seed|skips|wild"),
            "vision, entropy": grid(runs["vision"], "entropy, wild (best 1.28)")}.items():
        tables[name] = markdown(frame)
    for file in (ROOT / "README.md", RESULTS / "README.md"):            # marks of what has not run stay as they are
        file.write_text(re.sub(
            r"(<!-- ([^/].*?) -->\n)(.*?)(<!-- /\2 -->)", lambda found: found[1] + (
                f"\n{tables[found[2]]}\n" if found[2] in tables else found[3]) + found[4],
            file.read_text(), flags=re.DOTALL))
    for name, function in (("map", draw_map), ("anchor", draw_anchor), ("long", draw_long)):
        function(frames, RESULTS / f"{name}.png")
        pyplot.close("all")


def main(names: list[str]) -> None:
    names = list(EXPERIMENTS) if names == ["all"] else [name for name in names if name != "--draw"]
    unknown = [name for name in names if name not in EXPERIMENTS]
    dopd.require(not unknown, f"{' '.join(unknown)}: name one or more of {', '.join(EXPERIMENTS)}")
    jobs = [joblib.delayed(run)(name, label, seed) for name in names for label, seed, _ in folders(name)]
    joblib.Parallel(n_jobs=2, backend="multiprocessing", batch_size=1)(jobs)      # forked: they know all recipes
    for name in names:
        collect(name).round(4).to_csv(RESULTS / f"{name}.csv", index=False)
    for extra, (function, needs) in EXTRAS.items():
        if {*needs} <= {*names}:
            pandas.concat([function(name) for name in needs]).round(3).to_csv(RESULTS / f"{extra}.csv", index=False)
    draw()


if __name__ == "__main__":
    main(sys.argv[1:])
