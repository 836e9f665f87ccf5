"""The command line: the sources of settings, and errors."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from examples.llama import __main__
from examples.llama.checkpoint import DamagedCheckpoint
from examples.llama.commands import (
    Describe,
    Eval,
    Export,
    Generate,
    Train,
    parse,
)
from examples.llama.config import (
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    as_groups,
    file,
    flat,
)
from examples.llama.config.recipes import RECIPES
from examples.llama.options import told
from examples.llama.progress import untraced
from examples.llama.run_record import RunRecord, record_weights
from examples.llama.using import evaluate

DATA = {"vocab_size": 300, "end_of_text": 0, "context": None}


def config_of(arguments):
    command = parse(arguments)
    assert isinstance(command, Train)
    return command.config


def fails(capsys, *arguments):
    """Returns what is printed by a command that ends with an error."""
    with pytest.raises(SystemExit) as exit_:
        parse(list(arguments))
    assert exit_.value.code != 0
    printed = capsys.readouterr()
    return unboxed(printed.out + printed.err)


def unboxed(text):
    """Removes the frame, and line breaks for the width of the terminal."""
    return " ".join(text.replace("│", " ").split())


def test_each_source_wins_over_those_before_it(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "steps: 40\n"
        "mesh: fsdp=2\n"
        "model: {scan_layers: false}\n"
        "optimizer: {name: muon, rank: 7}\n"
    )
    options = ["--preset", "60m", "--recipe", "paper", "--config", str(path)]
    config = config_of(["train", *options, "--rank", "8"])
    assert config.model.width == 512  # the preset
    assert config.data.batch_size == 512  # the recipe
    assert (config.steps, config.mesh) == (40, "fsdp=2")  # the file
    assert (config.optimizer.name, config.model.scan_layers) == ("muon", False)
    assert config.optimizer.rank == 8  # the option itself


def test_weights_to_begin_with_win_over_those_of_a_file(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    record_weights(weights, ModelConfig(width=64), DATA)
    path = tmp_path / "config.yaml"
    path.write_text(file.dump(as_groups(Config(ModelConfig(width=64)))))
    begin = ["train", "--config", str(path)]
    assert config_of(begin).init_from is None
    assert config_of([*begin, "--init-from", str(weights)]).init_from == weights
    path.write_text(f"init_from: {weights}\n")
    assert config_of(begin).init_from == weights
    assert config_of([*begin, "--init-from", "None"]).init_from is None


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            PRESETS["350m"],
            DataConfig(seq_len=64, batch_size=4),
            OptimizerConfig("lorapre_muon", learning_rate=1e-5, clip_norm=None),
            z_loss=1e-4,
            mesh="fsdp=4,tensor=2",
            profile="3:4",
            workdir=Path("-a 'b'\n: \u00e9"),
        ),
    ],
)
def test_what_is_written_is_read_back(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(file.dump(as_groups(config)))
    assert config_of(["train", "--config", str(path)]) == config
    # Anyone else's YAML reads it too.
    assert flat(yaml.safe_load(path.read_text())) == flat(as_groups(config))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optimizer: {rnak: 3}", r"optimizer.rnak is no setting; did you mean .*rank"),
        ("- 1", "holds no settings"),
        ("a: [", "not YAML"),
        ("3: 4", "3 is no setting"),
        (
            "steps: 3\nseed: 1\nsteps: 4",
            "not YAML that can be read: steps is given twice",
        ),
        (None, "No such file"),
        ("steps: many", "steps must be a whole number, got 'many'"),
        ("steps: 3.5", "steps must be a whole number, got 3.5"),
        ("steps: null", "steps must be a whole number, got None"),
        ("seed: yes", "seed must be a whole number, got True"),
        ("z_loss: on", "z_loss must be a number, got True"),
        (f"time_limit: 1{'0' * 400}", "time_limit must be a number or null, got 1000"),
        ("model: {scan_layers: 1}", "model.scan_layers must be true or false, got 1"),
        ("data: {seq_len: [1, 2]}", r"data.seq_len must be a whole .* got \[1, 2\]"),
        ("optimizer: {name: adam}", "optimizer.name must be lorapre_adamw, .* 'adam'"),
        # A number of base 60, and a date, to YAML.
        ("profile: 10:13", "profile must be text or null, got 613; put it in quotes"),
        ("workdir: 2026-01-02", "workdir must be a path, got .*; put it in quotes"),
        ("workdir: null", "workdir must be a path, got None$"),
        ("data: c4", "data is a group of settings, such as data.path"),
        ("model.width: 3\nmodel: {width: 4}", "model.width is given twice"),
        ("steps: {a: 1}", "steps.a is no setting"),
        ("steps: {}", "steps must be a whole number, got {}"),
        ("data:", "data is a group of settings, such as data.path"),
    ],
)
def test_a_bad_file_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(file.ConfigFileError, match=rf"bad\.yaml: {message}"):
        parse(["train", "--config", str(path)])
    with pytest.raises(file.ConfigFileError, match="Is a directory"):
        parse(["train", "--config", str(tmp_path)])


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(
        "optimizer: {learning_rate: 1e-3, weight_decay: 1, clip_norm: null}\n"
        "model: {rope_base: 5E+5}\n"
        "data: {train_tokens: 1_000_000}\n"
        "workdir: '1e3'\n"
        "init_from: 1e3-b\n"
    )
    config = config_of(["train", "--config", str(path)])
    assert (config.optimizer.learning_rate, config.model.rope_base) == (1e-3, 5e5)
    assert isinstance(config.optimizer.weight_decay, float)
    assert (config.optimizer.clip_norm, config.data.train_tokens) == (None, 10**6)
    assert (config.workdir, config.init_from) == (Path("1e3"), Path("1e3-b"))
    path.write_text(file.dump(as_groups(config)))
    assert config_of(["train", "--config", str(path)]) == config


def test_what_a_file_lacks_an_option_may_give(tmp_path, capsys):
    """Both are checked together; messages have the names of options and of the file."""
    path = tmp_path / "some.yaml"
    path.write_text("data: {hub: a/b}\nmicro_batch_size: 3\n")
    begin = ["train", "--config", str(path)]
    config = config_of([*begin, "--train-tokens", "9", "--batch-size", "6"])
    assert (config.data.hub, config.data.train_tokens) == ("a/b", 9)
    told = fails(capsys, *begin, "--train-tokens", "9", "--batch-size", "7")
    assert "--micro-batch-size (3) must divide --batch-size (7)" in told
    assert f"with the settings in {path}" in told
    assert "--hub needs --train-tokens" in fails(capsys, *begin, "--batch-size", "6")


def test_unknown_options_are_refused_with_the_nearest(capsys):
    assert "Perhaps you meant: --steps" in fails(capsys, "train", "--stps", "3")
    assert "train, eval, generate" in fails(capsys, "trian")
    assert "'adamw'" in fails(capsys, "train", "--optimizer", "adam")
    assert "invalid choice: '61m'" in fails(capsys, "train", "--preset", "61m")
    assert "--preset" in fails(capsys, "eval", "runs/x", "--preset", "60m")


def test_settings_that_cannot_be_are_refused_by_name(capsys):
    told = fails(capsys, "train", "--batch-size", "0")
    assert "error: --batch-size must be at least 1, got 0" in told
    assert "python -m examples.llama train --help" in told


def test_help_has_units_and_defaults(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["train", "--preset", "1b", "--help"])
    assert exit_.value.code == 0
    text = unboxed(capsys.readouterr().out)
    assert "--width INT Features per token in the residual stream. (default: 2048)" in (
        text
    )
    assert "Minutes until the run saves and stops" in text
    assert "--preset {9m,20m,60m,130m,350m,1b,7b}" in text


def test_paths_begin_at_home(tmp_path, monkeypatch):
    """The shell does not expand `~` in the middle of a word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record_weights(tmp_path, ModelConfig(), DATA)
    (tmp_path / "some.yaml").write_text("data: {cache: ~/tokens, tokenizer: ~/t.model}")
    options = ("--workdir=~/run", "--data=~", "--init-from=~", "--config=~/some.yaml")
    config = config_of(["train", *options])
    assert (config.workdir, config.init_from) == (tmp_path / "run", tmp_path)
    assert (config.data.path, config.data.cache) == (tmp_path, tmp_path / "tokens")
    assert config.data.tokenizer == str(tmp_path / "t.model")
    hub = config_of(["train", "--hub=~/hub:en", "--train-tokens", "9"])
    assert hub.data.hub == f"{tmp_path}/hub:en"
    for command in ("eval ~ --data=~", "generate ~", "import ~ ~", "export ~ ~"):
        asked = vars(parse([*command.split()]))
        paths = [path for path in asked.values() if isinstance(path, Path)]
        assert paths == [tmp_path] * command.count("~")


