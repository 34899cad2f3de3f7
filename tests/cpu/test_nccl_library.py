"""Finding the NCCL library; every case in a process of its own, since libraries stay loaded."""

from __future__ import annotations

import ctypes

import pytest
import torch

from packedcomm import NcclCommunicator, _native
from packedcomm.communicators.nccl import find_nccl
from packedcomm.errors import ArgumentError, CudaError, NcclError, VersionMismatch
from packedcomm.settings import Settings
from tests.helpers.fake_nccl import build_fake_nccl
from tests.helpers.ranks import run_ranks

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="torch has loaded an NCCL")


def _open(rank, world_size, preload, candidates, named):
    for path in preload:
        ctypes.CDLL(path)
    try:
        library = _native.nccl_library(candidates, named)
    except (NcclError, VersionMismatch) as error:
        return type(error), str(error)
    return library.path, library.version


def _opened(preload=(), candidates=(), named=""):
    arguments = [[str(path) for path in preload], [str(path) for path in candidates], str(named)]
    (result,) = run_ranks(_open, 1, *arguments)
    return result


@needs_no_gpu
def test_no_library_is_an_error_that_says_where_it_looked():
    kind, message = _opened(candidates=["/nowhere/libnccl.so.2", "libnccl_absent.so.2"])
    assert kind is NcclError
    assert "what the process has loaded" in message
    assert "/nowhere/libnccl.so.2" in message
    assert "libnccl_absent.so.2" in message


@needs_no_gpu
def test_the_first_candidate_that_opens_is_taken(tmp_path):
    path = build_fake_nccl(tmp_path)
    assert _opened(candidates=["/nowhere/libnccl.so.2", path]) == (str(path), (2, 28, 9))


@needs_no_gpu
def test_the_loaded_library_comes_before_candidates(tmp_path):
    loaded = build_fake_nccl(tmp_path / "loaded", version=23007)
    other = build_fake_nccl(tmp_path / "other")
    assert _opened(preload=[loaded], candidates=[other]) == (str(loaded), (2, 30, 7))


@needs_no_gpu
def test_one_library_loaded_by_two_names_is_one(tmp_path):
    path = build_fake_nccl(tmp_path)
    link = tmp_path / "libnccl.so"
    link.symlink_to(path)
    assert _opened(preload=[path, link]) == (str(path), (2, 28, 9))


@needs_no_gpu
def test_plugins_are_not_taken_for_the_library(tmp_path):
    plugin = build_fake_nccl(tmp_path, name="libnccl-net.so")
    assert _opened(preload=[plugin])[0] is NcclError


@needs_no_gpu
def test_two_loaded_libraries_are_an_error_that_lists_both(tmp_path):
    paths = [build_fake_nccl(tmp_path / name) for name in ("first", "second")]
    kind, message = _opened(preload=paths)
    assert kind is NcclError
    assert all(str(path) in message for path in paths)


def test_a_named_library_is_taken_whatever_is_loaded(tmp_path):
    loaded, named = (build_fake_nccl(tmp_path / name) for name in ("loaded", "named"))
    assert _opened(preload=[loaded], named=named) == (str(named), (2, 28, 9))


def test_a_named_library_that_does_not_open_is_an_error(tmp_path):
    path = tmp_path / "libnccl.so.2"
    path.write_text("no library")
    kind, message = _opened(named=path)
    assert kind is NcclError
    assert str(path) in message


@pytest.mark.parametrize(("code", "text"), [(21708, "2.17.8"), (2708, "2.7.8")])
def test_an_old_library_is_refused_with_its_version_and_path(tmp_path, code, text):
    path = build_fake_nccl(tmp_path, version=code)
    kind, message = _opened(named=path)
    assert kind is VersionMismatch
    assert text in message
    assert str(path) in message
    assert "2.18" in message


def test_a_library_without_the_functions_is_an_error(tmp_path):
    code = "int ncclGetVersion(int *version) { *version = 22809; return 0; }"
    path = build_fake_nccl(tmp_path, code=code)
    kind, message = _opened(named=path)
    assert kind is NcclError
    assert "ncclGetUniqueId" in message


def test_settings_name_the_library(tmp_path):
    # Under a name that isn't NCCL's: it stays loaded, and other tests must not find it.
    path = build_fake_nccl(tmp_path, name="fake.so")
    assert find_nccl(Settings(nccl_library=str(path))).path == str(path)


def test_a_unique_id_has_128_bytes(tmp_path):
    settings = Settings(nccl_library=str(build_fake_nccl(tmp_path, name="fake.so")))
    assert NcclCommunicator.unique_id(settings) == bytes([42]) * 128


@needs_no_gpu
@pytest.mark.parametrize("device", [0, 3, "cuda", "cuda:1", torch.device("cuda", 0)])
def test_a_machine_without_enough_gpus_is_an_error_that_says_so(device):
    with pytest.raises(CudaError, match="sees 0 GPUs"):
        NcclCommunicator.from_unique_id(bytes(128), 0, 1, device=device)


def test_another_device_than_a_gpu_is_an_argument_error():
    for device in ("cpu", "nonsense"):
        with pytest.raises(ArgumentError, match=device):
            NcclCommunicator.from_unique_id(bytes(128), 0, 1, device=device)


@pytest.mark.parametrize("uid", [bytes(127), b"", "no base64!", "AAAA"])
def test_a_malformed_unique_id_is_an_argument_error(uid):
    with pytest.raises(ArgumentError, match=r"128 bytes|base64"):
        NcclCommunicator.from_unique_id(uid, 0, 1, device=0)
