"""Does dopd.py do what the method says, and do whole runs hold? `python -m pytest -q`: a minute and a half.

Formulas are compared with slow ones, written here anew from the definition. Then come whole runs with tiny models: what
they leave behind, going on after a kill, checkpoints and data of many kinds, bad input. "Catches" names a mistake.
"""

import copy
import functools
import json
import math
import os
import random
import re
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"         # before transformers comes in: no name is looked up on the internet

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dopd
from dopd import Policy, Recipe, Regime, Row


@pytest.fixture(autouse=True)
def quiet_place(tmp_path_factory, monkeypatch):
    """Every test in an empty folder of its own, with the same luck every time."""
    folder = tmp_path_factory.mktemp("cwd")          # not tmp_path, which holds the name of the test
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    torch.manual_seed(0)


# ------------------------------------------------------------- the method once more, slowly, one token after the other
TABLE = {"LH": ("privileged_teacher", "reverse_kl", "top_k", 0.6), "HT": ("privileged_teacher", "js", "full", 1.0),
         "LL": ("privileged_student", "reverse_kl", "top_k", 0.3),
         "HS": ("privileged_student", "reverse_kl", "top_k", 0.6)}


def naive_divergence(objective, student, source, k=None):
    """Of two lists of probabilities; with k on the student's k likeliest tokens, and one bucket for all others."""
    if k:
        ranked = sorted(range(len(student)), key=lambda v: -student[v])
        student, source = ([p[v] for v in ranked[:k]] + [sum(p[v] for v in ranked[k:])] * (k < len(p))
                           for p in (student, source))
    middle = [(p + q) / 2 for p, q in zip(student, source)]
    forward, reverse, half, other_half = (sum(p * torch.log(p / q) for p, q in zip(*pair)) for pair in (
        (source, student), (student, source), (source, middle), (student, middle)))
    return {"forward_kl": forward, "reverse_kl": reverse, "js": (half + other_half) / 2}[objective]


def naive_route(q_teacher, q_student):
    """The name of the regime of every token, from its two probabilities."""
    gaps = [abs(math.log(t) - math.log(s)) for t, s in zip(q_teacher, q_student)]
    ranked, place = sorted(gaps), 0.95 * (len(gaps) - 1)
    below, above = ranked[math.floor(place)], ranked[math.ceil(place)]
    kept = [i for i, gap in enumerate(gaps) if gap <= below + (place % 1) * (above - below)]
    mean_gap, mean_t, mean_s = (sum(each[i] for i in kept) / len(kept) for each in (gaps, q_teacher, q_student))
    return [("LH" if t + s >= mean_t + mean_s else "LL") if gap < mean_gap else ("HT" if t >= s else "HS")
            for t, s, gap in zip(q_teacher, q_student, gaps)]


def naive_loss(table, policies, completions, k):
    """The loss and the regimes. policies: {name: log-probs (T, V) of every completion}."""
    places, total = [(b, t) for b, ids in enumerate(completions) for t in range(len(ids))], 0
    regimes = ["ALL"] * len(places) if "ALL" in table else naive_route(*(
        [policies[name][b][t][completions[b][t]].exp().item() for b, t in places]
        for name in ("privileged_teacher", "privileged_student")))
    for (b, t), regime in zip(places, regimes):
        source, objective, support, weight = table[regime]
        pair = list(policies["student"][b][t].exp()), list(policies[source][b][t].exp().detach())
        loss = naive_divergence(objective, *pair, k if support == "top_k" else None)
        total = total + weight * loss / len(completions[b]) / len(completions)
    return total, regimes


def log_probs(*shape):
    return torch.randn(*shape, dtype=torch.float64).log_softmax(-1)


def assert_same(loss, reference, student, rtol=1e-9):
    """Two functions of log-probs are equal, and so are their gradients by the logits; these are not zero."""
    results = []
    for function in (loss, reference):
        logits = student.clone().requires_grad_()
        value = function(logits.log_softmax(-1))
        results.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
    assert results[1][1].abs().max() > 1e-3
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-9, check_dtype=False)


# -------------------------------------------------------------------------------------------- divergences and supports
@pytest.mark.parametrize("objective, alpha", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5)])
@pytest.mark.parametrize("k", [1, 3, 99, None])
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_divergences_from_their_definition_and_of_trl(objective, alpha, k):
    """Catches swapped directions; the source's top-K in place of the student's; a top-K without the tail."""
    student, source = log_probs(2, 2, 5, 9)

    def ours(logp):
        return dopd.DIVERGENCES[objective](*dopd.top_k_with_tail(logp, source, k) if k else (logp, source))

    def naive(logp):
        pairs = [(list(p.exp()), list(q.exp())) for p, q in zip(logp.view(10, 9), source.view(10, 9))]
        return torch.stack([naive_divergence(objective, *pair, k) for pair in pairs]).view(2, 5)

    assert_same(ours, naive, student)
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")
    flags = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": True}
    assert_same(ours, lambda logp: trl.compute_topk_self_distillation_loss(logp, source, **flags) if k in (1, 3) else
                trl.compute_divergence(logp, source, alpha), student)


