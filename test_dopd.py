"""Does dopd.py do what the method says, and do whole runs hold? `python -m pytest -q`

Formulas are compared with slow ones, written here again from their definitions. "Catches" names
the wrong implementations that turn a test red.
"""

import json
import math
import os
import random
import re
import runpy
import subprocess
import sys
import time
import xml.dom.minidom
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no name is looked up

import pandas
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import dopd
from dopd import Config, Policy, Recipe, Regime, Scores, UserError
from tiny_tasks import report
from tiny_tasks.dopd_loss import dopd_loss


@pytest.fixture(autouse=True)
def quiet_place(tmp_path_factory, monkeypatch):
    """Every test in an empty folder of its own, with the same random numbers every time."""
    folder = tmp_path_factory.mktemp("cwd")  # not tmp_path, which holds the name of the test
    monkeypatch.chdir(folder)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    torch.manual_seed(0)


# --- the method once more, slowly, one token after the other
TABLE = {  # regime: whom to follow, the divergence, its top-K, its weight
    "LH": ("privileged_teacher", "reverse_kl", 3, 0.6),
    "LL": ("privileged_student", "reverse_kl", 3, 0.3),
    "HT": ("privileged_teacher", "js", None, 1.0),
    "HS": ("privileged_student", "reverse_kl", 3, 0.6),
}


def naive_kl(p, q):
    return (p * torch.log(p / q)).sum()


def naive_divergence(objective, student, source, k):
    """Of probabilities (V,): of all, or of the student's k likeliest words and a bucket."""
    if k:
        ranked = student.argsort(descending=True)
        student, source = student[ranked], source[ranked]
        student = torch.cat([student[:k], student[k:].sum(0, keepdim=True)])
        source = torch.cat([source[:k], source[k:].sum(0, keepdim=True)])
    if objective == "forward_kl":
        return naive_kl(source, student)
    if objective == "reverse_kl":
        return naive_kl(student, source)
    mixture = (student + source) / 2
    return (naive_kl(source, mixture) + naive_kl(student, mixture)) / 2


def naive_route(q_teacher, q_student):
    """The name of the regime of every token, from its two probabilities."""
    tokens = range(len(q_teacher))
    gaps = [abs(math.log(q_teacher[i] / q_student[i])) for i in tokens]
    sums = [q_teacher[i] + q_student[i] for i in tokens]
    limit = torch.tensor(gaps, dtype=torch.float64).quantile(0.95)
    typical = [i for i in tokens if gaps[i] <= limit]
    mean_gap = sum(gaps[i] for i in typical) / len(typical)
    mean_sum = sum(sums[i] for i in typical) / len(typical)
    regimes = []
    for i in tokens:
        if gaps[i] < mean_gap:
            regimes.append("LH" if sums[i] >= mean_sum else "LL")
        else:
            regimes.append("HT" if q_teacher[i] >= q_student[i] else "HS")
    return regimes


def naive_loss(table, logps, completions):
    """The loss, and the regime of every token. logps: {policy: [(T, V) of every completion]}."""
    p = {name: torch.cat(parts).exp() for name, parts in logps.items()}
    tokens = [token for ids in completions for token in ids]
    shares = [1 / len(ids) / len(completions) for ids in completions for _ in ids]
    regimes = ["ALL"] * len(tokens)
    if "ALL" not in table:
        q = []
        for name in ("privileged_teacher", "privileged_student"):
            q.append([p[name][i][token].item() for i, token in enumerate(tokens)])
        regimes = naive_route(*q)
    loss = 0
    for i, regime in enumerate(regimes):
        source, objective, k, weight = table[regime]
        pair = p["student"][i], p[source][i].detach()
        loss = loss + weight * shares[i] * naive_divergence(objective, *pair, k)
    return loss, regimes


# --- divergences, supports, the router
def divergence(objective, student, source, k):
    pair = dopd.SUPPORTS["top_k" if k else "full"](student, source, k)
    return dopd.DIVERGENCES[objective](*pair)


ALPHA = {"forward_kl": 0.0, "reverse_kl": 1.0, "js": 0.5}  # of TRL


@pytest.fixture
def with_forward_kl(monkeypatch):
    """recipes.py adds it, and more methods: for this test alone."""
    for name in ("RECIPES", "DIVERGENCES"):
        monkeypatch.setattr(dopd, name, {**getattr(dopd, name)})
    runpy.run_path(Path(dopd.__file__).with_name("tiny_tasks") / "recipes.py")


@pytest.mark.parametrize("objective", ALPHA)
@pytest.mark.parametrize("k", [1, 3, None])
def test_divergences_from_their_definition_and_of_trl(objective, k, with_forward_kl):
    """Catches swapped directions; the source's top-K for the student's; a top-K without a tail."""
    logits, source = torch.randn(2, 10, 9, dtype=torch.float64).log_softmax(-1)

    def value_and_gradient(function):
        leaf = logits.clone().requires_grad_()
        value = function(leaf.log_softmax(-1))
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient.abs().max() > 1e-3
        return value.detach(), gradient

    def naive(logp):
        pairs = zip(logp.exp(), source.exp(), strict=True)
        return torch.stack([naive_divergence(objective, *pair, k) for pair in pairs])

    ours = value_and_gradient(lambda logp: divergence(objective, logp, source, k))
    assert_close(ours, value_and_gradient(naive))
    trl = pytest.importorskip("trl.experimental.sdft.loss_utils")

    def of_trl(logp):
        if k is None:
            return trl.compute_divergence(logp, source, ALPHA[objective])
        flags = {"distillation_topk": k, "distillation_add_tail": True}
        flags["distillation_alpha"] = ALPHA[objective]
        return trl.compute_topk_self_distillation_loss(logp, source, **flags)

    assert_close(ours, value_and_gradient(of_trl), check_dtype=False)


