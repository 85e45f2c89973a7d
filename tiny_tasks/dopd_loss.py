"""DOPD's loss in one call, for a trainer of your own. `from dopd_loss import dopd_loss`

It wants the log-probs of one batch of completions that the student sampled without the hint:

    logits = model(prompt_and_completion).logits[:, prompt_length - 1 : -1]    # (B, T, V)
    logp = logits.log_softmax(-1)

from the student, and, with the hint in the prompt and without gradients, from the teacher and from
the student. To train in micro-batches, use dopd.assign and dopd.recipe_loss: the router's means
are those of the whole batch.
"""

import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dopd  # noqa: E402


def dopd_loss(
    student: Tensor,
    privileged_teacher: Tensor,
    privileged_student: Tensor,
    tokens: Tensor,
    mask: Tensor,
    top_k: int,
    **betas,
) -> Tensor:
    """Log-probs (B, T, V), sampled tokens (B, T), mask (B, T), False on padding -> a scalar, in
    nats. `betas`: those of dopd.dopd. A ValueError: these are no log-probs."""
    logps = {"privileged_teacher": privileged_teacher[mask], "student": student[mask]}  # (N, V)
    logps["privileged_student"] = privileged_student[mask]
    for name, logp in logps.items():
        if not (logp.detach().float().logsumexp(-1).abs() < 0.05).all():
            raise ValueError(f"{name}: no log-probs; take log_softmax of the logits first")
    recipe, lengths = dopd.dopd(**betas), mask.sum(1)
    scores = {name: dopd.token_scores(logps[name], tokens[mask]) for name in recipe.router_reads}
    _, weights = dopd.assign(recipe, scores, lengths[lengths > 0])
    return dopd.recipe_loss(recipe, logps["student"], logps, weights, top_k)
