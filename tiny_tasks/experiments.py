"""Runs the experiments; writes results/NAME.csv, and the figures and tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py situations    # names of EXPERIMENTS; two runs at a time
    python tiny_tasks/experiments.py --draw        # only figures and tables, from the CSV files

A run is one seed of one setting: its own tiny policies, then every method. It goes into
runs/NAME/SETTING-seedN. A finished run is not repeated; one that was interrupted goes on. The CSV
has whatever is finished. To add a method or a situation, add a line to RECIPES or TASKS, and its
name to METHODS or SITUATIONS.
"""

import contextlib
import copy
import json
import math
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import datasets
import pandas
import recipes  # makes dopd.py known, and adds its methods
import seaborn
import torch
import trl
import vision  # noqa: F401  (adds its tasks)
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.nn import functional

import dopd
from dopd import RECIPES, STRONG, TASKS, WEAK, Policy, Rules

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"
CHARACTERS = ["", *Rules.characters]  # of the ids of a tiny model; 0 is the end


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


class OtherHint(Rules):
    """Another form of the hint. The authors know what it means."""

    form = "none"

    def problem(self, rng):
        row = super().problem(rng)
        digits = sum(int(digit) for digit in row["hint"])
        forms = {"execution": row["answer"], "answer": row["answer"][-1], "summary": str(digits)}
        return row | {"hint": forms.get(self.form, "")}

    def solution(self, row, hinted, author, rng):
        hinted = hinted and self.form != "none"
        return super().solution(row | {"hint": row["answer"][::2]}, hinted, author, rng)


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
ROUTED = ["dopd", "dopd_99", "dopd_frozen", "agree"]
PARTS = [name for name in RECIPES if name not in METHODS]

# agree with one part changed; the paper's terms are those of LH, HS and HT
AGREE = RECIPES["agree"]
PAPERS = [("top_k", 0.6, "reverse_kl"), ("top_k", 0.6, "reverse_kl"), ("full", 1.0, "js")]
terms = []
for term, (support, weight, objective) in zip(AGREE.terms, PAPERS, strict=True):
    terms.append(term._replace(support=support, weight=weight, objective=objective))
AGREE_PARTS = {
    "agree, log gap": recipes.agree(threshold=1.1, gap_of=lambda logp: logp),
    "agree, live anchor": AGREE._replace(anchor_decay=0.0),
    "agree, slow anchor": AGREE._replace(anchor_decay=0.99),
    "agree, no teacher": AGREE._replace(terms=AGREE.terms[:2]),  # such tokens teach nothing
    "agree, no student": recipes.agree(student_may_teach=False),
    "agree, below 0.3": recipes.agree(threshold=0.3),
    "agree, below 0.7": recipes.agree(threshold=0.7),
    "agree, paper's terms": AGREE._replace(terms=terms),
}

# A frozen anchor that is copied anew. For dopd.py a decay above 1 is frozen; `watched` copies.
RENEWED = {}
for name in ("dopd_frozen", "agree"):
    for every in (40, 80):
        RENEWED[f"{name}, renewed every {every}"] = RECIPES[name]._replace(anchor_decay=every)
RECIPES |= AGREE_PARTS | RENEWED


# --- 3. experiments
class Experiment(NamedTuple):
    """Every setting with every seed."""

    settings: dict  # label: flags of dopd.py; {seed} in a path is filled in
    methods: list[str]  # of RECIPES, or sft; the flag "methods" of a setting goes before
    seeds: range = range(3)


def same(task: str, student: str = "student", **flags) -> dict:
    """The flags to start from the policies of a situation with the same seed: run it first."""
    folder = f"{ROOT}/runs/situations/{task.replace(' ', '_')}-seed{{seed}}"
    start = {"task": task, "teacher": f"{folder}/teacher", "student": f"{folder}/{student}"}
    return start | flags


four = ["shortcut", "teacher skips 95%", "mistaken", "hints ignored"]
moves = {"shortcut": same("shortcut")}
moves["shortcut, the paper's rate"] = same("shortcut", lr=5e-6, steps=200)
long, renewed, rates, sizes, hints, continual = {}, {}, {}, {}, {}, {}
for task in BOTH:
    long[task] = same(task, steps=360)
    for steps in (160, 360):
        renewed[f"{task}, {steps} steps"] = same(task, steps=steps)
    for lr in (1e-4, 4e-4):
        rates[f"{task} {lr}"] = same(task, lr=lr)
    for layers in (1, 4):
        label = f"{task}, student of {layers} layers"
        student = TASKS[task].student._replace(layers=layers)
        TASKS[label] = TASKS[task]._replace(student=student)
        sizes[label] = {"task": label}
    for first in BOTH:
        for method in OURS:
            more = {"methods": [method], "student": same(first, method)["student"]}
            continual[f"{first}, then {task}: {method}"] = same(task) | more