@pytest.mark.parametrize("objective", ALPHA)
@pytest.mark.parametrize("k", [2, 99, None])
def test_divergences_of_words_that_are_ruled_out(objective, k, with_forward_kl):
    """Catches nan, in value or gradient, where both rule a word out, and where the source does."""
    logits = torch.tensor([0.3, 0.5, -math.inf, 0.1], requires_grad=True)
    both = torch.tensor([0.1, 0.2, -math.inf, 0.9]).log_softmax(-1)
    value = divergence(objective, logits.log_softmax(-1), both, k)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all() and logits.grad.abs().max() > 1e-3
    alone = torch.tensor([0.1, -math.inf, 0.2, 0.9]).log_softmax(-1)
    value = divergence(objective, logits.log_softmax(-1), alone, None).item()
    assert value < math.log(2) if objective == "js" else value == math.inf


def routed(teacher_logp, student_logp):
    scores = {"privileged_teacher": Scores(teacher_logp, None)}
    return dopd.route(scores | {"privileged_student": Scores(student_logp, None)})


def test_regimes_ties_and_outliers_by_hand():
    """Catches a swapped regime; > for >= at a threshold; outliers in the means, or not routed."""

    def route(q_teacher, q_student):
        logps = torch.tensor([q_teacher, q_student], dtype=torch.float64).log()
        return [Regime(regime).name for regime in routed(*logps).tolist()]

    # Gaps: log 9/8 = 0.12, 0, log 8 = 2.08, 2.08; the last two are above the mean.
    # Sums: 1.7, 0.2, 0.9, 0.9.
    assert route([0.9, 0.1, 0.8, 0.1], [0.8, 0.1, 0.1, 0.8]) == ["LH", "LL", "HT", "HS"]
    # Every gap is the mean gap: high. No gap at all, and q_T = q_S: HT.
    assert route([0.5, 0.25, 0.5], [0.25, 0.5, 0.25]) == ["HT", "HS", "HT"]
    assert route([0.5, 0.25], [0.5, 0.25]) == ["HT", "HT"]
    # All sums but the outlier's are 0.75: a sum that is equal to the mean is high.
    assert route([0.375] * 2 + [0.5] * 2, [0.375] * 2 + [0.25, 0.01]) == ["LH"] * 2 + ["HT"] * 2
    # Gaps: log 1.1 = 0.10 and log 1.5 = 0.41, ten each, and the outlier's 6.9: their mean is 0.25,
    # with it 0.57. Sums: 0.42 and 0.46 (five each), 0.45 (ten), 0.9: mean 0.444, with it 0.466.
    teacher = [0.22] * 5 + [0.24] * 5 + [0.27] * 10 + [0.9]
    student = [0.20] * 5 + [0.24 / 1.1] * 5 + [0.18] * 10 + [0.0009]
    assert route(teacher, student) == ["LL"] * 5 + ["LH"] * 5 + ["HT"] * 11


def test_route_of_very_many_tokens():
    """Catches means in bfloat16, which are coarse, and torch.quantile, which takes 16 million."""
    coarse = torch.log(torch.rand(2, 5000) + 0.01).bfloat16()
    assert torch.equal(routed(*coarse), routed(*coarse.double()))
    many = torch.linspace(-3, 0, 17_000_000)
    assert torch.bincount(routed(many, torch.full_like(many, -1))).min() > 1e6


# --- tiny models: scores, samples, one step
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '' if enable_thinking | default(true) else '<think></think>' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SAID = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think></think>"


def bpe(chat_template=TEMPLATE, **special):
    """300 words, byte by byte as Qwen's. 0 <|endoftext|> is EOS and pad; 2 ends a turn."""
    words, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    sizes = {"vocab_size": 300, "initial_alphabet": alphabet, "special_tokens": SPECIAL}
    text = "What is three plus four? Count on from three: four, five. The answer is seven, six."
    words.train_from_iterator([text], trainers.BpeTrainer(**sizes))
    special = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]} | special
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=words, chat_template=chat_template, **special)


def tiny(family="Qwen3", height=320, seed=0, **more):
    """A model with large random weights: every token of the context counts. Its checkpoint asks to
    be sampled from in its own way."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    sizes |= {"vocab_size": height, "initializer_range": 0.4}
    sizes |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**sizes | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    own = {"temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "eos_token_id": 0}
    model.generation_config = transformers.GenerationConfig(do_sample=True, **own)
    return model


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or bpe()).save_pretrained(folder)
    return str(folder)


def load(teacher, student=None, longest=6, **flags):
    config = Config(teacher=str(teacher), student=str(student or teacher), **flags)
    return dopd.load(config, longest)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two Qwen3 with one tokenizer of 300 words, and tables of 320 and 352 rows."""
    folder = tmp_path_factory.mktemp("pair")
    save(folder / "teacher", tiny(seed=4, hidden_size=48))
    save(folder / "student", tiny(seed=5, height=352))
    return folder


def spy(monkeypatch, owner, name, note):
    """Calls note(*arguments) before every call of owner.name."""
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given: note(*given) or real(*given))


