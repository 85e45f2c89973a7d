"""DOPD, Dual On-policy Distillation (arXiv 2606.30626), in one file.

A student samples its own answers; a stronger teacher judges every token. In training both may read
a hint that the student will not see later. For each token DOPD asks: if the student could read the
hint too, would it agree with the teacher? If yes, a light correction is enough. If no, the one that
is surer of the token teaches it.

    python dopd.py && python tiny_tasks/report.py  # the CPU experiment: minutes
    python dopd.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B ...  # see README.md

Shapes: B completions have N tokens, joined end to end; V words are in the vocabulary; H is the
hidden size; a recipe has R terms. Divergences and gaps are in nats.
"""

import copy
import csv
import json
import math
import random
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain, cycle, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import pandas
import regex
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

TASKS, RECIPES = {}, {}  # filled below, and by scripts that add their own


def flag(default, text: str, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Config:
    task: str = flag("shortcut", "what tiny policies learn", choices=TASKS)
    recipe: list[str] = flag(None, "empty: four; more in tiny_tasks/recipes.py", choices=RECIPES)
    seed: int = flag(0, "of draws, not of prompts")
    steps: int = flag(160, "optimizer steps; 0 only tests; paper: 200")
    batch_size: int = flag(16, "prompts per optimizer step; paper: 128")
    rollouts: int = flag(4, "completions sampled per prompt; paper: 4")
    micro_batch: int = flag(10_000, "completions per forward pass; sampled: 8 times as many")
    lr: float = flag(2e-4, "peak learning rate, cosine to a tenth; paper: 5e-6")
    top_k: int = flag(4, "words of the top-K support; paper: 128")
    teacher: str = flag("", "Hugging Face model, or a folder; empty: a tiny one")
    student: str = flag("", "the same; both share one tokenizer")
    data: str = flag("", "JSONL, JSON, CSV, Parquet or Hub name: prompt, answer, hint")
    hint_template: str = flag("{prompt}\n\nHint: {hint}", "what privileged policies read")
    answer_regex: str = flag("(?s).+", "its last match (or group) in a completion is the answer")
    max_new_tokens: int = flag(512, "of a completion, for --data")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: str = flag("float32", "of matrix products", choices=("float32", "bfloat16"))
    eval_every: int = flag(40, "steps between validations; each saves the student")
    test_prompts: int = flag(1200, "prompts of the final test")
    out: str = flag("", "folder of the run; empty: a new one in runs/")


class UserError(Exception):
    """A mistake of the user, printed in one line; exit code 2."""


def require(condition, fault: str):
    if not condition:
        raise UserError(fault)


@contextmanager
def blame(what: str):
    """An error of a library in this block becomes a UserError about `what`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {type(error).__name__}: {error}") from error


# --- tasks: rows of prompt, answer and hint, and the authors of solutions
class Author(NamedTuple):
    layers: int  # of the model
    hinted: float  # share of the solutions that are written with the hint
    knows: int  # how many of the ten stable names it knows; it guesses the others
    slips: float = 0.0  # share of the sums above 9 that are one too high
    skips_hinted: float = 0.0  # share of the solutions that leave out the steps, with the hint
    skips: float = 0.0  # and without it


class Rules(NamedTuple):
    """`7fbk=` -> `967314`: start at 7; the names f, b and k each add a digit, modulo 10; write the
    digit and the new value. Ten stable names always mean the same digit; three wild names one of
    four digits, which only the hint `971` tells. Who skips the steps writes just `=4`."""

    teacher: Author
    student: Author
    hint_template: str = "{hint}|{prompt}"
    max_new_tokens: int = 7
    length: int = 3  # names in a prompt
    characters = "0123456789=|abcdefghijklm"  # from here on no fields: the same for all
    stable = dict(a=3, b=7, c=1, d=8, e=5, f=9, g=2, h=6, i=4, j=0)
    wild = dict(k=(1, 4, 6, 9), l=(8, 2, 5, 3), m=(0, 7, 3, 6))

    def problem(self, rng) -> dict:
        start = rng.randrange(10)
        names = ""
        for _ in range(self.length):
            group = self.wild if rng.random() < 0.2 else self.stable
            names += rng.choice([*group])
        answer = self.work(start, [self.digit(name, 10, rng) for name in names])
        return {"prompt": f"{start}{names}=", "answer": answer, "hint": answer[::2]}  # the digits

    def digit(self, name: str, knows: int, rng) -> int:
        """What a name stands for, or a guess."""
        if name in self.wild:
            return rng.choices(self.wild[name], weights=(4, 3, 2, 1))[0]
        return self.stable[name] if name in "abcdefghij"[:knows] else rng.randrange(10)

    def work(self, value: int, digits: list[int], slips=0.0, rng=random) -> str:
        written = ""
        for digit in digits:
            slip = value + digit > 9 and rng.random() < slips
            value = (value + digit + slip) % 10  # with a slip one too high
            written += f"{digit}{value}"
        return written

    def solution(self, row, hinted: bool, author: Author, rng) -> str:
        """What the author writes after the prompt."""
        digits = [int(digit) for digit in row["hint"]]
        if not hinted:
            digits = [self.digit(name, author.knows, rng) for name in row["prompt"][1:-1]]
        worked = self.work(int(row["prompt"][0]), digits, author.slips, rng)
        skips = author.skips_hinted if hinted else author.skips
        return f"={worked[-1]}" if rng.random() < skips else worked

    def grade(self, row, completion: str) -> dict[str, bool]:
        """Leaves out the exact match where a wild name makes it a lucky guess."""
        grades = {"skips": completion.startswith("=")}
        if not {*row["prompt"]} & {*self.wild}:
            grades["exact match"] = completion in (row["answer"], f"={row['answer'][-1]}")
        return grades


STRONG = Author(layers=3, hinted=0.5, knows=7)
WEAK = Author(layers=2, hinted=0.3, knows=4, slips=0.6)
TASKS["rules"] = Rules(STRONG, WEAK)  # nobody skips
CARELESS = WEAK._replace(skips_hinted=0.05, skips=0.05)
TASKS["shortcut"] = Rules(STRONG._replace(skips_hinted=0.7), CARELESS)


class OwnData:  # --data, for real models
    def __init__(self, config: Config):
        self.hint_template, self.max_new_tokens = config.hint_template, config.max_new_tokens
        with blame(f"--answer_regex {config.answer_regex}"):
            self.pattern = regex.compile(config.answer_regex)

    def answer(self, text: str) -> str:
        """The last match that is not empty, or its group; searched for a second at most."""
        found = ""
        with suppress(TimeoutError):
            for match in self.pattern.finditer(text, timeout=1.0):
                part = next((text for text in match.groups() if text is not None), match[0])
                found = part.strip() or found
        return found

    def grade(self, row, completion) -> dict[str, bool]:
        answer = row["answer"].strip()  # by lines: Windows ends them differently
        return {"exact match": self.answer(completion).splitlines() == answer.splitlines()}

    def check(self, rows, tokenizer):
        """Refuses an answer that the tokenizer cannot write, or the pattern finds only in part."""
        for answer in dict.fromkeys(row["answer"].strip() for row in rows):
            ids = tokenizer(answer, add_special_tokens=False).input_ids
            written = tokenizer.decode(ids, skip_special_tokens=True).strip()
            found = self.answer(written) or written  # no match: no \boxed
            require(found == answer, f"--answer_regex, tokenizer: {answer!r} becomes {found!r}")


# --- policies: score and sample
class Policy(NamedTuple):
    model: transformers.PreTrainedModel
    reads: str  # which token ids of a row: "plain", or "hinted" if it is privileged

    def look(self, rows, ids: Tensor) -> dict:
        """What the model gets beside ids (B, L): pictures, see tiny_tasks/vision.py."""
        return self.model.see(rows, self.reads, ids) if hasattr(self.model, "see") else {}


# (model, what it reads). The anchor: the student, an old copy or an average.
POLICIES = {
    "student": ("student", "plain"),
    "privileged_student": ("anchor", "hinted"),
    "teacher": ("teacher", "plain"),
    "privileged_teacher": ("teacher", "hinted"),
}


@dataclass
class LogProbs:
    """Log-probs of N tokens, computed when asked for: [index] -> (n, V). Only (N, H) is kept."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)

    def __getitem__(self, index) -> Tensor:
        logits = torch.nn.functional.linear(self.hidden[index], self.weight)
        return logits.float().log_softmax(-1)  # (n, V)


def score(policy: Policy, rows: list[dict], completions: list[list[int]], size=10_000) -> LogProbs:
    """Log-probs of the N tokens of the completions, each after what the policy reads of its row.
    Padding is at the end; a causal model never sees it: no mask and no positions are needed."""
    hidden = []
    for i in range(0, len(rows), size):
        batch = [*zip(rows[i : i + size], completions[i : i + size], strict=True)]
        texts = [torch.tensor(row[policy.reads] + completion) for row, completion in batch]
        ids = pad_sequence(texts, batch_first=True)[:, :-1].to(policy.model.device)  # (B, L)
        pictures = policy.look(rows[i : i + size], ids)
        states = policy.model.base_model(ids, use_cache=False, **pictures).last_hidden_state
        for state, text, (_, completion) in zip(states, texts, batch, strict=True):
            end = len(text) - 1  # the state (L, H) of a token predicts the next token
            hidden.append(state[end - len(completion) : end].clone())  # frees the rest
    weight = policy.model.get_output_embeddings().weight[: policy.model.vocabulary]
    return LogProbs(torch.cat(hidden), weight)


def sample(policy: Policy, rows, **options):
    """The output of `generate`, and where completions begin. Only here padding is on the left."""
    texts = [torch.tensor(row[policy.reads]) for row in rows]
    ids = pad_sequence(texts, True, padding_value=-1, padding_side="left").to(policy.model.device)
    mask = (ids >= 0).long()  # (B, L)
    ids = ids.clamp(min=0)
    sampled = policy.model.generate(ids, attention_mask=mask, **options, **policy.look(rows, ids))
    return sampled, ids.shape[1]


@torch.no_grad()
def rollout(policy: Policy, rows: list[dict], size=10_000) -> list[list[int]]:
    """One completion per row, up to and including its end token. For the temperature see `load`."""
    ends = policy.model.generation_config.eos_token_id
    completions = []
    for i in range(0, len(rows), size):
        sampled, begin = sample(policy, rows[i : i + size])
        for tokens in sampled[:, begin:].tolist():
            stops = [place for place, token in enumerate(tokens, 1) if token in ends]
            completions.append(tokens[: stops[0]] if stops else tokens)
    return completions


# --- divergences
def reverse_kl(student: Tensor, source: Tensor) -> Tensor:
    """KL(student || source), log-probs (..., V) -> (...): avoid what the source finds unlikely."""
    log_ratio = (student - source).masked_fill(student == -math.inf, 0)  # since 0 * log 0 is 0
    return (student.exp() * log_ratio).sum(-1)


def js_divergence(student: Tensor, source: Tensor) -> Tensor:
    """Jensen-Shannon, log-probs (..., V) -> (...): the mean KL of both to their even mixture."""
    lowest = torch.finfo(student.dtype).min  # logaddexp(-inf, -inf) has no gradient
    mixture = torch.logaddexp(student.clamp(min=lowest), source.clamp(min=lowest)) - math.log(2)
    return 0.5 * (reverse_kl(source, mixture) + reverse_kl(student, mixture))


def top_k_with_tail(student: Tensor, source: Tensor, k: int) -> list[Tensor]:
    """Both log-probs (..., V) on the student's k likeliest words, and one bucket for all others:
    two (..., k+1). Both are our choices. Without the bucket the rest would be free."""
    top = student.topk(min(k, student.shape[-1]), -1).indices  # (..., k)
    both = []
    for logp in (student, source):
        others = logp.scatter(-1, top, torch.finfo(logp.dtype).min)  # not -inf: k may be all of V
        both.append(torch.cat([logp.gather(-1, top), others.logsumexp(-1, keepdim=True)], -1))
    return both


DIVERGENCES = {"reverse_kl": reverse_kl, "js": js_divergence}
SUPPORTS = {"full": lambda student, source, k: (student, source), "top_k": top_k_with_tail}


# --- the router: section 3 of the paper
class Regime(IntEnum):  # as both privileged policies see it
    LH = 0  # low gap, both sure: only the hint is missing, a light touch of the teacher
    LL = 1  # low gap, both unsure: nothing to learn, a weak pull to the student itself
    HT = 2  # high gap, the teacher is surer: a capability, learned in full
    HS = 3  # high gap, the student is surer: its own way, which the teacher must not suppress
    ALL = 4  # every token of a recipe without a router


# What a router sees of one policy: log-probs (N,) of the sampled tokens, entropies (N,).
Scores = namedtuple("Scores", "logp entropy")


def advantage_gap(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    """Equation 1: how far the privileged policies differ on a token, |log q_T - log q_S|."""
    return (teacher_logp - student_logp).abs()


def route(scores: dict[str, Scores]) -> Tensor:
    """The regime (N,) of every sampled token. The thresholds are means over all N tokens, so give
    it the whole batch. The largest 5% of the gaps, the outliers, are left out of the means; they
    are routed, too."""
    teacher_logp = scores["privileged_teacher"].logp.float()
    student_logp = scores["privileged_student"].logp.float()
    q_teacher, q_student = teacher_logp.exp(), student_logp.exp()
    q_sum = q_teacher + q_student
    gap = advantage_gap(teacher_logp, student_logp)
    limit = gap.sort().values[int(0.95 * (len(gap) - 1))]  # torch.quantile takes 16 million at most
    typical = gap <= limit
    mean_gap = gap[typical].mean()
    mean_sum = q_sum[typical].mean()
    if_low = torch.where(q_sum >= mean_sum, Regime.LH, Regime.LL)
    if_high = torch.where(q_teacher >= q_student, Regime.HT, Regime.HS)
    return torch.where(gap < mean_gap, if_low, if_high)


# --- recipes: a method is a table
class Term(NamedTuple):
    regime: IntEnum  # whose tokens; several terms of one regime add up
    source: str  # whom to follow: a name of POLICIES
    objective: str  # a name of DIVERGENCES
    support: str  # a name of SUPPORTS
    weight: float | Callable  # a number, or {policy: Scores} -> (N,)


class Recipe(NamedTuple):
    terms: list[Term]  # a token whose regime has none is not trained on
    router: Callable | None = None  # {policy: Scores} -> regimes (N,)
    router_reads: tuple = ()  # the policies whose scores the router and the weights get
    anchor_decay: float = 0.0  # of the privileged student: 0 live, 1 frozen, between: an average


def dopd(beta_light=0.6, beta_weak=0.3, anchor_decay=0.0) -> Recipe:
    """The paper's method, with its weights."""
    terms = [
        Term(Regime.LH, "privileged_teacher", "reverse_kl", "top_k", beta_light),
        Term(Regime.LL, "privileged_student", "reverse_kl", "top_k", beta_weak),
        Term(Regime.HT, "privileged_teacher", "js", "full", 1.0),
        Term(Regime.HS, "privileged_student", "reverse_kl", "top_k", beta_light),
    ]
    return Recipe(terms, route, ("privileged_teacher", "privileged_student"), anchor_decay)


on_every_token = Term(Regime.ALL, "teacher", "reverse_kl", "full", 1.0)
RECIPES["opd"] = Recipe([on_every_token])
RECIPES["privileged_opd"] = Recipe([on_every_token._replace(source="privileged_teacher")])
RECIPES["dopd"] = dopd()  # as published
RECIPES["dopd_frozen"] = dopd(anchor_decay=1.0)

# --- the loss
AT_ONCE = 512  # tokens whose log-probs (n, V) exist at once


@torch.no_grad()
def token_scores(logp, tokens: Tensor) -> Scores:
    """From LogProbs or a tensor (N, V), and the sampled tokens (N,)."""
    sampled, entropies = [], []
    for index in torch.arange(len(tokens), device=tokens.device).split(AT_ONCE):
        part = logp[index]  # (n, V)
        sampled.append(part.gather(1, tokens[index][:, None])[:, 0])
        entropies.append(torch.special.entr(part.exp()).sum(-1))  # entr(p) is -p log p
    return Scores(torch.cat(sampled), torch.cat(entropies))


def assign(recipe: Recipe, scores: dict[str, Scores], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The regimes (N,), and the weight of every term on every token (R, N). A token of a completion
    y gets 1/|y|, and all completions (B,) count the same: the paper's two means."""
    shares = (1 / lengths).repeat_interleave(lengths) / len(lengths)  # (N,)
    everywhere = torch.full_like(shares, Regime.ALL, dtype=torch.long)
    regimes = recipe.router(scores) if recipe.router else everywhere
    weights = []
    for term in recipe.terms:
        weight = term.weight(scores) if callable(term.weight) else term.weight
        weights.append(weight * shares * (regimes == term.regime))
    return regimes, torch.stack(weights)


def recipe_loss(recipe, student, sources: dict, weights: Tensor, top_k: int, start=0) -> Tensor:
    """The sum over terms and tokens of weight (R, N) x divergence. `student` and each source is
    LogProbs or a tensor (N, V), computed again in the backward pass, not kept. In a micro-batch,
    student and weights begin at token `start` of the batch; the sources are of the whole batch."""

    def divergence(term: Term, index: Tensor) -> Tensor:
        student_logp = student[index]
        source_logp = sources[term.source][start + index].detach()  # both (n, V)
        pair = SUPPORTS[term.support](student_logp, source_logp, top_k)
        return DIVERGENCES[term.objective](*pair)  # (n,)

    total = 0.0
    for term, weight in zip(recipe.terms, weights, strict=True):
        for index in weight.nonzero()[:, 0].split(AT_ONCE):  # none: one empty part, for backward
            losses = checkpoint(divergence, term, index, use_reentrant=False)
            total = total + (weight[index] * losses).sum()
    return total


# --- one training step
def distill_step(recipe: Recipe, policies: dict, optimizer, rows: list[dict], config) -> dict:
    """One optimizer step, in the paper's order: sample, score, route, learn."""
    student = policies["student"]
    size = config.micro_batch
    rows = [row for row in rows for _ in range(config.rollouts)]

    # 1. The student samples its own completions, without the hint.
    completions = rollout(student, rows, 8 * size)
    tokens = torch.tensor([*chain(*completions)], device=student.model.device)  # (N,)
    lengths = torch.tensor([len(ids) for ids in completions], device=tokens.device)  # (B,)

    # 2. The policies that teach or route score the same tokens, before the student learns.
    others = {term.source for term in recipe.terms} | {*recipe.router_reads}
    with torch.no_grad():
        sources = {name: score(policies[name], rows, completions, size) for name in others}
    scores = {name: token_scores(sources[name], tokens) for name in recipe.router_reads}

    # 3. Means over the whole batch decide where each token goes.
    regimes, weights = assign(recipe, scores, lengths)  # (N,), (R, N)

    # 4. The student learns. The weights are of the whole batch: micro-batches add up.
    loss, entropy, end = 0.0, 0.0, 0
    for i in range(0, len(rows), size):
        start = end
        end += int(lengths[i : i + size].sum())
        logp = score(student, rows[i : i + size], completions[i : i + size])
        part = recipe_loss(recipe, logp, sources, weights[:, start:end], config.top_k, start)
        part.backward()
        loss += part.item()
        entropy += token_scores(logp, tokens[start:end]).entropy.sum().item() / len(tokens)
    metrics = {"loss": loss, "entropy": entropy, "grad_norm": clip_gradient(student.model)}
    optimizer.step()
    optimizer.zero_grad()
    names = {term.regime: term.regime.name for term in recipe.terms}
    share = {name: (regimes == regime).float().mean().item() for regime, name in names.items()}
    shown = [*examples(names, rows, completions, regimes, scores, config.rollouts)]
    return metrics | {"tokens": len(tokens), "regime_share": share, "rollouts": shown}


def clip_gradient(model) -> float:
    """The gradient's norm, before it is clipped to 1."""
    for name, weight in reversed([*model.named_parameters()]):  # output to input: the first
        finite = weight.grad is None or weight.grad.isfinite().all()
        require(finite, f"the gradient is not finite, from {name} on; try a lower --lr")
    return torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()


def examples(names, rows, completions, regimes, scores, rollouts):
    """For the figures: four completions, the regimes and probabilities of their tokens."""
    lengths = [len(ids) for ids in completions]
    for i in range(0, len(rows), rollouts)[:4]:
        kinds = regimes.split(lengths)[i].tolist()
        example = {key: rows[i].get(key) for key in ("prompt", "hint", "answer")}
        example |= {"ids": completions[i], "regimes": [names.get(kind, "-") for kind in kinds]}
        for name, (logp, _) in scores.items():
            example[name] = [round(q, 4) for q in logp.split(lengths)[i].exp().tolist()]
        yield example


# --- the warm start
def tiny_policy(characters: str, layers: int) -> tuple:
    """A tokenizer of single characters, and a tiny Qwen3."""
    ids = {character: i for i, character in enumerate(["<eos>", *characters])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    words.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    sizes = {"vocab_size": len(ids), "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    sizes |= {"num_hidden_layers": layers, "initializer_range": 0.06, "eos_token_id": 0} | heads
    return tokenizer, transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))


def warm_start(role, task, held_out, config, steps=200):
    """Teaches a tiny model what its author writes, and saves it."""
    author = getattr(task, role)
    rng = random.Random(config.seed)
    row = task.problem(rng)
    for hinted in (False, False, True, True):
        solution = task.solution(row, hinted, author, rng)
        print(f"{row}: the {role}'s author, hinted: {hinted}, writes {solution}")
    torch.manual_seed(config.seed)
    tokenizer, model = getattr(task, "build", tiny_policy)(task.characters, author.layers)
    model.vocabulary = len(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), f"warm start of the {role}", unit="step"):
        rows, texts, solutions = [], [], []
        while len(rows) < 128:
            row = task.problem(rng)
            hinted = rng.random() < author.hinted
            if row["prompt"] not in held_out:
                rows.append(row | {"is_hinted": hinted})  # for vision.py
                texts.append(task.hint_template.format(**row) if hinted else row["prompt"])
                solutions.append(task.solution(row, hinted, author, rng) + "<eos>")
        with blame(f"--task {config.task}: its `characters` lack one"):
            prompts = tokenizer(texts).input_ids
            completions = tokenizer(solutions).input_ids
        rows = [row | {"plain": ids} for row, ids in zip(rows, prompts, strict=True)]  # or hinted
        logp = score(Policy(model, "plain"), rows, completions)[:]  # (N, V)
        tokens = torch.tensor([*chain(*completions)])
        torch.nn.functional.nll_loss(logp, tokens).backward()
        clip_gradient(model)
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    with blame(f"--out {config.out}"):
        model.save_pretrained(f"{config.out}/{role}")
        tokenizer.save_pretrained(f"{config.out}/{role}")


# --- rows and models
READERS = {
    ".json": lambda path: json.loads(path.read_text("utf-8")),
    # As one array: an error then names its line, or the next.
    ".jsonl": lambda path: json.loads(f"[{path.read_text('utf-8').strip()}]".replace("\n", ",\n")),
    # A row too long puts a list in `hint`, which is refused.
    ".csv": lambda path: csv.DictReader(path.open(encoding="utf-8-sig"), restkey="hint"),
    ".parquet": pandas.read_parquet,
}


def read_rows(config, pictures=()) -> list[dict]:
    """The rows of --data: three texts each, as they stand there, and the named pictures."""
    path = Path(config.data)
    with blame(f"--data {path} (a file here: {path.exists()})"):
        if path.suffix in READERS:
            table = pandas.DataFrame(READERS[path.suffix](path))
        else:
            table = datasets.load_dataset(config.data, split="train").to_pandas()
    for number, row in enumerate(table.to_dict("records"), 1):
        for name in ("prompt", "answer", "hint"):
            text = row.get(name)
            fine = isinstance(text, str) and (text or name == "hint")
            fault = f"{name} must be text, not {text!r}; its columns are {[*row]}"
            require(fine, f"--data {path}, row {number}: {fault}")
        require(pictures or not row.get("image"), f"{path}: pictures are for tiny_tasks/vision.py")
    return table.reindex(columns=["prompt", "answer", "hint", *pictures]).to_dict("records")


def encode(rows, tokenizer, models, template, ids_of=None):
    """Adds the ids that policies read, "plain" and "hinted", and prints those of the first row."""
    configs = [model.config.get_text_config() for model in models]
    longest = [getattr(each, "max_position_embeddings", None) or math.inf for each in configs]
    room = min(longest) - models[0].generation_config.max_new_tokens
    for reads in ("plain", "hinted"):
        known = {}
        for row in rows:
            hint = row["hint"] if reads == "hinted" else ""
            at = f"prompt {row['prompt'][:60]!r}, {reads}"
            with blame(f"{at}: --hint_template, tokenizer or chat template"):
                text = template.format(**row) if hint else row["prompt"]  # no hint: plain
                shown, ids = render(text, tokenizer)
            if ids_of:  # of vision.py
                ids = ids_of(row, reads, shown)
            row[reads] = ids
            require(row["prompt"].strip() in shown, f"{at}: a template loses the prompt")
            require(hint.strip() in shown, f"{at}: --hint_template or chat template loses the hint")
            require(0 < len(ids) <= room, f"{at}: {len(ids)} tokens, --max_new_tokens left {room}")
            require(max(ids) < models[0].vocabulary, f"{at}: a model lacks one of its tokens")
            first = known.setdefault(tuple(ids), text)  # a tokenizer may lose characters
            require(first == text, f"{at}: becomes the same tokens as {first[-60:]!r}")
        print(f"first row, {reads}: {tokenizer.decode(rows[0][reads])!r}")


def render(text, tokenizer) -> tuple[str, list[int]]:
    """A prompt as the policies read it, and its ids, without an end that its tokenizer adds."""
    if tokenizer.chat_template:
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], **options)
        return text, tokenizer(text, add_special_tokens=False).input_ids
    prompt = tokenizer(text, return_special_tokens_mask=True)
    if any(prompt.special_tokens_mask[-1:]):
        prompt.input_ids.pop()
    return text, prompt.input_ids