def test_the_other_commands():
    asked = parse(["eval", "runs/x", "--eval-tokens", "9"])
    assert isinstance(asked, Eval)
    assert asked.eval_tokens == 9
    asked = parse(["generate", "runs/x", "--prompt", "a b", "--prompt", "c"])
    assert isinstance(asked, Generate)
    assert asked.prompt == ("a b", "c")
    assert isinstance(parse(["export", "runs/x", "there"]), Export)


def test_steps_that_are_done_have_no_profile():
    assert not untraced("6:9", 5)
    assert not untraced(None, 5)
    assert untraced("6:9", 6) == [
        "profile 6:9: no trace of the steps up to 6, which are done already"
    ]


@pytest.mark.parametrize(
    ("message", "command", "shown"),
    [
        ("give another `workdir`", Train, "give another --workdir"),
        ("a `data.path` or `data.cache: x`", Describe, "a --data or --token-cache x"),
        ("`data.skip_bad_lines: true` leaves", Train, "--skip-bad-lines leaves"),
        ("`model.scan_layers: false`", Train, "--no-scan-layers"),
        ("`data.workers`, `optimizer.name`", Train, "--data-workers, --optimizer"),
        # Where there is no such option it stays a setting, and all else as it is.
        ("`data.path`, `data.hub`", Eval, "--data, `data.hub`"),
        ("give another `workdir`", Eval, "give another `workdir`"),
        ("`data.path`", None, "`data.path`"),
        (
            "`data.nothing` `x: y` data.path `",
            Train,
            "`data.nothing` `x: y` data.path `",
        ),
    ],
)
def test_messages_about_settings_are_shown_with_options(message, command, shown):
    assert told(message, command) == shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_limit": 0}, "`time_limit` must be > 0"),
        ({"peak_tflops": -1}, "`peak_tflops` must be > 0"),
        ({"z_loss": -1}, "`z_loss` must not be negative"),
        ({"profile": "4:3"}, "first:last"),
        ({"profile": "4"}, "first:last"),
        ({"profile": "4:8", "steps": 7}, r"`profile` \(4:8\) is beyond .* step \(7\)"),
        (
            {"profile": "4:10", "steps": 7, "extend_to": 9},
            r"`profile` \(4:10\) is beyond .* step \(9\)",
        ),
        ({"mesh": "fsdp=2,tensor=2,fsdp=4"}, "has fsdp twice"),
        ({"time_limit": math.inf}, "`time_limit` must be a finite number, got inf"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)


