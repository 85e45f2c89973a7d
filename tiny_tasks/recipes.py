"""More methods as data, for the engine of dopd.py. `import recipes` adds them to dopd.RECIPES.

    python tiny_tasks/recipes.py --recipe opd agree where_unsure        # all flags of dopd.py

Methods of other papers are our readings of them: their main idea as a table of terms.
"""

import sys
from enum import IntEnum
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed beside dopd.py
import dopd  # noqa: E402
from dopd import RECIPES, Recipe, Regime, Term  # noqa: E402

TEACHER = RECIPES["opd"].terms[0]
HINTED_TEACHER = RECIPES["privileged_opd"].terms[0]
BOTH_HINTED = RECIPES["dopd"].router_reads  # privileged teacher, privileged student

# Self distillation: the student learns from itself with the hint.
RECIPES["opsd"] = Recipe([TEACHER._replace(source="privileged_student")])

# Anchors between live and frozen: a moving average of the student.
RECIPES["dopd_98"] = dopd.dopd(anchor_decay=0.98)
RECIPES["dopd_99"] = dopd.dopd(anchor_decay=0.99)
RECIPES["dopd_995"] = dopd.dopd(anchor_decay=0.995)


# --- the teacher with and without the hint
def half(w: float = 0.5) -> Recipe:
    """The teacher with the hint (weight w) and without it (1 - w), on every token: the idea of
    AR-OPD (arXiv 2606.10385). In the gradient, one reverse KL to their geometric mean."""
    return Recipe([TEACHER._replace(weight=1 - w), HINTED_TEACHER._replace(weight=w)])


RECIPES["half"] = half()
RECIPES["half_25"] = half(0.25)
RECIPES["half_75"] = half(0.75)


class Teacher(IntEnum):
    SURE = 0
    UNSURE = 1


def needs_the_hint(scores) -> torch.Tensor:
    """UNSURE: the teacher without the hint is unsure (half a nat of entropy or more), and the hint
    does not make the token 20 times likelier. Such a token is explained by the hint alone."""
    plain, hinted = scores["teacher"], scores["privileged_teacher"]
    unsure = (plain.entropy > 0.5) & (hinted.logp - plain.logp < 3)
    return torch.where(unsure, Teacher.UNSURE, Teacher.SURE)


# Ours: follow the hint only where the teacher alone would not know.
RECIPES["where_unsure"] = Recipe(
    [TEACHER._replace(regime=Teacher.SURE), HINTED_TEACHER._replace(regime=Teacher.UNSURE)],
    needs_the_hint,
    ("teacher", "privileged_teacher"),
)


# --- agree (ours)
class Trusted(IntEnum):
    HINTED_TEACHER = 0
    HINTED_STUDENT = 1
    TEACHER = 2


def agree(threshold: float = 0.5, gap_of=torch.exp, student_may_teach: bool = True) -> Recipe:
    """DOPD's question, would the student agree if it could read the hint, asked in probabilities.
    If both find the token about as likely: follow the teacher with the hint. If not: follow the
    student with the hint where it is surer than the teacher without it; else follow that teacher,
    who knows no more than the student that is deployed."""

    def whom_to_trust(scores) -> torch.Tensor:
        teacher, student = scores["privileged_teacher"], scores["privileged_student"]
        gap = (gap_of(teacher.logp) - gap_of(student.logp)).abs()
        student_is_surer = (student.entropy < scores["teacher"].entropy) & student_may_teach
        otherwise = torch.where(student_is_surer, Trusted.HINTED_STUDENT, Trusted.TEACHER)
        return torch.where(gap < threshold, Trusted.HINTED_TEACHER, otherwise)

    terms = [
        Term(Trusted.HINTED_TEACHER, "privileged_teacher", "reverse_kl", "full", 1.0),
        Term(Trusted.HINTED_STUDENT, "privileged_student", "reverse_kl", "full", 1.0),
        Term(Trusted.TEACHER, "teacher", "reverse_kl", "full", 1.0),
    ]
    return Recipe(terms, whom_to_trust, (*BOTH_HINTED, "teacher"), anchor_decay=1.0)


RECIPES["agree"] = agree()
RECIPES["agree_30"] = agree(0.3)  # the best of all here: see results/README.md


