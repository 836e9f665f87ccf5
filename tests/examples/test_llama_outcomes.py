"""How commands end: exit codes and messages."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from command_line import REPOSITORY
from rich.console import Console
from test_llama_commands import unboxed

from examples.llama import __main__, files, main
from examples.llama.config import Config, as_groups, file
from examples.llama.page import Page
from examples.llama.terminal import say


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rank 0", "--rank must be at least 1, got 0"),
        ("--recipe paper", "recipe paper is for the presets"),
    ],
)
def test_errors_are_told_without_a_traceback(options, message):
    command = [sys.executable, "-m", "examples.llama", "train", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in unboxed(done.stderr)
    assert "Traceback" not in done.stderr


def test_what_goes_on_again_is_training_alone(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError("no space left")

    command = ["examples.llama", "export", str(tmp_path), str(tmp_path)]
    monkeypatch.setattr(main, "export_weights", full)
    monkeypatch.setattr(sys, "argv", command)
    assert __main__.main() == 74
    assert capsys.readouterr().err == "error: no space left\n"
    monkeypatch.setattr(main, "train", full)
    monkeypatch.setattr(sys, "argv", ["examples.llama", "train"])
    assert __main__.main() == 74
    assert "Run the same command again" in capsys.readouterr().err


def outcome(monkeypatch, capsys, error, *arguments):
    """Returns exit code and message of a command that ends with this error."""

    def end(*_):
        raise error

    monkeypatch.setattr(main, "train", end)
    monkeypatch.setattr(main, "evaluate", end)
    monkeypatch.setattr(sys, "argv", ["examples.llama", *arguments])
    return __main__.main(), capsys.readouterr()


def test_memory_that_does_not_suffice_is_told(monkeypatch, capsys):
    try:
        jnp.zeros(2**48, jnp.uint8).block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        of_device = error
    code, printed = outcome(monkeypatch, capsys, of_device, "eval", "runs/x")
    assert code == 71
    assert printed.err.startswith("error: RESOURCE_EXHAUSTED: Out of memory allocating")
    assert "--batch-size" in printed.err
    assert "--micro-batch-size" not in printed.err  # Which eval has not.
    code, printed = outcome(monkeypatch, capsys, MemoryError(), "train")
    assert (code, printed.err[:21]) == (71, "error: out of memory\n")
    assert "--micro-batch-size" in printed.err


def test_an_unforeseen_error_has_a_traceback_and_a_code(monkeypatch, capsys):
    error = ZeroDivisionError("surprise")
    code, printed = outcome(monkeypatch, capsys, error, "train")
    assert code == 70
    assert "Traceback" in printed.err
    assert printed.err.endswith("ZeroDivisionError: surprise\n")


def test_what_failed_besides_is_told(monkeypatch, capsys):
    error = ValueError("the fault")
    error.add_note("and another")
    code, printed = outcome(monkeypatch, capsys, error, "train")
    assert (code, printed.err) == (1, "error: the fault\nand another\n")


def test_ctrl_c_has_its_words(monkeypatch, capsys):
    again = "Interrupted. Run the same command again to go on.\n"
    code, printed = outcome(monkeypatch, capsys, KeyboardInterrupt(), "train")
    assert (code, printed) == (130, (again, ""))
    code, printed = outcome(monkeypatch, capsys, KeyboardInterrupt(), "eval", "runs/x")
    assert (code, printed) == (130, ("Interrupted.\n", ""))


@pytest.mark.parametrize("command", ["import", "export"])
def test_sigterm_leaves_no_half_of_a_folder(command, tmp_path, monkeypatch, capsys):
    def begin(*_, **__):
        with files.new_folder(tmp_path / "new"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    monkeypatch.setattr(main, f"{command}_weights", begin)
    arguments = [command, str(tmp_path / "old"), str(tmp_path / "new")]
    monkeypatch.setattr(sys, "argv", ["examples.llama", *arguments])
    assert __main__.main() == 143
    assert capsys.readouterr().out == "Stopped by SIGTERM.\n"
    assert not list(tmp_path.iterdir())


class CtrlC:
    """Raises Ctrl-C while a module is imported."""

    def find_spec(self, name, *_):
        if name == "examples.llama.main":
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_while_modules_are_imported(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "examples.llama.main")
    monkeypatch.delattr("examples.llama.main")
    monkeypatch.setattr(sys, "meta_path", [CtrlC(), *sys.meta_path])
    monkeypatch.setattr(sys, "argv", ["examples.llama", "generate", "runs/x"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as exit_:
        __main__.main()
    assert exit_.value.code == 130
    assert capsys.readouterr() == ("Interrupted.\n", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Signalled:
    """An object during whose finalizer a signal arrives."""

    def __init__(self, signum):
        self.signum = signum

    def __del__(self):
        os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize(
    ("signum", "code", "told"),
    [
        (signal.SIGINT, 130, "Interrupted. Run the same"),
        (signal.SIGTERM, 143, "Stopped by SIGTERM. Run the same"),
    ],
)
def test_a_signal_where_python_drops_exceptions(
    signum, code, told, monkeypatch, capsys
):
    """Python drops exceptions in finalizers and callbacks of the garbage collection."""
    before = sys.unraisablehook

    def work(*_):
        Signalled(signum)
        time.sleep(10)

    monkeypatch.setattr(main, "train", work)
    monkeypatch.setattr(sys, "argv", ["examples.llama", "train"])
    assert __main__.main() == code
    assert sys.unraisablehook is before
    printed = capsys.readouterr()
    assert printed.out.startswith(told)
    assert printed.err == ""


def test_nothing_large_is_imported_before_ctrl_c_is_understood():
    code = (
        "import sys; python = set(sys.modules); import examples.llama.__main__; "
        "more = sys.modules.keys() - python; "
        "assert not [x for x in more if '.' not in x and x not in "
        "{*sys.stdlib_module_names, 'examples'}], more"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_output_that_nobody_reads_ends_the_command(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    stdout = os.dup(1)
    try:
        with open(write, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            monkeypatch.setattr(sys, "argv", ["examples.llama", "describe"])
            assert __main__.main() == 141
            os.dup2(1, write)
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
    assert capfd.readouterr().err == "error: what reads the output is gone.\n"


@pytest.mark.parametrize("name", ["a[/b]", "[bold]a", ":smile:"])
def test_names_are_printed_as_they_are(name, tmp_path, monkeypatch, capsys):
    """They are not read as markup of the display."""
    monkeypatch.chdir(tmp_path)
    code, printed = outcome(
        monkeypatch, capsys, ValueError(f"{name} is bad"), "train", "--workdir", name
    )
    assert (code, printed.err) == (1, f"error: {name} is bad\n")
    told = io.StringIO()
    say(Console(file=told), f"new run in {name}")
    assert told.getvalue() == f"new run in {name}\n"


def test_the_page_shows_names_as_they_are(tmp_path):
    """They are not read as HTML."""
    results = {"<i>": "</table>"}
    config = Config(workdir=tmp_path / "a<b>&", init_from=Path("</pre>"))
    config.workdir.mkdir()
    settings = file.dump(as_groups(config))
    page = Page(config.workdir, "", {"Settings": settings, "State <s>": "<u>"})
    # In a damaged log there may be no perplexity beside the loss.
    records = [{"step": 1000, "held_out_loss": 2.0}, {"step": 1001}]
    page.write(records, results)
    text = page.path.read_text()
    assert "<td>1,000</td><td>2.0000</td><td>7.3891</td>" in text
    assert "1,001" not in text
    assert "<title>a&lt;b&gt;&amp;</title>" in text
    assert "<td>&lt;i&gt;</td><td>&lt;/table&gt;</td>" in text
    assert "init_from: &lt;/pre&gt;" in text
    assert "<h2>State &lt;s&gt;</h2><pre>&lt;u&gt;</pre>" in text
