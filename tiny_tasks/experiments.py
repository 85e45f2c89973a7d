"""Runs the experiments; writes results/NAME.csv, the figures beside it, and the tables of both READMEs.

    pip install -r tiny_tasks/requirements.txt
    python tiny_tasks/experiments.py main rules        # names of EXPERIMENTS, or all; two at a time
    python tiny_tasks/experiments.py --draw            # tables and figures again, from the CSV files that are there

A run is one seed of one setting: its own tiny policies, then every recipe. It goes into runs/NAME/SETTING-seedN. A
finished run is not repeated: delete its folder after changing the code. To add one, add an entry to EXPERIMENTS.
"""

import contextlib
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

# As they are before a run changes them.
dopd.TASKS["vision"] = vision.Vision(*dopd.TASKS["rules"])
BASE, ASSIGN, STEP, ROLLOUT, SCORE = dict(dopd.TASKS), dopd.assign, dopd.distill_step, dopd.rollout, dopd.score
LOAD, WARM_START = dopd.load, dopd.warm_start
TOKENS = ["<eos>", *dopd.Rules.CHARACTERS]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tiny_tasks/results"


# ------------------------------------------------------------------------------------------------------ 1. experiments
class Experiment(NamedTuple):
    """Every setting with every seed: flags of dopd.py, and the recipes that are compared."""
    settings: dict                 # label: flags of dopd.py, or what `run` takes out of them
    recipes: list[str]
    seeds: range = range(3)
    start: str = ""                # an experiment of the same task whose tiny policies are used again


class Dials(dopd.Rules):
    """`rules` with more forms of the hint, and dials: longer chains, more wild names, hints that are wrong, a teacher
    that ignores its hint, twenty pairs of neighbouring names that only the test has."""
    dials = {}
    PAIRS = {first + "abcdefghij"[(place + shift) % 10] for place, first in enumerate("abcdefghij") for shift in (3, 7)}

    def row(self, start: int, names: str, digits: list[int]) -> dict:
        worked = self.work(start, digits)
        return {"prompt": f"{start}{names}=", "answer": worked, "hints": {
            "steps": worked[::2], "execution": worked, "answer": worked[-1], "summary": str(sum(digits)), "none": ""}}

    def problem(self, rng):
        problems = [super(Dials, self).problem(rng) for _ in range(self.dials.get("blocks", 1))]
        start, names = int(problems[0]["prompt"][0]), [*"".join(row["prompt"][1:-1] for row in problems)]
        digits = [int(digit) for row in problems for digit in row["answer"][::2]]
        if rng.random() < self.dials.get("more_wild", 0):               # one more name is wild
            place = rng.randrange(3)
            names[place] = rng.choice("klm")
            digits = self.recall("".join(names), 10, rng)
        row = self.row(start, "".join(names), digits)
        if rng.random() < self.dials.get("wrong_hints", 0):             # two of its digits have changed places
            steps = row["hints"]["steps"]
            row["hints"]["steps"] = steps[1] + steps[0] + steps[2:]
        if self.dials.get("pairs"):        # see dopd.run: a row goes where its `split_by` is drawn to
            mine = random.Random(row["prompt"]).random()
            row["split_by"] = 2 if self.held_out(row["prompt"]) else 1 if mine >= 0.85 else row["prompt"]
        return row

    def held_out(self, prompt: str) -> bool:
        return any(prompt[place:place + 2] in self.PAIRS for place in range(len(prompt)))

    def solution(self, row, form, author, rng):
        if form == "none" or author == self.teacher and rng.random() < self.dials.get("doubts", 0):
            return super().solution(row, "none", author, rng)
        told = row["hints"][form] if form == "steps" else row["answer"][::2]      # also where the hint is wrong
        return self.work(int(row["prompt"][0]), [int(digit) for digit in told], author.slips, rng)


