"""Whole runs: what they leave behind, going on after a kill, real checkpoints, several processes, memory, bad input."""

import copy
import errno
import html.parser
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # before transformers comes in; a missing checkpoint is no download

import datasets
import matplotlib.image
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)

import dopd

HERE = Path(__file__).resolve().parent
DRAW_CURVES = dopd.draw_curves
SMALL = "--batch_size 4 --rollouts 2 --eval_every 2 --eval_prompts 4 --steps 6 --data rows "


# ------------------------------------------------------------------------------------------------------- helpers

def shrink() -> None:
    """Policies of the two tasks that are warm in a tenth of a second; the teacher is not the student's twin."""
    for name in dopd.TASKS:
        task = dopd.TASKS[name]
        dopd.TASKS[name] = replace(task, teacher=replace(task.teacher, width=32, layers=2, steps=5),
                                   student=replace(task.student, width=32, layers=1, steps=5))


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path_factory):
    """Every test in an empty folder of its own, with small tasks, and `rows/`, a folder of splits of `rules`."""
    folder = tmp_path_factory.mktemp("cwd")       # not tmp_path: its name would hold the name of the test
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(dopd, "TASKS", dict(dopd.TASKS))
    monkeypatch.setattr(dopd, "draw_curves", lambda *args: None)         # half of the time of a small run
    shrink()
    dopd.write_task(dopd.TASKS["rules"], Path("rows"), train=32, held_out=8)


def go(flags: str) -> int:
    return dopd.main(flags.split())


def go_until(step: int, flags: str, monkeypatch) -> int:
    """The run, with a Ctrl-C before this step is logged."""
    write = dopd.Log.write

    def interrupted(log, **row):
        if row.get("step") == step:
            signal.raise_signal(signal.SIGINT)
        write(log, **row)

    with monkeypatch.context() as patch:
        patch.setattr(dopd.Log, "write", interrupted)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return go(flags)
        finally:
            signal.signal(signal.SIGINT, handler)


def start(flags: str, code: str = "", **env) -> subprocess.Popen:
    """`python dopd.py` in a process of its own, with the small tasks, after some other code."""
    code = f"import os, sys, dopd, {Path(__file__).stem} as tests; tests.shrink()\n{code}\nsys.exit(dopd.main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *flags.split()], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(HERE)} | env)


def rows_of(folder: str) -> list[dict]:
    """All that a run measured, but for the time it took."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def numbers(value):
    """Every number in a row of metrics."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def files() -> set[Path]:
    """What lies in the working folder, but for caches."""
    return {path for path in Path().rglob("*") if path.parts[0] != "cache" and path.parts[:2] != ("runs", "warm_start")}


