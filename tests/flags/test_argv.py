"""The command line before Typer reads it: spellings, lists and JSON."""

from __future__ import annotations

import re

import pytest
from cli_case import error_line

from microvllm.openai_compat.flags.argv import UsageError, normalise_argv
from microvllm.runtime.options.flag import human_int

OWN = {
    "--model": "value",
    "--port": "value",
    "--names": "list",
    "--object": "json",
    "--eager": "switch",
    "--no-eager": "switch",
    "-h": "switch",
    "-r": "value",
    "--ignore-unsupported-flags": "switch",
}


def normalise(*argv: str) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    return normalise_argv(argv, OWN, warnings.append), warnings


class TestNormalise:
    @pytest.mark.parametrize(
        ("argv", "expected"),
        [
            (["m", "--port", "1"], ["m", "--port=1"]),
            (["--port=1", "m"], ["--port=1", "m"]),
            (["--no_eager"], ["--no-eager"]),
            (["--port", "-1"], ["--port=-1"]),
            (["--port", "-1.5k"], ["--port=-1.5k"]),
            (["--model", "-a b"], ["--model=-a b"]),
            (["--model=a=b_c"], ["--model=a=b_c"]),
            (["--model={{ a }} b"], ["--model={{ a }} b"]),
            (["--model="], ["--model="]),
            (["--names", "a", "b", "--port", "1", "m"], ["--names=a", "--names=b", "--port=1", "m"]),
            (["--names=a", "b"], ["--names=a", "--names=b"]),
            (["--", "--unknown"], ["--", "--unknown"]),
            (["--help=all"], ["--help"]),
            (["-h"], ["-h"]),
            (["-r", "a b", "-r=-c"], ["-r", "a b", "-r", "-c"]),
            (["-dcp", "1"], []),
            (["--nnodes=1", "-pp=1", "-asc", "1"], []),
            (["--object", '{"a": 1}'], ['--object={"a": 1}']),
            (["--object.top_p", "0.5"], ['--object={"top_p": 0.5}']),
            (["--object.a.b=x", "--object.a.c", "[1]", "m"], ["m", '--object={"a": {"b": "x", "c": [1]}}']),
            (["--object", '{"a": 1, "b": 2}', "--object.a", "3"], ['--object={"a": 3, "b": 2}']),
            (["--object.a", "1", "--", "--x"], ['--object={"a": 1}', "--", "--x"]),
        ],
    )
    def test_own_flags(self, argv: list[str], expected: list[str]) -> None:
        assert normalise_argv(argv, OWN | {"--help": "switch"}, pytest.fail) == expected

    @pytest.mark.parametrize(
        "argv",
        [
            ["--swap-space", "4"],
            ["--swap_space=4"],
            ["--no-enable-eplb"],
            ["--disable-eplb"],
            ["-O3"],
            ["-O", "2"],
            ["-O=2"],
            ["-cc", '{"mode": 3}'],
            ["-cc.mode", "3"],
            ["--compilation-config.pass_config.fuse=true"],
            ["--cudagraph-capture-sizes", "1", "2", "4"],
            ["-ep"],
            ["-dpa", "10.0.0.1"],
            ["-ac.backend", "FLASH_ATTN"],
            ["--hf-token"],
            ["--hf-token", "secret"],
            ["--hf-token=secret"],
        ],
    )
    def test_a_flag_of_vllm_without_effect_is_dropped_with_its_value(self, argv: list[str]) -> None:
        left, warnings = normalise("m", *argv, "--port", "1")
        assert left == ["m", "--port=1"]
        assert len(warnings) == 1 and "\n" not in warnings[0] and warnings[0].startswith("--")

    @pytest.mark.parametrize(
        ("argv", "problem"),
        [
            (["--prot", "1"], "unknown flag --prot, did you mean --port?"),
            (["--xyzzy"], "unknown flag --xyzzy"),
            (["-x"], "unknown flag -x"),
            (["--port"], "--port needs a value"),
            (["--port", "--eager"], "--port needs a value"),
            (["--eager=yes"], "--eager takes no value"),
            (["--names"], "--names needs a value"),
            (["--swap-space"], "--swap-space needs a value"),
            (["-pp", "2"], "--pipeline-parallel-size 2 (it would spread one model"),
            (["--pipeline_parallel_size=x"], "--pipeline-parallel-size x (it would spread"),
            (["-asc=0"], "--api-server-count 0 (it would answer from several API processes"),
            (["-n", "2"], "--nnodes 2 (it would spread"),
            (["-dcp", "2"], "--decode-context-parallel-size 2 (it would"),
            (["--object", "7"], "--object needs a JSON object, got '7'"),
            (["--object", "{a"], "--object needs a JSON object, got '{a'"),
            (["--object.a"], "--object.a needs a value"),
            (["--model.a", "1"], "unknown flag --model.a"),
        ],
    )
    def test_wrong_flags(self, argv: list[str], problem: str) -> None:
        with pytest.raises(UsageError, match=re.escape(problem)):
            normalise(*argv)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("4096", 4096), (" 8 ", 8), ("-1", -1)),
        *(
            ("1k", 1000),
            ("25.6k", 25600),
            ("4.35k", 4350),
            ("1.1m", 1_100_000),
            ("1g", 10**9),
            ("1t", 10**12),
        ),
        *(("1K", 1 << 10), ("2M", 2 << 20), ("3G", 3 << 30), ("1T", 1 << 40)),
    ],
)
def test_human_int(text: str, value: int) -> None:
    assert human_int(text) == value


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1.5K", "1kk", "1e3", "0x10", "1.0001k", "nan", "inf", "²", "1 k"]
)
def test_not_a_human_int(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "serve", "m", f"--max-num-batched-tokens={text}")
    assert "--max-num-batched-tokens" in line
