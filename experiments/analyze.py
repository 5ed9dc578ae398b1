"""What each token of a checkpoint loses at each width, where its bits go, and what its router is worth.

python experiments/analyze.py --checkpoint=runs/smollm2_135m/checkpoint --data=pydoc --windows=4 --output=runs/analysis

Writes report.html (one page, no other file needed), its figures as PNGs, and numbers.json. The held-out part of --data
is measured; static allocations, with which the router is compared, are searched on its calibration part.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Int

from mobiquant_jax.analysis import Findings, Labels, Study, new_folder, page_bits, write_report
from mobiquant_jax.calibration.console import clock
from mobiquant_jax.compilation import prefer_library_matmuls
from mobiquant_jax.config_flags import run
from mobiquant_jax.data import load_token_ids, token_windows
from mobiquant_jax.evaluation import TokenBits, parse_bits, split_text
from mobiquant_jax.files import read_json_object
from mobiquant_jax.io.checkpoint import MANIFEST, load_checkpoint
from mobiquant_jax.models.elastic import ElasticModel
from mobiquant_jax.provenance import fingerprint, peak_host_bytes, provenance

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "folder of an elastic checkpoint")
DATA = flags.DEFINE_string(
    "data", "pydoc", "pydoc, file:PATH, file:CALIBRATION,HELDOUT, tokens:PATH.npy, wikitext2, c4"
)
WINDOWS = flags.DEFINE_integer("windows", 4, "most held-out windows to measure", lower_bound=1)
WINDOW_LENGTH = flags.DEFINE_integer("window_length", None, "tokens a window; default: 512 or the model's context")
SEARCH_TOKENS = flags.DEFINE_integer(
    "search_tokens", 64, "calibration tokens on which static depths are searched", lower_bound=2
)
BITS = flags.DEFINE_string("bits", "2.5,3,4,5", "average bits at which the router is compared")
SEED = flags.DEFINE_integer("seed", 0, "of random choices")
OUTPUT = flags.DEFINE_string("output", None, "folder to make")
OVERWRITE = flags.DEFINE_boolean("overwrite", False, "replace the analysis in --output")

CHOICE_WINDOWS = 2  # enough to choose among the four allocations of each average


def main(_: list[str]) -> None:
    """Loads, measures, writes."""
    prefer_library_matmuls()
    start = time.perf_counter()
    if not CHECKPOINT.value or not OUTPUT.value:
        raise ValueError("--checkpoint=DIR and --output=DIR are required")
    bits = parse_bits(BITS.value)
    with new_folder(OUTPUT.value, overwrite=OVERWRITE.value) as folder:
        model = load_checkpoint(CHECKPOINT.value)
        context = model.config.max_position_embeddings
        length = WINDOW_LENGTH.value or min(512, context)
        if length > context:
            raise ValueError(f"--window_length={length} exceeds the model's context of {context} tokens")
        windows = token_windows(_token_ids(model, "heldout"), length, WINDOWS.value, model.config.vocab_size)
        search, choice = _calibration_windows(model, length)
        study = Study(
            model=model,
            windows=windows,
            search_windows=search,
            choice_windows=choice,
            bits=bits,
            seed=SEED.value,
            progress=_progress(start),
        )
        findings = study.run()
        about = {
            "checkpoint": CHECKPOINT.value,
            "data": DATA.value,
            "windows": len(windows),
            "window_length": windows.shape[1],
            "search_windows": list(search.shape),
            "choice_windows": list(choice.shape),
            "seed": SEED.value,
            "fingerprints": {
                "windows": fingerprint(windows),
                "search": fingerprint(search),
                "choice": fingerprint(choice),
            },
            "provenance": provenance(),
            "calibration": read_json_object(Path(CHECKPOINT.value) / MANIFEST)["provenance"],
            "seconds": round(time.perf_counter() - start, 1),
            "peak_gb": round(peak_host_bytes() / 1e9, 2),
        }
        write_report(folder, findings, Labels.of(model), _text(model, windows[0], findings), about)
    print(Path(OUTPUT.value) / "report.html")


def _token_ids(model: ElasticModel, split: str) -> Int[np.ndarray, " N"]:
    return load_token_ids(DATA.value, split, model.tokenizer)


def _calibration_windows(model: ElasticModel, length: int) -> tuple[Int[np.ndarray, "s S"], Int[np.ndarray, "c T"]]:
    """Windows of the calibration text, some to search static depths on and, after those, some to choose them on."""
    ids = _token_ids(model, "calibration")
    search_length = min(length, SEARCH_TOKENS.value)
    search = token_windows(ids, search_length, SEARCH_TOKENS.value // search_length, model.config.vocab_size)
    return search, token_windows(ids[search.size :], length, CHOICE_WINDOWS, model.config.vocab_size)


def _text(model: ElasticModel, tokens: Int[np.ndarray, " T"], findings: Findings) -> TokenBits:
    """The first window with the bits of its tokens; their ids where there is no tokenizer."""
    bits = findings.router[page_bits(findings)].token_bits
    if model.tokenizer is None:
        return TokenBits(pieces=tuple(f" {token}" for token in tokens), bits=tuple(bits.tolist()))
    return split_text(model.tokenizer, tokens, bits)


def _progress(start: float) -> Callable[[str], None]:
    """Lines with the time since the start, on stderr."""

    def show(line: str) -> None:
        print(f"{clock(time.perf_counter() - start):>7}  {line}", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    run(main)
