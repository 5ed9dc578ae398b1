"""Text until a stop string, for lm-eval's ``generate_until``, on the decoding loop of ``serving``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from mobiquant_jax.evaluation.tasks.scoring import length_buckets
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.serving import SamplingConfig, stream

CHUNK_TOKENS = 16  # between two looks for stop strings

_KNOWN = ("do_sample", "max_gen_toks", "temperature", "top_k", "top_p", "until")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How one request of lm-eval is to be continued; requests with equal settings share a batch.

    Attributes:
        max_new_tokens: most tokens to add.
        stops: strings that end a text; they are not part of it.
        sampling: how tokens are drawn.
    """

    max_new_tokens: int
    stops: tuple[str, ...] = ()
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_gen_toks must be at least 1, got {self.max_new_tokens}")

    @classmethod
    def from_lm_eval(cls, arguments: Mapping[str, Any], default_max_new_tokens: int) -> "GenerationSettings":
        """Reads the ``generation_kwargs`` of a task.

        Args:
            arguments: ``until`` (a string or a list), ``max_gen_toks`` or one of its other names, ``do_sample``,
                ``temperature`` (1 for sampling, unless given), ``top_k`` (0: all) and ``top_p``.
            default_max_new_tokens: where the arguments name no length.

        Raises:
            ValueError: an argument that is not among these, or a value out of range.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), default_max_new_tokens))
        if unknown := sorted(settings.keys() - set(_KNOWN)):
            raise ValueError(f"generation argument '{unknown[0]}' is not supported, only {', '.join(_KNOWN)}")
        sampled = settings["do_sample"]
        return cls(
            max_new_tokens=settings["max_gen_toks"],
            stops=tuple(stop for stop in settings["until"] if stop),
            sampling=SamplingConfig(
                temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                top_k=settings.get("top_k") or None,
                top_p=float(settings.get("top_p", 1.0)),
            ),
        )


def generate_texts(
    model: ElasticModel,
    prompts: Sequence[Int[np.ndarray, " T"]],
    settings: GenerationSettings,
    *,
    bits: float,
    window: int,
    batch_size: int,
    key: PRNGKeyArray,
) -> list[str]:
    """Continues at most one batch of prompts, until each row has met an end token, a stop string or its length.

    ``serving.stream`` rather than ``serving.generate``: the tokens are the same, and a batch whose rows have all met a
    stop string is done within `CHUNK_TOKENS` steps.

    Args:
        model: with its tokenizer.
        prompts: token ids, at least one each; a prompt that leaves no room for the new tokens loses its beginning.
        settings: of all of them.
        bits: average bits.
        window: longest sequence of the model, in tokens.
        batch_size: rows of the program; missing ones are filled up with copies that do not count.
        key: of sampling.

    Returns:
        The new text of each prompt, up to its first stop string.

    Raises:
        ValueError: the window has no room for the new tokens.
    """
    room = window - settings.max_new_tokens
    if room < 1:
        raise ValueError(f"max_gen_toks={settings.max_new_tokens} leaves no room for a prompt in {window} tokens")
    kept = [prompt[-room:] for prompt in prompts]
    longest = max(map(len, kept))
    padded = np.zeros((batch_size, next(n for n in length_buckets(room) if n >= longest)), np.int32)
    lengths = np.zeros(batch_size, np.int32)
    for row in range(batch_size):
        prompt = kept[min(row, len(kept) - 1)]
        padded[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    ends = model.tokenizer.eos_token_ids or model.config.eos_token_ids
    chunks = stream(
        model.decode,
        model.variables,
        model.config,
        padded,
        lengths,
        max_new_tokens=settings.max_new_tokens,
        chunk_tokens=CHUNK_TOKENS,
        key=key,
        bits=bits,
        sampling=settings.sampling,
        eos_token_ids=ends,
    )
    tokens: list[list[int]] = [[] for _ in kept]
    texts = [""] * len(kept)
    for chunk in chunks:
        for row, new in enumerate(chunk.tokens[: len(kept)]):
            tokens[row] += new.tolist()
        texts = [model.tokenizer.decode([token for token in row if token not in ends]) for row in tokens]
        stopped = [any(stop in text for stop in settings.stops) for text in texts]
        if all(found or row[-1] in ends for found, row in zip(stopped, tokens, strict=True)):
            break
    return [postprocess_generated_text(text, list(settings.stops), None) for text in texts]


def batch_key(seed: int, batch: int) -> PRNGKeyArray:
    """The randomness of one batch: another for each, the same in every run."""
    return jax.random.fold_in(jax.random.key(seed), batch)