# Methods that need more than a table get policies of their own: see `step`. Minus the log-prob of a sampled token is a
# forward KL from a "policy" that is sure of this token; weighted by a log-ratio, it has the gradient of a reverse KL.
SURE_OF_IT = dopd.Row(dopd.Regime.ALL, "sampled", "forward_kl", "full", 1.0)


def sampled_token(teacher: str) -> dopd.Recipe:
    return dopd.Recipe([SURE_OF_IT._replace(weight=lambda scores: scores[teacher].logp - scores["student"].logp)],
                       None, ("student", teacher))


dopd.RECIPES |= {
    "sft": dopd.Recipe([SURE_OF_IT]),                                   # on the right solutions, not on samples
    "grpo": dopd.Recipe([SURE_OF_IT._replace(weight=lambda scores: scores["judge"].logp)], None, ("judge",)),
    "vanilla, sampled token": sampled_token("teacher"),
    "privileged_teacher, sampled token": sampled_token("privileged_teacher"),
    # RLCSD (arXiv 2606.11709), our reading: plain + (right hint - wrong hint), all three as log-probs of the teacher.
    "rlcsd": dopd.Recipe([recipes.VANILLA, recipes.PRIVILEGED,
                          recipes.PRIVILEGED._replace(source="misled_teacher", weight=-1.0)])}

METHODS = ["vanilla", "privileged_teacher", "dopd", "dopd_frozen", "half"]
MAIN = ["vanilla", "privileged_teacher", "privileged_student", "dopd", "dopd_98", "dopd_99", "dopd_995", "dopd_frozen",
        "eopd", "tip", "demopsd", "half_25", "half", "half_75", "where_unsure", "dopd_half", "dopd_half_frozen",
        "by chance"]
PARTS = [name for name in dopd.RECIPES if "HT" in name and name != "LH+LL+HT+HS"] + [
    "forward_kl top_k", "forward_kl full", "reverse_kl top_k", "js top_k", "js full",
    "without teacher", "one objective", "one support", "without hint"]
TASKS = {task: {"task": task, "test_prompts": 600} for task in ("shortcut", "rules")}
RULES = TASKS["rules"]
EXPERIMENTS = {
    "main": Experiment({"shortcut": {"task": "shortcut"}}, MAIN, range(5)),
    "rules": Experiment({"rules": {"task": "rules"}}, MAIN, range(5)),
    "vision": Experiment({f"vision, {hint}": {"task": "vision", "test_prompts": 600, "hint": hint}
                          for hint in ("steps", "box", "none")}, [*METHODS, "where_unsure"]),
    "anchor": Experiment({"shortcut": {"task": "shortcut"}}, ["dopd", "dopd_frozen"], range(5), start="main"),
    "map": Experiment({f"{teacher} {student}": {
        "test_prompts": 600, "teacher_author": {"skips_hinted": teacher},
        "student_author": {"skips": student, "skips_hinted": student}}
        for teacher in (0.35, 0.7, 0.95) for student in (0.0, 0.1, 0.3)}, METHODS),
    "rates": Experiment({f"{task} {lr}": TASKS[task] | {"lr": lr} for task in TASKS for lr in (1e-4, 4e-4)},
                        [*METHODS, "dopd_half"], range(5), start="main rules"),
    "parts": Experiment(TASKS, PARTS, start="main rules"),
    "betas": Experiment(TASKS, [*recipes.BETAS], start="main rules"),
    "tokens": Experiment(TASKS, [f"vanilla without {which}" for which in ("highest", "lowest", "random")],
                         start="main rules"),
    "others": Experiment(TASKS, ["sft", "grpo", "vanilla, sampled token", "privileged_teacher, sampled token", "rlcsd"],
                         start="main rules"),
    "hints": Experiment({hint: RULES | {"hint": hint, "dials": {}} for hint in
                         ("execution", "summary", "answer", "none")}, ["privileged_teacher", "dopd", "dopd_frozen"]),
    "sizes": Experiment({f"{task}, student of {layers} layers": TASKS[task] | {"student_author": {"layers": layers}}
                         for task in TASKS for layers in (1, 4)},
                        ["vanilla", "privileged_teacher", "dopd", "dopd_frozen"]),
    "continual": Experiment({f"{first}, then {second}, {method}": TASKS[second] | {
        "recipe": [method], "student": f"{ROOT}/runs/{start}/{first}-seed{{seed}}/{method}"}
        for method in METHODS for start, first, second in (("rules", "rules", "shortcut"), ("main", "shortcut", "rules"))},
        METHODS, start="main rules"),
    "pairs": Experiment({"pairs of names that only the test has": RULES | {"dials": {"pairs": True}}}, METHODS),
    "chains": Experiment({f"{3 * blocks} names": RULES | {"dials": {"blocks": blocks}, "max_new_tokens": 6 * blocks + 1}
                          for blocks in (2, 4)}, ["vanilla", "privileged_teacher", "dopd", "dopd_frozen"]),
    "dials": Experiment({label: RULES | {"dials": dials} for label, dials in {
        "half of the prompts with one more wild name": {"more_wild": 0.5},
        "a third of the hints wrong": {"wrong_hints": 0.33},
        "teacher ignores half of its hints": {"doubts": 0.5},
        "teacher ignores all hints": {"doubts": 1.0}}.items()}, METHODS),
    "long": Experiment({task: TASKS[task] | {"steps": 360} for task in TASKS},
                       ["privileged_teacher", "privileged_student", "dopd", "dopd_frozen"], start="main rules"),
    "long_hinted": Experiment({task: TASKS[task] | {"steps": 360, "student_reads": "hinted"} for task in TASKS},
                              ["privileged_teacher"], start="main rules"),
}


