"""Runs one model on several devices: a process for each, which is a rank, and one scheduler, in rank 0.

Rank 0 sends every plan to the others and computes its own part of it; what they exchange is in `groups`.
"""