class Spans(html.parser.HTMLParser):
    """The (title, text) of every span with a title; all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.spans, self.tags, self.title, self.text = [], set(), None, ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.title, self.text = dict(attributes).get("title"), ""

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        if tag == "span" and self.title:
            self.spans.append((self.title, self.text))
        self.title = None


# ------------------------------------------------------------------------------------- a run, and what it leaves

def test_a_run_of_every_recipe(monkeypatch, capsys):
    monkeypatch.setattr(dopd, "draw_curves", DRAW_CURVES)
    assert go(f"{SMALL} --steps 20 --eval_every 10 --out run --recipe {' '.join(dopd.RECIPES)}") == 0
    assert "run/" in capsys.readouterr().out
    rows, config = rows_of("run"), json.loads(Path("run/config.json").read_text())
    assert config["steps"] == 20 and config["recipe"] == list(dopd.RECIPES)

    for name, recipe in dopd.RECIPES.items():
        steps = [row for row in rows if row["recipe"] == name and row.get("step")]
        assert [row["step"] for row in steps] == list(range(1, 21))
        assert [row["step"] for row in steps if "validation" in row] == [10, 20]
        for row in steps:
            assert {"loss", "entropy", "grad_norm", "lr", "regime_share", "regime_loss", "truncated"} <= row.keys()
            assert all(map(math.isfinite, numbers(row))) and row["grad_norm"] > 0
            assert len(row["regime_share"]) == len(row["regime_loss"]) == len(recipe.rows)
            assert sum(row["regime_share"].values()) == pytest.approx(1)
            assert sum(row["regime_loss"].values()) == pytest.approx(row["loss"], abs=1e-6)
            assert ("gap" in row) == ({"privileged_teacher", "privileged_student"} <= set(recipe.router_reads))
        assert steps[0]["lr"] == pytest.approx(1e-4) and 1e-5 < steps[-1]["lr"] < 1.1e-5        # cosine, to a tenth
    assert all("seconds" in json.loads(line) for line in Path("run/metrics.jsonl").open() if '"loss"' in line)

    tests = [row for row in rows if "test" in row]
    assert [row["recipe"] for row in tests] == ["student before", "teacher", *dopd.RECIPES]
    for row in tests:
        assert {"exact", "entropy", "nll", "nll_best", "by_kind"} <= row["test"].keys()
        assert {"recall", "execute", "unlearnable"} <= row["test"]["by_kind"].keys()
        assert row["test"]["nll"] > row["test"]["nll_best"] == pytest.approx(1.28, abs=0.01)

    image = matplotlib.image.imread("run/curves.png")
    assert image.shape[0] > 300 and image.shape[1] > 900 and image.std() > 0.05
    spans = Spans(Path("run/tokens.html").read_text()).spans
    tokens = [token for row in tests for shown in row["rollouts"] for token in shown["tokens"]]
    assert [text for _, text in spans] == [token["token"] for token in tokens]
    for (title, _), token in zip(spans, tokens):
        q_teacher, q_student, gap = map(float, re.search(r"q_T ([\d.]+).*q_S ([\d.]+).*A ([\d.]+)", title).groups())
        assert token["regime"] in title and q_teacher == pytest.approx(token["q_T"], abs=1e-3)
        assert gap == pytest.approx(abs(math.log(token["q_T"] / token["q_S"])), abs=0.01)
    report = Path("run/report.md").read_text()
    assert all(f"| {name} |" in report for name in dopd.RECIPES)

    # Plain transformers loads the student, which still answers; nothing else is left of the training.
    assert not list(Path("run").glob("*/step-*")) and not list(Path("run").rglob("*.writing"))
    folder = Path("run/dopd-seed0/student")
    tokenizer, student = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert student.dtype == torch.float32
    prompt = tokenizer("7fbk=", return_tensors="pt")
    answer = student.generate(input_ids=prompt.input_ids, max_new_tokens=7, min_new_tokens=2)
    assert len(tokenizer.decode(answer[0, prompt.input_ids.shape[1]:])) >= 2


# ---------------------------------------------------------------------------------------- the same again, going on

ONE = f"{SMALL} --recipe dopd"
FOUR = f"{SMALL} --recipe vanilla dopd --seeds 0 1 --privileged_student ema --ema_decay 0.9"


@pytest.fixture(scope="module")
def uninterrupted():
    """The rows of an undisturbed run, by its flags: run once, in the folder of whoever asks first."""
    done = {}

    def rows(flags: str) -> list[dict]:
        if flags not in done:
            assert go(f"{flags} --out undisturbed") == 0
            done[flags] = rows_of("undisturbed")
            shutil.rmtree("undisturbed")
        return done[flags]
    return rows


def test_the_same_seed_gives_the_same_numbers(uninterrupted):
    rows = uninterrupted(ONE)
    torch.manual_seed(99)                         # nothing hangs on the generator's state at the start
    assert go(f"{ONE} --seeds 1 0 --out again") == 0
    again = {seed: [row for row in rows_of("again") if row["seed"] == seed] for seed in (0, 1)}
    assert again[0] == rows                       # nor on what was trained before
    losses = [[row["loss"] for row in of_seed if "loss" in row] for of_seed in again.values()]
    assert len(losses[1]) == 6 and not set(losses[0]) & set(losses[1])


DIE = """
step, taken = dopd.Trainee.step, []
def die_once(trainee, lr):
    taken.append(step(trainee, lr))
    if len(taken) == 12 + 8:
        os.kill(os.getpid(), 9)
