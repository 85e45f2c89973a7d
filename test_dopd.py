"""Does dopd.py do what the method says, and do whole runs hold? `python -m pytest -q`, some minutes.

First every formula against one that is written here anew, from the definition; then whole runs: what they leave behind,
going on after a kill, real checkpoints, several processes, memory, bad input. Where a comment says "catches", it names
the mistake that the test is there for; `tiny_tasks/breakages.py` makes those mistakes.
"""

import copy
import html.parser
import inspect
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
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")      # before transformers comes in; a missing checkpoint is no download

import datasets
import matplotlib.image
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GenerationConfig, PreTrainedTokenizerFast,
                          Qwen3Config, Qwen3ForCausalLM)

import dopd

DIVERGENCES = {"forward_kl": dopd.forward_kl, "reverse_kl": dopd.reverse_kl, "js": dopd.js_divergence}
TRL_ALPHA = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}
each_objective = pytest.mark.parametrize("objective", DIVERGENCES)


# --------------------------------------------------------------- the method once more, slowly, one token at a time

def dopd_table(light=0.6, weak=0.3):
    """Regime -> source, objective, support, weight: as the paper has it."""
    return {"LH": ("privileged_teacher", "reverse_kl", "top_k", light),
            "LL": ("privileged_student", "reverse_kl", "top_k", weak),
            "HT": ("privileged_teacher", "js", "full", 1.0),
            "HS": ("privileged_student", "reverse_kl", "top_k", light)}


def uniform_table(*row):
    return dict.fromkeys(["LH", "LL", "HT", "HS"], row)


def naive_kl(first, second):
    return sum(p * torch.log(p / q) for p, q in zip(first, second))


def naive_divergence(objective, student, source):
    """Of two lists of probabilities."""
    if objective == "forward_kl":
        return naive_kl(source, student)
    if objective == "reverse_kl":
        return naive_kl(student, source)
    middle = [(p + q) / 2 for p, q in zip(student, source)]
    return (naive_kl(source, middle) + naive_kl(student, middle)) / 2


def naive_top_k(student, source, k):
    """Both on the student's k likeliest words, and one bucket for all others if there are any."""
    ranked = sorted(range(len(student)), key=lambda word: -student[word])
    supports = []
    for probabilities in (student, source):
        support = [probabilities[word] for word in ranked[:k]]
        if k < len(ranked):
            support.append(sum(probabilities[word] for word in ranked[k:]))
        supports.append(support)
    return supports


def naive_route(q_teacher, q_student):
    """The regime of every token, from its probabilities under the two privileged policies, as lists."""
    gaps = [abs(math.log(t) - math.log(s)) for t, s in zip(q_teacher, q_student)]
    ranked, place = sorted(gaps), 0.95 * (len(gaps) - 1)
    below, above = ranked[math.floor(place)], ranked[math.ceil(place)]
    kept = [i for i, gap in enumerate(gaps) if gap <= below + (place % 1) * (above - below)]
    gap_bar = sum(gaps[i] for i in kept) / len(kept)
    sum_bar = sum(q_teacher[i] for i in kept) / len(kept) + sum(q_student[i] for i in kept) / len(kept)
    regimes = []
    for t, s, gap in zip(q_teacher, q_student, gaps):
        if gap < gap_bar:
            regimes.append("LH" if t + s >= sum_bar else "LL")
        else:
            regimes.append("HT" if t >= s else "HS")
    return regimes


def naive_loss(table, policies, tokens, mask, k):
    """The loss, and the regimes of the tokens; {policy: log-probs (B, T, V)}, tokens and mask (B, T)."""
    places = [(b, t) for b in range(len(mask)) for t in range(mask.shape[1]) if mask[b, t]]
    q_teacher, q_student = ([policies[name][b, t, tokens[b, t]].exp().item() for b, t in places]
                            for name in ("privileged_teacher", "privileged_student"))
    regimes, total = naive_route(q_teacher, q_student), 0
    for (b, t), regime in zip(places, regimes):
        source, objective, support, weight = table[regime]
        ours, theirs = list(policies["student"][b, t].exp()), list(policies[source][b, t].exp().detach())
        if support == "top_k":
            ours, theirs = naive_top_k(ours, theirs, k)
        total = total + weight * naive_divergence(objective, ours, theirs) / mask[b].sum() / len(mask)
    return total, regimes


# ---------------------------------------------------------------------------------------------------------- helpers

@pytest.fixture(autouse=True)
def same_luck_every_time():
    torch.manual_seed(0)


def log_probs(*shape):
    """Mild ones, in float64: a wrong formula then differs by more than any rounding."""
    return torch.randn(*shape, dtype=torch.float64).log_softmax(-1)


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def value_and_gradient(loss, student):
    """Of loss(log-probs); the gradient with respect to the logits behind them."""
    logits = student.detach().clone().requires_grad_()
    value = loss(logits.log_softmax(-1))
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(loss, reference, student, rtol=1e-7):
    """Equal in value and in gradient, and the gradient is one."""
    ours, expected = value_and_gradient(loss, student), value_and_gradient(reference, student)
    assert ours[1].abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-9, check_dtype=False)


def a_batch(count=4, longest=6, words=7):
    """Random log-probs of all policies, tokens, and a mask of different lengths."""
    policies = {name: log_probs(count, longest, words)
                for name in ("student", "teacher", "privileged_teacher", "privileged_student")}
    lengths = torch.tensor([longest, 1, 4, 5])[:count, None]
    return policies, torch.randint(words, (count, longest)), torch.arange(longest) < lengths


def dopd_loss_of(policies, tokens, mask, **betas):
    sources = policies["privileged_teacher"], policies["privileged_student"]
    return lambda student: dopd.dopd_loss(student, *sources, tokens, mask, top_k=3, **betas)


def names(regimes):
    return [dopd.Regime(regime).name for regime in regimes.tolist()]


SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}


def tiny_model(family="qwen3", words=12, seed=0):
    """With large random weights, so that every token of the context changes the next one's probabilities."""
    torch.manual_seed(seed)
    if family == "gpt2":
        config = GPT2Config(vocab_size=words, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    else:
        config = Qwen3Config(vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=2, head_dim=8,
                             num_attention_heads=2, num_key_value_heads=2, initializer_range=0.4,
                             **SLIDING if family == "sliding" else {})
    return AutoModelForCausalLM.from_config(config).double().eval()


@torch.no_grad()
def model_of(table):
    """A model whose next token depends on the last one only: row i of `table` has its probabilities after token i."""
    words = len(table)
    model = AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=words, hidden_size=words, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, tie_word_embeddings=False)).eval()
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(words))             # which the norm scales to length sqrt(words)
    model.lm_head.weight.copy_(table.log().clamp(min=-40).T / words**0.5)
    return model


def direct(model, prompt, completion, vocabulary=None):
    """Log-probs (T, V) of one completion: one plain forward pass, nothing padded, nothing left out."""
    logits = model(torch.tensor([prompt + completion])).logits
    return logits[0, len(prompt) - 1:-1, :vocabulary].log_softmax(-1)


# ------------------------------------------------------------------------------------------ divergences and supports

def test_divergences_worked_by_hand():
    student, source = logs(1 / 2, 1 / 2), logs(1 / 4, 3 / 4)
    # source log source/student = 1/4 log 1/2 + 3/4 log 3/2
    assert dopd.forward_kl(student, source).item() == pytest.approx(0.130812, abs=1e-6)
    # student log student/source = 1/2 log 2 + 1/2 log 2/3
    assert dopd.reverse_kl(student, source).item() == pytest.approx(0.143841, abs=1e-6)
    # m = (3/8, 5/8): half of 1/4 log 2/3 + 3/4 log 6/5 = 0.035375, and half of 1/2 log 4/3 + 1/2 log 4/5 = 0.032269
    assert dopd.js_divergence(student, source).item() == pytest.approx(0.033822, abs=1e-6)


