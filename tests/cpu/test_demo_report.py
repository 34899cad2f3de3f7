"""The demo's comparison and table: every difference that it exists to find is found."""

from dataclasses import replace
from io import StringIO
from multiprocessing import Pipe

import pytest
import torch
from rich.console import Console

from packedcomm.cli.demo_messages import Failed, Link, Listening, Moved, Output, Snapshot
from packedcomm.cli.demo_report import DemoReport, compare, compare_start, compare_versions
from packedcomm.cli.demo_worker import tensor_digest
from packedcomm.manifest import Manifest

OUTPUT = Output("torch.float32", [1, 2], "0000803f00000040", finite=True)
TRAINER = Snapshot(
    rank=0,
    version=1,
    digests={"a": "11", "b": "22"},
    output=OUTPUT,
    seconds={"pack": 0.1, "wire": 0.2, "total": 0.4},
)
RECEIVER = replace(TRAINER, rank=1, seconds={"wire": 0.2, "unpack": 0.3, "total": 0.5})
BEFORE = replace(
    RECEIVER, version=0, digests={"a": "33", "b": "44"}, output=replace(OUTPUT, data="ff" * 8)
)


def new_report() -> DemoReport:
    report = DemoReport("model", "Gloo between CPUs", "native", receivers=1)
    report.manifest = Manifest.from_tensors({"a": torch.zeros(500, 1000), "b": torch.zeros(0)})
    return report


def test_equal_snapshots() -> None:
    assert compare(TRAINER, RECEIVER) == []


def test_one_tensor_differs() -> None:
    receiver = replace(RECEIVER, digests={"a": "11", "b": "23"})
    assert compare(TRAINER, receiver) == ["version 1, receiver 1: 1 tensors differ: b"]


def test_many_tensors_differ() -> None:
    trainer = replace(TRAINER, digests={f"t{i}": "1" for i in range(9)})
    receiver = replace(RECEIVER, digests={f"t{i}": "2" for i in range(9)})
    assert compare(trainer, receiver) == [
        "version 1, receiver 1: 9 tensors differ: t0, t1, t2, t3, t4 and 4 more"
    ]


def test_a_tensor_is_missing() -> None:
    receiver = replace(RECEIVER, digests={"a": "11"})
    assert compare(TRAINER, receiver) == ["version 1, receiver 1: only one side has b"]


def test_a_tensor_is_too_many() -> None:
    receiver = replace(RECEIVER, digests=TRAINER.digests | {"c": "1"})
    assert compare(TRAINER, receiver) == ["version 1, receiver 1: only one side has c"]


@pytest.mark.parametrize(
    "output",
    [
        None,
        replace(OUTPUT, data="0000803f00000041"),
        replace(OUTPUT, shape=[2, 1]),
        replace(OUTPUT, dtype="torch.int32"),
    ],
)
def test_outputs_differ(output: Output | None) -> None:
    receiver = replace(RECEIVER, output=output)
    assert compare(TRAINER, receiver) == ["version 1, receiver 1: the outputs differ"]


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    nan = replace(OUTPUT, finite=False)
    problems = compare(replace(TRAINER, output=nan), replace(RECEIVER, output=nan))
    assert problems == [
        "version 1, receiver 1: the outputs are not finite, so that their equality says nothing"
    ]


def test_another_version() -> None:
    receiver = replace(RECEIVER, version=2)
    assert compare(TRAINER, receiver) == ["version 1, receiver 1: it holds version 2"]


def test_a_start_that_could_fail() -> None:
    assert compare_start(TRAINER, BEFORE) == []


def test_a_start_with_the_trainers_weights() -> None:
    before = replace(BEFORE, digests=TRAINER.digests)
    assert compare_start(TRAINER, before) == [
        "receiver 1 held the trainer's weights before they were sent"
    ]


def test_a_start_with_the_trainers_outputs() -> None:
    before = replace(BEFORE, output=OUTPUT)
    assert compare_start(TRAINER, before) == [
        "receiver 1 gave the trainer's outputs before the weights were sent"
    ]


