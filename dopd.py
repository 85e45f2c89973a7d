"""DOPD, Dual On-policy Distillation (arXiv 2606.30626), in one file to read from top to bottom.

A student samples its own answers; a stronger teacher grades every token of them. In training both may read a hint
that the deployed student will never see. Token by token DOPD asks: with the hint, would the student agree with the
teacher? If so, what separates them is mostly information, and a light touch is enough; if not, one of the two knows
better, and the surer one becomes the source. Tasks, policies and the whole experiment fit on two CPU cores:

    python dopd.py                                     # four recipes on `rules`: minutes, then look into runs/
    python dopd.py --task simplify --recipe vanilla dopd --seeds 0 1 2
    python dopd.py --resume runs/rules-steps           # go on after an interruption
    python dopd.py --teacher Qwen/Qwen3-8B --student Qwen/Qwen3-1.7B --data my.jsonl --device cuda --dtype bfloat16

Shapes: B completions of T tokens, padded on the right; V words in the vocabulary; N completion tokens laid end to
end, without padding. Log-probs are natural logarithms, so every divergence and entropy is in nats.
"""

import copy
import hashlib
import html
import inspect
import json
import math
import os
import random
import shutil
import statistics
import sys
import time
from argparse import HelpFormatter
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import datasets
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser,
                          PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

HERE = Path(__file__).resolve().parent
WARM_STARTS = Path("runs/warm_start")
HINT_FORMS = ("answer", "execution", "steps", "summary", "none")     # table 4


class InputError(Exception):
    """What the user gave cannot be used. One line: the file, the row or the flag, and the mend. Exit code 2."""


# ------------------------------------------------------------------------------------------------------ 1. config

def flag(default, help):
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every flag of the command line. The defaults are the CPU experiment."""

    task: Literal["rules", "simplify"] = flag("rules", "synthetic task of the tiny policies")
    hint: Literal[HINT_FORMS] = flag("steps", "what the hint says (table 4): `steps` is what to do, not what comes out")
    recipe: list[str] = flag(["vanilla", "privileged_teacher", "privileged_student", "dopd"],
                             "one or more recipes, each trained from the same student")
    seeds: list[int] = flag([0], "one or more seeds; each has its own warm start, rollouts and order of the data")

    steps: int = flag(160, "optimizer steps of distillation (paper: 200)")
    batch_size: int = flag(64, "prompts per optimizer step (paper: 128)")
    rollouts: int = flag(4, "completions sampled per prompt (paper: 4)")
    micro_batch: int = flag(0, "completions per forward pass, 0 for all at once; changes memory, never the result")
    lr: float = flag(1e-4, "peak learning rate, cosine to a tenth (paper: 5e-6)")
    top_k: int = flag(4, "tokens in the top-K support, the tail bucket not counted (paper: 128)")
    beta_light: float = flag(0.6, "weight of light supervision, regimes LH and HS (paper: 0.6)")
    beta_weak: float = flag(0.3, "weight of weak supervision, regime LL (paper: 0.3)")
    privileged_student: Literal["live", "frozen", "ema"] = flag(
        "live", "whose weights read the hint: the student's own (the paper), its first, or their moving average")
    ema_decay: float = flag(0.98, "decay per step of that moving average")

    teacher: str = flag("", "Hugging Face causal LM, name or folder; empty: the tiny teacher of the task")
    student: str = flag("", "Hugging Face causal LM, name or folder; empty: the tiny student of the task")
    data: str = flag("", "JSONL file (split 8:1:1) or folder of train, validation, test and ood.jsonl; rows of "
                         "prompt, answer, and hint or hints; empty: the task's own")
    hint_template: str = flag("", "how {hint} joins {prompt} in the user message; empty: a template that suits the model")
    max_new_tokens: int = flag(0, "longest completion, in tokens; 0: the longest reference answer and its EOS")
    device: str = flag("cpu", "cpu, cuda, cuda:1, mps")
    dtype: Literal["float32", "bfloat16", "float64"] = flag("float32", "of both models; the optimizer keeps float32")

    eval_every: int = flag(20, "steps between evaluations on the validation split, and between checkpoints")
    eval_prompts: int = flag(512, "prompts per evaluation, 4 completions each")
    out: str = flag("", "folder of the run; empty: a new one, runs/<task>-<hint>")
    resume: str = flag("", "go on with the run in this folder, with the flags it was started with")
    write_tasks: bool = flag(False, "write the synthetic tasks into tiny_tasks/ again, byte for byte, and stop")

    def __post_init__(self):
        at_least = dict(steps=1, batch_size=1, rollouts=1, micro_batch=0, top_k=1, beta_light=0, beta_weak=0,
                        max_new_tokens=0, eval_every=1, eval_prompts=1)
        for name, low in at_least.items():
            if not low <= getattr(self, name) < math.inf:
                raise InputError(f"--{name} {getattr(self, name)}: must be a number of {low} or more")
        if not 0 < self.lr < 1:
            raise InputError(f"--lr {self.lr}: must lie between 0 and 1, as 1e-4 does")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--ema_decay {self.ema_decay}: must lie in [0, 1), as 0.98 does")
        for name in self.recipe:
            if name not in RECIPES:
                raise InputError(f"--recipe {name}: no such recipe; there are {', '.join(RECIPES)}")
        for name in ("recipe", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"--{name} {' '.join(map(str, getattr(self, name)))}: name each one once")
        if bool(self.teacher) != bool(self.student):
            raise InputError("--teacher and --student: give both, or neither for the tiny policies")
        if self.teacher and not self.data:
            raise InputError("--data: a JSONL file is needed with --teacher and --student")
        if self.hint_template and not ("{hint}" in self.hint_template and "{prompt}" in self.hint_template):
            raise InputError("--hint_template: must hold both {hint} and {prompt}")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {self.device}: PyTorch sees no GPU here; use --device cpu")


# ------------------------------------------------------------------------------------------------------- 2. tasks
#
# A row is {"prompt": str, "hints": {form: text}, "answer": str}. A task makes rows, lets an author with gaps and slips
# write a solution (the tiny policies first learn to write like one), checks a completion, and says what every token of
# it asks for: the ground truth about capability and information that no real dataset has.

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
    shuffled: float = 0.0  # share of the hints that belong to another problem: their reader learns to doubt hints


class Grade(NamedTuple):
    """What one completion token asked for, and whether it was right."""
    kind: str              # recall, execute, unlearnable, choice, copy, stop, other
    correct: bool
    law: dict = {}         # where the prompt leaves the token open: the true probability of every next token


def wrap(total: int, slips: float, rng: random.Random) -> int:
    """The last digit of a result; where it wraps past 9, the author may write one too many."""
    if total > 9 and slips and rng.random() < slips:
        total += 1
    return total % 10


@dataclass(frozen=True)
class Rules:
    """`7fbk=` -> `967314`: from 7, apply the rules named f, b and k; for each write its digit, then the new value.

    A name stands for "add this digit, modulo 10". Ten stable names always mean the same: the hint gives them away, and
    they can be learned. Three wild names draw their digit anew in every problem: nobody can learn what the hint says.
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

    def hints(self, start, rules):
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
        """What the author writes on reading the prompt and the hint in this form (`none`: the prompt alone)."""
        start, names = int(row["prompt"][0]), row["prompt"][1:-1]
        if form == "execution":
            return row["answer"]
        if form == "steps":
            return self.chain(start, [int(digit) for digit in row["answer"][::2]], author.slips, rng)
        known = {name: self.STABLE[name] for name in "abcdefghij"[:author.knows]}
        while True:                        # what is guessed has to agree with a hint that says only how it ends
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

    The hint says which of the valid orders the reference took: it cannot be known, and any other is as good.
    """
    length: int = 3
    teacher: Author = Author(width=96, layers=3, steps=400, hinted=0.5)
    student: Author = Author(width=128, layers=2, steps=300, hinted=0.3, slips=0.5)

    def problem(self, rng: random.Random) -> dict:
        expression = rng.choice("0123456789")
        for _ in range(self.length):
            expression += rng.choice("+*") + rng.choice("0123456789")
        prompt, order, lines, results = expression + "=", "", [], 0
        while len(expression) > 1:
            operator = rng.choice(self.reducible(expression))
            expression = self.reduce(expression, operator)
            order, lines, results = f"{order}{operator}", [*lines, expression], results + int(expression[2 * operator])
        return {"prompt": prompt, "hints": {"answer": expression, "execution": "=".join(lines), "steps": order,
                                            "summary": f"{results:02d}", "none": ""}, "answer": "=".join(lines)}

    def reducible(self, expression: str) -> list[int]:
        operators = expression[1::2]
        return [i for i, sign in enumerate(operators) if sign == "*" or "*" not in operators]

    def reduce(self, expression, operator, slips=0.0, rng=None):
        left, sign, right = expression[2 * operator:2 * operator + 3]
        total = int(left) * int(right) if sign == "*" else int(left) + int(right)
        return expression[:2 * operator] + str(wrap(total, slips, rng)) + expression[2 * operator + 3:]

    def solution(self, row: dict, form: str, author: Author, rng: random.Random) -> str:
        """What the author writes on reading the prompt and the hint in this form (`none`: the prompt alone)."""
        if form == "execution":
            return row["answer"]
        expression, lines = row["prompt"][:-1], []
        for hinted_operator in row["hints"]["steps"]:
            operator = int(hinted_operator) if form == "steps" else rng.choice(self.reducible(expression))
            expression = self.reduce(expression, operator, author.slips, rng)
            lines.append(expression)
        return "=".join(lines)

    def check(self, row: dict, completion: str) -> bool:
        return completion.split("=")[-1] == row["answer"][-1]

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

        A wrong result earlier in the line is forgiven: what follows is judged on its own.
        """
        counts, is_result, i = Counter(), False, len(line)
        for operator in self.reducible(expression):
            target = list(self.reduce(expression, operator))
            target.append("=" if len(target) > 1 else EOS)
            if i < len(target) and all(line[j] == target[j] or j == 2 * operator for j in range(i)):
                counts[target[i]] += 1
                is_result |= i == 2 * operator
        return {token: count / counts.total() for token, count in counts.items()}, is_result


