"""What several commands do first: load a model, say what was assumed, put it on a device; start in several processes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from wordsight.train.distributed import World

QUICKSTART = "runs/quickstart"
DEVICES = ("auto", "cpu", "cuda", "mps")


def load_model(path_or_name: str, architecture: str | None, device: str, world: World | None = None) -> Any:
    """The model in evaluation mode on `device`; what `wordsight.load` assumed about it goes to stderr, once.

    Raises:
        FileNotFoundError: nothing there; the quickstart's folder gets a hint how to make it.
        ValueError: what `wordsight.load` raises, or no such device.
    """
    if path_or_name == QUICKSTART and not Path(path_or_name).exists():
        raise FileNotFoundError(
            f"no model in {QUICKSTART} yet: make it with `wordsight quickstart`, or name another with --model"
        )

    import wordsight
    from wordsight.train.distributed import World, pick_device

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        model = wordsight.load(path_or_name, model=architecture)
    world = world or World()
    for note in notes if world.is_main else ():
        click.echo(f"Note: {note.message}", err=True)
    return model.to(pick_device(device, world)).eval()


def processes_option(command: Any) -> Any:
    """`--processes N`, as `wordsight train` has it."""
    return click.option(
        "--processes",
        default=1,
        show_default=True,
        metavar="N",
        type=click.IntRange(1),
        help="Processes on this machine (or use torchrun).",
    )(command)


def in_processes(number: int) -> int | None:
    """Where --processes asks for it, run the command at hand in `number` processes: its exit code; else None.

    Under torchrun, or in a process that was started so, there are processes already.
    """
    if number == 1 or "WORLD_SIZE" in os.environ:
        return None
    from wordsight.train.distributed import launch

    return launch([sys.executable, "-m", "wordsight", *_words(click.get_current_context())], number)


def _words(context: click.Context) -> list[str]:
    """The command line that gives the command these very parameters, without --processes."""
    words, arguments = [], []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value is None or parameter.name == "processes":
            continue
        if isinstance(parameter, click.Option):
            if parameter.is_flag:
                words += [parameter.opts[0]] if value else []
            else:
                words += [word for one in (value if parameter.multiple else (value,)) for word in (parameter.opts[0], str(one))]
        else:
            arguments += list(map(str, value)) if parameter.nargs != 1 else [str(value)]
    return [str(context.info_name), *words, "--", *arguments]


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes of this command, connected, each with its share of the cores; one process where nobody started several.

    Results must not depend on how many there are. Matrix products on the CPU round differently with another number of threads,
    unless MKL is asked for the same order of summation always, before it is first used.
    """
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
    from wordsight.train.distributed import World, join, pick_device, share_cores

    world = World.from_environment()
    share_cores(world)
    with join(world, pick_device(device, world)):
        yield world
