"""Runs the experiments; writes results/NAME.csv, results/NAME.png and the tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py main rules        # names of EXPERIMENTS, or all; two runs at a time, one thread each
    python tiny_tasks/experiments.py --draw main       # tables and figures again, from the CSV

A run is one seed of one setting: its own tiny policies, then every recipe. It goes into runs/NAME/SETTING-seedN. A
finished run is not repeated: delete its folder after changing the code. To add an experiment, add an entry to EXPERIMENTS.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")                           # before torch comes in
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import joblib  # noqa: E402
import pandas  # noqa: E402

import dopd  # noqa: E402
import recipes  # noqa: E402, F401

BASE = dict(dopd.TASKS)
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"


# ------------------------------------------------------------------------------------------------------ 1. experiments
class Experiment(NamedTuple):
    """Every setting with every seed: flags of dopd.py, and the recipes that are compared."""
    settings: dict                 # label: flags of dopd.py; also "teacher_author", "student_author", "dials": fields
    recipes: list[str]
    seeds: range = range(3)
    start: str = ""                # an experiment of the same task whose tiny policies are used again


class Dials(dopd.Rules):
    """`rules` that can be made harder: more wild names, hints that are wrong, a teacher that ignores its hint."""
    dials = {}

    def problem(self, rng):
        row = super().problem(rng)
        if rng.random() < self.dials.get("more_wild", 0):               # one more name is wild
            place = rng.randrange(3)
            names = list(row["prompt"][1:-1])
            names[place] = rng.choice("klm")
            digits = self.recall("".join(names), 10, rng)
            worked = self.work(int(row["prompt"][0]), digits)
            row |= {"prompt": f"{row['prompt'][0]}{''.join(names)}=", "answer": worked,
                    "hints": {"steps": worked[::2], "none": ""}}
        if rng.random() < self.dials.get("wrong_hints", 0):             # two of its digits have changed places
            steps = row["hints"]["steps"]
            row["hints"]["steps"] = steps[1] + steps[0] + steps[2]
        return row

    def solution(self, row, form, author, rng):
        doubts = author == self.teacher and rng.random() < self.dials.get("doubts", 0)
        if form != "none" and not doubts and row["hints"][form] != row["answer"][::2]:      # believes a wrong hint
            worked = self.work(int(row["prompt"][0]), [int(digit) for digit in row["hints"][form]], author.slips, rng)
            return worked
        return super().solution(row, "none" if doubts else form, author, rng)


METHODS = ["vanilla", "privileged_teacher", "dopd", "dopd_frozen", "half"]
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
    "map": Experiment({f"{teacher} {student}": {
        "test_prompts": 600, "teacher_author": {"skips_hinted": teacher},
        "student_author": {"skips": student, "skips_hinted": student}}
        for teacher in (0.35, 0.7, 0.95) for student in (0.0, 0.1, 0.3)}, METHODS),
    "rates": Experiment({f"{task} {lr}": TASKS[task] | {"lr": lr} for task in TASKS for lr in (1e-4, 4e-4)},
                        [*METHODS, "dopd_half"], start="main rules"),
    "parts": Experiment(TASKS, PARTS, start="main rules"),
    "dials": Experiment({label: {"task": "rules", "test_prompts": 600, **changed} for label, changed in {
        "half of the prompts with one more wild name": {"dials": {"more_wild": 0.5}},
        "a third of the hints wrong": {"dials": {"wrong_hints": 0.33}},
        "teacher ignores half of its hints": {"dials": {"doubts": 0.5}},
        "teacher ignores all hints": {"dials": {"doubts": 1.0}}}.items()}, METHODS),
    "tokens": Experiment(TASKS, [f"vanilla without {which}" for which in ("highest", "lowest", "random")],
                         start="main rules"),
    "long": Experiment({task: TASKS[task] | {"steps": 360} for task in TASKS},
                       ["privileged_teacher", "privileged_student", "dopd", "dopd_frozen", "half"], start="main rules"),
}


# ------------------------------------------------------------------------------------------------------------- 2. runs
def first_tokens(regimes, scores: dict, lengths) -> dict:
    """What DOPD's router sees of the first tokens, for completions that skip the working (3 tokens) and for others."""
    first, found = lengths.cumsum(0) - lengths, {}
    teacher, student = (scores[f"privileged_{name}"].logp[first].exp() for name in ("teacher", "student"))
    for kind, chosen in (("skip", lengths <= 3), ("work", lengths > 3)):
        if chosen.any():
            found |= {f"{kind} q_T": teacher[chosen].mean().item(), f"{kind} q_S": student[chosen].mean().item()}
            found |= {f"{kind} {regime.name}": (regimes[first][chosen] == regime).float().mean().item()
                      for regime in dopd.Regime if regime != dopd.Regime.ALL}
    return found | {"share of skips": (lengths <= 3).float().mean().item()}