def test_numbers_of_all_groups_are_finite():
    with pytest.raises(ValueError, match=r"`model.rope_base` must be a finite number"):
        ModelConfig(rope_base=math.inf)
    with pytest.raises(ValueError, match=r"`optimizer.learning_rate` must be a finite"):
        OptimizerConfig(learning_rate=math.inf)


def test_an_impossible_evaluation_is_refused_before_anything_is_read(tmp_path):
    config = Config(ModelConfig(loss_chunk=64), micro_batch_size=4, workdir=tmp_path)
    RunRecord(tmp_path, as_groups(config)).write(DATA)
    asked, quiet = Eval(tmp_path, seq_len=96), Console(quiet=True)
    message = r"`model.loss_chunk` \(64\) must divide `data.seq_len` \(96"
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path, asked.settings, None, quiet)
    # How training divides its batch is nothing to it: it fails for want of weights.
    with pytest.raises(DamagedCheckpoint, match="has no good checkpoint"):
        evaluate(tmp_path, {"data.batch_size": 6}, "data=2,tensor=4", quiet)


@pytest.mark.parametrize("preset", ["60m", "130m", "350m", "1b", "7b"])
def test_the_recipe_is_the_published_one(preset):
    """As in the paper's table: steps, warm-up, tokens, rank."""
    published = {
        "60m": (10_000, 1_000, 1.3e9, 128),
        "130m": (20_000, 2_000, 2.6e9, 256),
        "350m": (60_000, 6_000, 7.9e9, 256),
        "1b": (100_000, 10_000, 13.1e9, 512),
        "7b": (150_000, 15_000, 19.7e9, 1024),
    }
    config = config_of(["train", "--preset", preset, "--recipe", "paper"])
    steps, warmup, tokens, rank = published[preset]
    assert (config.steps, config.optimizer.rank) == (steps, rank)
    assert round(config.optimizer.warmup * steps) == warmup
    seen = config.data.batch_size * config.data.seq_len * steps
    assert seen == pytest.approx(tokens, rel=0.01)
    assert config.optimizer.update_scale == 0.25
    assert config.optimizer.algorithm == "paper"
    assert all(setting.source for setting in RECIPES["paper"](preset).values())


