"""DOPD, Dual On-policy Distillation (arXiv 2606.30626), in one file to be read from top to bottom.

A student samples its own answers, and a stronger teacher grades every token of them. In training both may read a
hint that the deployed student will never see. Token by token DOPD asks whether the student, could it read the hint
too, would agree with the teacher. Where it would, a light touch is enough; where the two differ, the surer one teaches.

    python dopd.py                                     # the CPU experiment: minutes, then look into runs/
    python dopd.py --task simplify --recipe vanilla dopd --seeds 0 1 2
    python dopd.py --resume runs/rules-steps           # go on after an interruption
    python dopd.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --data my.jsonl --device cuda --dtype bfloat16

Shapes: B completions of T tokens, padded on the right; V words in the vocabulary; N completion tokens laid end to
end, without padding. Logarithms are natural, so every divergence, entropy and gap is in nats.
"""

import copy
import glob
import hashlib
import html
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import datasets
import matplotlib
import pandas
import torch
import torch.distributed as dist
from matplotlib import pyplot
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig,
                          HfArgumentParser, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)
from transformers.utils import logging as transformers_logging

matplotlib.use("Agg")                 # draws into files, needs no screen


class InputError(Exception):
    """What the user gave cannot be used. One line: the file, the row or the flag, and the mend. Exit code 2."""


# ------------------------------------------------------------------------------------------------------ 1. config

HintForm = Literal["answer", "execution", "steps", "summary", "none"]                                    # table 4


def flag(default, help: str):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every flag of the command line. The defaults are the CPU experiment."""

    task: str = flag("rules", "synthetic task of the tiny policies")
    hint: HintForm = flag("steps", "what the hint gives away: the end, all, what to do at each step, a sum, nothing")
    recipe: list[str] = flag(["vanilla", "privileged_teacher", "privileged_student", "dopd"],
                             "one or more recipes, each trained from the same student")
    seeds: list[int] = flag([0], "one or more seeds; each has its own warm start, rollouts and order of the data")

    steps: int = flag(160, "optimizer steps of distillation; paper: 200")
    batch_size: int = flag(64, "prompts per optimizer step; paper: 128")
    rollouts: int = flag(4, "completions sampled per prompt; paper: 4")
    micro_batch: int = flag(0, "completions per forward pass, 0 for all: bounds the memory; same method, other "
                              "random draws")
    lr: float = flag(1e-4, "peak learning rate, cosine to a tenth; paper: 5e-6")
    top_k: int = flag(4, "tokens in the top-K support, besides the tail bucket; paper: 128")
    beta_light: float = flag(0.6, "weight of light supervision, regimes LH and HS; paper: 0.6")
    beta_weak: float = flag(0.3, "weight of weak supervision, regime LL; paper: 0.3")
    privileged_student: Literal["live", "frozen", "ema"] = flag(
        "live", "whose weights read the hint: the student's (paper), its first ones, or their moving average")
    ema_decay: float = flag(0.98, "decay per step of that moving average")

    teacher: str = flag("", "Hugging Face causal LM, name or folder; empty: the tiny teacher of the task")
    student: str = flag("", "Hugging Face causal LM, name or folder; empty: the tiny student of the task")
    data: str = flag("", "JSONL file (split 8:1:1), or folder of train, validation, test and ood.jsonl; rows of "
                         "prompt, answer, and hint or hints; empty: the task's own")
    hint_template: str = flag("", "how {hint} joins {prompt} in what a privileged policy reads; empty: hint|prompt "
                                  "for the tiny policies, a line below the prompt for real ones")
    answer_regex: str = flag("", "real models: the answer is group 1 of the last match in the completion; empty: "
                                 "the whole completion")
    max_new_tokens: int = flag(0, "longest completion in tokens; 0: that of the references, 512 for real models")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: Literal["float32", "bfloat16", "float64"] = flag(
        "float32", "of the computation; with bfloat16 the student's own weights stay float32")
    gradient_checkpointing: bool = flag(False, "compute the student's activations twice instead of storing them")

    eval_every: int = flag(20, "steps between evaluations on the validation split, each with a checkpoint")
    eval_prompts: int = flag(512, "prompts per evaluation, 4 completions each")
    eval_only: bool = flag(False, "train nothing: test the two policies with and without the hint; a --data file is "
                                  "all test split then, and --student may come alone")
    out: str = flag("", "folder of the run; empty: a new runs/<task>-<hint>")
    resume: str = flag("", "go on with the run in this folder, with the flags it was started with; only "
                         "--micro_batch may differ")
    write_tasks: bool = flag(False, "write tiny_tasks/ again, byte for byte, and stop")

    def __post_init__(self):
        validate(self)                     # at the end of this file


# ------------------------------------------------------------------------------------------------------- 2. tasks
#
# A row is {"prompt": str, "hints": {form: text}, "answer": str}. A task makes rows; lets an author with gaps and slips
# write a solution, from which the tiny policies learn before any distillation; checks a completion; and says what each
# of its tokens asks for: the ground truth about capability and information that no real dataset has.

EOS = "<eos>"


@dataclass(frozen=True)
class Author:
    """A writer of warm-start solutions, and the size of the tiny model that learns to write like it."""
    width: int
    layers: int
    steps: int             # of the warm start, 256 solutions each
    hinted: float          # share of the solutions that are written with the hint
    knows: int = 10        # `rules`: how many of the ten stable names need no hint
    slips: float = 0.0     # share of the results past 9 that come out one too high
    doubts: float = 0.0    # share of the hints that come from another problem: the reader learns to doubt all hints


class Grade(NamedTuple):
    """What one completion token asked for, and whether it was right."""
    kind: str              # recall, execute, unlearnable, choice, copy, stop, other
    correct: bool
    law: dict = {}         # where the prompt leaves the token open: the true probability of each next token


def wrap(total: int, slips: float, rng: random.Random | None) -> int:
    """The last digit of a result; where it wraps past 9, the author may write one too many."""
    if total > 9 and slips and rng.random() < slips:
        total += 1
    return total % 10


@dataclass(frozen=True)
class Rules:
    """`7fbk=` -> `967314`: from 7, apply the rules named f, b and k; for each write its digit, then the new value.

    A name stands for "add this digit, modulo 10". Ten stable names always mean the same: the hint gives them away,
    and they can be learned. Three wild names draw their digit anew in every problem: nobody can learn that.
    """
    length: int = 3
    wild_share: float = 0.2
    teacher: Author = Author(width=128, layers=3, steps=400, hinted=0.5, knows=7)
    student: Author = Author(width=128, layers=2, steps=300, hinted=0.3, knows=4, slips=0.6)

    STABLE = dict(zip("abcdefghij", (3, 7, 1, 8, 5, 9, 2, 6, 4, 0)))
    WILD = {"k": {1: 0.4, 4: 0.3, 6: 0.2, 9: 0.1}, "l": {8: 0.4, 2: 0.3, 5: 0.2, 3: 0.1},
            "m": {0: 0.4, 7: 0.3, 3: 0.2, 6: 0.1}}

    def problem(self, rng: random.Random) -> dict:
        start = rng.randrange(10)
        wild = [rng.random() < self.wild_share for _ in range(self.length)]
        names = [rng.choice("klm" if is_wild else "abcdefghij") for is_wild in wild]
        rules = [self.recall(name, self.STABLE, rng) for name in names]
        return {"prompt": f"{start}{''.join(names)}=", "hints": self.hints(start, rules),
                "answer": self.chain(start, rules)}

    def hints(self, start: int, rules: list[int]) -> dict[str, str]:
        return {"answer": self.chain(start, rules)[-1], "execution": self.chain(start, rules),
                "steps": "".join(map(str, rules)), "summary": f"{sum(rules):02d}", "none": ""}

    def recall(self, name, known, rng):
        """The rule of a name: known, or guessed, a wild one by its law and a stable one uniformly."""
        if name in known:
            return known[name]
        law = self.WILD.get(name, dict.fromkeys(range(10), 1))
        return rng.choices(list(law), law.values())[0]

    def chain(self, value, rules, slips=0.0, rng=None):
        text = ""
        for rule in rules:
            value = wrap(value + rule, slips, rng)
            text += f"{rule}{value}"
        return text

    def solution(self, row: dict, form: str, author: Author, rng: random.Random) -> str:
        """What the author writes after the prompt and the hint in this form (`none`: the prompt alone)."""
        start, names = int(row["prompt"][0]), row["prompt"][1:-1]
        if form == "execution":
            return row["answer"]
        if form == "steps":
            return self.chain(start, [int(digit) for digit in row["answer"][::2]], author.slips, rng)
        known = {name: self.STABLE[name] for name in "abcdefghij"[:author.knows]}
        while True:                        # guesses have to agree with a hint that only says how it ends
            rules = [self.recall(name, known, rng) for name in names]
            if self.hints(start, rules)[form] == row["hints"][form]:
                return self.chain(start, rules, author.slips, rng)

    def check(self, row: dict, completion: str) -> bool:
        return completion == row["answer"]

    def grade(self, row: dict, tokens: list[str]) -> list[Grade]:
        grades, written = [], [row["prompt"][0], *tokens]
        for i, token in enumerate(tokens):
            if i >= len(row["answer"]):
                grades.append(Grade("stop", i == len(row["answer"]) and token == EOS))
            elif i % 2:                    # the value before plus the rule just written, be that rule right or wrong
                terms = "".join(written[i - 1:i + 1])
                grades.append(Grade("execute", terms.isdigit() and token == str(sum(map(int, terms)) % 10)))
            else:
                law = {str(digit): share for digit, share in self.WILD.get(row["prompt"][1 + i // 2], {}).items()}
                grades.append(Grade("unlearnable" if law else "recall", token == row["answer"][i], law))
        return grades


@dataclass(frozen=True)
class Simplify:
    """`3+5*2+4=` -> `3+0+4=3+4=7`: one reduction at a time, modulo 10, `*` before `+`, in any valid order.

    The hint says which of the valid orders the reference took: that cannot be known, and any other is as good.
    """
    length: int = 3
    teacher: Author = Author(width=96, layers=3, steps=400, hinted=0.5)
    student: Author = Author(width=128, layers=2, steps=300, hinted=0.3, slips=0.5)

    def problem(self, rng: random.Random) -> dict:
        expression = rng.choice("0123456789")
        for _ in range(self.length):
            expression += rng.choice("+*") + rng.choice("0123456789")
        prompt, order, lines, total = expression + "=", "", [], 0
        while len(expression) > 1:
            operator = rng.choice(self.reducible(expression))
            expression = self.reduce(expression, operator)
            order += str(operator)
            lines.append(expression)
            total += int(expression[2 * operator])
        answer = "=".join(lines)
        return {"prompt": prompt, "hints": {"answer": expression, "execution": answer, "steps": order,
                                            "summary": f"{total:02d}", "none": ""}, "answer": answer}

    def reducible(self, expression: str) -> list[int]:
        operators = expression[1::2]
        return [i for i, sign in enumerate(operators) if sign == "*" or "*" not in operators]

    def reduce(self, expression, operator, slips=0.0, rng=None):
        left, sign, right = expression[2 * operator:2 * operator + 3]
        total = int(left) * int(right) if sign == "*" else int(left) + int(right)
        return expression[:2 * operator] + str(wrap(total, slips, rng)) + expression[2 * operator + 3:]

    def solution(self, row: dict, form: str, author: Author, rng: random.Random) -> str:
        """What the author writes after the prompt and the hint in this form (`none`: the prompt alone)."""
        if form == "execution":
            return row["answer"]
        expression, lines = row["prompt"][:-1], []
        for step in row["hints"]["steps"]:
            operator = int(step) if form == "steps" else rng.choice(self.reducible(expression))
            expression = self.reduce(expression, operator, author.slips, rng)
            lines.append(expression)
        return "=".join(lines)

    def check(self, row: dict, completion: str) -> bool:
        return completion.split("=")[-1] == row["answer"].split("=")[-1]

    def grade(self, row: dict, tokens: list[str]) -> list[Grade]:
        grades, expression, line = [], row["prompt"][:-1], ""
        for token in tokens:
            law, is_result = self.continuations(expression, line)
            kind = "choice" if len(law) > 1 else "execute" if is_result else "stop" if EOS in law else "copy"
            grades.append(Grade(kind if law else "other", token in law, law if kind == "choice" else {}))
            if token == "=":               # from here on what was written counts, be it right or wrong
                well_formed = len(line) % 2 and line[::2].isdigit() and set(line[1::2]) <= set("+*")
                expression, line = line if well_formed else "", ""
            else:
                line += token
        return grades

    def continuations(self, expression: str, line: str) -> tuple[dict[str, float], bool]:
        """The tokens that continue `line` to a valid reduction, with their shares, and whether one is a result.

        A wrong result earlier in the line is forgiven, what follows it is judged on its own; but not where the line
        begins a valid reduction as it stands: in 1+2+3 a 1 is the choice of 2+3, not a wrong 1+2.
        """
        exact, forgiven, i = [], [], len(line)             # (next token, whether it is a result)
        for operator in self.reducible(expression):
            target = list(self.reduce(expression, operator))
            target.append("=" if len(target) > 1 else EOS)
            differs = [j for j in range(i) if target[j:j + 1] != [line[j]]]
            if i < len(target) and set(differs) <= {2 * operator}:
                (forgiven if differs else exact).append((target[i], i == 2 * operator))
        fitting = exact or forgiven
        counts = Counter(token for token, _ in fitting)
        return {token: count / len(fitting) for token, count in counts.items()}, any(result for _, result in fitting)


@dataclass(frozen=True)
class Text:
    """Rows of a file, for real models: the completion, or the part a regular expression finds, is the answer."""
    answer_regex: str = ""

    def check(self, row: dict, completion: str) -> bool:
        if self.answer_regex:
            completion = (re.findall(self.answer_regex, completion) or [""])[-1]
        return completion.strip() == row["answer"].strip()

    def grade(self, row: dict, tokens: list[str]) -> list[Grade]:
        return []                          # nobody knows what a real token asks for


TASKS = {"rules": Rules(), "simplify": Simplify()}


# ---------------------------------------------------------------------------------------------------- 3. policies
#
# A policy is a model and what it reads: the prompt (student, teacher), or the prompt and the hint (privileged student,
# privileged teacher). All four score the same completion tokens.

class Policy(NamedTuple):
    model: torch.nn.Module
    reads_hint: bool


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, the same for all tasks."""
    symbols = ["<pad>", EOS, "<unk>", *"0123456789abcdefghijklm+*=|"]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=EOS, unk_token="<unk>")


