"""Cases, contents and statistics of the benchmarks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import (
    CASES,
    EXPERTS,
    TINY_EXPERTS,
    load_case,
    parse_size,
    tiny_experts,
)
from benchmarks.content import Content, poison
from benchmarks.machine import without_paths
from benchmarks.measure import percentile_95
from benchmarks.memory_passes import reference_digest
from packedcomm.planning.model_shapes import model_shape


@pytest.mark.parametrize("name", CASES)
def test_a_case_without_a_limit_is_the_whole_model(name: str) -> None:
    case = load_case(name)
    assert case.manifest == model_shape(name)
    assert case.as_dict()["kept"] == 1


def test_a_limit_drops_whole_layers_from_the_last_one() -> None:
    whole = model_shape("llama-3-8b")
    case = load_case("llama-3-8b", max_bytes=4_000_000_000)
    kept = {spec.name for spec in case.manifest.specs}
    assert case.manifest.nbytes <= 4_000_000_000
    assert set(case.manifest.specs) < set(whole.specs)
    assert "model.embed_tokens.weight" in kept
    layers = {int(name.split(".")[2]) for name in kept if ".layers." in name}
    assert layers == set(range(len(layers)))
    per_layer = [s.name for s in whole.specs if s.name.startswith("model.layers.0.")]
    assert len(kept) == 3 + len(layers) * len(per_layer)


def test_a_limit_below_the_embeddings_keeps_layers_only() -> None:
    case = load_case("llama-3-8b", max_bytes=1_000_000_000)
    assert {spec.name.split(".")[2] for spec in case.manifest.specs} == {"0", "1"}


def test_scale_is_a_fraction_of_the_models_bytes() -> None:
    case = load_case("qwen3-30b-a3b-experts", scale=0.25)
    assert len(case.manifest) == 18_432 // 4
    assert case.as_dict()["kept"] == 0.25


def test_of_a_layer_of_experts_whole_experts_are_kept() -> None:
    case = load_case("qwen3-30b-a3b-experts", max_bytes=100_000_000)
    assert [spec.name.split(".")[5] for spec in case.manifest.specs[::3]] == [
        str(expert) for expert in range(10)
    ]
    assert len(case.manifest) == 30


def test_tiny_experts_are_all_tensors_of_the_model_in_256_bytes_each() -> None:
    case, model = tiny_experts(), model_shape(EXPERTS)
    assert case.name == TINY_EXPERTS
    assert list(case.manifest.by_name) == list(model.by_name)
    assert {spec.nbytes for spec in case.manifest.specs} == {256}
    for tiny, whole in zip(case.manifest.specs, model.specs, strict=True):
        assert (tiny.shape[0] < tiny.shape[1]) == (whole.shape[0] < whole.shape[1])


def test_a_limit_below_one_layer_is_refused_with_its_size() -> None:
    with pytest.raises(ValueError, match=r"one layer or expert has 436,224,000 bytes"):
        load_case("llama-3-8b", max_bytes=1 << 20)


@pytest.mark.parametrize("scale", [0, -1, 1.5])
def test_a_scale_outside_of_0_to_1_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        load_case("minilm", scale=scale)


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("8MiB", 8 << 20), ("1.5GB", 1_500_000_000), ("2k", 2000)]
)
def test_sizes_are_read_with_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "0", "1XB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


# Content and statistics.


def test_content_finds_every_wrong_byte() -> None:
    content = Content(torch.device("cpu"))
    tensors = [torch.empty(1000, dtype=torch.bfloat16), torch.empty(3, 7)]
    content.write(tensors)
    assert content.count_wrong(tensors) == 0
    tensors[1].view(torch.uint8)[2, 5] ^= 4
    assert content.count_wrong(tensors) == 1
    assert content.count_wrong(tensors[::-1]) > 0
    poison(tensors)
    assert content.count_wrong(tensors) > 2000


def test_content_is_the_same_in_every_process() -> None:
    first, second = (torch.empty(5000, dtype=torch.uint8) for _ in range(2))
    Content(torch.device("cpu")).write([first])
    Content(torch.device("cpu")).write([second])
    assert torch.equal(first, second)


def test_content_can_be_written_from_any_number_on() -> None:
    content = Content(torch.device("cpu"))
    tensors = [torch.empty(100, dtype=torch.uint8) for _ in range(5)]
    content.write(tensors[:2])
    content.write(tensors[2:], 2)
    assert content.count_wrong(tensors) == 0


@pytest.mark.parametrize("nbytes", [0, 1, 8, 1001])
def test_the_digests_that_are_compared_with_are_as_documented(nbytes: int) -> None:
    data = torch.arange(nbytes).to(torch.uint8)
    most, gamma = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def scramble(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & most
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & most
        return x ^ (x >> 31)

    expected = scramble((nbytes + gamma) & most)
    for index in range(-(-nbytes // 8)):
        word = int.from_bytes(bytes(data[index * 8 : index * 8 + 8].tolist()), "little")
        expected += scramble(word ^ ((index + 1) * gamma & most))
    assert int(reference_digest(data)) & most == expected & most


def test_percentile_95_is_a_measured_value() -> None:
    assert percentile_95([3.0, 1.0, 2.0]) == 3.0
    assert percentile_95(list(range(1, 101))) == 95


def test_paths_in_messages_are_cut() -> None:
    assert without_paths("File '/home/someone/x.py': 3 GB/s") == "File 'x.py': 3 GB/s"