# ------------------------------------------------------------------------------------------------------------- 2. runs
def first_tokens(regimes, scores: dict, completions: list[list[int]]) -> dict:
    """What DOPD's router sees of the first tokens, of completions that skip the working and of others."""
    lengths = torch.tensor([len(ids) for ids in completions])
    first, skips = lengths.cumsum(0) - lengths, torch.tensor([ids[0] == TOKENS.index("=") for ids in completions])
    found = {"share of skips": skips.float().mean().item()}
    for kind, chosen in (("skip", skips), ("work", ~skips)):
        if chosen.any():
            found |= {f"{kind} q_{who}": scores[name].logp[first[chosen]].exp().mean().item()
                      for who, name in (("T", "privileged_teacher"), ("S", "privileged_student"))}
            found |= {f"{kind} {regime.name}": (regimes[first[chosen]] == regime).float().mean().item()
                      for regime in dopd.Regime if regime != dopd.Regime.ALL}
    return found


def run(name: str, label: str, seed: int) -> None:
    """One run, unless it is there. What it prints goes into its log.txt; first.json has the first tokens. A setting may
    have, besides flags, fields of the authors and dials of the task, and what the student reads while it trains."""
    experiment, folder = EXPERIMENTS[name], folder_of(name, label, seed)
    if Path(folder, "job.json").exists():
        return
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True, cwd=ROOT).strip()
    flags = {"recipe": experiment.recipes} | experiment.settings[label]
    authors = {role: flags.pop(f"{role}_author", {}) for role in ("teacher", "student")}
    task = BASE[flags.setdefault("task", "shortcut")]
    if "dials" in flags:
        task = Dials(*task)
    Dials.dials = flags.pop("dials", {})
    task = task._replace(**{role: getattr(task, role)._replace(**changes) for role, changes in authors.items()})
    dopd.TASKS[flags["task"]] = task                                    # a process makes many runs: always set anew
    dopd.load = vision.load if flags["task"] == "vision" else LOAD
    for start in experiment.start.split():
        if flags["task"] in EXPERIMENTS[start].settings:
            here = folder_of(start, flags["task"], seed)
            flags = {"teacher": str(here / "teacher"), "student": str(here / "student")} | flags
    flags["student"] = flags.get("student", "").format(seed=seed)
    reads = flags.pop("student_reads", "plain")
    shutil.rmtree(folder, ignore_errors=True)                           # an unfinished run begins anew
    folder.mkdir(parents=True)
    seen, drawn, begun = [], [], time.time()

    def warm_start(task, role, config, held_out):
        if Dials.dials.get("pairs"):       # the warm start does not see the pairs, either
            class Unseen(set):
                __contains__ = lambda self, prompt: task.held_out(prompt) or set.__contains__(self, prompt)
            held_out = Unseen(held_out)
        return WARM_START(task, role, config, held_out)

    def noted(recipe, scores, lengths):
        regimes, weights = ASSIGN(recipe, scores, lengths)
        if recipe.router == recipes.by_advantage_gap:
            label = next(key for key, value in dopd.RECIPES.items() if value is recipe)
            seen.append({"recipe": label} | first_tokens(regimes, scores, drawn[-1]))
        return regimes, weights

    def score(policy, rows, completions, micro_batch=0):
        """A policy's model may also be a function (rows, completions) -> a function from an index to log-probs."""
        if isinstance(policy.model, torch.nn.Module):
            return SCORE(policy, rows, completions, micro_batch)
        return policy.model(rows, completions)

    def sampled(rows, completions):
        tokens = torch.tensor(sum(completions, []))
        return lambda index: torch.full((len(index), len(TOKENS)), -torch.inf).scatter(1, tokens[index, None], 0.0)

    def judge(rows, completions):
        """GRPO: what is right, less the mean of the prompt's rollouts, divided by their deviation. Its "log-probs"."""
        texts = ["".join(TOKENS[i] for i in ids) for ids in completions]
        right = torch.tensor([float(bool(text.endswith(TOKENS[0]) and task.check(row, text[:-len(TOKENS[0])])))
                              for row, text in zip(rows, texts)]).view(-1, 4)
        advantage = (right - right.mean(1, keepdim=True)) / (right.std(1, keepdim=True) + 1e-4)
        each = advantage.flatten().repeat_interleave(torch.tensor([len(ids) for ids in completions]))
        return lambda index: each[index, None].expand(-1, len(TOKENS))

    def step(recipe, policies, optimizer, rows, config):
        hints = [row["hinted"][:len(row["hinted"]) - len(row["plain"])] for row in rows]     # the next row's is wrong
        rows = [row | {"misled": hint + row["plain"]} for row, hint in zip(rows, hints[1:] + hints[:1])]
        more = {"student": policies["student"]._replace(reads=reads), "judge": dopd.Policy(judge, ""),
                "misled_teacher": policies["teacher"]._replace(reads="misled"), "sampled": dopd.Policy(sampled, "")}
        solutions = [[TOKENS.index(character) for character in row["answer"]] + [0] for row in rows]
        try:
            dopd.rollout = lambda *given: drawn.append(
                [ids for ids in solutions for _ in range(4)] if recipe is dopd.RECIPES["sft"] else ROLLOUT(*given)
            ) or drawn[-1]
            return STEP(recipe, policies | more, optimizer, rows, config)
        finally:
            dopd.rollout = ROLLOUT

    dopd.assign, dopd.score, dopd.distill_step, dopd.warm_start = noted, score, step, warm_start
    with open(folder / "log.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            dopd.run(dopd.Config(**flags, seed=seed, out=str(folder)))
        except SystemExit:                 # it would end the worker without a word
            raise RuntimeError(f"the last line of {folder}/log.txt says why") from None
    Path(folder, "first.json").write_text(json.dumps(seen))
    Path(folder, "checkpoint.pt").unlink(missing_ok=True)
    Path(folder, "job.json").write_text(json.dumps({"seconds": round(time.time() - begun), "commit": commit}))


def folder_of(name: str, label: str, seed: int) -> Path:
    return ROOT / "runs" / name / f"{label.replace(' ', '_')}-seed{seed}"


def folders(name: str):
    """Every run of an experiment: its setting, seed and folder."""
    for seed in EXPERIMENTS[name].seeds:
        for label in EXPERIMENTS[name].settings:
            yield label, seed, folder_of(name, label, seed)


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def collect(name: str) -> pandas.DataFrame:
    """One line per run and policy: setting, seed, the final test, exact match on the way, seconds and commit."""
    lines = []
    for label, seed, folder in folders(name):
        way, job = {}, json.loads(Path(folder, "job.json").read_text())
        for row in read_log(folder):
            if "validation" in row:
                way[f"validation at {row['step']}"] = row["validation"]["exact match"]
            if "test" in row:
                lines.append({"setting": label, "seed": seed, "policy": row["recipe"], **row["test"], **way, **job})
                way = {}
    return pandas.DataFrame(lines)


# ----------------------------------------------------------------------------------------------- 3. where tokens land
def audit(name: str) -> pandas.DataFrame:
    """How many tokens of every kind went to which regime, over the rollouts that metrics.jsonl keeps."""
    counts = {}
    for label, _, folder in folders(name):
        for row in read_log(folder):
            for prompt, ids, regimes in row.get("rollouts", []) if row["recipe"] in ("dopd", "dopd_frozen") else []:
                for kind, regime in zip(kinds_of(prompt, ids), regimes):
                    key = label, row["recipe"], kind, dopd.Regime(regime).name
                    counts[key] = counts.get(key, 0) + 1
    return pandas.Series(counts).rename_axis(["setting", "policy", "kind", "regime"]).rename("tokens").reset_index()


def kinds_of(prompt: str, ids: list[int]) -> list[str]:
    """What every token of a completion is: a name's digit, right or wrong; a sum, right or wrong; part of a skip."""
    task, tokens = BASE["rules"], [TOKENS[i] for i in ids]
    answer = task.work(int(prompt[0]), task.recall(prompt[1:-1], 10, random.Random(0)))
    kinds = ["skip"] + ["after a skip"] * (len(ids) - 1) if TOKENS[ids[0]] == "=" else ["end"] * len(ids)
    for place, kind, right in task.grade({"prompt": prompt, "answer": answer}, tokens)[1:]:
        kinds[place] = "wild digit" if kind == "unlearnable" else f"{kind}, {'right' if right else 'wrong'}"
    return kinds


def anchor(name: str) -> pandas.DataFrame:
    """What the router sees of the first tokens, every tenth step."""
    parts = []
    for _, seed, folder in folders(name):
        frame = pandas.DataFrame(json.loads(Path(folder, "first.json").read_text()))
        frame["step"] = frame.groupby("recipe").cumcount() + 1
        parts.append(frame[frame.step % 10 == 1].assign(seed=seed))
    return pandas.concat(parts)


def curves(name: str) -> pandas.DataFrame:
    """Entropy and exact match (validation) on the way, every twentieth step."""
    parts = []
    for label, seed, folder in folders(name):
        parts += [{"setting": label, "seed": seed, "policy": row["recipe"], "step": row["step"],
                   "entropy": row["entropy"], "exact match": row.get("validation", {}).get("exact match")}
                  for row in read_log(folder) if "step" in row and row["step"] % 20 == 0]
    return pandas.DataFrame(parts)


# ------------------------------------------------------------------------------------------------ 4. tables and figures
SUMMARY = ["student before", "teacher", "vanilla", "privileged_teacher", "privileged_student", "dopd", "dopd_99",
           "dopd_frozen", "by chance", "half", "where_unsure"]
PLAIN_COLUMNS = ["exact match", "with hint", "entropy", "entropy, wild (best 1.28)", "skips", "recall", "execute",
                 "unlearnable"]


def markdown(head: list, *lines: list) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))