dopd.Trainee.step = die_once
"""


def test_going_on_after_a_kill(uninterrupted):
    """kill -9 in the eighth step of the second of four trainings, three steps beyond a checkpoint."""
    flags = f"{FOUR} --steps 12 --eval_every 5"
    process = start(f"{flags} --out run", DIE)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert [row.get("step") for row in rows_of("run") if row["recipe"] == "dopd"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert go("--resume run") == 0
    assert rows_of("run") == uninterrupted(flags)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", range(0, 40, 4))
def test_a_kill_at_any_change_of_the_disk(moment, monkeypatch, uninterrupted):
    rows = uninterrupted(ONE)
    shutil.rmtree("runs", ignore_errors=True)     # so that the warm start is among what is cut short
    count = itertools.count()
    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (dopd, "save_model"),
                            (dopd.Log, "write")):
            def change(*args, original=getattr(owner, name), name=name, **kwargs):
                if next(count) == moment:
                    if name == "write":           # half a line has reached the disk
                        args[0].path.open("a").write('{"recipe": "dopd", "seed": 0, "st')
                    raise Killed
                return original(*args, **kwargs)
            patch.setattr(owner, name, change)
        with pytest.raises(Killed):
            go(f"{ONE} --out run")
    assert go("--resume run" if Path("run/config.json").exists() else f"{ONE} --out run") == 0
    assert rows_of("run") == rows and not list(Path("run").rglob("step-*"))


def test_going_on_after_ctrl_c(monkeypatch, capsys, uninterrupted):
    rows = uninterrupted(ONE)
    assert go_until(5, f"{ONE} --out run", monkeypatch) == 130
    command = re.search(r"python dopd.py (.*)", capsys.readouterr().err.splitlines()[-1]).group(1)
    assert command == "--resume run" and go(command) == 0
    assert rows_of("run") == rows


def test_ctrl_c_before_there_is_a_run(monkeypatch, capsys):
    """No command is named that would not work."""
    monkeypatch.setattr(dopd, "tqdm", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert go(f"{ONE} --out run") == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    errors = capsys.readouterr().err
    assert "interrupted" in errors and "--resume" not in errors and not Path("run").exists()


def test_half_a_line_of_an_evaluation():
    assert go(f"{SMALL} --eval_only --out run") == 0
    log, whole = Path("run/metrics.jsonl"), rows_of("run")
    log.write_text(log.read_text()[:-99])
    assert go("--resume run") == 0 and rows_of("run") == whole


def test_prompts_that_take_luck(monkeypatch):
    """Where no validation prompt can be known there is no accuracy to log or to draw, but a run."""
    monkeypatch.setattr(dopd, "draw_curves", DRAW_CURVES)
    write_lines("wild.jsonl", *[{"prompt": "3k=", "hint": "4", "answer": "47"}] * 9)
    assert go(f"{SMALL} --data wild.jsonl --recipe dopd --out run") == 0
    assert all(row["validation"]["exact"] is None for row in rows_of("run") if "validation" in row)


def test_warm_starts_are_kept(monkeypatch, capsys):
    config = dopd.parse(f"{SMALL} --out run".split())
    first = dopd.prepare(config, 0)[1:]

    def unwanted(*args, **kwargs):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", unwanted)
        again = dopd.prepare(config, 0)[1:]
        for model, kept in zip(first, again):
            assert all(map(torch.equal, model.state_dict().values(), kept.state_dict().values()))
            assert all(weight.grad is None for weight in model.parameters())
        patch.setitem(dopd.TASKS, "rules", replace(dopd.TASKS["rules"], student=dopd.Author(32, 1, 5, 0.5)))
        for other in (config, replace(config, hint="answer")):           # another author, other hints: not the same
            with pytest.raises(AssertionError, match="trained again"):
                dopd.prepare(other, 0)
    folder = next(Path("runs/warm_start").glob("student-*"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])                     # a disk that was full once
    capsys.readouterr()
    rebuilt = dopd.prepare(config, 0)[2]
    output = "".join(capsys.readouterr())
    assert str(folder) in output and "damaged" in output
    assert all(map(torch.equal, first[1].state_dict().values(), rebuilt.state_dict().values()))
    dopd.AutoModelForCausalLM.from_pretrained(folder)                    # and the cache is whole again


def test_who_reads_the_hint():
    """live: the student itself; frozen: its first weights for ever; ema: decay x before + (1 - decay) x student."""
    for kind in ("live", "frozen", "ema"):
        config = dopd.parse(f"{SMALL} --dtype float64 --lr 0.01 --privileged_student {kind} --ema_decay 0.7".split())
        setup, teacher, student = dopd.prepare(config, 0)
        trainee = dopd.Trainee(student, teacher, config)
        reader = trainee.policies["privileged_student"].model
        assert trainee.policies["privileged_student"].reads_hint and not trainee.policies["student"].reads_hint
        assert (reader is student) == (kind == "live")
        first = expected = [weight.clone() for weight in student.parameters()]
        for step in (1, 2, 3):
            dopd.distill_step(setup, dopd.RECIPES["dopd"], trainee, setup.splits["train"][:4], 0.01, (0, step))
            expected = [0.7 * before + 0.3 * weight for before, weight in zip(expected, student.parameters())]
        wanted = {"live": list(student.parameters()), "frozen": first, "ema": expected}[kind]
        for weight, right, start in zip(reader.parameters(), wanted, first):
            torch.testing.assert_close(weight, right, rtol=0, atol=1e-12)
            assert kind == "frozen" or not torch.equal(weight, start)


# ------------------------------------------------------------------- micro-batches, processes, memory, what is no number

def canned(model, prompts, max_new_tokens, eos_ids, vocabulary=None):
    """A rollout that depends on nothing but each prompt, so that the same one gets the same in any micro-batch."""
    completions = []
    for prompt in prompts:
        rng = random.Random(repr(prompt))
        completion = [rng.randrange(3, 29) for _ in range(rng.randint(2, max_new_tokens))]
        completions.append(completion if len(prompt) > 5 else completion + [eos_ids[0]])     # the longer never stop
    return dopd.pad(completions, "right", "cpu")


def gradients(flags: str, recipe: str, monkeypatch) -> tuple:
    """One step on canned completions of prompts of two lengths, in float64: gradients, metrics, regimes."""
    config = dopd.parse(f"{SMALL} --dtype float64 --batch_size 8 --rollouts 1 --max_new_tokens 8 {flags}".split())
    setup, teacher, untrained = dopd.prepare(config, 0)
    student = copy.deepcopy(untrained)            # as every training takes it
    taken, routed, route = [], [], dopd.route
    with monkeypatch.context() as patch:
        patch.setattr(dopd, "rollout", canned)
        patch.setattr(dopd, "route", lambda *args: routed.append(route(*args)) or routed[-1])
        patch.setattr(dopd.Trainee, "step", lambda self, lr: taken.extend(
            weight.grad.clone() for weight in self.student.parameters()))
        calls = []
        student.model.layers[0].self_attn.register_forward_pre_hook(lambda *args: calls.append(student.training))
        rows = setup.splits["train"][:5] + setup.splits["ood"][:3]
        metrics = dopd.distill_step(setup, dopd.RECIPES[recipe], dopd.Trainee(student, teacher, config), rows, 1e-4,
                                    (0, 1))
    assert len(taken) == len(list(student.parameters())) and not student.training
    return taken, metrics, routed, len(calls)


def assert_same_gradients(some, others):
    for one, other in zip(some, others):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * one.abs().max().item())


@pytest.mark.parametrize("recipe", dopd.RECIPES)
def test_micro_batches_change_nothing(recipe, monkeypatch):
    whole, metrics, routed, _ = gradients("--micro_batch 0", recipe, monkeypatch)
    assert metrics["truncated"] == 0.375          # 3 of the 8 prompts are longer
    for size in (1, 3):
        parts, metrics_of_parts, routed_in_parts, _ = gradients(f"--micro_batch {size}", recipe, monkeypatch)
        assert len(routed) == len(routed_in_parts) == (recipe == "dopd")
        assert all(map(torch.equal, routed, routed_in_parts))
        assert_same_gradients(whole, parts)
        assert numbers(metrics) == pytest.approx(numbers(metrics_of_parts), rel=1e-5, abs=1e-8)


def test_the_longest_completion_is_the_same_in_every_micro_batch(monkeypatch):
    write_lines("mixed.jsonl", *[{"prompt": prompt, "hint": "", "answer": answer} for prompt, answer in (
        ("3a=", "36"), ("3ab=", "3673"), ("3abc=", "367314"))] * 4)
    config = dopd.parse(f"{SMALL} --data mixed.jsonl --micro_batch 1".split())
    setup, teacher, student = dopd.prepare(config, 0)
    limits, rollout = [], dopd.rollout
    monkeypatch.setattr(dopd, "rollout", lambda *args: limits.append(args[2]) or rollout(*args))
    dopd.distill_step(setup, dopd.RECIPES["dopd"], dopd.Trainee(student, teacher, config), setup.splits["train"], 1e-4,
                      (0, 1))
    assert len(limits) > 8 and set(limits) == {7}


def test_gradient_checkpointing_changes_nothing_but_the_work(monkeypatch):
    stored, _, _, calls = gradients("--micro_batch 3", "dopd", monkeypatch)
    again, _, _, more_calls = gradients("--micro_batch 3 --gradient_checkpointing", "dopd", monkeypatch)
    assert_same_gradients(stored, again)
    assert more_calls == calls + 3                # every micro-batch goes twice through a layer


def test_a_micro_batch_without_a_supervised_token(monkeypatch):
    """A recipe may leave regimes out; a micro-batch in which no token is trained on has a gradient of zero."""
    only = dopd.Recipe({dopd.Regime.HT: dopd.RECIPES["dopd"].rows[dopd.Regime.HT]})
    monkeypatch.setitem(dopd.RECIPES, "only", only)
    monkeypatch.setattr(dopd, "route", lambda teacher, student, mask: torch.where(
        torch.arange(len(mask)) < 3, dopd.Regime.HT, dopd.Regime.HS))
    whole, *_ = gradients("--micro_batch 0", "only", monkeypatch)
    parts, *_ = gradients("--micro_batch 1", "only", monkeypatch)
    assert_same_gradients(whole, parts)


def test_two_processes_do_what_one_does():
    flags = f"{SMALL} --recipe dopd vanilla --micro_batch 2"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(f"{flags} --out two", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                  MASTER_PORT=str(port)) for rank in (0, 1)]
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert go(f"{flags} --out one") == 0
    rows, expected = rows_of("two"), rows_of("one")
    assert [row.keys() for row in rows] == [row.keys() for row in expected]                  # each row once
    for row, right in zip(rows, expected):
        assert numbers(row) == pytest.approx(numbers(right), rel=1e-4, abs=1e-5)
    for name in ("dopd", "vanilla"):
        models = [AutoModelForCausalLM.from_pretrained(f"{out}/{name}-seed0/student") for out in ("one", "two")]
        for one, two in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


MEMORY = """
import resource, torch, dopd
from transformers import Qwen3Config, Qwen3ForCausalLM
V, B, T = 151_936, 8, 40
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def model(): return Qwen3ForCausalLM(Qwen3Config(
    vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)).eval()
