"""``python -m benchmarks``: run what has not been run, and write table and plots."""

from __future__ import annotations

import argparse
import os
import time

from .case import Case, Options, run, server, show


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    some = {"nargs": "+", "default": [], "metavar": "NAME"}
    parser.add_argument("--workload", **some, help="W1 ... W7 (default: all)")
    parser.add_argument("--quantity", **some, help="Q1 Q1r Q2 Q3 Q4 Q5 clip project all (default: all)")
    parser.add_argument("--engine", **some, help="names or patterns: 'persample*', BackPACK (default: all)")
    parser.add_argument("--repeats", type=int, default=31, help="pairs of runs at most")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing per case (at least 3 pairs)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--every", action="store_true", help="also quantities of engines whose rows always cost the same"
    )
    parser.add_argument(
        "--quick", action="store_true", help="this library only, 0.5 s per case, neither scaling nor surroundings"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models: does everything run?")
    parser.add_argument("--again", action="store_true", help="forget earlier results of the cases chosen")
    parser.add_argument("--report", action="store_true", help="only write table and plots from what there is")
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[Case]:
    from . import plan

    engines = args.engine or (["persample", "persample, rows kept"] if args.quick else [])
    cases = [*plan.cells(args.workload, args.quantity, engines, every=args.every)]
    if not (args.quantity or args.engine or args.quick):
        cases += plan.around(args.workload)
        if not args.workload and not args.toy:
            cases += plan.scaling()
    return cases


def main() -> None:
    args = parsed()
    from . import report

    least = min(3, args.repeats)
    options = Options(0.5 if args.quick else args.budget, args.repeats, least, args.threads, toy=args.toy)
    if not args.report:
        context, start = server(), time.perf_counter()
        cases = plan(args)
        if args.again:
            for case in cases:
                case.path(options).unlink(missing_ok=True)
        for case in cases:
            show(case, run(case, options, context))
        print(f"{len(cases)} cases, {time.perf_counter() - start:.0f} s")
    whole = not (args.workload or args.quantity or args.engine or args.quick or args.toy)
    report.write(options, into_docs=whole or args.report)


if __name__ == "__main__":
    main()