def test_js_is_at_most_ln_2():
    never = 1e-300                                                        # nothing in common, and almost nothing
    assert dopd.js_divergence(logs(1.0, never), logs(never, 1.0)).item() == pytest.approx(math.log(2))
    student, source = (30 * log_probs(2, 99, 5)).log_softmax(-1)
    assert dopd.js_divergence(student, source).max() < math.log(2) + 1e-9 < dopd.reverse_kl(student, source).max()


@each_objective
def test_divergence_from_oneself_teaches_nothing(objective):
    """Which is why the student's own detached log-probs are no source."""
    value, gradient = value_and_gradient(lambda logp: DIVERGENCES[objective](logp, logp.detach()), log_probs(5, 7))
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


@each_objective
@pytest.mark.parametrize("support, k", [("full", 1), ("top_k", 1), ("top_k", 3), ("top_k", 6), ("top_k", 7),
                                        ("top_k", 99)])
def test_every_objective_on_every_support_token_by_token(objective, support, k):
    policies, tokens, mask = a_batch()
    recipe, table = (make("teacher", objective, support, 0.7) for make in (dopd.uniform, uniform_table))
    assert_same(lambda student: dopd.distillation_loss(recipe, student, policies, tokens, mask, top_k=k),
                lambda student: naive_loss(table, policies | {"student": student}, tokens, mask, k)[0],
                policies["student"], rtol=1e-6)


def test_top_1_is_the_students_and_the_tail_takes_the_rest():
    """Catches the source's top-K, and top-K renormalised to 1, which for K = 1 is always zero."""
    student, source = logs(0.5, 0.3, 0.2), logs(0.2, 0.3, 0.5)
    ours, theirs = dopd.top_k_with_tail(student, source, 1)
    torch.testing.assert_close((ours.exp().tolist(), theirs.exp().tolist()), ([0.5, 0.5], [0.2, 0.8]))
    value, gradient = value_and_gradient(lambda logp: dopd.reverse_kl(*dopd.top_k_with_tail(logp, source, 1)), student)
    assert value.item() == pytest.approx(math.log(5 / 4))                 # 1/2 log 5/2 + 1/2 log 5/8
    assert gradient.abs().max() > 0.1


@each_objective
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_divergence_and_support_are_those_of_trl(objective):
    pytest.importorskip("trl")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.sdft.loss_utils import compute_divergence, compute_topk_self_distillation_loss

    (student, teacher), divergence, alpha = log_probs(2, 1, 6, 9), DIVERGENCES[objective], TRL_ALPHA[objective]
    assert_same(lambda logp: divergence(logp, teacher), lambda logp: compute_divergence(logp, teacher, alpha), student)
    for k in (1, 4):
        flags = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": True}
        assert_same(lambda logp: divergence(*dopd.top_k_with_tail(logp, teacher, k)),
                    lambda logp: compute_topk_self_distillation_loss(logp, teacher, **flags), student)
    # GKD takes the mean over all tokens of the batch, which is ours where the batch is one completion.
    tokens, mask = torch.tensor([[0, 1, 2, 3, -100, -100]]), torch.tensor([[True] * 4 + [False] * 2])
    recipe = dopd.uniform("teacher", objective, "full", 1.0)
    assert_same(lambda logp: dopd.distillation_loss(recipe, logp, {"teacher": teacher}, tokens, mask, top_k=1),
                lambda logp: GKDTrainer.generalized_jsd_loss(logp, teacher, tokens, alpha), student, rtol=1e-6)


@each_objective
def test_sampled_token_has_the_gradient_of_the_divergence_on_average(objective):
    """Over the student's own samples. One sample's value is no divergence, so only gradients are compared."""
    student, source = log_probs(2, 7)

    def expected_surrogate(logp):
        row = dopd.Row("teacher", objective, "sampled", 1.0)
        losses = dopd.token_losses(row, logp.expand(7, 7), source.expand(7, 7), torch.arange(7), 3)
        return (logp.exp().detach() * losses).sum()

    ours, exact = (value_and_gradient(loss, student)[1] for loss in (
        expected_surrogate, lambda logp: DIVERGENCES[objective](logp, source)))
    torch.testing.assert_close(ours, exact)


# ------------------------------------------------------------------------------------------------------------ router

def route(q_teacher, q_student, gap=None):
    """The regimes of these tokens; a gap given here stands for theirs."""
    q_teacher, q_student = torch.tensor(q_teacher), torch.tensor(q_student)
    with pytest.MonkeyPatch.context() as patch:
        if gap:
            patch.setattr(dopd, "advantage_gap", lambda teacher_logp, student_logp: torch.tensor(gap))
        return names(dopd.route(q_teacher.log(), q_student.log(), torch.ones_like(q_teacher, dtype=torch.bool)))


def test_one_token_of_every_regime():
    gap = dopd.advantage_gap(logs(0.9, 0.1, 0.8, 0.1), logs(0.8, 0.1, 0.1, 0.8))
    torch.testing.assert_close(gap.exp().tolist(), [9 / 8, 1.0, 8.0, 8.0])
    # gaps: log 9/8 = 0.12, 0, log 8 = 2.08, 2.08; mean 1.07.   sums: 1.7, 0.2, 0.9, 0.9; mean 0.925
    assert route([0.9, 0.1, 0.8, 0.1], [0.8, 0.1, 0.1, 0.8]) == ["LH", "LL", "HT", "HS"]


def test_ties():
    assert route([0.5, 0.25], [0.25, 0.5]) == ["HT", "HS"]                # every gap is the mean gap: high
    assert route([0.5, 0.25], [0.5, 0.25]) == ["HT", "HT"]                # no gap at all, and q_T == q_S: HT
    assert route([0.25, 0.5, 0.5], [0.5, 0.25, 0.25], gap=[0.0, 1.0, 1.0]) == ["LH", "HT", "HT"]       # the mean sum


def test_outliers_are_left_out_of_the_averages_but_not_of_the_training():
    # 20 tokens have gaps 0.1 and 1 and sums 0.50, 0.56 and 0.53: means 0.55 and 0.53. With the 21st, gap 100 and sum
    # 1.9, they were 5.3 and 0.595: no gap of 1 would be high, and no sum of 0.56 sure.
    regimes = route([0.25] * 5 + [0.28] * 5 + [0.30] * 10 + [0.9], [0.25] * 5 + [0.28] * 5 + [0.23] * 10 + [1.0],
                    gap=[0.1] * 10 + [1.0] * 10 + [100.0])
    assert regimes == ["LL"] * 5 + ["LH"] * 5 + ["HT"] * 10 + ["HS"]


def test_evidence_adds_up_over_the_completion_so_far():
    policies, tokens, mask = a_batch()
    plain, hinted = policies["teacher"], (3 * policies["privileged_teacher"]).log_softmax(-1)
    expected = []
    for b, length in enumerate(mask.sum(1)):
        evidence = 0
        for t in range(length):                                           # the token itself is not counted yet
            expected.append(dopd.Prefix.AGREES if evidence >= -2 else dopd.Prefix.DISAGREES)
            evidence += (hinted - plain)[b, t, tokens[b, t]]
    scores = {name: dopd.scores_of(logp[mask], tokens, mask)
              for name, logp in (("teacher", plain), ("privileged_teacher", hinted))}
    assert dopd.by_evidence(scores).tolist() == expected and len(set(expected)) == 2