def spread(values: pandas.Series) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"


def full_table(frame: pandas.DataFrame) -> str:
    """Mean ± standard deviation over the seeds of everything that is measured, and exact match seed by seed."""
    lines = [["policy", "exact match", "seed by seed", *PLAIN_COLUMNS[1:]]]
    for policy, group in frame.groupby("policy", sort=False):
        each = " ".join(map("{:.2f}".format, group["exact match"]))
        cells = [spread(group[column]) for column in PLAIN_COLUMNS]
        lines.append([policy, cells[0], each, *cells[1:]])
    return markdown(*lines)


def summary_table(frames: dict[str, pandas.DataFrame]) -> str:
    """The most important policies on both tasks."""
    lines = [["policy", "`shortcut`: exact match", "seed by seed", "skips", "entropy, wild (best 1.28)",
              "`rules`: exact match", "seed by seed", "entropy, wild"]]
    for policy in SUMMARY:
        line = [policy]
        for name in ("main", "rules"):
            group = frames[name][frames[name].policy == policy]
            line += [spread(group["exact match"]), " ".join(map("{:.2f}".format, group["exact match"]))]
            line += [spread(group["skips"])] * (name == "main") + [spread(group["entropy, wild (best 1.28)"])]
        lines.append(line)
    return markdown(*lines)