def run(name: str, label: str, seed: int) -> None:
    """One run, unless it is there. What it prints goes into its log.txt; first.json has the first tokens."""
    experiment, folder = EXPERIMENTS[name], folder_of(name, label, seed)
    if Path(folder, "job.json").exists():
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    flags = dict(experiment.settings[label])
    authors = {role: flags.pop(f"{role}_author", {}) for role in ("teacher", "student")}
    task = BASE[flags.get("task", "shortcut")]
    if "dials" in flags:
        task = Dials(*task)
        Dials.dials = flags.pop("dials")
    task = task._replace(**{role: getattr(task, role)._replace(**changes) for role, changes in authors.items()})
    dopd.TASKS[flags.get("task", "shortcut")] = task                    # a process makes many runs: always set anew
    for start in experiment.start.split():
        if flags["task"] in EXPERIMENTS[start].settings:
            flags |= {role: str(folder_of(start, flags["task"], seed) / role) for role in ("teacher", "student")}
    shutil.rmtree(folder, ignore_errors=True)                           # an unfinished run begins anew
    folder.mkdir(parents=True)
    seen, assign, start = [], dopd.assign, time.time()

    def noted(recipe, scores, lengths):
        regimes, weights = assign(recipe, scores, lengths)
        if recipe.router == recipes.by_advantage_gap:
            recipe_name = next(key for key, value in dopd.RECIPES.items() if value is recipe)
            seen.append({"recipe": recipe_name} | first_tokens(regimes, scores, lengths))
        return regimes, weights

    dopd.assign = noted
    with open(folder / "log.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        dopd.run(dopd.Config(**flags, recipe=experiment.recipes, seed=seed, out=str(folder)))
    dopd.assign = assign
    Path(folder, "first.json").write_text(json.dumps(seen))
    for file in folder.glob("*/*.safetensors"):                         # the students, which nobody reads again
        if file.parent.name not in ("teacher", "student"):
            file.unlink()
    Path(folder, "checkpoint.pt").unlink(missing_ok=True)
    Path(folder, "job.json").write_text(json.dumps({"seconds": round(time.time() - start), "commit": commit.strip()}))


def folder_of(name: str, label: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{label.replace(' ', '_')}-seed{seed}"


def collect(name: str) -> pandas.DataFrame:
    """One line per run and policy: setting, seed, the final test, exact match on the way, seconds and commit."""
    lines = []
    for label in EXPERIMENTS[name].settings:
        for seed in EXPERIMENTS[name].seeds:
            folder, way = folder_of(name, label, seed), {}
            job = json.loads(Path(folder, "job.json").read_text())
            for row in map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines()):
                if "validation" in row:
                    way[f"validation at {row['step']}"] = row["validation"]["exact match"]
                if "test" in row:
                    lines.append({"setting": label, "seed": seed, "policy": row["recipe"], **row["test"], **way, **job})
                    way = {}
    return pandas.DataFrame(lines)


if __name__ == "__main__":
    names = list(EXPERIMENTS) if sys.argv[1:] == ["all"] else sys.argv[1:]
    jobs = [joblib.delayed(run)(name, label, seed) for name in names for label in EXPERIMENTS[name].settings
            for seed in EXPERIMENTS[name].seeds]
    joblib.Parallel(n_jobs=2, backend="multiprocessing", batch_size=1)(jobs)      # forked: they know all recipes
