"""Parameters of a run or imported ones: reading them alone, export, errors."""

import dataclasses
import gzip
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers
from rich.console import Console

from examples.llama import hosts, layout, using
from examples.llama.checkpoint import Checkpoints, DamagedCheckpoint
from examples.llama.config import (
    Config,
    ModelConfig,
    OptimizerConfig,
    as_groups,
)
from examples.llama.data.tokenizers import ByteTokenizer
from examples.llama.generate import Sampling
from examples.llama.optimizers import make_optimizer
from examples.llama.prepare import text_of_run
from examples.llama.pure import PureLlama
from examples.llama.run_record import DamagedRecord, RunMismatch, RunRecord
from examples.llama.steps import init_state
from examples.llama.train import train
from examples.llama.using import evaluate, go_on
from examples.llama.weights import hugging_face, load
from examples.llama.weights.folder import export_weights, import_weights
from examples.llama.weights.load import load_for, load_params, special_ids
from examples.llama.weights.names import BadWeights

QUIET = Console(quiet=True)
GREEDY = 64, Sampling(temperature=0.0, top_p=1.0), 0
VOCAB = 257
CONFIG = ModelConfig(width=32, ffn_width=64, num_layers=2, num_heads=2, norm_eps=1e-5)


def record_of(config):
    return RunRecord(config.workdir, as_groups(config))


@pytest.fixture(params=[True, False], ids=["stacked", "unrolled"])
def run(tmp_path, request):
    """Returns a run's folder with two checkpoints, and the second's parameters."""
    model = dataclasses.replace(CONFIG, scan_layers=request.param)
    config = Config(model, optimizer=OptimizerConfig("adamw"), workdir=tmp_path / "run")
    tx = make_optimizer(config.optimizer, steps=10)
    config.workdir.mkdir()
    record_of(config).write({"vocab_size": VOCAB, "end_of_text": 0, "context": 99})
    init = jax.jit(partial(init_state, PureLlama(model, VOCAB), tx))
    with Checkpoints(config.workdir) as checkpoints:
        for step in (1, 2):
            state = init(jax.random.key(step))
            checkpoints.save(step, state)
    return config, jax.device_get(state.params)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_run_without_its_optimizer(run):
    config, params = run
    weights = load_params(config.workdir)
    assert weights.config == config.model
    assert weights.vocab_size == VOCAB
    assert_same(weights.params, params)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights.params))
    mesh = layout.make_mesh("fsdp=4,tensor=2", jax.devices())
    divided = load_params(config.workdir, mesh).params
    assert_same(divided, params)
    shardings = layout.param_shardings(mesh, params)
    assert jax.tree.map(lambda x: x.sharding, divided) == shardings


def test_all_hosts_read_the_same_checkpoint(run, monkeypatch):
    """A run may save another checkpoint while they read."""

    def differ(text, what):
        assert text == str(config.workdir.resolve() / "checkpoints" / "2")
        raise ValueError(f"{what} is not the same")

    config, _ = run
    monkeypatch.setattr(hosts, "check_same", differ)
    with pytest.raises(ValueError, match=r"the last checkpoint of .*run is not the"):
        load_params(config.workdir)


def test_a_checkpoint_that_is_removed_meanwhile_is_named(run, monkeypatch):
    restored = load._restored

    def late(step, *more):
        shutil.rmtree(step)
        return restored(step, *more)

    config, _ = run
    monkeypatch.setattr(load, "_restored", late)
    with pytest.raises(BadWeights, match="checkpoints/2: removed while it was read"):
        load_params(config.workdir)