def load_model(role, config, dtype, auto) -> tuple:
    name = getattr(config, role) or f"{config.out}/{role}"  # the warm start saved it there
    with blame(f"--{role} {name} (a folder: {Path(name).is_dir()}), --device {config.device}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, loading = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model = model.to(config.device).eval()
    missing = sorted(loading["missing_keys"])
    require(not missing, f"--{role} {name}: no weights for {missing[:1]}")
    learns = any(weight.requires_grad for weight in model.parameters())
    require(learns or role == "teacher", f"--{role} {name}: cannot learn; merge its adapter first")
    return tokenizer, model


def load(config, max_new_tokens, auto=transformers.AutoModelForCausalLM) -> tuple:
    """Tokenizer, teacher and student, with one vocabulary, which sample from their own distribution
    and nothing else. The student's weights are always float32."""
    other, teacher = load_model("teacher", config, config.dtype, auto)
    tokenizer, student = load_model("student", config, "float32", auto)
    words = tokenizer.get_vocab()
    differ = sorted(words.items() ^ other.get_vocab().items())  # what only one of the two has
    require(not differ, f"--teacher, --student: their tokenizers differ, first in {differ[:1]}")
    ends = {other.eos_token_id, tokenizer.eos_token_id}
    for model in (teacher, student):
        known = model.generation_config.eos_token_id  # none, one or some
        ends.update(known if isinstance(known, list) else [known])
    require(ends != {None}, "--teacher, --student: neither has an end token")
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
    sampling |= {"eos_token_id": sorted(ends - {None}), "max_new_tokens": max_new_tokens}
    heights = [model.get_input_embeddings().num_embeddings for model in (teacher, student)]
    vocabulary = min(max(words.values()) + 1, *heights)  # ids may have holes
    for model, height in zip((teacher, student), heights, strict=True):
        # A table may have rows beyond the words: they are neither scored nor sampled.
        model.vocabulary = vocabulary
        sampling["suppress_tokens"] = [*range(vocabulary, height)] or None
        model.generation_config = transformers.GenerationConfig(**sampling)
    return tokenizer, teacher.requires_grad_(False), student


@torch.no_grad()
def check_scores(model, rows):
    """Refuses a model that does not sample from what `score` gives, alone and in a batch. Tried on
    the shortest and the longest prompt."""
    steps = min(4, model.generation_config.max_new_tokens)
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "output_logits": True}
    half = model.dtype == torch.bfloat16 or torch.is_autocast_enabled(model.device.type)
    bound = 0.3 if half else 1e-3  # nats; autocast: from TRL
    for reads in ("plain", "hinted"):
        policy = Policy(model, reads)
        ranked = sorted(rows, key=lambda row: len(row[policy.reads]))
        pair = [ranked[0], ranked[-1]]
        sampled, begin = sample(policy, pair, return_dict_in_generate=True, **options)
        completions = sampled.sequences[:, begin:].tolist()
        logits = torch.stack(sampled.logits, 1)[..., : model.vocabulary].flatten(0, 1)  # (2 T, V)
        expected = logits.float().log_softmax(-1)
        for size in (1, 2):  # alone and together
            change = (score(policy, pair, completions, size)[:] - expected).abs()
            error = (expected.exp() * change).sum(-1).mean().item()
            fault = f"not supported: samples and scores differ by {error:.2g} nats; padding? bias?"
            require(error < bound, f"{model.name_or_path}: {fault}")