student, teacher = model(), model().requires_grad_(False)
ids = torch.randint(3, V, (B, 4 + T))
before = peak()
logits = student(input_ids=ids[:, :-1]).logits[:, 3:]
torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten()).backward()
plain = peak() - before
del logits
student.zero_grad()
dopd.rollout = lambda *args, **kwargs: (ids[:, 4:], torch.ones(B, T, dtype=torch.bool))
dopd.Trainee.step = lambda *args: None
config = dopd.Config(batch_size=B, rollouts=1, top_k=128, max_new_tokens=T)
rows = [{"prompt": "", "prompt_ids": row[:4].tolist(), "hinted_ids": row[:4].tolist()[::-1]} for row in ids]
setup = dopd.Setup(config=config, task=None, tokenizer=None, splits={}, vocabulary=V, eos_ids=[0])
dopd.distill_step(setup, dopd.RECIPES["dopd"], dopd.Trainee(student, teacher, config), rows, 1e-4, (0, 1))
print(plain / 1024, (peak() - before) / 1024)
"""


def test_memory_of_a_loss_step_at_a_real_vocabulary():
    """At most 1.5 x a plain forward and backward of the student alone: no (B, T, V) tensor of its three sources."""
    output, errors = start("", MEMORY + "sys.exit()").communicate()
    assert output, errors
    plain, with_dopd = map(float, output.split())
    assert plain > 600                            # MB: it has the logits (B, T, V) and their gradient
    assert with_dopd <= 1.5 * plain


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run(broken, monkeypatch, capsys, uninterrupted):
    rows, seen, write, divergence = uninterrupted(ONE), [], dopd.Log.write, dopd.reverse_kl

    def poisoned(student, source):
        loss = divergence(student, source)        # the root of zero is zero, and infinitely steep there
        return loss if 5 not in seen else loss * math.nan if broken == "loss" else loss + (0 * loss).sqrt()

    with monkeypatch.context() as patch:
        patch.setattr(dopd.Log, "write", lambda log, **row: seen.append(row.get("step")) or write(log, **row))
        patch.setitem(dopd.DIVERGENCES, "reverse_kl", poisoned)
        capsys.readouterr()
        assert go(f"{ONE} --out run") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "step 6" in message and "not finite" in message and "run/dopd-seed0/not_finite.json" in message
    saved = json.loads(Path("run/dopd-seed0/not_finite.json").read_text())
    prompts = [json.loads(line)["prompt"] for line in Path("rows/train.jsonl").open()]
    assert saved["step"] == 6 and set(saved["prompts"]) <= set(prompts) and len(set(saved["prompts"])) == 4
    AutoModelForCausalLM.from_pretrained("run/dopd-seed0/step-4")
    assert go("--resume run") == 0 and rows_of("run") == rows


# -------------------------------------------------------------------------------------------------- real checkpoints

TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}"
            "{% endif %}")
REAL = "--data sums.jsonl --steps 3 --batch_size 4 --rollouts 2 --micro-batch 3 --eval_every 2 --eval_prompts 4 "


def write_lines(file: str, *rows: dict) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def bpe(sentences: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level, as Qwen's; the pad token is the EOS token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(sentences, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>",
                                   chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """teacher/ and student/: two Qwen3 of different sizes, one tokenizer of 300 words, tables of 320 and 352 rows."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = bpe(["What is three plus four? Count on from three: four, five, six, seven. The answer is seven."], 300)
    assert len(tokenizer) == 300
    for role, width, height in (("teacher", 48, 320), ("student", 32, 352)):
        torch.manual_seed(width)
        model = Qwen3ForCausalLM(Qwen3Config(
            vocab_size=height, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False))
        model.generation_config = GenerationConfig(     # samples its own way, and stops at either of two tokens
            do_sample=True, temperature=0.1, top_k=1, min_p=0.9, eos_token_id=[2, 0], pad_token_id=0)
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder


def sums(form: str) -> list[dict]:
    hints = [f"count on from {i}" for i in range(12)]
    return [{"prompt": f"What is {i} plus 4? <script>alert('{i}')</script>", "answer": "",
             **({"hint": hint} if form == "hint" else {"hints": {"steps": hint, "answer": str(i + 4)}})}
            for i, hint in enumerate(hints)]


@pytest.mark.parametrize("form, flags", [
    ("hint", "--recipe vanilla dopd --dtype bfloat16 --gradient_checkpointing --lr 5e-6 --answer-regex never(.)seen"),
    ("hints", "--recipe dopd --privileged_student ema --hint steps --lr 5e-6 --answer-regex never(.)seen")])
def test_real_checkpoints(form, flags, checkpoints, monkeypatch, capsys):
    teacher, student = checkpoints / "teacher", checkpoints / "student"
    write_lines("sums.jsonl", *sums(form))
    flags = f"{REAL} {flags} --teacher {teacher} --student {student} --max-new-tokens 16 --hint-template {{prompt}}({{hint}})"

    setup, _, _ = dopd.prepare(dopd.parse(flags.split()), 0)
    row = setup.splits["train"][0]
    said = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think></think>"
    assert setup.tokenizer.decode(row["prompt_ids"]) == said.format(row["prompt"])
    assert setup.tokenizer.decode(row["hinted_ids"]) == said.format(f"{row['prompt']}({row['hint']})")
    assert row["hint"].startswith("count on from") and setup.eos_ids == [0, 2]
    tokens, mask = dopd.rollout(AutoModelForCausalLM.from_pretrained(student), [row["prompt_ids"]] * 64, 16,
                                setup.eos_ids, setup.vocabulary)
    assert len(set(tokens[:, 0].tolist())) > 32   # top_k, min_p and temperature have no say
    assert tokens[mask].max() < 300               # no row of an embedding table that spells no token

    assert go(f"{flags} --out whole") == 0
    assert go_until(3, f"{flags} --out run", monkeypatch) == 130 and go("--resume run") == 0
    rows = rows_of("run")
    assert rows == rows_of("whole")
    for step in (row for row in rows if row.get("step")):
        assert all(map(math.isfinite, numbers(step))) and sum(step["regime_share"].values()) == pytest.approx(1)
        assert 0 < step["truncated"] <= 1 and step["tokens"] >= 16 * 8 * step["truncated"] + 8 * (1 - step["truncated"])
    for test in (row["test"] for row in rows if "test" in row):
        assert test["exact"] == test["stopped"] < 1    # an empty answer is found in all of them, but one cut off is wrong
    page = Spans(Path("run/tokens.html").read_text())
    assert "script" not in page.tags and len(page.spans) > 16

    # At this learning rate a weight kept in bfloat16 would stay where it was: a float32 one moves.
    trained, before = (AutoModelForCausalLM.from_pretrained(place) for place in ("run/dopd-seed0/student", student))
    assert trained.dtype == torch.float32 and trained.config.vocab_size == 352
    moved = [(one != two).float().mean().item() for one, two in zip(trained.parameters(), before.parameters())]
    assert sum(moved) / len(moved) > 0.8
    tokenizer = AutoTokenizer.from_pretrained("run/dopd-seed0/student")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 3 plus 4?"}], tokenize=True,
                                           add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert trained.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]

    # Any checkpoint can be evaluated alone, on all rows of a file.
    sizes, evaluate = [], dopd.evaluate
    monkeypatch.setattr(dopd, "evaluate", lambda setup, *args: sizes.append(len(setup.splits["test"])) or evaluate(
        setup, *args))
    assert go("--eval_only --student run/dopd-seed0/student --data sums.jsonl --max_new_tokens 16 --out alone") == 0
    assert set(sizes) == {12}
    alone = rows_of("alone")
    assert all({"test", "test_hinted"} <= row.keys() and 0 <= row["test"]["exact"] <= 1 for row in alone)
    assert "| with hint |" in Path("alone/report.md").read_text()


