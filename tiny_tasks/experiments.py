"""Runs the experiments; writes results/NAME.csv, and the figures and tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py situations    # names of EXPERIMENTS; two runs at a time
    python tiny_tasks/experiments.py --draw        # only figures and tables, from the CSV files

A run is one seed of one setting: its own tiny policies, then every method. It goes into
runs/NAME/SETTING-seedN. A finished run is not repeated; one that was interrupted goes on. The CSV
has whatever is finished. To add a method or a situation, add a line to TASKS or EXPERIMENTS.
"""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes in
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pandas  # noqa: E402
import recipes  # noqa: E402
import torch  # noqa: E402
import vision  # noqa: E402, F401  (adds its tasks)
from torch.nn import functional  # noqa: E402

import dopd  # noqa: E402
from dopd import RECIPES, STRONG, TASKS, WEAK, Policy, Rules  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"


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
    return Rules(
        STRONG._replace(skips_hinted=teacher),
        WEAK._replace(skips_hinted=student, skips=student),
    )


TASKS["teacher skips 95%"] = skipping(0.95, 0.0)
TASKS["both skip"] = skipping(0.7, 0.3)
TASKS["mistaken"] = Mistaken(STRONG, WEAK)
TASKS["hints ignored"] = HintsIgnored(STRONG, WEAK)
TASKS["half ignored"] = HalfIgnored(STRONG, WEAK)
TASKS["wrong hints"] = WrongHints(STRONG, WEAK)
TASKS["six names"] = Rules(STRONG, WEAK, max_new_tokens=13, length=6)
TASKS["pictures"] = TASKS["vision_box"]


class OtherHint(Rules):
    """Another form of the hint. The authors know what it means."""

    form = "none"

    def problem(self, rng):
        row = super().problem(rng)
        digits = [int(digit) for digit in row["hint"]]
        forms = {"execution": row["answer"], "answer": row["answer"][-1], "none": ""}
        return row | {"hint": forms.get(self.form, str(sum(digits)))}

    def solution(self, row, hinted, author, rng):
        hinted = hinted and self.form != "none"
        return super().solution(row | {"hint": row["answer"][::2]}, hinted, author, rng)


HINTS = ["execution", "summary", "answer", "none"]
for form in HINTS:
    TASKS[f"rules, {form}"] = type("Hint", (OtherHint,), {"form": form})(STRONG, WEAK)
for name in ("shortcut", "rules"):
    for layers in (1, 4):
        student = TASKS[name].student._replace(layers=layers)
        TASKS[f"{name}, {layers}"] = TASKS[name]._replace(student=student)
MAP = [f"{teacher} {student}" for teacher in (0.35, 0.7, 0.95) for student in (0.0, 0.1, 0.3)]
for name in MAP:
    TASKS[name] = skipping(*map(float, name.split()))


# --- 2. experiments
class Experiment(NamedTuple):
    """Every setting with every seed."""

    settings: dict  # label: flags of dopd.py; {seed} in a path is filled in
    methods: list[str]  # of dopd.RECIPES, or sft
    seeds: range = range(3)


# agree with one part changed
AGREE = RECIPES["agree"]
PAPERS = [("top_k", 0.6, "reverse_kl"), ("top_k", 0.6, "reverse_kl"), ("full", 1.0, "js")]
AGREE_PARTS = {
    "agree, log gap": recipes.agree(threshold=1.1, gap_of=lambda logp: logp),
    "agree, live anchor": AGREE._replace(anchor_decay=0.0),
    "agree, slow anchor": AGREE._replace(anchor_decay=0.99),
    "agree, no teacher": AGREE._replace(terms=AGREE.terms[:2]),  # such tokens teach nothing
    "agree, no student": recipes.agree(student_may_teach=False),
    "agree, below 0.3": recipes.agree(threshold=0.3),
    "agree, below 0.7": recipes.agree(threshold=0.7),
}
terms = []
for term, (support, weight, objective) in zip(AGREE.terms, PAPERS, strict=True):  # of LH, HS, HT
    terms.append(term._replace(support=support, weight=weight, objective=objective))
