"""Does dopd.py do what the method says, and do whole runs hold? `python -m pytest -q`: a minute and a half.
Formulas are compared with slow ones, written here anew from the definition. "Catches" names what turns a test red."""

import copy
import json
import math
import os
import random
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"         # before transformers comes in: no name is looked up on the internet

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import dopd
from dopd import Policy, Recipe, Regime, Row, Scores
from tiny_tasks import vision


@pytest.fixture(autouse=True)
def quiet_place(tmp_path_factory, monkeypatch):
    """Every test in an empty folder of its own, with the same luck every time."""
    folder = tmp_path_factory.mktemp("cwd")          # not tmp_path, which holds the name of the test
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))                # of the processes that it starts
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
    kept = [i for i, gap in enumerate(gaps) if gap <= torch.tensor(gaps, dtype=torch.float64).quantile(0.95)]
    mean_gap, mean_t, mean_s = (sum(each[i] for i in kept) / len(kept) for each in (gaps, q_teacher, q_student))
    return [("LH" if t + s >= mean_t + mean_s else "LL") if gap < mean_gap else ("HT" if t >= s else "HS")
            for t, s, gap in zip(q_teacher, q_student, gaps)]


def naive_loss(table, policies, completions, k):
    """The loss and the regimes. policies: {name: log-probs (T, V) of every completion}."""
    places, total = [(b, t) for b, ids in enumerate(completions) for t in range(len(ids))], 0
    q_teacher, q_student = ([policies[name][b][t][completions[b][t]].exp().item() for b, t in places]
                            for name in ("privileged_teacher", "privileged_student"))
    regimes = ["ALL"] * len(places) if "ALL" in table else naive_route(q_teacher, q_student)
    for (b, t), regime in zip(places, regimes):
        source, objective, support, weight = table[regime]
        pair = list(policies["student"][b][t].exp()), list(policies[source][b][t].exp().detach())
        loss = naive_divergence(objective, *pair, k if support == "top_k" else None)
        total = total + weight * loss / len(completions[b]) / len(completions)
    return total, regimes


def assert_same(loss, reference, student, rtol=1e-9):
    """Two functions of log-probs are equal, and so are their gradients by the logits; these are not zero."""
    results = []
    for function in (loss, reference):
        logits = student.clone().requires_grad_()
        value = function(logits.log_softmax(-1))
        results.append((value.detach(), torch.autograd.grad(value.sum(), logits)[0]))
    assert results[1][1].abs().max() > 1e-3
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-9, check_dtype=False)


# ------------------------------------------------------------------------------ divergences, supports, the router, loss
@pytest.mark.parametrize("objective, alpha", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("js", 0.5)])
@pytest.mark.parametrize("k", [1, 3, 99, None])
def test_divergences_from_their_definition_and_of_trl(objective, alpha, k):
    """Catches swapped directions; the source's top-K in place of the student's; a top-K without the tail."""
    student, source = torch.randn(2, 10, 9, dtype=torch.float64).log_softmax(-1)

    def ours(logp):
        return dopd.DIVERGENCES[objective](*dopd.top_k_with_tail(logp, source, k) if k else (logp, source))

    assert_same(ours, lambda logp: torch.stack([naive_divergence(objective, list(p), list(q), k) for p, q in zip(
        logp.exp(), source.exp())]), student)
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")
    flags = {"distillation_topk": k, "distillation_alpha": alpha, "distillation_add_tail": True}
    assert_same(ours, lambda logp: trl.compute_topk_self_distillation_loss(logp, source, **flags) if k in (1, 3) else
                trl.compute_divergence(logp, source, alpha), student)


def test_divergences_by_hand_and_tokens_that_are_ruled_out():
    """Catches nan, in the value or the gradient, where both rule a token out, and where the source alone does."""
    student, source = torch.tensor([[1 / 2, 1 / 2], [1 / 4, 3 / 4]]).log()
    # Forward: 1/4 log 1/2 + 3/4 log 3/2. Reverse: 1/2 log 2 + 1/2 log 2/3. JS, with m = (3/8, 5/8): half of
    # 1/4 log 2/3 + 3/4 log 6/5 and half of 1/2 log 4/3 + 1/2 log 4/5.
    values = {name: divergence(student, source).item() for name, divergence in dopd.DIVERGENCES.items()}
    assert values == pytest.approx({"forward_kl": 0.130812, "reverse_kl": 0.143841, "js": 0.033822}, abs=1e-6)
    logits = torch.tensor([0.3, 0.5, -math.inf, 0.1], requires_grad=True)
    both, alone = torch.tensor([[0.1, 0.2, -math.inf, 0.9], [0.1, -math.inf, 0.2, 0.9]]).log_softmax(-1)
    for divergence in dopd.DIVERGENCES.values():
        for k in (None, 2, 3):
            student = logits.log_softmax(-1)
            value = divergence(*dopd.top_k_with_tail(student, both, k) if k else (student, both))
            gradient, = torch.autograd.grad(value, logits)
            assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() > 1e-3
        torch.testing.assert_close(divergence(student[[0, 1, 3]], both[[0, 1, 3]]), divergence(student, both))
    assert dopd.reverse_kl(student, alone).item() == dopd.forward_kl(student, alone).item() == math.inf
    assert dopd.js_divergence(student, alone).item() < math.log(2)                # its bound


