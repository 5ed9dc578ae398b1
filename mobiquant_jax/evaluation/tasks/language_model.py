"""An elastic or unquantized model as a language model of lm-eval."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mobiquant_jax.evaluation.perplexity import MAX_BITS, check_bits
from mobiquant_jax.evaluation.tasks.generation import GenerationSettings, batch_key, generate_texts
from mobiquant_jax.evaluation.tasks.scoring import ContinuationStep, continuation_step, score_continuations
from mobiquant_jax.io.load import load_model
from mobiquant_jax.models.elastic import ElasticModel

NAME = "mobiquant"  # what lm-eval knows the model by


class MobiquantLM(TemplateLM):
    """The lm-eval model ``mobiquant``: log-probabilities and text at any average bits.

    A ValueError or FileNotFoundError names the argument that is wrong.

    Attributes:
        model: the model.
        bits: average bits of every request; None for an unquantized model.
        batch_size: rows a step.
        max_length: longest input, in tokens.
        max_gen_toks: tokens to generate where a task names no number.

    Args:
        pretrained: what ``io.load.load_model`` opens (an elastic checkpoint, a Hugging Face folder, a GGUF file or
            ``package:NAME``), or a model.
        bits: average bits in [2, 8]; needed for an elastic model, refused for an unquantized one.
        batch_size: rows a step; lm-eval hands it over as text.
        max_length: longest input; the model's context unless given.
        max_gen_toks: tokens to generate where a task names no number.
        add_bos_token: put the begin-of-text token before every text, as LLaMA 2 and 3 expect.
        seed: of sampling.
        device: PyTorch's name of a device, which lm-eval's command line always gives ("cuda:0" unless told) and which
            means nothing here: JAX runs on its default device (``JAX_PLATFORMS``).
        step: a step of ``continuation_step`` for a model like this one, to share its compilations.
        **unknown: refused, by name.
    """

    tokenizer: Any

    def __init__(
        self,
        pretrained: str | Path | ElasticModel,
        bits: float | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = False,
        seed: int = 0,
        device: str | None = None,
        step: ContinuationStep | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"the model '{NAME}' has no argument '{next(iter(unknown))}'")
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int | float)):
            raise ValueError(f"bits must be a number, got {bits!r}")
        self.bits = None if bits is None else check_bits(float(bits))
        self.batch_size = _positive("batch_size", batch_size)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        self.model = pretrained if isinstance(pretrained, ElasticModel) else load_model(pretrained)
        source = "the model" if isinstance(pretrained, ElasticModel) else f"'{pretrained}'"
        if self.model.tokenizer is None:
            raise ValueError(f"{source} has no tokenizer")
        if self.model.is_elastic and bits is None:
            raise ValueError(f"{source} is elastic and needs its average bits, such as bits=4")
        if not self.model.is_elastic and bits is not None:
            raise ValueError(f"bits={bits} has no effect on {source}, which is unquantized")
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else _positive("max_length", max_length)
        if self.max_length > context:
            raise ValueError(f"max_length={max_length} exceeds the model's context of {context} tokens")
        self.tokenizer = self.model.tokenizer
        self._bos = _begin_token(self.model) if add_bos_token else None
        self._seed = seed
        self._step = step or continuation_step(self.model)
        self._used_bits, self._tokens = 0.0, 0

    @property
    def measured_bits(self) -> float | None:
        """Average bits that the tokens of all log-likelihood requests so far used; None before the first."""
        return self._used_bits / self._tokens if self._tokens else None

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        ends = self.tokenizer.eos_token_ids or self.model.config.eos_token_ids
        if not ends:
            raise ValueError("the model has no end-of-text token")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token in place of an empty context: begin-of-text, or end-of-text where the model has none."""
        begin = _begin_token(self.model)
        return self.eot_token_id if begin is None else begin

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes a text.

        Args:
            string: the text.
            add_special_tokens: whether it may get a begin-of-text token; it does if ``add_bos_token`` was given and it
                does not spell one out.
        """
        ids = self.tokenizer.encode(string).tolist()
        if self._bos is None or add_special_tokens is False or ids[:1] == [self._bos]:
            return ids
        return [self._bos, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See ``lm_eval.api.model.LM.loglikelihood``; a continuation without tokens is a ValueError."""
        for request in requests:
            if not request.args[1]:
                raise ValueError(f"the continuation of {request.args[0]!r} is empty")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability and greedy flag of each ``(texts, context ids, continuation ids)``, in order."""
        vocabulary = self.model.config.vocab_size
        for texts, context, continuation in requests:
            if max(max(context, default=0), max(continuation, default=0)) >= vocabulary:
                raise ValueError(f"the tokens of {texts} do not fit the model's vocabulary of {vocabulary}")
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            scores = score_continuations(
                self._step,
                self.model.variables,
                [(context, continuation) for _, context, continuation in requests],
                MAX_BITS if self.bits is None else self.bits,
                window=self.max_length,
                batch_size=self.batch_size,
                progress=bar.update,
            )
        self._used_bits += float(scores.used_bits.sum())
        self._tokens += int(scores.tokens.sum())
        answers = list(zip(scores.log_probs.tolist(), scores.greedy.tolist(), strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:  # a window of loglikelihood_rolling has no texts, and is no request of its own
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See ``lm_eval.api.model.LM.loglikelihood_rolling``.

        Each token of a text is predicted once, from windows of ``max_length``. The begin-of-text token of
        ``add_bos_token`` is context only, where lm-eval's HFLM would score it too.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            mine = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += mine
            counts.append(len(mine))
        log_probs = iter(log_prob for log_prob, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(itertools.islice(log_probs, count), 0.0) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See ``lm_eval.api.model.LM.generate_until``; greedy, or sampled where a task asks for it.

        An empty context becomes the prefix token.
        """
        groups: dict[GenerationSettings, list[int]] = defaultdict(list)
        prompts = []
        for index, request in enumerate(requests):
            context, arguments = request.args
            groups[GenerationSettings.from_lm_eval(arguments, self.max_gen_toks)].append(index)
            prompts.append(np.array(self.tok_encode(context) or [self.prefix_token_id], np.int32))
        texts = [""] * len(requests)
        batches = 0
        with tqdm(total=len(requests), desc="generation", disable=disable_tqdm) as bar:
            for settings, members in groups.items():
                by_length = sorted(members, key=lambda index: -len(prompts[index]))  # alike lengths share a batch
                for first in range(0, len(by_length), self.batch_size):
                    batch = by_length[first : first + self.batch_size]
                    new = generate_texts(
                        self.model,
                        [prompts[index] for index in batch],
                        settings,
                        bits=MAX_BITS if self.bits is None else self.bits,
                        window=self.max_length,
                        batch_size=self.batch_size,
                        key=batch_key(self._seed, batches),
                    )
                    batches += 1
                    bar.update(len(batch))
                    for index, text in zip(batch, new, strict=True):
                        texts[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes about the model into its results."""
        return {"bits": self.bits, "measured_bits": self.measured_bits, "max_length": self.max_length}


def _begin_token(model: ElasticModel) -> int | None:
    """The token that begins a text, as the tokenizer or else the configuration has it."""
    begin = model.tokenizer.bos_token_id
    return model.config.bos_token_id if begin is None else begin


def _positive(name: str, value: int | str) -> int:
    """A whole number of at least 1, also from its text."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool | float):
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return number
