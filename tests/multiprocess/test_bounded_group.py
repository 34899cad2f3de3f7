"""What the operations on a group make of late GPUs and of torch's errors."""

from __future__ import annotations

import time
from functools import partial

import torch
import torch.distributed as dist

from packedcomm.errors import DeadlineExceeded, NcclError, PeerLost, SessionStateError
from packedcomm.sources.bounded_group import BoundedGroup, Transfers
from tests.helpers.operations import raised
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_models import join


class Work:
    """Of a backend that doesn't block the host, as NCCL's."""

    def __init__(self, done_after_s=None, error=None):
        self._done_at = None if done_after_s is None else time.monotonic() + done_after_s
        self._error = error

    def wait(self, timeout=None):
        if self._error is not None:
            raise self._error

    def is_completed(self):
        return self._done_at is not None and time.monotonic() >= self._done_at


def _on_gpus(rank, world_size, store):
    join(rank, world_size, store)
    group = BoundedGroup(None)
    group.timeout_s = 60.0
    group.begin("gather")
    begin = time.monotonic()
    under_way = group.wait(Transfers([Work(1.0)], [1, 2], on_host=False))
    waited = time.monotonic() - begin
    group.settle(under_way)
    settled = time.monotonic() - begin
    group.timeout_s = 0.5
    group.begin("gather")
    late = raised(lambda: group.settle(group.wait(Transfers([Work()], [2, 1], on_host=False))))
    after = raised(lambda: group.all_reduce(torch.zeros(1)))
    return waited, settled, late, after


def test_what_a_gpu_waits_for_has_a_deadline_too(tmp_path):
    [(waited, settled, late, after)] = run_ranks(_on_gpus, 1, str(tmp_path / "store"))
    # Only settling blocks the host.
    assert waited < 1.0 <= settled
    kind, text, seconds = late
    assert kind is DeadlineExceeded
    assert text.startswith("gather: not done within 0.5 s, waiting for one of ranks 1, 2 of the")
    assert seconds < 5.0
    assert after[0] is SessionStateError
    assert text in after[1]


def _failing(rank, world_size, store, errors, ranks=(3,), on_host=False):
    join(rank, world_size, store)
    found = []
    for error in errors:
        group = BoundedGroup(None)
        group.begin("gather")
        transfers = Transfers([Work(error=error)], ranks, on_host=on_host)
        found.append(raised(partial(group.wait, transfers))[:2])
    return found


NCCL_LOST = (
    "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, NCCL "
    "version 2.28.9\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely."
)


ERRORS = [
    (RuntimeError("[/gloo/pair.cc:553] Connection closed by peer [::1]:5. Typically"), PeerLost),
    (RuntimeError("[/gloo/pair.cc:537] Read error [::1]:5: Connection reset by peer"), PeerLost),
    (RuntimeError("[/gloo/pair.cc:200] Socket closed"), PeerLost),
    (dist.DistBackendError(NCCL_LOST), PeerLost),
    (RuntimeError("Operation timed out!"), DeadlineExceeded),
    (RuntimeError("Application timeout caused pair closure"), DeadlineExceeded),
    (dist.DistBackendError("NCCL error in: a.cpp:1, invalid usage, NCCL version"), NcclError),
]


def test_an_error_of_torch_becomes_one_that_names_the_rank(tmp_path):
    [found] = run_ranks(_failing, 1, str(tmp_path / "store"), [error for error, _ in ERRORS])
    assert [kind for kind, _ in found] == [kind for _, kind in ERRORS]
    for _, text in found:
        assert text.startswith("gather")
        assert "rank 3 of the source" in text
        # It is torch's own limit that has passed.
        assert "not done within" not in text


def test_one_work_for_several_transfers_names_all_of_them(tmp_path):
    store = str(tmp_path / "store")
    [[(kind, text)]] = run_ranks(_failing, 1, store, [ERRORS[0][0]], (2, 1), True)
    assert kind is PeerLost
    assert "lost the connection to one of ranks 1, 2 of the source (" in text


def test_nobody_is_named_where_nobody_else_is_there(tmp_path):
    [[(_, text)]] = run_ranks(_failing, 1, str(tmp_path / "store"), [ERRORS[0][0]], ())
    assert text.startswith("gather: lost the connection to the source (")


LOCAL = [
    "CUDA error: the launch timed out and was terminated. more",
    "The module is closed for writing",
    "weights of 'connection_proj' are not DTensors",
    "einops: network.layer is wrong",
]


def _calling(rank, world_size, store, errors):
    join(rank, world_size, store)
    found = []
    for error in errors:
        group = BoundedGroup(None)
        group.begin("gather")

        def fail(error=error):
            raise error

        try:
            group.call(fail, torch.device("cpu"))
        except Exception as raising:  # noqa: BLE001  (it is what the test looks at)
            found.append((type(raising), str(raising), group.ended is not None))
    return found


def test_errors_of_a_function_that_is_called_are_its_own(tmp_path):
    errors = [RuntimeError(text) for text in LOCAL]
    [found] = run_ranks(_calling, 1, str(tmp_path / "store"), errors)
    assert found == [(RuntimeError, text, False) for text in LOCAL]


def test_errors_of_torch_distributed_in_a_function_end_the_group(tmp_path):
    [found] = run_ranks(_calling, 1, str(tmp_path / "store"), [error for error, _ in ERRORS])
    assert [(kind, ended) for kind, _, ended in found] == [(kind, True) for _, kind in ERRORS]