@dataclass(frozen=True)
class Text:
    """Rows from a file, for real models: the completion has to be the reference answer."""

    def check(self, row: dict, completion: str) -> bool:
        return completion.strip() == row["answer"].strip()

    def grade(self, row: dict, tokens: list[str]) -> list[Grade]:
        return []                          # nobody knows what a real token asks for


TASKS = {"rules": Rules(), "simplify": Simplify()}


def write_task(task, folder: Path, train: int = 8192, held_out: int = 512, seed: int = 0) -> None:
    """Writes train, validation, test and ood.jsonl, no prompt twice; `ood` problems are two steps longer."""
    rng, seen = random.Random(seed), set()
    longer = replace(task, length=task.length + 2)
    folder.mkdir(parents=True, exist_ok=True)
    for split, source, size in (("test", task, held_out), ("validation", task, held_out), ("ood", longer, held_out),
                                ("train", task, train)):
        rows = []
        while len(rows) < size:
            row = source.problem(rng)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                rows.append(json.dumps(row) + "\n")
        write_text(folder / f"{split}.jsonl", "".join(rows))


def read_rows(path: Path, hint_form: str) -> list[dict]:
    """A JSONL file as a list of {"prompt", "hint", "answer", "hints"}; every bad row is named.

    Raises: InputError with the file, the row and the mend.
    """
    try:
        rows = datasets.load_dataset("json", data_files=str(path), split="train").to_list()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file")
    except Exception as error:             # `datasets` does not say which row it could not read
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            try:
                json.loads(line)
            except ValueError as problem:
                raise InputError(f"{path}, row {number}: not JSON ({problem}); one object a line") from None
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, 1):
        row["hint"] = (row.get("hints") or {}).get(hint_form, row.get("hint"))
        if row["hint"] is None and hint_form == "none":
            row["hint"] = ""
        if row["hint"] is None:
            raise InputError(f'{path}, row {number}: no hint "{hint_form}"; add "hints": {{"{hint_form}": ...}} or "hint"')
        for name in ("prompt", "hint", "answer"):
            if not isinstance(row.get(name), str):
                raise InputError(f'{path}, row {number}: "{name}" must be a text, not {row.get(name)!r}')
        if not row["prompt"]:
            raise InputError(f'{path}, row {number}: "prompt" is empty')
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def read_splits(path: Path, hint_form: str) -> dict[str, list[dict]]:
    """The splits of a folder of JSONL files, or of one file: a tenth each for validation and test."""
    if path.is_dir():
        return {split: read_rows(path / f"{split}.jsonl", hint_form)
                for split in ("train", "validation", "test", "ood") if split != "ood" or (path / "ood.jsonl").exists()}
    rows = read_rows(path, hint_form)
    if len(rows) < 3:
        raise InputError(f"{path}: {len(rows)} rows; training, validation and test need at least one each")
    random.Random(0).shuffle(rows)
    tenth = max(1, len(rows) // 10)
    return {"validation": rows[:tenth], "test": rows[tenth:2 * tenth], "train": rows[2 * tenth:]}


# ---------------------------------------------------------------------------------------------------- 3. policies
#
# A policy is a model and what it reads: the prompt (student, teacher) or the prompt and the hint (privileged student,
# privileged teacher). All four grade the same completion tokens.

class Policy(NamedTuple):
    model: torch.nn.Module
    reads_hint: bool


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, shared by all tasks."""
    symbols = ["<pad>", EOS, "<unk>", *"0123456789abcdefghijklm+*=|"]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=EOS, unk_token="<unk>")


def tiny_model(author: Author, tokenizer) -> Qwen3ForCausalLM:
    """A Qwen3, the paper's architecture, of a few hundred thousand parameters."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=author.width, intermediate_size=3 * author.width,
        num_hidden_layers=author.layers, num_attention_heads=4, num_key_value_heads=4, head_dim=author.width // 4,
        max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None))


def with_hint(row: dict, template: str) -> str:
    """What a privileged policy reads."""
    return template.format(prompt=row["prompt"], hint=row["hint"]) if row["hint"] else row["prompt"]


