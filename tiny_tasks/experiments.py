"""Runs the experiments; writes results/NAME.csv, the figures beside it, and the tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py shortcut rules    # names of EXPERIMENTS, or all; two at a time
    python tiny_tasks/experiments.py --draw            # only tables and figures, from the CSV files that are there

A run is one seed of one setting: its own tiny policies, then every recipe. It goes into runs/NAME/SETTING-seedN. A
finished run is not repeated: delete its folder after changing the code. To add one, add an entry to EXPERIMENTS.
"""

import contextlib
import copy
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

import datasets  # noqa: E402
import joblib  # noqa: E402
import pandas  # noqa: E402
import seaborn  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from scipy import stats  # noqa: E402

import dopd  # noqa: E402
import recipes  # noqa: E402
import vision  # noqa: E402, F401  (adds its task)

BEFORE = dict(vars(dopd))                                               # as it is before a run changes it
KNOWN = [*dopd.RECIPES]                                                 # of dopd.py and recipes.py
TOKENS = ["<eos>", *dopd.Rules.CHARACTERS]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"


# ------------------------------------------------------------------------------------------------------ 1. experiments
class Experiment(NamedTuple):
    """Every setting with every seed: flags of dopd.py, and the recipes that are compared."""
    settings: dict                 # label: flags of dopd.py, or what `run` takes out of them; up to a colon: its column
    recipes: list[str]
    seeds: range = range(3)
    start: bool = False            # from the tiny policies of shortcut and rules: run these first


# Twenty pairs of neighbouring names, and the prompts that have one.
NAMES = "abcdefghijklm"
PAIRS = {first + NAMES[(place + far) % 10] for place, first in enumerate(NAMES[:10]) for far in (3, 7)}
PAIRED = {f"{start}{a}{b}{c}=" for start in range(10) for a in NAMES for b in NAMES for c in NAMES
          if {a + b, b + c} & PAIRS}


class Dials(dopd.Rules):
    """`rules` with more forms of the hint, and dials: more wild names, wrong hints, a teacher that ignores its hint,
    and pairs of neighbouring names that only the test has."""
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


def z_scored(scores):
    """The paper's router, but q_T and q_S are divided by their deviations before their sum tells LH from LL."""
    regimes, both = dopd.route(scores), sum(score.logp.exp() / score.logp.exp().std() for score in scores.values())
    return torch.where(regimes <= dopd.Regime.LL, (both < both.mean()).long(), regimes)      # LH is 0, LL is 1


# Functions of dopd.py that another one stands in for during a training step.
STAND_INS = {"sft": {"rollout": lambda _, rows, size: [[*map(TOKENS.index, row["answer"]), 0] for row in rows]}}
for name in ("dopd", "dopd_frozen"):
    OTHERS |= {f"{name}, outliers averaged": dopd.RECIPES[name]._replace(router=lambda scores: dopd.route(scores, 100)),
               f"{name}, z-scores": dopd.RECIPES[name]._replace(router=z_scored)}
    for choice, top_k in (("no tail", lambda *given: [logp[..., :-1] for logp in BEFORE["top_k_with_tail"](*given)]),
                          ("source's top-K", lambda own, source, k: BEFORE["top_k_with_tail"](source, own, k)[::-1])):
        OTHERS[f"{name}, {choice}"] = dopd.RECIPES[name]._replace()     # a copy, to be told apart
        STAND_INS[f"{name}, {choice}"] = {"top_k_with_tail": top_k}
HINTED = "privileged_teacher, hinted student"                           # it reads the hint in training only
dopd.RECIPES |= OTHERS | {HINTED: dopd.RECIPES["privileged_teacher"]._replace()}