AGREE_PARTS["agree, paper's terms"] = AGREE._replace(terms=terms)

# A frozen anchor that is copied anew. For dopd.py a decay above 1 is frozen; `step` copies it.
RENEWED = {}
for name in ("dopd_frozen", "agree"):
    for every in (40, 80):
        RENEWED[f"{name}, renewed every {every}"] = RECIPES[name]._replace(anchor_decay=every)
KNOWN = [*RECIPES]  # of dopd.py and recipes.py
RECIPES |= AGREE_PARTS | RENEWED

METHODS = ["opd", "privileged_opd", "dopd", "dopd_99", "dopd_frozen", "half", "where_unsure"]
METHODS += ["agree", "by chance", "sft"]
OURS = ["opd", "privileged_opd", "dopd", "dopd_frozen", "half", "where_unsure", "agree"]
BOTH = ["shortcut", "rules"]
SITUATIONS = ["rules", "shortcut", "teacher skips 95%", "both skip", "mistaken"]
SITUATIONS += ["hints ignored", "half ignored", "wrong hints", "six names", "pictures"]


def same(setting: str, student: str = "student", **flags) -> dict:
    """A setting that starts from the policies of a situation with the same seed: run it first."""
    folder = f"{ROOT}/runs/situations/{setting.replace(' ', '_')}-seed{{seed}}"
    return {
        "task": setting,
        "teacher": f"{folder}/teacher",
        "student": f"{folder}/{student}",
    } | flags


EXPERIMENTS = {
    "situations": Experiment({name: {"task": name} for name in SITUATIONS}, METHODS, range(5)),
    "agree_parts": Experiment(
        {
            name: same(name)
            for name in ("shortcut", "teacher skips 95%", "mistaken", "hints ignored")
        },
        [*AGREE_PARTS],
    ),
    "moves": Experiment(
        {
            "shortcut": same("shortcut"),
            "shortcut, the paper's rate": same("shortcut", lr=5e-6, steps=200),
        },
        ["dopd"],
    ),
    "renewed": Experiment(
        {
            f"{task}, {steps} steps": same(task, steps=steps)
            for task in BOTH
            for steps in (160, 360)
        },
        ["dopd_frozen", "agree", *RENEWED],
    ),
    "long": Experiment(
        {task: same(task, steps=360) for task in BOTH},
        ["opd", "privileged_opd", "opsd", "dopd", "dopd_frozen", "agree"],
    ),
    "methods": Experiment(
        {task: same(task) for task in BOTH}, [name for name in KNOWN if name not in METHODS]
    ),
    "continual": Experiment(
        {
            f"{first}, then {second}: {method}": same(second, methods=[method])
            | {"student": same(first, method)["student"]}
            for first in BOTH
            for second in BOTH
            for method in OURS
        },
        OURS,
    ),
    "vision": Experiment(
        {f"vision, {hint}": {"task": f"vision_{hint}"} for hint in ("steps", "box", "none")}, OURS
    ),
    "hints": Experiment({hint: {"task": f"rules, {hint}"} for hint in HINTS}, OURS),
    "sizes": Experiment(
        {
            f"{task}, student of {n} layers": {"task": f"{task}, {n}"}
            for task in BOTH
            for n in (1, 4)
        },
        OURS,
    ),
    "rates": Experiment(
        {f"{task} {lr}": same(task, lr=lr) for task in BOTH for lr in (1e-4, 4e-4)}, OURS
    ),
    "map": Experiment({name: {"task": name} for name in MAP}, OURS),
}


