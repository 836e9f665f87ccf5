"""Command line: parse, train, print the outcome."""

import argparse
import sys

import tyro
from rich.console import Console

from examples.llama import hosts
from examples.llama.config import PRESETS, Config
from examples.llama.stop import Stopped
from examples.llama.train import Result, train


def main() -> int:
    config = parse(sys.argv[1:])
    if config.distributed is not None:
        hosts.join(config.distributed)
    console = Console()
    try:
        result = train(config, console)
    except ValueError as error:  # bad settings or data: the message is enough
        console.stderr = True
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except OSError as error:  # a full disk, above all
        console.stderr = True
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        console.print("What was saved is kept. Run the same command again to go on.")
        return 74  # EX_IOERR of sysexits.h
    except Stopped as stopped:
        console.quiet = not hosts.is_first()
        console.print(f"{stopped} Run the same command again to go on.")
        return 143  # 128 + SIGTERM, as a shell reports it
    except KeyboardInterrupt:
        console.print("Interrupted. Run the same command again to go on.")
        return 130
    console.quiet = not hosts.is_first()
    console.print(summary(result), markup=False, highlight=False, soft_wrap=True)
    return 0


def parse(arguments: list[str]) -> Config:
    """The settings; ``--preset`` is read first, and gives the others their defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="demo")
    chosen, others = parser.parse_known_args(arguments)
    return tyro.cli(
        Config,
        args=others,
        default=Config(PRESETS[chosen.preset]),
        prog="python -m examples.llama",
        description="Pretrain a Llama on text. Run the same command again to go on "
        "with an interrupted run. The defaults of the model are those of --preset "
        f"{{{','.join(PRESETS)}}}.",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def summary(result: Result) -> str:
    return (
        f"held-out loss    {result.held_out_loss:.4f} nats per token\n"
        f"perplexity       {result.held_out_perplexity:.3f}\n"
        f"optimizer state  {result.state_bytes:,} bytes, "
        f"{result.state_ratio:.2f} of AdamW's\n"
        f"loss curve       {result.plot}\n"
        f"checkpoint       {result.checkpoint}"
    )


if __name__ == "__main__":
    sys.exit(main())