def routed(teacher, student):
    return dopd.route({"privileged_teacher": Scores(teacher, None), "privileged_student": Scores(student, None)})


def route(q_teacher, q_student):
    logp = torch.tensor([q_teacher, q_student], dtype=torch.float64).log()
    return [Regime(regime).name for regime in routed(*logp).tolist()]


def test_regimes_ties_and_outliers_by_hand():
    """Catches a swapped regime, > for >= at each threshold, outliers that shift the averages or are left out."""
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
    """Catches averages in bfloat16, which are coarse, and torch.quantile with its 16 million."""
    for _ in range(5):
        teacher, student = (torch.rand(2, 40, dtype=torch.float64) * 0.98 + 0.01).tolist()
        assert route(teacher, student) == naive_route(teacher, student) and {*route(teacher, student)} == {*TABLE}
    teacher, student = torch.log(torch.rand(2, 5000) + 0.01).bfloat16()
    assert torch.equal(routed(teacher, student), routed(teacher.double(), student.double()))
    assert torch.bincount(routed(*-torch.rand(2, 17_000_000))).min() > 1e6


@pytest.mark.parametrize("light, weak, flags", [(0.6, 0.3, {}), (2.0, 0.1, {"beta_light": 2.0, "beta_weak": 0.1})])
def test_dopd_loss(light, weak, flags):
    """Catches a mean over all tokens of the batch, or a sum, in place of the mean of each completion first."""
    policies = dict(zip(("student", "privileged_teacher", "privileged_student"),
                        torch.randn(3, 4, 6, 7, dtype=torch.float64).log_softmax(-1)))
    tokens, mask = torch.randint(7, (4, 6)), torch.arange(6) < torch.tensor([6, 1, 4, 5])[:, None]
    table = {regime: (*row[:3], {0.6: light, 0.3: weak}.get(row[3], row[3])) for regime, row in TABLE.items()}
    completions = [ids[kept].tolist() for ids, kept in zip(tokens, mask)]
    expected, regimes = naive_loss(table, policies, completions, 3)
    flags = {"tokens": tokens, "mask": mask, "top_k": 3, **flags}                 # the paper's betas are the defaults
    assert_same(lambda student: dopd.dopd_loss(**policies | {"student": student}, **flags),
                lambda student: naive_loss(table, policies | {"student": student}, completions, 3)[0],
                policies["student"], rtol=1e-6)
    padded = {name: logp.masked_fill(~mask[..., None], math.nan).requires_grad_() for name, logp in policies.items()}
    loss = dopd.dopd_loss(**padded, **flags | {"tokens": tokens.masked_fill(~mask, -100)})
    loss.backward()
    gradient, *others = (logp.grad for logp in padded.values())
    assert loss.item() == pytest.approx(expected.item()) and {*regimes} == {*TABLE} and others == [None, None]
    assert (gradient[~mask] == 0).all() and (gradient[mask].abs().sum(-1) > 0).all()
    wrong = [{name: logp} for name in policies for logp in (3 * policies[name], policies[name][:, :5])]
    for change in [*wrong, {"tokens": tokens[:, 1:]}, {"mask": mask & False}]:    # 3 * logp: no log-probs any more
        with pytest.raises(ValueError):
            dopd.dopd_loss(**policies | flags | change)


# ------------------------------------------------------------------------------- tiny models: scores, samples, one step
TEMPLATE = ("{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{{ '' if enable_thinking | default(true) else '<think></think>' }}{% endif %}")
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


def load(teacher, student=None, longest=6, **flags):
    return dopd.load(dopd.Config(teacher=str(teacher), student=str(student or teacher), **flags), longest)


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
        weight.grad.clone() for weight in model.parameters() if weight.requires_grad))


PARTS = dopd.dopd()._replace(rows=[row._replace(weight=weight) for row in dopd.dopd().rows for weight in (
    lambda scores, row=row: row.weight - scores["privileged_teacher"].logp,       # in two parts that add up to
    lambda scores: scores["privileged_teacher"].logp)])                           # the weight in the paper's table


@pytest.mark.parametrize("name, checkpointing", [*((name, False) for name in dopd.RECIPES), ("dopd_frozen", True),
                                                 ("dopd_in_parts", False)])