def test_a_damaged_checkpoint_is_not_read(run):
    config, _ = run
    files = (config.workdir / "checkpoints" / "2").rglob("*")
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    before = sorted(config.workdir.rglob("*"))
    earlier = load_params(config.workdir).params
    key = jax.random.key(1)
    assert_same(earlier, jax.jit(PureLlama(config.model, VOCAB).init)(key))
    assert sorted(config.workdir.rglob("*")) == before  # another may be at work there
    (config.workdir / "digests" / "1.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"changed since[^$]*1.json is missing"):
        load_params(config.workdir)


def test_export_and_import_are_inverse(run, tmp_path):
    config, params = run
    words = tokenizers.models.WordLevel({"</s>": 0}, unk_token="</s>")
    pieces = tokenizers.Tokenizer(words)
    pieces.add_special_tokens(["</s>"])
    pieces.save(str(config.workdir / "tokenizer.json"))
    export_weights(config.workdir, tmp_path / "hf")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["max_position_embeddings"] == 99
    ids = [settings[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
    assert ids == [None, 0, None]
    imported = import_weights(
        tmp_path / "hf", tmp_path / "back", scan_layers=config.model.scan_layers
    )
    assert not imported.without_tokenizer
    weights = load_params(tmp_path / "back")
    assert weights.config == dataclasses.replace(config.model, num_kv_heads=2)
    assert (weights.vocab_size, weights.end_of_text) == (VOCAB, 0)
    assert_same(weights.params, params)
    export_weights(tmp_path / "back", tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json"):
        first, second = (tmp_path / folder / name for folder in ("hf", "again"))
        assert first.read_bytes() == second.read_bytes()
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == settings | {"num_key_value_heads": 2}


def test_import_in_bfloat16_without_a_tokenizer(tmp_path):
    params = jax.jit(PureLlama(CONFIG, VOCAB).init)(jax.random.key(0))
    hugging_face.save(tmp_path / "hf", CONFIG, VOCAB, params)
    imported = import_weights(tmp_path / "hf", tmp_path / "there", "bfloat16")
    assert "hf has no tokenizer.json" in imported.without_tokenizer
    weights = load_params(tmp_path / "there")
    with pytest.raises(BadWeights, match="there has no tokenizer"):
        weights.tokenizer()
    expected = jax.tree.map(lambda x: np.asarray(x.astype("bfloat16")), params)
    assert_same(weights.params, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(weights.params)} == {"bfloat16"}


WORDS = {"<s>": 2, "a": 0, "b": 1, "</s>": 3, "<|eot|>": 4}


@pytest.fixture
def chat(tmp_path):
    """Returns a Hugging Face folder with all the files of a chat model."""
    folder = tmp_path / "chat"
    params = jax.jit(PureLlama(CONFIG, 8).init)(jax.random.key(0))
    hugging_face.save(folder, CONFIG, 8, params)
    pieces = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="a"))
    pieces.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    pieces.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    pieces.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 2)]
    )
    pieces.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text('{"bos_token":  "<s>"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "chat_template.json").write_text("{}")
    file = folder / "config.json"
    ids = {"bos_token_id": 2, "eos_token_id": [3, 4], "pad_token_id": 0}
    settings = json.loads(file.read_text()) | ids
    file.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_round_trip_loses_nothing(chat, tmp_path):
    assert import_weights(chat, tmp_path / "there").without_tokenizer == ""
    weights = load_params(tmp_path / "there")
    assert weights.tokenizer().begin == (2,)
    assert (weights.end_of_text, weights.stops) == (3, (3, 4))
    export_weights(tmp_path / "there", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(chat)


def test_nor_does_one_without_a_tokenizer(chat, tmp_path):
    (chat / "tokenizer.json").unlink()
    imported = import_weights(chat, tmp_path / "there")
    assert "chat has no tokenizer.json" in imported.without_tokenizer
    export_weights(tmp_path / "there", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(chat)


@pytest.fixture
def tuned(chat, tmp_path, tiny_config):
    """Returns a run that starts from the chat model, before its first step."""
    import_weights(chat, tmp_path / "there")
    there = load_params(tmp_path / "there")
    config = tiny_config(model=there.config, init_from=tmp_path / "there")
    data = dataclasses.replace(
        config.data, tokenizer=str(tmp_path / "there" / "tokenizer.json"), vocab_size=8
    )
    config = dataclasses.replace(config, data=data)
    config.workdir.mkdir()
    for resumed in (False, True):  # The same, as far as it can tell.
        text_of_run(record_of(config), data, config.init_from, resumed, QUIET)
    with Checkpoints(config.workdir) as checkpoints:
        checkpoints.save(1, {"params": there.params})
    return config.workdir


def test_a_tuned_run_goes_on_as_what_it_began_with(chat, tuned, tmp_path):
    """It keeps the tokenizer, its rule, the files that belong to it, and the ids."""
    assert load_params(tuned).stops == (3, 4)
    export_weights(tuned, tmp_path / "tuned")
    expected, found = contents(chat), contents(tmp_path / "tuned")
    then, now = (json.loads(x.pop("config.json")) for x in (expected, found))
    assert found == expected
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert now[name] == then[name]


def test_special_tokens_of_another_tokenizer_are_not_its_own(chat, tmp_path):
    import_weights(chat, tmp_path / "there")
    assert special_ids(tmp_path / "there", ByteTokenizer()) == {}


def test_a_run_has_the_tokenizer_that_it_was_trained_with(tuned, tmp_path):
    weights, file = load_params(tuned), tuned / "tokenizer.json"
    mesh = layout.make_mesh(None, jax.devices())
    uses = (
        weights.tokenizer,
        lambda: export_weights(tuned, tmp_path / "hf"),
        lambda: load_for(tuned, weights.config, 8, str(file), mesh),
    )
    assert weights.tokenizer().begin == (2,)
    file.write_text(file.read_text().replace('"a"', '"z"'))
    for use in uses:
        with pytest.raises(BadWeights, match="is not the one that it was trained with"):
            use()


def test_a_tokenizer_with_ids_that_the_model_has_not(chat, tmp_path):
    pieces = tokenizers.Tokenizer.from_file(str(chat / "tokenizer.json"))
    pieces.add_special_tokens(["[1]", "[2]", "[3]", "[4]"])  # Which no text gets.
    pieces.save(str(chat / "tokenizer.json"))
    assert import_weights(chat, tmp_path / "there").without_tokenizer == ""
    assert load_params(tmp_path / "there").tokenizer().vocab_size == 9
    pieces.add_tokens(["c"])
    pieces.save(str(chat / "tokenizer.json"))
    message = r"the tokenizer has 10 ids for texts, the model only 8 embeddings"
    with pytest.raises(BadWeights, match=f"chat: {message}"):
        import_weights(chat, tmp_path / "not")
    assert not (tmp_path / "not").exists()
    pieces.save(str(tmp_path / "there" / "tokenizer.json"))
    uses = (
        lambda: go_on(tmp_path / "there", (), *GREEDY),
        lambda: evaluate(tmp_path / "there", {}, None, QUIET),
    )
    for use in uses:
        with pytest.raises(BadWeights, match=f"there: {message}"):
            use()


def test_a_tokenizer_that_cannot_be_used_is_kept_with_a_note(chat, tmp_path):
    (chat / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    imported = import_weights(chat, tmp_path / "there")
    message = f"{chat / 'tokenizer.json'}: not a tokenizer that can be used: no end"
    assert imported.without_tokenizer.startswith(message)
    assert (tmp_path / "there" / "tokenizer.json").is_file()


OTHERS = [
    ({"width": 64}, {}, r"params/embed/embedding is float32 of \(257, 32\), by"),
    ({"ffn_width": 10**12}, {}, r"mlp/down/kernel .* of \((2, )?1000000000000, 32"),
    ({"param_dtype": "bfloat16"}, {}, "is float32 .* beside it bfloat16 of"),
    ({"tie_embeddings": True}, {}, "params/head/kernel .* beside it not there: they"),
    ({}, {"vocab_size": 99}, r"params/embed/embedding .* of \(99, 32\)"),
    ({}, {"vocab_size": "99"}, "data.json is damaged: vocab_size is '99'"),
    ({}, {"end_of_text": VOCAB}, r"ends of text \(257,\) of 257 ids"),
    ({}, {"stops": ["</s>"]}, r"ends of text \('</s>',\) of 257 ids"),
]


def test_parameters_of_other_settings_are_refused(run):
    config, _ = run
    for settings, data, message in OTHERS:
        model = dataclasses.replace(config.model, **settings)
        data = {"vocab_size": VOCAB, "end_of_text": 0, "context": 9} | data
        record_of(dataclasses.replace(config, model=model)).write(data)
        for mesh in (None, layout.make_mesh("fsdp=4,tensor=2", jax.devices())):
            with pytest.raises((BadWeights, DamagedRecord), match=message):
                load_params(config.workdir, mesh)


def test_what_is_not_finite_is_no_weights(run, tmp_path):
    config, params = run
    params["norm"]["scale"] = np.full_like(params["norm"]["scale"], np.inf)
    params["embed"]["embedding"] = params["embed"]["embedding"].copy()
    params["embed"]["embedding"][3, 2] = np.nan
    with Checkpoints(config.workdir) as checkpoints:
        checkpoints.save(3, {"params": params})
    message = r"checkpoints/3: embed/embedding and 1 more: not finite"
    uses = {
        "load": lambda: load_params(config.workdir),
        "export": lambda: export_weights(config.workdir, tmp_path / "hf"),
        "generate": lambda: go_on(config.workdir, (), *GREEDY),
        "eval": lambda: evaluate(config.workdir, {}, None, QUIET),
        "init_from": lambda: load_for(
            config.workdir,
            config.model,
            VOCAB,
            "byte",
            layout.make_mesh("fsdp=4,tensor=2", jax.devices()),
        ),
    }
    for use in uses.values():
        with pytest.raises(BadWeights, match=message):
            use()
    assert not (tmp_path / "hf").exists()
    shutil.rmtree(config.workdir / "checkpoints" / "3")  # As the message has it.
    load_params(config.workdir)


def test_a_prompt_begins_as_the_tokenizer_has_it(chat, tmp_path, monkeypatch):
    """The text ends at any of the ids with which the model ends a text."""
    import_weights(chat, tmp_path / "there")
    given = {}

    def generated(_, params, begun, count, **settings):
        given.update(settings, begun=begun)
        return [np.asarray([1, 0])] * len(begun)

    monkeypatch.setattr(using, "generate", generated)
    said = go_on(tmp_path / "there", ("b", ""), *GREEDY)
    assert given["begun"] == [[2, 1], [2]]
    assert given["end_of_text"] == (3, 4)
    assert said == [("b", " b a"), ("", "b a")]
    # Where nothing is put before a text, a new document comes after the end of another.
    file = tmp_path / "there" / "tokenizer.json"
    pieces = json.loads(file.read_text()) | {"post_processor": None}
    file.write_text(json.dumps(pieces))
    go_on(tmp_path / "there", ("b", ""), *GREEDY)
    assert given["begun"] == [[1], [3]]


def test_held_out_text_begins_as_the_tokenizer_has_it(
    chat, tmp_path, monkeypatch, text_folder
):
    """Compares with the loss over a stream that the test concatenates."""
    monkeypatch.chdir(tmp_path)  # Where the tokens are kept.
    import_weights(chat, tmp_path / "there")
    text = {"path": text_folder, "eval_tokens": 96, "seq_len": 48, "batch_size": 8}
    other = {f"data.{name}": value for name, value in text.items()}
    found = evaluate(tmp_path / "there", other, None, QUIET)
    file = text_folder / "tiny-validation.json.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    # Of its words the tokenizer knows "a" alone, and takes all others for it.
    stream = np.concatenate([[2, *np.zeros(len(x.split()), int), 3] for x in texts])
    weights = load_params(tmp_path / "there")
    model = PureLlama(weights.config, weights.vocab_size)
    inputs, targets = (stream[i : 96 + i].reshape(2, 48) for i in (0, 1))
    expected = jax.jit(model.losses)(weights.params, inputs, targets).mean()
    assert found.tokens == 96
    np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_nothing_is_left_of_an_import_that_fails(tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(BadWeights, match="no config"):
        import_weights(tmp_path / "hf", tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    with pytest.raises(FileExistsError, match="is there already"):
        import_weights(tmp_path / "hf", tmp_path / "hf")
    with pytest.raises(RunMismatch, match="neither a run nor weights"):
        load_params(tmp_path / "hf")


def test_a_run_does_not_start_over_imported_weights(tiny_config, tmp_path):
    params = jax.jit(PureLlama(CONFIG, VOCAB).init)(jax.random.key(0))
    hugging_face.save(tmp_path / "hf", CONFIG, VOCAB, params)
    import_weights(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(RunMismatch, match="holds imported weights"):
        train(tiny_config())