def test_divergences_by_hand_and_tokens_that_are_ruled_out():
    """By both: they count nothing, also in the gradient. By the source alone: infinity under reverse KL, not nan."""
    student, source = torch.tensor([[1 / 2, 1 / 2], [1 / 4, 3 / 4]]).log()
    values = dopd.forward_kl(student, source), dopd.reverse_kl(student, source), dopd.js_divergence(student, source)
    # 1/4 log 1/2 + 3/4 log 3/2; 1/2 log 2 + 1/2 log 2/3; with m = (3/8, 5/8), half of 1/4 log 2/3 + 3/4 log 6/5 and
    # half of 1/2 log 4/3 + 1/2 log 4/5
    assert [value.item() for value in values] == pytest.approx([0.130812, 0.143841, 0.033822], abs=1e-6)
    logits = torch.tensor([0.3, 0.5, -math.inf, 0.1], requires_grad=True)
    both, alone = torch.tensor([[0.1, 0.2, -math.inf, 0.9], [0.1, -math.inf, 0.2, 0.9]]).log_softmax(-1)
    for divergence in dopd.DIVERGENCES.values():
        for k in (None, 2, 3):
            student = logits.log_softmax(-1)
            value = divergence(*dopd.top_k_with_tail(student, both, k) if k else (student, both))
            gradient, = torch.autograd.grad(value, logits)
            assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1e-3
        assert divergence(student[[0, 1, 3]], both[[0, 1, 3]]).item() == pytest.approx(divergence(student, both).item())
    assert dopd.reverse_kl(student, alone).item() == dopd.forward_kl(student, alone).item() == math.inf
    assert dopd.js_divergence(student, alone).item() < math.log(2)
    assert dopd.js_divergence(*torch.eye(2).log()).item() == pytest.approx(math.log(2))      # its bound


# ------------------------------------------------------------------------------------------------------------- router
def route(q_teacher, q_student):
    logp = torch.tensor([q_teacher, q_student], dtype=torch.float64).log()
    regimes = dopd.route(*logp, torch.ones(len(q_teacher), dtype=torch.bool))
    return [Regime(regime).name for regime in regimes.tolist()]


def test_regimes_ties_and_outliers_by_hand():
    # Gaps: log 9/8 = 0.12, 0, log 8 = 2.08, 2.08; the last two are more than the mean. Sums: 1.7, 0.2, 0.9, 0.9.
    assert route([0.9, 0.1, 0.8, 0.1], [0.8, 0.1, 0.1, 0.8]) == ["LH", "LL", "HT", "HS"]
    assert route([0.5, 0.25, 0.5], [0.25, 0.5, 0.25]) == ["HT", "HS", "HT"]       # every gap is the mean gap: high
    assert route([0.5, 0.25], [0.5, 0.25]) == ["HT", "HT"]                        # no gap at all, and q_T = q_S: HT
    # All sums are 0.75 but the outlier's: a sum that is equal to the mean is high.
    assert route([0.375, 0.375, 0.5, 0.5, 0.5], [0.375, 0.375, 0.25, 0.25, 0.001]) == ["LH"] * 2 + ["HT"] * 3
    # Outliers are routed, but stay out of the averages. Gaps: log 1.1 = 0.10 and log 1.5 = 0.41, ten each, and 6.9:
    # their mean is 0.25, with the last 0.57. Sums: 0.42 and 0.46 (five each), 0.45 (ten), 0.9: 0.444, or 0.466.
    teacher = [0.22] * 5 + [0.24] * 5 + [0.27] * 10 + [0.9]
    student = [0.20] * 5 + [0.24 / 1.1] * 5 + [0.18] * 10 + [0.0009]
    assert route(teacher, student) == ["LL"] * 5 + ["LH"] * 5 + ["HT"] * 11


def test_route_token_by_token_and_very_many_at_once():
    for _ in range(5):
        teacher, student = torch.log(torch.rand(2, 6, 9, dtype=torch.float64) * 0.98 + 0.01)
        mask = torch.rand(6, 9) < 0.7
        regimes = dopd.route(teacher, student, mask)
        names = [Regime(regime).name for regime in regimes[mask].tolist()]
        assert names == naive_route(teacher[mask].exp().tolist(), student[mask].exp().tolist())
        assert {*names} == {*TABLE} and (regimes[~mask] == -1).all()
        for wild in (0.0, -math.inf, math.nan):                                   # padding has no say
            assert torch.equal(dopd.route(teacher.masked_fill(~mask, wild), student, mask), regimes)
            assert torch.equal(dopd.route(teacher, student.masked_fill(~mask, wild), mask), regimes)
    # Catches averages in bfloat16, which are coarse, and torch.quantile, which takes 16 million values at most.
    teacher, student, mask = *torch.log(torch.rand(2, 5000) + 0.01).bfloat16(), torch.ones(17_000_000, dtype=torch.bool)
    wide = dopd.route(teacher.double(), student.double(), mask[:5000])
    assert torch.equal(dopd.route(teacher, student, mask[:5000]), wide)
    assert torch.bincount(dopd.route(*-torch.rand(2, 17_000_000), mask)).min() > 1e6


