"""Reading safetensors checkpoints: what is read, and one test per bad input."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from packedcomm.errors import CheckpointError, ManifestError
from packedcomm.manifest import Manifest
from packedcomm.sources.checkpoint import Checkpoint


def write_raw(
    path: Path, header: object, data: bytes = b"", header_size: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if header_size is None else header_size
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Save shards and their index; returns the index's weight map."""
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.bias": torch.tensor([1.0, float("nan")], dtype=torch.bfloat16),
    "c.flag": torch.tensor(True),
    "d.empty": torch.zeros(0, 4, dtype=torch.int64),
    "e.scale": torch.arange(5, dtype=torch.uint8).view(torch.float8_e4m3fn),
}


def assert_same_bytes(left: torch.Tensor, right: torch.Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def test_single_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("{}")

    checkpoint = Checkpoint.open(tmp_path / "weights.safetensors")

    assert checkpoint.config_path is None
    assert checkpoint.manifest == Manifest.from_tensors(sorted(TENSORS.items()))
    assert len(checkpoint) == 5
    read = list(checkpoint)
    assert [name for name, _ in read] == sorted(TENSORS)
    for name, tensor in read:
        assert_same_bytes(tensor, TENSORS[name])


def test_folder_with_model_safetensors_and_config(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text("{}")

    checkpoint = Checkpoint.open(str(tmp_path))

    assert checkpoint.config_path == tmp_path / "config.json"
    assert {spec.name for spec in checkpoint.manifest.specs} == set(TENSORS)


def test_folder_with_index_reads_shards_in_order(tmp_path: Path) -> None:
    write_shards(
        tmp_path,
        {
            "model-00002-of-00002.safetensors": {"x": torch.ones(2)},
            "model-00001-of-00002.safetensors": {"z": torch.ones(3), "y": torch.ones(4)},
        },
    )

    checkpoint = Checkpoint.open(tmp_path)

    assert [name for name, _ in checkpoint] == ["y", "z", "x"]
    assert [spec.name for spec in checkpoint.manifest.specs] == ["y", "z", "x"]


def test_folder_with_any_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "adapter_model.safetensors")

    assert [name for name, _ in Checkpoint.open(tmp_path)] == ["x"]


def test_open_reads_no_tensor_data(tmp_path: Path) -> None:
    """A sparse file far larger than this machine's memory opens at once."""
    size = 1 << 42
    path = write_raw(tmp_path / "huge.safetensors", {"x": entry("U8", [size], 0, size)})
    try:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size + size)
    except OSError:
        pytest.skip("needs a file system with sparse files of 4 TiB")

    assert Checkpoint.open(path).manifest.nbytes == size


def test_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    checkpoint = Checkpoint.open(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unable to mmap")

    monkeypatch.setattr("packedcomm.sources.checkpoint.safe_open", fail)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: can't be mapped into memory: un"):
        list(checkpoint)


def test_headers_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    assert Checkpoint.open(tmp_path).manifest == Manifest.from_tensors(sorted(TENSORS.items()))


def test_misaligned_tensor_is_read_exactly(tmp_path: Path) -> None:
    header = {"a": entry("U8", [3], 0, 3), "b": entry("F32", [2], 3, 11)}
    path = write_raw(tmp_path / "x.safetensors", header, b"abc" + bytes(range(8)))

    tensors = dict(Checkpoint.open(path))

    assert tensors["b"].view(torch.uint8).tolist() == list(range(8))


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)
    before = path.read_bytes()

    dict(Checkpoint.open(path))["x"].zero_()

    assert path.read_bytes() == before


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing_here: no such file"):
        Checkpoint.open(tmp_path / "nothing_here")


def test_folder_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file"):
        Checkpoint.open(tmp_path)


