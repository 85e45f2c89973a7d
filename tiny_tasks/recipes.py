"""More methods as data, for the engine of dopd.py. `import recipes` adds them to dopd.RECIPES.

    python tiny_tasks/recipes.py --recipe vanilla half dopd_half        # all flags of dopd.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))         # not needed in a script beside dopd.py

from dopd import RECIPES, Recipe, Regime, Row, by_advantage_gap, dopd, main  # noqa: E402

# The anchor, between live and frozen: a moving average of the student.
RECIPES["dopd_ema"] = dopd(anchor_decay=0.99)


def half(w: float = 0.5) -> Recipe:
    """Reverse KL to the teacher with the hint (weight w) and without it (1 - w), on every token. Their sum is, but for
    a term without gradient, one reverse KL to the weighted geometric mean of the two. It is the anchored residual of
    AR-OPD (arXiv 2606.10385) with the plain teacher as anchor, in our reading."""
    return Recipe([Row(Regime.ALL, "teacher", "reverse_kl", "full", 1 - w),
                   Row(Regime.ALL, "privileged_teacher", "reverse_kl", "full", w)])


def dopd_half(w: float = 0.5, anchor_decay: float = 0.0) -> Recipe:
    """DOPD's table and router (ours): each row of the privileged teacher becomes two, with and without the hint."""
    rows = []
    for row in dopd().rows:
        if row.source == "privileged_teacher":
            rows += [row._replace(weight=w * row.weight), row._replace(source="teacher", weight=(1 - w) * row.weight)]
        else:
            rows.append(row)
    return Recipe(rows, by_advantage_gap, dopd().router_reads, anchor_decay)


RECIPES["half"] = half()
RECIPES["dopd_half"] = dopd_half()

if __name__ == "__main__":
    main(sys.argv[1:])