# --- other papers
dopd.DIVERGENCES["forward_kl"] = lambda student, source: dopd.reverse_kl(source, student)


def by_teacher_entropy(scores) -> torch.Tensor:
    return torch.where(scores["teacher"].entropy > 0.8, Teacher.UNSURE, Teacher.SURE)


# EOPD: forward KL where the teacher is unsure, to cover all that it finds possible.
terms = [TEACHER._replace(regime=Teacher.SURE)]
terms.append(TEACHER._replace(regime=Teacher.UNSURE, objective="forward_kl"))
RECIPES["eopd"] = Recipe(terms, by_teacher_entropy, ("teacher",))


def importance(scores) -> torch.Tensor:
    """High where the student is unsure, or likes the token more than the teacher does; mean 1."""
    student, teacher = scores["student"], scores["teacher"]
    unsure = student.entropy / student.entropy.max().clamp(min=1e-6)
    differs = 1 - (teacher.logp - student.logp).clamp(max=0).exp()
    either = unsure + differs - unsure * differs
    return either / either.mean().clamp(min=1e-6)


# TIP: important tokens weigh more.
RECIPES["tip"] = Recipe([TEACHER._replace(weight=importance)], None, ("student", "teacher"))

# --- parts of DOPD
# Table 6: the tokens of some regimes only. Uniform: one source, one objective, weight 1.
UNIFORM = {"source": "privileged_teacher", "objective": "js", "support": "top_k", "weight": 1.0}
for names in ("HT", "HT+LH", "HT+LL", "HT+HS", "LH+LL+HT+HS"):
    terms = [term for term in dopd.dopd().terms if term.regime.name in names.split("+")]
    RECIPES[names] = dopd.dopd()._replace(terms=terms)
    terms = [term._replace(**UNIFORM) for term in terms]
    RECIPES[f"{names} uniform"] = dopd.dopd()._replace(terms=terms)

# Table 7: one source on all tokens, without routing.
for objective in dopd.DIVERGENCES:
    for support in dopd.SUPPORTS:
        term = HINTED_TEACHER._replace(objective=objective, support=support)
        RECIPES[f"{objective} {support}"] = Recipe([term])


# Table 8: DOPD with one part changed. ("Without the student" is HT+LH.)
def changed(**fields) -> Recipe:
    return dopd.dopd()._replace(terms=[term._replace(**fields) for term in dopd.dopd().terms])


def route_without_hint(scores) -> torch.Tensor:
    return dopd.route({f"privileged_{name}": score for name, score in scores.items()})


def by_chance(scores) -> torch.Tensor:
    """DOPD's regimes in their shares, dealt out to the tokens by chance."""
    regimes = dopd.route(scores)
    return regimes[torch.randperm(len(regimes), device="cpu").to(regimes.device)]


RECIPES["without teacher"] = changed(source="privileged_student")
RECIPES["one objective"] = changed(objective="reverse_kl")
RECIPES["one support"] = changed(support="top_k")
terms = [term._replace(source=term.source.split("_")[-1]) for term in dopd.dopd().terms]
RECIPES["without hint"] = Recipe(terms, route_without_hint, ("teacher", "student"))
RECIPES["by chance"] = dopd.dopd()._replace(router=by_chance)


# Figure 4: OPD without the fifth of the tokens with the highest gap, the lowest, or by chance.
def drop(which: str):
    def router(scores) -> torch.Tensor:
        gap = dopd.advantage_gap(*[scores[name].logp for name in BOTH_HINTED])
        order = {"highest": -gap, "lowest": gap, "random": torch.rand_like(gap)}[which]
        regimes = torch.full_like(gap, Regime.ALL, dtype=torch.long)
        regimes[order.argsort()[: len(gap) // 5]] = -1  # a regime without a term
        return regimes

    return router


for which in ("highest", "lowest", "random"):
    RECIPES[f"opd without {which}"] = Recipe([TEACHER], drop(which), BOTH_HINTED)
# Figure 10: other weights than 0.6 and 0.3.
for light, weak in ((0.6, 0.0), (0.6, 1.0), (0.3, 0.3), (1.0, 0.3), (1.0, 1.0)):
    RECIPES[f"light {light}, weak {weak}"] = dopd.dopd(light, weak)

if __name__ == "__main__":
    dopd.main(sys.argv[1:])