def policies_of(student, anchor, teacher):
    return {
        "student": Policy(student, "plain"),
        "privileged_student": Policy(anchor, "hinted"),
        "teacher": Policy(teacher, "plain"),
        "privileged_teacher": Policy(teacher, "hinted"),
    }


def direct(policy, rows, completions):
    """Log-probs [(T, 300)] of the completions: a plain forward pass each, without padding."""
    logps = []
    for row, ids in zip(rows, completions, strict=True):
        prompt = row[policy.reads]
        logits = policy.model(torch.tensor([prompt + ids]), use_cache=False).logits
        logps.append(logits[0, len(prompt) - 1 : -1, :300].log_softmax(-1))
    return logps


def note_taker(model, gradient):
    """An optimizer that only writes the gradient down."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]

    def step():
        gradient.extend(weight.grad.clone() for weight in learning)

    return SimpleNamespace(zero_grad=model.zero_grad, step=step)


def in_parts():
    """The paper's recipe with every term in two, whose weights add up to its weight."""
    terms = []
    for term in dopd.dopd().terms:

        def rest(scores, weight=term.weight):
            return weight - scores["privileged_teacher"].logp

        terms.append(term._replace(weight=rest))
        terms.append(term._replace(weight=lambda scores: scores["privileged_teacher"].logp))
    return dopd.dopd()._replace(terms=terms)


ROWS = []
for ids in ([0, 65, 7], [9], [88, 0, 0, 4, 5]):
    ROWS.append({"prompt": str(ids), "plain": ids, "hinted": [5, 0, 9, *ids]})
FOUR_EACH = [row for row in ROWS for _ in range(4)]


def step(policies, gradient, name="dopd", micro_batch=10_000):
    """One step, of which only the gradient is written down."""
    optimizer = note_taker(policies["student"].model, gradient)
    config = Config(rollouts=4, top_k=3, micro_batch=micro_batch)
    return dopd.distill_step(dopd.RECIPES[name], policies, optimizer, ROWS, config)


def sampled_and_scored(pair, frozen=False):
    """The policies, 12 completions of unequal lengths, and their log-probs, one by one."""
    _, teacher, student = load(pair / "teacher", pair / "student")
    anchor = load(pair / "student", save("anchor", tiny(seed=3)))[2] if frozen else student
    policies = policies_of(student.double(), anchor.double(), teacher.double())
    student.generation_config.eos_token_id = [*range(100)]
    torch.manual_seed(3)  # which brings every regime
    completions = dopd.rollout(policies["student"], FOUR_EACH, 10)
    logps = {role: direct(policy, FOUR_EACH, completions) for role, policy in policies.items()}
    return policies, completions, logps


@pytest.mark.parametrize("name", [*dopd.RECIPES, "in_parts"])
def test_step_token_by_token(name, pair, monkeypatch):
    """Catches a gap or a source from the wrong model, with the wrong prompt, or one token off;
    means per micro-batch, or not per completion first; log-probs (N, V) that are kept."""
    monkeypatch.setitem(dopd.RECIPES, "in_parts", in_parts())
    recipe, table = dopd.RECIPES[name], TABLE
    if name in ("opd", "privileged_opd"):
        table = {"ALL": (name.replace("opd", "teacher"), "reverse_kl", None, 1.0)}
    assert recipe.anchor_decay == (name == "dopd_frozen")
    policies, completions, logps = sampled_and_scored(pair, name == "dopd_frozen")
    student, (loss, regimes) = policies["student"].model, naive_loss(table, logps, completions)
    gradient = torch.autograd.grad(loss, [*student.parameters()])
    norm = math.sqrt(sum(part.square().sum() for part in gradient))
    assert {*regimes} == {*table} and norm > 1
    entropy = torch.special.entr(torch.cat(logps["student"]).exp()).sum(-1).mean().item()

    asked, at_once, kept = [], [], []
    monkeypatch.setattr(dopd, "rollout", lambda *given: asked.append(given[:2]) or completions)
    monkeypatch.setattr(dopd, "AT_ONCE", 7)
    spy(monkeypatch, dopd.LogProbs, "__getitem__", lambda _, index: at_once.append(len(index)))
    hooks = torch.autograd.graph.saved_tensors_hooks
    for micro_batch in (10_000, 5):
        ours = []
        with hooks(lambda tensor: kept.append(tensor.shape[-1]) or tensor, lambda tensor: tensor):
            metrics = step(policies, ours, name, micro_batch)
        numbers = [metrics["loss"], metrics["entropy"], metrics["grad_norm"]]
        assert numbers == pytest.approx([loss.item(), entropy, norm], rel=1e-4)
        for regime, share in metrics["regime_share"].items():
            assert share == pytest.approx(regimes.count(regime) / len(regimes))
        expected = [part / norm for part in gradient]  # clipped to a norm of 1
        assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert asked == [(policies["student"], FOUR_EACH)] * 2  # samples see no hint
    assert max(at_once) == 7 and 300 not in kept
    for policy in policies.values():
        assert policy.model is student or policy.model.lm_head.weight.grad is None

    start = sum(len(ids) for ids in completions[:8])
    example, own = metrics["rollouts"][2], slice(start, start + len(completions[8]))
    assert example["ids"] == completions[8] and example["regimes"] == regimes[own]
    for role in recipe.router_reads:
        q = [logps[role][8][i][token].exp().item() for i, token in enumerate(completions[8])]
        assert example[role] == pytest.approx(q, abs=1e-4)


