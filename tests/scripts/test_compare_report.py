"""The comparison of engines: the report, the plots and the floor."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from bench import floor, plots, report
from bench.rounds import Row
from bench.workloads import Case
from compare_case import ONE, request_result, row

from microvllm.openai_compat.bench.client import BenchError, Measured

OPEN = Case("sweep", "2 requests/s", ((10, 10),), request_rate=2.0)
FACTS = {
    "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "gpus": [], "system": "Linux", "load": 0.5},
    "date": "today", "model": "m", "rounds": 3, "remark": ", small", "command": "python compare.py",
    "left_out": {"vllm": "not found"},
    "no_time": [],
}  # fmt: skip
GOLDEN = """\
A CPU, 2 cores (avx2), Linux, load 0.5 beforehand, today.
m, greedy; median (least to most) of 3 rounds, small.
`python compare.py`

| workload | engine | tokens/s | ours is | first token, p50 (p99) | each further token | whole request |
|---|---|---|---|---|---|---|
| streams, 1 stream | ours (float32) | 30.0 (10.0 to 40.0) |  | 167 (493) ms | 18.5 (54.8) ms | 333 (987) ms |
|  | other (float32) | 10.0 (5.0 to 10.0) | 3.00 (2.00 to 4.00) x as fast | 500 (990) ms | 55.6 (110.0) ms \
| 1,000 (1,980) ms |

| engine | weights | version | ready after | memory | CPU when idle | |
|---|---|---|---|---|---|---|
| ours | float32 | 1.0 | 1.5 s | 0.70 GB | 1 % | `x` |
| other | float32 | 1.0 | 1.5 s | 0.70 GB | 1 % | `x` |

* streams, 1 stream: 1 requests a round, 10 tokens in, 10 out

The client took at most 4 % of a core.

Left out: vllm: not found."""


def test_the_report_is_this_one_and_ratios_are_taken_within_a_round() -> None:
    rows = [row("ours", 10, 40, 30), row("other", 5, 10, 10)]
    assert report.markdown(rows, [ONE], FACTS) == GOLDEN
    sampled = report.markdown(rows, [ONE], {**FACTS, "temperature": 0.7})
    assert sampled == GOLDEN.replace("greedy", "temperature 0.7")


def test_quantised_weights_are_compared_with_quantised_ones() -> None:
    rows = [row("ours", 40), row("ours 16", 20), row("theirs", 20), row("theirs 16", 20)]
    for each, kind, quantized in zip(rows, ("a", "a", "b", "b"), (True, False, True, False), strict=True):
        each.engine = replace(each.engine, kind=kind, quantized=quantized)
    ratios = [line.split("|")[4].strip() for line in report.markdown(rows, [ONE], FACTS).splitlines()[6:10]]
    assert ratios == ["", "", "2.00 x as fast", "1.00 x as fast (float32)"]


def test_an_open_loop_is_compared_by_the_time_of_a_request_and_a_prefill_by_its_prompts() -> None:
    text = report.markdown([row("ours", 20, case=OPEN), row("other", 5, case=OPEN)], [OPEN], FACTS)
    assert "4.00 x as fast" in text
    prefill = Case("prefill1000", "1 stream", ((1000, 1),), concurrency=1)
    text = report.markdown([row("ours", 20, case=prefill)], [prefill], FACTS)
    assert "| 20.0 in |" in text


def test_throughput_kept_beside_a_busy_neighbour_errors_and_caches() -> None:
    busy = Case("streams", "1 stream", ((10, 10),), concurrency=1, busy=True)
    one = row("ours", 40, 50, 60)
    one.reports[busy] = row("", 20, 20, 45).reports[ONE]
    text = report.markdown([one], [ONE, busy], FACTS)
    assert "| ours (float32) | 0.50 (0.40 to 0.75) |" in text
    one.reports[ONE].append(Measured([request_result(1, 1, 3, "3 tokens in place of 10")], 1.0, 0.0))
    assert "Error with ours (float32): 3 tokens in place of 10" in report.markdown([one], [ONE], FACTS)
    chat = Case("chat", "2 users", ((10, 10),), turns=2)
    talk = row("ours", 10, case=chat)
    talk.requests(chat)[0].cached_tokens = 9
    assert "taken from the prefix cache: ours 90 %." in report.markdown([talk], [chat], FACTS)


def test_each_result_is_in_the_form_of_vllms_client() -> None:
    result = report.as_json([row("ours", 10, 40)], [ONE], FACTS, detailed=False)
    assert [(each["label"], each["round"]) for each in result["results"]] == [("ours", 1), ("ours", 2)]
    assert [each["output_throughput"] for each in result["results"]] == [10.0, 40.0]
    assert "itls" not in result["results"][0]
    json.dumps(result, allow_nan=False)


def test_plots_are_drawn_for_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = Case("streams", "2 streams", ((10, 10),) * 2, concurrency=2)
    fast = Case("sweep", "4 requests/s", ((10, 10),), request_rate=4.0)
    one = row("ours", 10, 20)
    for case in (two, OPEN, fast):
        one.reports |= row("", 10, 30, case=case).reports
    files = plots.draw([one, row("other", 5)], [ONE, two, OPEN, fast], tmp_path)
    assert [file.name for file in files] == ["throughput.png", "latency.png", "sweep.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    failed = Measured([request_result(0, 0, 0, "refused")], 1.0, 0.0)
    none = Row(one.engine, reports={case: [failed] for case in (ONE, two, OPEN, fast)})
    files = plots.draw([none], [ONE, two, OPEN, fast], tmp_path)
    assert [file.name for file in files] == ["throughput.png"], "no times to draw"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match="pip install matplotlib"):
        plots.draw([one], [ONE], tmp_path)


CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}


def test_bytes_of_a_real_model() -> None:
    assert floor.weight_bytes(CONFIG) == pytest.approx(1.19e9, rel=0.01)
    assert floor.kv_bytes(CONFIG) == 114_688


def test_the_floor_counts_every_read_once() -> None:
    """Against a loop over all steps and sequences."""
    one = floor.Floor(1000, 10, 2.0)
    inputs, outputs = [10, 3, 7], [4, 9, 1]
    read = (max(outputs) - 1) * 1000
    for before, after in zip(inputs, outputs, strict=True):
        read += sum(before + token for token in range(1, after)) * 10
    assert one.seconds(inputs, outputs, 3) == pytest.approx(read / 2)
    # One after the other, no step is shared.
    alone = sum(one.seconds([i], [o], 1) for i, o in zip(inputs, outputs, strict=True))
    assert one.seconds(inputs, outputs, 1) == pytest.approx(alone)


def test_the_read_rate_is_that_of_the_gpu_or_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = floor.Floor.of(tmp_path, ["NVIDIA H200, 580.159"])
    assert found == floor.Floor(floor.weight_bytes(CONFIG), 114_688, 4.594e12)
    assert floor.Floor.of(tmp_path, ["NVIDIA L4"]) is None, "nobody has measured that one"
    given = floor.Floor.of(tmp_path, ["NVIDIA L4"], 0.3e12)
    assert given is not None and given.bytes_s == 0.3e12
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_experts": 8}))
    assert floor.Floor.of(tmp_path, ["NVIDIA H200"]) is None
    for kinds, known in ((["full_attention"], True), (["full_attention", "sliding_attention"], False)):
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "layer_types": kinds}))
        assert (floor.Floor.of(tmp_path, ["NVIDIA H200"]) is not None) == known