# --------------------------------------------------------------------------------------------------------- bad input

def test_a_full_disk(monkeypatch, capsys, uninterrupted):
    """A limit on the size of a file, as a full disk, fails a write in its middle: of the log, of a checkpoint."""
    rows = uninterrupted(ONE)
    assert go(f"{ONE} --steps 1 --out warm") == 0
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, file in ((8_000, "run"), (30_000, "step-2"), (80_000, "step-2")):   # weights, then optimizer
        shutil.rmtree("run", ignore_errors=True)
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            assert go(f"{ONE} --out run") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        message = capsys.readouterr().err.splitlines()[-1]
        assert file in message and re.search("(?i)too large|cannot be written", message) and "None" not in message
        assert not list(Path("run").rglob("*.writing")) and not list(Path("run").rglob("step-*"))
        assert go("--resume run") == 0 and rows_of("run") == rows


RULES = {"prompt": "3a=", "hint": "3", "answer": "36"}        # a problem of one rule, which the tiny tokenizer can spell
FILES = {                                                     # text of a file: which row is bad
    "empty": "", "blank": "\n\n", "text": "hello\n", "array": json.dumps([RULES, RULES]) + "\n", "null": "null\n",
    "cut": json.dumps(RULES) + "\n" + json.dumps(RULES)[:-5] + "\n",
    **{name: "".join(json.dumps(row) + "\n" for row in [RULES, RULES, RULES, bad]) for name, bad in {
        "a_list": ["3a=", "3", "36"], "no_prompt": {"hint": "3", "answer": "36"},
        "no_answer": {"prompt": "3a=", "hint": "3"}, "no_hint": {"prompt": "3a=", "answer": "36"},
        "number": RULES | {"prompt": 3}, "answers": RULES | {"answer": ["36"]}, "null_answer": RULES | {"answer": None},
        "null_hint": RULES | {"hint": None}, "other_form": {"prompt": "3a=", "hints": {"answer": "6"}, "answer": "36"},
        "hint_object": RULES | {"hint": {"steps": "3"}}, "no_words": RULES | {"prompt": ""},
        "strange": RULES | {"prompt": "3ä="}, "strange_answer": RULES | {"answer": "3Ä"},
        "surrogate": RULES | {"prompt": "3\ud83d="}, "long": RULES | {"prompt": "3" + "a" * 150 + "="}, "no_problem": RULES | {"prompt": "=", "answer": "363636"},
    }.items()}}
