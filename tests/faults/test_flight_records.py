"""What is written down when a sync fails: by every survivor, readable, and never in heaps."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from packedcomm.errors import DeadlineExceeded, PeerLost
from tests.helpers.peers import PATIENT, Receiving, training


def record_of(notes) -> dict:
    (path,) = re.findall(r"flight record: (\S+)", " ".join(notes))
    found = json.loads(Path(path).read_text())
    assert Path(path).stat().st_mode & 0o077 == 0
    return found


@pytest.mark.fault(2, 20)
def test_after_a_kill_every_survivor_has_written_who_waited_for_whom(tmp_path):
    settings = replace(PATIENT, flight_record_dir=str(tmp_path))
    with training(3, Receiving(settings=settings), settings=settings) as group:
        victim = next(peer for peer in group.peers if peer.rank == 2)
        group.source.when(12, victim.kill)
        begin = time.time()
        with pytest.raises(PeerLost) as caught:
            group.sync(2.0)
        sender = record_of(caught.value.__notes__)
        assert (sender["role"], sender["rank"], sender["error"]["kind"]) == (
            "the sender",
            0,
            "PeerLost",
        )
        assert "receiver rank 2" in sender["error"]["text"]
        (waited_for,) = sender["waiting_for"]
        assert (waited_for["rank"], waited_for["pid"]) == (2, victim.pid)
        assert waited_for["lost"]
        assert {peer["rank"] for peer in sender["peers"]} == {1, 2, 3}
        for peer in group.peers:
            if peer is victim:
                continue
            outcome = peer.outcome()
            record = record_of(outcome.notes)
            assert (record["role"], record["rank"], record["pid"]) == (
                "the receiver",
                peer.rank,
                peer.pid,
            )
            assert record["epoch"] == group.session.epoch
            assert record["error"]["kind"] == outcome.error == "PeerLost"
            assert record["waiting_for"][0]["rank"] == 0
            assert record["chunk"] > 0
            events = record["events"]
            assert [event["event"] for event in events if event["event"] == "connected"]
            states = [event["state"] for event in events if event["event"] == "state"]
            assert states[-1] == "moving"
            assert begin - 120 < events[0]["time"] <= events[-1]["time"] <= record["written"]
        assert {path.suffix for path in tmp_path.iterdir()} == {".json"}


@pytest.mark.fault(3)
def test_whoever_is_stopped_is_whom_the_record_waits_for(tmp_path):
    settings = replace(
        PATIENT,
        flight_record_dir=str(tmp_path),
        heartbeat_interval_s=1.0,
        heartbeat_timeout_s=3.0,
    )
    with training(2, Receiving(settings=settings), settings=settings) as group:
        stopped = group.peers[1]
        group.source.when(12, stopped.stop)
        with pytest.raises(DeadlineExceeded) as caught:
            group.sync(2.0)
        # On a busy machine others may have been silent for a moment too.
        waiting_for = record_of(caught.value.__notes__)["waiting_for"]
        (named,) = [peer for peer in waiting_for if peer["pid"] == stopped.pid]
        assert named["rank"] == stopped.rank
        assert named["silent_s"] >= 3.0


@pytest.mark.fault(2)
def test_several_failures_leave_one_record_of_each_process(tmp_path):
    settings = replace(PATIENT, flight_record_dir=str(tmp_path))

    def fail():
        raise ZeroDivisionError("of the source")

    with training(3, Receiving(settings=settings), settings=settings) as group:
        victim = next(peer for peer in group.peers if peer.rank == 1)
        # Ranks of the others change after this.
        group.source.when(12, victim.kill)
        with pytest.raises(PeerLost):
            group.sync(2.0)
        for value in (3.0, 4.0, 5.0):
            group.source.when(12, fail)
            with pytest.raises(ZeroDivisionError):
                group.sync(value)
        survivors = [peer for peer in group.peers if peer is not victim]
        for peer in survivors:
            for _ in range(4):
                assert peer.outcome().kind == "failed"
        pids = [json.loads(path.read_text())["pid"] for path in tmp_path.iterdir()]
        assert len(pids) == len(set(pids)) == 3


@pytest.mark.fault(2)
def test_a_folder_that_is_not_there_costs_the_record_and_nothing_else(tmp_path):
    settings = replace(PATIENT, flight_record_dir=str(tmp_path / "missing"))
    with training(1, settings=settings) as group:
        group.source.when(12, group.peers[0].kill)
        with pytest.raises(PeerLost) as caught:
            group.sync(2.0)
        assert "flight record" not in str(getattr(caught.value, "__notes__", ""))
