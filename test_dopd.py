"""Does dopd.py do what the method says, and do whole runs hold? `python -m pytest -q`: two minutes on two cores.

Every formula is compared with a slow one that is written here anew, from the definition. Then come whole runs with tiny
models: what they leave behind, going on after a kill, real-looking checkpoints and data, bad input. Where a comment says
"catches", it names the mistake that the test is there for.
"""

import functools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from enum import IntEnum
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"         # before transformers comes in: no name is looked up on the internet

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dopd
from dopd import Regime

NEVER = -math.inf


# ------------------------------------------------------------- the method once more, slowly, one token after the other
TABLE = {"LH": ("privileged_teacher", "reverse_kl", "top_k", 0.6), "HT": ("privileged_teacher", "js", "full", 1.0),
         "LL": ("privileged_student", "reverse_kl", "top_k", 0.3), "HS": ("privileged_student", "reverse_kl", "top_k", 0.6)}
UNIFORM = {"vanilla": "teacher", "privileged_teacher": "privileged_teacher", "privileged_student": "privileged_student"}


def naive_kl(p, q):
    return sum(p[v] * torch.log(p[v] / q[v]) for v in range(len(p)) if p[v] > 0)


def naive_divergence(objective, student, source):
    """Of two lists of probabilities."""
    middle = [(p + q) / 2 for p, q in zip(student, source)]
    return {"forward_kl": lambda: naive_kl(source, student), "reverse_kl": lambda: naive_kl(student, source),
            "js": lambda: (naive_kl(source, middle) + naive_kl(student, middle)) / 2}[objective]()


def naive_top_k(student, source, k):
    """Both on the student's k likeliest tokens, and one bucket for all others."""
    ranked = sorted(range(len(student)), key=lambda v: -student[v])
    return [[p[v] for v in ranked[:k]] + [sum(p[v] for v in ranked[k:])] * (k < len(p)) for p in (student, source)]


def naive_route(q_teacher, q_student):
    """The name of the regime of every token, from its two probabilities."""
    gaps = [abs(math.log(t) - math.log(s)) for t, s in zip(q_teacher, q_student)]
    ranked, place = sorted(gaps), 0.95 * (len(gaps) - 1)
    below, above = ranked[math.floor(place)], ranked[math.ceil(place)]
    kept = [i for i, gap in enumerate(gaps) if gap <= below + (place % 1) * (above - below)]
    mean_gap, mean_t, mean_s = (sum(all[i] for i in kept) / len(kept) for all in (gaps, q_teacher, q_student))
    return [("LH" if t + s >= mean_t + mean_s else "LL") if gap < mean_gap else ("HT" if t >= s else "HS")
            for t, s, gap in zip(q_teacher, q_student, gaps)]


def naive_loss(table, policies, completions, k):
    """The loss and the regimes. policies: {name: log-probs (T, V) of every completion}."""
    places = [(b, t) for b, ids in enumerate(completions) for t in range(len(ids))]
    regimes, total = ["ALL"] * len(places), 0
    if "ALL" not in table:
        regimes = naive_route(*([policies[name][b][t][completions[b][t]].exp().item() for b, t in places]
                                for name in ("privileged_teacher", "privileged_student")))
    for (b, t), regime in zip(places, regimes):
        source, objective, support, weight = table[regime]
        ours, theirs = list(policies["student"][b][t].exp()), list(policies[source][b][t].exp().detach())
        if support == "top_k":
            ours, theirs = naive_top_k(ours, theirs, k)
        total = total + weight * naive_divergence(objective, ours, theirs) / len(completions[b]) / len(completions)
    return total, regimes


# ------------------------------------------------------------------------------------------------------------ helpers
@pytest.fixture(autouse=True)
def quiet_place(tmp_path_factory, monkeypatch):
    """Every test in an empty folder of its own, with the same luck every time."""
    folder = tmp_path_factory.mktemp("cwd")          # not tmp_path, which holds the name of the test
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    torch.manual_seed(0)


def log_probs(*shape):
    return torch.randn(*shape, dtype=torch.float64).log_softmax(-1)


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def assert_same(loss, reference, student, rtol=1e-9):
    """Two functions of log-probs are equal, and so are their gradients by the logits; these are not zero."""
    results = []
    for function in (loss, reference):
        logits = student.clone().requires_grad_()
        value = function(logits.log_softmax(-1))
        results.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
    assert results[1][1].abs().max() > 1e-3
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-9, check_dtype=False)


