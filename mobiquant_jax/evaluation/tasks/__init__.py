"""Zero-shot tasks and generation through lm-eval (the optional extra ``eval``).

What is exported here needs no lm-eval. With it, ``language_model.MobiquantLM`` is the model, ``runner.evaluate_tasks``
scores the local tasks at several average bits, and ``python -m mobiquant_jax.evaluation.tasks`` is lm-eval's own
command line with the model and the local tasks added.
"""

import importlib.util

from mobiquant_jax.evaluation.tasks.scoring import (
    ContinuationStep,
    Scores,
    continuation_step,
    length_buckets,
    score_continuations,
)

__all__ = [
    "ContinuationStep",
    "Scores",
    "continuation_step",
    "length_buckets",
    "require_lm_eval",
    "score_continuations",
]


def require_lm_eval() -> None:
    """Raises a ValueError that says what to install, unless lm-eval is there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the tasks need the package lm_eval: pip install 'mobiquant_jax[eval]'")