def test_step_token_by_token(name, checkpointing, pair, monkeypatch):
    """Catches a gap or a source from the wrong model, with the wrong prompt, or one token off; averages per
    micro-batch; a gradient through the privileged student; gradient checkpointing that is never switched on."""
    monkeypatch.setitem(dopd.RECIPES, "dopd_in_parts", PARTS)
    _, teacher, student = load(pair / "teacher", pair / "student", gradient_checkpointing=checkpointing)
    frozen = load(pair / "student", save("anchor", tiny(seed=3)))[2].double()
    anchor = frozen if name == "dopd_frozen" else student
    student.generation_config.eos_token_id = list(range(100))                     # so that lengths differ
    policies = {"student": Policy(student.double(), "plain"), "privileged_student": Policy(anchor, "hinted"),
                "teacher": Policy(teacher.double(), "plain"), "privileged_teacher": Policy(teacher, "hinted")}
    rows = [{"prompt": "", "plain": ids, "hinted": [5, 0, 9, *ids]} for ids in ([0, 65, 7], [9], [88, 0, 0, 4, 5])]
    every = [row for row in rows for _ in range(4)]
    torch.manual_seed(3)                                                          # which brings every regime
    completions = dopd.rollout(policies["student"], every)
    assert len({*map(len, completions)}) > 2 and student.training == checkpointing
    student.eval()                                                                # where no layer is computed twice
    logp = {name: [direct(policy.model, row[policy.reads], ids) for row, ids in zip(every, completions)]
            for name, policy in policies.items()}
    table = TABLE if "dopd" in name else {"ALL": ("teacher" if name == "vanilla" else name, "reverse_kl", "full", 1.0)}
    loss, regimes = naive_loss(table, logp, completions, 3)
    gradient = torch.autograd.grad(loss, list(student.parameters()))
    norm = math.sqrt(sum(part.square().sum() for part in gradient))
    assert {*regimes} == {*table} and loss > 0.01 and dopd.RECIPES[name].anchor_decay == (anchor is frozen)
    asked, passes, entropy = [], [], torch.cat([-(each.exp() * each).sum(-1) for each in logp["student"]]).mean().item()
    monkeypatch.setattr(dopd, "rollout", lambda policy, prompts, *_: asked.append((policy, prompts)) or completions)
    student.train(checkpointing).model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    for micro_batch in (0, 5):
        ours, config = [], dopd.Config(rollouts=4, top_k=3, micro_batch=micro_batch)
        metrics = dopd.distill_step(dopd.RECIPES[name], policies, note_taker(student, ours), rows, config)
        assert [metrics["loss"], metrics["entropy"]] == pytest.approx([loss.item(), entropy], rel=1e-4)
        assert metrics["regime_share"] == {name: pytest.approx(regimes.count(name) / len(regimes)) for name in table}
        expected = [part / max(norm, 1) for part in gradient]                     # clipped to a norm of 1
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert anchor is student or len(passes) == (1 + 3) * (1 + checkpointing)      # of one batch, of three parts
    assert all(weight.grad is None for model in (teacher, frozen) for weight in model.parameters())
    assert asked == [(policies["student"], every)] * 2                            # samples see no hint


@pytest.mark.parametrize("family, more", [
    ("Qwen3", {}), ("GPT2", {}), ("Bloom", {}), ("Mamba", {}), ("Lfm2", {"layer_types": ["conv", "full_attention"]})])
def test_score_is_that_of_every_sequence_alone(family, more):
    """Catches positions that count the padding. Token 0, which fills gaps, is the EOS and a word of prompts."""
    _, _, model = load(save("model", tiny(family, **more)))
    completions = [[4, 5, 0], [6, 0], [1, 2, 3, 4], [5]]
    rows = [{"plain": prompt, "hinted": prompt[1:] + [8]} for prompt in ([3, 0, 5, 1], [7], [3, 0, 5, 1], [0, 2])]
    for key, micro_batch in (("plain", 0), ("plain", 3), ("hinted", 0)):
        ours = dopd.score(Policy(model, key), rows, completions, micro_batch)(slice(None))
        alone = torch.cat([direct(model, row[key], ids) for row, ids in zip(rows, completions)])
        torch.testing.assert_close(ours, alone, rtol=1e-3, atol=1e-3)


def test_rollout_samples_from_the_students_own_distribution_up_to_an_eos(pair):
    """Catches the checkpoint's own temperature or top-k, words beyond the vocabulary, an EOS that is cut off as pad."""
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
RULES = dopd.TASKS["rules"]
ROW = {"prompt": "7fba=", "answer": "967336", "hints": {"steps": "973", "none": ""}}
WILD = {"prompt": "7fbk=", "answer": "967314", "hints": {"steps": "971", "none": ""}}


def test_checks_grades_and_solutions_by_hand():
    """f is 9, b is 7, a is 3; the wild k happened to be 1. Catches sums that are graded against the answer, not against
    the student's own digit; wild names that count; own data's first match."""
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
    slips, skips = knows_all._replace(slips=1.0), knows_all._replace(skips_hinted=1.0)
    for row, form, author, expected in ((ROW, "none", knows_all, {"967336"}), (WILD, "steps", knows_all, {"967314"}),
                                        (ROW, "steps", slips, {"977538"}), (ROW, "steps", skips, {"=6"}),
                                        (WILD, "none", skips, {"967314", "967347", "967369", "967392"})):
        assert {RULES.solution(row, form, author, rng) for _ in range(200)} == expected      # slips: 16 becomes 7


