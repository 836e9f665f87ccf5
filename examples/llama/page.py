"""Writes one page about a run."""

import base64
import dataclasses
import html
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from examples.llama import files, hosts
from examples.llama.metrics import Record, perplexity, plot_losses

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


@dataclasses.dataclass(frozen=True)
class Page:
    """The page about the run in ``workdir``, with its loss curve."""

    workdir: Path
    title: str  # Of the curve.
    sections: Mapping[str, str]
    """What does not change while the run goes on, by headings."""

    @property
    def path(self) -> Path:
        return self.workdir / "report.html"

    @property
    def plot(self) -> Path:
        return self.workdir / "loss.png"

    def write(self, records: Sequence[Record], results: Mapping[str, str]) -> None:
        """Writes both files, on the first process.

        Args:
          records: The run's log.
          results: What the run has to say so far, by name.
        """
        if hosts.is_first():
            plot_losses(records, self.title, self.plot)
            files.write(self.path, self._content(records, results))

    def _content(self, records: Sequence[Record], results: Mapping[str, str]) -> str:
        picture = base64.b64encode(self.plot.read_bytes()).decode()
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
        title = html.escape(self.workdir.resolve().name)
        return "\n".join(
            [
                "<!doctype html><meta charset=utf-8>",
                f"<title>{title}</title><style>{_STYLE}</style>",
                f"<h1>{title}</h1>",
                _table(results.items()),
                f'<img alt="losses" src="data:image/png;base64,{picture}">',
                "<h2>Evaluations</h2>",
                _table([[name.replace("_", " ") for name in columns], *evaluations]),
                *(
                    f"<h2>{html.escape(name)}</h2><pre>{html.escape(text)}</pre>"
                    for name, text in self.sections.items()
                ),
                f"<h2>Versions</h2>{_table((machine | versions).items())}\n",
            ]
        )


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