# --- the experiment
Ready = namedtuple("Ready", "task splits tokenizer teacher student")


def check(config):
    """Refuses flags and recipes that cannot work, before any time is spent."""
    for name, value in vars(config).items():
        least = {"steps": 0, "seed": 0, "lr": 1e-12}.get(name, 1)
        fine = type(value) not in (int, float) or least <= value < math.inf
        require(fine, f"--{name} {value}: must be at least {least}")
    for name in ("hint_template", "answer_regex", "max_new_tokens"):
        fine = config.data or getattr(config, name) == getattr(Config, name)
        require(fine, f"--{name}: only with --data; a task has its own")
    pair = (config.teacher, config.student)
    require(all(pair) or not any(pair), "--teacher, --student: give both, or none")
    require(all(pair) or not config.data, "--data needs --teacher and --student")
    tokens = torch.arange(9) % 5  # a dry run of every term; two completions, 4 and 5 tokens long
    logps = {policy: torch.rand(9, 5).log_softmax(-1) for policy in POLICIES}
    for name in config.recipe:
        require(name not in ("teacher", "student"), f"--recipe {name}: a policy has this name")
        recipe = RECIPES[name]
        with blame(f"--recipe {name}: wrong names, or router_reads too short?"):
            scores = {policy: token_scores(logps[policy], tokens) for policy in recipe.router_reads}
            _, weights = assign(recipe, scores, torch.tensor([4, 5]))
            recipe_loss(recipe, logps["student"], logps, torch.ones_like(weights), config.top_k)
        regimes = {term.regime for term in recipe.terms}
        require(recipe.router or regimes == {Regime.ALL}, f"--recipe {name}: needs a router")


