"""One case, in a process of its own: an engine computes a quantity on a workload.

The process is forked from a server that has imported everything and computed nothing, so that cases share neither
memory nor caches, and don't pay for imports.  Results, and errors of what refuses, are JSON files; a case that has one
is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parents[2] / "build" / "benchmarks"


@dataclass(frozen=True)
class Options:
    """How to measure."""

    budget: float = 1.0  # seconds of timing per case; three times as much for this library
    repeats: int = 31  # pairs at most
    least: int = 3  # pairs at least
    threads: int = 1
    timeout: float = 240.0
    toy: bool = False
    folder: Path = BUILD


@dataclass(frozen=True)
class Case:
    workload: str
    quantity: str
    engine: str

    def path(self, options: Options) -> Path:
        words = [self.workload, self.quantity, self.engine.replace(" ", "-").replace(",", "")]
        return options.folder / ("toy" if options.toy else "full") / ("_".join(words) + ".json")


def workload(case: Case, options: Options) -> Any:
    from .workloads import FULL, TOY, scaled

    if "=" in case.workload:
        axis, size = case.workload.split("=")
        return scaled(axis, int(size))
    return (TOY if options.toy else FULL)[case.workload]


def measure(case: Case, options: Options) -> dict[str, Any]:
    """All figures of a case."""
    import torch

    from .engines import AROUND, OURS, plain
    from .measure import compare, peak
    from .peers import PEERS
    from .quantities import error, reference

    torch.set_num_threads(options.threads)
    model, x, y = workload(case, options).make()
    if case.engine == "reference":
        from .workloads import losses

        model, x, y = workload(case, options).make(torch.float64)
        case.path(options).parent.mkdir(parents=True, exist_ok=True)
        torch.save(reference(model, losses, x, y), case.path(options).with_suffix(".pt"))
        return {}
    engine = {**OURS, **PEERS, **AROUND}[case.engine]
    own, _, _ = workload(case, options).make()  # peers put hooks on theirs
    base, run = plain(model, x, y), engine(own, x, y, case.quantity)
    found: dict[str, Any] = {"samples": len(x)}
    if "compiled" not in case.engine:
        found["plain_bytes"], _ = peak(base)
        found["bytes"], result = peak(run)
    else:
        base()
        start = time.perf_counter()
        result = run()
        found["first_seconds"] = time.perf_counter() - start
    expected = Case(case.workload, "reference", "reference").path(options).with_suffix(".pt")
    if expected.exists() and result and case.engine != "TRAK":  # whose projection is another one
        found["error"] = error(result, torch.load(expected)[case.quantity])
    del result
    base(), run()
    budget = options.budget * (3 if case.engine in (*OURS, *AROUND) else 1)
    return found | asdict(compare(base, run, budget=budget, least=options.least, most=options.repeats))


def outcome(case: Case, options: Options) -> dict[str, Any]:
    """All figures of a case, or why there are none."""
    from .engines import Unserved

    try:
        return measure(case, options)
    except Exception as e:
        failed = {"failed": type(e).__name__, "message": str(e).strip(), "unserved": isinstance(e, Unserved)}
        return failed if isinstance(e, Unserved) else failed | {"traceback": traceback.format_exc()}


def work(case: Case, options: Options) -> None:
    """In the case's own process."""
    options.folder.mkdir(parents=True, exist_ok=True)
    with (options.folder / "log.txt").open("a") as log:  # what peers and torch's profiler have to say
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    write(case, options, outcome(case, options))


def write(case: Case, options: Options, result: dict[str, Any]) -> None:
    path = case.path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(case) | result, indent=1) + "\n")


def server() -> Any:
    """Where the processes are forked."""
    context = multiprocessing.get_context("forkserver")
    own = [f"{__package__}.{name}" for name in ("case", "engines", "measure", "peers", "quantities", "workloads")]
    context.set_forkserver_preload([*own, "backpack", "opacus.grad_sample", "opacus.validators", "torchjd.autogram"])
    return context


def run(case: Case, options: Options, context: Any) -> dict[str, Any]:
    """What the case's file says; measured now if there is none."""
    path = case.path(options)
    if not path.exists():
        process = context.Process(target=work, args=(case, options))
        process.start()
        process.join(options.timeout)
        if process.is_alive():
            process.kill()
            process.join()
            write(case, options, {"failed": "TimeoutError", "message": f"took more than {options.timeout:g} s"})
        elif not path.exists():
            write(case, options, {"failed": "Crash", "message": f"the process ended with code {process.exitcode}"})
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def show(case: Case, found: dict[str, Any]) -> None:
    label = f"{case.workload:9} {case.quantity:8} {case.engine:24}"
    if "failed" in found:
        print(
            label,
            "-" if found.get("unserved") else f"{found['failed']}: {found['message'].splitlines()[:1]}",
            flush=True,
        )
    elif "ratio" in found:
        memory = f"memory {found['bytes'] / max(1, found['plain_bytes']):6.2f}" if "bytes" in found else " " * 13
        off = f"error {found['error']:.0e}" if "error" in found else ""
        spread = f"{found['ratio']:7.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        print(
            f"{label} {spread} of {1e3 * found['plain']:7.1f} ms, {found['pairs']:2} pairs, {memory}, {off}", flush=True
        )