def names(regimes):
    return [Regime(regime).name for regime in regimes.tolist()]


# -------------------------------------------------------------------------------------------- divergences and supports
each_objective = pytest.mark.parametrize("objective, alpha", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5)])


def test_divergences_worked_by_hand():
    student, source = logs(1 / 2, 1 / 2), logs(1 / 4, 3 / 4)
    # source log source/student = 1/4 log 1/2 + 3/4 log 3/2
    assert dopd.forward_kl(student, source).item() == pytest.approx(0.130812, abs=1e-6)
    # student log student/source = 1/2 log 2 + 1/2 log 2/3
    assert dopd.reverse_kl(student, source).item() == pytest.approx(0.143841, abs=1e-6)
    # m = (3/8, 5/8): half of 1/4 log 2/3 + 3/4 log 6/5 = 0.035375, and half of 1/2 log 4/3 + 1/2 log 4/5 = 0.032269
    assert dopd.js_divergence(student, source).item() == pytest.approx(0.033822, abs=1e-6)


@each_objective
@pytest.mark.parametrize("k", [1, 3, 7, 99, None])
def test_divergences_from_their_definition(objective, alpha, k):
    """Catches swapped directions; the source's top-K in place of the student's; a top-K without the tail."""
    student, source = log_probs(2, 5, 7)

    def ours(logp):
        return dopd.DIVERGENCES[objective](*dopd.top_k_with_tail(logp, source, k) if k else (logp, source))

    def naive(logp):
        pairs = [(list(p.exp()), list(q.exp())) for p, q in zip(logp, source)]
        return torch.stack([naive_divergence(objective, *naive_top_k(*pair, k) if k else pair) for pair in pairs])

    assert_same(ours, naive, student)


@each_objective
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_divergences_of_trl(objective, alpha):
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")
    (student, source), divergence = log_probs(2, 2, 6, 9), dopd.DIVERGENCES[objective]
    assert_same(lambda logp: divergence(logp, source), lambda logp: trl.compute_divergence(logp, source, alpha), student)
    for k in (1, 4):
        flags = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": True}
        assert_same(lambda logp: divergence(*dopd.top_k_with_tail(logp, source, k)),
                    lambda logp: trl.compute_topk_self_distillation_loss(logp, source, **flags), student)


def test_tokens_that_are_ruled_out():
    """By both: they count nothing, also in the gradient. By the source alone: infinity under reverse KL, not nan."""
    logits = torch.tensor([0.3, 0.5, NEVER, 0.1], requires_grad=True)
    both, alone = torch.tensor([[0.1, 0.2, NEVER, 0.9], [0.1, NEVER, 0.2, 0.9]]).log_softmax(-1)
    for divergence in dopd.DIVERGENCES.values():
        for k in (None, 2, 3):
            student = logits.log_softmax(-1)
            value = divergence(*dopd.top_k_with_tail(student, both, k) if k else (student, both))
            gradient, = torch.autograd.grad(value, logits)
            assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1e-3
    kept = torch.tensor([0, 1, 3])
    assert dopd.reverse_kl(logits.log_softmax(-1), both).item() == pytest.approx(
        dopd.reverse_kl(logits[kept].log_softmax(-1), both[kept]).item(), rel=1e-5)
    assert dopd.reverse_kl(logits.log_softmax(-1), alone).item() == math.inf
    assert dopd.forward_kl(logits.log_softmax(-1), alone).item() == math.inf
    assert dopd.js_divergence(logs(1.0, 0.0), logs(0.0, 1.0)).item() == pytest.approx(math.log(2))      # its bound
    assert dopd.js_divergence(logits.log_softmax(-1), alone).item() < math.log(2)


# ------------------------------------------------------------------------------------------------------------- router
def route(q_teacher, q_student, dtype=torch.float64):
    q_teacher, q_student = torch.tensor(q_teacher, dtype=dtype), torch.tensor(q_student, dtype=dtype)
    return names(dopd.route(q_teacher.log(), q_student.log(), torch.ones_like(q_teacher, dtype=torch.bool)))