TINY_CONTEXT = 128                   # tokens


def tiny_model(author: Author, tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3, the paper's architecture, of a few hundred thousand parameters."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=author.width, intermediate_size=3 * author.width,
        num_hidden_layers=author.layers, num_attention_heads=4, num_key_value_heads=4, head_dim=author.width // 4,
        max_position_embeddings=TINY_CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


class TokenLogProbs:
    """Log-probs (N, V) of one policy, formed only where asked for: `logp[index]` is a tensor (n, V), float32 or more.

    What it keeps are the last hidden states (N, H): at a real vocabulary some seventy times smaller.
    """

    def __init__(self, hidden: torch.Tensor, head: torch.nn.Module, vocabulary: int):
        self.hidden, self.head, self.shape = hidden, head, (len(hidden), vocabulary)

    def __getitem__(self, index) -> torch.Tensor:
        logits = self.head(self.hidden[index])[..., :self.shape[1]]       # an embedding table may be padded
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def score(model, prompts: list[list[int]], tokens: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> TokenLogProbs:
    """Log-probs of the completion tokens (B, T) where mask (B, T), each after its prompt: N = mask.sum() rows.

    Completions of the same prompt share it: all but its last token is read once, into a cache of keys and values.
    """
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    of_row = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=tokens.device)        # (B,)
    ids, real = pad(list(place), "left", tokens.device)                   # (D, P): D distinct prompts
    inputs = torch.cat([ids[of_row], tokens[:, :-1]], 1)                  # (B, P+T-1): the last token predicts nothing
    attention = torch.cat([real[of_row], torch.ones_like(mask[:, :-1])], 1)        # causal: none looks beyond its EOS
    alone = model.training or len(place) == len(prompts)                  # transformers checkpoints without a cache
    shared = 0 if alone else ids.shape[1] - 1
    cache = DynamicCache(config=model.config) if shared else None
    if shared:
        hidden_states(model, ids[:, :shared], real[:, :shared], cache)
        cache.batch_select_indices(of_row)
    hidden = hidden_states(model, inputs[:, shared:], attention, cache)[:, -tokens.shape[1]:]        # (B, T, H)
    return TokenLogProbs(hidden[mask], model.get_output_embeddings(), vocabulary)


def hidden_states(model, ids: torch.Tensor, attention: torch.Tensor, cache: DynamicCache | None) -> torch.Tensor:
    """Last hidden states (B, L, H) of ids (B, L); attention also covers what is in the cache."""
    positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
    return model.base_model(input_ids=ids, attention_mask=None if attention.all() else attention, cache=cache,
                            position_ids=positions, use_cache=cache is not None).last_hidden_state


def pad(sequences: list, side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) and where they are real, by length: the pad token may well be the EOS token."""
    ids = [torch.tensor(sequence) for sequence in sequences]
    real = [torch.ones_like(sequence, dtype=torch.bool) for sequence in ids]
    return pad_sequence(ids, True, 0, side).to(device), pad_sequence(real, True, False, side).to(device)


# ----------------------------------------------------------------------------------------------------- 4. rollout

@torch.no_grad()
def rollout(model, prompts: list[list[int]], max_new_tokens: int, eos_ids: list[int],
            vocabulary: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One completion per prompt from the model's own distribution: temperature 1, no top-k, no top-p.

    Returns tokens (B, T), and mask (B, T): True up to and including the first EOS. A completion without one was cut at
    max_new_tokens; none is invented. Nothing of the checkpoint's generation config has a say.
    """
    ids, real = pad(prompts, "left", model.device)
    height = model.get_input_embeddings().num_embeddings
    own, model.generation_config = model.generation_config, GenerationConfig()     # `generate` fills gaps from it
    try:
        sequences = model.generate(input_ids=ids, attention_mask=real.long(), generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens, eos_token_id=eos_ids,
            pad_token_id=eos_ids[0], suppress_tokens=list(range(vocabulary or height, height)) or None))
    finally:
        model.generation_config = own
    tokens = sequences[:, ids.shape[1]:]                                  # (B, T)
    stops = torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device)).int()
    return tokens, stops.cumsum(1) - stops == 0                           # no EOS strictly before


