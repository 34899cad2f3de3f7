"""The benchmark tables of README.md, in Markdown, from results."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import TINY_EXPERTS
from benchmarks.measure import Row
from benchmarks.result_files import Result

__all__ = ["render_tables"]

_BROADCAST_FAMILIES = (
    "packedcomm native",
    "packedcomm vLLM format",
    "vLLM packed",
    "vLLM packed, tuned",
    "per tensor",
    "grouped",
    "raw broadcast",
)
_PACK_FAMILIES = (
    "packedcomm CopyPlan",
    "packedcomm pack",
    "torch.cat",
    "foreach",
    "copy_ per tensor",
    "memcpy",
)
_PASS_FAMILIES = (
    "packedcomm BufferPlan",
    "packedcomm CopyPlan",
    "packedcomm DigestPlan",
    "to, then pack",
    "foreach",
    "memcpy",
)
_LIMITS = ("raw broadcast", "memcpy")
# The suite whose cases another one's rows are of.
_CASES_OF = {"apply": "pack", "digest": "pack"}
_EXPERT_WAYS = (
    "packedcomm native",
    "packedcomm vLLM format",
    "torch._foreach_copy_",
    "copy_ per tensor",
)


def render_tables(results: Sequence[Result]) -> str:
    """Markdown: for every machine the broadcasts, syncs, copies, casts and digests."""
    parts = [
        "GB/s of payload (10⁹ bytes), median; every way's result was compared bit by bit in the "
        "same run. packedcomm and tuned vLLM are shown at the fastest of the chunk sizes tried, "
        "packedcomm's ratios take the faster of its two formats, vLLM packed is at its default of "
        "1 GiB. One receiver means two GPUs or processes; p95 is in the JSON."
    ]
    for result in results:
        parts.append(f"### {result.title}\n\n{result.details}")
        for suite, text, families, ours, theirs in (
            (
                "broadcast",
                "Broadcast into the receivers' parameters",
                _BROADCAST_FAMILIES,
                ("packedcomm native", "packedcomm vLLM format"),
                "vLLM packed",
            ),
            ("pack", "Packing into one buffer", _PACK_FAMILIES, _PACK_FAMILIES[:1], "torch.cat"),
            (
                "apply",
                "Unpacking into parameters",
                _PACK_FAMILIES,
                _PACK_FAMILIES[:1],
                "copy_ per tensor",
            ),
            (
                "cast",
                "Casting float32 to bfloat16 while packing; bytes read and written both count",
                _PASS_FAMILIES,
                _PASS_FAMILIES[:2],
                "to, then pack",
            ),
            (
                "digest",
                "Digests of every tensor; bytes read and written both count",
                _PASS_FAMILIES,
                _PASS_FAMILIES[2:3],
                "",
            ),
        ):
            if result.groups(suite):
                parts.append(f"**{text}**\n\n{_table(result, suite, families, ours, theirs)}")
        if result.groups("experts"):
            parts.append(
                "**Applying expert tensors to fused weights**, milliseconds until the call returns "
                f"(and until the work is done)\n\n{_experts_table(result)}"
            )
        if result.groups("sync"):
            parts.append(
                "**Syncs of a session**, milliseconds; agreeing, comparing digests and committing "
                "are of the verified sync in place, the cost of digests is what a verified sync "
                "takes longer, staging is memory of one receiver\n\n"
                f"{_sync_table(result)}"
            )
    return "\n\n".join(parts)


def _table(
    result: Result, suite: str, known: Sequence[str], ours: Sequence[str], theirs: str
) -> str:
    families = result.families(suite, known)
    limit = next((family for family in families if family in _LIMITS), None)
    receivers = ["1 to"] if suite == "broadcast" else []
    header = ["model", "tensors", "GB", *receivers, *families]
    header += [f"packedcomm / {theirs}"] if theirs else []
    header += [f"of {limit}"] if limit else []
    lines = []
    for case, world in result.groups(suite):
        speeds = {family: result.best(suite, case, world, family) for family in families}
        some = next(row for row in speeds.values() if row is not None)
        best = max(_speed(speeds.get(family)) for family in ours)
        cells = [
            _model(result, suite, case),
            f"{some['tensors']:,}",
            f"{some['nbytes'] / 1e9:.3g}",
        ]
        cells += [str(world - 1)] if suite == "broadcast" else []
        cells += [_number(_speed(speeds[family])) for family in families]
        cells += [_ratio(best, _speed(speeds.get(theirs)))] if theirs else []
        if limit:
            cells.append(_ratio(best, _speed(speeds[limit])))
        lines.append(cells)
    return _markdown(header, lines)


def _experts_table(result: Result) -> str:
    header = ["model", "tensors", "GB", *_EXPERT_WAYS, "host time, copy_ per tensor / packedcomm"]
    lines = []
    for case, world in result.groups("experts"):
        ways = result.ways("experts", case, world)
        some = next(iter(ways.values()))
        host = {name: row["host_us"] / 1e3 for name, row in ways.items()}
        done = {name: row["median_us"] / 1e3 for name, row in ways.items()}
        cells = [
            _model(result, "experts", case),
            f"{some['tensors']:,}",
            f"{some['nbytes'] / 1e9:.3g}",
        ]
        cells += [
            f"{_number(host[name])} ({_number(done[name])})" if name in host else "-"
            for name in _EXPERT_WAYS
        ]
        ours = min((host[name] for name in _EXPERT_WAYS[:2] if name in host), default=0.0)
        cells.append(_ratio(host.get("copy_ per tensor", 0.0), ours))
        lines.append(cells)
    return _markdown(header, lines)


def _sync_table(result: Result) -> str:
    ways = list(dict.fromkeys(row["way"] for row in result.rows if row["suite"] == "sync"))
    stages = ("agree", "verify", "commit")
    verified = [way for way in ways if way.endswith(", verified")]
    plain = [way.removesuffix(", verified") for way in verified]
    costs = [f"digests {way.removeprefix('sync ')}" for way in plain]
    header = ["model", "GB", "1 to", *ways, *costs, *stages, "staging GB", "of its formula"]
    lines = []
    for case, world in result.groups("sync"):
        rows = result.ways("sync", case, world)
        some = next(iter(rows.values()))
        cells = [_model(result, "sync", case), f"{some['nbytes'] / 1e9:.3g}", str(world - 1)]
        cells += [_number(rows[way]["median_us"] / 1e3) if way in rows else "-" for way in ways]
        pairs = [(rows.get(a), rows.get(b)) for a, b in zip(verified, plain, strict=True)]
        cells += [
            f"{a['median_us'] / b['median_us'] - 1:+.1%}" if a and b else "-" for a, b in pairs
        ]
        in_place = rows.get("sync in place, verified", {"details": {}})["details"]
        spent = in_place.get("stages_us", {})
        cells += [_number(spent.get(stage, 0.0) / 1e3) for stage in stages]
        staged = rows.get("sync staged", {"details": {}})["details"]
        taken, formula = (
            staged.get(name, 0) for name in ("staging_bytes", "staging_formula_bytes")
        )
        cells += [_number(taken / 1e9), _ratio(taken, formula)]
        lines.append(cells)
    return _markdown(header, lines)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _model(result: Result, suite: str, case: str) -> str:
    kept = result.kept(_CASES_OF.get(suite, suite), case)
    # What isn't made of whole layers of the model has a name that says so.
    if kept == 1 or case == TINY_EXPERTS:
        return case
    return f"{case}, {kept:.0%} of its bytes"


def _cost(verified: Row | None, plain: Row | None) -> str:
    if verified is None or plain is None:
        return "-"
    return f"{verified['median_us'] / plain['median_us'] - 1:+.1%}"


def _speed(row: Row | None) -> float:
    return row["algbw_gb_s"] if row else 0.0


def _number(value: float) -> str:
    if not value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else "-"
