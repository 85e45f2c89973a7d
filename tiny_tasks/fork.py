"""A fork, to copy from: four recipes and a task of one's own, in a script that takes the flags of dopd.py.

    python tiny_tasks/fork.py --task double --recipe no_anchor privileged_js cautious doubtful

The files of the task are written once, into tiny_tasks/double/; delete them after a change of the task.
"""

import random
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))        # not needed in a script beside dopd.py

import torch                                                            # noqa: E402

import dopd                                                             # noqa: E402
from dopd import Author, Everywhere, Grade, Recipe, Regime, Row, uniform     # noqa: E402

rows = dopd.RECIPES["dopd"].rows
dopd.RECIPES["no_anchor"] = Recipe(rows | {Regime.HS: Row("teacher", "reverse_kl", "top_k", 0.6)})
dopd.RECIPES["privileged_js"] = uniform("privileged_teacher", "js", "full", 1.0)


class Doubt(IntEnum):
    UNSURE = len(Regime)                                                # a number that no regime has yet


def unless_unsure(scores):
    """A router: DOPD's regimes (N,), but where the teacher without the hint is unsure."""
    return torch.where(scores["teacher"].entropy > 1.0, Doubt.UNSURE, dopd.by_advantage_gap(scores))


dopd.RECIPES["cautious"] = Recipe(rows | {Doubt.UNSURE: Row("teacher", "reverse_kl", "full", 0.5)}, unless_unsure,
                                  router_reads=("teacher", "privileged_teacher", "privileged_student"))


def doubt(scores):
    """A weight per token (N,), from {policy: Scores(logp, entropy, position)}, each of them (N,)."""
    return scores["student"].entropy


dopd.RECIPES["doubtful"] = Recipe({Everywhere.ALL: Row("teacher", "reverse_kl", "full", doubt)}, router=None,
                                  router_reads=("student",))


@dataclass(frozen=True)
class Double:
    """`12345=` -> `24680`: every digit doubled, modulo 10. The hint says it all."""
    length: int = 5                                                     # ood.jsonl is two longer
    teacher: Author = Author(width=64, layers=2, steps=150, hinted=0.5)
    student: Author = Author(width=64, layers=2, steps=50, hinted=0.3, slips=0.5)

    def problem(self, rng: random.Random) -> dict:
        digits = [rng.randrange(10) for _ in range(self.length)]
        answer = "".join(str(2 * digit % 10) for digit in digits)
        return {"prompt": "".join(map(str, digits)) + "=", "hints": {"steps": answer, "none": ""}, "answer": answer}

    def solution(self, row: dict, form: str, author: Author, rng: random.Random) -> str:
        """What the author writes; form is a key of the hints, `none` where it reads the prompt alone."""
        if form != "none":
            return row["answer"]
        return "".join(digit if rng.random() < author.slips else right
                       for digit, right in zip(row["prompt"], row["answer"]))

    def check(self, row: dict, completion: str) -> bool:
        return completion == row["answer"]

    def grade(self, row: dict, tokens: list[str]) -> list[Grade]:
        """One for every token, the last of which is `<eos>` unless the completion was cut."""
        right = [*row["answer"], dopd.EOS]
        return [Grade("stop" if i >= len(row["answer"]) else "execute", right[i:i + 1] == [token])
                for i, token in enumerate(tokens)]


dopd.TASKS["double"] = Double()

if __name__ == "__main__":
    sys.exit(dopd.main(sys.argv[1:]))