class TokenLogProbs:
    """Log-probs (N, V) of one policy, formed only where they are asked for: `logp[index]` is an (n, V) tensor.

    It keeps the last hidden states (N, H) instead, which a real vocabulary makes some forty times smaller.
    """

    def __init__(self, hidden: torch.Tensor, head: torch.nn.Module, vocabulary: int):
        self.hidden, self.head, self.shape = hidden, head, (len(hidden), vocabulary)

    def __getitem__(self, index) -> torch.Tensor:
        logits = self.head(self.hidden[index])[..., :self.shape[1]]       # (n, V), an embedding table may be padded
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def part(self, start: int, stop: int) -> "TokenLogProbs":
        return TokenLogProbs(self.hidden[start:stop], self.head, self.shape[1])

    @staticmethod
    def cat(parts: list["TokenLogProbs"]) -> "TokenLogProbs":
        return TokenLogProbs(torch.cat([part.hidden for part in parts]), parts[0].head, parts[0].shape[1])


def score(model, prompts: list[list[int]], tokens: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> TokenLogProbs:
    """The log-probs of completion tokens (B, T) where mask (B, T), after these prompts: N = mask.sum() rows."""
    ids, real = pad(prompts, "left", tokens.device)                       # (B, P)
    inputs = torch.cat([ids, tokens[:, :-1]], 1)                          # (B, P+T-1): the last token predicts nothing
    attention = torch.cat([real, torch.ones_like(tokens[:, :-1], dtype=torch.bool)], 1)   # causal: no look beyond EOS
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=inputs, attention_mask=None if real.all() else attention, position_ids=positions, use_cache=False,
    ).last_hidden_state[:, ids.shape[1] - 1:]                             # (B, T, H)
    return TokenLogProbs(hidden[mask], model.get_output_embeddings(), vocabulary)


def pad(sequences: list[list[int]], side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) and where they are real, by length: the pad token may be the EOS token."""
    ids = pad_sequence([torch.tensor(sequence) for sequence in sequences], True, 0, side)
    real = pad_sequence([torch.ones(len(sequence), dtype=torch.bool) for sequence in sequences], True, False, side)
    return ids.to(device), real.to(device)


# ----------------------------------------------------------------------------------------------------- 4. rollout

@torch.no_grad()
def rollout(model, prompts: list[list[int]], max_new_tokens: int, eos_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One completion per prompt, from the model's own distribution: temperature 1, no top-k, no top-p.

    Returns tokens (B, T) and mask (B, T), which is True up to and including the first EOS. A completion that has none
    was cut at max_new_tokens and stays without. Nothing of the checkpoint's generation config has a say.
    """
    ids, real = pad(prompts, "left", model.device)
    checkpoint_config = model.generation_config
    model.generation_config = GenerationConfig()       # `generate` would fill our gaps from it: penalties, min_p, ...
    try:
        sequences = model.generate(input_ids=ids, attention_mask=real, generation_config=GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
            eos_token_id=eos_ids, pad_token_id=eos_ids[0]))
    finally:
        model.generation_config = checkpoint_config
    tokens = sequences[:, ids.shape[1]:]                                  # (B, T)
    stops = torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device))
    return tokens, stops.cumsum(1) - stops.int() == 0                     # True until an EOS has gone before


# ------------------------------------------------------------------------------------------------- 5. divergences
#
# Each maps the log-probs (..., V) of the student and of a source to (...), in nats.

