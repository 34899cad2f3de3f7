"""`packedcomm plan`: its numbers against independently computed ones, its speed and its errors."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from packedcomm.cli.main import main
from packedcomm.cli.plan import make_plan
from packedcomm.cli.sizes import format_size
from packedcomm.planning.chunks import WireFormat
from packedcomm.planning.model_shapes import model_shape
from packedcomm.targets import TensorTarget
from packedcomm.transports.broadcast import broadcast_consumer, broadcast_producer

MiB = 1 << 20


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("packedcomm plan: ")
    assert captured.err.count("\n") == 1
    return captured.err


def reference_vllm_cuts(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """(tensors, bytes) of each chunk by WIRE.md's sentence: add, then cut when above the limit."""
    cuts = []
    count = total = 0
    for size in sizes:
        count, total = count + 1, total + size
        if total > limit:
            cuts.append((count, total))
            count = total = 0
    return [*cuts, (count, total)] if count else cuts


def test_vllm_chunks_of_a_real_shape(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [spec.nbytes for spec in model_shape("llama-3-8b").specs]
    expected = reference_vllm_cuts(sizes, 256 * MiB)

    plan = plan_json(capsys, "--model", "llama-3-8b", "--buffer-size", "256MiB")

    assert [(c["tensors"], c["bytes"]) for c in plan["chunks"]] == expected
    assert [c["number"] for c in plan["chunks"]] == list(range(1, len(expected) + 1))
    assert {c["kind"] for c in plan["chunks"]} == {"packed"}
    assert plan["tensors"] == 291
    assert plan["bytes"] == plan["wire_bytes"] == 2 * 8_030_261_248  # published parameter count
    assert plan["padding_bytes"] == 0
    # A chunk of one tensor, as the embedding's, goes out from the tensor itself and arrives in
    # place; for a callback a slot holds it all the same.
    several = [nbytes for tensors, nbytes in expected if tensors > 1]
    in_place = [max(several[0::2]), max(several[1::2])]
    callback = [max(nbytes for _, nbytes in expected[parity::2]) for parity in (0, 1)]
    assert plan["slot_bytes"] == {
        "sender": in_place,
        "receiver_in_place": in_place,
        "receiver_callback": callback,
    }
    assert plan["peak_extra_bytes"] == {
        "sender": sum(in_place),
        "receiver_in_place": sum(in_place),
        "receiver_callback": sum(callback),
    }


def test_chunks_name_their_first_and_last_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    names = [spec.name for spec in model_shape("qwen3-0.6b").specs]

    chunks = plan_json(capsys, "--model", "qwen3-0.6b", "--buffer-size", "64MiB")["chunks"]

    assert chunks[0]["first"] == names[0]
    assert chunks[-1]["last"] == names[-1]
    for before, after in pairwise(chunks):
        assert names.index(after["first"]) == names.index(before["last"]) + 1


def test_native_padding_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sizes 3, 5 and 2 MiB small: offsets 0, 16; the large one travels alone."""
    path = tmp_path / "x.safetensors"
    tensors = {
        "a": torch.zeros(3, dtype=torch.uint8),
        "b": torch.zeros(5, dtype=torch.uint8),
        "c": torch.zeros(2 * MiB, dtype=torch.uint8),
    }
    save_file(tensors, path)

    plan = plan_json(capsys, "--checkpoint", str(path), "--format", "native")

    assert plan["chunks"] == [
        {"number": 1, "kind": "direct", "tensors": 1, "bytes": 2 * MiB, "first": "c", "last": "c"},
        {"number": 2, "kind": "packed", "tensors": 2, "bytes": 21, "first": "a", "last": "b"},
    ]
    assert (plan["bytes"], plan["wire_bytes"], plan["padding_bytes"]) == (
        2 * MiB + 8,
        2 * MiB + 21,
        13,
    )
    assert plan["slot_bytes"]["sender"] == [21, 0]
    assert plan["peak_extra_bytes"] == {
        "sender": 21,
        "receiver_in_place": 21,
        "receiver_callback": 21 + 2 * MiB,
    }


def test_number_of_buffers_changes_memory_only(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", "minilm", "--buffer-size", "1MiB", "--num-buffers")

    one, three = (plan_json(capsys, *arguments, count) for count in ("1", "3"))

    assert one["chunks"] == three["chunks"]
    assert one["slot_bytes"]["receiver_callback"] == [max(c["bytes"] for c in one["chunks"])]
    assert three["slot_bytes"]["receiver_callback"] == [
        max(c["bytes"] for c in three["chunks"][slot::3]) for slot in range(3)
    ]


class WatchingGroup:
    """A group of one that remembers how many bytes were broadcast, and from which memory."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.memory: dict[int, int] = {}

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        self.nbytes += tensor.nbytes
        storage = tensor.untyped_storage()
        self.memory[storage.data_ptr()] = storage.nbytes()


@pytest.mark.parametrize("num_buffers", [1, 3])
@pytest.mark.parametrize("buffer_size", [1 * MiB, 5 * MiB, 64 * MiB])
@pytest.mark.parametrize("wire_format", ["vllm", "native"])
def test_plan_is_what_a_transfer_does(
    wire_format: WireFormat, buffer_size: int, num_buffers: int
) -> None:
    manifest = model_shape("minilm")
    tensors = {name: torch.empty(s, dtype=getattr(torch, d)) for name, (s, d) in manifest}
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    plan = make_plan(manifest, wire_format, buffer_size, num_buffers)
    geometry = (buffer_size, num_buffers)

    def produce(group: WatchingGroup) -> None:
        broadcast_producer(tensors.items(), group, 0, None, *geometry, wire_format=wire_format)

    def consume(group: WatchingGroup, receiver: Any) -> None:
        broadcast_consumer(manifest, group, 0, receiver, *geometry, "cpu", wire_format=wire_format)

    transfers: dict[str, Callable[[WatchingGroup], None]] = {
        "sender": produce,
        "receiver_in_place": partial(consume, receiver=TensorTarget(tensors)),
    }
    if wire_format == "vllm":  # the native format's direct chunks have buffers beside the slots
        transfers["receiver_callback"] = partial(consume, receiver=lambda items: None)
    for who, transfer in transfers.items():
        group = WatchingGroup()
        transfer(group)
        assert group.nbytes == plan.wire_bytes, who
        group.memory.clear()
        transfer(group)  # by now every slot has its final size
        slots = sorted(size for start, size in group.memory.items() if start not in own)
        # A slot is rounded up to 2 MiB; one that never held a chunk doesn't exist.
        planned = [-(-nbytes // (2 * MiB)) * (2 * MiB) for nbytes in plan.slots[who] if nbytes]
        assert slots == sorted(planned), who


def test_many_tensors_are_quick(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()

    plan = plan_json(capsys, "--model", "qwen3-30b-a3b", "--format", "native")

    assert plan["tensors"] == 18_867
    assert sum(c["tensors"] for c in plan["chunks"]) == 18_867
    assert time.monotonic() - start < 3


def test_table_shows_chunks_totals_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "minilm", "--buffer-size", "16MiB", "--chunks", "2"]) == 0

    out = capsys.readouterr().out
    plan = plan_json(capsys, "--model", "minilm", "--buffer-size", "16MiB")
    for chunk in plan["chunks"][:2]:
        assert f"{chunk['bytes']:,}" in out
    assert f"{plan['chunks'][2]['bytes']:,}" not in out
    assert f"... and {len(plan['chunks']) - 2} more chunks" in out
    assert f"{plan['wire_bytes']:,} bytes, of these padding 0" in out
    for case in ("sender", "receiver, in place", "receiver, callback"):
        assert f"{case}" in out
    for size in plan["peak_extra_bytes"].values():
        assert format_size(size) in out


def test_needs_neither_torch_nor_the_extension() -> None:
    """A shape is planned on machines where nothing is built, and at once."""
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['packedcomm._native'] = None\n"
        "from packedcomm.cli.main import main\n"
        "sys.exit(main(['plan', '--model', 'minilm']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")


def test_python_m_packedcomm_and_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "packedcomm", "--help"], capture_output=True, text=True
    )

    assert done.returncode == 0
    assert all(command in done.stdout for command in ("plan", "doctor", "demo"))