def test_a_recipe_without_its_optimizer_has_the_rest():
    options = ["train", "--preset", "60m", "--recipe", "paper"]
    config = config_of([*options, "--optimizer", "adamw", "--learning-rate", "1e-3"])
    assert (config.steps, config.data.batch_size) == (10_000, 512)
    assert (config.optimizer.name, config.optimizer.clip_norm) == ("adamw", None)
    assert (config.optimizer.algorithm, config.optimizer.rank) == ("default", 16)


def test_the_papers_muon_has_algorithm_1_and_a_rate_to_choose():
    options = ["train", "--preset", "60m", "--recipe", "paper"]
    config = config_of([*options, "--optimizer", "lorapre_muon"])
    assert (config.optimizer.algorithm, config.optimizer.rank) == ("paper", 128)
    assert (config.optimizer.learning_rate, config.optimizer.update_scale) == (None, 1)


def test_a_size_without_a_recipe_is_refused():
    with pytest.raises(ValueError, match="for the presets 60m, 130m"):
        parse(["train", "--preset", "9m", "--recipe", "paper"])


def planned(capsys, *arguments):
    before = sys.argv
    sys.argv = ["examples.llama", *arguments]
    try:
        code = __main__.main()
    finally:
        sys.argv = before
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    return printed.out


def on_each_device(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"  {name}  ")]
    return int(line.split()[-1].replace(",", ""))


def test_a_dry_run_prints_the_plan_of_a_pod(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = ("--preset", "7b", "--recipe", "paper", "--mesh", "fsdp=64,tensor=4")
    text = planned(capsys, "train", *recipe, "--dry-run", "--rank", "512")
    assert "256: data=1, fsdp=64, tensor=4" in text
    assert "6,738,415,616 parameters in bfloat16, 96% of them factored" in text
    assert "150,000 of 131,072 tokens, 19,660,800,000 in all" in text
    assert "0.25            GaLore, arXiv 2403.03507" in text
    assert "512             instead of 1024 (LoRA-Pre" in text
    # Two bytes a parameter, and 256 devices divide all but the norms.
    norms = 2 * (2 * 32 + 1) * 4096
    total = 2 * 6_738_415_616
    of_each = (total - norms) // 256 + norms
    assert on_each_device(text, "parameters") == of_each
    # In parts, the gradients are added up in four bytes.
    text = planned(capsys, "train", *recipe, "--dry-run", "--micro-batch-size", "256")
    assert on_each_device(text, "gradients") == of_each
    assert on_each_device(text, "sums of gradients, float32") == 2 * of_each
    assert text.startswith("the tokenizer has only 257 of the model's 32,000 ids")
    assert not list(tmp_path.iterdir())


def test_a_plan_that_cannot_be_is_refused(monkeypatch, capsys):
    rows = ["--batch-size", "64", "--micro-batch-size", "16", "--mesh", "fsdp=64"]
    monkeypatch.setattr(sys, "argv", ["examples.llama", "train", *rows, "--dry-run"])
    assert __main__.main() == 1
    message = "--micro-batch-size (16) must be a multiple of the 64 devices"
    assert message in capsys.readouterr().err


def test_describe_has_every_leaf(capsys):
    text = planned(capsys, "describe", "--rank", "4")
    assert "layers/attention/q/kernel" in text
    assert "4 x 128 x 128 at rank 4: LowRank, RotatedRankOne" in text


def test_only_the_command_line_knows_its_options():
    own = {"__main__", "main", "commands", "options", "again"}
    found = re.compile(r"tyro|llama\.(main|commands|options|again)\b|(?<![-\w])--[a-z]")
    folder = Path(__main__.__file__).parent
    paths = {path for path in folder.rglob("*.py") if path.stem not in own}
    assert len(paths) > 40
    assert not [path for path in paths if found.search(path.read_text())]


def test_settings_of_a_run_are_json_values():
    assert json.loads(json.dumps(as_groups(Config()))) == as_groups(Config())
