"""DOPD, Dual On-policy Distillation (arXiv 2606.30626), in one file to be read from top to bottom.

A student samples its own answers, and a stronger teacher grades every token of them. During training both may read a
hint that the student will not see later. For each token DOPD asks: if the student could read the hint too, would it
agree with the teacher? If yes, a light correction is enough. If no, the one that is surer of the token teaches it.

    python dopd.py                       # the CPU experiment: minutes, then look into runs/
    python dopd.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --data my.jsonl --device cuda      # see README.md

Shapes: B completions; T tokens in the longest one; N tokens in all of them, joined end to end without padding; V tokens
in the vocabulary; H hidden size; R rows of a recipe. All logarithms are natural; divergences and gaps are in nats.
"""

import copy
import json
import math
import os
import random
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Callable, NamedTuple

import datasets
import pandas
import tokenizers
import torch
import transformers
from matplotlib import pyplot
from rich import console, markdown, text
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser


# ------------------------------------------------------------------------------------------------------ 1. config
@dataclass
class Config:
    """All flags. The defaults are the CPU experiment."""
    task: str = HfArg(default="shortcut", help="synthetic task of the tiny policies: shortcut or rules")
    recipe: list[str] = HfArg(default_factory=lambda: [*RECIPES][:4], help="one or more methods to compare")
    hint: str = HfArg(default="steps", help="form of the hint; of the tiny tasks: steps or none")
    seed: int = HfArg(default=0, help="of the warm start, the rollouts and the order of the data")
    steps: int = HfArg(default=160, help="optimizer steps; 0 evaluates only; paper: 200")
    batch_size: int = HfArg(default=32, help="prompts per optimizer step; paper: 128")
    rollouts: int = HfArg(default=4, help="completions sampled per prompt; paper: 4")
    micro_batch: int = HfArg(default=0, help="completions per forward pass, 0 for all; bounds the memory")
    lr: float = HfArg(default=2e-4, help="peak learning rate, cosine to a tenth; paper: 5e-6")
    top_k: int = HfArg(default=4, help="tokens in the top-K support, besides the tail; paper: 128")
    teacher: str = HfArg(default="", help="Hugging Face causal LM, name or folder; empty: a tiny one learns the task")
    student: str = HfArg(default="", help="the same for the student; both share one tokenizer")
    data: str = HfArg(default="", help="what datasets.load_dataset opens: prompt, answer, hint or hints, maybe image")
    hint_template: str = HfArg(default="", help="what a privileged policy reads, with {hint} and {prompt}")
    answer_regex: str = HfArg(default="", help="its last match (or group) in a completion is the answer; empty: all")
    max_new_tokens: int = HfArg(default=0, help="tokens of the longest completion; 0: the task's, 512 for --data")
    device: str = HfArg(default="cpu", help="cpu, cuda, cuda:1, mps")
    dtype: str = HfArg(default="float32", help="of the computation", metadata={"choices": ["float32", "bfloat16"]})
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, more time: layers are computed twice")
    eval_every: int = HfArg(default=40, help="steps between validations, each with a checkpoint")
    test_prompts: int = HfArg(default=1200, help="prompts of the final test; a validation takes at most 256")
    out: str = HfArg(default="", help="folder of the run; empty: a new one in runs/")
    resume: str = HfArg(default="", help="go on with the run in this folder, with the flags that it was started with")

    def __post_init__(self):
        require(self.task in TASKS, f"--task {self.task}: must be one of {', '.join(TASKS)}")
        require({*self.recipe} <= {*RECIPES}, f"--recipe {' '.join(self.recipe)}: choose from {', '.join(RECIPES)}; "
                "for other recipes, run the script that adds them, such as tiny_tasks/recipes.py")
        for name, row in [(name, row) for name in self.recipe for row in RECIPES[name].rows]:
            require(row.objective in DIVERGENCES and row.support in ("full", "top_k"),
                    f"--recipe {name}: objective: {', '.join(DIVERGENCES)}; support: full, top_k; but there is {row}")
            require(RECIPES[name].router or row.regime == Regime.ALL, f"--recipe {name}: no router for {row}")
        for name, value in vars(self).items():
            least = 1 if name.endswith(("_size", "rollouts", "top_k", "_every", "_prompts")) else 0
            require(isinstance(value, (str, list)) or least <= value < math.inf, f"--{name} {value}: at least {least}")
        require(bool(self.teacher) == bool(self.student) and (self.teacher or not self.data),
                "--teacher and --student: give both, or none; --data: needs both")
        with explained(f"--answer_regex {self.answer_regex}"):
            require(re.compile(self.answer_regex).groups <= 1, "--answer_regex: has more than one group")


