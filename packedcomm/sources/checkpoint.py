"""Reading Hugging Face safetensors checkpoints: one file, or a folder with one or more shards."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from packedcomm.errors import CheckpointError, ManifestError
from packedcomm.manifest import Manifest, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

# The element types of the safetensors header that have a byte-exact torch counterpart, as torch
# names them. The 4- and 6-bit types have none.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint: what it holds is known, its data is read while iterating.

    Tensors come in the order of the shards' file names and, within a shard, of their names, so that
    every process that opens the same checkpoint has the same order.
    """

    path: Path
    """The file or folder that was opened."""

    shards: tuple[tuple[Path, tuple[TensorSpec, ...]], ...]
    """Every safetensors file with the tensors in it, in the order of iteration."""

    manifest: Manifest

    config_path: Path | None
    """The folder's config.json. A single file has none, even with a config.json beside it."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the headers of a checkpoint; no tensor data is read.

        Args:
            path: a safetensors file, or a folder that holds `model.safetensors`, or
                `model.safetensors.index.json` and its shards, or any `*.safetensors` files, looked
                for in this order. Pickled checkpoints (`*.bin`, `*.pt`) are never read.

        Raises:
            CheckpointError: a file is absent, empty, truncated or corrupt, the index names a shard
                or tensor that isn't there or a file outside the folder, or two shards hold the same
                tensor; the message names the file and, where there is one, the tensor.
            ManifestError: a tensor's dtype, shape or name isn't supported; the message names the
                file and the tensor.
        """
        path = Path(path)
        if path.is_dir():
            files, required = _files_of_folder(path)
            config = path / CONFIG_FILE
            config_path = config if config.is_file() else None
        else:
            files, required, config_path = [path], {}, None
        shards = tuple((file, _read_header(file)) for file in files)
        _check_index(required, shards)
        _check_unique(shards)
        manifest = Manifest(spec for _, specs in shards for spec in specs)
        return cls(path, shards, manifest, config_path)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` in the manifest's order.

        Tensors are on the CPU and backed by a private mapping of the file: pages are read when they
        are touched, writing to a tensor changes no file, and the file must not shrink meanwhile.

        Raises:
            CheckpointError: a file went away or its header changed since `open`.
        """
        for file, specs in self.shards:
            with _opened(file) as handle:
                for spec in specs:
                    try:
                        tensor = handle.get_tensor(spec.name)
                    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
                        raise CheckpointError(
                            f"{file}: can't read tensor {spec.name!r}: {error}"
                        ) from None
                    found = TensorSpec(spec.name, str(tensor.dtype), tuple(tensor.shape))
                    if found != spec:
                        raise CheckpointError(
                            f"{file}: changed since it was opened: tensor {spec.name!r} was "
                            f"{spec.dtype} {spec.shape}, is {found.dtype} {found.shape}"
                        )
                    yield spec.name, tensor

    def __len__(self) -> int:
        return len(self.manifest)


def _files_of_folder(folder: Path) -> tuple[list[Path], dict[Path, list[str]]]:
    """The shards of a folder and, where there is an index, the tensors it says are in each."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE], {}
    if (folder / INDEX_FILE).exists():
        required = _read_index(folder / INDEX_FILE)
        return sorted(required), required
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds no *.safetensors file")
    return files, {}


def _read_index(index: Path) -> dict[Path, list[str]]:
    try:
        document = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index}: can't be read as JSON: {error}") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: has no "weight_map" object with entries')
    required: dict[Path, list[str]] = {}
    for tensor, shard in weight_map.items():
        # The index comes from outside: it may name files of its own folder and no others.
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or shard in ("", ".."):
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is mapped to {shard!r}, which is not a plain file name"
            )
        required.setdefault(index.parent / shard, []).append(tensor)
    for shard, tensors in required.items():
        if not shard.is_file():
            raise CheckpointError(
                f"{index}: shard {shard.name!r} is missing; it should hold {len(tensors)} tensors, "
                f"the first is {tensors[0]!r}"
            )
    return required


def _opened(file: Path, framework: str = "pt") -> Any:
    """A safetensors handle as a context manager; the library checks the header as it opens."""
    if not file.is_file():
        reason = "is not a regular file" if file.exists() else "no such file"
        raise CheckpointError(f"{file}: {reason}")
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file}: the file is empty")
        return safe_open(file, framework=framework, device="cpu")
    except RuntimeError as error:  # torch's, from mapping the file
        raise CheckpointError(f"{file}: can't be mapped into memory: {error}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a valid safetensors file (corrupt or truncated): {error}"
            f"{_unknown_dtypes(file)}"
        ) from None


def _read_header(file: Path) -> tuple[TensorSpec, ...]:
    # For torch safetensors maps the whole file writably, which the system refuses for a file larger
    # than its memory; for numpy it doesn't, and importing numpy is ten times as fast.
    framework = "numpy" if importlib.util.find_spec("numpy") else "pt"
    specs = []
    with _opened(file, framework) as handle:
        for name in sorted(handle.keys()):
            entry = handle.get_slice(name)
            dtype = entry.get_dtype()
            if dtype not in _DTYPES:
                raise ManifestError(
                    f"{file}: tensor {name!r} has dtype {dtype!r}, which is not supported; known: "
                    f"{', '.join(_DTYPES)}"
                )
            try:
                specs.append(TensorSpec(name, _DTYPES[dtype], tuple(entry.get_shape())))
            except ManifestError as error:
                raise ManifestError(f"{file}: {error}") from None
    if not specs:
        raise CheckpointError(f"{file}: holds no tensors")
    return tuple(specs)


def _unknown_dtypes(file: Path) -> str:
    """Which tensors have a dtype that safetensors refused; its own message doesn't say."""
    limit = 100_000_000  # safetensors' own cap on a header
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size)) if size <= limit else {}
        names = [
            f"{name!r} ({entry['dtype']})"
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] not in _DTYPES
        ]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return ""
    return f"; tensors with an unsupported dtype: {', '.join(names[:10])}" if names else ""


def _check_index(
    required: dict[Path, list[str]], shards: tuple[tuple[Path, tuple[TensorSpec, ...]], ...]
) -> None:
    for file, specs in shards:
        absent = set(required.get(file, ())) - {spec.name for spec in specs}
        if absent:
            raise CheckpointError(
                f"{file}: the index says that it holds {min(absent)!r}, but it doesn't "
                f"({len(absent)} tensors are absent)"
            )


def _check_unique(shards: tuple[tuple[Path, tuple[TensorSpec, ...]], ...]) -> None:
    owner: dict[str, Path] = {}
    for file, specs in shards:
        for spec in specs:
            if spec.name in owner:
                raise CheckpointError(
                    f"tensor {spec.name!r} is in two files: {owner[spec.name]} and {file}"
                )
            owner[spec.name] = file
