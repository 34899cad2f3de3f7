"""What senders and receivers of a session do in the tests: the same over Gloo and over NCCL.

Functions here run in processes of their own (`run_ranks`); rank 0 sends.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from packedcomm import (
    FullWeightSender,
    Session,
    Settings,
    StagedTarget,
    SyncPolicy,
    TensorTarget,
    UnchangedWeightsWarning,
    WeightReceiver,
)
from packedcomm.errors import SessionStateError
from packedcomm.session.messages import Offer
from tests.helpers.ranks import pipes
from tests.helpers.scenarios import device_of, empty_like
from tests.helpers.tensors import digests, odd_tensors

SECRET = "sixteen and more characters"
SETTINGS = Settings(
    connect_timeout_s=60.0,
    operation_timeout_s=30.0,
    agree_timeout_s=30.0,
    move_timeout_s=30.0,
    commit_timeout_s=30.0,
)


class Meeting:
    """Hands a sender's address to its receivers, as often as needed."""

    def __init__(self, world_size: int) -> None:
        self._pipes = pipes(world_size)

    @contextmanager
    def session(self, backend: str, rank: int, world_size: int, **options: Any) -> Any:
        """The end of a session that this rank has: rank 0 sends, and gets the options."""
        device = device_of(backend, rank)
        used = options.pop("settings", SETTINGS)
        if rank == 0:
            with Session.listen(
                "127.0.0.1:0",
                receivers=world_size - 1,
                secret=SECRET,
                device=device,
                settings=used,
                **options,
            ) as session:
                for _, writer in self._pipes[1:]:
                    writer.send(session.address)
                session.wait()
                yield session
        else:
            reader = self._pipes[rank][0]
            assert reader.poll(60.0), "the sender has published no address"
            with Session.connect(
                reader.recv(), secret=SECRET, device=device, settings=used
            ) as session:
                yield session


def changed(tensors: dict[str, torch.Tensor], step: int) -> None:
    """Flip bits of every tensor, others at every step."""
    for index, tensor in enumerate(tensors.values()):
        if tensor.numel() and tensor.is_contiguous():
            tensor.view(-1).view(torch.uint8)[(step * 7 + index) % tensor.nbytes] ^= 1


def sync_odd_tensors(
    rank: int,
    world_size: int,
    backend: str,
    meeting: Meeting,
    make_target: Callable[[dict[str, torch.Tensor]], Any],
    options: dict[str, Any],
) -> list[Any]:
    """Three syncs of odd tensors into a target; returns each version's digests and result."""
    device = device_of(backend, rank)
    source = {name: t.clone() for name, t in odd_tensors(device).items()}
    seen: list[Any] = []
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(source, session, **options)
            for step in range(3):
                changed(source, step)
                result = sender.sync()
                seen.append((digests(source), result.as_dict()))
        else:
            received = empty_like(source, device)
            receiver = WeightReceiver(make_target(received), session)
            while (result := receiver.receive()) is not None:
                seen.append((digests(received), result.as_dict()))
            assert receiver.status().version == 2
            assert receiver.status().update_count == 3
    return seen


def staged(tensors: dict[str, torch.Tensor]) -> StagedTarget:
    return StagedTarget(TensorTarget(tensors))


def sync_to_callback(
    rank: int, world_size: int, backend: str, meeting: Meeting, verify: bool
) -> list[Any]:
    """Two syncs to a callback that keeps every tensor."""
    device = device_of(backend, rank)
    source = {name: t.clone() for name, t in odd_tensors(device).items()}
    seen: list[Any] = []
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(source, session, verify=verify)
            for version in (5, 9):
                changed(source, version)
                sender.sync(version)
                seen.append((version, digests(source)))
        else:
            kept: dict[int, dict[str, torch.Tensor]] = {}

            def on_weights(version: int, items: list[tuple[str, torch.Tensor]]) -> None:
                kept.setdefault(version, {}).update(items)

            receiver = WeightReceiver(on_weights, session)
            while receiver.receive() is not None:
                pass
            seen = [(version, digests(tensors)) for version, tensors in kept.items()]
    return seen


def unchanged_syncs(rank: int, world_size: int, backend: str, meeting: Meeting) -> Any:
    """Two equal syncs, one that changes a single tensor, and one without data."""
    device = device_of(backend, rank)
    tensors = {f"t{i}": torch.full((100,), float(i), device=device) for i in range(5)}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(tensors, session, verify=True)
            counts = [sender.sync().changed_tensors]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                counts.append(sender.sync().changed_tensors)
            assert [w.category for w in caught] == [UnchangedWeightsWarning]
            tensors["t3"] += 1
            counts.append(sender.sync().changed_tensors)
            assert sender.no_change().tensors == 0
            return counts
        receiver = WeightReceiver(TensorTarget(tensors), session)
        results = []
        while (result := receiver.receive()) is not None:
            results.append(result)
        assert [r.version for r in results] == [0, 1, 2, 3]
        assert receiver.status().version == 3
        return [result.changed_tensors for result in results[:3]]


