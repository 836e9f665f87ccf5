"""Our Llama and that of transformers on the same weights (`make test-parity`)."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizers

from examples.llama.config import ModelConfig
from examples.llama.pure import PureLlama
from examples.llama.weights import hugging_face
from examples.llama.weights.names import unfilled

REASON = "torch and transformers are an extra: make test-parity"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

VOCAB = 40
PLAIN = ModelConfig(width=32, ffn_width=48, num_layers=3, num_heads=4)
CONFIGS = {
    "plain": PLAIN,
    "grouped heads": dataclasses.replace(PLAIN, num_kv_heads=2),
    "tied, one kv head": dataclasses.replace(
        PLAIN, num_kv_heads=1, tie_embeddings=True
    ),
    "eps and rope": dataclasses.replace(
        PLAIN, num_kv_heads=2, norm_eps=1e-2, rope_base=33.0, tie_embeddings=True
    ),
}
CASES = [*((name, True) for name in CONFIGS), ("eps and rope", False)]
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 24))


def their_config(config):
    return transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tie_embeddings,
        initializer_range=0.3,  # so large that no part of it is near nothing
    )


def their_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.float().numpy()


def our_params(config):
    """Kernels so large that none is near nothing, and norms that are not ones."""
    params = jax.jit(PureLlama(config, VOCAB).init)(jax.random.key(0))
    noise = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.where(x == 1, noise.uniform(0.5, 1.5, x.shape), 10 * x).astype(
            "f4"
        ),
        params,
    )


def our_logits(config, params):
    return jax.jit(PureLlama(config, VOCAB).apply)(params, TOKENS)


def assert_close(actual, expected):
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("name", "scan_layers"), CASES)
def test_theirs_here(tmp_path, name, scan_layers):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(their_config(CONFIGS[name]))
    with torch.no_grad():
        for path, weight in theirs.named_parameters():
            if path.endswith("norm.weight"):  # which would be ones
                weight.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path / "llama", max_shard_size="30KB")
    assert len(list(tmp_path.glob("llama/*.safetensors"))) > 1
    config, vocab_size, params = hugging_face.load(
        tmp_path / "llama", scan_layers=scan_layers
    )
    assert vocab_size == VOCAB
    assert config.tie_embeddings == CONFIGS[name].tie_embeddings
    assert_close(our_logits(config, params), their_logits(theirs))


@pytest.mark.parametrize(("name", "scan_layers"), CASES)
def test_ours_there(tmp_path, name, scan_layers):
    config = dataclasses.replace(CONFIGS[name], scan_layers=scan_layers)
    params = our_params(config)
    hugging_face.save(tmp_path / "llama", config, VOCAB, params, shard_bytes=30_000)
    theirs, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", output_loading_info=True
    )
    assert not any(report.values())
    assert_close(our_logits(config, params), their_logits(theirs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(tmp_path, dtype):
    """transformers takes their dtype from them, and both the same numbers."""
    config, path = CONFIGS["grouped heads"], tmp_path / "llama"
    hugging_face.save(path, config, VOCAB, our_params(config), dtype=dtype)
    theirs = transformers.LlamaForCausalLM.from_pretrained(path)
    assert theirs.dtype == getattr(torch, dtype)
    _, _, params = hugging_face.load(path)
    assert_close(our_logits(config, params), their_logits(theirs.float()))


def test_the_tokenizer_goes_with_it(tmp_path):
    text = "the cat sees 12 old dogs, café\n"
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator([text], trainer)
    pieces.save(str(tmp_path / "tokenizer.json"))
    config = CONFIGS["plain"]
    params = unfilled(config, 280, np.float32)
    hugging_face.save(
        tmp_path / "llama",
        config,
        280,
        params,
        token_ids={"eos_token_id": 0},
        tokenizer=tmp_path,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs.encode(text) == pieces.encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.eos_token_id == 0