def test_a_step_that_changed_nothing() -> None:
    assert compare_versions(TRAINER, replace(TRAINER, version=2)) == [
        "version 2: the training step changed no tensor"
    ]
    assert compare_versions(TRAINER, replace(TRAINER, digests={"a": "11", "b": "5"})) == []


def test_rows_take_the_slowest_process() -> None:
    report = new_report()

    row = report.add_version({0: TRAINER, 1: RECEIVER}, {1: BEFORE})

    assert row["seconds"] == {"pack": 0.1, "wire": 0.2, "unpack": 0.3, "total": 0.5}
    assert (row["step"], row["version"], row["tensors"], row["bytes"]) == (0, 1, 2, 2_000_000)
    assert row["gb_per_s"] == pytest.approx(0.004)
    assert row["verified"] is True
    assert report.as_dict()["verified"] is True


def test_one_bad_version_fails_the_whole_report() -> None:
    report = new_report()
    report.add_version({0: TRAINER, 1: RECEIVER}, {1: BEFORE})
    trainer = replace(TRAINER, version=2, digests={"a": "5", "b": "22"})
    late = replace(RECEIVER, version=2)

    row = report.add_version({0: trainer, 1: late}, {0: TRAINER, 1: RECEIVER})

    assert (row["verified"], row["changed_tensors"]) == (False, 1)
    assert report.problems == ["version 2, receiver 1: 1 tensors differ: a"]
    assert report.as_dict()["verified"] is False


def test_a_useless_step_or_start_fails_the_report() -> None:
    report = new_report()
    report.add_version({0: TRAINER, 1: RECEIVER}, {1: replace(BEFORE, digests=TRAINER.digests)})
    same = {0: replace(TRAINER, version=2), 1: replace(RECEIVER, version=2)}
    report.add_version(same, {0: TRAINER, 1: RECEIVER})

    assert [row["verified"] for row in report.rows] == [False, False]
    assert report.problems == [
        "receiver 1 held the trainer's weights before they were sent",
        "version 2: the training step changed no tensor",
    ]


def test_no_rows_verify_nothing() -> None:
    assert new_report().as_dict()["verified"] is False


def test_table_shows_numbers_and_verdict() -> None:
    report = new_report()
    report.add_version({0: TRAINER, 1: RECEIVER}, {1: BEFORE})
    report.add_version({0: TRAINER, 1: replace(RECEIVER, digests={})}, {0: TRAINER})

    text = StringIO()
    Console(file=text, width=80).print(report.table())

    lines = [line for line in text.getvalue().splitlines() if "1.91 MiB" in line]
    # step, version, tensors, bytes, pack, wire, unpack, total, GB/s, verified
    expected = "0 1 2 1.91 MiB 0.1000 0.2000 0.3000 0.5000 0.00 yes"
    assert lines[0].split() == expected.split()
    assert lines[1].split()[-1] == "NO"


def test_digests_are_of_bytes() -> None:
    nan = torch.tensor([0x7FC1, 0x7FC0], dtype=torch.int16).view(torch.bfloat16)
    assert tensor_digest(nan[:1]) != tensor_digest(nan[1:])
    assert tensor_digest(torch.tensor(0.0)) != tensor_digest(torch.tensor(-0.0))
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensor_digest(matrix.t()) == tensor_digest(matrix.t().contiguous())
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tensor_digest(torch.zeros(0, 3)) == empty


@pytest.mark.parametrize(
    "message",
    [
        Listening(0, "127.0.0.1:1", "{}", ["a note"]),
        Moved(1, 7),
        TRAINER,
        replace(RECEIVER, output=None),
        Failed(2, "broken", "Traceback", wrong_input=False),
    ],
)
def test_messages_arrive_as_they_were_sent(message: object) -> None:
    ours, theirs = Pipe()
    Link(theirs).send(message)  # type: ignore[arg-type]
    assert Link(ours).receive() == message
    theirs.close()
    with pytest.raises(EOFError):
        Link(ours).receive()
    ours.close()
