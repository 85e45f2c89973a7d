"""Breaks a copy of dopd.py, one thing at a time, and says which unit tests turn red: results/breakages.md.

    python tiny_tasks/breakages.py                       # all of them, some minutes
    python tiny_tasks/breakages.py tail outliers         # those with one of these words in their name

A breakage that no test notices is a hole in the tests: the last line counts them. Tests of whole runs are left out.
"""

import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parent.parent
BASE, TESTS = ROOT / "dopd.py", ROOT / "test_dopd.py"

# (what is broken, the text in dopd.py, the text instead; lists where it takes several)
MATH = [  # name, old, new (or lists of several)
 ("forward and reverse KL swapped in the table", '{"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js"', '{"forward_kl": reverse_kl, "reverse_kl": forward_kl, "js"'),
 ("`forward_kl` computes KL(student, source)", "return (source.exp() * (source - student)).sum(-1)", "return (student.exp() * (student - source)).sum(-1)"),
 ("`reverse_kl` computes KL(source, student)", "return (student.exp() * (student - source)).sum(-1)", "return (source.exp() * (source - student)).sum(-1)"),
 ("JS: mixture not halved", "torch.logaddexp(student, source) - math.log(2)\n    return", "torch.logaddexp(student, source)\n    return"),
 ("JS: mean of log-probs as the mixture", "mixture = torch.logaddexp(student, source) - math.log(2)", "mixture = (student + source) / 2"),
 ("JS: only the source's half", "0.5 * (forward_kl(mixture, source) + forward_kl(mixture, student))", "forward_kl(mixture, source)"),
 ("JS: KL(m, ·) instead of KL(·, m)", "0.5 * (forward_kl(mixture, source) + forward_kl(mixture, student))", "0.5 * (reverse_kl(mixture, source) + reverse_kl(mixture, student))"),
 ("top-K renormalised, no tail", "return torch.cat([logp.gather(-1, kept), others.logsumexp(-1, keepdim=True)], -1)", "return logp.gather(-1, kept).log_softmax(-1)"),
 ("top-K without a tail", "return torch.cat([logp.gather(-1, kept), others.logsumexp(-1, keepdim=True)], -1)", "return logp.gather(-1, kept)"),
 ("the source's top-K", "kept = student.topk(min(k, student.shape[-1]), -1).indices", "kept = source.topk(min(k, student.shape[-1]), -1).indices"),
 ("each side its own top-K", "return torch.cat([logp.gather(-1, kept), others.logsumexp(-1, keepdim=True)], -1)", "return torch.cat([logp.topk(min(k, logp.shape[-1]), -1).values, others.logsumexp(-1, keepdim=True)], -1)"),
 ("K larger than V not cut", "student.topk(min(k, student.shape[-1]), -1)", "student.topk(k, -1)"),
 ("empty tail is -inf", "torch.finfo(logp.dtype).min)", "-math.inf)"),
 ("K + 1 tokens", "student.topk(min(k, student.shape[-1]), -1)", "student.topk(min(k + 1, student.shape[-1]), -1)"),
 ("sampled forward KL: sign", "lambda student, source: -(source - student).exp()", "lambda student, source: (source - student).exp()"),
 ("sampled reverse KL: sign", '"reverse_kl": lambda student, source: student - source', '"reverse_kl": lambda student, source: source - student'),
 ("sampled JS: factor 2", '"js": lambda student, source: 0.5 * (student', '"js": lambda student, source: (student'),
 ("sampled score not detached", "(student, source).detach() * student", "(student, source) * student"),
 ("gap with the student without hint (step)", '"privileged_student": Policy(reader, True)', '"privileged_student": Policy(reader, False)'),
 ("gap with the teacher without hint (router)", ['teacher, student = scores["privileged_teacher"].logp, scores["privileged_student"].logp', 'router_reads: tuple = ("privileged_teacher", "privileged_student")'], ['teacher, student = scores["teacher"].logp, scores["privileged_student"].logp', 'router_reads: tuple = ("teacher", "privileged_student")']),
 ("gap with the student without hint (router)", ['teacher, student = scores["privileged_teacher"].logp, scores["privileged_student"].logp', 'router_reads: tuple = ("privileged_teacher", "privileged_student")'], ['teacher, student = scores["privileged_teacher"].logp, scores["student"].logp', 'router_reads: tuple = ("privileged_teacher", "student")']),
 ("gap with its sign", "return (teacher_logp - student_logp).abs()", "return teacher_logp - student_logp"),
 ("gap of probabilities", "return (teacher_logp - student_logp).abs()", "return (teacher_logp.exp() - student_logp.exp()).abs()"),
 ("outliers stay in the averages", "typical = mask & (gap <= gap[mask].quantile(0.95))", "typical = mask"),
 ("outliers stay in the mean sum", "both[typical].mean()", "both[mask].mean()"),
 ("outliers stay in the mean gap", "gap[typical].mean()", "gap[mask].mean()"),
 ("the lowest 5% left out", "(gap <= gap[mask].quantile(0.95))", "(gap >= gap[mask].quantile(0.05))"),
 ("outliers go untrained", "    regimes[mask & high & (q_teacher < q_student)] = Regime.HS\n", "    regimes[mask & high & (q_teacher < q_student)] = Regime.HS\n    regimes[mask & ~typical] = -1\n"),
 ("quantile over the padding too", "gap[mask].quantile(0.95)", "gap.quantile(0.95)"),
 ("averages over the padding too", "typical = mask & (gap", "typical = (gap"),
 ("median instead of the mean gap", "gap[typical].mean()", "gap[typical].median()"),
 ("fixed gap threshold", "high = gap >= gap[typical].mean()", "high = gap >= 1.0"),
 ("tie A == A_bar is low", "high = gap >= gap[typical].mean()", "high = gap > gap[typical].mean()"),
 ("tie of sums is LL", "sure = both >= both[typical].mean()", "sure = both > both[typical].mean()"),
 ("tie q_T == q_S is HS", ["(q_teacher >= q_student)] = Regime.HT", "(q_teacher < q_student)] = Regime.HS"], ["(q_teacher > q_student)] = Regime.HT", "(q_teacher <= q_student)] = Regime.HS"]),
 ("sure: the teacher alone", "both = q_teacher + q_student", "both = q_teacher"),
 ("sure: product", "both = q_teacher + q_student", "both = q_teacher * q_student"),
 ("HT and HS swapped", ["(q_teacher >= q_student)] = Regime.HT", "(q_teacher < q_student)] = Regime.HS"], ["(q_teacher >= q_student)] = Regime.HS", "(q_teacher < q_student)] = Regime.HT"]),
 ("padding is routed", "regimes[mask & ~high & ~sure]", "regimes[~high & ~sure]"),
 ("evidence counts the token itself", "before = gain.cumsum(0) - gain ", "before = gain.cumsum(0) "),
 ("evidence runs on over completions", "before - before[start] >=", "before >="),
 ("position counted from 1", "(mask.cumsum(1) - 1)[mask]", "mask.cumsum(1)[mask]"),
 ("prompt and hinted prompt swapped", '"hinted_ids" if policy.reads_hint else "prompt_ids"', '"prompt_ids" if policy.reads_hint else "hinted_ids"'),
 ("logged loss without the weights", "losses = everyone(losses * weights)[0]", "losses = everyone(losses * shares)[0]"),
 ("global token mean", "return (mask / mask.sum(1, keepdim=True).clamp(min=1))[mask] / len(mask)", "return (mask / mask.sum())[mask]"),
 ("sum over completions", "clamp(min=1))[mask] / len(mask)", "clamp(min=1))[mask]"),
 ("mean over T, padding included", "mask.sum(1, keepdim=True).clamp(min=1)", "mask.shape[1]"),
 ("weights dropped", "betas.get(row.weight, row.weight)", "1.0"),
 ("betas swapped", "beta_light=beta_light, beta_weak=beta_weak)", "beta_light=beta_weak, beta_weak=beta_light)"),
 ("LL without its weak weight", '"reverse_kl", "top_k", "beta_weak")', '"reverse_kl", "top_k", "beta_light")'),
 ("LH learns from the privileged student", 'Regime.LH: Row("privileged_teacher"', 'Regime.LH: Row("privileged_student"'),
 ("HS learns from the privileged teacher", 'Regime.HS: Row("privileged_student"', 'Regime.HS: Row("privileged_teacher"'),
 ("HT on top-K", '"js", "full", 1.0)', '"js", "top_k", 1.0)'),
 ("HT by reverse KL", '"js", "full", 1.0)', '"reverse_kl", "full", 1.0)'),
 ("LL on the full vocabulary", '"reverse_kl", "top_k", "beta_weak")', '"reverse_kl", "full", "beta_weak")'),
 ("source not detached", ["logp[mask].detach() for name", "with torch.no_grad():\n                    source = sources[row.source][index]"], ["logp[mask] for name", "if True:\n                    source = sources[row.source][index]"]),
 ("student detached in the loss", "student[index], source, tokens[index], top_k)", "student[index].detach(), source, tokens[index], top_k)"),
 ("privileged teacher reads no hint", '"privileged_teacher": Policy(teacher, True)', '"privileged_teacher": Policy(teacher, False)'),
 ("vanilla's teacher reads the hint", '"teacher": Policy(teacher, False)', '"teacher": Policy(teacher, True)'),
 ("privileged teacher is the student", '"privileged_teacher": Policy(teacher, True)', '"privileged_teacher": Policy(student, True)'),
 ("student samples with the hint", 'parts = sample(setup, policies["student"], rows, place)', 'parts = sample(setup, policies["privileged_student"], rows, place)'),
 ("student scored with the hint", 'student_logp = setup.score(policies["student"], *part)', 'student_logp = setup.score(policies["privileged_student"], *part)'),
 ("moving average the wrong way round", "average.lerp_(weight, 1 - self.decay)", "average.lerp_(weight, self.decay)"),
 ("frozen reader is the student", "student if live else copy.deepcopy(student)", "student if True else copy.deepcopy(student)"),
 ("off by one in score", "hidden_states(model, inputs[:, shared:], attention, cache)[:", "hidden_states(model, inputs[:, shared:], attention, cache).roll(-1, 1)[:"),
 ("a row reads another row's prompt", "batch_select_indices(of_row)", "batch_select_indices(of_row.flip(0))"),
 ("the shared prompt gets no gradient", "        hidden_states(model, ids[:, :shared], real[:, :shared], cache)\n", "        with torch.no_grad():\n            hidden_states(model, ids[:, :shared], real[:, :shared], cache)\n"),
 ("positions start anew behind the shared prompt", "clamp(min=0)[:, -ids.shape[1]:]", "clamp(min=0)[:, :ids.shape[1]]"),
 ("a misspelt row of a recipe passes", "if getattr(row, name) not in known:", "if False:"),
 ("position ids ignored", "position_ids=positions, use_cache", "position_ids=None, use_cache"),
 ("padding attended to in score", "attention_mask=None if attention.all() else attention", "attention_mask=torch.ones_like(attention)"),
 ("score masks by pad id", "attention = torch.cat([real[of_row], torch.ones_like(mask[:, :-1])], 1)", "attention = inputs != 0"),
 ("prompts padded on the right in score", 'pad(list(place), "left", tokens.device)', 'pad(list(place), "right", tokens.device)'),
 ("padded vocabulary scored", "self.head(self.hidden[index])[..., :self.shape[1]]", "self.head(self.hidden[index])"),
 ("padded vocabulary sampled", "suppress_tokens=list(range(vocabulary or height, height)) or None", "suppress_tokens=None"),
 ("rollout ignores left padding", "input_ids=ids, attention_mask=real.long()", "input_ids=ids, attention_mask=torch.ones_like(ids)"),
 ("EOS not in the mask", "return tokens, stops.cumsum(1) - stops == 0", "return tokens, stops.cumsum(1) == 0"),
 ("mask by pad id", "return tokens, stops.cumsum(1) - stops == 0", "return tokens, tokens != eos_ids[0]"),
 ("everything after the EOS in the mask", "return tokens, stops.cumsum(1) - stops == 0", "return tokens, torch.ones_like(tokens, dtype=torch.bool)"),
 ("EOS made up at the cut", "    stops = torch.isin(tokens", "    tokens[:, -1] = eos_ids[0]\n    stops = torch.isin(tokens"),
 ("only the first of several EOS ids stops", "eos_token_id=eos_ids,\n", "eos_token_id=eos_ids[0],\n"),
 ("mask knows only the first EOS id", "torch.isin(tokens, torch.tensor(eos_ids, device=tokens.device)).int()\n    return", "(tokens == eos_ids[0]).int()\n    return"),
 ("generation config leaks", "own, model.generation_config = model.generation_config, GenerationConfig()", "own, model.generation_config = model.generation_config, model.generation_config"),
 ("generation config not restored", "model.generation_config = own", "pass"),
 ("top-k 50 by default", "top_k=0, top_p=1.0", "top_p=1.0"),
 ("temperature 0.6", "temperature=1.0, top_k=0", "temperature=0.6, top_k=0"),
 ("greedy", "do_sample=True, temperature=1.0, top_k=0, top_p=1.0,", "do_sample=False,"),
 ("top-p 0.95", "top_k=0, top_p=1.0", "top_k=0, top_p=0.95"),
 ("a recipe by name in the engine", "    losses, total = torch.zeros_like(weights)", '    dopd = recipe == RECIPES["dopd"]\n    losses, total = torch.zeros_like(weights)'),
]
OF_TASKS = [
 ("student's weights in bfloat16", 'torch.float64 if config.dtype == "float64" else torch.float32)', "getattr(torch, config.dtype))"),
 ("rules: a prefix passes the check", "return completion == row[\"answer\"]", "return row[\"answer\"].startswith(completion)"),
 ("simplify: the check reads one digit only", 'completion.split("=")[-1] == row', 'completion[-1:] == row'),
 ("execute graded by the reference", 'token == str(sum(map(int, terms)) % 10)', 'token == row["answer"][i]'),
 ("wild rules graded as recall", '"unlearnable" if law else "recall"', '"recall"'),
 ("any EOS is a right stop", 'Grade("stop", i == len(row["answer"]) and token == EOS)', 'Grade("stop", token == EOS)'),
 ("simplify: a choice stays open after it is made (as found)", "fitting = exact or forgiven", "fitting = exact + forgiven"),
 ("simplify: sums before products", 'if sign == "*" or "*" not in operators]', "]"),
 ("authors never slip", "if total > 9 and slips and", "if False and slips and"),
 ("authors slip always past 9", "slips and rng.random() < slips", "slips"),
 ("authors know everything", '"abcdefghij"[:author.knows]', '"abcdefghij"'),
 ("wild names guessed uniformly", "law = self.WILD.get(name, dict.fromkeys(range(10), 1))", "law = dict.fromkeys(range(10), 1)"),
 ("summary hint is the number of steps", '"summary": f"{sum(rules):02d}"', '"summary": f"{len(rules):02d}"'),
 ("simplify: steps hint reversed", "order += str(operator)", "order = str(operator) + order"),
 ("another seed for the files", "rng, seen, texts = random.Random(0), set()", "rng, seen, texts = random.Random(1), set()"),
 ("splits overlap", 'if row["prompt"] not in seen:', "if True:"),
 ("warm start draws held-out prompts", 'if row["prompt"] in held_out:', "if False:"),
 ("only the test split is held out", 'if split != "train" for row in rows}', 'if split == "test" for row in rows}'),
 ("evaluate: truncated answers are right", "exact.append(stopped[-1] and setup.task", "exact.append(setup.task"),
 ("evaluate: unreachable prompts count", 'if row["reachable"]:', "if True:"),
 ("evaluate: likelihood of the sampled token", "nll.append(-(shares * logp[i][ids].cpu()).sum().item())", "nll.append(-logp[i][tokens[mask][i]].item())"),
]
# To save time the tests of tasks, files and warm start are run for breakages of those, and the others for the others.
TASK_TESTS = "check_and_grades or hints_of or author or task_files or taught or bfloat16 or evaluate"

