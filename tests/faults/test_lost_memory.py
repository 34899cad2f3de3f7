"""Destinations that lose their memory when syncs are planned for it: refused by name."""

from __future__ import annotations

import pytest
import torch

from packedcomm import (
    FullWeightSender,
    FusedTarget,
    ModuleSource,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.errors import ManifestError, PackedCommError, TensorError
from packedcomm.manifest import Manifest
from packedcomm.planning.engine_layouts import ModelGeometry
from packedcomm.session.messages import Staged
from tests.helpers.in_process import Round, sessions

NAMES = ("kept", "lost")


class Model(torch.nn.Module):
    """Its parameters are given other memory later."""

    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(4), requires_grad=False))


def of_tensors(model):
    return TensorTarget({name: tensor.data for name, tensor in model.named_parameters()})


def of_module(model):
    return TensorTarget(model)


def of_parameters(model):
    return FusedTarget(dict(model.named_parameters()), ModelGeometry(1, 1, 4))


def freed(model):
    model.lost.untyped_storage().resize_(0)


def shrunk(model):
    # Whoever writes all of the tensor now writes to memory that may be somebody else's.
    model.lost.untyped_storage().resize_(8)


def emptied(model):
    model.lost.set_()


def replaced(model):
    model.lost.data = torch.zeros(4)


def put_in_place(model):
    model.lost = torch.nn.Parameter(torch.zeros(4), requires_grad=False)


# Who gives tensors or parameters gives these, whatever a module has in their place later.
OF_ITS_OWN_ACCOUNT = (
    (of_tensors, emptied),
    (of_tensors, replaced),
    (of_tensors, put_in_place),
    (of_parameters, put_in_place),
)


class Syncs:
    """A receiver that has received twice what is planned once."""

    def __init__(self, session, end, target, staging):
        self.sent = {name: torch.full((4,), 1.0) for name in NAMES}
        self.receiver = WeightReceiver(StagedTarget(target) if staging else target, end)
        self.sender = FullWeightSender(self.sent, session)
        for value in (1.0, 2.0):
            assert self.sync(value) in (0, 1)

    def sync(self, value):
        """The version that was committed, or what the sender raises."""
        for tensor in self.sent.values():
            tensor.fill_(value)
        done = Round(self.sender.sync, [self.receiver])
        if isinstance(done.sent, PackedCommError):
            assert type(done.received[0]) is type(done.sent)
            return done.sent
        return done.sent.version


@pytest.mark.fault(25)
@pytest.mark.parametrize("staging", [False, True])
@pytest.mark.parametrize(
    ("make", "lose"),
    [
        (make, lose)
        for make in (of_tensors, of_module, of_parameters)
        for lose in (freed, shrunk, emptied)
        if (make, lose) not in OF_ITS_OWN_ACCOUNT
    ],
)
def test_memory_that_is_gone_is_refused_by_name_and_nothing_is_written(make, lose, staging):
    model = Model()
    with sessions(1) as (session, (end,)):
        syncs = Syncs(session, end, make(model), staging)
        lose(model)
        error = syncs.sync(3.0)
        assert isinstance(error, (TensorError, ManifestError))
        assert "receiver rank 1: " in str(error)
        assert "'lost'" in str(error)
        assert "'kept'" not in str(error)
        assert model.kept.tolist() == [2.0] * 4
        assert (syncs.receiver.status().state, syncs.receiver.status().version) == ("committed", 1)
        # A new target, of memory that is there again.
        model.lost = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        syncs.receiver = WeightReceiver(make(model), end)
        assert syncs.sync(4.0) == 2
        assert [p.tolist() for p in model.parameters()] == [[4.0] * 4] * 2


@pytest.mark.fault(25)
@pytest.mark.parametrize("staging", [False, True])
def test_a_parameter_that_was_put_in_place_of_another_gets_what_comes(staging):
    tree = torch.nn.Sequential(Model(), Model())
    with sessions(1) as (session, (end,)):
        target = TensorTarget(tree)
        receiver = WeightReceiver(StagedTarget(target) if staging else target, end)
        sent = {name: torch.ones(4) for name, _ in tree.named_parameters()}
        senders = [FullWeightSender(sent, session), FullWeightSender(dict(sent), session)]
        # In one plan for each size of buffers.
        for size, sender in zip((64, 1 << 20), senders, strict=True):
            session.buffer_size_bytes = size
            assert Round(sender.sync, [receiver]).sent.version == 0
        for replace, value in ((new_parameter, 2.0), (new_module, 3.0)):
            replace(tree)
            for size, sender in zip((64, 1 << 20), senders, strict=True):
                value += 0.5
                for tensor in sent.values():
                    tensor.fill_(value)
                session.buffer_size_bytes = size
                assert Round(sender.sync, [receiver]).sent.receivers == 1
                assert [p.tolist() for p in tree.parameters()] == [[value] * 4] * 4