METHODS = ["vanilla", "privileged_teacher", "dopd", "dopd_frozen"]
OURS = [*METHODS, "half", "where_unsure"]
MAIN = [*KNOWN[:KNOWN.index("HT")], "by chance"]
PARTS = [name for name in KNOWN[KNOWN.index("HT"):] if name not in ("LH+LL+HT+HS", "reverse_kl full", "by chance")]
TASKS = {task: {"task": task, "test_prompts": 600} for task in ("shortcut", "rules")}
EXPERIMENTS = {
    "shortcut": Experiment({"shortcut": {"task": "shortcut"}}, MAIN, range(5)),
    "rules": Experiment({"rules": {"task": "rules"}}, MAIN, range(5)),
    "vision": Experiment({f"vision, {hint}": {"task": "vision", "test_prompts": 600, "hint": hint}
                          for hint in ("steps", "box", "none")}, OURS),
    "map": Experiment({f"{teacher} {student}": {
        "test_prompts": 600, "fields": {"teacher": dopd.STRONG._replace(skips_hinted=teacher),
                                        "student": dopd.WEAK._replace(skips=student, skips_hinted=student)}}
        for teacher in (0.35, 0.7, 0.95) for student in (0.0, 0.1, 0.3)}, OURS),
    "rates": Experiment({f"{task} {lr}": TASKS[task] | {"lr": lr} for task in TASKS for lr in (1e-4, 4e-4)},
                        [*OURS, "dopd_half"], range(5), start=True),
    "parts": Experiment(TASKS, PARTS, start=True),
    "others": Experiment(TASKS, [*OTHERS], start=True),
    "hints": Experiment({hint: TASKS["rules"] | {"hint": hint, "dials": {}}
                         for hint in ("execution", "summary", "answer", "none")}, METHODS[1:4]),
    "sizes": Experiment({f"{task}, student of {layers} layers": TASKS[task] | {
        "fields": {"student": dopd.TASKS[task].student._replace(layers=layers)}}
        for task in TASKS for layers in (1, 4)}, METHODS),
    "dials": Experiment({label: TASKS["rules"] | flags for label, flags in {
        "more wild names": {"dials": {"more_wild": 0.5}}, "wrong hints": {"dials": {"wrong_hints": 0.33}},
        "half of the hints ignored": {"dials": {"doubts": 0.5}}, "all hints ignored": {"dials": {"doubts": 1.0}},
        "new pairs": {"dials": {"pairs": True}}, **{f"{names} names": {
            "test_prompts": 1200, "fields": {"names": names, "max_new_tokens": 2 * names + 1}}
            for names in (2, 6, 10)}}.items()}, OURS),
    "continual": Experiment({f"{first}, then {second}: {method}": TASKS[second] | {
        "recipe": [method], "student": f"{ROOT}/runs/{first}/{first}-seed{{seed}}/{method}"}
        for first in TASKS for second in TASKS for method in OURS}, OURS, start=True),
    "long": Experiment({task: TASKS[task] | {"steps": 360} for task in TASKS}, [
        "privileged_teacher", "privileged_student", "dopd", "dopd_frozen", HINTED], start=True),
    "smollm2": Experiment({"SmolLM2-135M-Instruct": {                   # results/README.md: how to get it
        "teacher": "runs/smollm2", "student": "runs/smollm2", "data": "runs/examples.jsonl", "steps": 10, "lr": 1e-5,
        "batch_size": 4, "top_k": 128, "max_new_tokens": 64, "answer_regex": r"\d+"}}, METHODS[1:], range(1)),
}


# ------------------------------------------------------------------------------------------------------------- 2. runs
def sampled(rows, completions):
    """Log-probs of a "policy" that is sure of the sampled tokens."""
    tokens = torch.tensor(sum(completions, []))
    return lambda index: torch.full((len(index), len(TOKENS)), -torch.inf).scatter(1, tokens[index, None], 0.0)


def judge(rows, completions):
    """GRPO's advantage, in place of log-probs: right or not, less the mean of the prompt's four, by their deviation."""
    right = torch.tensor([bool(ids[-1] == 0 and dopd.TASKS["rules"].check(row, "".join(TOKENS[i] for i in ids[:-1])))
                          for row, ids in zip(rows, completions)]).float().view(-1, 4)
    advantage = (right - right.mean(1, keepdim=True)) / (right.std(1, keepdim=True) + 1e-4)
    each = advantage.flatten().repeat_interleave(torch.tensor([len(ids) for ids in completions]))
    return lambda index: each[index, None].expand(-1, len(TOKENS))