def manifests_sent(rank: int, world_size: int, backend: str, meeting: Meeting) -> list[int]:
    """How many offers with a manifest each sync makes; the fourth one sends another set."""
    device = device_of(backend, rank)
    tensors = {name: torch.zeros(10, device=device) for name in "abc"}
    with meeting.session(backend, rank, world_size) as session:
        if rank != 0:
            receiver = WeightReceiver(TensorTarget(tensors, partial=True), session)
            while receiver.receive() is not None:
                pass
            return []
        offers: list[Offer] = []
        ask = session.ask

        def counting_ask(message: Any, *rest: Any) -> Any:
            offers.extend(m for m in [message] if isinstance(m, Offer))
            return ask(message, *rest)

        session.ask = counting_ask  # type: ignore[method-assign]
        counts = []
        everything, some = FullWeightSender(tensors, session), dict(tensors)
        del some["b"]
        for sender in (everything, everything, everything, FullWeightSender(some, session)):
            sender.sync(len(counts))
            counts.append(sum(bool(offer.manifest) for offer in offers))
            offers.clear()
        everything.sync(4)
        counts.append(sum(bool(offer.manifest) for offer in offers))
        return counts


def change_statistics(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """Statistics over a sharded tensor, a bfloat16 one and an integer one."""
    device = device_of(backend, rank)
    torch.manual_seed(0)
    old = {
        "rows": torch.randn(8, 6, device="cpu").to(device),
        "half": torch.randn(50, device="cpu").to(device, torch.bfloat16),
        "count": torch.arange(5, device=device),
    }
    new = {name: t + torch.ones_like(t) * 3 for name, t in old.items()}
    new["rows"][2:5] -= 7.5
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(new, session, statistics=True)
            changes = sender.sync().changes
            assert changes.keys() == old.keys()
            for name, change in changes.items():
                difference = (new[name].double() - old[name].double()).abs()
                assert change.mean == pytest.approx(difference.mean().item(), rel=1e-6)
                expected = difference.std(correction=0).item()
                assert change.std == pytest.approx(expected, rel=1e-4, abs=1e-6)
                assert change.maximum == pytest.approx(difference.max().item(), rel=1e-6)
        else:
            receiver = WeightReceiver(StagedTarget(TensorTarget(old)), session)
            result = receiver.receive()
            assert result is not None
            assert result.as_dict()["change/max"] > 0
            assert receiver.receive() is None


def background_receiver(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """Five syncs received in a thread, into a state dict, with a hook after each."""
    device = device_of(backend, rank)
    model = torch.nn.Linear(30, 20, device=device)
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(model, session)
            for step in range(5):
                with torch.no_grad():
                    model.weight.fill_(step)
                sender.sync()
            return
        seen: list[tuple[int, float]] = []
        receiver = WeightReceiver(StagedTarget(TensorTarget(model.state_dict())), session)
        before = receiver.status()
        assert (before.state, before.version, before.update_count) == ("idle", None, 0)
        receiver.start(lambda version: seen.append((version, model.weight[3, 4].item())))
        with pytest.raises(SessionStateError, match="receiving already"):
            receiver.receive()
        with pytest.raises(SessionStateError, match="was started"):
            receiver.start()
        deadline = time.monotonic() + 30
        while receiver.status().state != "closed" and time.monotonic() < deadline:
            time.sleep(0.01)
        status = receiver.status()
        assert (status.state, status.version, status.update_count) == ("closed", 4, 5)
        assert status.error is None
        assert status.last_update_time is not None
        assert abs(status.last_update_time - time.time()) < 60
        assert seen == [(version, float(version)) for version in range(5)]
        receiver.close()
        receiver.close()


def policy(rank: int, world_size: int, backend: str, meeting: Meeting) -> list[int]:
    """Seven steps of which every third one, the first and the last are sent."""
    device = device_of(backend, rank)
    tensors = {"w": torch.zeros(4, device=device)}
    versions = []
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(tensors, session, policy=SyncPolicy(every=3))
            for step in range(8):
                result = sender.step(step, last=step == 7)
                versions += [] if result is None else [result.version]
            assert sender.step(7, last=True) is None
        else:
            receiver = WeightReceiver(TensorTarget(tensors), session)
            while (result := receiver.receive()) is not None:
                versions.append(result.version)
    return versions


def hostile_environment(rank: int, world_size: int, backend: str, meeting: Meeting) -> Any:
    """A launcher's variables, all wrong, are neither used nor touched."""
    hostile = {"RANK": "77", "WORLD_SIZE": "99", "MASTER_ADDR": "nowhere.invalid",
               "MASTER_PORT": "1", "LOCAL_RANK": "55"}  # fmt: skip
    os.environ.update(hostile)
    before = dict(os.environ)
    result = sync_odd_tensors(rank, world_size, backend, meeting, TensorTarget, {})
    assert dict(os.environ) == before
    return [digests for digests, _ in result]