def test_dopd_loss(pair):
    """Catches padding that counts, a gradient through a source, logits that pass for log-probs."""
    policies, completions, logps = sampled_and_scored(pair)
    tokens = pad_sequence([torch.tensor(ids) for ids in completions], True, padding_value=-100)
    names = ("student", "privileged_teacher", "privileged_student")
    padded = [pad_sequence(logps[name], True, padding_value=math.nan) for name in names]
    table = TABLE | {"LL": ("privileged_student", "reverse_kl", 3, 0.1)}
    losses = [naive_loss(table, logps, completions)[0]]
    losses.append(dopd_loss(*padded, tokens, tokens >= 0, top_k=3, beta_weak=0.1))
    weights = [*policies["student"].model.parameters()]
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    assert_close(*losses)
    assert_close(*gradients)
    with pytest.raises(ValueError, match="privileged_student"):
        dopd_loss(*padded[:2], 3 * padded[2], tokens, tokens >= 0, top_k=3)


FAMILIES = {name: {} for name in ("Qwen3", "GPT2", "Llama", "Bloom", "Mamba")}
FAMILIES["Lfm2"] = {"layer_types": ["conv", "full_attention"]}
FAMILIES["RecurrentGemma"] = {"block_types": ["recurrent", "attention"], "logits_soft_cap": 1e6}


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_that_of_every_row_alone(family):
    """Catches positions that count the padding, and padding that a token sees. Token 0, which
    fills the gaps, is the EOS and a word of prompts. These models pass the check at loading."""
    _, _, model = load(save("model", tiny(family, **FAMILIES[family])))
    completions = [[4, 5, 0], [6, 0], [1, 2, 3, 4], [5]]
    rows = [{"plain": ids, "hinted": [8, *ids]} for ids in ([3, 0, 5, 1], [7], [3, 9, 1], [0, 2])]
    for reads, size in (("plain", 10_000), ("plain", 3), ("hinted", 10_000)):
        policy = Policy(model, reads)
        scored = dopd.score(policy, rows, completions, size)[:]
        alone = torch.cat(direct(policy, rows, completions))
        assert_close(scored, alone, rtol=1e-3, atol=1e-3)
    dopd.check_scores(model, rows)


def faulty_attention(module, query, key, value, attention_mask, **options):
    """As a kernel of a GPU did: its gradient is nan in the query rows that see nothing."""
    if attention_mask is not None and query.requires_grad:
        blind = ~attention_mask.any(-1, keepdim=True)
        query.register_hook(lambda gradient: gradient.masked_fill(blind, math.nan))
    sdpa = transformers.AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, attention_mask, **options)


def test_an_attention_that_fails_on_masked_rows_does_not_hurt(pair):
    """Catches scores of rows that are padded on the left, and any mask with an empty row."""
    transformers.AttentionInterface.register("faulty", faulty_attention)
    AttentionMaskInterface.register("faulty", sdpa_mask)
    gradients = {"sdpa": [], "faulty": []}
    for attention, gradient in gradients.items():
        _, teacher, student = load(pair / "teacher", pair / "student")
        student.set_attn_implementation(attention)
        torch.manual_seed(3)
        step(policies_of(student, student, teacher), gradient)
    assert_close(gradients["faulty"], gradients["sdpa"])
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])  # with it the fault is there
    student(torch.tensor([[0, 0, 9], [4, 5, 6]]), mask).logits[:, -1].sum().backward()
    assert not student.model.embed_tokens.weight.grad.isfinite().all()


