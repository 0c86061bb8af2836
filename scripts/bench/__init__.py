"""The parts of compare.py and bench_serve.py: workloads, client, engines and their servers, report."""