# ---------------------------------------------------------------------------------------------------------- whole runs
SUMS = [{"prompt": f"What is {i % 24} plus 4?", "answer": "4", "hint": f"count on from {i % 24}"} for i in range(48)]
SMALL = "--batch_size 4 --rollouts 2 --test_prompts 99 --eval_every 2 --steps 4 --max_new_tokens 6"


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def on(pair):
    """Flags for the pair, and their data, in which every prompt occurs twice."""
    write_rows("sums.jsonl", SUMS)
    return f"{SMALL} --teacher {pair}/teacher --student {pair}/student --data sums.jsonl"


def test_the_tiny_experiment_twice(monkeypatch):
    """Catches a test prompt that a policy learned from, luck that no seed decides, and artefacts that are missing."""
    learned, tested = set(), set()
    solution, step, evaluate = dopd.Rules.solution, dopd.distill_step, dopd.evaluate
    monkeypatch.setattr(dopd.Rules, "solution", lambda *args: learned.add(args[1]["prompt"]) or solution(*args))
    monkeypatch.setattr(dopd, "distill_step", lambda *args: learned.update(x["prompt"] for x in args[3]) or step(*args))
    monkeypatch.setattr(dopd, "evaluate", lambda *args: tested.update(x["prompt"] for x in args[1]) or evaluate(*args))
    monkeypatch.setattr(dopd.warm_start, "__defaults__", (3,))                    # steps
    for folder in ("one", "two"):
        torch.manual_seed(len(learned))                                           # nothing hangs on the luck before
        dopd.main(f"{SMALL} --out {folder} --recipe vanilla dopd".split())
    texts, others = ([Path(run, file).read_text() for file in ("metrics.jsonl", "report.md")] for run in ("one", "two"))
    rows, report = [json.loads(line) for line in texts[0].splitlines()], texts[1].splitlines()
    assert texts == others and len(learned) > 300 and len(tested) > 200 and not learned & tested
    assert [row.get("step") for row in rows] == [None, None, 1, 2, 3, 4, None, 1, 2, 3, 4, None]
    assert [line.split("|")[1] for line in report[2:]] == ["student before", "teacher", "vanilla", "dopd"]
    assert "recall" in report[0] and all(f" {name} " in Path("one/tokens.html").read_text() for name in TABLE)
    assert json.loads(Path("one/config.json").read_text())["steps"] == 4 and Path("one/curves.png").exists()
    assert len(transformers.Qwen3ForCausalLM.from_pretrained("one/dopd").model.layers) == RULES.student.layers


def test_a_real_looking_pair(pair, monkeypatch, capsys):
    """Catches a live anchor in place of a frozen one, a teacher that learns, weights kept in bfloat16, contexts that
    differ by more than the hint, a prompt that is both trained on and tested, DOPD's regimes for those of others."""
    monkeypatch.setitem(dopd.RECIPES, "slow", dopd.dopd(anchor_decay=0.75))
    monkeypatch.setitem(dopd.RECIPES, "sides", Recipe(
        [Row(side, "teacher", "forward_kl", "full", 1.0) for side in IntEnum("Side", "LEFT RIGHT")],
        lambda scores: 1 + torch.arange(len(scores["teacher"].logp)) % 2, ("teacher",)))
    steps, step, tested, evaluate = [], dopd.distill_step, set(), dopd.evaluate

    def spied(recipe, policies, optimizer, rows, config):
        assert all((policy.reads == "hinted") == ("privileged" in role) for role, policy in policies.items())
        weights = {role: policy.model.lm_head.weight.detach().double() for role, policy in policies.items()}
        steps.append((recipe.anchor_decay, weights, optimizer.param_groups[0]["lr"], rows))
        return step(recipe, policies, optimizer, rows, config)

    monkeypatch.setattr(dopd, "distill_step", spied)
    monkeypatch.setattr(dopd, "evaluate", lambda *args: tested.update(x["prompt"] for x in args[1]) or evaluate(*args))
    flags = f"{on(pair)} --lr 5e-5 --dtype bfloat16 --out run --recipe dopd dopd_frozen slow sides --hint_template"
    dopd.main([*flags.split(), "{prompt} ({hint})"])
    _, begin, *_ = steps[0]
    for number, (decay, weights, lr, rows) in zip([0, 1, 2, 3] * 4, steps):       # every recipe begins anew
        average = decay * (average if number else begin["student"]) + (1 - decay) * weights["student"]
        torch.testing.assert_close(weights["privileged_student"], average, rtol=0, atol=1e-6)
        moved = (weights["student"] != begin["student"]).double().mean()
        assert moved > 0.5 if number else moved == 0
        assert torch.equal(weights["teacher"], begin["teacher"])
        assert lr == pytest.approx(5e-5 * (0.55 + 0.45 * math.cos(math.pi * number / 4)))
        for row in rows:
            assert tested and row["prompt"] not in tested
            texts = row["prompt"], f"{row['prompt']} (count on from {row['prompt'].split()[2]})"
            assert bpe().batch_decode([row["plain"], row["hinted"]]) == [*map(SAID.format, texts)]
    assert len(steps) == 16 and "What is 0 plus 4? (count on from 0)<|im_end|>" in capsys.readouterr().out
    saved = transformers.Qwen3ForCausalLM.from_pretrained("run/dopd")
    assert saved.config.vocab_size == 352 and saved.dtype == torch.float32        # the student's own shape
    page = Path("run/tokens.html").read_text().split("sides, step")[1]
    assert " LEFT " in page and " RIGHT " in page and " LH " not in page