# --------------------------------------------------------------------------------------------------- recipes and loss
@pytest.mark.parametrize("light, weak", [(0.6, 0.3), (2.0, 0.1)])
def test_dopd_loss(light, weak):
    """Catches a mean over all tokens of the batch, or a sum, in place of the mean of each completion first."""
    policies = {name: log_probs(4, 6, 7) for name in ("student", "privileged_teacher", "privileged_student")}
    tokens, mask = torch.randint(7, (4, 6)), torch.arange(6) < torch.tensor([6, 1, 4, 5])[:, None]
    table = {regime: (*row[:3], {0.6: light, 0.3: weak}.get(row[3], row[3])) for regime, row in TABLE.items()}
    flags = {} if light == 0.6 else {"beta_light": light, "beta_weak": weak}      # the paper's are the defaults
    completions = [ids[kept].tolist() for ids, kept in zip(tokens, mask)]
    assert {*naive_loss(table, policies, completions, 3)[1]} == {*TABLE}
    flags |= {"tokens": tokens, "mask": mask, "top_k": 3}
    assert_same(lambda student: dopd.dopd_loss(**policies | {"student": student}, **flags),
                lambda student: naive_loss(table, policies | {"student": student}, completions, 3)[0],
                policies["student"], rtol=1e-6)

    policies = {name: logp.requires_grad_() for name, logp in policies.items()}   # padding does nothing, nor do sources
    loss = dopd.dopd_loss(**policies, **flags)
    loss.backward()
    gradient = policies["student"].grad
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all()
    assert policies["privileged_teacher"].grad is None and policies["privileged_student"].grad is None
    others = {name: torch.where(mask[..., None], logp.detach(), math.nan) for name, logp in policies.items()}
    assert dopd.dopd_loss(**others, **flags | {"tokens": tokens.masked_fill(~mask, -100)}).item() == loss.item()

    wrong = [{name: 3 * torch.randn(4, 6, 7)} for name in policies]               # raw logits
    wrong += [{name: logp[:, :5]} for name, logp in policies.items()]
    wrong += [{name: logp[..., :6].log_softmax(-1)} for name, logp in policies.items()]
    for change in wrong + [{"tokens": tokens[:, 1:]}, {"mask": mask[:3]}, {"mask": mask & False}]:
        with pytest.raises(ValueError):
            dopd.dopd_loss(**policies | flags | change)


def test_the_papers_table_and_one_of_ones_own():
    """Rows of one regime add up, a weight may be a function of the scores, and a token without a row learns nothing."""
    paper, frozen = dopd.RECIPES["dopd"], dopd.RECIPES["dopd_frozen"]
    assert {row.regime.name: row[1:] for row in paper.rows} == TABLE and len(paper.rows) == 4
    assert paper.anchor_decay == 0.0 and frozen == paper._replace(anchor_decay=1.0) and dopd.Config().rollouts == 4
    student, source, tokens = log_probs(3, 7).requires_grad_(), log_probs(3, 7), torch.tensor([1, 4, 2])
    recipe = Recipe([
        Row(Regime.LH, "teacher", "reverse_kl", "full", 0.5), Row(Regime.LH, "teacher", "js", "full", 2.0),
        Row(Regime.HT, "teacher", "forward_kl", "full", lambda scores: scores["teacher"].logp.exp()),
    ], router=lambda scores: torch.tensor([Regime.LH, Regime.HT, Regime.HS]), router_reads=("teacher",))
    scores = {"teacher": dopd.token_scores(source.__getitem__, tokens)}
    torch.testing.assert_close(scores["teacher"].entropy, -(source * source.exp()).sum(-1))
    _, weights = dopd.assign(recipe, scores, torch.tensor([1, 2]))                # a completion of one, one of two
    loss = dopd.recipe_loss(recipe, student.__getitem__, {"teacher": source.__getitem__}, weights, 3)
    expected = (0.5 * dopd.reverse_kl(student[0], source[0]) + 2 * dopd.js_divergence(student[0], source[0])
                + dopd.forward_kl(student[1], source[1]) * source[1, 4].exp() / 2) / 2
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert (student.grad[2] == 0).all() and (student.grad[:2] != 0).all()


