"""Perplexity of a causal language model on fixed windows, at any average bits, with one compilation."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax import distributed

MIN_BITS, MAX_BITS = 2.0, 8.0

StepFn = Callable[[Any, Array, Array], tuple[Array, Array]]
"""``(variables, tokens [B, T], bits [B]) -> (summed nll [B], mean bits [B])``, jitted."""


class LanguageModel(Protocol):
    """What evaluation needs of a model; ``models.elastic.ElasticModel`` is one."""

    @property
    def variables(self) -> Any:
        """The arrays of the model, a pytree."""

    @property
    def is_elastic(self) -> bool:
        """Whether ``bits`` has an effect."""

    def forward(
        self, variables: Any, tokens: Int[Array, "B T"], bits: Float[Array, " B"]
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T"]]:
        """Returns the logits and the average bits that each token used; pure."""


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """One point of the perplexity curve.

    Attributes:
      bits: the average bits asked for; None for an unquantized model.
      measured_bits: the average bits the tokens really used.
      perplexity: exp of the mean negative log-likelihood, in nats, of a prediction.
      tokens: number of predictions scored.
      seconds: wall time, compilation included.
    """

    bits: float | None
    measured_bits: float
    perplexity: float
    tokens: int
    seconds: float


def check_bits(bits: float) -> float:
    """Returns average bits that a model of four 2-bit slices can run at, or raises a ValueError that names them."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"average bits must be between {MIN_BITS:g} and {MAX_BITS:g}, got {bits:g}")
    return bits


def parse_bits(text: str) -> list[float]:
    """Reads a list such as ``2,3,4.5,8``; every entry must lie in [2, 8], or a ValueError names it."""
    try:
        return [check_bits(float(entry)) for entry in text.split(",")]
    except ValueError as error:
        raise ValueError(f"bits '{text}': {error}") from error


def perplexity_step(model: LanguageModel) -> StepFn:
    """Builds the jitted scoring of one batch of windows.

    The logits stay on the device: what comes back are two numbers a window. Bits are traced, so that the step compiles
    once per shape of ``tokens``, whatever the bits.

    Args:
      model: its ``forward`` is compiled in; its variables are an argument of the step.

    Returns:
      A jitted function of (variables, tokens [B, T], bits [B]): the summed nll [B] and mean used bits [B] of a window.
    """

    @jax.jit
    def step(variables: Any, tokens: Array, bits: Array) -> tuple[Array, Array]:
        with jax.default_matmul_precision("float32"):  # a GPU or TPU would round float32 inputs
            logits, token_bits = model.forward(variables, tokens, bits)
        return summed_nll(logits, tokens), jnp.mean(token_bits.astype(jnp.float32), axis=1)

    return step


def summed_nll(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, " B"]:
    """Negative log-likelihood of each window's predictions, in nats.

    With logits l and tokens y,

        nll_b = sum_{t < T-1} logsumexp(l_bt) - l_bt[y_b(t+1)]
    """
    with jax.named_scope("nll"):
        logits = logits.astype(jnp.float32)
        targets = jnp.roll(tokens, -1, axis=1)  # [B, T]; the last one of a window is never scored
        log_z = jax.nn.logsumexp(logits, axis=-1)  # [B, T]
        nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, T]
        return jnp.sum(nll[:, :-1], axis=1)


def perplexity_of(mean_nll: float) -> float:
    """exp, with infinity for what a float64 cannot hold."""
    return math.inf if mean_nll > math.log(np.finfo(np.float64).max) else math.exp(mean_nll)


def evaluate_perplexity(
    model: LanguageModel,
    windows: Int[np.ndarray, "n T"],
    bits: float | None,
    *,
    batch_size: int = 4,
    step: StepFn | None = None,
) -> PerplexityResult:
    """Measures perplexity over windows, exp(mean nll) of the T - 1 predictions of each.

    Args:
      model: the model.
      windows: token ids, [n, T].
      bits: target average bits in [2, 8]; None for an unquantized model, which ignores it.
      batch_size: windows a step; the last batch is filled up with windows that do not count.
      step: a step of ``perplexity_step(model)`` to share its compilation between calls.

    Returns:
      The result, accumulated in float64.

    Raises:
      ValueError: bits outside [2, 8] or missing, no windows, or a batch size below 1.
    """
    if bits is None and model.is_elastic:
        raise ValueError("an elastic model needs its average bits, got None")
    if bits is not None:
        check_bits(bits)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be [n, T] with n >= 1 and T >= 2, got shape {windows.shape}")
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    step = step or perplexity_step(model)
    start = time.perf_counter()
    request = jnp.full(batch_size, MAX_BITS if bits is None else bits, jnp.float32)
    outputs = []
    for first in range(0, len(windows), batch_size):
        rows = np.arange(first, first + batch_size) % len(windows)
        outputs.append(step(model.variables, jnp.asarray(windows[rows], jnp.int32), request))
    summed = [np.concatenate(arrays)[: len(windows)] for arrays in zip(*distributed.fetch(outputs), strict=True)]
    nll, used_bits = (array.astype(np.float64) for array in summed)  # [n]
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    return PerplexityResult(
        bits=bits if model.is_elastic else None,
        measured_bits=float(used_bits.mean()),
        perplexity=perplexity_of(nll.sum() / predictions),
        tokens=predictions,
        seconds=time.perf_counter() - start,
    )


def perplexity_curve(
    model: LanguageModel,
    windows: Int[np.ndarray, "n T"],
    bits_list: Iterable[float | None],
    *,
    batch_size: int = 4,
    progress: Callable[[PerplexityResult], None] | None = None,
) -> list[PerplexityResult]:
    """Measures perplexity at several average bits of one model, with one compilation.

    Args:
      model: the model.
      windows: token ids, [n, T].
      bits_list: target average bits, each in [2, 8]; all are checked before the first is measured.
      batch_size: windows a step.
      progress: called with each result as it is ready.

    Returns:
      One result for each entry of ``bits_list``, in its order.

    Raises:
      ValueError: as :func:`evaluate_perplexity`.
    """
    bits_list = list(bits_list)
    for bits in bits_list:
        if bits is not None:
            check_bits(bits)
    step = perplexity_step(model)
    results = []
    for bits in bits_list:
        results.append(evaluate_perplexity(model, windows, bits, batch_size=batch_size, step=step))
        if progress is not None:
            progress(results[-1])
    return results