PAIR, TINY = "--teacher M/teacher --student M/student --data good.jsonl", "--data good.jsonl"
BAD = [                                                       # flags, and what the line says
    ("--learning 1", "--learning"), ("--steps", "--steps"), ("--steps two", "--steps two"), ("stray", "stray"),
    ("--steps 0", "--steps 0"), ("--batch_size 0", "--batch_size 0"), ("--rollouts -1", "--rollouts -1"),
    ("--micro_batch -1", "--micro_batch -1"), ("--lr 0", "--lr 0"), ("--lr nan", "--lr nan"),
    ("--lr inf", "--lr inf"), ("--top_k 0", "--top_k 0"), ("--beta_light -1", "--beta_light -1"),
    ("--beta_weak nan", "--beta_weak nan"), ("--ema_decay 1.1", "--ema_decay 1.1"),
    ("--max_new_tokens -1", "--max_new_tokens -1"), ("--eval_every 0", "--eval_every 0"),
    ("--eval_prompts 0", "--eval_prompts 0"), (f"{TINY} --steps 1 --seeds {2 ** 70}", "--seeds"),
    (f"{TINY} --steps 1 --seeds 0 0", "--seeds"), (f"{TINY} --steps 1 --recipe dopd dopd", "--recipe"),
    ("--recipe", "--recipe"), ("--eval_only maybe", "maybe"),
    ("--recipe dop", "--recipe dop"), ("--task sums", "--task sums"), ("--hint whole", "--hint whole"),
    ("--privileged_student dead", "--privileged_student dead"), ("--dtype float8", "--dtype float8"),
    ("--device gpu", "--device gpu"), ("--device cuda:99", "--device cuda:99"),
    ("--hint_template {prompt}", "--hint_template {prompt}"), ("--hint_template {hint}", "--hint_template {hint}"),
    ("--answer_regex (", "--answer_regex ("), ("--answer_regex x", "--answer_regex x"),
    ("--teacher M/teacher", "--student"), ("--student M/student", "--teacher"),
    ("--teacher M/teacher --student M/student", "--data"),
    (f"{PAIR} --teacher nowhere/model", "--teacher nowhere/model"), (f"{PAIR} --student M/cut", "--student M/cut"),
    (f"{PAIR} --student M/no_words", "--student M/no_words"), (f"{PAIR} --student M/no_config", "--student M/no_config"),
    (f"{PAIR} --student M/other_words", "vocabular"), (f"{PAIR} --teacher M/nan", "--teacher M/nan"),
    (f"{PAIR} --student M/nan --eval_only", "--student M/nan"),
    (f"{PAIR} --max_new_tokens 500", "--max_new_tokens"), (f"{PAIR} --teacher good.jsonl", "--teacher good.jsonl"),
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data M", "train.jsonl"), ("--data few.jsonl", "few.jsonl"),
    ("--data bytes.jsonl", "bytes.jsonl"), ("--data good.jsonl --hint_template {hint}#{prompt}", "good.jsonl 3a="),
    *((f"--data {name}.jsonl", f"{name}.jsonl") for name in ("empty", "blank")),
    *((f"--data {name}.jsonl", f"{name}.jsonl 1") for name in ("text", "array", "null")), ("--data cut.jsonl", "row 2"),
    *((f"--data {name}.jsonl", f"{name}.jsonl row 4 {word}") for name, word in (
        ("a_list", "object"), ("no_prompt", "prompt"), ("no_answer", "answer"), ("no_hint", "hint"),
        ("number", "prompt"), ("answers", "answer"), ("null_answer", "answer"), ("null_hint", "hint"),
        ("other_form", "steps"), ("hint_object", "hint"), ("no_words", "prompt"))),
    ("--data strange.jsonl", "strange.jsonl 3ä="), ("--data strange_answer.jsonl", "strange_answer.jsonl 3a="),
    ("--data surrogate.jsonl", "surrogate.jsonl row 4"),
    ("--data long.jsonl", "long.jsonl 3aaa 128"), ("--data no_problem.jsonl", "no_problem.jsonl ="),
    (f"{TINY} --out run", "--out run --resume"), (f"{TINY} --out good.jsonl", "good.jsonl"),
    (f"{TINY} --out good.jsonl/run", "good.jsonl/run"), (f"{TINY} --out /proc/run", "/proc/run"),
    (f"{TINY} --out {'long' * 80}", "long"),
    ("--resume nowhere", "--resume nowhere"), ("--resume rows", "--resume rows"),
    ("--resume bad_config", "bad_config"), ("--resume other_config", "other_config"),
    ("--resume bad_checkpoint", "bad_checkpoint step-4"), ("--resume bad_log", "bad_log metrics.jsonl"),
]


