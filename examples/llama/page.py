"""One page about a run, for people."""

import base64
import html
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from examples.llama import files
from examples.llama.config import Config, as_groups, file
from examples.llama.metrics import Record, perplexity

_PACKAGES = (
    "lorapre-jax",
    "jax",
    "jaxlib",
    "optax",
    "flax",
    "orbax-checkpoint",
    "grain",
)
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "td,th{text-align:left;padding:.1rem 1.5rem .1rem 0}pre{overflow-x:auto}"
    "img{max-width:100%}"
)


def write_page(
    config: Config,
    results: Mapping[str, str],
    records: Sequence[Record],
    plot: Path,
    memory: str,
    page: Path,
) -> None:
    """The curve, results and evaluations, settings, state and versions in one file.

    Args:
      config: The run's settings.
      results: What it has to say, by name.
      records: Its log.
      plot: PNG of its losses, which becomes part of the page.
      memory: How the optimizer keeps each parameter.
      page: The file to write.
    """
    picture = base64.b64encode(plot.read_bytes()).decode()
    columns = ("step", "held_out_loss", "held_out_perplexity")
    evaluations = [
        [f"{record['step']:,.0f}", f"{loss:.4f}", f"{perplexity(loss):.4f}"]
        for record in records
        if (loss := record.get("held_out_loss")) is not None
    ]
    versions = {name: _version(name) for name in _PACKAGES}
    machine = {
        "Python": platform.python_version(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    title = html.escape(config.workdir.resolve().name)
    content = "\n".join(
        [
            "<!doctype html><meta charset=utf-8>",
            f"<title>{title}</title><style>{_STYLE}</style>",
            f"<h1>{title}</h1>",
            _table(results.items()),
            f'<img alt="losses" src="data:image/png;base64,{picture}">',
            "<h2>Evaluations</h2>",
            _table([[name.replace("_", " ") for name in columns], *evaluations]),
            f"<h2>Settings</h2><pre>{html.escape(file.dump(as_groups(config)))}</pre>",
            f"<h2>Optimizer state</h2><pre>{html.escape(memory)}</pre>",
            f"<h2>Versions</h2>{_table((machine | versions).items())}\n",
        ]
    )
    files.write(page, content)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _table(rows) -> str:
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
        for row in rows
    ]
    return "<table>" + "\n".join(lines) + "</table>"