def grid_table(frame: pandas.DataFrame) -> str:
    """Exact match: a line per policy, a column per setting."""
    settings = list(dict.fromkeys(frame.setting))
    lines = [["policy", *settings]]
    for policy, group in frame.groupby("policy", sort=False):
        lines.append([policy] + [spread(group[group.setting == setting]["exact match"]) for setting in settings])
    return markdown(*lines)


def audit_table(frame: pandas.DataFrame) -> str:
    """For every kind of token: its share of all tokens, and the regimes that it is sent to, in percent."""
    lines = [["task", "policy", "kind of token", "% of all", *(regime.name for regime in list(dopd.Regime)[:4])]]
    for (setting, policy), group in frame.groupby(["setting", "policy"], sort=False):
        for kind, tokens in group.groupby("kind"):
            shares = tokens.set_index("regime").tokens / tokens.tokens.sum()
            lines.append([setting, policy, kind, f"{tokens.tokens.sum() / group.tokens.sum():.0%}",
                          *(f"{shares.get(regime.name, 0):.0%}" for regime in list(dopd.Regime)[:4])])
    return markdown(*lines)


# claim; the paper's figures; experiment; the policy that should be higher; the one that should be lower
CLAIMS = [
    ("DOPD ends above vanilla distillation", "51.4 > 43.9 (table 1)", "main rules", "dopd", "vanilla"),
    ("following the privileged teacher on every token ends below vanilla", "figure 3", "main rules", "vanilla",
     "privileged_teacher"),
    ("DOPD ends above the privileged teacher on every token", "49.8 > 41.9 (tables 7, 8)", "main rules", "dopd",
     "privileged_teacher"),
    ("self distillation collapses", "figure 3", "main rules", "vanilla", "privileged_student"),
    ("DOPD ends above EOPD", "51.4 > 46.1", "main rules", "dopd", "eopd"),
    ("DOPD ends above TIP", "51.4 > 44.8", "main rules", "dopd", "tip"),
    ("routing beats the same regimes dealt by chance", "not measured", "main rules", "dopd", "by chance"),
    ("a frozen anchor beats the live one", "live only", "main rules", "dopd_frozen", "dopd"),
    ("a slow anchor (0.99) beats the live one", "live only", "main rules", "dopd_99", "dopd"),
    ("half (AR-OPD, our reading) beats DOPD", "-", "main rules", "half", "dopd"),
    ("where_unsure (ours) beats DOPD", "-", "main rules", "where_unsure", "dopd"),
    ("where_unsure (ours) beats the privileged teacher", "-", "main rules", "where_unsure", "privileged_teacher"),
    ("all four regimes beat HT and LH alone", "49.8 > 47.9 (table 6)", "parts", "dopd", "HT+LH"),
    ("DOPD beats uniform JS on the top-K", "49.8 > 41.3 (table 6)", "parts", "dopd", "js top_k"),
    ("adaptive beats uniform on HT and HS", "47.6 > 44.5 (table 6)", "parts", "HT+HS", "HT+HS uniform"),
    ("one source: JS beats reverse KL", "42.5 > 41.9 (table 7)", "parts", "js full", "privileged_teacher"),
    ("DOPD needs the teacher as a source", "49.8 > 41.2 (table 8)", "parts", "dopd", "without teacher"),
    ("DOPD needs the hint", "49.8 > 38.3 (table 8)", "parts", "dopd", "without hint"),
    ("DOPD needs more than one objective", "49.8 > 46.7 (table 8)", "parts", "dopd", "one objective"),
    ("DOPD needs more than one support", "49.8 > 46.1 (table 8)", "parts", "dopd", "one support"),
]


