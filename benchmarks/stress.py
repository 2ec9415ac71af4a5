"""64 threads and 64 asyncio tasks share one service client over 8 models, for as long as you like.

    python -m benchmarks.stress [--seconds 30] [--threads 64] [--tasks 64] [--models 8]

Needs the ``test`` extra, in a clone of the repository. The trainer is the tests' double on a
socket, whose every answer belongs to one question; each member of the crowd checks that it gets its
own. Ends with status 1 if there was an error, if a future outlives the run, or if the memory in use
grew by more than a tenth after the first third of the run.
"""

from __future__ import annotations

import argparse
import traceback

from tests.client.stress import stress


def main() -> int:
    """Run, and print how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--models", type=int, default=8)
    options = parser.parse_args()
    report = stress(
        options.seconds, threads=options.threads, tasks=options.tasks, models=options.models
    )
    print(report)
    for error in report.errors[:3]:
        traceback.print_exception(error)
    flat = report.end <= 1.1 * report.warm
    return int(bool(report.errors or report.futures_left or not flat))


if __name__ == "__main__":
    raise SystemExit(main())
