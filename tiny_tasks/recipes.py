"""More methods as data, for the engine of dopd.py. `import recipes` adds them to dopd.RECIPES.

    python tiny_tasks/recipes.py --recipe vanilla half dopd_half        # all flags of dopd.py

Methods of other papers are our readings of them: what their main idea becomes as a table of rows.
"""

import sys
from enum import IntEnum
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # not needed in a script beside dopd.py

import dopd as engine  # noqa: E402
from dopd import RECIPES, Recipe, Regime, Row, dopd, route  # noqa: E402

VANILLA = RECIPES["vanilla"].rows[0]
PRIVILEGED = RECIPES["privileged_teacher"].rows[0]
BOTH_READ = RECIPES["dopd"].router_reads                                # the two privileged policies

# ------------------------------------------------------------------------------------------------------- the anchor
# Between live and frozen: a moving average of the student.
for decay in ("98", "99", "995"):
    RECIPES[f"dopd_{decay}"] = dopd(anchor_decay=float(f"0.{decay}"))


# ------------------------------------------------------------------------------------ the teacher with and without hint
def half(w: float = 0.5) -> Recipe:
    """Reverse KL to the teacher with the hint (weight w) and without it (1 - w), on every token. Their sum is, but for
    a term without gradient, one reverse KL to the weighted geometric mean of the two. It is the anchored residual of
    AR-OPD (arXiv 2606.10385) with the plain teacher as anchor, in our reading."""
    return Recipe([VANILLA._replace(weight=1 - w), PRIVILEGED._replace(weight=w)])


def dopd_half(w: float = 0.5, anchor_decay: float = 0.0) -> Recipe:
    """DOPD's table and router (ours): each row of the privileged teacher becomes two, with and without the hint."""
    rows = []
    for row in dopd().rows:
        if row.source == "privileged_teacher":
            rows += [row._replace(weight=w * row.weight), row._replace(source="teacher", weight=(1 - w) * row.weight)]
        else:
            rows.append(row)
    return Recipe(rows, route, BOTH_READ, anchor_decay)


RECIPES |= {"half": half(), "half_25": half(0.25), "half_75": half(0.75),
            "dopd_half": dopd_half(), "dopd_half_frozen": dopd_half(anchor_decay=1.0)}


class Teacher(IntEnum):
    SURE = 0
    UNSURE = 1


def needs_the_hint(scores) -> torch.Tensor:
    """UNSURE: the teacher without the hint is unsure (half a nat of entropy or more). SURE: all other tokens, and those
    that the hint makes 20 times likelier, since they are explained by the hint alone."""
    plain, hinted = scores["teacher"], scores["privileged_teacher"]
    return torch.where((plain.entropy > 0.5) & (hinted.logp - plain.logp < 3), Teacher.UNSURE, Teacher.SURE)


# Ours: follow the hint only where the teacher alone would not know.
RECIPES["where_unsure"] = Recipe([VANILLA._replace(regime=Teacher.SURE), PRIVILEGED._replace(regime=Teacher.UNSURE)],
                                 needs_the_hint, ("teacher", "privileged_teacher"))


# ----------------------------------------------------------------------------------------------------- other papers
def by_teacher_entropy(scores) -> torch.Tensor:
    return torch.where(scores["teacher"].entropy > 0.8, Teacher.UNSURE, Teacher.SURE)


# EOPD (entropy-aware): forward KL where the teacher is unsure, to cover all that it finds possible; else reverse KL.
RECIPES["eopd"] = Recipe([VANILLA._replace(regime=Teacher.SURE),
                          VANILLA._replace(regime=Teacher.UNSURE, objective="forward_kl")],
                         by_teacher_entropy, ("teacher",))


def importance(scores) -> torch.Tensor:
    """High where the student is unsure, or where the teacher finds the token less likely than it does; mean 1."""
    student, teacher = scores["student"], scores["teacher"]
    unsure = student.entropy / student.entropy.max().clamp(min=1e-6)
    differs = 1 - (teacher.logp - student.logp).clamp(max=0).exp()
    either = unsure + differs - unsure * differs
    return either / either.mean().clamp(min=1e-6)


def agreement(scores) -> torch.Tensor:
    """1 where student and privileged teacher agree on the token, towards 0 where they do not."""
    return (-(scores["privileged_teacher"].logp - scores["student"].logp).abs()).exp()


# TIP (token importance) weighs the tokens of vanilla. DemoPSD mixes the source with the student itself by their
# disagreement: a geometric mixture with oneself is, in the gradient, a smaller weight.
RECIPES["tip"] = Recipe([VANILLA._replace(weight=importance)], None, ("student", "teacher"))
RECIPES["demopsd"] = Recipe([PRIVILEGED._replace(weight=agreement)], None, ("student", "privileged_teacher"))

# -------------------------------------------------------------------------------------------------- parts of the paper
# Table 6: only the tokens of some regimes; adaptive as in DOPD, or uniform: JS on the top-K, one source, weight 1.
REGIME_SETS = ("HT", "HT+LH", "HT+LL", "HT+HS", "LH+LL+HT+HS")
for names in REGIME_SETS:
    kept = [row for row in dopd().rows if row.regime.name in names.split("+")]
    RECIPES[names] = dopd()._replace(rows=kept)
    RECIPES[f"{names} uniform"] = dopd()._replace(rows=[
        Row(row.regime, "privileged_teacher", "js", "top_k", 1.0) for row in kept])

# Table 7: one source on all tokens, without routing.
for objective in ("forward_kl", "reverse_kl", "js"):
    for support in ("top_k", "full"):
        RECIPES[f"{objective} {support}"] = Recipe([PRIVILEGED._replace(objective=objective, support=support)])


# Table 8: DOPD with one part taken away. ("Without the student" is HT+LH; "not advantage-aware" is js top_k.)
def changed(router=route, **fields) -> Recipe:
    return dopd()._replace(rows=[row._replace(**fields) for row in dopd().rows], router=router)


def by_chance(scores) -> torch.Tensor:
    """DOPD's regimes in their shares, dealt out to the tokens by chance: all of the method but the routing."""
    regimes = route(scores)
    return regimes[torch.randperm(len(regimes), device="cpu").to(regimes.device)]


RECIPES["without teacher"] = changed(source="privileged_student")
RECIPES["one objective"] = changed(objective="reverse_kl")
RECIPES["one support"] = changed(support="top_k")
RECIPES["by chance"] = changed(router=by_chance)
RECIPES["without hint"] = Recipe(
    [row._replace(source=row.source.removeprefix("privileged_")) for row in dopd().rows],
    lambda scores: route({f"privileged_{name}": scores[name] for name in scores}), ("teacher", "student"))


# Figure 4: vanilla without a fifth of the tokens.
def drop(which: str):
    def router(scores):
        gap = (scores["privileged_teacher"].logp - scores["privileged_student"].logp).abs()
        order = {"highest": -gap, "lowest": gap, "random": torch.rand_like(gap)}[which]
        return torch.full_like(gap, Regime.ALL, dtype=torch.long).index_fill(0, order.argsort()[:len(gap) // 5], -1)
    return router


for which in ("highest", "lowest", "random"):
    RECIPES[f"vanilla without {which}"] = Recipe([VANILLA], drop(which), BOTH_READ)
# Figure 10: other weights.
for light, weak in ((0.6, 0.0), (0.6, 1.0), (0.3, 0.3), (1.0, 0.3), (1.0, 1.0)):
    RECIPES[f"light {light}, weak {weak}"] = dopd(light, weak)

if __name__ == "__main__":
    engine.main(sys.argv[1:])
