"""Makes `fakes` importable, which `--import-mode=importlib` does not; puts the longest files first."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (HERE, *HERE.iterdir()) if folder.is_dir()]

with suppress(ImportError):  # the tests for a GPU do without it
    from hypothesis import settings

    # A busy machine must not fail a test, nor the luck of a draw. `--hypothesis-profile explore` draws anew.
    settings.register_profile("patient", deadline=None, derandomize=True)
    settings.register_profile("explore", deadline=None)
    settings.load_profile("patient")

# The servers of the tests are on this machine: no proxy that the shell names is to be asked for them.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# What a shell starts in the background ignores interrupts, and so does all that it starts in turn; tests send
# interrupts to their own processes. What nohup starts ignores the end of the terminal, likewise.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# By time, from 200 seconds down to 15 of a processor, or more of waiting. The processes of a test run take
# whole files: what comes last must be short, or all but one wait for it.
LONGEST = (
    "test_models.py",
    "test_sanitizers.py",
    "test_stops.py",
    "test_process.py",
    "test_heartbeat.py",
    "test_state_machine.py",
    "test_ranks.py",
    "test_windows.py",
    "test_mutations.py",
    "test_sleep.py",
    "test_core.py",
    "test_cli.py",
    "test_replicas.py",
    "test_core_thread.py",
    "test_server_e2e.py",
    "test_cpu_attention.py",
    "test_proof_scripts.py",
    "test_overload.py",
    "test_weights.py",
    "test_openapi.py",
    "test_compare.py",
    "test_layers.py",
    "test_batch.py",
    "test_http_serve.py",
    "test_template_process.py",
    "test_compare_engines.py",
    "test_rank_faults.py",
    "test_bad_inputs.py",
    "test_page_browser.py",
    "test_quantized_folders.py",
    "test_examples.py",
)


# Each process of a test run collects everything. Every second one begins at the end, so that each compiles
# the files of one half, with pytest's own assertions, and finds the other half compiled.
BACKWARDS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2 == 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing that is imported or collected is ever freed, so that looking for garbage in it is in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if BACKWARDS and isinstance(collector, pytest.Directory):
        report.result.reverse()
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), str(item.path)))