def split(rows) -> dict[str, list]:
    """By the prompt: none is both trained on and tested."""
    splits = {"train": [], "validation": [], "test": []}
    for row in rows:
        rng = random.Random(row.get("split_by", row["prompt"]))  # vision.py: by the picture
        name = rng.choices([*splits], weights=(70, 15, 15))[0]
        splits[name].append(row)
    sizes = {name: len(part) for name, part in splits.items()}
    require(all(sizes.values()), f"too few rows to split in three: {sizes}")
    print("rows:", sizes)
    return splits


def prepare(config, own_data) -> Ready:
    """Rows and policies. Without --teacher, tiny ones learn the task first."""
    if config.data:
        task = own_data(config)
        rows = getattr(task, "read_rows", read_rows)(config)
    else:
        torch.set_num_threads(1)  # tiny models: more would be slower
        task = TASKS[config.task]
        rng = random.Random(0)  # the same prompts for every seed
        rows = [task.problem(rng) for _ in range(12_000)]
    splits = split(rows)
    if not config.teacher:
        held_out = {row["prompt"] for row in splits["validation"] + splits["test"]}
        warm_start("teacher", task, held_out, config)
        warm_start("student", task, held_out, config)
    # vision.py has its own. The splits hold the same dicts.
    tokenizer, *models = getattr(task, "load", load)(config, task.max_new_tokens)
    getattr(task, "encode", encode)(rows, tokenizer, models, task.hint_template)
    if config.data:
        task.check(rows, tokenizer)
    for model in models:
        check_scores(model, rows)
    return Ready(task, splits, tokenizer, *models)