def verdicts(frames: dict[str, pandas.DataFrame]) -> str:
    """Holds: higher in every seed. In part: the mean is higher. p: paired t-test over the seeds, two-sided."""
    lines = [["claim", "paper", "task", "ours", "seeds", "p", "verdict"]]
    known = pandas.concat(frames.values()).drop_duplicates(["setting", "seed", "policy"])      # main's are the first
    exact = known.pivot(index=["setting", "seed"], columns="policy", values="exact match")
    for claim, paper, names, higher, lower in CLAIMS:
        for task in ("shortcut", "rules"):
            pair = exact[exact.index.get_level_values("setting") == task].reindex(columns=[higher, lower]).dropna()
            if len(pair) > 1:
                above = (pair[higher] > pair[lower]).sum()
                means, p = pair.mean(), stats.ttest_rel(pair[higher], pair[lower]).pvalue
                verdict = "holds" if above == len(pair) else "in part" if means[higher] > means[lower] else "no"
                lines.append([claim, paper, task, f"{means[higher]:.2f} against {means[lower]:.2f}",
                              f"{above} of {len(pair)}", f"{p:.3f}", verdict])
    return markdown(*lines)


def draw_seeds(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """Every seed of every method, both tasks."""
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 6), sharey=True, layout="constrained")
    for axis, group in zip(axes, (frames["main"], frames["rules"])):
        seaborn.pointplot(group, x="exact match", y="policy", ax=axis, errorbar=None, linestyle="none", marker="|",
                          markersize=22, color="black")
        seaborn.stripplot(group, x="exact match", y="policy", hue="seed", palette="viridis", ax=axis, jitter=False,
                          legend=False)
        axis.set(title=f"{group.setting[0]}: a dot is a seed, the bar is the mean", xlim=(0, 1), ylabel="")
    figure.savefig(file, dpi=100)


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