# ------------------------------------------------------------------------------------------------- 5. divergences
#
# Each takes log-probs (..., V) of the student and of a source, and gives (...), in nats.

def forward_kl(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """KL(source || student): what the source finds likely, the student must not find unlikely."""
    return (source.exp() * (source - student)).sum(-1)


def reverse_kl(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """KL(student || source): what the source finds unlikely, the student must not find likely."""
    return (student.exp() * (student - source)).sum(-1)


def js_divergence(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon: the mean of KL(source || m) and KL(student || m), m their even mixture. At most ln 2."""
    mixture = torch.logaddexp(student, source) - math.log(2)
    return 0.5 * (forward_kl(mixture, source) + forward_kl(mixture, student))


def top_k_with_tail(student: torch.Tensor, source: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both log-probs (..., V) on the student's k likeliest tokens and one bucket for all others: two (..., k+1).

    Whose top-K, and what of the rest, the paper leaves open. Without the bucket the mass outside costs nothing.
    """
    kept = student.topk(min(k, student.shape[-1]), -1).indices            # (..., k)

    def bucket(logp):
        others = logp.scatter(-1, kept, torch.finfo(logp.dtype).min)      # not -inf: where none is left, 0 log 0 = 0
        return torch.cat([logp.gather(-1, kept), others.logsumexp(-1, keepdim=True)], -1)

    return bucket(student), bucket(source)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": js_divergence}

# With one sampled token only: dD / d(probability of the token), up to a constant. Averaged over the student's samples,
# this times the gradient of the token's log-prob is the gradient of the divergence D.
SAMPLED_SCORES = {
    "forward_kl": lambda student, source: -(source - student).exp(),
    "reverse_kl": lambda student, source: student - source,
    "js": lambda student, source: 0.5 * (student - torch.logaddexp(student, source)),
}


# ------------------------------------------------------------------------------------------------------ 6. router

class Regime(IntEnum):
    """First letter: the gap, Low or High. Second: both sure (H) or not (L), as q_T + q_S is at least its average over
    the batch or below it; where the gap is high, who is surer, Teacher or Student."""
    LH = 0      # low gap, both sure: a light touch of the privileged teacher
    LL = 1      # low gap, both unsure: a weak pull towards the privileged student
    HT = 2      # high gap, the teacher surer of the token: capability; the privileged teacher in full
    HS = 3      # high gap, the student surer of the token: light, and towards the privileged student


def advantage_gap(teacher_logp: torch.Tensor, student_logp: torch.Tensor) -> torch.Tensor:
    """Eq. 1: how far the two privileged policies differ on the sampled tokens, |log q_T - log q_S|, in nats."""
    return (teacher_logp - student_logp).abs()


def route(teacher_logp: torch.Tensor, student_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The regime of every sampled token, -1 where mask is False; all three are (B, T), or (N,).

    Both log-probs are of the same sampled tokens under the same hint: privileged teacher and privileged student. The
    thresholds are averages over the tokens given, so it has to be given the whole optimizer batch. A gap normalised by
    any increasing affine map would give the same: only A < A_bar counts.
    """
    gap, q_teacher, q_student = advantage_gap(teacher_logp, student_logp), teacher_logp.exp(), student_logp.exp()
    regimes = torch.full(mask.shape, -1, device=mask.device)
    if not mask.any():
        return regimes
    typical = mask & (gap <= gap[mask].quantile(0.95))                    # the top 5% stay out of the averages
    high = gap >= gap[typical].mean()
    both = q_teacher + q_student
    sure = both >= both[typical].mean()
    regimes[mask & ~high & sure] = Regime.LH
    regimes[mask & ~high & ~sure] = Regime.LL
    regimes[mask & high & (q_teacher >= q_student)] = Regime.HT
    regimes[mask & high & (q_teacher < q_student)] = Regime.HS
    return regimes


# ----------------------------------------------------------------------------------------------------- 7. recipes

class Everywhere(IntEnum):
    ALL = 0     # of a recipe without a router


SOURCES = ("teacher", "privileged_teacher", "student", "privileged_student")
SUPPORTS = ("full", "top_k", "sampled")
BETAS = ("beta_light", "beta_weak")


class Row(NamedTuple):
    """How the tokens of one regime are supervised."""
    source: str                      # one of SOURCES
    objective: str                   # a key of DIVERGENCES
    support: str                     # one of SUPPORTS
    weight: float | str | Callable   # a number, one of BETAS, or a function {policy: Scores} -> (N,)


class Scores(NamedTuple):
    """What a router sees of one policy, for the N completion tokens of the optimizer batch, laid end to end."""
    logp: torch.Tensor               # (N,) of the sampled tokens
    entropy: torch.Tensor            # (N,)
    position: torch.Tensor           # (N,) of the token in its completion, from 0


def by_advantage_gap(scores: dict[str, Scores]) -> torch.Tensor:
    teacher, student = scores["privileged_teacher"].logp, scores["privileged_student"].logp
    return route(teacher, student, torch.ones_like(teacher, dtype=torch.bool))


@dataclass(frozen=True)
class Recipe:
    """A method: a table of rows, and a router that deals the tokens out to them. A regime without a row goes untrained.

    Raises ValueError for a name that it does not know.
    """
    rows: dict[IntEnum, Row]
    router: Callable | None = by_advantage_gap                            # {policy: Scores} -> regimes (N,)
    router_reads: tuple = ("privileged_teacher", "privileged_student")    # whose Scores it and the weights get

    def __post_init__(self):
        for regime, row in self.rows.items():
            for name, known in (("source", SOURCES), ("objective", DIVERGENCES), ("support", SUPPORTS)):
                if getattr(row, name) not in known:
                    raise ValueError(f"row {regime.name}: {name} {getattr(row, name)!r} is none of {', '.join(known)}")
            if isinstance(row.weight, str) and row.weight not in BETAS:
                raise ValueError(f"row {regime.name}: weight {row.weight!r} is none of {', '.join(BETAS)}")
        if not set(self.router_reads) <= set(SOURCES):
            raise ValueError(f"router_reads {self.router_reads}: only {', '.join(SOURCES)}")
        if self.router is None and set(self.rows) != {Everywhere.ALL}:
            raise ValueError("without a router all tokens are of one regime, Everywhere.ALL")

    @property
    def policies(self) -> list[str]:
        """All who are asked about every token."""
        return sorted({row.source for row in self.rows.values()} | set(self.router_reads))


def uniform(*row) -> Recipe:
    """One row for all tokens: nothing to route."""
    return Recipe({Everywhere.ALL: Row(*row)}, router=None, router_reads=())


class Prefix(IntEnum):
    AGREES = 0         # what is written so far may well have been written with this hint
    DISAGREES = 1


def by_evidence(scores: dict[str, Scores]) -> torch.Tensor:
    """Ours, not the paper's: does the completion up to a token still agree with the hint?

    The teacher itself can tell: the log Bayes factor of the hint, the sum over the tokens before of
    log q_T(y | x, p, ...) - log q_T(y | x, ...). A student that cannot see the hint often contradicts it; from there
    on a teacher that insists on it answers a question that is no longer asked.
    """
    hinted, plain = scores["privileged_teacher"], scores["teacher"]
    gain = (hinted.logp - plain.logp).double()                            # (N,)
    before = gain.cumsum(0) - gain                                        # of all tokens before, other completions too
    start = torch.arange(len(gain), device=gain.device) - hinted.position
    return torch.where(before - before[start] >= -2.0, Prefix.AGREES, Prefix.DISAGREES)        # odds of e^2 against it


RECIPES = {
    "dopd": Recipe({                       # source              objective     support  weight
        Regime.LH: Row("privileged_teacher", "reverse_kl", "top_k", "beta_light"),
        Regime.LL: Row("privileged_student", "reverse_kl", "top_k", "beta_weak"),
        Regime.HT: Row("privileged_teacher", "js", "full", 1.0),
        Regime.HS: Row("privileged_student", "reverse_kl", "top_k", "beta_light"),
    }),
    "vanilla": uniform("teacher", "reverse_kl", "full", 1.0),
    "privileged_teacher": uniform("privileged_teacher", "reverse_kl", "full", 1.0),
    "privileged_student": uniform("privileged_student", "reverse_kl", "full", 1.0),     # self distillation
    "evidence": Recipe({                   # ours
        Prefix.AGREES: Row("privileged_teacher", "reverse_kl", "full", 1.0),
        Prefix.DISAGREES: Row("teacher", "reverse_kl", "full", 1.0),
    }, by_evidence, router_reads=("privileged_teacher", "teacher")),
}


# -------------------------------------------------------------------------------------------------------- 8. loss
#
# From here on log-probs are (N, V): a tensor, or a TokenLogProbs that forms the rows it is asked for.

VALUES_AT_ONCE = 2**25               # of a vocabulary-wide tensor: bounds the memory, whatever V is


def chunks(index: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, ...]:
    return index.split(max(1, VALUES_AT_ONCE // vocabulary)) if len(index) else ()


@torch.no_grad()
def scores_of(logp, tokens: torch.Tensor, mask: torch.Tensor) -> Scores:
    """The scores of the completion tokens (B, T) where mask (B, T), from their log-probs (N, V)."""
    tokens, position = tokens[mask], (mask.cumsum(1) - 1)[mask]           # (N,)
    of_tokens, entropies = torch.empty(2, len(tokens), device=tokens.device)
    for index in chunks(torch.arange(len(tokens), device=tokens.device), logp.shape[1]):
        rows = logp[index]                                                # (n, V)
        of_tokens[index] = rows.gather(1, tokens[index, None])[:, 0].to(of_tokens.dtype)
        entropies[index] = -(rows.exp() * rows).sum(-1).to(of_tokens.dtype)
    return Scores(of_tokens, entropies, position)


def deal(recipe: Recipe, scores: dict[str, Scores], betas: dict[str, float], tokens: torch.Tensor):
    """The regime and the weight (N,) of every token (N,): all that depends on the batch as a whole."""
    regimes = recipe.router(scores) if recipe.router else torch.zeros_like(tokens)
    weights = torch.zeros(tokens.shape, device=tokens.device)
    for regime, row in recipe.rows.items():
        weight = row.weight(scores) if callable(row.weight) else betas.get(row.weight, row.weight)
        weights = torch.where(regimes == regime, weight, weights)
    return regimes, weights


def token_losses(row: Row, student: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor,
                 top_k: int) -> torch.Tensor:
    """One row of a recipe for n of its tokens: log-probs (n, V), tokens (n,) -> (n,), before the weight."""
    if row.support == "sampled":           # a surrogate: its gradient counts, its value is no divergence
        student, source = (logp.gather(1, tokens[:, None])[:, 0] for logp in (student, source))
        return SAMPLED_SCORES[row.objective](student, source).detach() * student
    if row.support == "top_k":
        student, source = top_k_with_tail(student, source, top_k)
    return DIVERGENCES[row.objective](student, source)


def recipe_loss(recipe: Recipe, student, sources: dict, tokens: torch.Tensor, regimes: torch.Tensor,
                weights: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over N tokens of weight x loss, and the losses alone, detached (N,). Only `student` gets a gradient."""
    losses, total = torch.zeros_like(weights), weights.new_zeros(())
    for regime, row in recipe.rows.items():
        for index in chunks((regimes == regime).nonzero()[:, 0], student.shape[1]):
            def losses_here(row=row, index=index):
                with torch.no_grad():
                    source = sources[row.source][index]                   # (n, V)
                return token_losses(row, student[index], source, tokens[index], top_k)

            loss = checkpoint(losses_here, use_reentrant=False)           # nothing (n, V) waits for the backward pass
            losses[index] = loss.detach().to(losses.dtype)
            total = total + (weights[index] * loss).sum()
    return total, losses


def sequence_mean(mask: torch.Tensor) -> torch.Tensor:
    """The share (N,) of each token of mask (B, T) in a mean over its completion (1/|y|), then over completions."""
    return (mask / mask.sum(1, keepdim=True).clamp(min=1))[mask] / len(mask)


def distillation_loss(recipe: Recipe, student: torch.Tensor, sources: dict[str, torch.Tensor], tokens: torch.Tensor,
                      mask: torch.Tensor, *, top_k: int, beta_light: float = Config.beta_light,
                      beta_weak: float = Config.beta_weak) -> torch.Tensor:
    """Any recipe in one call: log-probs (B, T, V) of the student and of {policy: ...}, all that are in recipe.policies;
    tokens, mask (B, T) -> scalar."""
    sources = {name: logp[mask].detach() for name, logp in sources.items()}                  # (N, V)
    scores = {name: scores_of(sources[name], tokens, mask) for name in recipe.router_reads}
    regimes, weights = deal(recipe, scores, {"beta_light": beta_light, "beta_weak": beta_weak}, tokens[mask])
    return recipe_loss(recipe, student[mask], sources, tokens[mask], regimes, weights * sequence_mean(mask), top_k)[0]


def dopd_loss(student: torch.Tensor, privileged_teacher: torch.Tensor, privileged_student: torch.Tensor,
              tokens: torch.Tensor, mask: torch.Tensor, *, top_k: int, beta_light: float = Config.beta_light,
              beta_weak: float = Config.beta_weak) -> torch.Tensor:
    """The loss of DOPD, to carry elsewhere: log-probs (B, T, V), tokens (B, T), mask (B, T) bool -> scalar, in nats."""
    sources = {"privileged_teacher": privileged_teacher, "privileged_student": privileged_student}
    return distillation_loss(RECIPES["dopd"], student, sources, tokens, mask,
                             top_k=top_k, beta_light=beta_light, beta_weak=beta_weak)


# ---------------------------------------------------------------------------------------------------- 9. training

class Setup(NamedTuple):
    """What all trainings of one seed share."""
    config: Config
    task: Rules | Simplify | Text
    tokenizer: PreTrainedTokenizerFast
    splits: dict[str, list[dict]]          # rows, with their token ids
    vocabulary: int                        # words that teacher and student share
    eos_ids: list[int]

    def rollout(self, policy: Policy, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        return rollout(policy.model, prompts_of(policy, rows), rows[0]["max_new_tokens"], self.eos_ids, self.vocabulary)

    def score(self, policy: Policy, rows: list[dict], tokens: torch.Tensor, mask: torch.Tensor) -> TokenLogProbs:
        return score(policy.model, prompts_of(policy, rows), tokens, mask, self.vocabulary)

    def micro_batches(self, rows: list[dict]) -> list[list[dict]]:
        size = self.config.micro_batch or 1024
        return [rows[start:start + size] for start in range(0, len(rows), size)]


def prompts_of(policy: Policy, rows: list[dict]) -> list[list[int]]:
    """All in which the contexts of the four policies differ; the completion tokens are the same."""
    return [row["hinted_ids" if policy.reads_hint else "prompt_ids"] for row in rows]


def policies_of(student, reader, teacher) -> dict[str, Policy]:
    """All that a recipe may name as a source; `reader` is who reads the hint in the student's place."""
    return {"student": Policy(student, False), "privileged_student": Policy(reader, True),
            "teacher": Policy(teacher, False), "privileged_teacher": Policy(teacher, True)}


class Trainee:
    """The student, its AdamW, and the copy of it that reads the hint (the student itself if that is live)."""

    def __init__(self, student, teacher, config: Config):
        self.student, live = student, config.privileged_student == "live"
        self.adamw = torch.optim.AdamW(student.parameters(), config.lr, weight_decay=0.0)
        self.decay = config.ema_decay if config.privileged_student == "ema" else 1.0
        self.reader = student if live else copy.deepcopy(student).requires_grad_(False)
        self.policies = policies_of(student, self.reader, teacher)

    def clip(self) -> float:
        """Sums the gradient over the processes and clips it to norm 1; returns the norm it had."""
        if dist.is_initialized():
            for weight in self.student.parameters():
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)
        return torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0).item()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        if self.decay < 1:
            for average, weight in zip(self.reader.parameters(), self.student.parameters()):
                average.lerp_(weight, 1 - self.decay)

    def save(self, folder: Path, step: int, tokenizer) -> None:
        """A folder that plain transformers can load, and beside the model what training needs to go on."""
        with new_folder(folder / f"step-{step}") as fresh:
            save_model(self.student, tokenizer, fresh)
            torch.save({"adamw": self.adamw.state_dict(), "student": self.student.state_dict(),
                        "reader": self.reader.state_dict()}, fresh / "training.pt")     # shared weights are stored once
        drop_checkpoints(folder, but=step)

    def load(self, folder: Path) -> int:
        """Back to the newest checkpoint; returns its step, 0 where there is none."""
        done = max((int(path.name[len("step-"):]) for path in folder.glob("step-*[0-9]")), default=0)
        if done:
            file = folder / f"step-{done}" / "training.pt"
            with explained(f"{file}: damaged", f"; delete {file.parent} to train from the start"):
                saved = torch.load(file, map_location=self.student.device, weights_only=True)
                self.adamw.load_state_dict(saved["adamw"])
                self.student.load_state_dict(saved["student"])
                self.reader.load_state_dict(saved["reader"])
        return done


def drop_checkpoints(folder: Path, but: int = 0) -> None:
    for older in folder.glob("step-*"):
        if older.name != f"step-{but}":
            shutil.rmtree(older)


def save_model(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cosine(step: int, steps: int, floor: float = 0.0) -> float:
    """From 1 at step 0 down to `floor` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_seed(*place) -> None:
    """Every random choice follows from its place in the run, so that going on needs no state of a generator."""
    torch.manual_seed(random.Random(repr(place)).getrandbits(60))


def everyone(values: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """The values (n,) of all processes end to end, and where among them this process has its own."""
    if not dist.is_initialized():
        return values, slice(0, len(values))
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, values.cpu())
    start = sum(map(len, of_all[:dist.get_rank()]))
    return torch.cat(of_all).to(values.device), slice(start, start + len(values))


def sample(setup: Setup, student: Policy, rows: list[dict], place: tuple) -> list[tuple]:
    """This process's share of the completions for these rows, as micro-batches: rows, tokens (B, T), mask (B, T)."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    size = min(setup.config.micro_batch or len(rows), math.ceil(len(rows) / processes))
    starts, parts = range(0, len(rows), size), []
    for start in starts[len(starts) * rank // processes:len(starts) * (rank + 1) // processes]:
        set_seed("rollout", *place, start)
        part = rows[start:start + size]
        parts.append((part, *setup.rollout(student, part)))
    return parts


def distill_step(setup: Setup, recipe: Recipe, trainee: Trainee, rows: list[dict], lr: float, place: tuple) -> dict:
    """One optimizer step on these rows, in the paper's order: sample, score, route, learn. Returns its metrics."""
    config, policies = setup.config, trainee.policies

    # 1. The student samples its own completions.
    rows = [row for row in rows for _ in range(config.rollouts)]          # of all processes
    parts = sample(setup, policies["student"], rows, place)
    tokens = torch.cat([tokens[mask] for _, tokens, mask in parts])       # (N,) of this process
    all_tokens, own = everyone(tokens)

    # 2. Others score the same tokens, without gradient: all micro-batches, before any of them is trained on.
    scores = {}
    with torch.no_grad():
        sources = {name: [setup.score(policies[name], *part) for part in parts] for name in recipe.policies}
        for name in recipe.router_reads:
            of_parts = [scores_of(logp, *part[1:]) for logp, part in zip(sources[name], parts)]
            scores[name] = Scores(*(everyone(torch.cat(values))[0] for values in zip(*of_parts)))

    # 3. Averages over the whole batch decide where each token goes.
    betas = {"beta_light": config.beta_light, "beta_weak": config.beta_weak}
    all_regimes, all_weights = deal(recipe, scores, betas, all_tokens)
    shares = torch.cat([sequence_mean(mask) * len(mask) / len(rows) for _, _, mask in parts])
    regimes, weights = all_regimes[own], all_weights[own] * shares

    # 4. The student learns, one micro-batch after the other.
    losses, entropies, start = torch.zeros_like(weights), torch.zeros_like(weights), 0
    for number, part in enumerate(parts):
        here = slice(start, start + int(part[2].sum()))
        trainee.student.train(config.gradient_checkpointing)              # which transformers does in this mode only
        student_logp = setup.score(policies["student"], *part)
        of_sources = {name: of_parts[number] for name, of_parts in sources.items()}
        loss, losses[here] = recipe_loss(recipe, student_logp, of_sources, tokens[here], regimes[here], weights[here],
                                         config.top_k)
        if loss.requires_grad:                                            # else none of its tokens has a row
            loss.backward()
        trainee.student.eval()
        entropies[here] = scores_of(student_logp, *part[1:]).entropy
        start = here.stop

    losses = everyone(losses * weights)[0]
    stopped = torch.isin(all_tokens, torch.tensor(setup.eos_ids, device=tokens.device)).sum().item()
    metrics = {"loss": losses.sum().item(), "entropy": everyone(entropies)[0].mean().item(),
               "grad_norm": trainee.clip(), "lr": lr, "tokens": len(all_tokens), "truncated": 1 - stopped / len(rows),
               "regime_share": {regime.name: (all_regimes == regime).float().mean().item() for regime in recipe.rows},
               "regime_loss": {regime.name: losses[all_regimes == regime].sum().item() for regime in recipe.rows}}
    if {"privileged_teacher", "privileged_student"} <= scores.keys():
        gap = advantage_gap(scores["privileged_teacher"].logp, scores["privileged_student"].logp)
        metrics["gap"] = gap.mean().item()
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise NotFinite([{"prompt": row["prompt"], "completion": setup.tokenizer.decode(ids[kept])}
                         for part in parts for row, ids, kept in zip(*part)])
    trainee.step(lr)
    return metrics


class NotFinite(Exception):
    """A loss or a gradient that is no number. Holds the prompts and completions of the batch."""


def batch(rows: list[dict], size: int, step: int, seed: int) -> list[dict]:
    """The rows of a step, in an order drawn anew for every pass over the data."""
    places = (divmod(i, len(rows)) for i in range(step * size, (step + 1) * size))
    return [rows[order(len(rows), seed, epoch)[i]] for epoch, i in places]


@lru_cache(maxsize=4)
def order(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(count), count)


def train(setup: Setup, name: str, recipe: Recipe, seed: int, student, teacher, folder: Path, log: "Log") -> Trainee:
    """Distils into `student`, in place; goes on from the last checkpoint in `folder` where there is one."""
    config, trainee = setup.config, Trainee(student, teacher, setup.config)
    done = trainee.load(folder)
    log.forget(name, seed, after=done)
    if not done:
        log.write(recipe=name, seed=seed, step=0, validation=evaluate(setup, trainee.policies["student"], "validation"))
    with tqdm(total=config.steps, initial=done, desc=f"{name}, seed {seed}", unit="step") as bar:
        for step in range(done + 1, config.steps + 1):
            started = time.perf_counter()
            rows = batch(setup.splits["train"], config.batch_size, step - 1, seed)
            lr = config.lr * cosine(step - 1, config.steps, floor=0.1)
            try:
                metrics = distill_step(setup, recipe, trainee, rows, lr, (seed, step))
            except NotFinite as error:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "not_finite.json", json.dumps({"step": step, "batch": error.args[0]}) + "\n")
                raise InputError(f"{name}, seed {seed}, step {step}: the loss is not finite; its batch is in {folder}/"
                                 "not_finite.json, the checkpoints are as they were; try a lower --lr") from None
            metrics["seconds"] = time.perf_counter() - started
            if step % config.eval_every == 0 or step == config.steps:
                metrics["validation"] = evaluate(setup, trainee.policies["student"], "validation")
                bar.set_postfix(exact=mean_and_spread([metrics["validation"]["exact"]]), refresh=False)
            log.write(recipe=name, seed=seed, step=step, **metrics)
            if "validation" in metrics and is_main():
                trainee.save(folder, step, setup.tokenizer)
            bar.update()
    return trainee


def supervised(model, tokenizer, draw: Callable, steps: int, lr: float, label: str) -> None:
    """Supervised learning: every step `draw()` gives lists of prompts and completions; only the latter are learned."""
    adamw = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(steps), desc=label, unit="step"):
        prompts, completions = draw()
        completions = [ids + [tokenizer.eos_token_id] for ids in tokenizer(completions).input_ids]
        tokens, mask = pad(completions, "right", model.device)
        logp = score(model, tokenizer(prompts).input_ids, tokens, mask, len(tokenizer))[:]   # (N, V)
        loss = -logp.gather(1, tokens[mask][:, None]).mean()
        adamw.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * cosine(step, steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)           # without it and the slow start, one seed in
        adamw.step()                                                      # five makes a teacher that cannot add
        adamw.zero_grad()


def warm_start(task, role: str, config: Config, tokenizer, seed: int, held_out: set[str]):
    """The tiny teacher or student, taught by its author; cached under a hash of its settings and its code."""
    author = getattr(task, role)
    parts = (type(task), wrap, with_hint, tiny_tokenizer, tiny_model, TokenLogProbs, score, hidden_states, pad,
             supervised, cosine, warm_start)
    code = [inspect.getsource(part) for part in parts]
    alone = replace(task, teacher=author, student=author)                # the other author has no part in it
    shaped_by = repr((alone, role, config.hint, config.hint_template, seed, sorted(held_out), code))
    folder = Path("runs/warm_start") / f"{role}-{hashlib.sha256(shaped_by.encode()).hexdigest()[:16]}"
    if folder.exists():
        try:
            # A copy: at another alignment than new weights have, some processors round matrix products differently.
            return copy.deepcopy(Qwen3ForCausalLM.from_pretrained(folder))
        except Exception as error:
            print(f"{folder}: damaged ({first_line(error)}); making it again")
    rng = random.Random(f"{role} {seed}")
    torch.manual_seed(seed)
    model = tiny_model(author, tokenizer)

    def draw():
        prompts, completions = [], []
        while len(prompts) < 256:
            row = task.problem(rng)
            if row["prompt"] in held_out:
                continue
            form = config.hint if rng.random() < author.hinted else "none"
            doubtful = rng.random() < author.doubts
            hint = (task.problem(rng) if doubtful else row)["hints"][form]
            prompts.append(with_hint({"prompt": row["prompt"], "hint": hint}, config.hint_template))
            completions.append(task.solution(row, "none" if doubtful else form, author, rng))
        return prompts, completions

    supervised(model, tokenizer, draw, author.steps, 2e-3, f"warm start of the {role}, seed {seed}")
    if is_main():
        with new_folder(folder) as fresh:
            save_model(model, tokenizer, fresh)
    return model


# -------------------------------------------------------------------------------------------------- 10. evaluation

@torch.no_grad()
def evaluate(setup: Setup, policy: Policy, split: str, samples: int = 4) -> dict:
    """By sampling, as deployed: the mean over `samples` completions of every prompt of the split.

    exact: share of right completions that ended by themselves, among prompts that take no luck. stopped: share that
    ended. entropy: per token. by_kind: share of right tokens. nll: cross-entropy between the law of the tokens that the
    prompt leaves open and the policy; nll_best: the entropy of that law, which nobody can beat.
    """
    set_seed("evaluate", split)
    rows = [row for row in setup.splits[split][:setup.config.eval_prompts] for _ in range(samples)]
    exact, stopped, entropies, nll, nll_best, right = [], [], [], [], [], defaultdict(list)
    for part in setup.micro_batches(rows):
        tokens, mask = setup.rollout(policy, part)
        logp = setup.score(policy, part, tokens, mask)
        entropies += scores_of(logp, tokens, mask).entropy.tolist()
        grades = []                                                       # of the N tokens; none for real models
        for row, ids in zip(part, (row_tokens[kept].tolist() for row_tokens, kept in zip(tokens, mask))):
            stopped.append(ids[-1] in setup.eos_ids)
            if row["reachable"]:
                text = setup.tokenizer.decode(ids, skip_special_tokens=True)
                exact.append(stopped[-1] and setup.task.check(row, text))
            grades += setup.task.grade(row, setup.tokenizer.convert_ids_to_tokens(ids))
        for i, grade in enumerate(grades):
            right[grade.kind].append(grade.correct)
            if grade.law:
                shares = torch.tensor(list(grade.law.values()))
                ids = setup.tokenizer.convert_tokens_to_ids(list(grade.law))
                nll.append(-(shares * logp[i][ids].cpu()).sum().item())
                nll_best.append(-(shares * shares.log()).sum().item())
    return {"exact": mean(exact), "stopped": mean(stopped), "entropy": mean(entropies), "nll": mean(nll),
            "nll_best": mean(nll_best), "by_kind": {kind: mean(values) for kind, values in sorted(right.items())}}


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


@torch.no_grad()
def routed_rollouts(setup: Setup, policies: dict[str, Policy], count: int = 4) -> list[dict]:
    """A few completions of validation prompts, and what DOPD's router says of every token of them."""
    set_seed("routed_rollouts")
    rows, columns, lengths = setup.splits["validation"][:64], [], []
    for part in setup.micro_batches(rows):
        tokens, mask = setup.rollout(policies["student"], part)
        scores = (scores_of(setup.score(policies[name], part, tokens, mask), tokens, mask)
                  for name in ("privileged_teacher", "privileged_student"))
        columns.append((tokens[mask], *(of_policy.logp for of_policy in scores)))
        lengths += mask.sum(1).tolist()
    tokens, teacher, student = (torch.cat(parts) for parts in zip(*columns))                               # (N,)
    regimes = route(teacher, student, torch.ones_like(tokens, dtype=torch.bool))
    columns = (tokens, regimes, teacher.exp(), student.exp(), advantage_gap(teacher, student))
    shown = zip(*(column[:sum(lengths[:count])].tolist() for column in columns))        # the others set the averages
    routed = [{"token": setup.tokenizer.decode([token]), "regime": Regime(regime).name, "q_T": q_teacher,
               "q_S": q_student, "A": gap} for token, regime, q_teacher, q_student, gap in shown]
    return [{"prompt": row["prompt"], "hint": row["hint"], "answer": row["answer"], "tokens": routed[end - length:end]}
            for row, length, end in zip(rows[:count], lengths, itertools.accumulate(lengths))]


# ------------------------------------------------------------------------------------------------------ 11. report

REGIMES = {         # colour on the page, colour code in the terminal, meaning
    "LH": ("#cfe8cf", 42, "low gap, both sure"), "LL": ("#dcdcdc", 47, "low gap, both unsure"),
    "HT": ("#a9c8f5", 44, "high gap, the teacher surer"), "HS": ("#ffc98a", 43, "high gap, the student surer")}


class Log:
    """metrics.jsonl: a line for every step of every training, and in the end one per policy with "test" in it."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.exists():
            for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
                with explained(f"{path}, row {number}: damaged", "; delete the row, or start anew"):
                    self.rows += [json.loads(line)] if line.endswith("\n") else []      # a kill may leave half a line
            self.write_all()

    def write_all(self) -> None:
        if is_main():
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, **row) -> None:
        self.rows.append(row)
        if is_main():
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def forget(self, recipe: str, seed: int, after: int) -> None:
        """Drops what a training did beyond its last checkpoint."""
        self.rows = [row for row in self.rows if (row["recipe"], row["seed"]) != (recipe, seed)
                     or 0 < after and row["step"] <= after]
        self.write_all()

    def tested(self, recipe: str, seed: int) -> bool:
        return any("test" in row for row in self.rows if (row["recipe"], row["seed"]) == (recipe, seed))


def table(rows: list[dict]) -> str:
    """The rows with a test, in Markdown: a line per policy, mean and standard deviation over the seeds."""
    tests = []
    for row in rows:
        if "test" in row:
            kinds = {kind: share for kind, share in row["test"]["by_kind"].items() if kind not in ("stop", "other")}
            tests.append({"policy": row["recipe"], "exact match": row["test"]["exact"],
                          "with hint": row["test_hinted"]["exact"], "ood": (row["ood"] or {}).get("exact"), **kinds,
                          "entropy": row["test"]["entropy"], "nll": row["test"]["nll"],
                          "best nll": row["test"]["nll_best"]})
    tests = pandas.DataFrame(tests).dropna(axis=1, how="all").groupby("policy", sort=False).agg(mean_and_spread)
    lines = [["policy", *tests], ["---"] * (1 + tests.shape[1]), *tests.reset_index().values]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_spread(values) -> str:
    values = [value for value in values if not pandas.isna(value)]
    if not values:
        return "-"
    return f"{mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def draw_curves(rows: list[dict], file: Path) -> None:
    """Accuracy, entropy and regime shares over steps: the mean over the seeds, and a band from lowest to highest."""
    steps = pandas.json_normalize([row for row in rows if "step" in row])       # "validation.exact" becomes a column
    routed = [name for name in steps.recipe.unique() if RECIPES[name].router]
    count = 2 + len(routed)
    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4), layout="constrained")
    panels = {"validation.exact": "exact match without the hint, validation",
              "entropy": "entropy of the student on its rollouts, nats"}
    for axis, (column, title) in zip(axes, panels.items()):
        for name, of_recipe in steps.dropna(subset=[column]).groupby("recipe", sort=False):
            seeds = of_recipe.groupby("step")[column]
            axis.plot(seeds.mean(), label=name)
            axis.fill_between(seeds.min().index, seeds.min(), seeds.max(), alpha=0.2)
        axis.set(title=title, xlabel="step")
    axes[1].legend()                       # entropy is there for every recipe, accuracy perhaps for none
    for axis, name in zip(axes[2:], routed):
        regimes = [regime.name for regime in RECIPES[name].rows]
        shares = steps[steps.recipe == name].groupby("step")[[f"regime_share.{regime}" for regime in regimes]].mean()
        colours = [REGIMES[regime][0] if regime in REGIMES else f"C{i}" for i, regime in enumerate(regimes)]
        axis.stackplot(shares.index, shares.T, labels=regimes, colors=colours)
        axis.set(title=f"{name}: share of the tokens per regime", xlabel="step", ylim=(0, 1))
        axis.legend(loc="lower right")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def tokens_in_ansi(rollouts: list[dict]) -> str:
    lines = []
    for shown in rollouts:
        tokens = (f"\033[30;{REGIMES[token['regime']][1]}m{token['token']}\033[0m" for token in shown["tokens"])
        hint, prompt, answer = shown["hint"] or "no hint", shown["prompt"], shown["answer"]
        lines.append(f"  {hint} | {prompt}{''.join(tokens)}   reference {answer}")
    return "\n".join(lines)


def tokens_in_html(sections: dict[str, list[dict]]) -> str:
    """Every token in the colour of its regime; hover for q_T, q_S and the gap A."""
    style = "".join(f".{regime}{{background:{colour}}}" for regime, (colour, _, _) in REGIMES.items())
    legend = " ".join(f"<span class={regime}>{regime}: {meaning}</span>" for regime, (_, _, meaning) in REGIMES.items())
    body = []
    for title, rollouts in sections.items():
        body.append(f"<h2>{html.escape(title)}</h2>")
        for shown in rollouts:
            tokens = "".join(
                f"<span class={token['regime']} title='{token['regime']}: q_T {token['q_T']:.3f}, q_S "
                f"{token['q_S']:.3f}, A {token['A']:.2f} nats'>{html.escape(token['token'])}</span>"
                for token in shown["tokens"])
            hint, prompt, answer = (html.escape(shown[name]) for name in ("hint", "prompt", "answer"))
            body.append(f"<pre>hint {hint or '(none)'}   {prompt}{tokens}   reference {answer}</pre>")
    return f"""<!doctype html><meta charset=utf-8><title>DOPD: tokens by regime</title>
<style>body{{font:15px/1.7 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}}
pre{{white-space:pre-wrap;margin:.4em 0}}span{{padding:.1em .2em;border-radius:3px}}{style}</style>
<h1>Tokens by regime</h1><p>Completions sampled without the hint, and what DOPD's router says of every token. Hover for
q_T and q_S, its probability under the privileged teacher and the privileged student, and their gap A.</p>
<p>{legend}</p>
{"".join(body)}
"""


def report(log: Log, folder: Path) -> None:
    sections = {f"{row['recipe']}, seed {row['seed']}": row["rollouts"] for row in log.rows if row.get("rollouts")}
    write_text(folder / "tokens.html", tokens_in_html(sections))
    write_text(folder / "report.md", table(log.rows))
    if any("step" in row for row in log.rows):
        draw_curves(log.rows, folder / "curves.png")
    for title, rollouts in sections.items():
        print(f"{title}\n{tokens_in_ansi(rollouts)}")
    print(f"\n{table(log.rows)}")


# -------------------------------------------------------------------------------------------------- 12. files, main

def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def require(condition, message: str) -> None:
    if not condition:
        raise InputError(message)


@contextmanager
def explained(where: str, mend: str = "", errors: type | tuple = Exception):
    """What a library raises in here, as one line that names what the user gave."""
    try:
        yield
    except errors as error:
        raise InputError(f"{where} ({first_line(error)}){mend}") from None


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def write_text(path: Path, text: str) -> None:
    """The file is there whole, or as it was before."""
    fresh = path.with_name(path.name + ".writing")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


@contextmanager
def new_folder(path: Path):
    """Fills a folder under another name first: it is there whole, or not at all."""
    fresh = path.with_name(path.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
    except Exception as error:             # PyTorch and safetensors report a full disk each in their own way
        shutil.rmtree(fresh, ignore_errors=True)
        raise InputError(f"{path}: cannot be written ({first_line(error)})") from None


def write_task(task: Rules | Simplify, folder: Path, train: int = 8192, held_out: int = 512) -> None:
    """Writes train, validation, test and ood.jsonl, from a fixed seed, no prompt twice; ood is two steps longer."""
    rng, seen, texts = random.Random(0), set(), {}
    longer = replace(task, length=task.length + 2)
    for split, source, size in (("test", task, held_out), ("validation", task, held_out), ("ood", longer, held_out),
                                ("train", task, train)):
        lines, in_vain = [], 0
        while len(lines) < size:
            row = source.problem(rng)
            in_vain += 1
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                lines.append(json.dumps(row) + "\n")
                in_vain = 0
            require(in_vain < 10_000, f"{folder}: the task seems to have only {len(seen)} prompts; make it longer, or "
                    "ask for fewer rows")
        texts[split] = "".join(lines)
    with new_folder(folder) as fresh:
        for split, text in texts.items():
            write_text(fresh / f"{split}.jsonl", text)


def read_rows(file: Path, form: str) -> list[dict]:
    """A JSONL file as rows of prompt, hint and answer. Raises InputError with the file, the row and the mend."""
    require(file.is_file(), f"{file}: no such file; give another --data")
    require(file.read_bytes().strip(), f"{file}: no rows; write a JSON object per line")
    with explained(f"{file}: cannot be read", "; write a JSON object per line"):
        # As text: the JSON loader makes dates of texts, and names no row.
        lines = datasets.load_dataset("text", data_files=glob.escape(str(file)), split="train")["text"]
    return [read_row(line, form, f"{file}, row {number}") for number, line in enumerate(lines, 1) if line.strip()]


def read_row(line: str, form: str, where: str) -> dict:
    try:
        given = json.loads(line.removeprefix("\ufeff"))
    except ValueError:
        given = None
    require(isinstance(given, dict), f"{where}: not a JSON object; write one per line")
    hints = given.get("hints")
    hint = hints.get(form) if isinstance(hints, dict) else given.get("hint")
    row = {"prompt": given.get("prompt"), "answer": given.get("answer"), "hint": "" if form == "none" else hint}
    for name, text in row.items():
        key = f'"hints": {{"{form}": ...}} or "hint", for --hint {form},' if name == "hint" else f'"{name}"'
        if not isinstance(text, str):      # written out: for good rows nothing is to be dumped
            raise InputError(f"{where}: {key} must be a text, not {json.dumps(text)[:40]}")
        require(not re.search("[\ud800-\udfff]", text),
                f"{where}: {key} holds half a character (a lone surrogate); mend its \\u escapes")
    require(row["prompt"], f'{where}: "prompt" is empty; write what the student reads')
    return row


def read_splits(path: Path, config: Config) -> dict[str, list[dict]]:
    """The splits of a folder of JSONL files, or of one file: a tenth each for validation and test."""
    if path.is_dir():
        splits = [split for split in ("train", "validation", "test", "ood")
                  if split != "ood" or (path / "ood.jsonl").exists()]
        return {split: read_rows(path / f"{split}.jsonl", config.hint) for split in splits}
    rows = read_rows(path, config.hint)
    if config.eval_only:
        return {"validation": rows, "test": rows}
    require(len(rows) >= 3, f"{path}: {len(rows)} rows; train, validation and test need one each")
    random.Random(0).shuffle(rows)
    tenth = max(1, len(rows) // 10)
    return {"validation": rows[:tenth], "test": rows[tenth:2 * tenth], "train": rows[2 * tenth:]}


def with_hint(row: dict, template: str) -> str:
    """What a privileged policy reads."""
    return re.sub(r"\{(hint|prompt)\}", lambda name: row[name[1]], template) if row["hint"] else row["prompt"]


def encode(setup: Setup, path: Path, context: int) -> None:
    """Adds the token ids to every row. Raises InputError for rows that the models cannot read."""
    def encoded(texts):
        if setup.tokenizer.chat_template:      # thinking off, where the template knows of it
            return setup.tokenizer.apply_chat_template(
                [[{"role": "user", "content": text}] for text in texts], add_generation_prompt=True, tokenize=True,
                return_dict=False, enable_thinking=False)
        return setup.tokenizer(texts).input_ids

    for split, rows in setup.splits.items():
        prompts, hinted = (encoded(texts) for texts in (
            [row["prompt"] for row in rows], [with_hint(row, setup.config.hint_template) for row in rows]))
        answers = setup.tokenizer([row["answer"] for row in rows], add_special_tokens=False).input_ids
        longest = setup.config.max_new_tokens or max(map(len, answers)) + 1
        for row, row["prompt_ids"], row["hinted_ids"], row["answer_ids"] in zip(rows, prompts, hinted, answers):
            where = f"{path}, {split}, prompt {row['prompt'][:40]!r}"
            row["max_new_tokens"] = longest
            length = max(len(row["prompt_ids"]), len(row["hinted_ids"])) + longest
            require(length <= context, f"{where}: {length} tokens with hint and completion, the models take {context}; "
                    "shorten it or lower --max_new_tokens")
            require(setup.tokenizer.unk_token_id not in row["hinted_ids"] + row["answer_ids"],
                    f"{where}: the tokenizer does not know a character of it, of its hint or answer, or of "
                    "--hint_template; leave it out")
            answer = [*setup.tokenizer.convert_ids_to_tokens(row["answer_ids"]), EOS]
            with explained(f"{where}: no problem of --task {setup.config.task}", "; mend it, or take other --data",
                           (IndexError, ValueError)):
                grades = setup.task.grade(row, answer)
            row["reachable"] = all(grade.kind != "unlearnable" for grade in grades)


def load_pair(config: Config):
    """Tokenizer, teacher and student from the Hugging Face hub or from disk; one vocabulary, or InputError."""
    tokenizers, pair = [], []
    for name in (config.teacher, config.student):
        where = f"--student {name}" if name == config.student else f"--teacher {name}"
        with explained(f"{where}: cannot be loaded"):
            tokenizers.append(AutoTokenizer.from_pretrained(name))
            pair.append(AutoModelForCausalLM.from_pretrained(name, config=without_dropout(name)))
        check_model(pair[-1], where)
        words, height = vocabulary_size(tokenizers[-1]), pair[-1].get_input_embeddings().num_embeddings
        require(words <= height, f"{where}: its tokenizer has {words} tokens, more than its embedding table "
                f"({height}); take the tokenizer of the checkpoint")
    require(tokenizers[0].get_vocab() == tokenizers[1].get_vocab(),
            f"--teacher {config.teacher} --student {config.student}: different vocabularies ({len(tokenizers[0])} and "
            f"{len(tokenizers[1])} tokens); take two that share a tokenizer")
    return tokenizers[1], *pair


def without_dropout(name: str):
    """What is sampled and what is scored have to be the same policy."""
    config = AutoConfig.from_pretrained(name)
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def vocabulary_size(tokenizer) -> int:
    """Embedding tables may be padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


@torch.no_grad()
def check_model(model, where: str) -> None:
    """Refuses weights that are no numbers, and models whose logits are not their head applied to the last states."""
    for name, weight in model.named_parameters():
        require(weight.isfinite().all(), f"{where}: the weight {name} is not finite; take another checkpoint")
    ids = torch.arange(8)[None]
    logits = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
    require(torch.allclose(model(ids).logits.float(), logits.float(), atol=1e-3),
            f"{where}: scales or caps its logits, which this file does not do; take another model")


def prepare(config: Config, seed: int, task=None) -> tuple:
    """The setup, the teacher and the untrained student of one seed. A task given here needs config.data of its own."""
    task = task or (Text(config.answer_regex) if config.teacher else TASKS[config.task])
    path = Path(config.data) if config.data else Path(__file__).resolve().parent / "tiny_tasks" / config.task
    if not config.data and not path.exists():
        write_task(task, path)
    splits = read_splits(path, config)
    if config.teacher:
        tokenizer, teacher, student = load_pair(config)
        context = min(model.config.max_position_embeddings for model in (teacher, student))
        eos = student.generation_config.eos_token_id
    else:
        tokenizer, context, eos = tiny_tokenizer(), TINY_CONTEXT, []
    eos_ids = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    require(eos_ids, f"--student {config.student}: knows no token that ends a completion; take another model")
    setup = Setup(config, task, tokenizer, splits, vocabulary_size(tokenizer), eos_ids)
    encode(setup, path, context)
    if not config.teacher:
        held_out = {row["prompt"] for split, rows in splits.items() if split != "train" for row in rows}
        teacher, student = (warm_start(task, role, config, tokenizer, seed, held_out)
                            for role in ("teacher", "student"))
    teacher.to(config.device, getattr(torch, config.dtype)).eval()
    student.to(config.device, torch.float64 if config.dtype == "float64" else torch.float32).eval()
    if config.gradient_checkpointing:
        student.activation_checkpointing_enable()
    return setup, teacher.requires_grad_(False), student


def run(config: Config) -> Log:
    """Every recipe from the same student, for every seed, then the report. All that happens is in the log.

    Writes to config.out, and fills that in where it is empty. Raises InputError.
    """
    config.out = config.out or free_folder(config)
    nearest = next(folder for folder in (Path(config.out), *Path(config.out).absolute().parents) if folder.exists())
    require(nearest.is_dir() and os.access(nearest, os.W_OK),
            f"--out {config.out}: cannot be written, because of {nearest}; take another folder")
    log = Log(Path(config.out) / "metrics.jsonl")
    for seed in config.seeds:
        run_seed(config, seed, log)
    if is_main():
        report(log, Path(config.out))
    return log


def free_folder(config: Config) -> str:
    name = Path(config.data).stem if config.data else f"{config.task}-{config.hint}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(f"runs/{free}" for free in names if not Path("runs", free).exists())


UNTRAINED = ("student before", "teacher")                                 # how the log calls them


def run_seed(config: Config, seed: int, log: Log) -> None:
    folder = Path(config.out)
    setup, teacher, untrained = prepare(config, seed)
    if is_main() and not (folder / "config.json").exists():               # nothing is written before the input is good
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
    with precision(config):
        for name, model in zip(UNTRAINED, (untrained, teacher)):
            alone = config.eval_only and name == "teacher" and config.teacher and config.teacher == config.student
            if not (log.tested(name, seed) or alone):
                log.write(recipe=name, seed=seed, **final_tests(setup, policies_of(model, model, teacher)))
        for name in config.recipe if not config.eval_only else ():
            place = folder / f"{name}-seed{seed}"
            if not log.tested(name, seed):
                trainee = train(setup, name, RECIPES[name], seed, copy.deepcopy(untrained), teacher, place, log)
                tests = final_tests(setup, trainee.policies)
                if is_main():
                    with new_folder(place / "student") as fresh:
                        save_model(trainee.student, setup.tokenizer, fresh)
                log.write(recipe=name, seed=seed, **tests)
            if is_main():
                drop_checkpoints(place)


def precision(config: Config):
    """bfloat16 is for the matrix products: at lr 5e-6 a weight kept in bfloat16 would round every step away. No cache:
    it would go on serving the weights of before the step."""
    return torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.dtype == "bfloat16",
                          cache_enabled=False)


def final_tests(setup: Setup, policies: dict[str, Policy]) -> dict:
    student = policies["student"]
    return {"test": evaluate(setup, student, "test"),
            "test_hinted": evaluate(setup, Policy(student.model, True), "test"),
            "ood": evaluate(setup, student, "ood") if "ood" in setup.splits else None,
            "rollouts": routed_rollouts(setup, policies) if student.model is not policies["teacher"].model else []}


class Parser(HfArgumentParser):
    def error(self, message: str):
        raise InputError(f"{message}; see --help")


class Help(RawDescriptionHelpFormatter):
    """A flag in one spelling, its default behind it; the choices and recipes below."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=116)

    def _format_action_invocation(self, action):
        if action.dest == "help":
            return "--help"
        values = action.default if isinstance(action.default, list) else [action.default]
        return " ".join([action.option_strings[0], *(str(value) for value in values if value is not False)])

    def _get_help_string(self, action):
        return action.help + (f" [{', '.join(action.choices)}]" if action.choices else "")


def parse(argv: list[str]) -> Config:
    parser = Parser(Config, prog="dopd.py", usage="python dopd.py [--flag value ...]", allow_abbrev=False,
                    description="\n\n".join(__doc__.split("\n\n")[:3]), formatter_class=Help,
                    epilog=f"tasks: {', '.join(TASKS)}\nrecipes: {', '.join(RECIPES)}")
    flags = vars(parser.parse_args(argv))
    if flags["resume"]:
        given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
        others = ", ".join(f"--{name}" for name in sorted(given - {"resume", "micro_batch"}))
        require(not others, f"--resume {flags['resume']}: keeps the flags of that run; leave out {others}")
        changes = {"out": flags["resume"]} | {name: flags[name] for name in given & {"micro_batch"}}
        with explained(f"--resume {flags['resume']}: holds no run to go on with", "", (OSError, ValueError, TypeError)):
            return Config(**json.loads((Path(flags["resume"]) / "config.json").read_text()) | changes)
    config = Config(**flags)
    require(not (config.out and (Path(config.out) / "config.json").exists()),
            f"--out {config.out}: holds a run already; take another folder, or --resume {config.out}")
    return config


def validate(config: Config) -> None:
    """Raises InputError for flags with which no run is possible, and fills in those that follow from others."""
    any_number = math.inf
    ranges = {"steps": (1, any_number), "batch_size": (1, any_number), "rollouts": (1, any_number),
              "micro_batch": (0, any_number), "lr": (1e-12, 1), "top_k": (1, any_number), "beta_light": (0, 1e6),
              "beta_weak": (0, 1e6), "ema_decay": (0, 1), "max_new_tokens": (0, any_number),
              "eval_every": (1, any_number), "eval_prompts": (1, any_number)}
    for name, (low, high) in ranges.items():
        value, at_most = getattr(config, name), f" and at most {high}" if high < any_number else ""
        require(low <= value <= high, f"--{name} {value}: must be at least {low}{at_most}")
    for name in ("recipe", "seeds"):
        values = getattr(config, name)
        require(len(set(values)) == len(values), f"--{name} {' '.join(map(str, values))}: give each of them once")
    for seed in config.seeds:
        require(0 <= seed < 2**32, f"--seeds {seed}: must be between 0 and {2**32 - 1}")
    recipes = [name for name in RECIPES if name not in UNTRAINED]
    for name, value, known in [("task", config.task, TASKS), *(("recipe", name, recipes) for name in config.recipe)]:
        require(value in known, f"--{name} {value}: there is none of this name, only {', '.join(known)}; for one of "
                "your own, start the script that adds it")
    if config.eval_only and config.student:
        config.teacher = config.teacher or config.student
    require(bool(config.teacher) == bool(config.student),
            "--teacher, --student: give both, or neither for the tiny policies")
    require(config.data or not config.teacher, "--data: real models need a JSONL file of prompts, hints and answers")
    config.max_new_tokens = config.max_new_tokens or (512 if config.teacher else 0)
    config.hint_template = config.hint_template or (
        "{prompt}\n\nHint: {hint}" if config.teacher else "{hint}|{prompt}")
    require("{prompt}" in config.hint_template and "{hint}" in config.hint_template,
            f"--hint_template {config.hint_template!r}: must hold {{prompt}} and {{hint}}")
    with explained(f"--device {config.device}: PyTorch cannot use it here", "; try --device cpu"):
        torch.empty(0, device=config.device)
    with explained(f"--answer_regex {config.answer_regex!r}: no regular expression"):
        groups = re.compile(config.answer_regex).groups
    require(config.teacher or not config.answer_regex, "--answer_regex: for real models; give --teacher and --student")
    require(groups == 1 or not config.answer_regex,
            f"--answer_regex {config.answer_regex!r}: needs one (group), the answer; it has {groups}")


def join_processes(config: Config) -> None:
    """Where `accelerate launch` or `torchrun` started several of us: each takes a GPU and its share of every batch."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    require(config.batch_size * config.rollouts % processes == 0,
            f"--batch_size {config.batch_size} x --rollouts {config.rollouts}: must be a multiple of the {processes} "
            "processes")
    if processes > 1:
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()


def to_go_on(config: Config | None) -> str:
    begun = config and config.out and (Path(config.out) / "config.json").exists()
    return f"; go on with python {Path(sys.argv[0]).name} --resume {config.out}" if begun else ""


def main(argv: list[str]) -> int:
    started, config = time.perf_counter(), None
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    if hasattr(sys.stdout, "reconfigure"):                 # a terminal may not know the ± of the table
        sys.stdout.reconfigure(errors="replace")
    try:
        config = parse(argv)
        if config.write_tasks:
            for name, task in TASKS.items():
                write_task(task, Path(__file__).resolve().parent / "tiny_tasks" / name)
            return 0
        join_processes(config)
        run(config)
    except KeyboardInterrupt:
        print(f"\ninterrupted{to_go_on(config)}", file=sys.stderr)
        return 130
    except InputError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = f"--device {config.device}: out of memory; lower --micro_batch{to_go_on(config)}"
    except OSError as error:
        where = error.filename or (config and config.out)
        message = f"{where}: {error.strerror}; make room, or take another --out" if error.strerror else str(error)
    else:
        print(f"{time.perf_counter() - started:.0f} s; all of it is in {config.out}/")
        return 0
    print(f"dopd.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
