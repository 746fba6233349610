"""What all commands share: what they print, how they fail, and how they are interrupted."""

import json
import math
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table as Grid
from typer.core import TyperGroup

from rootflow.errors import RootflowError
from rootflow.store import plain

__all__ = [
    "Commands", "Interrupted", "WrongUse", "machine", "nats", "plain", "print_grid", "print_json",
    "say", "set_threads",
]  # fmt: skip

Wide = {"help_option_names": ["-h", "--help"]}
PIPE_CLOSED = 128 + 13  # what a shell reports for a program that SIGPIPE ended


class WrongUse(Exception):
    """The command was called wrongly; its message is printed and the exit code is 2."""


class Interrupted(Exception):
    """A signal ended the work, and what there is of it is saved; the message says how to go on."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(content: Mapping[str, Any]) -> None:
    """The one object that a command prints under ``--json``."""
    print(json.dumps({"schema_version": 1, **plain(content)}, allow_nan=False, ensure_ascii=False))


def print_grid(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
    """A table on stdout, its first column flush left; lines are folded on a terminal only."""
    grid = Grid(box=box.SIMPLE_HEAD if head else None, show_header=bool(head), pad_edge=False)
    for k, name in enumerate(head or rows[0]):
        grid.add_column(name, justify="right" if head and k else "left", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    width = None if sys.stdout.isatty() else 10_000
    console = Console(width=width, highlight=False, markup=False)
    with console.capture() as text:  # rich would end the program when the reader closes the pipe
        console.print(grid)
    print("\n".join(line.rstrip() for line in text.get().rstrip().splitlines()))


def nats(mean: float | None, error: float | None) -> str:
    """Mean ± standard error to two digits of the error; a dash for what is unknown."""
    if mean is None or error is None:
        return "–"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6) if error > 0 else 4
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def set_threads(threads: int | None) -> None:
    """Let torch use that many threads; None leaves its own choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def machine(name: str, threads: int | None) -> torch.device:
    """The device of that name, after trying it out; ``set_threads`` too. Raises WrongUse."""
    set_threads(threads)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        known = "cpu or cuda" if torch.cuda.is_available() else "cpu; no CUDA device is usable here"
        raise WrongUse(f"--device {name}: cannot be used; choose {known}") from None
    return device


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")


class Commands(TyperGroup):
    """The group of all commands: every failure ends in one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for category in (UserWarning, RuntimeWarning):
                    warnings.simplefilter("always", category)
                warnings.showwarning = _show_warning
                value = super().invoke(ctx)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except Interrupted as stop:
            say(str(stop))
            raise typer.Exit(128 + stop.signal) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(128 + signal.SIGINT) from None
        except BrokenPipeError:
            _drop_stdout()
            raise typer.Exit(PIPE_CLOSED) from None
        except Exception as error:
            _fail(error, debug=ctx.meta.get("debug", False))
        return value


def _fail(error: Exception, debug: bool) -> NoReturn:
    """Print what went wrong in one line, the traceback only if wanted, and leave."""
    code, text = 1, str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'output'}: {error.strerror or error}"
    elif isinstance(error, WrongUse):
        code = 2
    elif isinstance(error, typer.BadParameter.__bases__):  # typer's own: unknown option and so on
        code, text = 2, cast(Any, error).format_message()
    elif not isinstance(error, RootflowError):
        text = f"unexpected {type(error).__name__}: {text}; --debug shows where"
    if debug:
        traceback.print_exception(error)
    if text:  # help, where no command was given, has none
        say("error: " + " ".join(text.split()))
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    raise typer.Exit(code)


def _drop_stdout() -> None:
    """Send what is still to be printed nowhere, so that Python's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
