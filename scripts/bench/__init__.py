"""The parts of compare.py: workloads, engines and their servers, rounds, report."""
