"""The benchmarks: cases scale as documented, runs are checked and complete, the report follows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.bars import compute_bars
from benchmarks.cases import CASES, Case, load_case, parse_size
from benchmarks.content import Content, poison
from benchmarks.machine import without_paths
from benchmarks.measure import Measurement, percentile_95, row
from benchmarks.run import Results, run_cases
from benchmarks.world import World, WorldFailure, run_world
from packedcomm.planning.model_shapes import model_shape

ROOT = Path(__file__).resolve().parents[2]
ROW_KEYS = {
    "suite", "case", "world", "way", "family", "tensors", "nbytes", "median_us", "p95_us",
    "algbw_gb_s", "busbw_gb_s", "limit", "fraction_of_limit", "repeats", "wrong",
}  # fmt: skip


def run_benchmarks(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", "--cases", "minilm", "--max-bytes", "16MB"]
    return subprocess.run(
        [*command, "--worlds", "2", "--repeats", "3", "--out", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder with the JSON of one tiny run, and what the run printed."""
    folder = tmp_path_factory.mktemp("results")
    process = run_benchmarks(folder / "cpu-test.json")
    assert process.returncode == 0, process.stdout + process.stderr
    return folder, process.stdout


# Cases.


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


def test_percentile_95_is_a_measured_value() -> None:
    assert percentile_95([3.0, 1.0, 2.0]) == 3.0
    assert percentile_95(list(range(1, 101))) == 95


def test_paths_in_messages_are_cut() -> None:
    assert without_paths("File '/home/someone/x.py': 3 GB/s") == "File 'x.py': 3 GB/s"


# Worlds.


def _fail_on_rank_1(world: World) -> None:
    world.progress("some way")
    world.result(world.total(world.rank + 1))
    if world.rank == 1:
        raise ValueError("on purpose")
    world.barrier()


def test_a_failing_rank_ends_its_world_and_names_the_way() -> None:
    *results, failure = run_world(_fail_on_rank_1, 2, "cpu", (), silence_s=60)
    assert results == [3]
    assert failure == WorldFailure("some way", "rank 1: ValueError: on purpose")


def _fail_in_one_way(
    world: World, cases: tuple[Case, ...], excluded: dict[str, frozenset[str]]
) -> None:
    for case in cases:
        for way in ("good", "bad"):
            if way in excluded.get(case.name, frozenset()):
                continue
            world.progress(way)
            if way == "bad" and case.name == "minilm":
                raise MemoryError("in /some/where.py")
        measurement = Measurement("good", [1.0])
        world.result((case.name, [row("other", case.name, 1, 1, 1, "good", measurement)]))


def test_a_failing_way_is_recorded_and_the_rest_still_measured(tmp_path: Path) -> None:
    results = Results(tmp_path / "result.json", {})
    cases = [load_case("qwen3-0.6b"), load_case("minilm"), load_case("llama-3-8b")]
    run_cases(_fail_in_one_way, 1, cases, rest=(), results=results, device="cpu", silence_s=60)
    document = json.loads(results.path.read_text())
    assert [entry["case"] for entry in document["rows"]] == ["qwen3-0.6b", "minilm", "llama-3-8b"]
    (failure,) = document["failures"]
    assert (failure["case"], failure["way"]) == ("minilm", "bad")
    assert failure["error"] == "rank 0: MemoryError: in where.py"
    assert not results.succeeded


# A whole run.


def test_a_run_gives_complete_json(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    text = (folder / "cpu-test.json").read_text()
    document = json.loads(text)
    rows = document["rows"]
    assert {line["suite"] for line in rows} == {"pack", "apply", "broadcast"}
    for line in rows:
        assert set(line) == ROW_KEYS
        assert line["wrong"] == 0
        assert line["repeats"] == 3
        assert 0 < line["median_us"] <= line["p95_us"]
        assert line["way"] in printed
    families = {line["family"] for line in rows if line["suite"] == "broadcast"}
    assert families >= {
        "packedcomm native",
        "packedcomm vLLM format",
        "per tensor",
        "raw broadcast",
    }
    assert {line["limit"] for line in rows if line["family"] == "per tensor"} == {"raw broadcast"}
    assert document["machine"]["torch"] == torch.__version__
    assert [case["kept"] < 1 for case in document["cases"]] == [True, True]
    assert document["failures"] == []


def test_a_result_has_no_hostname_and_no_absolute_path(finished: tuple[Path, str]) -> None:
    import socket

    folder, _ = finished
    text = (folder / "cpu-test.json").read_text()
    assert str(ROOT) not in text
    assert str(folder) not in text
    assert f'"{socket.gethostname()}"' not in text


def test_bars_are_computed_from_the_rows_of_the_run(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    document = json.loads((folder / "cpu-test.json").read_text())
    raw = next(bar for bar in document["bars"] if "minilm" in bar["bar"] and "raw" in bar["bar"])
    rows = {line["way"]: line for line in document["rows"] if line["suite"] == "broadcast"}
    ratio = rows[raw["ours"]]["algbw_gb_s"] / rows["raw broadcast"]["algbw_gb_s"]
    assert raw["measured"] == pytest.approx(ratio, abs=1e-3)
    assert raw["met"] == (ratio >= raw["required"])
    assert raw["bar"] in printed
    assert [bar["met"] for bar in document["bars"] if "LoRA" in bar["bar"]] == [None]


def test_a_wrong_way_never_meets_a_bar(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    rows: list[dict[str, Any]] = json.loads((folder / "cpu-test.json").read_text())["rows"]
    damaged = [line | {"wrong": 1} for line in rows]
    assert all(bar["met"] is None for bar in compute_bars("cpu", [2], damaged))


def test_a_corrupted_way_is_reported_wrong_and_fails_the_run(tmp_path: Path) -> None:
    out = tmp_path / "cpu-test.json"
    process = run_benchmarks(
        out, "--suite", "broadcast", "--repeats", "1", "--corrupt", "per tensor"
    )
    assert process.returncode == 1, process.stdout + process.stderr
    wrong = {line["way"]: line["wrong"] for line in json.loads(out.read_text())["rows"]}
    # One byte on one rank, in the check before and in the check after the timed runs.
    assert wrong.pop("per tensor") == 2
    assert set(wrong.values()) == {0}


# Report.


def test_the_report_writes_tables_that_its_check_accepts(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    readme, chart = tmp_path / "README.md", tmp_path / "benchmark.svg"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(finished[0]), "--readme", str(readme), "--chart", str(chart)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| minilm" in text
    first = chart.read_bytes()
    assert b"<svg" in first
    assert report.main(arguments) == 0
    assert chart.read_bytes() == first


def test_the_report_refuses_a_readme_without_markers(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert report.main(["--results", str(finished[0]), "--readme", str(readme)]) == 1
    assert report.BEGIN in capsys.readouterr().err