KILLED = """
import os, sys, torch, dopd
dopd.RECIPES["slow"], save = dopd.dopd(anchor_decay=0.75), torch.save
torch.save = lambda state, path: save(state, path) if (state["recipe"], state["step"]) != ("slow", 4) else (
    open(path, "w"), os.kill(os.getpid(), 9))
dopd.main(sys.argv[1:])
"""


def test_a_run_that_was_stopped_goes_on_with_resume(pair, monkeypatch, capsys):
    """By a loss that is not finite; and by kill -9 in the second of two recipes, while the last checkpoint is written.
    Catches a checkpoint written in place; an anchor, an optimizer, a seed or data that are not restored."""
    monkeypatch.setitem(dopd.RECIPES, "slow", dopd.dopd(anchor_decay=0.75))
    flags, divergence = f"{on(pair)} --lr 1e-2 --recipe vanilla slow --out".split(), dopd.reverse_kl
    dopd.main([*flags, "whole"])
    with monkeypatch.context() as fault, pytest.raises(SystemExit) as stopped:
        fault.setitem(dopd.DIVERGENCES, "reverse_kl", lambda *pair: divergence(*pair) * (
            math.nan if Path("not_finite/checkpoint.pt").exists() else 1.0))
        dopd.main([*flags, "not_finite"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("dopd.py: loss nan") == 1
    killed = subprocess.run([sys.executable, "-c", KILLED, *flags, "killed"], capture_output=True, timeout=120,
                            env=os.environ | {"PYTHONPATH": str(Path(dopd.__file__).parent)})
    assert killed.returncode == -9, killed.stderr[-3000:]
    Path("sums.jsonl").unlink()
    monkeypatch.chdir("whole")                                                    # from another working folder
    for folder in ("../not_finite", "../killed"):
        assert not Path(folder, "slow").exists()
        dopd.main(["--resume", folder])
        for file in ("metrics.jsonl", "vanilla/model.safetensors", "slow/model.safetensors"):
            assert Path(folder, file).read_bytes() == Path("../whole", file).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux tells it")
def test_memory_at_a_real_vocabulary(monkeypatch):
    """A whole step, with two more policies, needs no more than the student's own forward and backward pass."""
    student, teacher = (tiny(height=151_936, seed=seed, initializer_range=0.02) for seed in (1, 2))
    student.vocabulary, student.look = teacher.vocabulary, teacher.look = 151_936, None
    ids = torch.randint(151_936, (8, 52))
    rows = [{"prompt": "", "plain": row[:4].tolist(), "hinted": row[:3].tolist()} for row in ids]
    policies = {"student": Policy(student, "plain"), "privileged_student": Policy(student, "hinted"),
                "privileged_teacher": Policy(teacher, "hinted")}
    monkeypatch.setattr(dopd, "rollout", lambda *args: ids[:, 4:].tolist())
    monkeypatch.setattr(dopd, "AT_ONCE", 128)

    def high():                                                                   # kB, since the last clearing
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

    def peak(work):
        Path("/proc/self/clear_refs").write_text("5")
        return -high() + (work(), high())[1]

    plain = peak(lambda: torch.nn.functional.cross_entropy(
        student(ids).logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten()).backward())
    student.zero_grad()
    step = peak(lambda: dopd.distill_step(dopd.RECIPES["dopd"], policies, note_taker(student, []), rows,
                                          dopd.Config(rollouts=1, top_k=128)))
    assert plain > 5e5 and step < plain


# ------------------------------------------------------------------------------------------------------ data, bad input
def test_tokenizers_with_habits():
    """Catches an EOS at the end of a prompt, an unk that is taken for one, and a token id that the model lacks."""
    plain = bpe(chat_template=None, unk_token="<|endoftext|>")                    # unk is EOS, as GPT-2's
    ends, longer = bpe(chat_template=None), bpe(chat_template=None)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(        # ends every text, as T5's
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
    longer.add_tokens(["<extra>"])                                                # has a word more than the model
    ids, hints = plain("What is three").input_ids, {"steps": "four", "none": ""}
    for number, words in enumerate((plain, ends, longer)):
        rows = [{"prompt": "What is three", "hints": hints}]
        tokenizer, _, student = load(save(f"{number}", tiny(height=300), words))
        dopd.encode(rows, tokenizer, student, "{prompt}\n{hint}", "steps")
        assert rows[0]["plain"] == ids and words("What is three").input_ids == ids + [0] * (words is ends)
    with pytest.raises(SystemExit):
        dopd.encode([{"prompt": "What <extra>", "hints": hints}], tokenizer, student, "{prompt}\n{hint}", "steps")


def test_own_data_is_read_anew_and_the_student_never_sees_the_hint(pair):
    """Catches a cache that tells files apart by size and time, and a student that reads the hint with --hint none."""
    for form, answer in (("steps", "1"), ("none", "2"), ("none", "3")):
        write_rows("own.jsonl", [{"prompt": "What", "answer": answer, "hint": "three"}] * 3)
        os.utime("own.jsonl", (10**9, 10**9))
        rows = dopd.read_rows(dopd.Config(data="own.jsonl", teacher="x", student="x", hint=form))
        assert [row["answer"] for row in rows] == [answer] * 3
    tokenizer, _, student = load(pair / "teacher", pair / "student")
    dopd.encode(rows, tokenizer, student, "{prompt} {hint}", "none")
    assert rows[0]["plain"] == rows[0]["hinted"] == tokenizer(SAID.format("What")).input_ids


FILES = {"text": ["hello"], "few": SUMS[:1] * 9, "null": [*SUMS[:2], SUMS[2] | {"answer": None}]}
MODELS = {"cut": "Qwen3", "other": "Qwen3", "capped": "Gemma2", "dropout": "GPT2"}
BAD = {                                              # flags: words of the line
    "--lr nan": "--lr", "--recipe dop": "--recipe dop: dopd_frozen", "--step 1": "--step", "--hint all": "--hint steps",
    "--data sums.jsonl": "--data --teacher", "--teacher x": "--student", "--resume .": "--resume checkpoint",
    "--resume . --steps 9": "--resume other flag", "PAIR --hint_template {prompt}": "--hint_template hint",
    "PAIR --answer_regex (": "--answer_regex", "PAIR --out other": "--out other", "PAIR --recipe odd": "odd topk",
    "PAIR --student cut": "--student cut up_proj", "PAIR --student other": "--teacher --student tokenizer",
    "PAIR --student capped": "capped: not supported", "PAIR --max_new_tokens 500": "What is 0 --max_new_tokens",
    "PAIR --student dropout --gradient_checkpointing": "dropout: not supported", "PAIR --data few.jsonl": "few",
    "PAIR --data text.jsonl": "text.jsonl", "PAIR --data null.jsonl": "null.jsonl row 3 answer",
    "PAIR --data gone.jsonl": "gone.jsonl no such file", "PAIR --recipe unrouted": "unrouted no router"}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, pair, capsys, monkeypatch):
    """Exit code 2, and one line that names it. Catches logits capped after the last layer, and active dropout, too."""
    monkeypatch.setitem(dopd.RECIPES, "odd", Recipe([dopd.dopd().rows[0]._replace(support="topk")]))
    monkeypatch.setitem(dopd.RECIPES, "unrouted", Recipe(dopd.dopd().rows))
    for name, rows in FILES.items():
        write_rows(f"{name}.jsonl", rows)
    for name in {*MODELS} & {*flags.split()}:
        model = tiny(MODELS[name], **{"final_logit_softcapping": 1.0} if name == "capped" else {})
        if name == "cut":                                                         # of its weights, one lacks
            model.model.layers[1].mlp.up_proj = None
        save(name, model, bpe(additional_special_tokens=["<|other|>"]) if name == "other" else None)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dopd.main(flags.replace("PAIR", on(pair)).split())
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith("dopd.py: ") and all(word in line for word in BAD[flags].split())


# ---------------------------------------------------------------------------------------------------------- inside TRL
TRL = """--model_name_or_path student --teacher_model_name_or_path teacher --data rows.jsonl --output_dir out --use_cpu
    --bf16 False --report_to none --max_completion_length 6 --loss_top_k 3 --rollouts 2 --learning_rate 1e-2
    --max_steps 4 --save_steps 2 --logging_steps 1 --disable_tqdm True
    --per_device_train_batch_size {} --gradient_accumulation_steps {} --recipe {} {}"""
RARE = dopd.dopd()._replace(router=lambda scores: torch.where(                    # trains on one token only
    scores["privileged_teacher"].logp == scores["privileged_teacher"].logp.max(), Regime.HT, -1))


def check_trl(monkeypatch, size, accumulation, name, *flags):
    """Runs tiny_tasks/trl_dopd.py, and checks every step with dopd.distill_step on the same completions."""
    assert pytest.importorskip("trl", "1.16.0") and ("--use_peft" not in flags or pytest.importorskip("peft"))
    from tiny_tasks import trl_dopd
    data = [{"prompt": f"What is {i}? " * (1 + i % 3), "answer": "7", "hint": f"Count {i * i}."} for i in range(8)]
    write_rows("rows.jsonl", data)
    said = [[SAID.format(row["prompt"]), SAID.format(f"{row['prompt']}\n\nHint: {row['hint']}")] for row in data]
    model, drawn, draw, checked = tiny(seed=5), [], torch.multinomial, []
    model.generation_config.update(eos_token_id=list(range(260, 320)), min_p=0.3, typical_p=0.5)     # lengths differ
    _, teacher, frozen = load(save("teacher", tiny(seed=4, hidden_size=48)), save("student", model))
    teacher.vocabulary = frozen.vocabulary = 320                                  # TRL samples from the whole table

    class Spy(trl_dopd.DOPDTrainer):
        def _generate_and_score_completions(self, inputs):
            drawn.clear()
            batch = super()._generate_and_score_completions(inputs)
            rows = [{"prompt": "", **{key: row[key] for key in ("plain", "hinted", "completion")}}
                    for row in batch["dopd"]]
            law = self.model(torch.tensor([rows[0]["plain"]])).logits[0, -1].softmax(-1)
            torch.testing.assert_close(drawn[0][0], law, rtol=1e-4, atol=1e-6)    # nothing of the checkpoint's own
            self.rows = trl_dopd.gather_object(rows)
            return batch

        def _clip_grad_norm(self, model):
            norm, ours, learner, rows = super()._clip_grad_norm(model), [], copy.deepcopy(self.model), self.rows
            student = learner.get_base_model() if "--use_peft" in flags else learner
            anchor = frozen if "frozen" in name else student
            policies = {"student": Policy(student, "plain"), "privileged_student": Policy(anchor, "hinted"),
                        "teacher": Policy(teacher, "plain"), "privileged_teacher": Policy(teacher, "hinted")}
            metrics = dopd.distill_step(dopd.RECIPES[name], policies, note_taker(student, ours), rows,
                                        dopd.Config(rollouts=1, top_k=3))
            torch.testing.assert_close([weight.grad for weight in self.model.parameters() if weight.requires_grad],
                                       ours, rtol=1e-3, atol=1e-6)
            assert len(rows) == 8 and len({len(row["completion"]) for row in rows}) > 2
            assert len({str(row["plain"]) for row in rows}) == 4                  # two completions of each
            assert all(bpe().batch_decode([row["plain"], row["hinted"]]) in said for row in rows)
            checked.append((self, metrics))
            return norm

    monkeypatch.setattr(dopd, "rollout", lambda _, rows, *rest: [row["completion"] for row in rows])
    monkeypatch.setattr(torch, "multinomial", lambda probs, **flags: drawn.append(probs) or draw(probs, **flags))
    monkeypatch.setitem(dopd.RECIPES, "rare", RARE)
    monkeypatch.setattr(trl_dopd, "DOPDTrainer", Spy)
    monkeypatch.setattr(sys, "argv", ["trl_dopd.py", *TRL.format(size, accumulation, name, " ".join(flags)).split()])
    trl_dopd.main()
    for (trainer, ours), theirs in zip(checked, checked[-1][0].state.log_history[-1 - len(checked):]):
        expected = {f"regime/{regime}": share for regime, share in ours["regime_share"].items()}
        expected |= {"loss": ours["loss"], "grad_norm": ours["grad_norm"]}
        assert ours["loss"] > 1e-4 and {key: theirs[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    return trainer.model.state_dict()


@pytest.mark.parametrize("flags", [
    (8, 1, "dopd"), (4, 2, "dopd"), (2, 4, "dopd"), (4, 2, "vanilla"), (2, 4, "rare"), (4, 2, "dopd", "--use_peft"),
    (4, 2, "dopd_frozen"), (4, 2, "dopd_frozen", "--use_peft")])
def test_trl_does_what_dopd_does(flags, monkeypatch):
    """Catches averages per micro-batch; rows that TRL shuffled apart; a wrong anchor; parts with nothing to learn; a
    resumed run with its data in another order, or whose frozen anchor is the student of the checkpoint."""
    whole = check_trl(monkeypatch, *flags)
    if "dopd_frozen" in flags:
        resumed = check_trl(monkeypatch, *flags, "--resume_from_checkpoint out/checkpoint-2")
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_trl_with_two_processes():
    """Catches averages per process; a gradient that is half as large; a process that waits for another."""
    pytest.importorskip("trl", minversion="1.16.0")
    Path("two.py").write_text(f"""import os, sys, tempfile
sys.path[:0] = {sys.path}
import pytest, {Path(__file__).stem} as tests
os.chdir(tempfile.mkdtemp(dir="."))
tests.check_trl(pytest.MonkeyPatch(), 2, 2, "dopd")
""")
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2 two.py".split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------------------ pictures
def eyes(family):
    """A tiny vision-language model and its processor. <see> is token 300."""
    words = bpe("<see>{{ messages[0].content[1].text or 'answer' }}", extra_special_tokens={"image_token": "<see>"})
    sight, text = {"hidden_size": 32, "patch_size": 4, "initializer_range": 0.4}, tiny().config.to_dict()
    if family == "Llava":
        sight |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
        lens = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        processor = transformers.LlavaProcessor(lens, words, 4, "default", words.chat_template, "<see>", 1)
    else:
        sight |= {"depth": 1, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]}
        text |= {"model_type": "qwen3_vl_text", "rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
        lens = transformers.Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096)
        processor = transformers.Qwen3VLProcessor(lens, words, chat_template=words.chat_template)
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=sight, image_token_id=300)
    config.video_token_id = 299            # as if it were one
    return getattr(transformers, f"{family}ForConditionalGeneration")(config), processor


@pytest.mark.parametrize("family", ["Qwen3VL", "Llava"])
def test_a_real_model_sees_the_picture_of_its_row(family, monkeypatch, capsys):
    """Catches the picture of another row, or without the box; positions of text; a processor that is not saved."""
    monkeypatch.setattr(transformers.Qwen3VLProcessor, "get_attributes", lambda *_: ["image_processor", "tokenizer"])
    save("eyes", *eyes(family))            # without videos, which would need torchvision
    for i in range(48):
        Image.new("RGB", (16 + 8 * (i % 5), 24), (5 * i, 0, 99)).save(f"{i}.png")
    rows = [{"prompt": "three", "answer": "4", "hint": "", "image": f"{i}.png", "hinted_image": f"{24 + i}.png"}
            for i in range(24)]
    flags = f"{SMALL} --teacher eyes --student eyes --data rows.jsonl --recipe dopd --out run".split()
    for change in ({"image": None}, {"image": "gone.png"}, {"hinted_image": "gone.png"}):
        write_rows("rows.jsonl", [*rows[:23], rows[23] | change])
        with pytest.raises(SystemExit):
            dopd.main(flags)
        assert capsys.readouterr().err.count(" picture: ") == 1
    write_rows("rows.jsonl", rows)
    if family == "Llava":                  # as a script, which is not called "dopd"
        subprocess.run([sys.executable, dopd.__file__, *flags], check=True, timeout=120)
    else:
        dopd.main(flags)
    rows = torch.load("run/checkpoint.pt", weights_only=True)["splits"]["train"]
    see = transformers.AutoProcessor.from_pretrained("run/dopd")
    student = vision.load(dopd.Config(data="rows.jsonl", teacher="eyes", student="eyes"), 3)[2]
    assert {299, 300} <= {*student.generation_config.suppress_tokens}
    for key, image in (("plain", "image"), ("hinted", "hinted_image")):
        inputs = [see(text="<see>three", images=Image.open(row[image]["path"]), return_tensors="pt") for row in rows]
        outs = [student.generate(**one, output_logits=True, return_dict_in_generate=True) for one in inputs]
        logp = [torch.cat(out.logits)[:, :student.vocabulary].log_softmax(-1) for out in outs]
        completions = [out.sequences[0, len(row[key]):].tolist() for out, row in zip(outs, rows)]
        scores = dopd.score(Policy(student, key), rows, completions)(slice(None))     # in one batch
        torch.testing.assert_close(scores, torch.cat(logp), rtol=0, atol=2e-5)
        assert min((one[0] - logp[0][0]).abs().max() for one in logp[1:]) > 1e-3  # other pictures, other scores


def test_the_tiny_task_with_pictures(monkeypatch):
    """The student sees noisy glyphs, always with the same noise, and reads no names. The box shows digits."""
    monkeypatch.setattr(dopd.warm_start, "__defaults__", (3,))                    # steps
    dopd.main(f"{SMALL} --task vision --hint box --recipe dopd --steps 2 --out run".split())
    saved, drawn = torch.load("run/checkpoint.pt", weights_only=True), Path("run/pictures.png").exists()
    rows, (tokenizer, *models) = saved["splits"]["test"], vision.load(dopd.Config(**saved["config"]), 7)
    for key, noise, more in (("plain", 0.3, {}), ("hinted", 0.0, {}), ("plain", 0.0, {"form": "box"})):    # warm start
        tiles = [vision.TILES[name] for r in rows for name in (r["prompt"][1:-1] if noise else r["answer"][::2])]
        pixels, again = (model.look([row | more for row in rows], key, tiles[0])["pixel_values"] for model in models)
        assert torch.equal(pixels, again) and ((pixels - torch.stack(tiles)[:, None]).std() - noise).abs() < 0.01
        assert drawn and all(tokenizer.decode(r[key]) == f"{r['prompt'][0]}###=" for r in rows)