@pytest.mark.parametrize("seed", range(5))
def test_route_token_by_token(seed, monkeypatch):
    torch.manual_seed(seed)
    teacher, student = torch.log(torch.rand(2, 6, 9) * 0.98 + 0.01)
    mask = torch.rand(6, 9) < 0.7
    regimes = dopd.route(teacher, student, mask)
    assert names(regimes[mask]) == naive_route(teacher[mask].exp().tolist(), student[mask].exp().tolist())
    assert set(names(regimes[mask])) == {"LH", "LL", "HT", "HS"} and (regimes[~mask] == -1).all()
    for wild in (0.0, -1e4):                                              # padding has no say
        assert torch.equal(dopd.route(teacher.masked_fill(~mask, wild), student, mask), regimes)
        assert torch.equal(dopd.route(teacher, student.masked_fill(~mask, wild), mask), regimes)
    for scale, shift in ((1, 5.0), (0.01, 0.0), (7, -3.0)):               # "normalised within the batch": no change
        monkeypatch.setattr(dopd, "advantage_gap", lambda one, other: (one - other).abs() * scale + shift)
        assert torch.equal(dopd.route(teacher, student, mask), regimes)


# -------------------------------------------------------------------------------------------------------------- loss

@pytest.mark.parametrize("betas", [(), (2.0, 0.1)])
def test_dopd_loss_token_by_token(betas):
    policies, tokens, mask = a_batch()
    table, flags = dopd_table(*betas), dict(zip(("beta_light", "beta_weak"), betas))
    assert set(naive_loss(table, policies, tokens, mask, 3)[1]) == {"LH", "LL", "HT", "HS"}
    assert_same(dopd_loss_of(policies, tokens, mask, **flags),
                lambda student: naive_loss(table, policies | {"student": student}, tokens, mask, 3)[0],
                policies["student"], rtol=1e-6)


def test_mean_is_per_completion_first():
    """Catches a mean over all tokens of the batch, in which long completions count for more."""
    student, teacher = logs(0.5, 0.5).repeat(2, 3, 1), logs(0.5, 0.5).repeat(2, 3, 1)
    teacher[0, 0] = logs(0.25, 0.75)                                      # 1/2 log 4/3 from the student, all others 0
    mask, tokens = torch.tensor([[True, False, False], [True, True, True]]), torch.zeros(2, 3, dtype=torch.long)
    loss = dopd.distillation_loss(dopd.RECIPES["vanilla"], student, {"teacher": teacher}, tokens, mask, top_k=1)
    assert loss.item() == pytest.approx(math.log(4 / 3) / 2 / 2)          # of two completions; of four tokens: / 4


def test_padding_gets_no_gradient_and_changes_nothing():
    (policies, tokens, mask), (others, other_tokens, _) = a_batch(), a_batch()
    value, gradient = value_and_gradient(dopd_loss_of(policies, tokens, mask), policies["student"])
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all()
    for name, logp in others.items():
        logp[mask] = policies[name][mask]
    other_tokens[mask] = tokens[mask]
    changed = value_and_gradient(dopd_loss_of(others, other_tokens, mask), others["student"])
    assert not torch.equal(others["student"], policies["student"])
    torch.testing.assert_close(changed, (value, gradient), rtol=0, atol=0)


def test_only_the_student_gets_a_gradient():
    policies, tokens, mask = a_batch(count=2, longest=4, words=5)
    for logp in policies.values():
        logp.requires_grad_()
    loss = dopd_loss_of(policies, tokens, mask)
    loss(policies["student"]).backward()
    assert policies["student"].grad.abs().max() > 0.01
    assert policies["privileged_teacher"].grad is None and policies["privileged_student"].grad is None
    assert torch.autograd.gradcheck(lambda logits: loss(logits.log_softmax(-1)), policies["student"])


@pytest.mark.parametrize("name", dopd.RECIPES)
def test_every_recipe_goes_through_the_same_engine(name):
    (policies, *batch), flags = a_batch(), {"top_k": 3, "beta_light": 0.6, "beta_weak": 0.3}
    value, gradient = value_and_gradient(
        lambda student: dopd.distillation_loss(dopd.RECIPES[name], student, policies, *batch, **flags),
        policies["student"])
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1e-3


@pytest.mark.parametrize("field, value", [("source", "privileged"), ("objective", "kl"), ("support", "topk"),
                                          ("weight", "beta_lite")])
def test_a_recipe_with_a_misspelt_row_is_refused(field, value):
    """Else a support that nobody knows would train on the full one."""
    row = dopd.RECIPES["dopd"].rows[dopd.Regime.HT]
    with pytest.raises(ValueError, match=f"HT.*{value}"):
        dopd.Recipe({dopd.Regime.HT: row._replace(**{field: value})})


def test_a_recipe_that_would_train_nothing_is_refused():
    row = dopd.RECIPES["vanilla"].rows[dopd.Everywhere.ALL]
    with pytest.raises(ValueError, match="router"):
        dopd.Recipe({dopd.Regime.HT: row}, None, ())
    with pytest.raises(ValueError, match="techer"):
        dopd.Recipe({dopd.Everywhere.ALL: row}, None, ("techer",))


def test_the_engine_knows_no_recipe_by_name():
    policies = {"teacher", "privileged_teacher", "privileged_student"}    # two of which are recipes as well
    for part in (dopd.token_losses, dopd.deal, dopd.recipe_loss, dopd.distillation_loss, dopd.distill_step):
        assert not set(re.findall(r"\w+", inspect.getsource(part))) & (set(dopd.RECIPES) - policies)


# -------------------------------------------------------------------------------------------------- one training step

def tiny_training(monkeypatch, recipe, hint=True):
    """One `distill_step`: its metrics, its gradient, and the log-probs, tokens and mask it should have come from."""
    tokenizer, config = dopd.tiny_tokenizer(), dopd.Config(rollouts=4, top_k=3, max_new_tokens=5)
    student, teacher = (tiny_model(words=len(tokenizer), seed=seed) for seed in (1, 2))
    rows = [{"prompt_ids": ids, "hinted_ids": [7, 9, 25, *ids] if hint else ids, "max_new_tokens": 4} for ids in ([5, 14], [6, 14, 16, 15])]
    setup = dopd.Setup(config, dopd.TASKS["rules"], tokenizer, {}, len(tokenizer), list(range(9)))
    trainee = dopd.Trainee(student, teacher, config)
    rollout, sampled, gradient = dopd.rollout, [], []

    def rollout_and_tell(model, prompts, *rest):
        sampled.append((model, prompts, *rollout(model, prompts, *rest)))
        return sampled[-1][2:]

    def keep_gradient(lr):
        gradient.extend(weight.grad.clone() for weight in student.parameters())

    monkeypatch.setattr(dopd, "rollout", rollout_and_tell)
    monkeypatch.setattr(trainee, "step", keep_gradient)
    metrics = dopd.distill_step(setup, dopd.RECIPES[recipe], trainee, rows, 0.1, (0, 1))
    gradient = [part * max(metrics["grad_norm"], 1) for part in gradient]                    # as it was before clipping
    model, prompts, tokens, mask = sampled[0]
    rows = [row for row in rows for _ in range(4)]
    assert model is student and prompts == [row["prompt_ids"] for row in rows]               # samples see no hint

    def logp(model, prompt):
        return pad_sequence([direct(model, row[prompt], ids[kept].tolist())
                             for row, ids, kept in zip(rows, tokens, mask)], batch_first=True)

    policies = {"student": logp(student, "prompt_ids"), "privileged_student": logp(student, "hinted_ids"),
                "teacher": logp(teacher, "prompt_ids"), "privileged_teacher": logp(teacher, "hinted_ids")}
    return metrics, gradient, list(student.parameters()), policies, tokens, mask


@pytest.mark.parametrize("recipe, table", [
    ("dopd", dopd_table()), ("vanilla", uniform_table("teacher", "reverse_kl", "full", 1.0)),
    ("privileged_teacher", uniform_table("privileged_teacher", "reverse_kl", "full", 1.0)),
    ("privileged_student", uniform_table("privileged_student", "reverse_kl", "full", 1.0))])
