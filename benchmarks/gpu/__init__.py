"""Measures real GPUs: training runs, as `ftplan validate` reads them, and a card's ceilings.

`python -m benchmarks.gpu --minutes 30 --out DIR`. The parent process chooses what to run and never
loads torch; each run is a process of its own.
"""