def draw_rates(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """Exact match by learning rate."""
    same = pandas.concat([frames[name].assign(lr=2e-4) for name in ("main", "rules")])
    frame = frames["rates"]
    frame[["setting", "lr"]] = frame.setting.str.split(" ", expand=True)
    frame["lr"] = frame.lr.astype(float)
    known = pandas.concat([frame, same[same.seed.isin(frame.seed)]])
    grid = seaborn.relplot(known[known.policy.isin([*METHODS, "dopd_half"])], x="lr", y="exact match", hue="policy",
                           col="setting", kind="line", marker="o", errorbar="sd", err_style="bars", height=4)
    grid.set(xscale="log", xlabel="learning rate", ylim=(0, 1))
    grid.savefig(file, dpi=100)


def draw_anchor(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """The first tokens on `shortcut`: how sure the two privileged policies are of them, live and frozen anchor."""
    frame = frames["first_tokens"]
    known = frame.melt(["recipe", "seed", "step"], [f"{kind} q_{who}" for kind in ("skip", "work") for who in "TS"])
    known[["first token", "policy"]] = known.variable.str.split(" ", expand=True)
    known = known.replace({"q_T": "privileged teacher", "q_S": "privileged student", "skip": "skips", "work": "works"})
    grid = seaborn.relplot(known, x="step", y="value", hue="policy", col="recipe", row="first token", kind="line",
                           errorbar="sd", height=2.8, aspect=1.5)
    grid.set(ylabel="probability of the first token", ylim=(0, 1))
    grid.savefig(file, dpi=100)


def draw_long(frames: dict[str, pandas.DataFrame], file: Path) -> None:
    """Figure 3 of the paper."""
    known = frames["curves"].melt(["setting", "seed", "policy", "step"], ["exact match", "entropy"]).dropna()
    grid = seaborn.relplot(known, x="step", y="value", hue="policy", col="setting", row="variable", kind="line",
                           errorbar="sd", height=2.8, aspect=1.6, facet_kws={"sharey": "row"})
    grid.set_titles("{col_name}: {row_name}")
    grid.set(ylabel="exact match, or nats")
    grid.savefig(file, dpi=100)


# name of the file: function, and the CSV that it needs
FIGURES = {"seeds": (draw_seeds, "rules"), "map": (draw_map, "map"), "rates": (draw_rates, "rates"),
           "anchor": (draw_anchor, "first_tokens"), "long": (draw_long, "curves")}


def insert(name: str, text: str) -> None:
    """Replaces what stands between <!-- NAME --> and <!-- /NAME -->, in both READMEs."""
    for file in (ROOT / "README.md", RESULTS / "README.md"):
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        file.write_text(marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", file.read_text()))


def draw() -> None:
    """All tables and figures, from the CSV files that are there."""
    frames = {file.stem: pandas.read_csv(file, dtype={"commit": str}) for file in RESULTS.glob("*.csv")}
    runs = {name: frames[name] for name in EXPERIMENTS if name in frames}
    for name, frame in runs.items():
        minutes = frame.groupby(["setting", "seed"]).seconds.first().sum() / 60
        note = f"{frame.seed.nunique()} seeds; {minutes:.0f} minutes of one core; commit {', '.join({*frame.commit})}"
        insert(name, f"{full_table(frame) if name in ('main', 'rules') else grid_table(frame)}\n\n*{note}.*")
    insert("verdicts", verdicts(runs))
    if "audit" in frames:
        insert("summary", summary_table(runs))
        insert("audit", audit_table(frames["audit"]))
    for figure, (function, needs) in FIGURES.items():
        if needs in frames:
            function(frames, RESULTS / f"{figure}.png")
            pyplot.close("all")


def main(names: list[str]) -> None:
    names = list(EXPERIMENTS) if names == ["all"] else [name for name in names if name != "--draw"]
    unknown = [name for name in names if name not in EXPERIMENTS]
    dopd.require(not unknown, f"{' '.join(unknown)}: name one or more of {', '.join(EXPERIMENTS)}")
    jobs = [joblib.delayed(run)(name, label, seed) for name in names for label, seed, _ in folders(name)]
    joblib.Parallel(n_jobs=2, backend="multiprocessing", batch_size=1)(jobs)      # forked: they know all recipes
    for name in names:
        collect(name).round(4).to_csv(RESULTS / f"{name}.csv", index=False)
    if {"main", "rules"} <= {*names}:
        pandas.concat([audit("main"), audit("rules")]).to_csv(RESULTS / "audit.csv", index=False)
    if "anchor" in names:
        anchor("anchor").round(3).to_csv(RESULTS / "first_tokens.csv", index=False)
    if {"long", "long_hinted"} <= {*names}:
        hinted = curves("long_hinted").replace({"privileged_teacher": "privileged_teacher, hinted student"})
        pandas.concat([curves("long"), hinted]).round(3).to_csv(RESULTS / "curves.csv", index=False)
    draw()


if __name__ == "__main__":
    main(sys.argv[1:])