def train(name, ready, log, config):
    """Trains a copy of the student with one recipe."""
    recipe = RECIPES[name]
    student = copy.deepcopy(ready.student)
    anchor = copy.deepcopy(student).requires_grad_(False) if recipe.anchor_decay else student
    models = {"student": student, "anchor": anchor, "teacher": ready.teacher}
    policies = {who: Policy(models[whose], reads) for who, (whose, reads) in POLICIES.items()}
    optimizer = torch.optim.AdamW(student.parameters(), config.lr, weight_decay=0.0)
    rows = ready.splits["train"]
    prompts = cycle(random.Random(config.seed).sample(rows, len(rows)))  # shuffled once
    for step in tqdm(range(config.steps), name, unit="step"):
        torch.manual_seed(config.seed * 10**6 + step)  # seed and step decide every draw
        rows = [*islice(prompts, config.batch_size)]
        cosine = math.cos(math.pi * step / config.steps)
        optimizer.param_groups[0]["lr"] = config.lr * (0.55 + 0.45 * cosine)  # lr to lr / 10
        metrics = distill_step(recipe, policies, optimizer, rows, config)
        if 0 < recipe.anchor_decay < 1:
            for average, weight in zip(anchor.parameters(), student.parameters(), strict=True):
                average.data.lerp_(weight.data, 1 - recipe.anchor_decay)
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            validation = ready.splits["validation"][:256]
            metrics["validation"] = evaluate(policies["student"], validation, ready, config)
            with blame(f"--out {config.out}"):
                student.save_pretrained(f"{config.out}/{name}")
                ready.tokenizer.save_pretrained(f"{config.out}/{name}")
        print(json.dumps({"recipe": name, "step": step + 1} | metrics), file=log)
    return student


