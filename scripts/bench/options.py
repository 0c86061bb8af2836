"""Defines the options of compare.py that change a workload, and the argparse types of the scripts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from bench.workloads import WORKLOADS, Sizes
from microvllm.openai_compat.bench.workloads import Span


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def positive_float(text: str) -> float:
    """An argparse type: a number above 0, perhaps `inf`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values separated by commas."""

    def parse_list(text: str) -> list[Any]:
        return [parse(part) for part in text.split(",")]

    return parse_list


def workload(text: str) -> str:
    """An argparse type: the name of a workload."""
    if text not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(WORKLOADS)}")
    return text


def span(text: str) -> Span:
    """An argparse type: `128`, or `128-512`, from which lengths are drawn uniformly."""
    low, dash, high = text.partition("-")
    result = Span(positive_int(low), positive_int(high if dash else low))
    if result.high < result.low:
        raise argparse.ArgumentTypeError(f"{text!r} ends below its beginning")
    return result


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that change a workload; `sizes_of` reads them."""
    group = parser.add_argument_group("sizes", "in place of a workload's own")
    group.add_argument("--requests", type=positive_int, metavar="N", help="requests, or users of a chat")
    group.add_argument(
        "--streams", type=list_of(positive_int), metavar="LIST", help="requests at a time, such as 1,8"
    )
    group.add_argument(
        "--request-rate",
        type=list_of(positive_float),
        metavar="LIST",
        help="requests a second of an open loop, such as 0.5,1,2",
    )
    group.add_argument(
        "--burstiness", type=positive_float, default=1.0, help="1: a Poisson process; less: in bursts"
    )
    group.add_argument("--input-len", type=span, metavar="N[-M]", help="tokens of a prompt")
    group.add_argument("--output-len", type=span, metavar="N[-M]", help="tokens of an answer")


def sizes_of(args: argparse.Namespace, *, quick: bool, seed: int = 0) -> Sizes:
    """The sizes of a command line with the options of `add_sizes`."""
    return Sizes(
        quick=quick,
        streams=args.streams,
        request_rates=args.request_rate,
        requests=args.requests,
        input_len=args.input_len,
        output_len=args.output_len,
        burstiness=args.burstiness,
        seed=seed,
    )