def test_one_token_of_every_regime():
    # gaps: log 9/8 = 0.12, 0, log 8 = 2.08, 2.08; the last two are more than the mean. Sums: 1.7, 0.2, 0.9, 0.9.
    assert route([0.9, 0.1, 0.8, 0.1], [0.8, 0.1, 0.1, 0.8]) == ["LH", "LL", "HT", "HS"]


def test_ties():
    assert route([0.5, 0.25, 0.5], [0.25, 0.5, 0.25]) == ["HT", "HS", "HT"]       # every gap is the mean gap: high
    assert route([0.5, 0.25], [0.5, 0.25]) == ["HT", "HT"]                        # no gap at all, and q_T = q_S: HT
    # Sums 0.75 for all but the last, which is the outlier: low gaps with a sum equal to the mean are LH.
    assert route([0.375, 0.375, 0.5, 0.5, 0.5], [0.375, 0.375, 0.25, 0.25, 0.001]) == ["LH"] * 2 + ["HT"] * 3


def test_outliers_stay_out_of_the_averages_but_are_routed():
    # Gaps: log 1.1 = 0.10 ten times, log 1.5 = 0.41 ten times, and 6.9: their mean is 0.25, with the last 0.57. Sums:
    # 0.42, 0.46 (five times each), 0.45 (ten times), and 0.9: their mean is 0.444, with the last 0.466.
    teacher = [0.22] * 5 + [0.24] * 5 + [0.27] * 10 + [0.9]
    student = [0.20] * 5 + [0.24 / 1.1] * 5 + [0.18] * 10 + [0.0009]
    assert route(teacher, student) == ["LL"] * 5 + ["LH"] * 5 + ["HT"] * 11


@pytest.mark.parametrize("seed", range(5))
def test_route_token_by_token(seed):
    torch.manual_seed(seed)
    teacher, student = torch.log(torch.rand(2, 6, 9, dtype=torch.float64) * 0.98 + 0.01)
    mask = torch.rand(6, 9) < 0.7
    regimes = dopd.route(teacher, student, mask)
    assert names(regimes[mask]) == naive_route(teacher[mask].exp().tolist(), student[mask].exp().tolist())
    assert set(names(regimes[mask])) == {"LH", "LL", "HT", "HS"} and (regimes[~mask] == -1).all()
    for wild in (0.0, -1e4, NEVER, math.nan):                                     # padding has no say
        assert torch.equal(dopd.route(teacher.masked_fill(~mask, wild), student, mask), regimes)
        assert torch.equal(dopd.route(teacher, student.masked_fill(~mask, wild), mask), regimes)
    assert (dopd.route(teacher, student, torch.zeros_like(mask)) == -1).all()


def test_route_averages_bfloat16_as_float32():
    """Catches sums in bfloat16, which has 8 bits: an average of many values is then a coarse one."""
    teacher, student = torch.log(torch.rand(2, 5000) * 0.98 + 0.01).bfloat16()
    mask = torch.ones(5000, dtype=torch.bool)
    assert torch.equal(dopd.route(teacher, student, mask), dopd.route(teacher.double(), student.double(), mask))


def test_route_more_tokens_than_torch_quantile_takes():
    teacher, student = -torch.rand(2, 17_000_000)
    before = time.time()
    regimes = dopd.route(teacher, student, torch.ones(17_000_000, dtype=torch.bool))
    assert time.time() - before < 30 and torch.bincount(regimes).min() > 1e6


# --------------------------------------------------------------------------------------------------- recipes and loss
def a_batch():
    """Log-probs of the policies (4, 6, 7), tokens, and a mask of several lengths."""
    policies = {name: log_probs(4, 6, 7) for name in ("student", "privileged_teacher", "privileged_student")}
    return policies, torch.randint(7, (4, 6)), torch.arange(6) < torch.tensor([6, 1, 4, 5])[:, None]


def dopd_loss(student, policies, tokens, mask, **flags):
    return dopd.dopd_loss(student, policies["privileged_teacher"], policies["privileged_student"], tokens, mask,
                          **{"top_k": 3} | flags)


