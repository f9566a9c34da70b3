"""The command line. Verbs import what they need when they are called, so that help answers at once."""

from __future__ import annotations

import errno
import io
import json
import sys
import traceback
from typing import NoReturn

import typer

from tunesmith.cli import data, runs, service, serving
from tunesmith.cli.options import main_rank
from tunesmith.cli.verbs import app
from tunesmith.errors import TunesmithError, first_line

app.add_typer(runs.app, name="runs")
app.add_typer(data.app, name="data")
for verb in (serving.serve, serving.promote, serving.rollback):
    app.command()(verb)
app.command("up")(service.up)
app.add_typer(service.keys_app, name="keys")
app.command("audit")(service.audit)


def main() -> None:
    """Run the command line; an error of ours is a sentence and an exit code, never a traceback."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a row's text must not fail on a narrow terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, prog_name="tunesmith", standalone_mode=False)
    except TunesmithError as error:
        _fail(error, "--json" in arguments, debug)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        told = TunesmithError(
            f"{error.strerror or error}",
            where=str(error.filename or ("disk" if full else "system")),
            fix="Free some room, or choose another place with --runs or --out; the same command does what is left."
            if full
            else "Check that path, and who may read and write there; --debug shows where."
            if error.filename
            else "--debug shows where.",
        )
        _fail(told, "--json" in arguments, debug)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the command line itself was wrong
            error.show()
            sys.exit(error.exit_code)
        what = f"something went wrong that should not have ({type(error).__name__}: {first_line(error)})"
        fault = TunesmithError(what, fix="--debug shows where. Please report it.")
        fault.exit_code = 1
        _fail(fault, "--json" in arguments, debug)
    if code == 130 and main_rank():
        print("Stopped. The same command does what is left.", file=sys.stderr)
    sys.exit(code or 0)


def _fail(error: TunesmithError, as_json: bool, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    from tunesmith.train.launch import hand_up

    if hand_up(error):
        sys.exit(error.exit_code)
    if as_json:
        print(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
    else:
        from tunesmith.progress import console

        console().print("[bold red]Error[/bold red]", end=" ")
        console().print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)