for form in ("execution", "summary", "answer", "none"):
    TASKS[f"hint: {form}"] = type(form, (OtherHint,), {"form": form})(STRONG, WEAK)
    hints[form] = {"task": f"hint: {form}"}
EXPERIMENTS = {
    "situations": Experiment({name: {"task": name} for name in SITUATIONS}, METHODS, range(5)),
    "agree_parts": Experiment({name: same(name) for name in four}, [*AGREE_PARTS]),
    "moved": Experiment(moves, ["dopd"]),
    "renewed": Experiment(renewed, ["dopd_frozen", "agree", *RENEWED]),
    "long": Experiment(long, ["opd", "privileged_opd", "opsd", "dopd", "dopd_frozen", "agree"]),
    "methods": Experiment({task: same(task) for task in BOTH}, PARTS),
    "continual": Experiment(continual, []),
    "hints": Experiment(hints, OURS),
    "sizes": Experiment(sizes, OURS),
    "rates": Experiment(rates, OURS),
}


# --- 4. runs
def folder_of(name: str, setting: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{setting.replace(' ', '_')}-seed{seed}"


def run(job: tuple) -> tuple:
    """One run. Its log.txt has what it prints; job.json, written last, has its grades."""
    torch.set_num_threads(1)
    name, setting, seed = job
    folder, begun = folder_of(*job), time.time()
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
        if done % 10 == 9 and first:  # it is gone after an interruption
            completions = [example["ids"] for example in metrics["rollouts"]]
            with torch.no_grad():
                now = dopd.score(anchor, rows[:4], completions)[:]
                before = dopd.score(first["policy"], rows[:4], completions)[:]
            metrics["anchor moved"] = dopd.reverse_kl(now, before).mean().item()
        return metrics

    return step


def grade_all(config, with_sft: bool) -> dict:
    """The final test of every tested policy, with finer grades from the students it has saved."""
    saved = torch.load(f"{config.out}/checkpoint.pt", "cpu", weights_only=True)
    ready = dopd.prepare(config, saved, dopd.OwnData)
    tests, loading = ready.splits["test"], getattr(ready.task, "load", dopd.load)
    models = {"student before": ready.student, "teacher": ready.teacher}
    for name in config.recipe:
        folder = f"{config.out}/{name}"
        given = replace(config, teacher=folder, student=folder)
        models[name] = loading(given, ready.task.max_new_tokens)[-1]
    if with_sft:
        models["sft"] = supervised(ready, config)
    known = {row["tested"]: row["test"] for row in saved["log"] if "tested" in row}
    grades = {}
    for name, model in models.items():
        hinted_name = f"{name}, with the hint"
        for label, reads in ((name, "plain"), (hinted_name, "hinted")):
            if label not in known:
                prompts = tests[: config.test_prompts]
                known[label] = dopd.evaluate(Policy(model, reads), prompts, ready, config)
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
    kinds, entropies = pandas.Series(kinds), pandas.Series(entropies.tolist())
    grades = {"entropy, wild": entropies[kinds == "wild digit"].mean()}
    for part in ("recall", "execute"):
        own = kinds[kinds.str.startswith(part)]
        grades[part] = own.str.endswith("right").mean()
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


def collect(name: str) -> pandas.DataFrame:
    """One line per finished run and tested policy."""
    lines = []
    for job in filter(is_done, jobs_of(name)):
        found = json.loads(Path(folder_of(*job), "job.json").read_text())
        for method, grades in found.pop("grades").items():
            where = {"setting": job[1], "seed": job[2], "method": method}
            lines.append(where | grades | found)
    return pandas.DataFrame(lines)


def logs(name: str, method_and_more: list):
    """Where a step was made, and its metrics: of all finished runs and these methods."""
    for job in filter(is_done, jobs_of(name)):
        for line in Path(folder_of(*job), "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row.get("recipe") in method_and_more:
                where = {"setting": job[1], "seed": job[2], "method": row["recipe"]}
                yield where | {"step": row["step"]}, row


def tokens_of(settings: list) -> pandas.DataFrame:
    """Every token of the completions that metrics.jsonl keeps: its true kind, and where it went."""
    lines = []
    for where, row in logs("situations", ROUTED):
        for example in row["rollouts"] if where["setting"] in settings else ():
            text = "".join(CHARACTERS[token] for token in example["ids"])
            kinds = kinds_of(example, text) + ["end"] * len(example["ids"])
            for place, regime in enumerate(example["regimes"]):
                token = {"place": place, "kind": kinds[place], "regime": regime}
                token["teacher"] = example["privileged_teacher"][place]
                token["student"] = example["privileged_student"][place]
                lines.append(where | token)
    return pandas.DataFrame(lines)


def landed() -> pandas.DataFrame:
    """How many tokens of every kind went to which regime, and how many of these both privileged
    policies find unlikely."""
    frame = tokens_of(["shortcut", "rules", "mistaken"])
    frame["both unlikely"] = (frame.teacher < 0.1) & (frame.student < 0.1)
    by = frame.groupby(["setting", "method", "kind", "regime"])["both unlikely"]
    return by.agg(["size", "sum"]).set_axis(["tokens", "both unlikely"], axis=1).reset_index()


def first_tokens() -> pandas.DataFrame:
    """How likely the first token is under the two privileged policies, per 20 steps."""
    frame = tokens_of(["shortcut"])
    frame = frame[frame.place == 0]
    frame["first token"] = (frame.kind == "skip").map({True: "a skip", False: "a step"})
    frame["step"] = (frame.step - 1) // 20 * 20 + 10
    by = frame.groupby(["method", "first token", "seed", "step"], as_index=False)
    return by[["teacher", "student"]].mean()


def planes() -> pandas.DataFrame:
    """Tokens on the plane of the two privileged policies."""
    frame = tokens_of(["mistaken"])
    frame = frame[(frame.method == "dopd_frozen") & (frame.seed == 0)].sample(2000, random_state=0)
    return frame[["kind", "regime", "teacher", "student"]]


def over_time(name: str) -> pandas.DataFrame:
    """Of every tenth step: entropy, exact match (validation), how far the anchor moved."""
    lines = []
    for where, row in logs(name, [*RECIPES]):
        if row["step"] % 10 == 0:
            exact = row.get("validation", {}).get("exact match")
            moved = row.get("anchor moved")
            more = {"exact match": exact, "entropy": row["entropy"], "anchor moved": moved}
            lines.append(where | more)
    return pandas.DataFrame(lines)


def cost(rounds: int = 5, steps: int = 20) -> pandas.DataFrame:
    """How long a step takes: all methods in turn, and TRL's trainer with the same policies and
    prompts, without a hint. Needs the policies of situations, and nothing else running."""
    torch.set_num_threads(1)
    config = replace(start("renewed", "shortcut, 160 steps", 0, False)[0], steps=steps)
    config.out, config.eval_every = f"{ROOT}/runs/cost", steps + 1
    task, lines = TASKS["shortcut"], []
    tokenizer, teacher, student = dopd.load(config, task.max_new_tokens)
    rows = [task.problem(random.Random(i)) for i in range(config.batch_size * steps)]
    dopd.encode(rows, tokenizer, (teacher, student), task.hint_template)
    splits = {"train": rows, "validation": rows[:1]}
    ready = dopd.Ready(task, splits, tokenizer, teacher, student)
    prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows] * 4)
    flags = {"max_steps": steps, "per_device_train_batch_size": 128, "max_completion_length": 7}
    flags |= {"bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
    for name in [*OURS, "opd in TRL"] * rounds:
        if name in RECIPES:
            begun = time.time()
            dopd.train(name, ready, [], {}, config)
        else:
            given = trl.DistillationConfig(config.out, disable_tqdm=True, **flags)
            more = {"train_dataset": prompts, "processing_class": tokenizer}
            trainer = trl.DistillationTrainer(copy.deepcopy(student), teacher, given, **more)
            begun = time.time()
            trainer.train()
        lines.append({"method": name, "milliseconds": 1000 * (time.time() - begun) / steps})
    return pandas.DataFrame(lines)


# name of the CSV file: the experiment whose runs it reads, and the function
EXTRAS = {
    "landed": ("situations", landed),
    "first_tokens": ("situations", first_tokens),
    "planes": ("situations", planes),
    "curves": ("long", lambda: over_time("long")),
    "anchor_moved": ("moved", lambda: over_time("moved")),
    "cost": ("cost", cost),
}


# --- 6. tables
def spread(values: pandas.Series) -> str:
    if len(values) == 1:
        return f"{values.mean():.2f}"
    return f"{values.mean():.2f} ± {values.std():.2f}"


def trained(frame: pandas.DataFrame) -> pandas.DataFrame:
    return frame[~frame.method.isin(["student before", "teacher"])]


def grid(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Exact match: a line per method, a column per setting."""
    frame = trained(frame).assign(setting=frame.setting.str.split(":").str[0])
    by = {"index": "method", "columns": "setting", "values": "exact match"}
    return frame.pivot_table(**by, aggfunc=spread, sort=False).fillna("").reset_index()


def complete(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The students of those seeds that have all settings."""
    count = frame.groupby("seed").setting.nunique()
    return trained(frame[frame.seed.isin(count[count == count.max()].index)])


def exact_of(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Mean exact match: methods, the best on average first, x situations."""
    means = frame.pivot_table("exact match", "method", "setting")
    order = means.mean(axis=1).sort_values(ascending=False).index
    return means.loc[order, [name for name in SITUATIONS if name in means]]


def summary(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Regret: how far a method is below the best method of a situation."""
    exact = exact_of(complete(frame))
    regret = exact.max() - exact
    table = pandas.DataFrame({"mean": exact.mean(axis=1), "worst regret": regret.max(axis=1)})
    table = table.map("{:.2f}".format)
    table["in the situation"] = regret.idxmax(axis=1)
    for method in exact.index:
        below = exact.columns[exact.loc[method] < exact.loc["opd"] - 0.02]
        table.loc[method, "more than 0.02 below `opd`"] = ", ".join(below)
    return table.reset_index()


def claims(frames: dict) -> pandas.DataFrame:
    """Holds: higher in every seed. In part: the mean is higher. From the first file with both."""
    table = frames["claims"]
    for i, claim in table.iterrows():
        for task in BOTH:
            for name in ("methods", "situations"):
                exact = frames[name][frames[name].setting == task]
                exact = exact.pivot(index="seed", columns="method", values="exact match")
                pair = exact.reindex(columns=[claim.higher, claim.lower]).dropna()
                if len(pair):
                    high, low = pair[claim.higher], pair[claim.lower]
            verdict = "in part" if high.mean() > low.mean() else "no"
            if (high > low).all():
                verdict = "holds"
            table.loc[i, f"`{task}`"] = (
                f"**{verdict}**: `{claim.higher}` {high.mean():.2f}, `{claim.lower}` "
                f"{low.mean():.2f}; {(high > low).sum()} of {len(pair)}"
            )
    return table.drop(columns=["higher", "lower"])


def where_they_land(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Percentages of a kind of tokens in DOPD's regimes; how many of it both policies find
    unlikely, and how many of these have a high gap."""
    lines = []
    frame = frame[frame.method.isin(["dopd", "dopd_frozen"])]
    for (method, kind), part in frame.groupby(["method", "kind"]):
        part = part.set_index("regime").reindex(["LH", "LL", "HT", "HS"], fill_value=0)
        unlikely = part["both unlikely"]
        shares = (100 * part.tokens / part.tokens.sum()).map("{:.0f}".format)
        line = {"method": method, "kind": kind, "LH LL HT HS (%)": " ".join(shares)}
        line["both unlikely (%)"] = f"{100 * unlikely.sum() / part.tokens.sum():.0f}"
        line["of these, high gap (%)"] = ""
        if unlikely.sum() >= 20:
            line["of these, high gap (%)"] = f"{100 * unlikely[2:].sum() / unlikely.sum():.0f}"
        lines.append(line)
    return pandas.DataFrame(lines)


def bookkeeping(frames: dict) -> pandas.DataFrame:
    lines = []
    for name, frame in frames.items():
        if "commit" in frame:
            line = {"file": f"{name}.csv", "methods": frame.method.nunique()}
            line["seeds"] = frame.seed.nunique()
            seconds = frame.groupby(["setting", "seed"]).seconds.first()
            line["minutes of one core"] = f"{seconds.sum() / 60:.0f}"
            lines.append(line | {"commits": " ".join(frame.commit.unique())})
    return pandas.DataFrame(lines)


def write_tables(frames: dict) -> None:
    """Every table between <!-- NAME --> and <!-- /NAME --> in both READMEs."""
    tables = {"claims": claims(frames), "summary": summary(frames["situations"])}
    tables["bookkeeping"] = bookkeeping(frames)
    for name, frame in frames.items():
        if "commit" in frame:
            tables[name] = grid(frame)
    for setting, frame in frames["landed"].groupby("setting"):
        tables[f"landed, {setting}"] = where_they_land(frame)
    by = frames["cost"].groupby("method", sort=False).milliseconds
    tables["cost"] = by.agg(spread).reset_index()
    for file in (ROOT / "README.md", RESULTS / "README.md"):
        text = file.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if begin in text:
                before, rest = text.split(begin)
                written = table.to_markdown(index=False, tablefmt="github", disable_numparse=True)
                text = f"{before}{begin}\n{written}\n\n{end}{rest.split(end)[1]}"
        file.write_text(text)


# --- 7. figures
def heat(axis, exact: pandas.DataFrame, opd, best) -> None:
    """A heat map. The best is framed; what is below opd is hatched."""
    shown = {"annot": True, "fmt": ".2f", "vmin": 0, "vmax": 1, "cmap": "viridis"}
    seaborn.heatmap(exact, ax=axis, cbar=False, **shown)
    below, is_best = (exact < opd - 0.005).to_numpy(), (exact > best - 0.005).to_numpy()
    for line, column in zip(*below.nonzero(), strict=True):
        cell = {"fill": False, "hatch": "//", "edgecolor": "white", "lw": 1}
        axis.add_patch(Rectangle((column, line), 1, 1, **cell))
    for line, column in zip(*is_best.nonzero(), strict=True):
        cell = {"fill": False, "edgecolor": "red", "lw": 3, "clip_on": False, "zorder": 3}
        axis.add_patch(Rectangle((column, line), 1, 1, **cell))


def draw_situations(frame: pandas.DataFrame, file: Path) -> None:
    exact, seeds = exact_of(frame), frame.seed.nunique()
    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    heat(left, exact, exact.loc["opd"], exact.max())
    left.set(xlabel="", ylabel="student trained with")
    left.set_title(f"exact match, mean of {seeds} seeds. Frame: the best. Hatched: below opd.")
    left.set_xticks(left.get_xticks(), left.get_xticklabels(), rotation=30, ha="right")
    places = [line + 0.5 for line in range(len(exact))]
    regret = (exact.max() - exact).max(axis=1)
    right.scatter(exact.mean(axis=1), places, 60, "black", label="mean")
    right.scatter(regret, places, 60, "orange", marker="X", label="worst regret")
    right.set(title="over all situations", xlim=(0, 1), xlabel="exact match")
    right.grid(alpha=0.3)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    figure.savefig(file, dpi=80)


def draw_dots(frame: pandas.DataFrame, file: Path) -> None:
    """A dot for every seed and method, on the two tasks of dopd.py."""
    shown = {"x": "exact match", "y": "method", "col": "setting", "col_order": BOTH}
    shown |= {"order": exact_of(frame).index, "jitter": False, "alpha": 0.6, "s": 60}
    grid = seaborn.catplot(frame, height=4, aspect=1.4, color="#00695c", **shown)
    grid.set_titles("{col_name}: a dot is a seed").set(xlim=(0, 1), ylabel="student trained with")
    for axis in grid.axes.flat:
        axis.grid(alpha=0.3)
    grid.savefig(file, dpi=80)


def draw_planes(frame: pandas.DataFrame, file: Path) -> None:
    """The same tokens, as sorted by the log gap and by the gap of probabilities."""
    near = (frame.teacher - frame.student).abs() < 0.5
    by_log, by_probability = "DOPD: gap of log-probabilities", "agree: gap of probabilities"
    two = frame.assign(regime=near.map({True: "agree: gap below 1/2", False: "disagree"}))
    both = pandas.concat([frame.assign(rule=by_log), two.assign(rule=by_probability)])
    both[["student", "teacher"]] = both[["student", "teacher"]].clip(lower=1e-4)
    colours = dict(zip(["LH", "LL", "HT", "HS"], dopd.REGIME_COLOURS, strict=False))
    colours |= {"agree: gap below 1/2": "#00897b", "disagree": "#ad1457"}
    shown = {"x": "student", "y": "teacher", "hue": "regime", "palette": colours, "s": 18}
    grid = seaborn.relplot(both, col="rule", height=5, edgecolor="grey", linewidth=0.2, **shown)
    grid.set(xscale="log", yscale="log", xlabel="q_S, privileged student")
    grid.set(ylabel="q_T, privileged teacher").set_titles("{col_name}")
    for axis in grid.axes.flat:
        axis.axvline(0.1, color="grey", linestyle=":")
        axis.axhline(0.1, color="grey", linestyle=":")
    grid.savefig(file, dpi=80)


def draw_seeds(frame: pandas.DataFrame, file: Path, values: list, label: str, **axes) -> None:
    """A panel for every col and row; every seed is a line."""
    known = frame.columns.difference(values)
    frame = frame.melt(known, values, "which").dropna(subset="value")
    shown = {"kind": "line", "units": "seed", "estimator": None, "alpha": 0.7}
    grid = seaborn.relplot(frame, x="step", y="value", height=2.8, aspect=1.4, **shown, **axes)
    grid.set_titles("{col_name}: {row_name}").set(ylabel=label).savefig(file, dpi=80)


def draw_map(frame: pandas.DataFrame, file: Path) -> None:
    """By how often teacher and student leave out the steps."""
    x, y = "teacher skips, with the hint", "student skips"
    frame[[x, y]] = frame.setting.str.split(" ", expand=True)
    exact = {name: part.pivot_table("exact match", y, x) for name, part in frame.groupby("method")}
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axis, method in zip(figure.subplots(2, 3).flat, OURS, strict=False):
        heat(axis, exact[method], exact["opd"], math.inf)
        axis.set_title(method)
    figure.suptitle("exact match; hatched: below opd")
    figure.savefig(file, dpi=80)


def draw() -> None:
    """All figures and tables, from the CSV files that are there."""
    files = sorted(RESULTS.glob("*.csv"))
    frames = {file.stem: pandas.read_csv(file, dtype={"commit": str}) for file in files}
    write_tables(frames)
    situations = complete(frames["situations"])
    draw_situations(situations, RESULTS / "situations.png")
    draw_dots(situations, RESULTS / "dots.png")
    draw_planes(frames["planes"], RESULTS / "planes.png")
    draw_map(frames["map"], RESULTS / "map.png")
    axes = {"hue": "which", "col": "method", "row": "first token"}
    who = ["teacher", "student"]
    draw_seeds(frames["first_tokens"], RESULTS / "anchor.png", who, "probability", **axes)
    axes = {"hue": "method", "col": "setting", "row": "which", "facet_kws": {"sharey": "row"}}
    both = ["exact match", "entropy"]
    draw_seeds(frames["curves"], RESULTS / "long.png", both, "share, or nats", **axes)
    axes = {"hue": "seed", "col": "setting", "row": "which", "palette": "tab10"}
    moved = ["anchor moved"]
    draw_seeds(frames["anchor_moved"], RESULTS / "moved.png", moved, "KL, nats", **axes)


# --- 8. the command line
def main(names: list[str]) -> None:
    names = [name for name in names if name != "--draw"]
    if not {*names} <= {*EXPERIMENTS, "cost"}:
        sys.exit(f"choose from {', '.join(EXPERIMENTS)}, cost; or --draw")
    jobs = []
    for name in EXPERIMENTS:
        if name in names:
            jobs += [job for job in jobs_of(name) if not is_done(job)]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        running = pool.imap_unordered(run, jobs)
        for _ in jobs:
            try:
                print(*next(running), flush=True)
            except Exception as error:  # of one run; the others go on
                print(f"a run failed, its log.txt says more: {error}", file=sys.stderr, flush=True)
            write_results(names)
    for file, (name, function) in EXTRAS.items():
        if name in names:
            function().round(4).to_csv(RESULTS / f"{file}.csv", index=False)
    draw()


def write_results(names: list[str]) -> None:
    for name in names:
        if name in EXPERIMENTS:
            collect(name).round(4).to_csv(RESULTS / f"{name}.csv", index=False)


if __name__ == "__main__":
    main(sys.argv[1:])
