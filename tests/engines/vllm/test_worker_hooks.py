"""Calls of workers whose group has those of another server of one deployment, too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from packedcomm.engines.vllm import outcome, worker_hooks
from packedcomm.engines.vllm.markers import marked
from packedcomm.errors import ManifestError

WORKERS = 4


class Worker:
    """One of the two of the first server, as the hooks see it."""

    parallel_config = SimpleNamespace(world_size=2)
    weight_transfer_engine = SimpleNamespace(begin_anew=lambda: None)

    def __init__(self):
        self._weight_update_active = False

    def start(self):
        self._weight_update_active = True

    def finish(self):
        if not self._weight_update_active:
            raise RuntimeError("without a matching start")
        self._weight_update_active = False
        return "finished"


@pytest.fixture
def failed(monkeypatch):
    """Who of all workers has failed in the next joint call, by rank."""
    found = {}
    group = SimpleNamespace(world_size=WORKERS, rank_in_group=0)
    monkeypatch.setattr(worker_hooks, "workers", lambda: group)
    monkeypatch.setattr(
        outcome, "_shared", lambda _, __: [found.get(rank, "") for rank in range(WORKERS)]
    )
    return found


def test_an_update_that_failed_on_another_server_is_over_and_can_be_finished(failed):
    worker = Worker()
    worker_hooks._start(worker.start, worker)
    failed[3] = marked(ManifestError("not here"))
    # Only the last worker of all raises, so this server's caller hears of nothing.
    assert worker_hooks._call(lambda: None, worker) is None
    assert not worker._weight_update_active
    assert worker_hooks._finish(worker.finish, worker) is None
    # And only once.
    with pytest.raises(RuntimeError, match="matching start"):
        worker_hooks._finish(worker.finish, worker)


def test_the_next_update_is_finished_as_any(failed):
    worker = Worker()
    failed[3] = marked(ManifestError("not here"))
    worker_hooks._start(worker.start, worker)
    worker_hooks._call(lambda: None, worker)
    failed.clear()
    worker_hooks._start(worker.start, worker)
    worker_hooks._call(lambda: None, worker)
    assert worker_hooks._finish(worker.finish, worker) == "finished"


def test_a_server_of_its_own_hears_what_vllm_says(failed, monkeypatch):
    group = SimpleNamespace(world_size=1, rank_in_group=0)
    monkeypatch.setattr(worker_hooks, "workers", lambda: group)
    worker = Worker()
    worker.parallel_config = SimpleNamespace(world_size=1)

    def refuse():
        raise ManifestError("not here")

    worker_hooks._start(worker.start, worker)
    with pytest.raises(ManifestError):
        worker_hooks._call(refuse, worker)
    with pytest.raises(Exception, match="matching start"):
        worker_hooks._finish(worker.finish, worker)