def run(name: str, label: str, seed: int) -> None:
    """One run. Its log.txt has what it prints."""
    experiment, folder, begun = EXPERIMENTS[name], folder_of(name, label, seed), time.time()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip()
    flags = {"task": "shortcut", "recipe": experiment.recipes} | experiment.settings[label]
    task, dials = dopd.TASKS[flags["task"]], flags.pop("dials", None)
    Dials.dials, task = dials or {}, task if dials is None else Dials(*task)
    tasks = dopd.TASKS | {flags["task"]: task._replace(**flags.pop("fields", {}))}
    if experiment.start:
        there = folder_of(flags["task"], flags["task"], seed)
        flags = {role: str(there / role) for role in ("teacher", "student")} | flags
        flags["student"] = flags["student"].format(seed=seed)
    shutil.rmtree(folder, ignore_errors=True)                           # an unfinished run begins anew
    folder.mkdir(parents=True)

    def score(policy, rows, completions, micro_batch=0):
        if policy.model in (sampled, judge):
            return policy.model(rows, completions)
        return BEFORE["score"](policy, rows, completions, micro_batch)

    def warm_start(task, role, config, held_out):
        return BEFORE["warm_start"](task, role, config, held_out | (PAIRED if Dials.dials.get("pairs") else set()))

    def step(recipe, policies, optimizer, rows, config):
        known = next(name for name, value in dopd.RECIPES.items() if value is recipe)
        hints = [row["hinted"][:len(row["hinted"]) - len(row["plain"])] for row in rows]     # the next row's is wrong
        rows = [row | {"misled": hint + row["plain"]} for row, hint in zip(rows, hints[1:] + hints[:1])]
        more = {"student": policies["student"]._replace(reads="hinted" if known == HINTED else "plain"),
                "misled_teacher": policies["teacher"]._replace(reads="misled"),
                "sampled": dopd.Policy(sampled, ""), "judge": dopd.Policy(judge, "")}
        with mock.patch.multiple(dopd, **{"rollout": dopd.rollout} | STAND_INS.get(known, {})):     # not in evaluations
            return BEFORE["distill_step"](recipe, policies | more, optimizer, rows, config)

    with open(folder / "log.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), \
            mock.patch.multiple(dopd, score=score, distill_step=step, warm_start=warm_start, TASKS=tasks):
        try:
            dopd.run(dopd.Config(**flags, seed=seed, out=str(folder)))
        except SystemExit:                 # it would end the worker without a word
            raise RuntimeError(f"the last line of {folder}/log.txt says why") from None
    Path(folder, "checkpoint.pt").unlink(missing_ok=True)
    Path(folder, "job.json").write_text(json.dumps({"seconds": round(time.time() - begun), "commit": commit}))


def folder_of(name: str, label: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{label.replace(' ', '_')}-seed{seed}"


def folders(name: str) -> list[tuple]:
    """Every run of an experiment: its setting, seed and folder."""
    experiment = EXPERIMENTS[name]
    return [(label, seed, folder_of(name, label, seed)) for seed in experiment.seeds for label in experiment.settings]


def logs(name: str):
    """Every row of every metrics.jsonl, with its setting and seed."""
    for label, seed, folder in folders(name):
        for line in Path(folder, "metrics.jsonl").read_text().splitlines():
            yield label, seed, json.loads(line)


def collect(name: str) -> pandas.DataFrame:
    """One line per run and policy: setting, seed, the final test, seconds and commit."""
    return pandas.DataFrame([
        {"setting": label, "seed": seed, "policy": row["recipe"], **row["test"],
         **json.loads(Path(folder_of(name, label, seed), "job.json").read_text())}
        for label, seed, row in logs(name) if "test" in row])


# ----------------------------------------------------------------------------------------------- 3. where tokens land
def audit(name: str) -> pandas.DataFrame:
    """How many tokens of every kind went to which regime, over the rollouts that metrics.jsonl keeps."""
    return pandas.DataFrame([
        {"setting": label, "policy": row["recipe"], "kind": kind, "regime": dopd.Regime(regime).name}
        for label, _, row in logs(name) if row["recipe"] in METHODS[2:]
        for prompt, ids, regimes, *_ in row.get("rollouts", []) for kind, regime in zip(kinds_of(prompt, ids), regimes)
    ]).value_counts(sort=False).rename("tokens").reset_index()


def kinds_of(prompt: str, ids: list[int]) -> list[str]:
    """What every token of a completion is: a name's digit, right or wrong; a sum, right or wrong; part of a skip."""
    task, tokens = dopd.TASKS["rules"], [TOKENS[i] for i in ids]
    answer = task.work(int(prompt[0]), task.recall(prompt[1:-1], 10, random.Random(0)))
    kinds = ["skip"] + ["after a skip"] * (len(ids) - 1) if tokens[0] == "=" else ["end"] * len(ids)
    for place, kind, right in task.grade({"prompt": prompt, "answer": answer}, tokens)[1:]:
        kinds[place] = "wild digit" if kind == "unlearnable" else f"{kind}, {'right' if right else 'wrong'}"
    return kinds


def first_tokens(name: str) -> pandas.DataFrame:
    """Of the first tokens: how sure the two privileged policies are, and the shares of the regimes, per 20 steps."""
    frame = pandas.DataFrame([
        {"recipe": row["recipe"], "seed": seed, "step": (row["step"] - 1) // 20 * 20 + 10,
         "first token": "skips" if TOKENS[ids[0]] == "=" else "works", "teacher": teacher[0], "student": student[0],
         "share": dopd.Regime(regimes[0]).name}
        for _, seed, row in logs(name) if row["recipe"] in METHODS[2:]
        for _, ids, regimes, teacher, student in row.get("rollouts", [])])
    return pandas.get_dummies(frame, columns=["share"]).groupby([*frame.columns[:4]], as_index=False).mean()


def curves(name: str) -> pandas.DataFrame:
    """Entropy and exact match (validation) on the way, every twentieth step."""
    return pandas.DataFrame([
        {"setting": label, "seed": seed, "policy": row["recipe"], "step": row["step"], "entropy": row["entropy"],
         "exact match": row.get("validation", {}).get("exact match")}
        for label, seed, row in logs(name) if row.get("step", 1) % 20 == 0])


def cost(_, rounds: int = 5, steps: int = 20) -> pandas.DataFrame:
    """How long a step of `shortcut` takes: all methods in turn in one process, and TRL's trainer with the same policies
    and prompts, without the hint. Needs the policies of shortcut, and nothing else running."""
    here, task, rng = folder_of("shortcut", "shortcut", 0), dopd.TASKS["shortcut"], random.Random(0)
    config, lines = dopd.Config(teacher=str(here / "teacher"), student=str(here / "student")), []
    tokenizer, teacher, student = dopd.load(config, task.max_new_tokens)
    dopd.encode(rows := [task.problem(rng) for _ in range(32 * steps)], tokenizer, student, task.hint_template, "steps")
    prompts = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in rows for _ in range(4)])
    flags = trl.DistillationConfig(str(here / "trl"), max_steps=steps, per_device_train_batch_size=128, bf16=False,
        gradient_checkpointing=False, max_completion_length=7, save_strategy="no", disable_tqdm=True)
    for name in [*OURS, "vanilla in TRL"] * rounds:
        learner = copy.deepcopy(student)
        adamw, anchor = torch.optim.AdamW(learner.parameters(), 2e-4), learner if name == "dopd" else student
        policies = {"student": dopd.Policy(learner, "plain"), "privileged_student": dopd.Policy(anchor, "hinted"),
                    "teacher": dopd.Policy(teacher, "plain"), "privileged_teacher": dopd.Policy(teacher, "hinted")}
        begun = time.time()
        if name in dopd.RECIPES:
            for i in range(0, len(rows), 32):
                dopd.distill_step(dopd.RECIPES[name], policies, adamw, rows[i:i + 32], config)
        else:
            trainer = trl.DistillationTrainer(learner, teacher, flags, prompts, processing_class=tokenizer)
            begun = time.time()
            trainer.train()
        lines.append({"policy": name, "milliseconds of a step": 1000 * (time.time() - begun) / steps})
    return pandas.DataFrame(lines)


