"""The `packedcomm` command: parses the subcommand, runs it, turns errors into exit statuses."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from packedcomm.errors import PackedCommError

__all__ = ["main"]

# Each module has `add_arguments(parser)` and `run(arguments) -> exit status`. Only the one that was
# asked for is imported, so that `packedcomm --help` needs neither torch nor rich.
COMMANDS = {
    "plan": "print the chunks, bytes and peak memory of a transfer; needs no GPU",
    "doctor": "show versions, libraries, devices and links, and what is wrong with them",
    "demo": "train a real model and sync it to other processes, verified bit by bit",
}

WRONG_INPUT = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of the process when None.

    Returns:
        The exit status: 0 for success, 1 for a demo or a diagnosis that failed, 2 for wrong input.

    Raises:
        SystemExit: argparse printed help (status 0) or refused the arguments (status 2).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="packedcomm", description="Moves named tensors between processes."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    module = None
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary}.")
        if name == wanted:
            module = importlib.import_module(f"packedcomm.cli.{name}")
            module.add_arguments(subparser)
    arguments = parser.parse_args(argv)
    assert module is not None  # argparse has refused anything else
    try:
        status: int = module.run(arguments)
        sys.stdout.flush()
    except PackedCommError as error:
        sys.stderr.write(f"packedcomm {arguments.command}: {error}\n")
        return WRONG_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"packedcomm {arguments.command}: interrupted\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. Python flushes stdout once more at exit, which
        # must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