# --- 3. runs
def folder_of(name: str, setting: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{setting.replace(' ', '_')}-seed{seed}"


def run(job: tuple) -> tuple:
    """One run. Its log.txt has what it prints; job.json, written last, has its grades."""
    name, setting, seed = job
    folder, begun = folder_of(name, setting, seed), time.time()
    resumed = Path(folder, "checkpoint.pt").exists()
    if not resumed:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder / "log.txt", "a"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        stack.enter_context(mock.patch.object(dopd, "report"))  # we draw our own figures
        stack.enter_context(mock.patch.object(dopd, "distill_step", watched(dopd.distill_step)))
        commit = ["git", "rev-parse", "--short", "HEAD"]
        found = {"commit": subprocess.check_output(commit, text=True, cwd=ROOT).strip()}
        config, saved = start(name, setting, seed, resumed)
        dopd.run(config, saved)
        found["grades"] = grade_all(config, "sft" in EXPERIMENTS[name].methods)
    found["seconds"] = None if resumed else round(time.time() - begun)
    Path(folder, "job.json").write_text(json.dumps(found))
    Path(folder, "checkpoint.pt").unlink()
    return job


def watched(distill_step):
    """A training step that renews the anchor of RENEWED, and measures every tenth time how far the
    anchor has moved: its KL from the first copy, with the hint, on four completions."""
    first = {}

    def step(recipe, policies, optimizer, rows, config) -> dict:
        anchor = policies["privileged_student"]
        done = max((int(state["step"]) for state in optimizer.state.values()), default=0)
        if done == 0:
            first["policy"] = Policy(copy.deepcopy(anchor.model), "hinted")
        if recipe.anchor_decay > 1 and done % recipe.anchor_decay == 0:
            anchor.model.load_state_dict(policies["student"].model.state_dict())
        metrics = distill_step(recipe, policies, optimizer, rows, config)
        if done % 10 == 9 and "policy" in first:  # it is gone after an interruption
            completions = [example["ids"] for example in metrics["rollouts"]]
            with torch.no_grad():
                pair = [
                    dopd.score(each, rows[:4], completions)[:] for each in (anchor, first["policy"])
                ]
            metrics["anchor moved"] = dopd.reverse_kl(*pair).mean().item()
        return metrics

    return step


def start(name: str, setting: str, seed: int, resumed: bool) -> tuple:
    """The flags of a run, and its checkpoint."""
    experiment, out = EXPERIMENTS[name], str(folder_of(name, setting, seed))
    if resumed:
        return dopd.read_flags(["--resume", out])
    flags = dict(experiment.settings[setting])
    for role in ("teacher", "student"):
        flags[role] = flags.get(role, "").format(seed=seed)
    methods = flags.pop("methods", experiment.methods)
    trained = [method for method in methods if method != "sft"]
    return dopd.Config(recipe=trained, seed=seed, out=out, **flags), {}


def grade_all(config, with_sft: bool) -> dict:
    """The final test of every tested policy, with finer grades from the students it has saved."""
    saved = torch.load(f"{config.out}/checkpoint.pt", "cpu", weights_only=True)
    ready = dopd.prepare(config, saved, dopd.OwnData)
    tests, loading = ready.splits["test"], getattr(ready.task, "load", dopd.load)
    models = {"student before": ready.student, "teacher": ready.teacher}
    for name in config.recipe:
        given = replace(config, teacher=f"{config.out}/{name}", student=f"{config.out}/{name}")
        models[name] = loading(given, ready.task.max_new_tokens)[-1]
    if with_sft:
        models["sft"] = supervised(ready, config)
    known = {row["tested"]: row["test"] for row in saved["log"] if "tested" in row}
    grades = {}
    for name, model in models.items():
        hinted_name = f"{name}, with the hint"
        for label, reads in ((name, "plain"), (hinted_name, "hinted")):
            if label not in known:
                policy = Policy(model, reads)
                known[label] = dopd.evaluate(policy, tests[: config.test_prompts], ready, config)
        grades[name] = dict(known[name])
        grades[name]["with the hint"] = known[hinted_name]["exact match"]
        grades[name]["skips with the hint"] = known[hinted_name]["skips"]
        grades[name] |= finer_grades(Policy(model, "plain"), tests[:400], ready, config)
    return grades


def supervised(ready, config):
    """Learns from right solutions in the student's own form, and not from its own samples."""
    student = copy.deepcopy(ready.student)
    optimizer = torch.optim.AdamW(student.parameters(), config.lr, weight_decay=0.0)
    order = random.Random(config.seed).sample(ready.splits["train"], len(ready.splits["train"]))
    for step in range(config.steps):
        places = range(step * config.batch_size, (step + 1) * config.batch_size)
        rows = [order[place % len(order)] for place in places]
        solutions = ready.tokenizer([row["answer"] + "<eos>" for row in rows]).input_ids
        logp = dopd.score(Policy(student, "plain"), rows, solutions)[:]  # (N, V)
        functional.nll_loss(logp, torch.tensor(sum(solutions, []))).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        cosine = math.cos(math.pi * step / config.steps)
        optimizer.param_groups[0]["lr"] = config.lr * (0.55 + 0.45 * cosine)
        optimizer.step()
        optimizer.zero_grad()
    student.save_pretrained(f"{config.out}/sft")
    return student


def kinds_of(row: dict, completion: str) -> list[str]:
    """What every character is: a digit of a stable name, right or wrong; a sum, right or wrong for
    the digit that is written; a digit of a wild name; or part of a solution without steps."""
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
def finer_grades(policy: Policy, rows: list[dict], ready, config) -> dict:
    """Shares of right digits and sums where the steps are written, and the entropy on wild digits:
    1.28 nats would be right, less is overconfident."""
    torch.manual_seed(config.seed)
    completions, kinds = dopd.rollout(policy, rows), []
    tokens = torch.tensor(sum(completions, []))
    entropies = dopd.token_scores(dopd.score(policy, rows, completions), tokens).entropy
    for row, ids in zip(rows, completions, strict=True):
        of_row = kinds_of(row, ready.tokenizer.decode(ids, skip_special_tokens=True))
        kinds += of_row + ["end"] * (len(ids) - len(of_row))
    means = pandas.DataFrame({"kind": kinds, "entropy": entropies.tolist()}).groupby("kind")[
        "entropy"
    ]
    counts, grades = (
        means.count(),
        {"entropy, wild": float(means.mean().get("wild digit", math.nan))},
    )
    for part in ("recall", "execute"):
        right, wrong = counts.get(f"{part}, right", 0), counts.get(f"{part}, wrong", 0)
        grades[part] = float(right / max(1, right + wrong))
    return grades


# --- 4. from runs to CSV files
def jobs_of(name: str) -> list[tuple]:
    """Setting and seed of every run: all settings with one seed, then with the next."""
    experiment = EXPERIMENTS[name]
    return [(setting, seed) for seed in experiment.seeds for setting in experiment.settings]


def collect(name: str) -> pandas.DataFrame:
    """One line per finished run and tested policy."""
    lines = []
    for setting, seed in jobs_of(name):
        file = folder_of(name, setting, seed) / "job.json"
        if file.exists():
            job = json.loads(file.read_text())
            grades = job.pop("grades")
            for method, values in grades.items():
                lines.append({"setting": setting, "seed": seed, "method": method} | values | job)
    return pandas.DataFrame(lines)


# --- 6. the command line
def main(names: list[str]) -> None:
    jobs = []
    for name in names:
        for setting, seed in jobs_of(name):
            if not Path(folder_of(name, setting, seed), "job.json").exists():
                jobs.append((name, setting, seed))
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        running = pool.imap_unordered(run, jobs)
        for _ in jobs:
            try:
                print(*next(running), flush=True)
            except Exception as error:  # of one run; the others go on
                print(f"a run failed, its log.txt says more: {error}", file=sys.stderr, flush=True)
            for name in names:
                collect(name).round(4).to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main(sys.argv[1:])