# name of the CSV file: function, and the experiments whose runs it reads
EXTRAS = {"audit": (audit, ["shortcut", "rules"]), "first_tokens": (first_tokens, ["shortcut"]),
          "curves": (curves, ["long"]), "cost": (cost, ["cost"])}


# ------------------------------------------------------------------------------------------------ 4. tables and figures
SUMMARY = ["student before", "teacher", "vanilla", "privileged_teacher", "dopd", "dopd_99", "dopd_frozen", "by chance",
           "half", "where_unsure", "rlcsd", "grpo", "sft"]
COLUMNS = ["exact match", "with hint", "skips", "recall", "execute", "entropy, wild (best 1.28)"]


def spread(values: pandas.Series) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"


def methods(known: pandas.DataFrame) -> pandas.DataFrame:
    """Every policy on both tasks: mean ± standard deviation over the seeds, and exact match seed by seed."""
    parts = []
    for task, columns in (("shortcut", COLUMNS), ("rules", ["exact match", "with hint", COLUMNS[-1]])):
        by = known[known.setting == task].groupby("policy", sort=False)
        part = by[columns].agg(spread)
        part.insert(1, "seed by seed", by["exact match"].agg(lambda each: " ".join(f"{value:.2f}" for value in each)))
        parts.append(part.add_prefix(f"`{task}`: "))
    return pandas.concat(parts, axis=1)