def test_step_token_by_token(monkeypatch, recipe, table):
    """Catches a gap or a source that comes from the wrong model, reads the wrong prompt or is one token off."""
    metrics, gradient, weights, *batch = tiny_training(monkeypatch, recipe)
    loss, regimes = naive_loss(table, *batch, 3)
    expected = torch.autograd.grad(loss, weights)
    assert len(set(batch[-1].sum(1).tolist())) > 2                        # completions of several lengths
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5) and loss > 0.01
    torch.testing.assert_close(gradient, list(expected), rtol=1e-4, atol=1e-6)
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(sum(part.square().sum() for part in expected)), rel=1e-4)
    if recipe == "dopd":
        shares = {regime: regimes.count(regime) / len(regimes) for regime in table}
        assert metrics["regime_share"] == pytest.approx(shares) and min(shares.values()) > 0


def test_a_student_learns_from_itself_only_by_a_hint(monkeypatch):
    """Catches KL(p || stop-gradient p): a privileged student that is the student once more."""
    metrics = tiny_training(monkeypatch, "privileged_student")[0]
    assert metrics["loss"] > 0.01 and metrics["grad_norm"] > 0.01
    monkeypatch.undo()
    metrics = tiny_training(monkeypatch, "privileged_student", hint=False)[0]
    assert metrics["loss"] < 1e-9 and metrics["grad_norm"] < 1e-6


@pytest.mark.parametrize("reader, share", [("live", 1.0), ("ema", 0.25), ("frozen", 0.0)])
def test_who_reads_the_hint_follows_the_student(reader, share):
    config = dopd.Config(privileged_student=reader, ema_decay=0.75)
    trainee = dopd.Trainee(tiny_model(seed=1), tiny_model(seed=2), config)
    before = [weight.detach().clone() for weight in trainee.student.parameters()]
    for weight in trainee.student.parameters():
        weight.grad = torch.ones_like(weight)
    trainee.step(0.1)                                                     # AdamW's first step moves every weight by lr
    read = trainee.policies["privileged_student"].model.parameters()
    for old, weight, reads in zip(before, trainee.student.parameters(), read, strict=True):
        torch.testing.assert_close((weight, reads), (old - 0.1, old - 0.1 * share), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------- scores and rollouts

@pytest.mark.parametrize("family", ["qwen3", "gpt2"])                     # GPT-2 minds absolute positions
def test_score_is_that_of_every_sequence_alone(family):
    """Token 0 is what gaps are filled with; here it is a word of the prompts and the EOS too, and must count."""
    model = tiny_model(family)
    prompts, written = [[3, 0, 5, 1], [7], [0, 0, 2]], [[4, 5, 0], [6, 0], [1, 2, 3, 4]]
    tokens = pad_sequence([torch.tensor(ids) for ids in written], batch_first=True)
    mask = torch.arange(4) < torch.tensor([3, 2, 4])[:, None]
    for vocabulary in (12, 9):                                            # an embedding table may be padded: with 9
        logp = dopd.score(model, prompts, tokens, mask, vocabulary)[:]    # words its last 3 rows get no probability
        expected = [direct(model, *pair, vocabulary) for pair in zip(prompts, written)]
        torch.testing.assert_close(logp, torch.cat(expected))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "sliding"])
def test_completions_may_share_their_prompt(family):
    """Values and gradients, as if every row read its prompt itself; catches rows that get another row's prompt."""
    model = tiny_model(family)
    prompts, written = [[3, 0, 5, 1], [7], [3, 0, 5, 1], [7], [0, 2]], [[4, 5, 0], [6, 0], [1, 2, 3, 4], [0], [5]]
    tokens = pad_sequence([torch.tensor(ids) for ids in written], batch_first=True)
    mask = torch.arange(4) < torch.tensor([3, 2, 4, 1, 1])[:, None]
    read, forward = [], model.base_model.forward
    model.base_model.forward = lambda **inputs: read.append(inputs["input_ids"].numel()) or forward(**inputs)
    logp = dopd.score(model, prompts, tokens, mask, 12)[:]
    assert sum(read) == 3 * 3 + 5 * 4                                     # not 5 x 7: two prompts are read once
    weights = torch.rand(logp.shape, dtype=torch.float64)
    shared = torch.autograd.grad((logp * weights).sum(), list(model.parameters()))
    model.base_model.forward = forward
    expected = torch.cat([direct(model, *pair, 12) for pair in zip(prompts, written)])
    alone = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    torch.testing.assert_close((logp, *shared), (expected, *alone), rtol=1e-5, atol=1e-4)   # Qwen3 norms in float32


@pytest.mark.parametrize("chain, eos_ids, longest, written", [
    ([1, 2, 3, 0, 5, 6], [0], 6, [[2, 3, 0], [3, 0], [0]]),               # up to the first EOS and no further
    ([1, 2, 3, 0, 5, 6], [0], 2, [[2, 3], [3, 0], [0]]),                  # cut after two tokens: no EOS made up
    ([1, 2, 3, 4, 5, 6], [0, 5, 3], 6, [[2, 3], [3], [4, 5]])])           # any EOS stops
@pytest.mark.parametrize("pad", [0, 7])
def test_completion_ends_with_its_first_eos(chain, eos_ids, longest, written, pad):
    """Catches a mask by pad id: where pad == EOS it drops the EOS, and nobody learns to stop."""
    table = torch.full((8, 8), 1 / 8)
    for token, following in zip(chain, chain[1:]):
        table[token] = torch.eye(8)[following]
    model = model_of(table)
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    tokens, mask = dopd.rollout(model, [[1], [0, 2], [0, 0, 3]], longest, eos_ids)
    assert [ids[:kept.sum()].tolist() for ids, kept in zip(tokens, mask)] == written
    assert (mask[:, 1:] <= mask[:, :-1]).all()                            # nothing after the end
    assert tokens.shape[1] == max(map(len, written))                      # nor is anything sampled once all have ended


def assert_sampled_from(law, tokens):
    counts = torch.bincount(tokens, minlength=len(law))
    spread = (len(tokens) * law * (1 - law)).sqrt()
    assert ((counts - len(tokens) * law).abs() <= 5 * spread).all()


def test_rollout_is_on_policy_whatever_the_checkpoint_says():
    """Catches a generation config that leaks into the sampling. 64 words, for a top-k of 50 is a default."""
    law = torch.arange(1.0, 65.0) / 2080
    model = model_of(law.expand(64, 64))
    theirs = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, min_p=0.5, typical_p=0.1, repetition_penalty=9.0,
        no_repeat_ngram_size=1, min_new_tokens=3, suppress_tokens=[60], eos_token_id=[0, 62], max_length=3)
    model.generation_config = theirs
    tokens, mask = dopd.rollout(model, [[63]] * 4000, 2, [0])
    assert_sampled_from(law, tokens[mask])
    assert_sampled_from(law, tokens[tokens[:, 0] == 62, 1])               # goes on after an EOS that is only theirs
    assert model.generation_config is theirs and theirs.temperature == 0.01 and theirs.eos_token_id == [0, 62]


def test_rollout_of_padded_prompts_and_of_a_padded_vocabulary():
    model, prompts = tiny_model("gpt2").float(), [[7], [3, 0, 5, 1]]
    tokens, _ = dopd.rollout(model, prompts * 3000, 1, [0], vocabulary=9)
    for number, prompt in enumerate(prompts):
        assert_sampled_from(direct(model, prompt, [0], vocabulary=9)[0].exp(), tokens[number::2, 0])