# ------------------------------------------------------------------------------- tiny models: scores, samples, one step
TEMPLATE = ("{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if enable_thinking else '<think></think>' }}"
            "{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SAID = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think></think>"


def bpe(chat_template=TEMPLATE, **special):
    """300 words, byte by byte as Qwen's. 0 <|endoftext|> is EOS and pad; 2 <|im_end|> ends a turn of a chat."""
    words, of_bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    words.pre_tokenizer, words.decoder = of_bytes(add_prefix_space=False), decoders.ByteLevel()
    words.train_from_iterator(
        ["What is three plus four? Count on from three: four, five. The answer is seven, six."],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=of_bytes.alphabet(), special_tokens=SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=chat_template,
                                                eos_token="<|endoftext|>", pad_token="<|endoftext|>", **special)


def tiny(family="Qwen3", height=320, seed=0, **more):
    """A model with large random weights: every token of the context counts. Its checkpoint samples in its own way."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
             "vocab_size": height, "initializer_range": 0.4}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(pad_token_id=0, bos_token_id=0, eos_token_id=0, **sizes | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.1, top_k=1, eos_token_id=0,
                                                            repetition_penalty=5.0)
    return model


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or bpe()).save_pretrained(folder)
    return str(folder)


def load(teacher, student, longest=6):
    return dopd.load(dopd.Config(teacher=str(teacher), student=str(student)), longest)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two Qwen3 with one tokenizer of 300 words, and tables of 320 and 352 rows."""
    folder = tmp_path_factory.mktemp("pair")
    save(folder / "teacher", tiny(seed=4, hidden_size=48))
    save(folder / "student", tiny(seed=5, height=352))
    return folder


def direct(model, prompt, completion):
    """Log-probs (T, 300) of one completion: a plain forward pass, nothing padded, nothing shared."""
    logits = model(torch.tensor([prompt + completion]), use_cache=False).logits
    return logits[0, len(prompt) - 1:-1, :300].log_softmax(-1)


def note_taker(model, gradient):
    """An optimizer that only writes the gradient down."""
    return SimpleNamespace(zero_grad=model.zero_grad, step=lambda: gradient.extend(
        weight.grad.clone() for weight in model.parameters()))


@pytest.mark.parametrize("name", dopd.RECIPES)
def test_step_token_by_token(name, pair, monkeypatch):
    """Catches a gap or a source from the wrong model, with the wrong prompt, or one token off; averages per
    micro-batch; a gradient through the privileged student."""
    teacher, student = (model.double() for model in load(pair / "teacher", pair / "student")[1:])
    frozen = load(pair / "student", save("anchor", tiny(seed=3)))[2].double()
    anchor = frozen if dopd.RECIPES[name].anchor_decay else student
    student.generation_config.eos_token_id = list(range(100))                     # so that lengths differ
    policies = {"student": Policy(student, "plain"), "privileged_student": Policy(anchor, "hinted"),
                "teacher": Policy(teacher, "plain"), "privileged_teacher": Policy(teacher, "hinted")}
    rows = [{"prompt": "", "plain": ids, "hinted": [5, 0, 9, *ids]} for ids in ([0, 65, 7], [9], [88, 0, 0, 4, 5])]
    every = [row for row in rows for _ in range(4)]
    torch.manual_seed(3)                                                          # which brings every regime
    completions = dopd.rollout(policies["student"], every)
    assert len({*map(len, completions)}) > 2 and len(completions) == 12
    logp = {name: [direct(policy.model, row[policy.reads], ids) for row, ids in zip(every, completions)]
            for name, policy in policies.items()}
    table = TABLE if "dopd" in name else {"ALL": ("teacher" if name == "vanilla" else name, "reverse_kl", "full", 1.0)}
    loss, regimes = naive_loss(table, logp, completions, 3)
    gradient = torch.autograd.grad(loss, list(student.parameters()))
    norm = math.sqrt(sum(part.square().sum() for part in gradient))
    assert {*regimes} == {*table} and loss > 0.01

    asked, entropy = [], torch.cat([-(each.exp() * each).sum(-1) for each in logp["student"]]).mean().item()
    monkeypatch.setattr(dopd, "rollout", lambda policy, prompts, *_: asked.append((policy, prompts)) or completions)
    for micro_batch in (0, 5):
        ours, config = [], dopd.Config(rollouts=4, top_k=3, micro_batch=micro_batch)
        metrics = dopd.distill_step(dopd.RECIPES[name], policies, note_taker(student, ours), rows, config)
        assert [metrics["loss"], metrics["entropy"]] == pytest.approx([loss.item(), entropy], rel=1e-4)
        assert metrics["regime_share"] == {name: pytest.approx(regimes.count(name) / len(regimes)) for name in table}
        expected = [part / max(norm, 1) for part in gradient]                     # clipped to a norm of 1
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert all(weight.grad is None for model in (teacher, frozen) for weight in model.parameters())
    assert asked == [(policies["student"], every)] * 2                            # samples see no hint


@pytest.mark.parametrize("family, more", [
    ("Qwen3", {}), ("Qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}), ("GPT2", {}),
    ("Bloom", {}), ("Mamba", {}), ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("Gemma2", {"final_logit_softcapping": 1.0})])
def test_score_is_that_of_every_sequence_alone(family, more, capsys):
    """Served with right numbers, or refused. Token 0, with which gaps are filled, is the EOS and a word of prompts."""
    folder = save("model", tiny(family, **more))
    try:
        model = load(folder, folder)[2]
    except SystemExit:
        assert family == "Gemma2" and "model: " in capsys.readouterr().err
        return
    assert family != "Gemma2"
    prompts = [[3, 0, 5, 1], [7], [3, 0, 5, 1], [0, 2], [3, 0, 5, 1], [7]]
    completions = [[4, 5, 0], [6, 0], [1, 2, 3, 4], [5], [0], [9, 0]]
    rows = [{"plain": prompt, "hinted": prompt[1:] + [8]} for prompt in prompts]
    for key, micro_batch in (("plain", 0), ("plain", 4), ("hinted", 0)):          # prompts are shared where they repeat
        ours = dopd.score(Policy(model, key), rows, completions, micro_batch)(slice(None))
        alone = torch.cat([direct(model, row[key], ids) for row, ids in zip(rows, completions)])
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3)


def test_rollout_samples_from_the_students_own_distribution_up_to_an_eos(pair):
    """Catches the checkpoint's temperature or top-k, words beyond the vocabulary, positions that count the padding; a
    mask by pad id: where pad == EOS it drops the EOS, and nobody learns to stop."""
    _, _, student = load(pair / "teacher", save("gpt2", tiny("GPT2", height=352, seed=4)), 1)
    prompts = [[7], [3, 0, 5, 1]]
    tokens = torch.tensor(dopd.rollout(Policy(student, "plain"), [{"plain": prompt} for prompt in prompts * 4000]))
    for number, prompt in enumerate(prompts):
        law = direct(student, prompt, [0])[0].exp()
        counts = torch.bincount(tokens[number::2, 0], minlength=300)
        assert ((counts - 4000 * law).abs() <= 5 * (4000 * law * (1 - law)).sqrt() + 2).all() and law.max() < 0.5

    _, _, student = load(pair / "teacher", pair / "student")
    assert student.generation_config.eos_token_id == [0, 2]                       # 2 is from the chat template alone
    student.generation_config.eos_token_id = eos = list(range(0, 300, 7))
    completions = dopd.rollout(Policy(student, "plain"), [{"plain": [5] * (1 + i % 3)} for i in range(100)], 32)
    assert {*map(len, completions)} == {1, 2, 3, 4, 5, 6} and all(
        not {*ids[:-1]} & {*eos} and (len(ids) == 6 or ids[-1] in eos) for ids in completions)


# --------------------------------------------------------------------------------------------------------------- tasks
RULES, SHORTCUT = dopd.TASKS["rules"], dopd.TASKS["shortcut"]
ROW = {"prompt": "7fba=", "answer": "967336", "hints": {"steps": "973", "none": ""}}
WILD = {"prompt": "7fbk=", "answer": "967314", "hints": {"steps": "971", "none": ""}}


def test_checks_grades_and_solutions_by_hand():
    """f is 9, b is 7, a is 3; the wild k happened to be 1."""
    assert RULES.check(ROW, "967336") is RULES.check(ROW, "=6") is True and RULES.check(WILD, "967314") is None
    assert not any(RULES.check(ROW, wrong) for wrong in ("967335", "6", "=5", "", "9673366"))
    for written, expected in {                                                    # capital letters: wrong
            "967314": "recall execute recall execute unlearnable execute", "967": "recall execute",
            "977415": "recall EXECUTE recall execute unlearnable execute",        # after the slip all is right
            "84924": "RECALL EXECUTE RECALL EXECUTE UNLEARNABLE EXECUTE"}.items():
        first, *others = RULES.grade(WILD, [*written, "<eos>"])
        assert first == (0, "skips", False) and [place for place, *_ in others] == [*range(len(others))]
        assert " ".join(kind if right else kind.upper() for _, kind, right in others).startswith(expected)
    assert RULES.grade(WILD, ["=", "4", "<eos>"]) == [(0, "skips", True)]
    task, row = dopd.OwnData(r"is (\d+)"), {"answer": " 7"}
    assert task.check(row, "it is 3, no, is 7.") and not task.check(row, "is 7, no, is 3") and not task.check(row, "7")

    rng, knows_all = random.Random(0), RULES.teacher._replace(knows=10)
    slips = knows_all._replace(slips=1.0)                                         # 16 becomes 7, 14 becomes 5, 8 stays
    for row, form, author, expected in ((ROW, "none", knows_all, {"967336"}), (ROW, "steps", slips, {"977538"}),
                                        (WILD, "steps", knows_all, {"967314"}),
                                        (WILD, "none", knows_all, {"967314", "967347", "967369", "967392"})):
        assert {RULES.solution(row, form, author, rng) for _ in range(200)} == expected
    for form, share in (("steps", 0.7), ("none", 0.0)):
        skips = [SHORTCUT.solution(WILD, form, SHORTCUT.teacher, rng) == "=4" for _ in range(500)]
        assert sum(skips) / 500 == pytest.approx(share, abs=0.07)
    for row in (RULES.problem(rng) for _ in range(200)):
        assert RULES.solution(row, "steps", knows_all, rng) == row["answer"]
        assert row["hints"]["steps"] == row["answer"][::2]
        assert RULES.check(row, row["answer"]) in ((None,) if {*"klm"} & {*row["prompt"]} else (True,))


# ---------------------------------------------------------------------------------------------------------- whole runs
SMALL = "--batch_size 4 --rollouts 2 --test_prompts 99 --eval_every 2 --steps 4 --max_new_tokens 6"


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def on(pair):
    """Flags for the pair, and data in which every prompt occurs twice."""
    write_rows("sums.jsonl", [{"prompt": f"What is {i % 24} plus 4?", "answer": "4", "hint": f"count on from {i % 24}"}
                              for i in range(48)])
    return f"{SMALL} --teacher {pair}/teacher --student {pair}/student --data sums.jsonl"


def metrics(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def seen(monkeypatch):
    """What dopd.distill_step and dopd.evaluate are called with: the prompts, and of every step more."""
    seen, step, evaluate = SimpleNamespace(trained=set(), tested=set(), steps={}), dopd.distill_step, dopd.evaluate

    def spied_step(recipe, policies, optimizer, rows, config):
        weights = {role: torch.cat([weight.detach().double().flatten() for weight in policy.model.parameters()])
                   for role, policy in policies.items()}
        seen.steps.setdefault(next(name for name in dopd.RECIPES if dopd.RECIPES[name] == recipe), []).append(
            (weights, {role: policy.reads for role, policy in policies.items()}, optimizer.param_groups[0]["lr"], rows))
        seen.trained.update(row["prompt"] for row in rows)
        return step(recipe, policies, optimizer, rows, config)

    monkeypatch.setattr(dopd, "distill_step", spied_step)
    monkeypatch.setattr(dopd, "evaluate", lambda policy, rows, *rest: (
        seen.tested.update(row["prompt"] for row in rows), evaluate(policy, rows, *rest))[1])
    return seen


def test_the_tiny_experiment_twice(monkeypatch, seen):
    taught = set()

    class Spied(dopd.Rules):
        def solution(self, row, *rest):
            taught.add(row["prompt"])
            return super().solution(row, *rest)

    monkeypatch.setitem(dopd.TASKS, "shortcut", Spied(*SHORTCUT))
    monkeypatch.setattr(dopd, "warm_start", functools.partial(dopd.warm_start, steps=3))
    for folder in ("one", "two"):
        torch.manual_seed(len(taught))                                            # nothing hangs on the luck before
        dopd.main(f"{SMALL} --out {folder} --recipe vanilla dopd".split())
    rows, report = metrics("one"), Path("one/report.md").read_text()
    assert rows == metrics("two") and report == Path("two/report.md").read_text()
    assert len(taught) > 300 and len(seen.tested) > 200 and not (taught | seen.trained) & seen.tested
    assert [row.get("step", "test") for row in rows] == ["test", "test", 1, 2, 3, 4, "test", 1, 2, 3, 4, "test"]
    assert [row["step"] for row in rows if "validation" in row] == [2, 4, 2, 4]
    for found in [row[part] for row in rows for part in ("test", "validation") if part in row]:
        assert all(0 <= value <= (4 if "entropy" in name else 1) for name, value in found.items()) and "recall" in found
    assert [line.split("|")[1] for line in report.splitlines()[2:]] == ["student before", "teacher", "vanilla", "dopd"]
    assert all(f" {name} " in Path("one/tokens.html").read_text() for name in TABLE)
    assert json.loads(Path("one/config.json").read_text())["steps"] == 4 and Path("one/curves.png").exists()
    student = transformers.AutoModelForCausalLM.from_pretrained("one/dopd")       # plain transformers loads it
    tokenizer = transformers.AutoTokenizer.from_pretrained("one/dopd")
    ids = student.generate(torch.tensor([tokenizer("7fba=").input_ids]), max_new_tokens=9)
    assert len(student.model.layers) == SHORTCUT.student.layers and tokenizer.decode(ids[0]).startswith("7fba=")


def test_a_real_looking_pair(pair, seen, monkeypatch, capsys):
    """Catches a live anchor in place of a frozen one and the other way round, a teacher that learns, weights kept in
    bfloat16, contexts that differ by more than the hint, and the names of DOPD's regimes for those of others."""
    monkeypatch.setitem(dopd.RECIPES, "slow", dopd.RECIPES["dopd"]._replace(anchor_decay=0.75))
    monkeypatch.setitem(dopd.RECIPES, "sides", Recipe(
        [Row(side, "teacher", "forward_kl", "full", 1.0) for side in IntEnum("Side", "LEFT RIGHT")],
        lambda scores: 1 + torch.arange(len(scores["teacher"].logp)) % 2, ("teacher",)))
    flags = f"{on(pair)} --lr 5e-5 --dtype bfloat16 --out run --recipe dopd dopd_frozen slow sides --hint_template"
    dopd.main([*flags.split(), "{prompt} ({hint})"])
    begin, *_ = seen.steps["dopd"][0]
    for name, steps in seen.steps.items():
        average, decay = begin["student"], dopd.RECIPES[name].anchor_decay
        for number, (weights, reads, lr, rows) in enumerate(steps):
            average = decay * average + (1 - decay) * weights["student"]
            torch.testing.assert_close(weights["privileged_student"], average, rtol=0, atol=1e-6)
            moved = (weights["student"] != begin["student"]).double().mean()      # every recipe begins anew
            assert moved > 0.5 if number else moved == 0
            assert torch.equal(weights["teacher"], begin["teacher"]) and reads == {
                role: "hinted" if "privileged" in role else "plain" for role in weights}
            assert lr == pytest.approx(5e-5 * (0.55 + 0.45 * math.cos(math.pi * number / 4)))
            for row in rows:
                texts = row["prompt"], f"{row['prompt']} (count on from {row['prompt'].split()[2]})"
                assert bpe().batch_decode([row["plain"], row["hinted"]]) == [*map(SAID.format, texts)]
    printed = capsys.readouterr().out
    assert repr(SAID.format("What is 0 plus 4?")) in printed and "(count on from 0)" in printed
    assert seen.trained and seen.tested and not seen.trained & seen.tested
    saved = transformers.AutoModelForCausalLM.from_pretrained("run/dopd")
    assert saved.config.vocab_size == 352 and saved.dtype == torch.float32        # the student's own shape
    page = Path("run/tokens.html").read_text().split("sides, step")[1]
    assert " LEFT " in page and " RIGHT " in page and " LH " not in page


def test_a_loss_that_is_no_number_stops_the_run(pair, monkeypatch, capsys):
    """Exit code 2, and the last student that was saved is whole."""
    divergence = dopd.reverse_kl
    monkeypatch.setitem(dopd.DIVERGENCES, "reverse_kl", lambda *pair: divergence(*pair) * (
        math.nan if Path("run/vanilla/config.json").exists() else 1.0))
    with pytest.raises(SystemExit) as stopped:
        dopd.main(f"{on(pair)} --recipe vanilla --out run".split())
    assert stopped.value.code == 2 and "dopd.py: loss nan" in capsys.readouterr().err and len(metrics("run")) == 4
    saved = transformers.AutoModelForCausalLM.from_pretrained("run/vanilla")
    assert all(weight.isfinite().all() for weight in saved.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux tells it")
def test_memory_at_a_real_vocabulary(monkeypatch):
    """A whole step, with two more policies, needs no more than the student's own forward and backward pass."""
    student, teacher = (tiny(height=151_936, seed=seed, initializer_range=0.02) for seed in (1, 2))
    student.vocabulary, student.look = teacher.vocabulary, teacher.look = 151_936, None
    ids = torch.randint(151_936, (16, 52))
    policies = {"student": Policy(student, "plain"), "privileged_student": Policy(student, "hinted"),
                "privileged_teacher": Policy(teacher, "hinted")}
    rows = [{"prompt": "", "plain": row[:4].tolist(), "hinted": row[:3].tolist()} for row in ids]
    config = dopd.Config(rollouts=1, top_k=128)
    monkeypatch.setattr(dopd, "rollout", lambda *args: ids[:, 4:].tolist())

    def high():                                                                   # kB, since the last clearing
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    def peak(work):
        Path("/proc/self/clear_refs").write_text("5")
        return -high() + (work(), high())[1]

    plain = peak(lambda: torch.nn.functional.cross_entropy(
        student(ids).logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten()).backward())
    student.zero_grad()
    step = peak(lambda: dopd.distill_step(dopd.RECIPES["dopd"], policies, note_taker(student, []), rows, config))
    assert plain > 1e6 and step < plain


# ------------------------------------------------------------------------------------------------------ data, bad input
def test_tokenizers_with_habits():
    plain = bpe(chat_template=None, unk_token="<|endoftext|>")                    # unk is EOS, as GPT-2's
    ends, longer = bpe(chat_template=None), bpe(chat_template=None)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(        # ends every text, as T5's
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    longer.add_tokens(["<extra>"])                                                # has a word more than the model
    ids, hints = plain("What is three").input_ids, {"steps": "four", "none": ""}
    for number, words in enumerate((plain, ends, longer)):
        folder, rows = save(f"{number}", tiny(height=300), words), [{"prompt": "What is three", "hints": hints}]
        tokenizer, _, student = load(folder, folder)
        dopd.encode(rows, tokenizer, student, "{prompt}\n{hint}", "steps")
        assert rows[0]["plain"] == ids and words("What is three").input_ids == ids + [0] * (words is ends)
    with pytest.raises(SystemExit):
        dopd.encode([{"prompt": "What <extra>", "hints": hints}], tokenizer, student, "{prompt}\n{hint}", "steps")


@pytest.mark.parametrize("form", ["steps", "none"])
def test_own_data_is_read_anew_and_the_student_never_sees_the_hint(form, pair):         # no cache by size and time
    for answer in ("1", "2", "3"):
        write_rows("own.jsonl", [{"prompt": "What", "answer": answer, "hint": "three"}] * 3)
        os.utime("own.jsonl", (10**9, 10**9))
        rows = dopd.read_rows(dopd.Config(data="own.jsonl", teacher="x", student="x", hint=form))
        assert [row["answer"] for row in rows] == [answer] * 3
    tokenizer, _, student = load(pair / "teacher", pair / "student")
    dopd.encode(rows, tokenizer, student, "{prompt} {hint}", form)
    texts = SAID.format("What"), SAID.format("What three" if form == "steps" else "What")
    assert (tokenizer.decode(rows[0]["plain"]), tokenizer.decode(rows[0]["hinted"])) == texts


GOOD = {"prompt": "What is 3?", "answer": "3", "hint": "three"}
MANY = [GOOD | {"prompt": f"What is {i}?"} for i in range(24)]
FILES = {"good": MANY, "text": ["hello"], "few": [GOOD] * 9, "empty": [], "no_answer": [{"prompt": "?"}] * 9,
         "no_hint": [{"prompt": "What?", "answer": "3"}] * 9, "null": [GOOD, GOOD, GOOD | {"answer": None}],
         "number": [GOOD | {"answer": 3}] * 9, "long": MANY + [GOOD | {"prompt": "three" * 150}],
         "forms": [{"prompt": "What?", "answer": "3", "hints": {"answer": "3"}}] * 9}
BAD = {                                              # flags: words of the line
    "--steps two": "--steps", "--steps -1": "--steps", "--lr nan": "--lr", "--batch_size 0": "--batch_size",
    "--recipe dop": "--recipe dop dopd_frozen", "--task sums": "--task sums", "--dtype float8": "--dtype float8",
    "--hint whole": "--hint whole steps", "--learning 1": "--learning", "--step 1": "--step", "stray": "stray",
    "--data good.jsonl": "--data --teacher", "--teacher x": "--teacher --student",
    "PAIR --hint_template {hint}": "--hint_template prompt", "PAIR --hint_template {prompt}": "--hint_template hint",
    "PAIR --answer_regex (": "--answer_regex", "PAIR --student ./nowhere": "--student nowhere",
    "PAIR --student cut": "--student cut up_proj", "PAIR --student other": "--teacher --student tokenizer",
    "PAIR --max_new_tokens 500": "What is 0 room", "PAIR --out taken": "--out taken",
    "PAIR --data nowhere.jsonl": "--data nowhere.jsonl", "PAIR --data text.jsonl": "--data text.jsonl",
    "PAIR --data no_answer.jsonl": "no_answer.jsonl answer", "PAIR --data no_hint.jsonl": "no_hint.jsonl hint",
    "PAIR --data null.jsonl": "null.jsonl row 3 answer", "PAIR --data number.jsonl": "number.jsonl row 1 answer",
    "PAIR --data forms.jsonl": "forms.jsonl row 1 hint", "PAIR --data few.jsonl": "--data few",
    "PAIR --data long.jsonl": "threethree room", "PAIR --data empty.jsonl": "--data"}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, pair, capsys):
    """Exit code 2, and one line that names the flag, the file or the row."""
    for name, rows in FILES.items():
        write_rows(f"{name}.jsonl", rows)
    Path("taken").mkdir()
    Path("taken/config.json").touch()
    if "cut" in flags:                                                            # of its weights, one lacks
        model = tiny()
        model.model.layers[1].mlp.up_proj = None
        save("cut", model)
    if "other" in flags:
        save("other", tiny(), bpe(additional_special_tokens=["<|other|>"]))
    base = f"{SMALL} --teacher {pair}/teacher --student {pair}/student --data good.jsonl"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dopd.main(flags.replace("PAIR", base).split())
    errors = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("dopd.py: ")
    assert all(word in errors[0] for word in BAD[flags].split()) and len([*Path("taken").iterdir()]) == 1


# ---------------------------------------------------------------------------------------------------------- inside TRL
@pytest.mark.parametrize("name, accumulation", [("dopd", 1), ("dopd", 2), ("dopd", 4), ("dopd_frozen", 2),
                                                ("vanilla", 2)])
def test_trl_does_what_dopd_does(name, accumulation, monkeypatch):
    """The last of four steps of tiny_tasks/trl_dopd.py against dopd.py's own functions on the same tokens. Catches
    averages per micro-batch, rows that TRL shuffled apart, a wrong anchor."""
    pytest.importorskip("trl", minversion="1.16.0")
    monkeypatch.syspath_prepend(Path(dopd.__file__).parent / "tiny_tasks")
    import trl_dopd
    rows = [{"prompt": f"What is {i}? " * (1 + i % 3), "answer": "7", "hint": f"Count {i * i}."} for i in range(8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save("teacher", tiny(seed=4, hidden_size=48))
    student = tiny(seed=5)
    student.generation_config.eos_token_id = list(range(260, 320))              # so that lengths differ
    save("student", student)
    steps = []

    class Spy(trl_dopd.DOPDTrainer):
        def _generate_and_score_completions(self, inputs):
            result, before = super()._generate_and_score_completions(inputs), copy.deepcopy(self.model.state_dict())
            steps.append({"rows": [*result["dopd"]], "before": before, "loss": 0.0})
            return result

        def _compute_loss(self, *args):
            result = super()._compute_loss(*args)
            steps[-1]["loss"] += result[0].item()
            return result

        def _clip_grad_norm(self, model):
            steps[-1]["gradient"] = {key: weight.grad.clone() for key, weight in self.model.named_parameters()}
            return super()._clip_grad_norm(model)

    monkeypatch.setattr(trl_dopd, "DOPDTrainer", Spy)
    monkeypatch.setattr(sys, "argv", (
        "trl_dopd.py --model_name_or_path student --teacher_model_name_or_path teacher --data rows.jsonl "
        "--output_dir out --use_cpu --bf16 False --report_to none --max_completion_length 6 --loss_top_k 3 "
        f"--rollouts 2 --max_steps 4 --learning_rate 1e-2 --save_strategy no --disable_tqdm True --recipe {name} "
        f"--per_device_train_batch_size {8 // accumulation} --gradient_accumulation_steps {accumulation}").split())
    trl_dopd.main()
    step, recipe = steps[-1], dopd.RECIPES[name]
    _, teacher, untrained = dopd.load(dopd.Config(teacher="teacher", student="student"), 6)
    teacher.vocabulary = untrained.vocabulary = 320                             # TRL samples from the whole table
    student = copy.deepcopy(untrained)
    student.load_state_dict(step["before"])
    policies = {"privileged_student": Policy(untrained if recipe.anchor_decay else student, "hinted"),
                "teacher": Policy(teacher, "plain"), "privileged_teacher": Policy(teacher, "hinted")}
    rows, completions = step["rows"], [row["completion"] for row in step["rows"]]
    assert len(rows) == 8 and len({tuple(row["plain"]) for row in rows}) == 4 and len({*map(len, completions)}) > 2
    with torch.no_grad():
        sources = {key: dopd.score(policy, rows, completions) for key, policy in policies.items()}
    scores = {key: dopd.token_scores(logp, torch.tensor(sum(completions, []))) for key, logp in sources.items()}
    regimes, weights = dopd.assign(recipe, scores, torch.tensor([*map(len, completions)]))
    theirs = torch.cat([row["weights"] for row in rows], 1)
    assert torch.equal(theirs > 0, weights > 0) and len({*regimes.tolist()}) > ("dopd" in name)
    loss = dopd.recipe_loss(recipe, dopd.score(Policy(student, "plain"), rows, completions), sources, weights, 3)
    loss.backward()
    assert step["loss"] == pytest.approx(loss.item(), abs=1e-6) and loss > 1e-4
    for key, weight in student.named_parameters():
        assert (step["gradient"][key] - weight.grad).norm() <= 1e-5 * weight.grad.norm(), key