def grid(frame: pandas.DataFrame) -> pandas.DataFrame:
    """Exact match: a line per method, a column per setting."""
    trained = frame[~frame.policy.isin(["student before", "teacher"])].replace({"setting": {": .*": ""}}, regex=True)
    return trained.pivot_table(index="policy", columns="setting", values="exact match", aggfunc=spread, sort=False)


def landed(frame: pandas.DataFrame) -> pandas.DataFrame:
    """For every kind of token: the percentages in LH, LL, HT and HS."""
    counts = frame.pivot_table(index=["setting", "policy", "kind"], columns="regime", values="tokens", fill_value=0)
    shares = (100 * counts[["LH", "LL", "HT", "HS"]].div(counts.sum(axis=1), axis=0)).map("{:.0f}".format)
    cells = shares.agg(" ".join, axis=1).unstack(["setting", "policy"])
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
    ("where_unsure (ours) beats the privileged teacher", "-", "where_unsure", "privileged_teacher"),
]


def verdicts(known: pandas.DataFrame) -> pandas.DataFrame:
    """Holds: higher in every seed. In part: the mean is higher. p: paired t-test over the seeds, two-sided."""
    found = pandas.DataFrame([claim[:2] for claim in CLAIMS], columns=["claim", "paper"])
    exact = known.pivot(index=["setting", "seed"], columns="policy", values="exact match")
    for number, (_, _, higher, lower) in enumerate(CLAIMS):
        for task in ("shortcut", "rules"):
            pair = exact.loc[task].reindex(columns=[higher, lower]).dropna()
            above, means = (pair[higher] > pair[lower]).sum(), pair.mean()
            verdict = "holds" if above == len(pair) else "in part" if means[higher] > means[lower] else "no"
            p = stats.ttest_rel(pair[higher], pair[lower]).pvalue
            found.loc[number, f"`{task}`"] = (
                f"**{verdict}**: {means[higher]:.2f} against {means[lower]:.2f}, {above} of {len(pair)}, p = {p:.1g}")
    return found.set_index("claim")


