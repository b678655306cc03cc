"""`python -m lorakit` and the `lorakit` command: a process around the command line, and how it ends."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import click

from lorakit.cli.group import cli
from lorakit.cli.options import is_main_process
from lorakit.errors import ConfigError, Interrupted, LorakitError, is_out_of_memory
from lorakit.utils.wording import printable, with_short_paths


def main() -> None:
    """Run the command line; ends the process with the exit status of the contract."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("lorakit").setLevel(logging.INFO)
    # It warns of an optional kernel that lorakit never calls.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A schedule says so after a first step that was skipped, as with fp16 it often is.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    # Both end the command, also where a shell that started it in the background has one ignored; while steps are
    # taken, the run listens itself.
    _on_signals(signal.default_int_handler)
    # As Python takes itself apart, its handlers are gone before the process is: a signal would become its exit status.
    atexit.register(_on_signals, signal.SIG_IGN)
    session: dict[str, bool] = {}
    try:
        status = cli.main(standalone_mode=False, obj=session, color=_wants_color())
    except (Exception, KeyboardInterrupt) as error:
        _on_signals(signal.SIG_IGN)
        status = _told(error, debug=session.get("debug", False))
    # Threads that still wait for a disk or the network keep `sys.exit` from ending the process; one more signal does.
    _on_signals(lambda *_: os._exit(status))
    sys.exit(status)


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _told(error: BaseException, debug: bool) -> int:
    """Tell the user of an error, and return the exit status; Ctrl-C and its like end the process here, at once."""
    if isinstance(error, click.ClickException):
        _tell_of_wrong_use(error)
        return ConfigError.exit_status
    # click turns Ctrl-C into Abort.
    interrupt = error.__cause__ if isinstance(error.__cause__, KeyboardInterrupt) else KeyboardInterrupt()
    shown = interrupt if isinstance(error, click.Abort) else error
    if debug:
        traceback.print_exception(error)
    if is_main_process() or not isinstance(shown, Interrupted):
        is_error = not isinstance(shown, KeyboardInterrupt | Interrupted)
        click.secho(_message(shown), fg="red" if is_error else None, err=True, color=_wants_color())
    if isinstance(shown, KeyboardInterrupt):
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(Interrupted.exit_status)
    return getattr(shown, "exit_status", 1)


def _tell_of_wrong_use(error: click.ClickException) -> None:
    """What is wrong with a command line, and where to read more; the help if no command was given."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    click.secho(f"error: {error.format_message()}", fg="red", err=True, color=_wants_color())
    context = getattr(error, "ctx", None)
    if context:
        click.echo(f"Try '{context.command_path} --help' for help.", err=True)


def _wants_color() -> bool | None:
    """Whether messages have colours, as https://no-color.org and its counterpart say; None for terminals only."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return False if os.environ.get("TERM") == "dumb" else None


def _message(error: BaseException) -> str:
    """The message of an error for the user."""
    text = _said(error)
    return printable(with_short_paths(text), keep="\n") if isinstance(error, LorakitError) else text


def _said(error: BaseException) -> str:
    """What an error says, and what to do."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "Stopped."
    if isinstance(error, Interrupted):
        resume = "--resume" if error.is_found else f"--resume {error.state}"
        return f"{error}; run the same command with {resume} to go on."
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        listed = "".join(f"\n  {problem}" for problem in error.problems)
        return f"error: {f'{error.file} has ' if error.file else ''}{len(error.problems)} problems:{listed}"
    if isinstance(error, LorakitError):
        return f"error: {error}"
    if is_out_of_memory(error):
        hint = "lower batch_size or resolution, or set training.gradient_checkpointing = true"
        return f"error: out of memory ({hint})"
    return f"internal error: {type(error).__name__}: {error}; run again with --debug to see where it came from"


if __name__ == "__main__":
    main()