def forward_kl(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """KL(source || student): what the source finds likely, the student must too."""
    return (source.exp() * (source - student)).sum(-1)


def reverse_kl(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """KL(student || source): what the source finds unlikely, the student must too."""
    return (student.exp() * (student - source)).sum(-1)


def js_divergence(student: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon: mean of KL(source || m) and KL(student || m), m their even mixture. At most ln 2."""
    mixture = torch.logaddexp(student, source) - math.log(2)
    return 0.5 * (forward_kl(mixture, source) + forward_kl(mixture, student))


def top_k_with_tail(student: torch.Tensor, source: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both log-probs (..., V) on the student's k likeliest tokens and one bucket for all others: two (..., k+1).

    Without the bucket the mass outside the top-K would be free, and drain there (method.md).
    """
    kept = student.topk(min(k, student.shape[-1]), -1).indices            # (..., k)
    nothing = torch.finfo(student.dtype).min

    def bucket(logp):
        tail = logp.scatter(-1, kept, nothing).logsumexp(-1, keepdim=True)
        return torch.cat([logp.gather(-1, kept), tail], -1)

    return bucket(student), bucket(source)


DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": js_divergence}

# From one sampled token: d D / d log-prob of that token, so that its mean over the student's samples, times the
# gradient of the log-prob, is the gradient of the divergence. Constants are left out: their mean gradient is zero.
SAMPLED_SCORES = {
    "forward_kl": lambda student, source: -(source - student).exp(),
    "reverse_kl": lambda student, source: student - source,
    "js": lambda student, source: 0.5 * (student - torch.logaddexp(student, source)),
}


# ------------------------------------------------------------------------------------------------------ 6. router

class Regime(IntEnum):
    LH = 0      # low gap, both sure: mostly information, a light touch of the privileged teacher
    LL = 1      # low gap, both unsure: a weak pull towards the privileged student
    HT = 2      # high gap, the teacher surer of the token: capability, the teacher in full
    HS = 3      # high gap, the student surer of it: hold on to the privileged student


def advantage_gap(teacher_logp: torch.Tensor, student_logp: torch.Tensor) -> torch.Tensor:
    """Eq. 1: how far the two privileged policies disagree about the sampled tokens, |log q_T - log q_S|, in nats."""
    return (teacher_logp - student_logp).abs()


def route(teacher_logp: torch.Tensor, student_logp: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The regime of every sampled token, -1 where mask is False (section 3 of the paper; the table in method.md).

    Both log-probs are of the sampled token under a privileged policy, hence the same tokens under the same hint. The
    thresholds are averages over all tokens given, so give it the whole optimizer batch.
    """
    gap = advantage_gap(teacher_logp, student_logp)
    return regimes_of(gap, teacher_logp.exp(), student_logp.exp(), mask)


def regimes_of(gap: torch.Tensor, q_teacher: torch.Tensor, q_student: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`route` with the gap taken apart. Only its order against its average counts, so no normalisation is needed."""
    regimes = torch.full(mask.shape, -1, device=mask.device)
    if not mask.any():
        return regimes
    typical = mask & (gap <= gap[mask].quantile(0.95))                    # the top 5% do not count in the averages
    high = gap >= gap[typical].mean()
    both = q_teacher + q_student
    sure = both >= both[typical].mean()
    regimes[mask & ~high & sure] = Regime.LH
    regimes[mask & ~high & ~sure] = Regime.LL
    regimes[mask & high & (q_teacher >= q_student)] = Regime.HT
    regimes[mask & high & (q_teacher < q_student)] = Regime.HS
    return regimes


# ----------------------------------------------------------------------------------------------------- 7. recipes

class Row(NamedTuple):
    """How the tokens of one regime are supervised."""
    source: str                      # teacher, privileged_teacher or privileged_student
    objective: str                   # a key of DIVERGENCES
    support: str                     # full, top_k or sampled
    weight: float | str | Callable   # a number, the name of a flag, or a function of the scores: {policy: Scores} -> (N,)


class Scores(NamedTuple):
    """What a router sees of one policy."""
    logp: torch.Tensor               # (N,) of the sampled tokens
    entropy: torch.Tensor            # (N,) nats


def by_advantage_gap(scores: dict[str, Scores]) -> torch.Tensor:
    teacher, student = scores["privileged_teacher"].logp, scores["privileged_student"].logp
    return route(teacher, student, torch.ones_like(teacher, dtype=torch.bool))


@dataclass(frozen=True)
class Recipe:
    """A method: four rows, and the router that deals the tokens out to them. A regime without a row is not trained on."""
    rows: dict[Regime, Row]
    router: Callable = by_advantage_gap                                    # {policy: Scores} -> (N,) regimes
    router_reads: tuple = ("privileged_teacher", "privileged_student")

    @property
    def routes(self) -> bool:
        """Does it matter where a token goes?"""
        return len(self.rows) < len(Regime) or len(set(self.rows.values())) > 1

    @property
    def policies(self) -> list[str]:
        """Whom to ask about every token."""
        return sorted({row.source for row in self.rows.values()} | set(self.router_reads if self.routes else ()))


def uniform(*row) -> Recipe:
    return Recipe(dict.fromkeys(Regime, Row(*row)))


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
}


# -------------------------------------------------------------------------------------------------------- 8. loss
#
# From here on log-probs are (N, V): a tensor, or a TokenLogProbs that forms the rows it is asked for.

VALUES_AT_ONCE = 2**25               # of a vocabulary-wide tensor: bounds the memory whatever V is


def chunks(index: torch.Tensor, vocabulary: int):
    return index.split(max(1, VALUES_AT_ONCE // vocabulary))


@torch.no_grad()
def sampled_scores(logp, tokens: torch.Tensor) -> Scores:
    """The log-probs of the sampled tokens (N,), and the entropies (N,)."""
    of_tokens, entropies = [], []
    for index in chunks(torch.arange(len(tokens), device=tokens.device), logp.shape[1]):
        rows = logp[index]                                                # (n, V)
        of_tokens.append(rows.gather(1, tokens[index, None])[:, 0])
        entropies.append(-(rows.exp() * rows).sum(-1))
    return Scores(torch.cat(of_tokens), torch.cat(entropies))


def plan(recipe: Recipe, scores: dict[str, Scores], betas: dict[str, float], like: torch.Tensor):
    """The regime and the weight of every token, (N,) each: all that depends on the batch as a whole."""
    regimes = recipe.router(scores) if recipe.routes else torch.zeros_like(like)
    weights = torch.zeros(like.shape, device=like.device)
    for regime, row in recipe.rows.items():
        weight = row.weight(scores) if callable(row.weight) else betas.get(row.weight, row.weight)
        weights = torch.where(regimes == regime, weight, weights)
    return regimes, weights


def token_losses(row: Row, student: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor, top_k: int) -> torch.Tensor:
    """One row of a recipe for n of its tokens: log-probs (n, V), tokens (n,) -> (n,), nats, without the weight."""
    if row.support == "sampled":           # a surrogate: its gradient counts, its value is no divergence
        student, source = (logp.gather(1, tokens[:, None])[:, 0] for logp in (student, source))
        return SAMPLED_SCORES[row.objective](student, source).detach() * student
    if row.support == "top_k":
        student, source = top_k_with_tail(student, source, top_k)
    return DIVERGENCES[row.objective](student, source)


def recipe_loss(recipe: Recipe, student, sources: dict, tokens: torch.Tensor, regimes: torch.Tensor,
                weights: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of weight x loss over N tokens, and the loss of each, detached (N,). Only `student` gets a gradient."""
    losses, total = torch.zeros_like(weights), weights.new_zeros(())
    for regime, row in recipe.rows.items():
        for index in chunks((regimes == regime).nonzero()[:, 0], student.shape[1]):
            if not len(index):
                continue

            def supervised(index=index, row=row):
                with torch.no_grad():
                    source = sources[row.source][index]
                return token_losses(row, student[index], source, tokens[index], top_k)

            loss = checkpoint(supervised, use_reentrant=False)            # (n,): no (n, V) waits for the backward pass
            losses[index] = loss.detach()
            total = total + (weights[index] * loss).sum()
    return total, losses


def sequence_mean(mask: torch.Tensor) -> torch.Tensor:
    """The share (N,) of every token in a mean over the tokens of a completion, then over completions (1/|y|)."""
    lengths = mask.sum(1, keepdim=True)                                   # (B, 1)
    return (mask / lengths.clamp(min=1))[mask] / len(mask)


def distillation_loss(recipe: Recipe, student: torch.Tensor, sources: dict[str, torch.Tensor], tokens: torch.Tensor,
                      mask: torch.Tensor, *, top_k: int, **betas) -> torch.Tensor:
    """Any recipe in one call, for log-probs (B, T, V), tokens (B, T) and mask (B, T): a scalar, in nats."""
    sources = {name: logp[mask].detach() for name, logp in sources.items()}                  # (N, V)
    scores = {name: sampled_scores(sources[name], tokens[mask]) for name in recipe.policies}
    regimes, weights = plan(recipe, scores, betas, tokens[mask])
    return recipe_loss(recipe, student[mask], sources, tokens[mask], regimes, weights * sequence_mean(mask), top_k)[0]


def dopd_loss(student: torch.Tensor, privileged_teacher: torch.Tensor, privileged_student: torch.Tensor,
              tokens: torch.Tensor, mask: torch.Tensor, *, top_k: int, beta_light: float = 0.6, beta_weak: float = 0.3):
    """The loss of DOPD, to carry elsewhere: log-probs (B, T, V), tokens (B, T), mask (B, T) bool -> scalar, nats."""
    sources = {"privileged_teacher": privileged_teacher, "privileged_student": privileged_student}
    return distillation_loss(RECIPES["dopd"], student, sources, tokens, mask, top_k=top_k, beta_light=beta_light,
                             beta_weak=beta_weak)


# ---------------------------------------------------------------------------------------------------- 9. training

class Setup(NamedTuple):
    """What all trainings of a run share."""
    config: Config
    task: object
    tokenizer: PreTrainedTokenizerFast
    splits: dict[str, list[dict]]          # rows with "prompt_ids" and "hinted_ids"
    vocabulary: int                        # tokens that teacher and student share
    eos_ids: list[int]

    def rollout(self, policy: Policy, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = self.config.max_new_tokens or max(len(row["answer_ids"]) for row in rows) + 1
        return rollout(policy.model, self.prompts(policy, rows), longest, self.eos_ids)

    def prompts(self, policy: Policy, rows: list[dict]) -> list[list[int]]:
        return [row["hinted_ids" if policy.reads_hint else "prompt_ids"] for row in rows]

    def ask(self, policy: Policy, rows: list[dict], tokens: torch.Tensor, mask: torch.Tensor) -> TokenLogProbs:
        """The same completion tokens under one policy: only the prompt differs between the contexts."""
        return score(policy.model, self.prompts(policy, rows), tokens, mask, self.vocabulary)


class MasterAdamW:
    """AdamW on float32 copies of the weights: at lr 5e-6 a bfloat16 weight would round every step away."""

    def __init__(self, model, lr: float):
        self.weights = list(model.parameters())
        self.masters = [weight if weight.dtype != torch.bfloat16 else weight.detach().float().requires_grad_()
                        for weight in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr, weight_decay=0.0)

    def collect(self) -> None:
        """After the backward pass of a micro-batch: adds its gradient up in float32."""
        for weight, master in zip(self.weights, self.masters):
            if master is not weight:
                master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
                weight.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Returns the norm of the gradient before it is clipped to 1."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        for weight, master in zip(self.weights, self.masters):
            weight.copy_(master)
        return norm.item()


class MovingAverage:
    """A copy of a model whose weights follow it slowly; with decay 1 they never move."""

    def __init__(self, model, decay: float):
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay
        self.average = [weight.detach().float() for weight in self.model.parameters()]

    @torch.no_grad()
    def follow(self, masters: list[torch.Tensor]) -> None:
        for weight, average, master in zip(self.model.parameters(), self.average, masters):
            average.lerp_(master, 1 - self.decay)
            weight.copy_(average)


def cosine(step: int, steps: int, floor: float = 0.0) -> float:
    """From 1 at step 0 down to `floor` at the end."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


def distill_step(setup: Setup, recipe: Recipe, policies: dict[str, Policy], optimizer: MasterAdamW, rows: list[dict],
                 lr: float) -> dict:
    """One optimizer step on a batch of rows (method.md, "One training step"). Returns its metrics."""
    config, student = setup.config, policies["student"]
    rows = [row for row in rows for _ in range(config.rollouts)]
    size = config.micro_batch or len(rows)
    parts = []                                                            # micro-batches: (rows, tokens, mask)
    for part in (rows[i:i + size] for i in range(0, len(rows), size)):
        parts.append((part, *setup.rollout(student, part)))

    # First pass, without gradient: the thresholds of the router are averages over the whole batch.
    tokens = torch.cat([tokens[mask] for _, tokens, mask in parts])       # (N,)
    shares = torch.cat([sequence_mean(mask) * len(mask) / len(rows) for _, _, mask in parts])
    with torch.no_grad():
        sources = {name: TokenLogProbs.cat([setup.ask(policies[name], *part) for part in parts])
                   for name in recipe.policies}
        scores = {name: sampled_scores(logp, tokens) for name, logp in sources.items()} if recipe.routes else {}
        betas = {"beta_light": config.beta_light, "beta_weak": config.beta_weak}
        regimes, weights = plan(recipe, scores, betas, tokens)

    # Second pass, with gradient, one micro-batch after the other.
    losses, entropies, start = torch.zeros_like(weights), torch.zeros_like(weights), 0
    for part in parts:
        here = slice(start, start + int(part[2].sum()))
        student_logp = setup.ask(student, *part)
        loss, losses[here] = recipe_loss(
            recipe, student_logp, {name: logp.part(here.start, here.stop) for name, logp in sources.items()},
            tokens[here], regimes[here], weights[here] * shares[here], config.top_k)
        loss.backward()
        optimizer.collect()
        entropies[here] = sampled_scores(student_logp, tokens[here]).entropy
        start = here.stop

    metrics = {"loss": (losses * weights * shares).sum().item(), "entropy": entropies.mean().item(),
               "grad_norm": optimizer.step(lr), "lr": lr, "tokens": len(tokens),
               "truncated": 1 - torch.isin(tokens, torch.tensor(setup.eos_ids, device=tokens.device)).sum().item() / len(rows)}
    if recipe.routes:
        metrics["regime_share"] = {regime.name: (regimes == regime).float().mean().item() for regime in Regime}
        metrics["regime_loss"] = {regime.name: (losses * weights * shares)[regimes == regime].sum().item() for regime in Regime}
    if {"privileged_teacher", "privileged_student"} <= scores.keys():
        metrics["gap"] = advantage_gap(scores["privileged_teacher"].logp, scores["privileged_student"].logp).mean().item()
    return metrics


def batch(rows: list[dict], size: int, step: int, seed: int) -> list[dict]:
    """The rows of a step, in an order shuffled anew for every pass over the data. A function of the step alone, as
    every random choice in a training is: to go on after an interruption takes no state of a generator."""
    places = [divmod(i, len(rows)) for i in range(step * size, (step + 1) * size)]
    return [rows[shuffled(len(rows), seed, epoch)[i]] for epoch, i in places]


@lru_cache(maxsize=4)
def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(count), count)


def train(setup: Setup, name: str, recipe: Recipe, seed: int, student, teacher, folder: Path, log: "Log"):
    """Distils into `student`, in place; goes on from the last checkpoint in `folder` if there is one."""
    config = setup.config
    optimizer = MasterAdamW(student, config.lr)
    decay = {"live": None, "frozen": 1.0, "ema": config.ema_decay}[config.privileged_student]
    slow = MovingAverage(student, decay) if decay else None
    policies = {"student": Policy(student, False), "privileged_student": Policy(slow.model if slow else student, True),
                "teacher": Policy(teacher, False), "privileged_teacher": Policy(teacher, True)}
    done = load_checkpoint(folder, student, optimizer, slow)
    log.forget(name, seed, after=done)
    if done == 0:
        log.write(recipe=name, seed=seed, step=0, validation=evaluate(setup, policies["student"], "validation", seed))
    with tqdm(total=config.steps, initial=done, desc=f"{name}, seed {seed}", unit="step", file=sys.stdout) as bar:
        for step in range(done, config.steps):
            started = time.perf_counter()
            torch.manual_seed(1_000_003 * seed + step)
            lr = config.lr * cosine(step, config.steps, floor=0.1)
            metrics = distill_step(setup, recipe, policies, optimizer,
                                   batch(setup.splits["train"], config.batch_size, step, seed), lr)
            if slow:
                slow.follow(optimizer.masters)
            metrics["seconds"] = time.perf_counter() - started
            due = (step + 1) % config.eval_every == 0 or step + 1 == config.steps
            if due:
                metrics["validation"] = evaluate(setup, policies["student"], "validation", seed)
                bar.set_postfix(exact=f"{metrics['validation']['exact']:.2f}", refresh=False)
            log.write(recipe=name, seed=seed, step=step + 1, **metrics)
            if due:
                save_checkpoint(folder, step + 1, student, optimizer, slow, setup.tokenizer)
            bar.update()
    return policies


def save_checkpoint(folder: Path, step: int, student, optimizer: MasterAdamW, slow: MovingAverage | None, tokenizer):
    """A folder that plain transformers can load, and beside the model what training needs to go on."""
    with new_folder(folder / f"step-{step}") as fresh:
        student.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        torch.save({"adamw": optimizer.adamw.state_dict(), "masters": optimizer.masters,
                    "average": slow.average if slow else None}, fresh / "training.pt")
    for old in folder.glob("step-*"):
        if old.name != f"step-{step}":
            shutil.rmtree(old)


@torch.no_grad()
def load_checkpoint(folder: Path, student, optimizer: MasterAdamW, slow: MovingAverage | None) -> int:
    """Brings the newest checkpoint back; returns its step, 0 where there is none."""
    done = max((int(path.name.split("-")[1]) for path in folder.glob("step-*")), default=0)
    if done:
        state = torch.load(folder / f"step-{done}" / "training.pt", map_location=student.device, weights_only=True)
        optimizer.adamw.load_state_dict(state["adamw"])
        for weight, master, saved in zip(optimizer.weights, optimizer.masters, state["masters"]):
            weight.copy_(master.copy_(saved))
        if slow:
            for weight, average, saved in zip(slow.model.parameters(), slow.average, state["average"]):
                weight.copy_(average.copy_(saved))
    return done


@contextmanager
def new_folder(path: Path):
    """Fills a folder under another name first: it is there whole, or not at all."""
    fresh = path.with_name(path.name + ".writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(path, ignore_errors=True)
    fresh.rename(path)


def supervised(model, tokenizer, draw: Callable, steps: int, lr: float, label: str) -> None:
    """Supervised learning: every step `draw()` gives (prompt, completion) texts; only the completion is learned."""
    adamw = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in tqdm(range(steps), desc=label, unit="step", file=sys.stdout):
        prompts, completions = map(list, zip(*draw()))
        completions = [ids + [tokenizer.eos_token_id] for ids in tokenizer(completions).input_ids]
        tokens, mask = pad(completions, "right", model.device)
        logp = score(model, tokenizer(prompts).input_ids, tokens, mask, len(tokenizer))[:]            # (N, V)
        loss = -logp.gather(1, tokens[mask][:, None]).mean()
        adamw.param_groups[0]["lr"] = lr * cosine(step, steps)
        adamw.zero_grad()
        loss.backward()
        adamw.step()


def warm_start(task, role: str, config: Config, tokenizer, seed: int, held_out: set[str]):
    """The tiny teacher or student, taught by its author; kept in runs/warm_start under a hash of all that shaped it."""
    author = getattr(task, role)
    shaped_by = [inspect.getsource(part) for part in (type(task), warm_start, supervised, tiny_model)]
    key = repr((task, role, config.hint, config.hint_template, seed, sorted(held_out), shaped_by))
    folder = WARM_STARTS / f"{role}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.exists():
        try:
            return Qwen3ForCausalLM.from_pretrained(folder)
        except Exception as error:
            print(f"{folder}: damaged ({type(error).__name__}); the warm start is done again")
    rng = random.Random(f"{role}-{seed}")
    torch.manual_seed(seed)
    model = tiny_model(author, tokenizer)

    def draw():
        pairs = []
        while len(pairs) < 256:
            row = task.problem(rng)
            if row["prompt"] in held_out:
                continue
            form = config.hint if rng.random() < author.hinted else "none"
            doubtful = form != "none" and rng.random() < author.shuffled
            hint = (task.problem(rng) if doubtful else row)["hints"][form]
            prompt = with_hint({"prompt": row["prompt"], "hint": hint}, config.hint_template)
            pairs.append((prompt, task.solution(row, "none" if doubtful else form, author, rng)))
        return pairs

    supervised(model, tokenizer, draw, author.steps, 2e-3, f"warm start of the {role}, seed {seed}")
    with new_folder(folder) as fresh:
        model.save_pretrained(fresh)
    return model


# -------------------------------------------------------------------------------------------------- 10. evaluation

@torch.no_grad()
def evaluate(setup: Setup, policy: Policy, split: str, seed: int, samples: int = 4) -> dict:
    """By sampling, as deployed: the mean over `samples` completions of every prompt of a split.

    exact: share of correct completions that ended by themselves, among the prompts that can be solved without luck.
    by_kind: share of correct tokens of each kind. entropy: nats per token. nll: cross-entropy, nats, between the law of
    the tokens that the prompt leaves open and the policy; nll_best: the entropy of that law, which nobody can beat.
    """
    torch.manual_seed(seed)
    rows = [row for row in setup.splits[split][:setup.config.eval_prompts] for _ in range(samples)]
    size = setup.config.micro_batch or 1024
    exact, stopped, entropies, nll, nll_best, right = [], [], [], [], [], defaultdict(list)
    for part in (rows[i:i + size] for i in range(0, len(rows), size)):
        tokens, mask = setup.rollout(policy, part)
        logp = setup.ask(policy, part, tokens, mask)
        entropies += sampled_scores(logp, tokens[mask]).entropy.tolist()
        grades = []                                                       # of the N tokens; none for real models
        for row, ids in zip(part, (row_tokens[kept].tolist() for row_tokens, kept in zip(tokens, mask))):
            stopped.append(ids[-1] in setup.eos_ids)
            if row["reachable"]:
                text = setup.tokenizer.decode(ids, skip_special_tokens=True)
                exact.append(stopped[-1] and setup.task.check(row, text))
            grades += setup.task.grade(row, setup.tokenizer.convert_ids_to_tokens(ids))
        for grade in grades:
            right[grade.kind].append(grade.correct)
        lawful = [i for i, grade in enumerate(grades) if grade.law]
        for i, row_logp in zip(lawful, logp[torch.tensor(lawful, dtype=torch.long)]):
            shares = torch.tensor(list(grades[i].law.values()))
            ids = setup.tokenizer.convert_tokens_to_ids(list(grades[i].law))
            nll.append(-(shares * row_logp[ids].cpu()).sum().item())
            nll_best.append(-(shares * shares.log()).sum().item())
    return {"exact": mean(exact), "stopped": mean(stopped), "entropy": mean(entropies), "nll": mean(nll),
            "nll_best": mean(nll_best), "by_kind": {kind: mean(values) for kind, values in sorted(right.items())}}


def mean(values: list) -> float | None:
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------------------------------------------------ 11. report

COLOURS = {"LH": "#cfe8cf", "LL": "#dddddd", "HT": "#a9c8f5", "HS": "#ffc98a"}
ANSI = {"LH": "\033[42m", "LL": "\033[47m", "HT": "\033[44m", "HS": "\033[43m"}


class Log:
    """metrics.jsonl: a line per step of every training, and at the end a line per policy on the test split."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    break                  # a kill may leave half a line at the end

    def write(self, **row) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def forget(self, recipe: str, seed: int, after: int) -> None:
        """Drops what a training did beyond its last checkpoint."""
        self.rows = [row for row in self.rows if (row["recipe"], row["seed"]) != (recipe, seed)
                     or "step" in row and 0 < after and row["step"] <= after]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def has(self, recipe: str, seed: int) -> bool:
        return any((row["recipe"], row["seed"]) == (recipe, seed) and "test" in row for row in self.rows)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    fresh = path.with_name(path.name + ".writing")
    fresh.write_text(text)
    fresh.replace(path)


def mean_and_spread(values: list[float]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def table(log: Log) -> str:
    """The test split, a line per policy: mean and standard deviation over the seeds, in Markdown."""
    tests = defaultdict(list)
    for row in log.rows:
        if "test" in row:
            tests[row["recipe"]].append(row)
    kinds = sorted({kind for rows in tests.values() for row in rows for kind in row["test"]["by_kind"]})
    columns = {"exact match": lambda row: row["test"]["exact"],
               "with hint": lambda row: row["test_hinted"]["exact"],
               "ood": lambda row: row["ood"] and row["ood"]["exact"]}
    columns |= {kind: lambda row, kind=kind: row["test"]["by_kind"].get(kind) for kind in kinds}
    columns |= {"entropy": lambda row: row["test"]["entropy"], "nll": lambda row: row["test"]["nll"],
                "best nll": lambda row: row["test"]["nll_best"]}
    lines = [["policy", *columns], ["---"] * (1 + len(columns))]
    for name, rows in tests.items():
        lines.append([name, *(mean_and_spread([column(row) for row in rows]) for column in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def draw_curves(log: Log, path: Path) -> None:
    """Accuracy, entropy and regime shares over steps; the mean over the seeds, a band from the lowest to the highest."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def curve(axis, name, value, **style):
        points = defaultdict(list)
        for row in log.rows:
            if row["recipe"] == name and "step" in row and value(row) is not None:
                points[row["step"]].append(value(row))
        steps = sorted(points)
        if steps:
            line, = axis.plot(steps, [mean(points[step]) for step in steps], label=name, **style)
            axis.fill_between(steps, [min(points[step]) for step in steps], [max(points[step]) for step in steps],
                              color=line.get_color(), alpha=0.2, linewidth=0)

    names = list(dict.fromkeys(row["recipe"] for row in log.rows if "step" in row))
    routed = [name for name in names if any("regime_share" in row for row in log.rows if row["recipe"] == name)]
    figure, axes = pyplot.subplots(1, 2 + len(routed), figsize=(5 * (2 + len(routed)), 4), layout="constrained")
    for name in names:
        curve(axes[0], name, lambda row: row.get("validation", {}).get("exact"), marker=".")
        curve(axes[1], name, lambda row: row.get("entropy"))
    axes[0].set(title="exact match without the hint, validation", xlabel="step", ylim=(0, 1))
    axes[1].set(title="entropy of the student on its rollouts, nats", xlabel="step")
    axes[0].legend()
    for axis, name in zip(axes[2:], routed):
        shares = {regime.name: defaultdict(list) for regime in Regime}
        for row in log.rows:
            if row["recipe"] == name and "regime_share" in row:
                for regime, share in row["regime_share"].items():
                    shares[regime][row["step"]].append(share)
        steps = sorted(shares["LH"])
        axis.stackplot(steps, [[mean(by_step[step]) for step in steps] for by_step in shares.values()],
                       labels=list(shares), colors=[COLOURS[regime] for regime in shares])
        axis.set(title=f"{name}: share of tokens per regime", xlabel="step", ylim=(0, 1))
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def routed_rollouts(setup: Setup, policies: dict[str, Policy], seed: int, shown: int = 4) -> list[dict]:
    """A few completions of validation prompts, and what DOPD's router says of every token."""
    torch.manual_seed(seed)
    rows = setup.splits["validation"][:64]
    tokens, mask = setup.rollout(policies["student"], rows)
    teacher, student = (sampled_scores(setup.ask(policies[name], rows, tokens, mask), tokens[mask]).logp
                        for name in ("privileged_teacher", "privileged_student"))
    regimes = route(teacher, student, torch.ones_like(teacher, dtype=torch.bool))
    per_token = [{"token": setup.tokenizer.decode([token]), "regime": Regime(regime).name, "q_teacher": q_teacher,
                  "q_student": q_student, "gap": gap} for token, regime, q_teacher, q_student, gap in zip(
        tokens[mask].tolist(), regimes.tolist(), teacher.exp().tolist(), student.exp().tolist(),
        advantage_gap(teacher, student).tolist())]
    lengths = mask.sum(1).tolist()
    return [{"prompt": row["prompt"], "hint": row["hint"], "answer": row["answer"],
             "tokens": [per_token.pop(0) for _ in range(length)]} for row, length in zip(rows, lengths)][:shown]


def tokens_in_ansi(rollouts: list[dict]) -> str:
    lines = []
    for rollout_ in rollouts:
        coloured = "".join(f"{ANSI[token['regime']]}\033[30m{token['token']}\033[0m" for token in rollout_["tokens"])
        lines.append(f"  hint {rollout_['hint']!r}  {rollout_['prompt']}{coloured}   (reference {rollout_['answer']})")
    return "\n".join(lines)


def tokens_in_html(sections: dict[str, list[dict]]) -> str:
    """Every token in the colour of its regime; hover for q_T, q_S and the gap."""
    legend = {"LH": "low gap, both sure", "LL": "low gap, both unsure", "HT": "high gap, teacher surer",
              "HS": "high gap, student surer"}
    parts = ["<!doctype html><meta charset='utf-8'><title>DOPD: tokens by regime</title><style>",
             "body{font:15px/1.6 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}",
             "pre{white-space:pre-wrap;margin:.3em 0}span{padding:.1em .15em;border-radius:3px}",
             *(f".{regime}{{background:{colour}}}" for regime, colour in COLOURS.items()), "</style>",
             "<h1>Tokens by regime</h1><p>", *(f"<span class='{key}'>{key}: {text}</span> " for key, text in legend.items()),
             "</p><p>Hover a token for the probabilities of the two policies that read the hint, and their gap.</p>"]
    for title, rollouts in sections.items():
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for rollout_ in rollouts:
            spans = "".join(
                f"<span class='{token['regime']}' title='{token['regime']}  q_T {token['q_teacher']:.3f}  q_S "
                f"{token['q_student']:.3f}  A {token['gap']:.2f} nats'>{html.escape(token['token'])}</span>"
                for token in rollout_["tokens"])
            prompt, hint, answer = (html.escape(rollout_[name]) for name in ("prompt", "hint", "answer"))
            parts.append(f"<pre>hint {hint or '(none)'}   {prompt}{spans}   reference {answer}</pre>")
    return "\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------------------------- 12. main

def load_pair(config: Config):
    """Teacher and student from the Hugging Face hub or from disk, and the tokenizer they have to share."""
    tokenizers, pair = [], []
    for role in ("teacher", "student"):
        name = getattr(config, role)
        try:
            tokenizers.append(AutoTokenizer.from_pretrained(name))
            pair.append(AutoModelForCausalLM.from_pretrained(name))
        except Exception as error:
            raise InputError(f"--{role} {name}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    if tokenizers[0].get_vocab() != tokenizers[1].get_vocab():
        raise InputError(f"--teacher {config.teacher} --student {config.student}: different vocabularies "
                         f"({len(tokenizers[0])} and {len(tokenizers[1])} tokens); choose two that share a tokenizer")
    return tokenizers[1], *pair


def encode(setup: Setup, path: str, context: int) -> None:
    """Adds the token ids to every row, and refuses rows that do not fit the models."""
    def ids(texts):
        if setup.tokenizer.chat_template:      # thinking off, where the template knows it
            return setup.tokenizer.apply_chat_template(
                [[{"role": "user", "content": text}] for text in texts], add_generation_prompt=True, tokenize=True,
                return_dict=False, enable_thinking=False)
        return setup.tokenizer(texts).input_ids

    for split, rows in setup.splits.items():
        prompts, hinted = ids([row["prompt"] for row in rows]), ids([with_hint(row, setup.config.hint_template) for row in rows])
        answers = setup.tokenizer([row["answer"] for row in rows], add_special_tokens=False).input_ids
        for row, row["prompt_ids"], row["hinted_ids"], row["answer_ids"] in zip(rows, prompts, hinted, answers):
            grades = setup.task.grade(row, [*setup.tokenizer.convert_ids_to_tokens(row["answer_ids"]), EOS])
            row["reachable"] = all(grade.kind != "unlearnable" for grade in grades)
            length = len(row["hinted_ids"]) + (setup.config.max_new_tokens or len(row["answer_ids"]) + 1)
            if length > context:
                raise InputError(f"{path}, {split}, prompt {row['prompt'][:40]!r}: {length} tokens with the hint and the "
                                 f"completion, the models take {context}; shorten it or lower --max_new_tokens")
            if setup.tokenizer.unk_token_id is not None and setup.tokenizer.unk_token_id in row["hinted_ids"]:
                raise InputError(f"{path}, {split}, prompt {row['prompt'][:40]!r}: a character that the tokenizer lacks")


def prepare(config: Config, seed: int, task=None):
    """The setup, the teacher and the untrained student of one seed."""
    task = task or (Text() if config.teacher else TASKS[config.task])
    path = Path(config.data) if config.data else HERE / "tiny_tasks" / config.task
    if not config.data and not path.exists():
        write_task(task, path)
    splits = read_splits(path, config.hint)
    if config.teacher:
        tokenizer, teacher, student = load_pair(config)
    else:
        tokenizer = tiny_tokenizer()
        held_out = {row["prompt"] for split, rows in splits.items() if split != "train" for row in rows}
        teacher, student = (warm_start(task, role, config, tokenizer, seed, held_out) for role in ("teacher", "student"))
    for model in (teacher, student):
        model.to(config.device, getattr(torch, config.dtype)).eval()
    eos = student.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    vocabulary = min(model.get_input_embeddings().num_embeddings for model in (teacher, student))
    setup = Setup(config, task, tokenizer, splits, vocabulary, sorted(eos_ids))
    encode(setup, str(path), min(model.config.max_position_embeddings for model in (teacher, student)))
    return setup, teacher.requires_grad_(False), student


def run(config: Config, task=None) -> Log:
    """Every recipe from the same student, for every seed; then the report. All that happened is in the log."""
    folder, log = Path(config.out), None
    for seed in config.seeds:
        setup, teacher, untrained = prepare(config, seed, task)
        if log is None:                        # nothing is written before the input has proved good
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "config.json", json.dumps(asdict(config), indent=1) + "\n")
            log = Log(folder / "metrics.jsonl")
        before = {"student": Policy(untrained, False), "privileged_student": Policy(untrained, True),
                  "teacher": Policy(teacher, False), "privileged_teacher": Policy(teacher, True)}
        swapped = before | {"student": before["teacher"], "privileged_student": before["privileged_teacher"]}
        for name, policies in (("student before", before), ("teacher", swapped)):
            if not log.has(name, seed):
                log.write(recipe=name, seed=seed, **final_tests(setup, policies, seed))
        for name in config.recipe:
            if log.has(name, seed):
                continue
            student, place = copy.deepcopy(untrained), folder / f"{name}-seed{seed}"
            policies = train(setup, name, RECIPES[name], seed, student, teacher, place, log)
            with new_folder(place / "student") as fresh:
                student.save_pretrained(fresh)
                setup.tokenizer.save_pretrained(fresh)
            log.write(recipe=name, seed=seed, **final_tests(setup, policies, seed))
            shutil.rmtree(place / f"step-{config.steps}")
    report(log, folder)
    return log


def final_tests(setup: Setup, policies: dict[str, Policy], seed: int) -> dict:
    student, privileged = policies["student"], Policy(policies["student"].model, True)
    return {"test": evaluate(setup, student, "test", seed), "test_hinted": evaluate(setup, privileged, "test", seed),
            "ood": evaluate(setup, student, "ood", seed) if "ood" in setup.splits else None,
            "rollouts": routed_rollouts(setup, policies, seed)}


def report(log: Log, folder: Path) -> None:
    draw_curves(log, folder / "curves.png")
    sections = {f"{row['recipe']}, seed {row['seed']}": row["rollouts"] for row in log.rows if "test" in row}
    write_text(folder / "tokens.html", tokens_in_html(sections))
    write_text(folder / "report.md", table(log))
    for title, rollouts in sections.items():
        print(f"{title}\n{tokens_in_ansi(rollouts)}")
    print(f"\n{table(log)}")


class Help(HelpFormatter):
    """One spelling per flag, and its default behind the text."""

    def _get_help_string(self, action):
        shown = action.default not in (None, "", False, "==SUPPRESS==")
        text = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
        return action.help + (f" [{text}]" if shown else "")

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {'' if action.nargs in (0, '?') else self._format_args(action, 'X')}".rstrip()


class Parser(HfArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv: list[str]) -> Config:
    parser = Parser(Config, prog="dopd.py", usage="python dopd.py [--flag value ...]", description=__doc__.split("\n\n")[0],
                    formatter_class=lambda prog: Help(prog, max_help_position=30, width=110), allow_abbrev=False)
    config = Config(**vars(parser.parse_args(argv)))
    if config.resume:
        saved = Path(config.resume) / "config.json"
        if not saved.exists():
            raise InputError(f"--resume {config.resume}: no run there (it has no config.json)")
        return Config(**json.loads(saved.read_text()))
    config.hint_template = config.hint_template or ("{prompt}\n\nHint: {hint}" if config.teacher else "{hint}|{prompt}")
    config.max_new_tokens = config.max_new_tokens or (512 if config.teacher else 0)
    if config.out and (Path(config.out) / "config.json").exists():
        raise InputError(f"--out {config.out}: holds a run already; take another folder, or --resume {config.out}")
    elif not config.out:
        name = Path(config.data).stem if config.data else f"{config.task}-{config.hint}"
        taken = [path.name for path in Path("runs").glob(f"{name}*")]
        config.out = f"runs/{name}" if name not in taken else f"runs/{name}-{len(taken) + 1}"
    return config


def main(argv: list[str]) -> int:
    started = time.perf_counter()
    datasets.disable_progress_bars()
    try:
        config = parse(argv)
        if config.write_tasks:
            for name, task in TASKS.items():
                write_task(task, HERE / "tiny_tasks" / name)
            return 0
        run(config)
    except InputError as error:
        print(f"dopd.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; python dopd.py --resume {config.out} goes on from the last checkpoint", file=sys.stderr)
        return 130
    print(f"{time.perf_counter() - started:.0f} seconds; everything is in {config.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