def draw_map(frame: pandas.DataFrame, file: Path) -> None:
    """Exact match of every method, by how often the teacher and the student skip the working."""
    x, y = "teacher skips, with the hint", "student skips"
    frame[[x, y]] = frame.setting.str.split(" ", expand=True)
    grid = seaborn.FacetGrid(frame, col="policy", col_order=OURS, col_wrap=3, height=3)
    grid.map_dataframe(lambda data, **_: seaborn.heatmap(
        data.pivot_table("exact match", y, x), vmin=0, vmax=1, annot=True, fmt=".2f", cmap="viridis", cbar=False))
    grid.set_titles("{col_name}").set_axis_labels(x, y).savefig(file, dpi=100)


def draw_lines(frame: pandas.DataFrame, file: Path, label: str, **axes) -> None:
    """A panel for every col and row. A band goes from the lowest to the highest seed."""
    grid = seaborn.relplot(frame, x="step", y="value", kind="line", errorbar=("pi", 100), height=3, aspect=1.5, **axes)
    grid.set_titles("{col_name}: {row_name}").set(ylabel=label).savefig(file, dpi=100)


def draw() -> None:
    """All figures, and all tables between <!-- NAME --> and <!-- /NAME --> in both READMEs, from the CSV files."""
    frames = {file.stem: pandas.read_csv(file, dtype={"commit": str}) for file in RESULTS.glob("*.csv")}
    runs = {name: frames[name] for name in EXPERIMENTS if name in frames}
    known = pandas.concat(runs[name] for name in ("shortcut", "rules", "parts", "others"))
    known = known.drop_duplicates(["setting", "seed", "policy"])
    tables = {name: grid(frame) for name, frame in runs.items()} | {
        "verdicts": verdicts(known), "methods": (everything := methods(known)), "audit": landed(frames["audit"]),
        "summary": everything.loc[SUMMARY].filter(regex="exact match|seed by seed|skips|wild"),
        "cost": frames["cost"].groupby("policy", sort=False).agg(spread),
        "rates, sizes": grid(pandas.concat([runs["rates"], runs["sizes"]])), "runs": pandas.DataFrame({
            name: [frame.seed.nunique(), round(frame.groupby(["setting", "seed"]).seconds.first().sum() / 60)]
            for name, frame in runs.items()}, ["seeds", "minutes of one core"]).rename_axis("experiment")}
    for file in (ROOT / "README.md", RESULTS / "README.md"):
        text = file.read_text()
        for name, frame in tables.items():
            table = frame.reset_index().fillna("").to_markdown(tablefmt="github", disable_numparse=True, index=False)
            begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            text = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
        file.write_text(text)
    draw_map(frames["map"], RESULTS / "map.png")
    first = frames["first_tokens"].melt(["recipe", "first token", "seed", "step"], ["teacher", "student"], "privileged")
    draw_lines(first, RESULTS / "anchor.png", "probability", hue="privileged", col="recipe", row="first token")
    curves = frames["curves"].melt(["setting", "seed", "policy", "step"], ["exact match", "entropy"]).dropna()
    draw_lines(curves, RESULTS / "long.png", "exact match, or nats", hue="policy", col="setting", row="variable",
               facet_kws={"sharey": "row"})


def main(names: list[str]) -> None:
    names = [*EXPERIMENTS, "cost"] if names == ["all"] else [name for name in names if name != "--draw"]
    dopd.require({*names} <= {*EXPERIMENTS, "cost"}, f"{' '.join(names)}: choose from {', '.join(EXPERIMENTS)}, cost")
    jobs = [joblib.delayed(run)(name, label, seed) for name in EXPERIMENTS if name in names
            for label, seed, folder in folders(name) if not Path(folder, "job.json").exists()]
    joblib.Parallel(n_jobs=2, backend="multiprocessing", batch_size=1)(jobs)      # forked: they know all recipes
    for file, (function, needs) in ({name: (collect, [name]) for name in EXPERIMENTS} | EXTRAS).items():
        if {*needs} <= {*names}:
            pandas.concat([function(name) for name in needs]).round(4).to_csv(RESULTS / f"{file}.csv", index=False)
    draw()


if __name__ == "__main__":
    main(sys.argv[1:])