def new_parameter(tree):
    tree[0].lost = torch.nn.Parameter(torch.zeros(4), requires_grad=False)


def new_module(tree):
    tree[1] = Model()


@pytest.mark.fault(25)
@pytest.mark.parametrize("staging", [False, True])
def test_a_model_that_went_to_another_device_or_lacks_a_parameter_is_refused_by_name(staging):
    for change, name in ((lambda model: model.to("meta"), "kept"), (without_one, "lost")):
        model = Model()
        with sessions(1) as (session, (end,)):
            syncs = Syncs(session, end, of_module(model), staging)
            change(model)
            error = syncs.sync(3.0)
            assert isinstance(error, (TensorError, ManifestError))
            assert f"'{name}'" in str(error)
            assert syncs.receiver.status().version == 1


def without_one(model):
    del model.lost


@pytest.mark.fault(25)
@pytest.mark.parametrize("staging", [False, True])
def test_a_parameter_that_was_given_other_memory_is_followed_or_refused_by_name(staging):
    for make in (of_module, of_parameters):
        model = Model()
        with sessions(1) as (session, (end,)):
            syncs = Syncs(session, end, make(model), staging)
            replaced(model)
            done = syncs.sync(3.0)
            if make is of_module:
                assert done == 2
                assert model.lost.tolist() == [3.0] * 4
            else:
                assert "'lost' has been given other memory" in str(done)


@pytest.mark.fault(19, 25)
@pytest.mark.parametrize(
    ("make", "lose"),
    [
        (make, lose)
        for make in (of_tensors, of_module, of_parameters)
        for lose in (freed, shrunk, replaced, put_in_place)
        if (make, lose) not in OF_ITS_OWN_ACCOUNT
    ],
)
def test_memory_that_is_gone_before_the_commit_is_named_and_nothing_is_written(make, lose):
    model = Model()
    with sessions(1) as (session, (end,)):
        syncs = Syncs(session, end, make(model), True)
        reply = end.reply

        def losing(message):
            reply(message)
            if isinstance(message, Staged):
                end.reply = reply
                lose(model)

        end.reply = losing
        error = syncs.sync(3.0)
        assert isinstance(error, TensorError)
        assert "receiver rank 1: " in str(error)
        assert "'lost'" in str(error)
        assert "has been given other memory" in str(error) or "no storage" in str(error)
        assert "'kept'" not in str(error)
        assert model.kept.tolist() == [2.0] * 4
        # How much of it the target has written nobody knows but the target.
        status = syncs.receiver.status()
        assert (status.version, status.state, status.ready) == (None, "torn", False)
        model.lost = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
        syncs.receiver._following._target = StagedTarget(make(model))
        assert syncs.sync(4.0) == 3
        assert syncs.receiver.status().ready
        assert [p.tolist() for p in model.parameters()] == [[4.0] * 4] * 2


@pytest.mark.fault(25)
def test_a_tensor_of_which_part_is_gone_is_refused_when_the_target_is_made():
    matrix = torch.zeros(4, 6)
    columns = matrix[:, 1:3]
    TensorTarget({"whole": matrix[:2], "columns": columns})
    matrix.untyped_storage().resize_(matrix.nbytes - 4 * 4)
    # All but the last row's are left.
    TensorTarget({"columns": columns[:3], "empty": columns[:0]})
    with pytest.raises(
        TensorError, match=r"'columns' has no storage: it needs 84 bytes, .* 80 are"
    ):
        TensorTarget({"columns": columns})
    with pytest.raises(TensorError, match="'columns'"):
        FusedTarget({"columns": columns}, ModelGeometry(1, 1, 4))


def test_a_commit_names_no_tensor_where_only_memory_beside_its_own_was_replaced():
    model = Model()
    target = StagedTarget(TensorTarget(model, partial=True))
    manifest = Manifest.from_tensors({"kept": torch.zeros(4)})
    target.place(manifest)
    replaced(model)
    with pytest.raises(TensorError, match="a destination that this manifest doesn't fill"):
        target.commit(manifest)


def test_tied_parameters_that_were_untied_before_the_commit_are_named():
    def tied():
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(2)))
        model[1].weight = model[0].weight
        return model

    manifest = ModuleSource(tied()).snapshot().manifest
    model = tied()
    target = StagedTarget(TensorTarget(model))
    target.place(manifest)
    model[1].weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(TensorError, match="has been given other memory"):
        target.commit(manifest)