@pytest.mark.parametrize("light, weak", [(0.6, 0.3), (2.0, 0.1)])
def test_dopd_loss_token_by_token(light, weak):
    """Catches a mean over all tokens of the batch, or a sum, in place of the mean of each completion first."""
    policies, tokens, mask = a_batch()
    table = {regime: (*row[:3], {0.6: light, 0.3: weak, 1.0: 1.0}[row[3]]) for regime, row in TABLE.items()}
    flags = {} if light == 0.6 else {"beta_light": light, "beta_weak": weak}      # the paper's are the defaults
    completions = [ids[kept].tolist() for ids, kept in zip(tokens, mask)]
    assert {*naive_loss(table, policies, completions, 3)[1]} == {*TABLE}
    assert_same(lambda student: dopd_loss(student, policies, tokens, mask, **flags),
                lambda student: naive_loss(table, policies | {"student": student}, completions, 3)[0],
                policies["student"], rtol=1e-6)


def test_padding_changes_nothing_and_only_the_student_learns():
    (policies, tokens, mask), (others, other_tokens, _) = a_batch(), a_batch()
    for logp in policies.values():
        logp.requires_grad_()
    loss = dopd_loss(policies["student"], policies, tokens, mask)
    loss.backward()
    gradient = policies["student"].grad
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all()
    assert policies["privileged_teacher"].grad is None and policies["privileged_student"].grad is None
    for name, logp in others.items():
        logp[mask] = policies[name][mask].detach()
    others["student"][~mask] = math.nan
    assert dopd_loss(others["student"], others, torch.where(mask, tokens, other_tokens), mask).item() == loss.item()


def test_dopd_loss_refuses_what_does_not_fit():
    policies, tokens, mask = a_batch()
    student = policies["student"]
    for name in policies:
        wrong = policies | {name: 3 * torch.randn(4, 6, 7)}
        with pytest.raises(ValueError, match=name):                               # raw logits
            dopd_loss(wrong["student"], wrong, tokens, mask)
        wrong = policies | {name: policies[name][:, :5]}
        with pytest.raises(ValueError):
            dopd_loss(wrong["student"], wrong, tokens, mask)
    for wrong_tokens, wrong_mask in ((tokens[:, 1:], mask), (tokens, mask[:3]), (tokens, mask & False)):
        with pytest.raises(ValueError):
            dopd_loss(student, policies, wrong_tokens, wrong_mask)


def test_the_table_is_the_papers():
    rows = [(row.regime.name, (*row[1:4], {"beta_light": 0.6, "beta_weak": 0.3}.get(row.weight, row.weight)))
            for row in dopd.RECIPES["dopd"].rows]
    assert dict(rows) == TABLE and len(rows) == 4
    assert dopd.RECIPES["dopd_frozen"] == dopd.RECIPES["dopd"]._replace(anchor_decay=1.0)
    assert dopd.RECIPES["dopd"].anchor_decay == 0.0                               # the paper's shares its weights
    config = dopd.Config()
    assert (config.beta_light, config.beta_weak, config.rollouts) == (0.6, 0.3, 4)


def test_a_table_of_ones_own():
    """Rows of one regime add up, a weight may be a function of the scores, and a token without a row learns nothing."""
    student, source, tokens = log_probs(3, 7).requires_grad_(), log_probs(3, 7), torch.tensor([1, 4, 2])
    recipe = dopd.Recipe([
        dopd.Row(Regime.LH, "teacher", "reverse_kl", "full", 0.5), dopd.Row(Regime.LH, "teacher", "js", "full", 2.0),
        dopd.Row(Regime.HT, "teacher", "forward_kl", "full", lambda scores: scores["teacher"].logp.exp()),
    ], router=lambda scores: torch.tensor([Regime.LH, Regime.HT, Regime.HS]), router_reads=("teacher",))
    scores = {"teacher": dopd.token_scores(source.__getitem__, tokens)}
    torch.testing.assert_close(scores["teacher"].logp, torch.stack([source[0, 1], source[1, 4], source[2, 2]]))
    torch.testing.assert_close(scores["teacher"].entropy, -(source * source.exp()).sum(-1))
    _, weights = dopd.assign(recipe, scores, torch.tensor([1, 2]), {})            # a completion of one, one of two
    loss = dopd.recipe_loss(recipe, student.__getitem__, {"teacher": source.__getitem__}, weights, 3)
    expected = (0.5 * dopd.reverse_kl(student[0], source[0]) + 2 * dopd.js_divergence(student[0], source[0])
                + dopd.forward_kl(student[1], source[1]) * source[1, 4].exp() / 2) / 2
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert (student.grad[2] == 0).all() and (student.grad[:2] != 0).all()
