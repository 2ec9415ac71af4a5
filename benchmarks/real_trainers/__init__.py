"""The trainers that people run, started on this machine's CPU, and one list of checks for all.

``python -m benchmarks.real_trainers`` is the command; :mod:`benchmarks.real_trainers.__main__`
describes it.
"""
