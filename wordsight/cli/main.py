"""The command line: `wordsight COMMAND`. Each command lives in its own file, which is imported only when it is called."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import click

# command -> one line for `wordsight --help`; wordsight/cli/<command>.py ("-" is "_") has its click command, named `command`.
COMMANDS = {
    "quickstart": "Train a small CLIP on embedded pictures, judge it, use it.",
    "train": "Train a model by a recipe, into a run folder.",
    "evaluate": "Measure models: zero-shot classification, retrieval, suites.",
    "compare": "Compare measured models by paired tests, in a page and tables.",
    "classify": "Name pictures from your own list of labels.",
    "adapt": "Learn a classifier from a few labelled pictures.",
    "long-tail": "Compare methods for classes of unequal size.",
    "predict": "Name pictures with a classifier of `wordsight adapt`.",
    "export": "Write such a classifier as plain arrays or ONNX.",
    "embed": "Turn pictures or texts into vectors (npy or Parquet).",
    "convert": "Write a checkpoint in another library's format.",
    "models": "List the catalogue, with sizes.",
    "cache": "Look at kept features: list, verify, prune.",
    "data": "Look at a data set, check it, make shards or skewed splits.",
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that `wordsight --help` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"wordsight.cli.{cmd_name.replace('-', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wordsight")
def cli() -> None:
    """Wordsight: train, judge and use vision-language models.

    Begin with `wordsight quickstart`; `wordsight COMMAND --help` teaches each command.
    """


def keep_freed_memory() -> None:
    """Have glibc keep blocks of up to 1 GB that were freed, for the next layer, unless the user has set it up otherwise.

    By default it gives blocks over 32 MB back at once, and the system clears every page of the next one: up to half of the time
    of a convolutional tower (docs/LOG.md).
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and others have none
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    """Run the command line; exit code 0 done, 1 failed, 2 wrong usage."""
    keep_freed_memory()
    try:
        code = cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        code = 130
    except (ValueError, OSError) as error:  # what a user can mend; anything else keeps its traceback
        if not getattr(error, "said", False):  # another process of the run, or a thread of this one, has
            click.echo(f"Error: {error}", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