def require(condition, message: str) -> None:
    """Unless the condition holds: what the user gave cannot be used. Exits with this line on stderr, and code 2."""
    if not condition:
        print(f"dopd.py: {message}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def explained(given: str):
    """Exits in the same way if a library raises an exception in this block."""
    try:
        yield
    except Exception as error:
        require(False, f"{given}: {type(error).__name__}: {' '.join(str(error).split())[:240]}")


# ------------------------------------------------------------------------------------------------------- 2. tasks
# A task makes rows, {"prompt": str, "answer": str, "hints": {form: str}}; lets authors write solutions, from which the
# tiny policies learn before any distillation; checks a completion; and grades its tokens. More hooks: see vision.py.
class Author(NamedTuple):
    """Writes solutions, with gaps and slips of its own. A tiny model learns from them."""
    layers: int                 # of the model
    hinted: float               # share of the solutions that are written with the hint
    knows: int                  # how many of the ten stable names need no hint; the others are guessed
    slips: float = 0.0          # share of wrong sums, one too high, among those that pass 9
    skips_hinted: float = 0.0   # share of the solutions that skip the working, where there is a hint
    skips: float = 0.0          # and where there is none


class Rules(NamedTuple):
    """`7fbk=` -> `967314`: start at 7, apply the rules named f, b and k; for each, write its digit and the new value.
    A name stands for "add this digit, modulo 10". Ten stable names always mean the same digit, so they can be learned.
    Three wild names mean another digit in every problem: only the hint tells it, and without the hint it is a guess.
    An author that skips the working writes only `=4`, the last value."""
    teacher: Author
    student: Author
    hint_template: str = "{hint}|{prompt}"
    max_new_tokens: int = 7
    names: int = 3              # in a prompt
    CHARACTERS = "0123456789=|abcdefghijklm"
    STABLE = dict(zip("abcdefghij", (3, 7, 1, 8, 5, 9, 2, 6, 4, 0)))
    WILD = {"k": (1, 4, 6, 9), "l": (8, 2, 5, 3), "m": (0, 7, 3, 6)}      # with 40, 30, 20, 10%: 1.28 nats of entropy

    def problem(self, rng: random.Random) -> dict:
        start = rng.randrange(10)
        names = "".join(rng.choice("klm" if rng.random() < 0.2 else "abcdefghij") for _ in range(self.names))
        digits = self.recall(names, 10, rng)
        worked = self.work(start, digits)
        return {"prompt": f"{start}{names}=", "answer": worked, "hints": {"steps": worked[::2], "none": ""}}

    def recall(self, names: str, knows: int, rng: random.Random) -> list[int]:
        """The digits that the names stand for, or a guess."""
        return [rng.choices(self.WILD[name], (4, 3, 2, 1))[0] if name in self.WILD else
                self.STABLE[name] if name in "abcdefghij"[:knows] else rng.randrange(10) for name in names]

    def work(self, value: int, digits: list[int], slips: float = 0.0, rng=random) -> str:
        written = ""
        for digit in digits:
            value = (value + digit + (value + digit > 9 and rng.random() < slips)) % 10
            written += f"{digit}{value}"
        return written

    def solution(self, row: dict, form: str, author: Author, rng: random.Random) -> str:
        """What the author writes after the prompt, having read the hint of this form."""
        start, digits = int(row["prompt"][0]), [int(digit) for digit in row["answer"][::2]]
        if form == "none":
            digits = self.recall(row["prompt"][1:-1], author.knows, rng)
        worked = self.work(start, digits, author.slips, rng)
        skips = author.skips if form == "none" else author.skips_hinted
        return f"={worked[-1]}" if rng.random() < skips else worked

    def check(self, row: dict, completion: str) -> bool | None:
        """Is it right? None where a wild name leaves only a guess: such prompts do not count."""
        return None if set(row["prompt"]) & set(self.WILD) else completion in (row["answer"], f"={row['answer'][-1]}")

    def grade(self, row: dict, tokens: list[str]) -> list[tuple[int, str, bool]]:
        """(place, kind, yes or no): does the first token skip the working, and is each token of the working right?"""
        grades, value = [(0, "skips", tokens[0] == "=")], row["prompt"][0]
        for i, (digit, result, name) in enumerate(zip(tokens[::2], tokens[1::2], row["prompt"][1:-1])):
            if tokens[0] != "=":
                adds_up = f"{value}{digit}".isdigit() and result == str((int(value) + int(digit)) % 10)
                grades.append((2 * i, "unlearnable" if name in self.WILD else "recall", digit == row["answer"][2 * i]))
                grades.append((2 * i + 1, "execute", adds_up))            # even where the digit is wrong
            value = result
        return grades


class OwnData(NamedTuple):
    """Rows of --data, for real models. The answer is the last match of a regular expression, or of its group."""
    answer_regex: str
    hint_template: str = "{prompt}\n\nHint: {hint}"
    max_new_tokens: int = 512
    grade = staticmethod(lambda row, tokens: [])                          # the true kind of a token is unknown

    def check(self, row: dict, completion: str) -> bool:
        return [found.strip() for found in re.findall(self.answer_regex, completion)][-1:] == [row["answer"].strip()]


STRONG, WEAK = Author(layers=3, hinted=0.5, knows=7), Author(layers=2, hinted=0.3, knows=4, slips=0.6)
TASKS = {"rules": Rules(STRONG, WEAK),
         "shortcut": Rules(STRONG._replace(skips_hinted=0.7), WEAK._replace(skips_hinted=0.05, skips=0.05))}


# ---------------------------------------------------------------------------------- 3. policies: score and sample
# A model, and which prompt it reads of a row, in token ids: "plain" (student, teacher), or "hinted" (privileged ones).
# A model that sees pictures has a `model.look`, which gives its other inputs: rows, key, ids (B, L) -> {name: tensor}.
Policy = NamedTuple("Policy", [("model", transformers.PreTrainedModel), ("reads", str)])


def score(policy: Policy, rows: list[dict], completions: list[list[int]], micro_batch: int = 0) -> Callable:
    """Log-probs of the N tokens of the completions, each after what the policy reads of its row. Returns a function
    from an index (n,) to (n, V). It keeps only hidden states (N, H): (N, V) would be 70 times larger for Qwen3."""
    model, hidden, size = policy.model, [], micro_batch or len(rows)
    for i in range(0, len(rows), size):
        prompts, real = pad([row[policy.reads] for row in rows[i:i + size]], "left", model.device)       # (B, P)
        tokens, mask = pad(completions[i:i + size], "right", model.device)                               # (B, T)
        ids = torch.cat([prompts, tokens[:, :-1]], 1)                     # (B, P+T-1): the last token predicts nothing
        attention = torch.cat([real, mask[:, :-1]], 1).long()
        positions = {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
        inputs = model.look(rows[i:i + size], policy.reads, ids) if model.look else positions
        states = model.base_model(ids, attention_mask=attention, use_cache=False, **inputs).last_hidden_state
        hidden.append(states[:, -tokens.shape[1]:][mask])
    hidden = torch.cat(hidden)                                            # (N, H)
    return lambda index: model.get_output_embeddings()(hidden[index])[..., :model.vocabulary].float().log_softmax(-1)


def pad(sequences: list, side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L), and where they are real, told from the lengths: the pad token may also be the EOS token."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    real = [torch.ones_like(sequence, dtype=torch.bool) for sequence in ids]
    return pad_sequence(ids, True, 0, side).to(device), pad_sequence(real, True, False, side).to(device)


@torch.no_grad()
def rollout(policy: Policy, rows: list[dict], micro_batch: int = 0) -> list[list[int]]:
    """One completion per row from the policy's own distribution, up to and including its EOS (or max_new_tokens).
    Temperature 1, no top-k, no top-p: `load` has replaced the checkpoint's own settings."""
    completions, size = [], micro_batch or len(rows)
    for i in range(0, len(rows), size):
        prompts, real = pad([row[policy.reads] for row in rows[i:i + size]], "left", policy.model.device)
        inputs = policy.model.look(rows[i:i + size], policy.reads, prompts) if policy.model.look else {}
        sampled = policy.model.generate(prompts, attention_mask=real.long(), **inputs)[:, prompts.shape[1]:]
        for ids in sampled.tolist():
            ends = [place for place, token in enumerate(ids) if token in policy.model.generation_config.eos_token_id]
            completions.append(ids[:ends[0] + 1] if ends else ids)
    return completions


# -------------------------------------------------------------------------------------- 4. divergences and router
def reverse_kl(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """KL(student || source), (..., V) -> (...), nats: the student must avoid what the source finds unlikely.
    A token that the student rules out (log-prob -inf) counts 0; one that only the source rules out, infinity."""
    return (student.exp() * (student - source).masked_fill(student == -math.inf, 0)).sum(-1)


def forward_kl(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """KL(source || student), (..., V) -> (...), nats: the student must cover what the source finds likely."""
    return reverse_kl(source, student)


def js_divergence(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon, (..., V) -> (...), at most ln 2 nats: mean of KL(source || m) and KL(student || m), m halfway."""
    lowest = torch.finfo(student.dtype).min                               # logaddexp(-inf, -inf) has no gradient
    mixture = torch.logaddexp(student.clamp(min=lowest), source.clamp(min=lowest)) - math.log(2)
    return 0.5 * (reverse_kl(source, mixture) + reverse_kl(student, mixture))


def top_k_with_tail(student: torch.Tensor, source: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both log-probs (..., V) on the student's k likeliest tokens and one bucket for all others: two (..., k+1).
    The paper does not say whose top-K, nor what becomes of the rest. Without the bucket, mass outside costs nothing."""
    kept = student.topk(min(k, student.shape[-1]), -1).indices            # (..., k)

    def bucket(logp):
        others = logp.scatter(-1, kept, torch.finfo(logp.dtype).min)      # not -inf: logsumexp needs one number
        return torch.cat([logp.gather(-1, kept), others.logsumexp(-1, keepdim=True)], -1)
    return bucket(student), bucket(source)


class Regime(IntEnum):
    """Section 3 of the paper. First letter: is the gap Low or High? Second letter, if low: are the two together sure of
    the token (H) or not (L), compared with the average over the batch? If high: who is surer, Teacher or Student?"""
    LH = 0      # both know it, the student only lacks the hint: light supervision by the privileged teacher
    LL = 1      # neither knows it: a weak pull towards the privileged student, against drift
    HT = 2      # the teacher can do more with the same hint: a capability, learned in full
    HS = 3      # the student has a path of its own: keep it, lightly
    ALL = 4     # every token of a recipe without a router


def advantage_gap(teacher_logp: torch.Tensor, student_logp: torch.Tensor) -> torch.Tensor:
    """Equation 1: how far the two privileged policies differ on the sampled tokens, |log q_T - log q_S|, in nats."""
    return (teacher_logp - student_logp).abs()


# What a router sees of one policy, (N,) each: log-probs of the sampled tokens, entropies of its predictions (nats).
Scores = NamedTuple("Scores", [("logp", torch.Tensor), ("entropy", torch.Tensor)])


def route(scores: dict[str, Scores], kept: int = 95) -> torch.Tensor:
    """The paper's router: the regime (N,) of every sampled token, from its log-probs under the privileged teacher and
    the privileged student. The thresholds are averages over all N tokens, so give it the whole batch; only the largest
    gaps, the top (100 - kept)%, stay out of the averages. They are routed all the same."""
    teacher, student = (scores[f"privileged_{name}"].logp.float() for name in ("teacher", "student"))
    gap, q_teacher, q_student = advantage_gap(teacher, student), teacher.exp(), student.exp()
    q_sum, ascending = q_teacher + q_student, gap.sort().values           # torch.quantile takes 16 million at most
    typical = gap <= ascending[kept * (len(ascending) - 1) // 100]
    low = torch.where(q_sum >= q_sum[typical].mean(), Regime.LH, Regime.LL)
    high = torch.where(q_teacher >= q_student, Regime.HT, Regime.HS)
    return torch.where(gap >= gap[typical].mean(), high, low)


# -------------------------------------------------------------------------------------------- 5. recipes and loss
class Row(NamedTuple):
    """How the tokens of one regime are supervised. Several rows of one regime add up."""
    regime: IntEnum
    source: str            # teacher, privileged_teacher or privileged_student
    objective: str         # a key of DIVERGENCES
    support: str           # "full", or "top_k": the student's top-K and a tail
    weight: float | Callable               # a number, or {policy: Scores} -> (N,)


class Recipe(NamedTuple):
    """A method: a table, and a router that sorts the tokens into regimes. A token without a row is not trained on."""
    rows: list[Row]
    router: Callable | None = None         # {policy: Scores} -> regimes (N,); None: all tokens are in Regime.ALL
    router_reads: tuple = ()               # names of the policies whose scores the router gets
    anchor_decay: float = 0.0              # privileged student: 0 live; 1 its first copy; between, a moving average


def dopd(beta_light: float = 0.6, beta_weak: float = 0.3, anchor_decay: float = 0.0) -> Recipe:
    """The paper's method, with its weights."""
    return Recipe([
        #   regime     source                objective     support  weight
        Row(Regime.LH, "privileged_teacher", "reverse_kl", "top_k", beta_light),
        Row(Regime.LL, "privileged_student", "reverse_kl", "top_k", beta_weak),
        Row(Regime.HT, "privileged_teacher", "js", "full", 1.0),
        Row(Regime.HS, "privileged_student", "reverse_kl", "top_k", beta_light),
    ], route, ("privileged_teacher", "privileged_student"), anchor_decay)


RECIPES = {
    "vanilla": Recipe([Row(Regime.ALL, "teacher", "reverse_kl", "full", 1.0)]),
    "privileged_teacher": Recipe([Row(Regime.ALL, "privileged_teacher", "reverse_kl", "full", 1.0)]),
    "dopd": dopd(),                        # as published
    "dopd_frozen": dopd(anchor_decay=1.0),
    "privileged_student": Recipe([Row(Regime.ALL, "privileged_student", "reverse_kl", "full", 1.0)]),
}
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": js_divergence}
AT_ONCE = 512              # tokens whose log-probs (n, V) exist at the same time, however many there are in all


@torch.no_grad()
def token_scores(logp: Callable, tokens: torch.Tensor) -> Scores:
    """The scores of the sampled tokens (N,)."""
    parts = []
    for index in torch.arange(len(tokens), device=tokens.device).split(AT_ONCE):
        rows = logp(index)                                                # (n, V)
        parts.append((rows.gather(1, tokens[index, None])[:, 0], torch.special.entr(rows.exp()).sum(-1)))
    return Scores(*map(torch.cat, zip(*parts)))


def assign(recipe: Recipe, scores: dict[str, Scores], lengths: torch.Tensor) -> tuple:
    """The regimes (N,), and the weight of every row on every token (R, N): computed once, for the whole batch.
    Each of the |y| tokens of a completion gets 1/|y|, and all completions (B,) count the same."""
    shares = (1 / lengths).repeat_interleave(lengths) / len(lengths)                         # (N,)
    regimes = recipe.router(scores) if recipe.router else torch.full_like(shares, Regime.ALL, dtype=torch.long)
    weights = [row.weight(scores) if callable(row.weight) else row.weight for row in recipe.rows]
    return regimes, torch.stack([w * shares * (regimes == row.regime) for w, row in zip(weights, recipe.rows)])


def recipe_loss(recipe: Recipe, student: Callable, sources: dict, weights: torch.Tensor, top_k: int) -> torch.Tensor:
    """The sum over rows and tokens of weight (R, N) x divergence: a scalar, in nats. Only the student gets a gradient.
    Log-probs are functions from an index (n,) to (n, V); they are computed again in the backward pass, not kept."""
    def divergence(row: Row, index: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            source_logp = sources[row.source](index)                      # (n, V)
        student_logp = student(index)
        if row.support == "top_k":
            student_logp, source_logp = top_k_with_tail(student_logp, source_logp, top_k)
        return DIVERGENCES[row.objective](student_logp, source_logp)      # (n,)
    total = weights.new_zeros(())
    for row, weight in zip(recipe.rows, weights):
        for index in weight.nonzero()[:, 0].split(AT_ONCE):
            losses = checkpoint(divergence, row, index, use_reentrant=False, preserve_rng_state=False)
            total = total + (weight[index] * losses).sum()
    return total


def dopd_loss(student: torch.Tensor, privileged_teacher: torch.Tensor, privileged_student: torch.Tensor,
              tokens: torch.Tensor, mask: torch.Tensor, *, top_k: int, beta_light: float = 0.6, beta_weak: float = 0.3):
    """The loss of DOPD in one call, to use elsewhere: log-probs (B, T, V), tokens (B, T), mask (B, T) bool -> scalar,
    in nats. Raises ValueError for shapes that do not fit, and for log-probs whose probabilities do not sum to 1."""
    given = {"student": student, "privileged_teacher": privileged_teacher, "privileged_student": privileged_student}
    for name, logp in given.items():
        if logp.shape != (*mask.shape, student.shape[-1]) or tokens.shape != mask.shape or not mask.any():
            raise ValueError(f"{name} {[*logp.shape]}, tokens {[*tokens.shape]}, mask {[*mask.shape]} do not fit")
        if not (logp[mask].detach().float().logsumexp(-1).abs() < 0.05).all():
            raise ValueError(f"{name}: no log-probs; take log_softmax of the logits first")
    logps = {name: logp[mask].__getitem__ for name, logp in given.items()}                   # (N, V)
    recipe, lengths = dopd(beta_light, beta_weak), mask.sum(1)
    scores = {name: token_scores(logps[name], tokens[mask]) for name in recipe.router_reads}
    _, weights = assign(recipe, scores, lengths[lengths > 0])
    return recipe_loss(recipe, logps["student"], logps, weights, top_k)


# -------------------------------------------------------------------------------------------------- 6. training step
def distill_step(recipe: Recipe, policies: dict[str, Policy], optimizer, rows: list[dict], config: Config) -> dict:
    """One optimizer step on these rows, in the paper's order: sample, score, route, learn. Returns its metrics."""
    # 1. The student samples its own completions, without the hint.
    student, rows = policies["student"], [row for row in rows for _ in range(config.rollouts)]
    completions = rollout(student, rows, config.micro_batch)
    tokens = torch.tensor(sum(completions, []), device=student.model.device)                 # (N,)
    lengths = torch.tensor([len(completion) for completion in completions], device=tokens.device)
    # 2. The other policies score the same tokens, without gradient, before the student learns from any of them.
    names = sorted({row.source for row in recipe.rows} | {*recipe.router_reads})
    require({*names} <= {*policies}, f"a source, or router_reads, of the recipe: {names}; there are {sorted(policies)}")
    with torch.no_grad():
        sources = {name: score(policies[name], rows, completions, config.micro_batch) for name in names}
    scores = {name: token_scores(sources[name], tokens) for name in recipe.router_reads}
    # 3. Averages over the whole batch decide where each token goes.
    regimes, weights = assign(recipe, scores, lengths)                   # (N,), (R, N)
    # 4. The student learns, one micro-batch after the other. The weights of all other tokens are 0 there.
    total, entropies, end, size = 0.0, [], 0, config.micro_batch or len(rows)
    for i in range(0, len(rows), size):
        start, end = end, end + int(lengths[i:i + size].sum())            # its tokens among the N
        of_part = torch.nn.functional.pad(weights[:, start:end], (start, len(tokens) - end))
        logp = score(student, rows[i:i + size], completions[i:i + size])
        loss = recipe_loss(recipe, lambda index: logp(index - start), sources, of_part, config.top_k)
        loss.backward()
        total += loss.item()
        entropies.append(token_scores(logp, tokens[start:end]).entropy)
    norm = torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0).item()
    require(math.isfinite(total + norm), f"loss {total}, gradient {norm}: not finite; try a lower --lr")
    optimizer.step()
    optimizer.zero_grad()
    of_tokens = (each.split(lengths.tolist()) for each in (regimes, *(each.logp.exp() for each in scores.values())))
    shown = [*zip(rows, completions, *of_tokens)][::config.rollouts][:4]
    return {"loss": total, "entropy": torch.cat(entropies).mean().item(), "grad_norm": norm, "tokens": len(tokens),
            "regime_share": {row.regime.name: (regimes == row.regime).float().mean().item() for row in recipe.rows},
            "rollouts": [(row["prompt"], ids, of_ids.tolist(), *(q.cpu().double().round(decimals=3).tolist()
                                                                 for q in qs)) for row, ids, of_ids, *qs in shown]}


# ------------------------------------------------------------------------------------------------------ 7. warm start
def tiny_policy(characters: str, layers: int) -> tuple:
    """A tokenizer of single characters, and a tiny Qwen3."""
    ids = {character: i for i, character in enumerate(["<eos>", *characters])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    words.pre_tokenizer, words.decoder = tokenizers.pre_tokenizers.Split("", "isolated"), tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    return tokenizer, transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(ids), hidden_size=128, intermediate_size=256, num_hidden_layers=layers, head_dim=32,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=0, initializer_range=0.06))


def warm_start(task, role: str, config: Config, held_out: set[str], steps: int = 200) -> str:
    """Teaches a tiny model what its author writes. Returns the folder of the checkpoint."""
    torch.manual_seed(config.seed)
    author, rng = getattr(task, role), random.Random(config.seed)
    tokenizer, model = getattr(task, "policy", tiny_policy)(task.CHARACTERS, author.layers)
    model.vocabulary, model.look = len(tokenizer), getattr(task, "look", None)
    adamw = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), f"warm start of the {role}", unit="step"):
        rows, solutions = [], []
        while len(rows) < 128:
            row, form = task.problem(rng), config.hint if rng.random() < author.hinted else "none"
            if row["prompt"] not in held_out:
                rows.append(row | {"form": form})
                solutions.append(task.solution(row, form, author, rng) + "<eos>")
        with explained("the task: are all characters of prompts, hints and solutions in CHARACTERS?"):
            prompts = tokenizer([with_hint(row, row["form"], task.hint_template) for row in rows]).input_ids
            completions = tokenizer(solutions).input_ids
        rows = [row | {"plain": prompt} for row, prompt in zip(rows, prompts)]
        logp = score(Policy(model, "plain"), rows, completions)(slice(None))                 # (N, V)
        (-logp.gather(1, torch.tensor(sum(completions, []))[:, None]).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        adamw.step()
        adamw.zero_grad()
    folder = str(Path(config.out, role).absolute())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------- 8. evaluation and report
COLOURS = ("#b7dfb7", "#d0d0d0", "#9cc2f5", "#ffbf7a", "#e3b7e8", "#f5a3a3", "#f2e58f", "#a8e0de")      # of regimes


@torch.no_grad()
def evaluate(policy: Policy, rows: list[dict], task, tokenizer, config: Config) -> dict:
    """Means over one sampled completion of every row. Exact match: it is right and ended by itself, among the rows that
    need no guess. The kinds that the task grades: the share of yes. Entropy of the next token, in nats."""
    torch.manual_seed(config.seed)
    completions = rollout(policy, rows, config.micro_batch)
    tokens = torch.tensor(sum(completions, []), device=policy.model.device)
    entropies = token_scores(score(policy, rows, completions, config.micro_batch), tokens).entropy.tolist()
    values, first = {"exact match": [], "entropy": entropies, "entropy, wild (best 1.28)": []}, 0
    for row, ids in zip(rows, completions):
        stops = ids[-1] in policy.model.generation_config.eos_token_id
        right = task.check(row, tokenizer.decode(ids[:-1] if stops else ids, skip_special_tokens=True))
        values["exact match"] += [stops and right] if right is not None else []
        for place, kind, correct in task.grade(row, tokenizer.convert_ids_to_tokens(ids)):
            values.setdefault(kind, []).append(correct)
            values["entropy, wild (best 1.28)"] += [entropies[first + place]] if kind == "unlearnable" else []
        first += len(ids)
    return {name: sum(each) / len(each) for name, each in values.items() if each}


def report(log: list[dict], tokenizer, folder: str) -> None:
    """Prints the coloured rollouts and the table, and writes them (tokens.html, report.md), the log and curves.png."""
    terminal = console.Console(record=True, width=120)
    for row in [row for row in log if "validation" in row and RECIPES[row["recipe"]].router]:
        regimes = dict.fromkeys(line.regime for line in RECIPES[row["recipe"]].rows)
        terminal.print(f"\n{row['recipe']}, step {row['step']}: rollouts of the student, every token in its regime",
                       *(text.Text(f" {regime.name} ", f"black on {COLOURS[regime % 8]}") for regime in regimes))
        for prompt, ids, of_ids, *_ in row["rollouts"]:
            terminal.print(text.Text.assemble(prompt, *(
                (tokenizer.decode([token]), f"black on {COLOURS[regime % 8]}" if regime in regimes else "")
                for token, regime in zip(ids, of_ids))))
    tests = pandas.DataFrame({row["recipe"]: row["test"] for row in log if "test" in row}).T
    head, *lines = tests.to_csv(sep="|", float_format="%.2f", na_rep="-", index_label="policy").splitlines()
    table = "\n".join(f"|{line}|" for line in (head, "|".join("-" * (1 + tests.shape[1])), *lines))
    terminal.print(markdown.Markdown(table))
    terminal.save_html(f"{folder}/tokens.html")
    Path(folder, "report.md").write_text(table + "\n")
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    frame = pandas.json_normalize([row for row in log if "step" in row])
    if frame.empty:
        return
    routed = [name for name in frame.recipe.unique() if RECIPES[name].router]
    figure, axes = pyplot.subplots(1, 2 + len(routed), figsize=(8 + 4 * len(routed), 4), layout="constrained")
    for axis, column, name in zip(axes, ("validation.exact match", "entropy"), ("exact match", "entropy (nats)")):
        frame.pivot(index="step", columns="recipe", values=column).dropna().plot(ax=axis, ylabel=name, marker=".", ms=2)
    for axis, name in zip(axes[2:], routed):
        shares = pandas.DataFrame([row["regime_share"] for row in log if "step" in row and row["recipe"] == name])
        colours = {row.regime.name: COLOURS[row.regime % 8] for row in RECIPES[name].rows}
        shares.plot.area(ax=axis, color=colours, linewidth=0, xlabel="step", ylabel=f"share of the tokens, {name}")
    for axis in axes:                      # below the plot, where they cover nothing
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(f"{folder}/curves.png", dpi=120)


# -------------------------------------------------------------------------------------- 9. data, real models, main
def read_rows(config: Config) -> list[dict]:
    """The rows of --data, with a hint of the form that was asked for."""
    path, given = Path(config.data), f"--data {config.data}"
    kind = path.suffix[1:].replace("jsonl", "json") if path.is_file() else config.data
    require(path.exists() or path.suffix not in (".jsonl", ".json", ".csv", ".parquet"), f"{given}: no such file")
    with explained(given if path.exists() else f"{given}, not on this disk"):     # a file may have changed since then
        table = datasets.load_dataset(kind, data_files=config.data if path.is_file() else None, split="train",
                                      download_mode="force_redownload" if path.exists() else None)
    for number, row in enumerate(rows := table.to_list(), 1):
        row["hints"] = {config.hint: row.get("hint")} | (row.get("hints") or {}) | {"none": ""}
        texts = {"prompt": row.get("prompt"), "answer": row.get("answer"), "hint": row["hints"][config.hint]}
        wrong = [name for name, value in texts.items() if not isinstance(value, str) or not value and name != "hint"]
        require(not wrong, f"{given}, row {number}: must be text: {', '.join(wrong)}; columns: {table.column_names}")
    return rows


def with_hint(row: dict, form: str, template: str) -> str:
    """What a privileged policy reads."""
    parts = {"prompt": row["prompt"], "hint": row["hints"][form]}
    return re.sub(r"\{(prompt|hint)\}", lambda found: parts[found[1]], template) if parts["hint"] else row["prompt"]


def encode(rows: list[dict], tokenizer, model, template: str, form: str) -> None:
    """Adds to every row what the policies read, in token ids: "plain", its prompt; "hinted", its prompt with the hint.
    Prints both for the first row, since it is easy to make them differ by more than the hint."""
    chat, options = bool(tokenizer.chat_template), model.generation_config
    room = getattr(model.config.get_text_config(), "max_position_embeddings", math.inf) - options.max_new_tokens
    ids_of = getattr(tokenizer, "read", lambda _, form, texts: tokenizer(texts, add_special_tokens=not chat).input_ids)
    for key, read in (("plain", "none"), ("hinted", form)):
        texts = [with_hint(row, read, template) for row in rows]
        with explained("the student's tokenizer or chat template, on the prompts"):
            rendered = texts if not chat else tokenizer.apply_chat_template([[{"role": "user", "content": prompt}] for
                prompt in texts], tokenize=False, add_generation_prompt=True, enable_thinking=False)
            tokens = ids_of(rows, read, rendered)
        print(f"first row, {key}: {rendered[0]!r}")
        for row, shown, ids in zip(rows, rendered, tokens):
            row[key] = ids[:-1] if ids and ids[-1] in options.eos_token_id else ids        # some tokenizers end a text
            require(all(part.strip() in shown for part in (row["prompt"], row["hints"][read])),
                    f"--hint_template, or the student's chat template: loses prompt or hint: {row['prompt'][:60]!r}")
            require(0 < len(row[key]) <= room and max(ids) < model.vocabulary, f"{row['prompt'][:50]!r}: "
                    f"{len(row[key])} tokens, where --max_new_tokens leaves {room}, or a token that the model lacks")


def load(config: Config, max_new_tokens: int, auto=transformers.AutoModelForCausalLM) -> tuple:
    """Tokenizer, teacher and student, with one vocabulary. The weights of the student are always float32."""
    models, words, ends = [], [], {None}
    for role, name, dtype in (("teacher", config.teacher, config.dtype), ("student", config.student, "float32")):
        with explained(f"--{role} {name} as {auto.__name__}, --device {config.device}"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            model, loading = auto.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True)
            models.append(model.to(config.device).eval())
            words.append(tokenizer.get_vocab())
            eos = model.generation_config.eos_token_id
            ends |= {tokenizer.eos_token_id} | ({*eos} if isinstance(eos, list) else {eos})
            if tokenizer.chat_template:    # the special token that it puts after an answer
                turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
                after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("answer")[2].strip()
                ends |= {*tokenizer(after, add_special_tokens=False).input_ids[:1]} & {*tokenizer.added_tokens_decoder}
        require(not loading["missing_keys"], f"--{role} {name}: no weights for {sorted(loading['missing_keys'])[:1]}")
    eos_ids = sorted(ends - {None})
    require(words[0] == words[1] and eos_ids, "--teacher, --student: must share one tokenizer, and it needs an EOS")
    if config.gradient_checkpointing:      # works in training mode only: a model with dropout fails the check below
        models[1].train().activation_checkpointing_enable()
    heights = [model.get_input_embeddings().num_embeddings for model in models]
    for model, height in zip(models, heights):
        model.look, model.vocabulary = None, min(max(words[0].values()) + 1, *heights)     # further rows are no tokens
        model.generation_config = transformers.GenerationConfig(          # the model's own distribution, nothing else
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, eos_token_id=eos_ids,
            pad_token_id=eos_ids[0], suppress_tokens=[*range(model.vocabulary, height)] or None)
        # Some architectures cannot be padded, or change their logits after the last layer: compare with single rows.
        rows = [{"plain": [*range(length)]} for length in (3, 3, 8, 8)]
        with explained(f"{model.name_or_path}: cannot be scored in batches"):
            single = [model(torch.tensor([row["plain"]], device=config.device)).logits[:, -1] for row in rows]
            error = (score(Policy(model, "plain"), rows, [[0]] * 4)(slice(None))
                     - torch.cat(single)[:, :model.vocabulary].float().log_softmax(-1)).abs().mean().item()
        require(error < (0.1 if model.dtype == torch.bfloat16 else 1e-3), f"{model.name_or_path}: not supported, since "
                f"its scores differ between a padded batch and single rows, by {error:.2g} nats")
    return tokenizer, models[0].requires_grad_(False), models[1]


def run(config: Config, saved: dict | None = None) -> list[dict]:
    """Every recipe from the same student, then the report; from the start, or from a checkpoint. Returns the log."""
    task, rng = OwnData(config.answer_regex or r"(?s)\A.*") if config.data else TASKS[config.task], random.Random(0)
    log, splits = (saved["log"], saved["splits"]) if saved else ([], {})
    rows = (splits["train"] if saved else read_rows(config) if config.data else
            [task.problem(rng) for _ in range(12_000)])
    if config.data and "image" in rows[0]:
        sys.modules["dopd"] = sys.modules[__name__]        # what vision.py imports, even where this runs as a script
        with explained(f"--data {config.data}: for its images, dopd.py needs tiny_tasks/vision.py"):
            from tiny_tasks import vision
        task = vision.with_eyes(task, rows, config)
    if not saved:
        require(config.hint in rows[0]["hints"], f"--hint {config.hint}: choose from {', '.join(rows[0]['hints'])}")
        for row in rows:                   # by its prompt: no prompt is both trained on and tested
            draw = random.Random(row.get("split_by", row["prompt"])).random()
            splits.setdefault("train" if draw < 0.7 else "validation" if draw < 0.85 else "test", []).append(row)
        require(len(splits) == 3, f"--data or task: {len(rows)} rows: too few to be split by chance, 70, 15 and 15%")
        with explained(f"--out {config.out}"):
            Path(config.out or "runs").mkdir(parents=True, exist_ok=True)
        config.out = config.out or tempfile.mkdtemp(prefix=f"{Path(config.data).stem or config.task}-", dir="runs")
        require(not Path(config.out, "config.json").exists(), f"--out {config.out}: holds a run; choose another folder")
        if not config.teacher:
            unseen = {row["prompt"] for row in splits["validation"] + splits["test"]}
            config.teacher, config.student = (warm_start(task, role, config, unseen) for role in ("teacher", "student"))
    tokenizer, teacher, untrained = getattr(task, "load", load)(config, config.max_new_tokens or task.max_new_tokens)
    if not saved:
        encode(rows, tokenizer, untrained, config.hint_template or task.hint_template, config.hint)
        with explained(f"--out {config.out}: another run took it"), open(f"{config.out}/config.json", "x") as file:
            json.dump(asdict(config), file, indent=1)

    def test(name: str, model) -> None:
        plain, hinted = (evaluate(Policy(model, reads), splits["test"][:config.test_prompts], task, tokenizer, config)
                         for reads in ("plain", "hinted"))
        log.append({"recipe": name, "test": {"exact match": None, "with hint": hinted.get("exact match")} | plain})

    # bfloat16 is for the matrix products only. No cache: it would keep serving the weights of before the step.
    with torch.autocast(teacher.device.type, torch.bfloat16, config.dtype == "bfloat16", cache_enabled=False):
        if not saved:
            test("student before", untrained)
            test("teacher", teacher)
        tested = {row["recipe"] for row in log if "test" in row}
        for name in [name for name in dict.fromkeys(config.recipe) if config.steps and name not in tested]:
            student, recipe = copy.deepcopy(untrained), RECIPES[name]
            anchor = copy.deepcopy(student).requires_grad_(False) if recipe.anchor_decay else student
            policies = {"student": Policy(student, "plain"), "privileged_student": Policy(anchor, "hinted"),
                        "teacher": Policy(teacher, "plain"), "privileged_teacher": Policy(teacher, "hinted")}
            optimizer = torch.optim.AdamW(student.parameters(), config.lr, weight_decay=0.0)
            parts = {"student": student, "anchor": anchor, "optimizer": optimizer}
            done = saved["step"] if saved and saved["recipe"] == name else 0
            for key, part in parts.items() if done else ():
                part.load_state_dict(saved[key])
            order = random.Random(config.seed).sample(splits["train"], len(splits["train"]))
            for step in tqdm(range(done, config.steps), name, config.steps, initial=done, unit="step"):
                torch.manual_seed(config.seed * 10**6 + step)             # seed and step decide every random draw
                rows = [order[(step * config.batch_size + i) % len(order)] for i in range(config.batch_size)]
                optimizer.param_groups[0]["lr"] = config.lr * (0.55 + 0.45 * math.cos(math.pi * step / config.steps))
                log.append({"recipe": name, "step": step + 1} | distill_step(recipe, policies, optimizer, rows, config))
                for average, weight in zip(anchor.parameters(), student.parameters()):       # the same, if it is live
                    average.data.lerp_(weight.data, 1 - recipe.anchor_decay)
                if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                    validation = splits["validation"][:256]
                    log[-1]["validation"] = evaluate(policies["student"], validation, task, tokenizer, config)
                    Path(config.out, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
                    state = {"config": asdict(config), "splits": splits, "log": log, "recipe": name,
                             "step": step + 1} | {key: part.state_dict() for key, part in parts.items()}
                    torch.save(state, f"{config.out}/saving.pt")
                    os.replace(f"{config.out}/saving.pt", f"{config.out}/checkpoint.pt")     # whole, or as it was
            test(name, student)
            student.save_pretrained(f"{config.out}/{name}")
            tokenizer.save_pretrained(f"{config.out}/{name}")
    getattr(task, "report", report)(log, tokenizer, config.out)
    return log


def main(argv: list[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    parser = HfArgumentParser(Config, usage="python dopd.py [--flag value ...]", allow_abbrev=False)
    parser.error = lambda message: require(False, f"{message}; see --help")
    config, saved = Config(**vars(parser.parse_args(argv))), None
    if config.resume:
        require(len(argv) == 2, "--resume FOLDER: takes no other flag; the run keeps its own")
        with explained(f"--resume {config.resume}: no checkpoint to go on from"):
            saved = torch.load(f"{config.resume}/checkpoint.pt", map_location="cpu", weights_only=True)
        config = Config(**saved["config"] | {"out": config.resume})
    run(config, saved)
    print(f"all of it is in {config.out}/")


if __name__ == "__main__":
    main(sys.argv[1:])