@torch.no_grad()
def evaluate(policy, rows, ready, config) -> dict[str, float]:
    """One completion per row: mean grades of the rows that have them, mean entropy (nats)."""
    torch.manual_seed(config.seed)
    completions = rollout(policy, rows, 8 * config.micro_batch)
    grades = []
    for row, ids in zip(rows, completions, strict=True):
        grade = ready.task.grade(row, ready.tokenizer.decode(ids, skip_special_tokens=True))
        grade["ended"] = ids[-1] in policy.model.generation_config.eos_token_id  # by itself
        if "exact match" in grade:
            grade["exact match"] &= grade["ended"]
        grades.append(grade)
    tokens = torch.tensor([*chain(*completions)], device=policy.model.device)
    scores = token_scores(score(policy, rows, completions, config.micro_batch), tokens)
    means = pandas.DataFrame(grades, dtype=float).mean().to_dict()
    return means | {"entropy": scores.entropy.mean().item()}


def run(config, own_data=OwnData) -> Ready:
    """Every recipe from the same student. A line of metrics.jsonl is a step, or a final test."""
    new = not Path(config.out, "config.json").exists()
    require(new, f"--out {config.out}: holds a run; choose another folder")
    ready = prepare(config, own_data)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    Path(config.out, "config.json").write_text(json.dumps(vars(config), indent=1))
    untrained = {"student before": ready.student, "teacher": ready.teacher}
    recipes = dict.fromkeys(config.recipe) if config.steps else ()
    more = {"enabled": config.dtype == "bfloat16", "cache_enabled": False}  # stale after a step
    autocast = torch.autocast(ready.student.device.type, torch.bfloat16, **more)
    rows = ready.splits["test"][: config.test_prompts]
    with autocast, open(f"{config.out}/metrics.jsonl", "w", 1) as log:
        for name in (*untrained, *recipes):
            model = untrained[name] if name in untrained else train(name, ready, log, config)
            for label, reads in ((name, "plain"), (f"{name}, with the hint", "hinted")):
                grades = evaluate(Policy(model, reads), rows, ready, config)
                print(json.dumps({"tested": label, "test": grades}), file=log)
                print(f"{label:32}", {grade: round(value, 2) for grade, value in grades.items()})
    return ready


# --- the command line
def main(argv, own_data=OwnData):
    """`own_data`: the class of the task for --data."""
    if hasattr(sys.stdout, "reconfigure"):  # an odd terminal must not end a run
        sys.stdout.reconfigure(errors="replace")
    transformers.utils.logging.disable_progress_bar()
    parser = transformers.HfArgumentParser(Config, usage="dopd.py [--flags]", allow_abbrev=False)
    config = Config(**vars(parser.parse_args(argv)))
    config.recipe = config.recipe or ["opd", "privileged_opd", "dopd", "dopd_frozen"]
    config.out = config.out or time.strftime("runs/%Y%m%d-%H%M%S")
    try:
        check(config)
        run(config, own_data)
    except (UserError, OSError) as error:
        print(f"dopd.py: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        sys.exit(2)
    print(f"see {config.out}; python tiny_tasks/report.py {config.out} draws it")


if __name__ == "__main__":
    main(sys.argv[1:])