def test_reader_that_closes_early() -> None:
    """`packedcomm plan ... | head -1` ends quietly."""
    command = [sys.executable, "-m", "packedcomm", "plan", "--model", "qwen3-30b-a3b", "--json"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [*command, "--buffer-size", "1KiB"], stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)

    assert (done.returncode, done.stderr) == (1, b"")


def test_list_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list-models"]) == 0

    assert "qwen3-30b-a3b-experts     18,432 tensors    54.00 GiB" in capsys.readouterr().out
    assert plan_json(capsys, "--list-models")["llama-3-8b"] == {
        "tensors": 291,
        "bytes": 16_060_522_496,
    }


def test_defaults_come_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKEDCOMM_BUFFER_SIZE_BYTES", str(4 * MiB))
    monkeypatch.setenv("PACKEDCOMM_NUM_BUFFERS", "3")

    plan = plan_json(capsys, "--model", "minilm")

    assert (plan["buffer_size_bytes"], plan["num_buffers"]) == (4 * MiB, 3)


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown model shape 'gpt-5'; known: minilm" in error_of(capsys, "--model", "gpt-5")


def test_missing_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert "/nothing/here: no such file" in error_of(capsys, "--checkpoint", "/nothing/here")


def test_zero_buffers(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "--model", "minilm", "--num-buffers", "0")
    assert "num_buffers must be >= 1, got 0" in message


def test_negative_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--chunks must be >= 0" in error_of(capsys, "--model", "minilm", "--chunks", "-1")


@pytest.mark.parametrize("size", ["0", "0GiB", "-1", "12XB", "", "GiB", "1.0001B", "1e9"])
def test_bad_buffer_size(capsys: pytest.CaptureFixture[str], size: str) -> None:
    assert f"size {size!r}" in error_of(capsys, "--model", "minilm", f"--buffer-size={size}")


def test_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
