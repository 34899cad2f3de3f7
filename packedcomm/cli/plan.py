"""`packedcomm plan`: the chunks, bytes and peak extra memory of a broadcast, without any tensor."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from packedcomm.cli.sizes import format_size, parse_size
from packedcomm.errors import ArgumentError
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import Chunk, WireFormat, chunk_rule, slot_bytes
from packedcomm.planning.model_shapes import MODEL_SHAPES, model_shape
from packedcomm.settings import Settings

__all__ = ["Plan", "add_arguments", "make_plan", "run"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a broadcast of a manifest will do. Sizes are in bytes."""

    manifest: Manifest
    wire_format: WireFormat
    buffer_size_bytes: int
    num_buffers: int
    chunks: tuple[Chunk, ...]

    @property
    def wire_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    @property
    def padding_bytes(self) -> int:
        """Bytes on the wire that belong to no tensor."""
        return self.wire_bytes - self.manifest.nbytes

    @property
    def slots(self) -> dict[str, list[int]]:
        """Size of each slot, by who has it.

        A packed chunk of one tensor has the bytes of the tensor, so it needs no slot where it is
        sent from, or received in, the (contiguous) tensor itself.
        """
        several = [chunk for chunk in self.chunks if len(chunk.indices) > 1]
        in_place = slot_bytes(several, self.num_buffers)
        return {
            "sender": in_place,
            "receiver_in_place": in_place,
            "receiver_callback": slot_bytes(self.chunks, self.num_buffers),
        }

    @property
    def peak_extra_bytes(self) -> dict[str, int]:
        """Least peak of memory beyond the tensors themselves.

        Direct chunks leave from the tensors and arrive in place where there is a place. For a
        callback each of their tensors needs a buffer, which is given back when the callback is done
        with it. What the callback keeps isn't counted, nor is the allocator's rounding.
        """
        direct = max((chunk.nbytes for chunk in self.chunks if chunk.direct), default=0)
        peak = {who: sum(slots) for who, slots in self.slots.items()}
        return peak | {"receiver_callback": peak["receiver_callback"] + direct}

    def as_dict(self) -> dict[str, Any]:
        """Everything that is printed, with one entry per chunk."""
        names = [spec.name for spec in self.manifest.specs]
        return {
            "format": self.wire_format,
            "buffer_size_bytes": self.buffer_size_bytes,
            "num_buffers": self.num_buffers,
            "manifest_digest": self.manifest.digest,
            "tensors": len(self.manifest),
            "bytes": self.manifest.nbytes,
            "wire_bytes": self.wire_bytes,
            "padding_bytes": self.padding_bytes,
            "slot_bytes": self.slots,
            "peak_extra_bytes": self.peak_extra_bytes,
            "chunks": [
                {
                    "number": number,
                    "kind": "direct" if chunk.direct else "packed",
                    "tensors": len(chunk.indices),
                    "bytes": chunk.nbytes,
                    "first": names[chunk.indices[0]],
                    "last": names[chunk.indices[-1]],
                }
                for number, chunk in enumerate(self.chunks, start=1)
            ],
        }