@pytest.fixture(scope="module")
def shelf(checkpoints, tmp_path_factory) -> Path:
    """A folder with everything that the bad inputs name, and nothing else."""
    folder = tmp_path_factory.mktemp("shelf")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(dopd, "TASKS", dict(dopd.TASKS))
        shrink()
        dopd.write_task(dopd.TASKS["rules"], Path("rows"), train=32, held_out=8)
        for name, text in FILES.items():
            Path(f"{name}.jsonl").write_text(text)
        Path("bytes.jsonl").write_bytes(bytes(range(256)))
        write_lines("good.jsonl", *[RULES] * 4)
        write_lines("few.jsonl", RULES, RULES)

        shutil.copytree(checkpoints, "M")
        for name in ("cut", "no_words", "no_config", "other_words", "nan"):
            shutil.copytree("M/student", f"M/{name}")
        weights = Path("M/cut/model.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        Path("M/no_words/tokenizer.json").unlink()
        Path("M/no_config/config.json").write_text('{"model_type": "sofa"}')
        bpe(["Quite other sentences, quite other words, quite other words."], 290).save_pretrained("M/other_words")
        model = AutoModelForCausalLM.from_pretrained("M/nan")
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
        model.save_pretrained("M/nan")

        assert go(f"{TINY} --steps 1 --out run") == 0         # its warm start is the others', too
        shutil.rmtree("run")
        assert go_until(5, f"{ONE} --out run", patch) == 130
        for name in ("bad_config", "other_config", "bad_checkpoint", "bad_log"):
            shutil.copytree("run", name)
        Path("bad_config/config.json").write_text('{"steps": 6')
        Path("other_config/config.json").write_text('{"stops": 6}')
        state = Path("bad_checkpoint/dopd-seed0/step-4/training.pt")
        state.write_bytes(state.read_bytes()[:1000])
        log = Path("bad_log/metrics.jsonl").read_text().splitlines()
        Path("bad_log/metrics.jsonl").write_text("\n".join([log[0][:-9] + "}", *log[1:]]) + "\n")
    return folder


@pytest.mark.parametrize("flags, says", BAD, ids=[flags for flags, _ in BAD])
def test_bad_input(flags, says, shelf, monkeypatch, capsys):
    """One line that names the flag, or the file and the row; exit code 2; and nothing left behind."""
    monkeypatch.chdir(shelf)
    before = files()
    capsys.readouterr()
    assert go(flags) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("dopd.py:")]
    assert "Traceback" not in errors and len(line) < 500 and not re.search(r"None\b.*:|StopIteration", line)
    assert all(word in line for word in says.split(" ")), line
    assert files() == before