def test_evaluate_counts_what_it_says():
    class Coin:
        def check(self, row, completion):
            return completion.startswith(row["answer"])

        def grade(self, row, tokens):
            return [dopd.Grade("recall", token == "7", {"7": 0.5, "8": 0.5}) for token in tokens]

    tokenizer, config = dopd.tiny_tokenizer(), dopd.Config(max_new_tokens=2)
    law = torch.zeros(len(tokenizer))
    law[tokenizer.convert_tokens_to_ids(["7", dopd.EOS, "8"])] = torch.tensor([0.5, 0.3, 0.2])
    row = {"prompt": "1", "prompt_ids": [4], "hinted_ids": [4], "answer_ids": [4], "max_new_tokens": 2}
    rows = [row | {"answer": "7", "reachable": True}, row | {"answer": "", "reachable": False}] * 500
    setup = dopd.Setup(config, Coin(), tokenizer, {"test": rows}, len(tokenizer), [tokenizer.eos_token_id])
    found = dopd.evaluate(setup, dopd.Policy(model_of(law.expand(len(law), len(law))), False), "test")
    assert found["exact"] == pytest.approx(0.5 * 0.3, abs=0.04)           # 7, then EOS; a 7 and no EOS is not right
    assert found["stopped"] == pytest.approx(0.3 + 0.7 * 0.3, abs=0.04)
    assert found["by_kind"] == {"recall": pytest.approx(0.5, abs=0.04)}
    assert found["entropy"] == pytest.approx(1.029653, abs=1e-4)          # -(0.5 log 0.5 + 0.3 log 0.3 + 0.2 log 0.2)
    assert found["nll"] == pytest.approx(1.151293, abs=1e-4)              # -(0.5 log 0.5 + 0.5 log 0.2)
    assert found["nll_best"] == pytest.approx(math.log(2))


# ------------------------------------------------------------------------------------------------------------- tasks

RULES, SIMPLIFY = dopd.TASKS["rules"], dopd.TASKS["simplify"]
RULES_ROW = {"prompt": "7fbk=", "answer": "967314"}       # f is 9, b is 7, and the wild k happened to be 1
K_LAW = {"1": 0.4, "4": 0.3, "6": 0.2, "9": 0.1}
SIMPLIFY_ROW = {"prompt": "1+2+3=", "answer": "3+3=6"}    # 1+5=6 is as good


def assert_graded(task, row, completion, right, kinds):
    """The type of every token, in capital letters where it is wrong; returns the laws."""
    assert task.check(row, completion) is right
    grades = task.grade(row, [*completion, dopd.EOS])
    assert " ".join(grade.kind if grade.correct else grade.kind.upper() for grade in grades) == kinds
    return [grade.law for grade in grades]


@pytest.mark.parametrize("completion, right, kinds", [                    # capital letters: the token is wrong
    ("967314", True, "recall execute recall execute unlearnable execute stop"),
    ("977415", False, "recall EXECUTE recall execute unlearnable execute stop"),       # after the slip all is right
    ("859241", False, "RECALL execute RECALL EXECUTE UNLEARNABLE EXECUTE stop"),
    ("967", False, "recall execute recall EXECUTE"),
    ("9673145", False, "recall execute recall execute unlearnable execute STOP STOP")])
def test_rules_check_and_grades(completion, right, kinds):
    laws = assert_graded(RULES, RULES_ROW, completion, right, kinds)
    assert laws == [K_LAW if kind.lower() == "unlearnable" else {} for kind in kinds.split()]


@pytest.mark.parametrize("completion, right, kinds", [
    ("3+3=6", True, "choice copy copy copy execute stop"),
    ("1+5=6", True, "choice copy execute copy execute stop"),
    ("1+3=4", False, "choice copy EXECUTE copy execute stop"),               # not a choice any more: the 1 made it
    ("4+3=7", False, "CHOICE copy copy copy execute stop"),                  # after the slip all is right
    ("3*3=9", False, "choice COPY OTHER OTHER execute stop"),
    ("3+3=66", False, "choice copy copy copy execute STOP OTHER"),
    ("3+3=", False, "choice copy copy copy EXECUTE")])
def test_simplify_check_and_grades(completion, right, kinds):
    laws = assert_graded(SIMPLIFY, SIMPLIFY_ROW, completion, right, kinds)
    assert laws == [{"1": 0.5, "3": 0.5}] + [{}] * (len(laws) - 1)


def test_hints_of_rules_agree_with_the_answer():
    rng, wild = random.Random(0), 0
    for row in (RULES.problem(rng) for _ in range(500)):
        value, total = int(row["prompt"][0]), 0
        for name, rule, written in zip(row["prompt"][1:-1], row["answer"][::2], row["answer"][1::2], strict=True):
            value, total, wild = (value + int(rule)) % 10, total + int(rule), wild + (name in "klm")
            assert int(written) == value
        assert row["hints"] == {"answer": str(value), "execution": row["answer"], "steps": row["answer"][::2],
                                "summary": f"{total:02d}", "none": ""}
    assert wild / 1500 == pytest.approx(0.2, abs=0.04)


def test_hints_of_simplify_agree_with_the_answer():
    rng, orders = random.Random(0), set()
    for row in (SIMPLIFY.problem(rng) for _ in range(500)):
        line, total, hints = row["prompt"][:-1], 0, row["hints"]
        for step, after in zip(map(int, hints["steps"]), row["answer"].split("="), strict=True):
            part = line[2 * step:2 * step + 3]
            assert part[1] == "*" or "*" not in line
            line, total = line[:2 * step] + str(eval(part) % 10) + line[2 * step + 3:], total + eval(part) % 10
            assert line == after and (eval(line) - eval(row["prompt"][:-1])) % 10 == 0
        assert hints == {"answer": line, "execution": row["answer"], "steps": hints["steps"],
                         "summary": f"{total:02d}", "none": ""}
        orders.add(hints["steps"])
    assert len(orders) == 6                                               # no valid order is left out


@pytest.fixture(scope="module")
def solutions():
    """(role, form of the hint): 2000 problems, each with what the author wrote."""
    rng = random.Random(0)
    rows = [RULES.problem(rng) for _ in range(2000)]
    return {(role, form): [(row, RULES.solution(row, form, getattr(RULES, role), rng)) for row in rows]
            for role in ("teacher", "student") for form in rows[0]["hints"]}


@pytest.mark.parametrize("role, known", [("teacher", "abcdefg"), ("student", "abcd")])
def test_author_guesses_what_it_does_not_know_and_follows_the_hint(solutions, role, known):
    guesses = defaultdict(Counter)
    for row, text in solutions[role, "none"]:
        for name, rule, guess in zip(row["prompt"][1:-1], row["answer"][::2], text[::2], strict=True):
            guesses[name][int(guess) if name in "klm" else guess == rule] += 1
    for name, counts in guesses.items():
        law = RULES.WILD.get(name, {True: 1.0} if name in known else {True: 0.1, False: 0.9})
        assert {guess: count / counts.total() for guess, count in counts.items()} == pytest.approx(law, abs=0.1)
    assert all(text[::2] == row["hints"]["steps"] for row, text in solutions[role, "steps"])
    assert all(text == row["answer"] for row, text in solutions[role, "execution"])
    assert all(sum(map(int, text[::2])) == int(row["hints"]["summary"]) for row, text in solutions[role, "summary"])
    assert all(text[-1] == row["hints"]["answer"] for row, text in solutions["teacher", "answer"])


def slips(results):
    """The share of wrong digits among the results past 9. All others are right, and each wrong one is one too many."""
    assert all((written - result) % 10 in (0, int(result > 9)) for result, written in results)
    wrong = [written != result % 10 for result, written in results if result > 9]
    return sum(wrong) / len(wrong)


@pytest.mark.parametrize("role, share", [("teacher", 0), ("student", 0.6)])
def test_author_of_rules_slips_where_a_sum_wraps(solutions, role, share):
    results = []
    for row, text in solutions[role, "none"] + solutions[role, "steps"]:
        values = [int(row["prompt"][0]), *map(int, text[1::2])]
        results += [(value + int(rule), after) for value, rule, after in zip(values, text[::2], values[1:])]
    assert slips(results) == pytest.approx(share, abs=0.05 * share)


@pytest.mark.parametrize("role, share", [("teacher", 0), ("student", 0.5)])
def test_author_of_simplify_slips_where_a_result_wraps(role, share):
    rng, results = random.Random(0), []
    for row in (SIMPLIFY.problem(rng) for _ in range(2000)):
        line = row["prompt"][:-1]
        solution = SIMPLIFY.solution(row, "steps", getattr(SIMPLIFY, role), rng)
        for step, after in zip(map(int, row["hints"]["steps"]), solution.split("="), strict=True):
            results.append((eval(line[2 * step:2 * step + 3]), int(after[2 * step])))
            line = after
    assert slips(results) == pytest.approx(share, abs=0.05 * share)