def make_plan(
    manifest: Manifest, wire_format: WireFormat, buffer_size_bytes: int, num_buffers: int
) -> Plan:
    """Cut a manifest into the chunks that `broadcast_producer` would send.

    Raises:
        ArgumentError: the format is unknown, or a size or count is out of range.
    """
    if num_buffers < 1:
        raise ArgumentError(f"num_buffers must be >= 1, got {num_buffers}")
    cut = chunk_rule(wire_format, buffer_size_bytes)
    chunks = tuple(cut(spec.nbytes for spec in manifest.specs))
    return Plan(manifest, wire_format, buffer_size_bytes, num_buffers, chunks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `packedcomm plan`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", metavar="PATH", help="a safetensors file or folder")
    what.add_argument("--model", metavar="NAME", help="a model shape, see --list-models")
    what.add_argument("--list-models", action="store_true", help="list the model shapes")
    parser.add_argument("--format", choices=("vllm", "native"), default="vllm", help="wire format")
    parser.add_argument("--buffer-size", metavar="SIZE", help="bytes, or 64MiB, 1GiB (the default)")
    parser.add_argument("--num-buffers", metavar="N", type=int, help="slots, 2 by default")
    parser.add_argument(
        "--chunks", metavar="N", type=int, default=20, help="rows shown at most, 20 by default"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with every chunk")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns 0.

    Raises:
        ArgumentError: an option is out of range.
        CheckpointError, ManifestError: the checkpoint can't be read.
    """
    if arguments.list_models:
        return _list_models(arguments.json)
    if arguments.chunks < 0:
        raise ArgumentError(f"--chunks must be >= 0, got {arguments.chunks}")
    settings = Settings.from_environment()
    buffer_size = settings.buffer_size_bytes
    if arguments.buffer_size is not None:
        buffer_size = parse_size(arguments.buffer_size)
    num_buffers = settings.num_buffers if arguments.num_buffers is None else arguments.num_buffers
    if arguments.model is not None:
        source, manifest = arguments.model, model_shape(arguments.model)
    else:
        from packedcomm.sources.checkpoint import Checkpoint

        source, manifest = arguments.checkpoint, Checkpoint.open(arguments.checkpoint).manifest
    plan = make_plan(manifest, arguments.format, buffer_size, num_buffers)
    if arguments.json:
        sys.stdout.write(json.dumps({"source": source, **plan.as_dict()}, indent=2) + "\n")
    else:
        _print_plan(source, plan, arguments.chunks)
    return 0


def _list_models(as_json: bool) -> int:
    rows = [(name, make()) for name, make in MODEL_SHAPES.items()]
    if as_json:
        listed = {name: {"tensors": len(m), "bytes": m.nbytes} for name, m in rows}
        sys.stdout.write(json.dumps(listed, indent=2) + "\n")
        return 0
    for name, manifest in rows:
        size = format_size(manifest.nbytes)
        sys.stdout.write(f"{name:24}{len(manifest):>8,} tensors {size:>12}\n")
    return 0


def _print_plan(source: str, plan: Plan, rows: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{source}: {len(plan.manifest):,} tensors, {format_size(plan.manifest.nbytes)}, "
        f"{plan.wire_format} format, buffers of {format_size(plan.buffer_size_bytes)} x "
        f"{plan.num_buffers}",
        markup=False,
    )
    table = Table("chunk", "kind", "tensors", "bytes", "first .. last")
    for column in (0, 2, 3):
        table.columns[column].justify = "right"
    table.columns[4].overflow = "fold"  # a shortened name can't be looked up
    for chunk in plan.as_dict()["chunks"][:rows]:
        table.add_row(
            f"{chunk['number']:,}",
            chunk["kind"],
            f"{chunk['tensors']:,}",
            f"{chunk['bytes']:,}",
            f"{chunk['first']} .. {chunk['last']}" if chunk["tensors"] > 1 else chunk["first"],
        )
    if rows:
        Console(highlight=False, markup=False).print(table)
    if len(plan.chunks) > rows:
        console.print(f"... and {len(plan.chunks) - rows:,} more chunks (--chunks shows more)")
    direct = [chunk for chunk in plan.chunks if chunk.direct]
    share = plan.padding_bytes / plan.wire_bytes if plan.wire_bytes else 0.0
    memory = {name: format_size(size) for name, size in plan.peak_extra_bytes.items()}
    console.print(
        f"chunks               {len(plan.chunks):,}: {len(plan.chunks) - len(direct):,} packed, "
        f"{len(direct):,} direct\n"
        f"on the wire          {plan.wire_bytes:,} bytes, of these padding {plan.padding_bytes:,} "
        f"({share:.4%})\n"
        f"peak extra memory\n"
        f"  sender             {memory['sender']}\n"
        f"  receiver, in place {memory['receiver_in_place']}\n"
        f"  receiver, callback {memory['receiver_callback']} and whatever the callback keeps",
        markup=False,
    )
