"""Receivers that choose where data goes when they know what is offered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packedcomm import FullWeightSender, TensorTarget, WeightReceiver
from packedcomm.errors import ManifestError
from tests.helpers.in_process import Round, sessions


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((8,), value) for name in "ab"}


class Counted(TensorTarget):
    """Counts how often it is planned."""

    fixed_destinations = True

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.placed = 0

    def place(self, manifest):
        self.placed += 1
        return super().place(manifest)


class Chooser:
    """Shows the first sync to a callback; later ones go into place."""

    notes: tuple[str, ...] = ()

    def __init__(self, live: dict[str, torch.Tensor]) -> None:
        self.target = Counted(live)
        self.shown: list[str] = []
        self.asked: list[str] = []

    def choose(self, manifest) -> Any:
        self.asked.append("choose")
        self.notes = ("in place",) if self.shown else ("shown",)
        return self.target if self.shown else self._show

    def foreseen(self, manifest) -> Any:
        self.asked.append("foreseen")
        return self.target if self.shown else None

    def _show(self, version, items):
        self.shown += [name for name, _ in items]


def test_a_target_that_is_foreseen_is_planned_before_its_sync():
    live = weights(0.0)
    chooser = Chooser(live)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(chooser, end)
        sender = FullWeightSender(weights(1.0), session)
        first = Round(sender.sync, [receiver])
        assert "shown" in first.sent.notes[0]
        assert (chooser.asked, chooser.target.placed) == (["choose", "foreseen"], 1)
        assert float(live["a"][0]) == 0.0
        second = Round(sender.sync, [receiver])
        assert chooser.target.placed == 1
        assert "in place" in second.sent.notes[0]
        assert float(live["a"][0]) == 1.0


class Failing(Chooser):
    """Can't say what comes next."""

    def foreseen(self, manifest) -> Any:
        self.asked.append("foreseen")
        raise ZeroDivisionError("no foresight")


class Misfit(Chooser):
    """Foresees a target that can't take what was sent."""

    def __init__(self, live: dict[str, torch.Tensor]) -> None:
        super().__init__(live)
        self.other = TensorTarget({"c": torch.zeros(3)})

    def foreseen(self, manifest) -> Any:
        self.asked.append("foreseen")
        return self.other


@pytest.mark.parametrize("kind", [Failing, Misfit])
def test_foresight_that_fails_costs_nothing(kind):
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        chooser = kind(live)
        receiver = WeightReceiver(chooser, end)
        sender = FullWeightSender(weights(1.0), session)
        for version in range(4):
            done = Round(sender.sync, [receiver])
            assert (done.sent.version, done.received[0].version) == (version, version)
        assert chooser.asked.count("foreseen") == 4
        assert float(live["a"][0]) == 1.0
        # Nor is what was planned for the one that was chosen.
        assert chooser.target.placed == 1


class Refusing(Chooser):
    """Chooses a target that can't take what is offered."""

    def choose(self, manifest) -> Any:
        raise ManifestError("tensor 'a': not here")


def test_what_no_target_takes_is_refused_before_any_data():
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(Refusing(live), end)
        failed = Round(FullWeightSender(weights(1.0), session).sync, [receiver])
        assert isinstance(failed.sent, ManifestError)
        assert "not here" in str(failed.sent)
        assert receiver.status().state != "torn"