@pytest.mark.parametrize("name", dopd.TASKS)
def test_task_files_can_be_written_again(name, tmp_path):
    dopd.write_task(dopd.TASKS[name], tmp_path)
    prompts = {}
    for split in ("train", "validation", "test", "ood"):
        committed = Path(dopd.__file__).parent / "tiny_tasks" / name / f"{split}.jsonl"
        assert (tmp_path / committed.name).read_bytes() == committed.read_bytes()
        prompts[split] = [json.loads(line)["prompt"] for line in committed.read_text().splitlines()]
    every = sum(prompts.values(), [])
    assert len(every) == len(set(every)) == 8192 + 3 * 512                # no prompt twice, so the splits are disjoint
    assert max(map(len, prompts["train"])) < min(map(len, prompts["ood"]))


@pytest.fixture(scope="module", params=dopd.TASKS)
def prepared(request, tmp_path_factory):
    """What `prepare` makes, with bfloat16, and the prompts from which its warm start would have taught."""
    lessons = []

    def only_write_down(model, tokenizer, draw, *rest):
        for _ in range(8):
            lessons.append(draw()[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setattr(dopd, "supervised", only_write_down)
        config = dopd.Config(task=request.param, dtype="bfloat16", rollouts=2, max_new_tokens=8)
        return dopd.prepare(config, 0), lessons


def test_nobody_is_taught_what_will_be_asked(prepared):
    (setup, _, _), lessons = prepared
    held_out = {row["prompt"] for split in ("validation", "test", "ood") for row in setup.splits[split]}
    assert len(held_out) == 3 * 512 and len(lessons) == 2 * 8             # of two tiny models
    for prompts in lessons:
        assert len(prompts) == 256 and any("|" in prompt for prompt in prompts)
        assert not held_out & {prompt.split("|")[-1] for prompt in prompts}


def test_a_small_step_is_lost_in_bfloat16_but_not_by_us(prepared):
    """Catches a student whose own weights are bfloat16: near 1 they are 0.004 apart, and a step is 0.000005."""
    rounded = torch.nn.Parameter(torch.ones(9, dtype=torch.bfloat16))
    rounded.grad = torch.ones_like(rounded)
    torch.optim.AdamW([rounded], lr=5e-6, weight_decay=0.0).step()
    assert (rounded == 1).all()

    (setup, teacher, student), _ = prepared
    assert next(teacher.parameters()).dtype == torch.bfloat16
    trainee = dopd.Trainee(student, teacher, setup.config)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        dopd.distill_step(setup, dopd.RECIPES["dopd"], trainee, setup.splits["train"][:4], 5e-6, (0, 1))
    assert (trainee.student.model.norm.weight != 1).float().mean() > 0.9  # all 1 before


# ======================================================================================================= whole runs

HERE = Path(__file__).resolve().parent
DRAW_CURVES = dopd.draw_curves
SMALL = "--batch_size 4 --rollouts 2 --eval_every 2 --eval_prompts 4 --steps 6 --data rows "
ONE = f"{SMALL} --recipe dopd"
FOUR = f"{SMALL} --recipe vanilla dopd --seeds 0 1 --privileged_student ema --ema_decay 0.9"
signal.signal(signal.SIGINT, signal.default_int_handler)      # else ignored where pytest runs in the background


# ------------------------------------------------------------------------------------------------------- helpers

def shrink() -> None:
    """Policies of the two tasks that are warm in a tenth of a second; the teacher is not the student's twin."""
    for name in dopd.TASKS:
        task = dopd.TASKS[name]
        dopd.TASKS[name] = replace(task, teacher=replace(task.teacher, width=32, layers=2, steps=5),
                                   student=replace(task.student, width=32, layers=1, steps=5))


small = pytest.mark.usefixtures("tiny")


@pytest.fixture
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
        return go(flags)


def start(flags: str, code: str = "", **env) -> subprocess.Popen:
    """`python dopd.py` in a process of its own, with the small tasks, after some other code."""
    code = f"""import os, sys, dopd, {Path(__file__).stem} as tests\n{code}
tests.shrink()
sys.exit(dopd.main(sys.argv[1:]))"""
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


def write_lines(file: str, *rows) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(html.parser.HTMLParser):
    """The (title, text) of every element with a title, and all tags."""

    def __init__(self, file: str):
        super().__init__()
        self.spans, self.tags, self.title = [], set(), None
        self.feed(Path(file).read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.title = dict(attributes).get("title")

    def handle_data(self, data):
        self.spans += [(self.title, data)] if self.title else []

    def handle_endtag(self, tag):
        self.title = None


# ------------------------------------------------------------------------------------- a run, and what it leaves

@small
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
    spans = Page("run/tokens.html").spans
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


@small
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


@small
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


@small
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


@small
def test_going_on_after_ctrl_c(monkeypatch, capsys, uninterrupted):
    rows = uninterrupted(ONE)
    assert go_until(5, f"{ONE} --out run", monkeypatch) == 130
    command = re.search(r"go on with python \S+ (.*)", capsys.readouterr().err.splitlines()[-1]).group(1)
    assert command == "--resume run" and go(command) == 0
    assert rows_of("run") == rows


@small
def test_going_on_with_smaller_micro_batches(monkeypatch):
    """The way out of a GPU that is full; every other flag stays that of the run."""
    assert go_until(5, f"{ONE} --out run", monkeypatch) == 130
    sizes, rollout = set(), dopd.rollout
    monkeypatch.setattr(dopd, "rollout", lambda model, prompts, *rest: sizes.add(len(prompts)) or rollout(
        model, prompts, *rest))
    assert go("--resume run --micro-batch 2") == 0 and sizes == {2}
    shown = [row["rollouts"] for row in rows_of("run") if row.get("rollouts")]
    assert [len(rollouts) for rollouts in shown] == [4, 4]                # routed over all, from several micro-batches


@small
def test_a_run_from_python_finds_its_own_folder():
    """With the defaults that the command line has: nothing lands in the folder where it was started."""
    for folder in ("runs/rows", "runs/rows-2"):
        dopd.run(dopd.Config(batch_size=2, rollouts=2, steps=1, eval_prompts=2, data="rows", recipe=["dopd"]))
        assert {path.name for path in Path(folder).iterdir()} >= {"config.json", "metrics.jsonl", "tokens.html"}
    assert {path.name for path in Path().iterdir()} <= {"rows", "runs", "cache"}


@small
def test_a_task_that_runs_out_of_prompts_leaves_nothing_behind(monkeypatch, capsys):
    """And what it would have left is not taken for the data of the task by the next run."""
    monkeypatch.setattr(dopd, "__file__", str(Path("fork/dopd.py").resolve()))
    monkeypatch.setitem(dopd.TASKS, "short", replace(dopd.TASKS["rules"], length=1))
    assert go("--task short") == 2
    assert "prompts" in capsys.readouterr().err and not list(Path().rglob("*short*"))


@small
def test_the_fork():
    Path("tiny_tasks").mkdir()
    for file in ("dopd.py", "tiny_tasks/fork.py"):
        shutil.copy(HERE / file, file)
    flags = "--task double --recipe no_anchor privileged_js cautious doubtful "
    flags += "--steps 2 --batch_size 4 --eval_prompts 64 --out run"
    finished = subprocess.run([sys.executable, "tiny_tasks/fork.py", *flags.split()], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    tests = {row["recipe"]: row["test"]["by_kind"] for row in rows_of("run") if "test" in row}
    assert list(tests) == ["student before", "teacher", "no_anchor", "privileged_js", "cautious", "doubtful"]
    assert tests["student before"]["execute"] < 0.75 < 0.9 < tests["teacher"]["execute"]
    assert {path.name for path in Path("tiny_tasks/double").iterdir()} == {
        "train.jsonl", "validation.jsonl", "test.jsonl", "ood.jsonl"}


def test_the_recipes_of_the_readme(monkeypatch):
    monkeypatch.setattr(dopd, "RECIPES", dict(dopd.RECIPES))
    code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    exec(code, {"dopd": dopd})
    assert dopd.RECIPES["no_anchor"].policies == ["privileged_student", "privileged_teacher", "teacher"]
    assert dopd.RECIPES["privileged_js"].policies == ["privileged_teacher"]


@small
def test_a_mistake_in_a_task_is_shown_as_it_is(monkeypatch):
    """Not as a file that cannot be written."""
    monkeypatch.setattr(dopd, "__file__", str(Path("fork/dopd.py").resolve()))
    monkeypatch.setattr(dopd.Rules, "problem", lambda task, rng: {}["prompt"])
    with pytest.raises(KeyError):
        go("--task rules")


@small
def test_a_recipe_may_not_be_called_as_an_untrained_policy(monkeypatch, capsys):
    """The log would take it for tested, and it would never be trained."""
    monkeypatch.setitem(dopd.RECIPES, "teacher", dopd.RECIPES["vanilla"])
    assert go(f"{SMALL} --recipe teacher --out run") == 2 and "teacher" in capsys.readouterr().err


@small
def test_bad_rows_are_noticed_before_the_warm_start(monkeypatch, capsys):
    monkeypatch.setattr(dopd, "warm_start", None)
    write_lines("strange.jsonl", *[{"prompt": "3ä=", "hint": "3", "answer": "36"}] * 4)
    assert go("--data strange.jsonl --out run") == 2 and "3ä=" in capsys.readouterr().err


@small
def test_a_task_whose_source_cannot_be_read(capsys, monkeypatch):
    """One that was typed into an interpreter has no file: the warm start cannot be kept under what shaped it."""
    names = {"Rules": dopd.Rules, "__name__": "__main__"}
    exec("class Typed(Rules): pass", names)
    monkeypatch.setitem(dopd.TASKS, "typed", names["Typed"]())
    assert go("--task typed --data rows") == 2
    assert "None" not in capsys.readouterr().err


def test_a_hint_may_hold_the_name_of_a_prompt():
    row = {"prompt": "add {hint}", "hint": "the {prompt}"}
    assert dopd.with_hint(row, "{prompt} ({hint})") == "add {hint} (the {prompt})"


@small
def test_ctrl_c_before_there_is_a_run(monkeypatch, capsys):
    """No command is named that would not work."""
    monkeypatch.setattr(dopd, "tqdm", lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    assert go(f"{ONE} --out run") == 130
    errors = capsys.readouterr().err
    assert "interrupted" in errors and "--resume" not in errors and not Path("run").exists()


@small
def test_half_a_line_of_an_evaluation():
    assert go(f"{SMALL} --eval_only --out run") == 0
    log, whole = Path("run/metrics.jsonl"), rows_of("run")
    log.write_text(log.read_text()[:-99])
    assert go("--resume run") == 0 and rows_of("run") == whole


@small
def test_prompts_that_take_luck(monkeypatch):
    """Where no validation prompt can be known there is no accuracy to log or to draw, but a run."""
    monkeypatch.setattr(dopd, "draw_curves", DRAW_CURVES)
    write_lines("wild.jsonl", *[{"prompt": "3k=", "hint": "4", "answer": "47"}] * 9)
    assert go(f"{SMALL} --data wild.jsonl --recipe dopd --out run") == 0
    assert all(row["validation"]["exact"] is None for row in rows_of("run") if "validation" in row)


@small
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
            # As those of new weights: where they lie decides how some processors round.
            assert all(weight.data_ptr() % 64 == 0 for weight in kept.parameters())
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


# ------------------------------------------------------------------- micro-batches, processes, memory, no number

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


@small
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


@small
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


@small
def test_gradient_checkpointing_changes_nothing_but_the_work(monkeypatch):
    stored, _, _, calls = gradients("--micro_batch 3", "dopd", monkeypatch)
    again, _, _, more_calls = gradients("--micro_batch 3 --gradient_checkpointing", "dopd", monkeypatch)
    assert_same_gradients(stored, again)
    assert more_calls == calls + 3                # every micro-batch goes twice through a layer


@small
def test_a_micro_batch_without_a_supervised_token(monkeypatch):
    """A recipe may leave regimes out; a micro-batch in which no token is trained on has a gradient of zero."""
    only = dopd.Recipe({dopd.Regime.HT: dopd.RECIPES["dopd"].rows[dopd.Regime.HT]})
    monkeypatch.setitem(dopd.RECIPES, "only", only)
    monkeypatch.setattr(dopd, "route", lambda teacher, student, mask: torch.where(
        torch.arange(len(mask)) < 3, dopd.Regime.HT, dopd.Regime.HS))
    whole, *_ = gradients("--micro_batch 0", "only", monkeypatch)
    parts, *_ = gradients("--micro_batch 1", "only", monkeypatch)
    assert_same_gradients(whole, parts)


@small
def test_two_processes_do_what_one_does():
    """They also live in a locale without a ±, which the report of two seeds has."""
    flags = f"{SMALL} --recipe dopd vanilla --seeds 0 1 --micro_batch 2"
    ascii = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [start(f"{flags} --out two", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost",
                  MASTER_PORT=str(port), **ascii) for rank in (0, 1)]
    for process in pair:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert go(f"{flags} --out one") == 0
    rows, expected = rows_of("two"), rows_of("one")
    assert [row.keys() for row in rows] == [row.keys() for row in expected]                  # each row once
    for row, right in zip(rows, expected):
        assert numbers(row) == pytest.approx(numbers(right), rel=1e-4, abs=1e-5)
    assert "±" in Path("two/report.md").read_text(encoding="utf-8")
    for name in ("dopd-seed0", "vanilla-seed1"):
        models = [AutoModelForCausalLM.from_pretrained(f"{out}/{name}/student") for out in ("one", "two")]
        for one, two in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


MEMORY = """
import resource, torch
from transformers import Qwen3Config, Qwen3ForCausalLM
V, B, T = 151_936, 8, 64
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def model(): return Qwen3ForCausalLM(Qwen3Config(
    vocab_size=V, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)).eval()
student, teacher = model(), model().requires_grad_(False)
ids = torch.randint(3, V, (B, 4 + T))
dopd.rollout = lambda *args, **kwargs: (ids[:, 4:], torch.ones(B, T, dtype=torch.bool))
dopd.Trainee.step = lambda trainee, lr: student.zero_grad()
config = dopd.Config(batch_size=B, rollouts=1, top_k=128, max_new_tokens=T)
rows = [{"prompt": "", "prompt_ids": row[:4].tolist(), "hinted_ids": row[:4].tolist()[::-1], "max_new_tokens": T}
        for row in ids]
setup = dopd.Setup(config=config, task=None, tokenizer=None, splits={}, vocabulary=V, eos_ids=[0])
before = peak()
dopd.distill_step(setup, dopd.RECIPES["dopd"], dopd.Trainee(student, teacher, config), rows, 1e-4, (0, 1))
print(peak() - before)
logits = student(input_ids=ids[:, :-1]).logits[:, 3:]
torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 4:].flatten()).backward()
print(peak() - before)
sys.exit()
"""


@small
def test_memory_at_a_real_vocabulary():
    """A step, of which no (B, T, V) tensor is formed, peaks below a plain forward and backward of the student alone.

    What is taken is the peak so far: after a step that needed more than the plain one, the two would be equal.
    """
    output, errors = start("", MEMORY).communicate()
    assert output, errors
    step, plain = map(float, output.split())      # MB
    assert plain > 900 and step < 0.7 * plain


@small
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
    assert saved["step"] == 6 and len(saved["batch"]) == 8 and all(shown["completion"] for shown in saved["batch"])
    assert len({shown["prompt"] for shown in saved["batch"]} & set(prompts)) == 4
    AutoModelForCausalLM.from_pretrained("run/dopd-seed0/step-4")
    assert go("--resume run") == 0 and rows_of("run") == rows


# -------------------------------------------------------------------------------------------------- real checkpoints

TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}")
REAL = f"{SMALL} --data sums.jsonl --steps 3 --micro-batch 3 --max-new-tokens 16"


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
            num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=False,
            attention_dropout=0.5))
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


@small
@pytest.mark.parametrize("form, flags", [
    ("hint", "--recipe vanilla dopd --dtype bfloat16 --gradient_checkpointing --lr 5e-6 --answer-regex never(.)seen"),
    ("hints", "--recipe dopd --privileged_student ema --hint steps --lr 5e-6 --answer-regex never(.)seen")])
def test_real_checkpoints(form, flags, checkpoints, monkeypatch, capsys):
    teacher, student = checkpoints / "teacher", checkpoints / "student"
    flags += f" {REAL} --teacher {teacher} --student {student} --hint-template {{prompt}}({{hint}})"
    write_lines("sums.jsonl", *sums(form))

    setup, _, model = dopd.prepare(dopd.parse(flags.split()), 0)
    assert not any(layer.attention_dropout for layer in model.modules() if hasattr(layer, "attention_dropout"))
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
        assert test["exact"] == test["stopped"] < 1   # nothing is found in any, as expected; one cut off is wrong
    page = Page("run/tokens.html")
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
    assert len(alone) == 1 and {"test", "test_hinted"} <= alone[0].keys() and 0 <= alone[0]["test"]["exact"] <= 1
    assert "| with hint |" in Path("alone/report.md").read_text()


# --------------------------------------------------------------------------------------------------------- bad input

@small
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


GOOD = {"prompt": "3a=", "hint": "3", "answer": "36"}         # a problem of one rule: 3, add 3
BAD_ROWS = {                                                  # file: its fourth row, and what the line says of it
    "list": (["3a=", "3", "36"], "object"), "null": (None, "object"),
    "no_prompt": ({"hint": "3", "answer": "36"}, "prompt"), "no_answer": ({"prompt": "3a=", "hint": "3"}, "answer"),
    "no_hint": ({"prompt": "3a=", "answer": "36"}, "hint"), "number": (GOOD | {"prompt": 3}, "prompt"),
    "answers": (GOOD | {"answer": ["36"]}, "answer"), "null_answer": (GOOD | {"answer": None}, "answer"),
    "null_hint": (GOOD | {"hint": None}, "hint"), "hint_object": (GOOD | {"hint": {"steps": "3"}}, "hint"),
    "other_form": ({"prompt": "3a=", "hints": {"answer": "6"}, "answer": "36"}, "steps"),
    "no_words": (GOOD | {"prompt": ""}, "prompt"), "surrogate": (GOOD | {"prompt": "3\ud83d="}, "prompt"),
}
BAD_FILES = {                                                 # file: its text, and what the line says of it
    "empty": ("", "rows"), "blank": ("\n\n", "rows"), "text": ("hello\n", "row 1"),
    "array": (json.dumps([GOOD, GOOD]), "row 1"), "cut": (json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-5], "row 2"),
    **{name: ("".join(json.dumps(row) + "\n" for row in [GOOD, GOOD, GOOD, bad]), says) for name, bad, says in (
        *((name, bad, f"row 4 {says}") for name, (bad, says) in BAD_ROWS.items()),
        ("strange", GOOD | {"prompt": "3ä="}, "3ä="), ("strange_answer", GOOD | {"answer": "3Ä"}, "3a="),
        ("long", GOOD | {"prompt": "3" + "a" * 150}, "3aaa 128"), ("lawless", GOOD | {"prompt": "="}, "'='"))},
}
PAIR, TINY = "--teacher M/teacher --student M/student --data good.jsonl", "--data good.jsonl"
BAD = [                                                       # flags, and what the line says
    *((flag, flag) for flag in (
        "--steps", "--steps two", "--steps 0", "--batch_size 0", "--rollouts -1", "--micro_batch -1", "--lr 0",
        "--lr nan", "--lr inf", "--top_k 0", "--beta_light -1", "--beta_weak nan", "--ema_decay 1.1",
        "--max_new_tokens -1", "--eval_every 0", "--eval_prompts 0", "--eval_only maybe", "--recipe", "--recipe dop",
        "--task sums", "--hint whole", "--privileged_student dead", "--dtype float8", "--device gpu",
        "--device cuda:99", "--hint_template {prompt}", "--hint_template {hint}", "--answer_regex (",
        "--answer_regex x", "--resume nowhere", "--resume rows", "--resume bad_config", "--resume other_config",
        "stray", "--learning 1")),
    *((f"{TINY} --steps 1 {flag}", flag) for flag in (f"--seeds {2 ** 70}", "--seeds 0 0", "--recipe dopd dopd")),
    (f"{TINY} --answer_regex (x)", "--answer_regex --teacher"),
    ("--teacher M/teacher", "--student"), ("--student M/student", "--teacher"),
    ("--teacher M/teacher --student M/student", "--data"), (f"{PAIR} --max_new_tokens 500", "--max_new_tokens"),
    *((f"{PAIR} --student {folder}", f"--student {folder}") for folder in (
        "nowhere/model", "M/cut", "M/no_words", "M/no_config", "M/nan", "good.jsonl")),
    (f"{PAIR} --teacher M/nan", "--teacher M/nan"), (f"{PAIR} --student M/other_words", "M/other_words vocabular"),
    ("--eval_only --student M/nan --data good.jsonl", "--student M/nan"),
    ("--resume run --lr 3", "--resume run out --lr"), ("--resume=run --steps=9", "--resume run --steps"),
    ("--data nowhere.jsonl", "nowhere.jsonl"), ("--data M", "train.jsonl"), ("--data few.jsonl", "few.jsonl"),
    ("--data bytes.jsonl", "bytes.jsonl"), ("--data good.jsonl --hint_template {hint}#{prompt}", "good.jsonl 3a="),
    *((f"--data {name}.jsonl", f"{name}.jsonl {says}") for name, (_, says) in BAD_FILES.items()),
    (f"{TINY} --out run", "--out run --resume"), (f"{TINY} --out {'long' * 80}", "longlong"),
    *((f"{TINY} --out {folder}", folder) for folder in ("good.jsonl", "good.jsonl/run", "/proc/run")),
    ("--resume bad_checkpoint", "bad_checkpoint step-4"), ("--resume bad_log", "bad_log metrics.jsonl row 1"),
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
        for name, (text, _) in BAD_FILES.items():
            Path(f"{name}.jsonl").write_text(text)
        Path("bytes.jsonl").write_bytes(bytes(range(256)))
        write_lines("good.jsonl", *[GOOD] * 4)
        write_lines("few.jsonl", GOOD, GOOD)

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


@small
def test_a_batch_that_the_processes_cannot_share(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert go(f"{ONE} --out run") == 2
    assert re.search("--batch_size 4 .*3 processes", capsys.readouterr().err)


@small
def test_text_stays_text():
    """No reader may take an answer for a date, a number or a line break."""
    assert dopd.read_row('{"prompt": "p", "hint": "h", "answer": "a"}', "none", "here")["hint"] == ""
    answers = ["2024-01-01", "2024-01-02", "036", "\u2028 and \x85"]
    for some in (answers[:2], answers[2:3] * 2, answers):
        lines = [json.dumps({"prompt": "p", "hint": "h", "answer": answer}, ensure_ascii=False) for answer in some]
        for start, file in (("", Path("texts.jsonl")), ("\ufeff", Path("texts[1] *.jsonl"))):    # a mark, a pattern
            file.write_text(start + "\n".join(lines), encoding="utf-8")
            assert [row["answer"] for row in dopd.read_rows(file, "steps")] == some


@small
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