def test_single_file_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a regular file"):
        Checkpoint.open(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the file is empty"):
        Checkpoint.open(tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: holds no tensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("kept", [4, 8, 40, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid safetensors file"):
        Checkpoint.open(path)


def test_bytes_after_the_last_tensor(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry("U8", [2], 0, 2)}, b"abc")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid"):
        Checkpoint.open(tmp_path)


def test_header_length_beyond_the_file(tmp_path: Path) -> None:
    header = {"a": entry("U8", [2], 0, 2)}
    write_raw(tmp_path / "x.safetensors", header, b"ab", header_size=(1 << 63) + 5)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid"):
        Checkpoint.open(tmp_path)


def test_header_that_is_not_json(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", b"\x80\x04\x95 not json")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid"):
        Checkpoint.open(tmp_path)


def test_overlapping_tensors(tmp_path: Path) -> None:
    header = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}
    write_raw(tmp_path / "x.safetensors", header, b"abcdef")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid"):
        Checkpoint.open(tmp_path)


def test_negative_shape(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry("U8", [-2], 0, 2)}, b"ab")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a valid"):
        Checkpoint.open(tmp_path)


def test_overflowing_shape(tmp_path: Path) -> None:
    header = {"a": entry("F64", [0, 1 << 62], 0, 0)}
    write_raw(tmp_path / "x.safetensors", header)
    with pytest.raises(ManifestError, match=r"x\.safetensors: tensor 'a': .*overflows"):
        Checkpoint.open(tmp_path)


def test_unknown_dtype(tmp_path: Path) -> None:
    header = {"good": entry("U8", [2], 0, 2), "odd one": entry("Q9", [2], 2, 4)}
    write_raw(tmp_path / "x.safetensors", header, b"abcd")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*'odd one' \(Q9\)$"):
        Checkpoint.open(tmp_path)


def test_dtype_without_a_torch_counterpart(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"a": entry("F4", [4], 0, 2)}, b"ab")
    with pytest.raises(ManifestError, match=r"x\.safetensors: tensor 'a' has dtype 'F4'"):
        Checkpoint.open(tmp_path)


def test_empty_name(tmp_path: Path) -> None:
    write_raw(tmp_path / "x.safetensors", {"": entry("U8", [2], 0, 2)}, b"ab")
    with pytest.raises(ManifestError, match=r"x\.safetensors: tensor name must be a non-empty"):
        Checkpoint.open(tmp_path)


def test_index_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json: can't be read as JSON"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {}, "x.safetensors"])
def test_index_without_weight_map(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=r'index\.json: has no "weight_map" object'):
        Checkpoint.open(tmp_path)


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    write_index(tmp_path, {"layer.weight": "model-00001-of-00001.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"index\.json: shard 'model-00001-of-00001.*missing.*'layer\.weight'"
    ):
        Checkpoint.open(tmp_path)


def test_index_names_a_tensor_absent_from_its_shard(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path, {"one.safetensors": {"x": torch.ones(1)}})
    write_index(tmp_path, weight_map | {"layer.weight": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"one\.safetensors: .* holds 'layer\.weight'"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..", "", "..\\x", 7]
)
def test_index_names_a_file_outside_the_folder(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file({"layer.weight": torch.ones(1)}, place / "x.safetensors")
    write_index(folder, {"layer.weight": shard})
    with pytest.raises(
        CheckpointError, match=r"index\.json: tensor 'layer\.weight' .* not a plain file name"
    ):
        Checkpoint.open(folder)


def test_two_shards_hold_the_same_tensor(tmp_path: Path) -> None:
    shared = {"layer.weight": torch.ones(1)}
    write_shards(tmp_path, {"one.safetensors": shared, "two.safetensors": shared})
    # The index's map can name one of them only; both shards must be listed to be read.
    write_index(tmp_path, {"layer.weight": "one.safetensors", "other": "two.safetensors"})
    save_file(shared | {"other": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'layer\.weight' is in two files: .*one\.safetensors and .*two"
    ):
        Checkpoint.open(tmp_path)


def test_file_deleted_after_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, path)
    checkpoint = Checkpoint.open(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file"):
        list(checkpoint)


def test_file_changed_after_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, path)
    checkpoint = Checkpoint.open(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r"changed since it was opened: tensor 'x' was"):
        list(checkpoint)


def test_tensor_removed_after_open(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1)}, path)
    checkpoint = Checkpoint.open(path)
    save_file({"y": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: can't read tensor 'x'"):
        list(checkpoint)