import datasets                            # noqa: E402, F401: once here, before the forks that run the tests
import matplotlib.pyplot                   # noqa: E402, F401
import pandas                              # noqa: E402, F401
import pytest                              # noqa: E402
import torch                               # noqa: E402
import transformers                        # noqa: E402, F401


class Red:
    """Collects the tests that fail."""

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.names.append(report.nodeid.split("::")[-1].split("[")[0].removeprefix("test_"))

    def pytest_collectreport(self, report):
        if report.failed:
            self.names.append("(does not load)")


def red_tests(source: str, selected: str) -> Counter:
    """How many cases of which tests fail on this text of dopd.py; in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            Path("dopd.py").write_text(source)
            Path("test_dopd.py").write_text(TESTS.read_text())
            for beside in ("tiny_tasks", "README.md"):
                Path(beside).symlink_to(ROOT / beside)
            sys.path.insert(0, folder)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            red = Red()
            pytest.main(["-q", "-p", "no:cacheprovider", "test_dopd.py", "-m", "not usefixtures", "-k", selected], plugins=[red])
            os.chdir("/")
        os.write(write, "\n".join(red.names).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        names = pipe.read().splitlines()
    os.waitpid(child, 0)
    return Counter(names)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    base = BASE.read_text()
    for name, old, _ in MATH + OF_TASKS:
        for text in [old] if isinstance(old, str) else old:
            assert base.count(text) == 1, f"{name}: {base.count(text)} places read {text!r}"
    assert not red_tests(base, ""), "the tests fail on dopd.py as it is"
    lines, unnoticed = [], 0
    for name, old, new in MATH + OF_TASKS:
        if words and not any(word in name for word in words):
            continue
        broken = base
        for before, after in [(old, new)] if isinstance(old, str) else zip(old, new):
            broken = broken.replace(before, after)
        red = red_tests(broken, TASK_TESTS if (name, old, new) in OF_TASKS else f"not ({TASK_TESTS})")
        unnoticed += not red
        tests = ", ".join(test + (f" ({count})" if count > 1 else "") for test, count in red.items())
        lines.append(f"| {name} | {tests or '**none**'} |\n")
        print(lines[-1], end="", flush=True)
    summary = f"{len(lines)} deliberate breakages, {unnoticed} of them unnoticed.\n"
    print(summary)
    if not words:
        (ROOT / "tiny_tasks" / "results" / "breakages.md").write_text(
            f"`python tiny_tasks/breakages.py`: {summary}\n| broken on purpose | tests that turn red (cases) |\n|---|---|\n"
            + "".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
