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
from benchmarks.cases import (
    EXPERTS,
    Case,
    load_case,
)
from benchmarks.measure import Measurement, row
from benchmarks.profile_sync import Profile, growth_problems
from benchmarks.result_files import load_results
from benchmarks.run import Results, run_cases
from benchmarks.tables import render_tables
from benchmarks.world import World, WorldFailure, run_world

ROOT = Path(__file__).resolve().parents[2]
ROW_KEYS = {
    "suite", "case", "world", "way", "family", "tensors", "nbytes", "median_us", "p95_us",
    "algbw_gb_s", "busbw_gb_s", "limit", "fraction_of_limit", "repeats", "wrong", "host_us",
    "details",
}  # fmt: skip


def run_benchmarks(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--cases", "minilm", "--max-bytes", "16MB", "--worlds", "2", "--repeats", "3"]
    return run_module("benchmarks.run", *options, "--out", str(out), *arguments)


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
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


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the JSON of a short run of the experts suite."""
    folder = tmp_path_factory.mktemp("experts")
    options = ("--suite", "experts", "--cases", EXPERTS, "--repeats", "2")
    process = run_benchmarks(folder / "cpu-test.json", *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


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
    suites = {line["suite"] for line in rows}
    assert suites == {"pack", "apply", "digest", "cast", "broadcast", "sync"}
    for line in rows:
        assert set(line) == ROW_KEYS
        assert line["wrong"] == 0
        assert line["repeats"] == 3
        assert 0 < line["median_us"] <= line["p95_us"]
        assert 0 < line["host_us"] <= line["p95_us"]
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
    assert [case["kept"] < 1 for case in document["cases"]] == [True] * 4
    assert document["failures"] == []


def test_casts_and_plain_copies_count_what_is_read_and_written(
    finished: tuple[Path, str],
) -> None:
    document = json.loads((finished[0] / "cpu-test.json").read_text())
    (case,) = (entry for entry in document["cases"] if entry["suite"] == "cast")
    lines = [line for line in document["rows"] if line["suite"] == "cast"]
    assert {line["family"] for line in lines} == {
        "packedcomm BufferPlan",
        "packedcomm CopyPlan",
        "to, then pack",
        "foreach",
        "memcpy",
    }
    # All tensors are float32, of which half as many bytes are written as are read.
    assert {line["nbytes"] for line in lines} == {case["nbytes"] * 3 // 2}


def test_syncs_have_their_stages_their_overhead_and_the_memory_of_staging(
    finished: tuple[Path, str],
) -> None:
    rows = json.loads((finished[0] / "cpu-test.json").read_text())["rows"]
    lines = {line["way"]: line for line in rows if line["suite"] == "sync"}
    bare = lines.pop("bare broadcast")
    assert len(lines) == 6
    for way, line in lines.items():
        details = line["details"]
        assert line["limit"] == "bare broadcast"
        assert details["stages_us"].keys() >= {"agree", "wire", "verify", "commit", "total"}
        assert details["stages_us"]["total"] <= line["p95_us"]
        assert details["overhead_us"] == pytest.approx(line["median_us"] - bare["median_us"])
        if way.endswith(", verified"):
            plain = lines[way.removesuffix(", verified")]
            cost = line["median_us"] / plain["median_us"] - 1
            assert details["digest_cost"] == pytest.approx(cost, abs=1e-4)
        if "staged" in way:
            assert details["staging_bytes"] == details["staging_formula_bytes"] >= line["nbytes"]


def test_every_way_of_the_experts_suite_fills_the_fused_weights(experts: Path) -> None:
    document = json.loads((experts / "cpu-test.json").read_text())
    assert {line["family"]: line["wrong"] for line in document["rows"]} == {
        "packedcomm native": 0,
        "packedcomm vLLM format": 0,
        "copy_ per tensor": 0,
        "foreach, views made before": 0,
    }
    assert {line["tensors"] for line in document["rows"]} == {18_432}
    rows = {line["way"]: line["host_us"] for line in document["rows"]}
    (bar,) = (bar for bar in document["bars"] if bar["measured"] is not None)
    ours = min(rows["packedcomm native"], rows["packedcomm vLLM format"])
    assert bar["measured"] == pytest.approx(rows["copy_ per tensor"] / ours, abs=1e-3)


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


@pytest.mark.parametrize(
    ("suite", "way"),
    [
        ("cast", "packedcomm BufferPlan"),
        ("pack", "packedcomm DigestPlan"),
        ("sync", "sync staged, verified"),
    ],
)
def test_a_corrupted_cast_digest_or_sync_is_reported_wrong(
    tmp_path: Path, suite: str, way: str
) -> None:
    out = tmp_path / "cpu-test.json"
    process = run_benchmarks(out, "--suite", suite, "--repeats", "1", "--corrupt", way)
    assert process.returncode == 1, process.stdout + process.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {line["way"] for line in rows if line["wrong"]} == {way}


# Profile of later syncs.


def profile(tensors: int, calls: int, c_calls: int, host_us: float) -> Profile:
    return Profile("in place", "sender", tensors, calls, c_calls, host_us, "some.py:function 9")


def test_a_sync_whose_cost_does_not_depend_on_the_tensors_has_no_problem() -> None:
    profiles = [profile(5000, 403, 301, 900.0), profile(500, 400, 300, 500.0)]
    assert growth_problems(profiles) == []


@pytest.mark.parametrize(
    ("large", "problem"),
    [
        (profile(5000, 4900, 300, 500.0), "4500 more Python calls for 4,500 more tensors"),
        (profile(5000, 400, 9300, 500.0), "9000 more C calls"),
        (profile(5000, 400, 300, 90500.0), "90000 more microseconds"),
    ],
)
def test_what_grows_with_the_tensors_is_a_problem(large: Profile, problem: str) -> None:
    (text,) = growth_problems([profile(500, 400, 300, 500.0), large])
    assert text.startswith(f"in place, sender: {problem}")
    assert text.endswith("called most: some.py:function 9")


@pytest.fixture(scope="module")
def profiled() -> subprocess.CompletedProcess[str]:
    # So many that a few more looks at the other side, some dozens of calls each, are nothing per
    # tensor.
    return run_module("benchmarks.profile_sync", "--tensors", "60", "10000")


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_later_syncs_make_no_python_calls_per_tensor(
    profiled: subprocess.CompletedProcess[str], side: str
) -> None:
    lines = profiled.stdout.splitlines()
    assert sum(line.startswith("in place ") and side in line for line in lines) == 2
    assert [line for line in lines if line.startswith(f"FAILED: in place, {side}")] == []
    assert "arrived wrong" not in profiled.stdout


def test_later_verified_syncs_make_no_python_calls_per_tensor(
    profiled: subprocess.CompletedProcess[str],
) -> None:
    assert profiled.returncode == 0, profiled.stdout + profiled.stderr


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
    for title in ("Casting float32 to bfloat16", "Digests", "Syncs of a session"):
        assert title in text
    first = chart.read_bytes()
    assert b"<svg" in first
    assert report.main(arguments) == 0
    assert chart.read_bytes() == first


def test_the_report_has_the_host_time_of_the_experts(experts: Path) -> None:
    text = render_tables(load_results(experts))
    header, _, line = text.splitlines()[-3:]
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert cells["tensors"] == "18,432"
    rows = json.loads((experts / "cpu-test.json").read_text())["rows"]
    loop = next(row for row in rows if row["way"] == "copy_ per tensor")
    host, done = (float(text) for text in cells["copy_ per tensor"].rstrip(")").split(" ("))
    assert host == pytest.approx(loop["host_us"] / 1e3, rel=0.01)
    assert done == pytest.approx(loop["median_us"] / 1e3, rel=0.01)


def test_the_report_refuses_a_readme_without_markers(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert report.main(["--results", str(finished[0]), "--readme", str(readme)]) == 1
    assert report.BEGIN in capsys.readouterr().err
