"""Measure the library on this machine and write what was found.

Usage: python -m benchmarks [--quick] [--only NAME] [--device cpu] [--folder FOLDER]

CPU and GPU have a file each, named after them. With --quick everything runs at tiny sizes, only to see that it runs;
with --only, just the rows whose name contains NAME. Either writes nothing unless a folder is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cpu, gpu
from benchmarks.measure import (
    QUICK,
    ROOT,
    Case,
    Effort,
    UnavailableError,
    one_thread,
    provenance,
    row,
    slug,
)

RESULTS = ROOT / "benchmarks" / "results"


@dataclasses.dataclass
class Record:
    """What is written: where it was measured, the rows, and which rows there are not and why."""

    machine: str
    quick: bool
    provenance: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    """Measure what the command line asks for; return 1 if a row failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds")
    parser.add_argument("--only", metavar="NAME", default="", help="rows whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="one of the two, not both")
    parser.add_argument("--folder", type=Path, help="where to write")
    asked = parser.parse_args(arguments)
    efforts = {"cpu": Effort(), "cuda": gpu.EFFORT}
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    whole = not (asked.quick or asked.only)
    folder = RESULTS if asked.folder is None and whole else asked.folder
    failed = 0
    for device in [asked.device] if asked.device else devices:
        with one_thread():
            effort = QUICK if asked.quick else efforts[device]
            failed += measure(device, effort, asked.only, folder)
    return min(failed, 1)


def measure(device: str, effort: Effort, only: str, folder: Path | None) -> int:
    """Measure the rows of one device and return how many failed; the file is written after each row."""
    options = ["--quick"] * effort.quick + [f"--only {only}"] * bool(only)
    command = " ".join(["python -m benchmarks", *options])
    found = provenance(command, device)
    machine = found["gpu"] or found["cpu"]
    print(f"{machine}, torch {found['torch']}, {found['date']}")
    record = Record(machine, effort.quick, found)
    for case in gpu.cases() if device == "cuda" else cpu.cases():
        if only in case.name:
            measure_one(case, effort, record)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False) + "\n"
                (folder / f"{slug(machine)}.json").write_text(text, encoding="utf-8")
    missed = [found["name"] for found in record.rows if found["met"] is False]
    print(f"{len(record.rows)} rows, {len(missed)} goals missed: {', '.join(missed) or 'none'}")
    return len(record.failed)


def measure_one(case: Case, effort: Effort, record: Record) -> None:
    """Measure one row and print it; one that fails does not keep the others from being measured."""
    torch.manual_seed(0)
    try:
        found = row(case, case.run(effort))
    except UnavailableError as error:
        record.skipped[case.name] = str(error)
        print(f"{case.name:32} not available: {error}", flush=True)
    except Exception as error:
        record.failed[case.name] = type(error).__name__
        print(f"{case.name:32} failed", flush=True)
        traceback.print_exc()
    else:
        record.rows.append(found)
        print(as_line(found), flush=True)


def as_line(found: dict[str, Any]) -> str:
    """A row for the terminal."""
    low, high = found["spread"]
    verdict = {None: "", True: "met", False: "MISSED"}[found["met"]]
    medians = ", ".join(f"{name} {value:g}" for name, value in found["medians"].items())
    speeds = "".join(f"; {name} {value:g} TFLOP/s" for name, value in found["tflops"].items())
    return (
        f"{found['name']:32} {found['figure']:8.4g} {found['unit']:5} [{low:.4g} .. {high:.4g}] "
        f"{found['goal'] or '':8} {verdict:6} {medians} {found['medians_unit']}{speeds} "
        f"{found['detail']}"
    ).rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