def test_a_gradient_that_is_not_finite_names_where_it_began(pair):
    """Catches a step with nan; the name that the backward pass meets last; clipping before."""
    _, teacher, student = load(pair / "teacher", pair / "student")
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        student.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)
    gradient = []
    with pytest.raises(UserError, match=f"not finite.*{name}"):
        step(policies_of(student, student, teacher), gradient)
    assert not gradient


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4}
LONGROPE |= {"short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
LIGHTNING = {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}
FAULTY = {  # fault: a model that has it
    "softcapped logits": ("Gemma2", {"final_logit_softcapping": 1.0}),
    "padded samples": ("MiniMax", LIGHTNING),
    "longest row": ("Phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 12}),
    "dropout": ("GPT2", {}),
    "batches": ("Qwen3", {}),
}


def mix_the_rows(model, given, options, output):
    """As experts with a limited capacity do."""
    if not options["use_cache"] and len(given[0]) > 1:
        output.last_hidden_state = output.last_hidden_state.flip(0)


@pytest.mark.parametrize("fault", FAULTY)
def test_a_model_that_samples_from_other_scores_is_refused(fault):
    """Catches rollouts that are off-policy in silence; a check without the data's longest row."""
    family, more = FAULTY[fault]
    _, _, model = load(save("model", tiny(family, **more)))
    model.train(fault == "dropout")
    if fault == "batches":
        model.base_model.register_forward_hook(mix_the_rows, with_kwargs=True)
    rows = [{"plain": ids, "hinted": ids} for ids in ([3, 9], [*range(3, 17)], [7, 5])]
    with pytest.raises(UserError, match="scores"):
        dopd.check_scores(model, rows)


def test_rollout_samples_from_the_students_own_distribution_up_to_an_end(pair):
    """Catches the checkpoint's own temperature or top-k, words beyond the vocabulary, left padding
    that samples see, an end token that is cut off as if it were padding."""
    _, _, student = load(pair / "teacher", save("gpt2", tiny("GPT2", height=352, seed=4)), 1)
    policy, two = Policy(student, "plain"), [{"plain": [7]}, {"plain": [3, 0, 5, 1]}]
    tokens = torch.tensor(dopd.rollout(policy, two * 4000))
    for number, logp in enumerate(direct(policy, two, [[0], [0]])):
        expected = 4000 * logp[0].exp()
        counts = torch.bincount(tokens[number::2, 0], minlength=300)
        assert ((counts - expected).abs() <= 5 * expected.sqrt() + 2).all()
        assert expected.max() < 2000  # not sure of one word
    policies, completions, _ = sampled_and_scored(pair)
    ends = policies["student"].model.generation_config.eos_token_id
    assert len({len(ids) for ids in completions}) > 3
    for ids in completions:
        assert not {*ids[:-1]} & {*ends} and (len(ids) == 6 or ids[-1] in ends)


# --- tasks and grades
RULES = dopd.TASKS["rules"]
ROW = {"prompt": "7fba=", "answer": "967336", "hint": "973"}
WILD = {"prompt": "7fbk=", "answer": "967314", "hint": "971"}


def test_solutions_and_grades_by_hand():
    """f is 9, b is 7, a is 3; the wild k happened to be 1. Catches a hint that is not read, a
    lucky guess that counts, a solution that is right only at its end."""
    assert RULES.grade(ROW, "967336") == {"skips": False, "exact match": True}
    assert RULES.grade(ROW, "=6") == {"skips": True, "exact match": True}
    assert RULES.grade(WILD, "967314") == {"skips": False}
    for wrong in ("6", "=5", "9673366", "977336"):
        assert not RULES.grade(ROW, wrong)["exact match"]

    def written(row, hinted, **habits):
        author, rng = RULES.teacher._replace(knows=10, **habits), random.Random(0)
        return {RULES.solution(row, hinted, author, rng) for _ in range(200)}

    assert written(ROW, False) == {"967336"}
    assert written(ROW, True, slips=1.0) == {"977538"}  # 7 + 9 = 17
    assert written(ROW, True, skips_hinted=1.0) == {"=6"}
    assert written(WILD, True) == {"967314"}
    assert written(WILD, False) == {"967314", "967347", "967369", "967392"}


README = Path(dopd.__file__).with_name("README.md").read_text(encoding="utf-8")
BOXED = re.search("--answer_regex '(.*)'", README)[1]
GRADES = [  # pattern, completion, answer, right?
    (r"is (\d+)", "it is 3, no, is 7.", " 7", True),
    (r"is (\d+)", "is 7, no, is 3", "7", False),
    (r"is (\d+)", "7", "7", False),
    (r"(-?[\d.,]*)", "it is 42", "42", True),  # it also matches nothing, at the end
    (r"is (\d+)|$", "is 42", "42", True),
    (r"4|(x)", "4", "4", True),  # the group is not in the match
    (r"is (\d+)( dollars)?", "is 42 dollars", "42", True),
    (BOXED, r"so \boxed{\sqrt{\frac{1}{2}}}.", r"\sqrt{\frac{1}{2}}", True),
    (BOXED, r"\boxed{7}, in \boxed{}", "7", True),
    ("(?s).+", "two\nlines", "two\r\nlines", True),
    (r"(a|aa)+$", "a" * 40 + "b", "a", False),  # an hour without a time limit
]


@pytest.mark.parametrize("pattern, completion, answer, right", GRADES)
def test_grades_of_own_data(pattern, completion, answer, right):
    """Catches the first match, an empty last match, nested braces, a pattern that never ends."""
    task, start = dopd.OwnData(Config(answer_regex=pattern)), time.process_time()
    assert task.grade({"answer": answer}, completion)["exact match"] == right
    assert time.process_time() - start < 5


def test_a_completion_that_was_cut_off_is_wrong(pair, monkeypatch):
    """Catches an answer that happens to be right where max_new_tokens ended the completion."""
    tokenizer, teacher, student = load(pair / "teacher", pair / "student")
    ready = dopd.Ready(dopd.OwnData(Config()), {}, tokenizer, teacher, student)
    completions = tokenizer(["four", "four<|endoftext|>", "five<|endoftext|>"]).input_ids
    monkeypatch.setattr(dopd, "rollout", lambda *_: completions)
    rows = [ROWS[0] | {"answer": "four"}] * 3
    grades = dopd.evaluate(Policy(student, "plain"), rows, ready, Config())
    assert grades["exact match"] == pytest.approx(1 / 3)
    assert grades["ended"] == pytest.approx(2 / 3)


# --- whole runs
SMALL = "--batch_size 4 --rollouts 2 --test_prompts 99 --eval_every 2 --steps 4"
SUMS = []
for i in [*range(24)] * 2:
    SUMS.append(
        {"prompt": f"What is {i} plus 4?", "answer": f"{i + 4}", "hint": f"count on from {i}"}
    )
# A terminal that has no Chinese, and the plots of a notebook.
ODD_TERMINAL = {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": os.pathsep.join(sys.path)}
ODD_TERMINAL["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def write_rows(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def on(pair):
    """Flags for the pair, and their data, in which every prompt occurs twice."""
    write_rows("sums.jsonl", SUMS)
    own = "--data sums.jsonl --max_new_tokens 6"
    return f"{SMALL} --teacher {pair}/teacher --student {pair}/student {own}"


def python(*argv):
    """Runs a script to its end in a process of its own."""
    flags = {"capture_output": True, "timeout": 300, "env": os.environ | ODD_TERMINAL}
    return subprocess.run([sys.executable, *argv], **flags)


def refused(argv, capsys):
    """The line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        dopd.main(argv)
    said = capsys.readouterr().err
    line = said.splitlines()[-1]
    assert stopped.value.code == 2 and (line.startswith("dopd.py: ") or "usage: " in said)
    return line


def test_the_tiny_experiment_twice(monkeypatch):
    """Catches a test prompt that a policy learned from, random numbers that no seed decides, a
    validation that changes the training, files that are missing."""
    learned, tested = set(), set()
    spy(monkeypatch, dopd.Rules, "solution", lambda *x: learned.add(x[1]["prompt"]))
    spy(monkeypatch, dopd, "evaluate", lambda *x: tested.update(r["prompt"] for r in x[1]))
    monkeypatch.setattr(dopd.warm_start, "__defaults__", (3,))  # steps
    logs = []
    for folder, every in (("one", 4), ("two", 2)):
        torch.manual_seed(len(learned))  # nothing hangs on the random numbers before
        dopd.main(f"{SMALL} --eval_every {every} --out {folder} --recipe dopd".split())
        logs.append([row | {"validation": None} for row in log_of(folder)])
    assert logs[0] == logs[1]
    for file in ("teacher/model.safetensors", "dopd/model.safetensors"):
        assert Path("one", file).read_bytes() == Path("two", file).read_bytes()
    assert len(learned) > 300 and len(tested) > 200 and not learned & tested
    assert json.loads(Path("one/config.json").read_text())["steps"] == 4
    student = transformers.Qwen3ForCausalLM.from_pretrained("one/dopd")
    assert len(student.model.layers) == RULES.student.layers
    drawn = python(Path(dopd.__file__).with_name("tiny_tasks") / "report.py", "one")
    assert drawn.returncode == 0 and b"LH" in drawn.stdout, drawn.stderr[-3000:]
    for name in ("student before", "teacher", "teacher, with the hint", "dopd"):
        assert re.search(rf"\| {name} .*\d\.\d\d", Path("one/report.md").read_text())
    assert {"tokens.svg", "curves.png", "router.png"} <= {*os.listdir("one")}


def test_a_real_looking_pair(pair, monkeypatch, capsys):
    """Catches a live anchor for a frozen one, a teacher that learns, weights kept in bfloat16, a
    prompt in training and test, rows in the order of the file, prompts that differ by more than
    the hint."""
    monkeypatch.setitem(dopd.RECIPES, "slow", dopd.dopd(anchor_decay=0.75))
    steps, tested, order = [], set(), []

    def note(recipe, policies, optimizer, rows, config):
        models = [policies[name].model for name in ("student", "privileged_student", "teacher")]
        assert policies == policies_of(*models)
        heads = [model.lm_head.weight.detach().double() for model in models]
        steps.append((recipe.anchor_decay, optimizer.param_groups[0]["lr"], *heads))
        for row in rows:
            assert tested and row["prompt"] not in tested
            order.append(int(row["prompt"].split()[2]))
            prompts = row["prompt"], f"{row['prompt']} ({row['hint']})"
            read = bpe().batch_decode([row["plain"], row["hinted"]])
            assert read == [SAID.format(prompt) for prompt in prompts]

    spy(monkeypatch, dopd, "distill_step", note)
    spy(monkeypatch, dopd, "evaluate", lambda *x: tested.update(r["prompt"] for r in x[1]))
    flags = f"{on(pair)} --lr 5e-5 --dtype bfloat16 --out run --recipe dopd dopd_frozen slow"
    dopd.main([*flags.split(), "--hint_template", "{prompt} ({hint})"])
    assert "What is 0 plus 4? (count on from 0)<|im_end|>" in capsys.readouterr().out
    begin, first_teacher = steps[0][2], steps[0][4]
    for number, (decay, lr, student, anchor, teacher) in enumerate(steps):
        place = number % 4
        if place == 0:  # every recipe begins anew
            average = begin
        average = decay * average + (1 - decay) * student
        assert_close(anchor, average, rtol=0, atol=1e-6)
        moved = (student != begin).double().mean()
        assert (moved > 0.5 if place else moved == 0) and torch.equal(teacher, first_teacher)
        assert lr == pytest.approx(5e-5 * (0.55 + 0.45 * math.cos(math.pi * place / 4)))
    assert order[:16] == order[16:32] and order[:10] != sorted(order[:10])
    assert len({*order[:16]}) > 8
    saved = transformers.Qwen3ForCausalLM.from_pretrained("run/slow")
    assert saved.config.vocab_size == 352 and saved.dtype == torch.float32  # its own shape


def test_bfloat16_sees_the_weights_of_now(pair):
    """Catches an autocast that keeps the weights of the first step."""
    on(pair)
    flags = {"teacher": str(pair / "teacher"), "student": str(pair / "student"), "steps": 2}
    flags |= {"data": "sums.jsonl", "max_new_tokens": 6, "dtype": "bfloat16", "lr": 1e-2}
    config = Config(recipe=["opd"], out="run", **flags)
    ready = dopd.run(config)
    tested = {row["tested"]: row["test"]["entropy"] for row in log_of("run") if "tested" in row}
    saved = load(pair / "teacher", "run/opd")[2]
    with torch.autocast("cpu", torch.bfloat16):
        grades = dopd.evaluate(Policy(saved, "plain"), ready.splits["test"], ready, config)
    assert tested["opd"] == pytest.approx(grades["entropy"], abs=1e-4)
    assert abs(tested["opd"] - tested["student before"]) > 1e-2


def test_a_full_disk_ends_a_run_that_keeps_what_it_has(pair, monkeypatch, capsys):
    """Catches steps and students that are written only at the end of a run."""
    saved, save_pretrained = [], transformers.PreTrainedModel.save_pretrained

    def fill_the_disk(model, folder, **options):
        saved.append(Path("full/metrics.jsonl").read_text().count("\n"))
        if len(saved) == 2:
            raise OSError("No space left on device")
        save_pretrained(model, folder, **options)

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fill_the_disk)
    line = refused([*on(pair).split(), "--recipe", "opd", "--lr", "1e-2", "--out", "full"], capsys)
    assert "--out full" in line and "No space" in line
    assert saved == [4 + 1, 4 + 3]  # lines that are there: tests of the pair, and steps
    log = log_of("full")
    assert [row["step"] for row in log if "step" in row] == [1, 2, 3]
    assert log[5]["validation"]["exact match"] == 0
    kept, first = load(pair / "teacher", "full/opd")[2], load(pair / "teacher", pair / "student")[2]
    assert not torch.equal(kept.lm_head.weight, first.lm_head.weight)


def test_the_report_of_a_pair(pair, capsys):
    """Catches control characters that a random model writes: no browser opens such an SVG."""
    dopd.main(f"{on(pair)} --recipe dopd --steps 2 --out run".split())
    steps = Path("run/metrics.jsonl").read_text()
    control = bpe().get_vocab()["\u0115"]  # byte 0x15, as BPE writes it
    steps = re.sub(r'"ids": \[\d+', f'"ids": [{control}', steps)
    Path("run/metrics.jsonl").write_text(steps)
    report.main(["run"])
    assert "cut off" in capsys.readouterr().out
    assert "x15" in str(xml.dom.minidom.parse("run/tokens.svg").toxml())


def test_a_script_that_only_tests_on_an_odd_terminal(pair):
    """Catches a name that exists only after an import, an end that needs a training, and a print
    that ends a run."""
    flags = on(pair).replace("sums", "chinese")
    write_rows("chinese.jsonl", [row | {"hint": row["hint"] + "你好"} for row in SUMS])
    ended = python(dopd.__file__, *flags.split(), "--steps", "0", "--out", "run")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert len(log_of("run")) == 4


# --- data, models and flags of users
def test_tokenizers_with_habits():
    """Catches an end that a tokenizer adds, and is left; an end that the row or the template wrote,
    and is cut off; a beginning that is lost, or written twice; an unknown word taken for an end."""
    begin, eos = "<|im_start|>", "<|endoftext|>"
    plain, unknown, adds = bpe(None), bpe(None, unk_token=eos), bpe(None)
    chat = bpe("{{ messages[0].content }}<|im_end|>")
    adding = processors.TemplateProcessing(
        single=f"{begin} $A {eos}", special_tokens=[(begin, 1), (eos, 0)]
    )
    for words in (adds, chat):
        words.backend_tokenizer.post_processor = adding
    for words in (plain, unknown, adds, chat):
        tokenizer, *both = load(save("model", tiny(height=300), words))
        for prompt in ("What is three", f"What is{eos}", f"What{eos}{eos}"):
            rows = [{"prompt": prompt, "hint": "four"}]
            dopd.encode(rows, tokenizer, both, "{prompt}\n{hint}")
            text = {adds: f"{begin}{prompt}", chat: f"{prompt}<|im_end|>"}.get(words, prompt)
            assert rows[0]["plain"] == plain(text).input_ids


def test_the_end_tokens_of_both_models_end_a_completion():
    """Catches a student that goes on after its answer, since only the teacher knows how it ends."""
    for teacher, student, ends in ((2, None, [0, 2]), ([2, 5], 3, [0, 2, 3, 5])):
        folders = []
        for name, known in (("teacher", teacher), ("student", student)):
            model = tiny()
            model.generation_config.eos_token_id = known
            folders.append(save(name, model))
        _, *both = load(*folders)
        assert [model.generation_config.eos_token_id for model in both] == [ends] * 2


def test_words_that_the_tokenizer_or_the_model_lacks():
    """Catches prompts that become the same tokens, and a token beyond the table of the model."""
    few = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "What": 2}, unk_token="<unk>"))
    few.pre_tokenizer = pre_tokenizers.Whitespace()
    few = transformers.PreTrainedTokenizerFast(tokenizer_object=few, eos_token="<eos>")
    more = bpe(None)
    more.add_tokens("<more>")
    for words, prompts in ((few, ["What one", "What two"]), (more, ["What <more>"])):
        tokenizer, *both = load(save("model", tiny(height=300), words))
        rows = [{"prompt": prompt, "hint": ""} for prompt in prompts]
        with pytest.raises(UserError, match=prompts[-1]):
            dopd.encode(rows, tokenizer, both, "{prompt}\n{hint}")


def test_texts_stand_in_the_rows_as_in_the_file():
    """Catches a loader that guesses types, takes brackets for a pattern, or moves columns."""
    rows = [{"prompt": "2024-01-31", "answer": "007", "hint": "NA"}]
    rows.append({"prompt": "2025-01-31", "answer": "1.50", "hint": "True"})
    table = pandas.DataFrame(rows)
    write_rows("data1.jsonl", rows[:1])
    write_rows("data[1].jsonl", rows)
    Path("blank.jsonl").write_text(Path("data[1].jsonl").read_text() + "\n\n")
    Path("data.json").write_text(json.dumps(rows))
    table.to_csv("data.csv", index=False, encoding="utf-8-sig")  # as Excel does
    Path("folder").mkdir()
    table.to_parquet("folder/data.parquet")
    for data in (
        "data[1].jsonl",
        "blank.jsonl",
        "data.json",
        "data.csv",
        "folder/data.parquet",
        "folder",
    ):
        assert dopd.read_rows(Config(data=data)) == rows
    Path("data.csv").write_text("prompt,answer,hint\nYes, or no?,yes,it is\nNo?,no,\n")
    with pytest.raises(UserError, match="row 1: hint"):  # a comma too many
        dopd.read_rows(Config(data="data.csv"))


def test_an_adapter_teaches_but_cannot_learn(pair):
    """Catches a student that is frozen, and a teacher without its adapter."""
    peft = pytest.importorskip("peft")
    teacher = load(pair / "teacher", pair / "student")[1]
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    save("lora", peft.get_peft_model(teacher, config))
    with pytest.raises(UserError, match="lora"):
        load(pair / "teacher", "lora")
    adapted, ids = load("lora", pair / "student")[1], torch.tensor([[4, 5, 6]])
    assert_close(adapted(ids).logits, teacher(ids).logits)


FILES = {  # name: what is wrong with the last row
    "null": {"answer": None},
    "empty": {"prompt": ""},
    "list": {"hint": ["one", "two"]},
    "image": {"image": "cat.png"},
    "special": {"answer": "<|im_end|>"},
    "long": {"hint": "count on " * 12},  # 101 tokens: too many for the teacher alone
}
MODELS = {"cut": {}, "other": {}, "deaf": {}, "short": {"max_position_embeddings": 100}}
BAD = {  # flags: words of the line
    "--lr nan": "--lr nan",
    "--recipe dop": "--recipe dop dopd_frozen",
    "--step 1": "--step",
    "--data sums.jsonl": "--data --teacher",
    "--teacher somewhere": "--teacher --student both",
    "--max_new_tokens 9": "--max_new_tokens --data",
    "--hint_template {prompt}": "--hint_template --data",
    "PAIR --hint_template {prompt}": "hint",
    "PAIR --answer_regex (": "--answer_regex",
    "PAIR --answer_regex [0-9]": "--answer_regex '10'",
    "PAIR --out other": "--out other",
    "PAIR --recipe odd": "odd topk",
    "PAIR --recipe student": "--recipe student",
    "PAIR --recipe unrouted": "unrouted router",
    "PAIR --recipe unread": "unread router_reads",
    "PAIR --student deaf": "What loses prompt",
    "PAIR --student cut": "--student cut up_proj",
    "PAIR --student other": "--teacher --student <|other|>",
    "PAIR --max_new_tokens 500": "What is 0 tokens",
    "PAIR --data few.jsonl": "few",
    "PAIR --data null.jsonl": "null.jsonl 49 answer",
    "PAIR --data empty.jsonl": "empty.jsonl 49 prompt",
    "PAIR --data list.jsonl": "list.jsonl 49 hint",
    "PAIR --data image.jsonl": "image.jsonl image",
    "PAIR --data special.jsonl": "<|im_end|>",
    "PAIR --data long.jsonl --teacher short": "tokens",
    "PAIR --data gone.jsonl": "gone.jsonl",
    "PAIR --data broken.jsonl": "--data broken.jsonl line 2",
}


class Short(dopd.Rules):
    characters = "01"


def test_characters_that_a_tokenizer_lacks(capsys, monkeypatch):
    """Of a new task, and of a pair. Catches a traceback."""
    monkeypatch.setitem(dopd.TASKS, "short", Short(*RULES))
    assert "--task short" in refused("--task short --out tiny".split(), capsys)
    tokenizer, model = dopd.tiny_policy("Whatis ", 1)
    save("pair", model, tokenizer)
    write_rows("sums.jsonl", SUMS)
    line = refused("--teacher pair --student pair --data sums.jsonl".split(), capsys)
    assert "prompt 'What is" in line and "--hint_template" in line


@pytest.mark.parametrize("flags", BAD)
def test_bad_input(flags, pair, capsys, monkeypatch):
    """Exit code 2, and one line that names it. Catches a traceback, or a run in spite of it."""
    terms = dopd.dopd().terms
    monkeypatch.setitem(dopd.RECIPES, "odd", Recipe([terms[0]._replace(support="topk")]))
    monkeypatch.setitem(dopd.RECIPES, "student", dopd.dopd())
    monkeypatch.setitem(dopd.RECIPES, "unrouted", Recipe(terms))
    monkeypatch.setitem(dopd.RECIPES, "unread", Recipe(terms, dopd.route, ("teacher",)))
    argv = flags.replace("PAIR", on(pair)).split()
    write_rows("few.jsonl", SUMS[:1] * 9)
    for name, change in FILES.items():
        write_rows(
            f"{name}.jsonl", [*SUMS, {"prompt": "Why?", "answer": "4", "hint": "so"} | change]
        )
    Path("broken.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": "Why?", ')
    for name in {*MODELS} & {*argv}:
        model, tokenizer = tiny(**MODELS[name]), bpe()
        if name == "cut":  # one of its weights is missing
            model.model.layers[1].mlp.up_proj = None
        if name == "deaf":
            tokenizer.chat_template = "What did you say?"
        if name == "other":
            tokenizer.add_tokens("<|other|>")
        save(name, model, tokenizer)
    if "--out" in argv:
        Path("other").mkdir(exist_ok=True)
        Path("other/config.json").write_text("{}")
    line = refused(argv, capsys)
    assert all(word in line for word in BAD[flags].split()), line
