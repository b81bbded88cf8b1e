"""Measure what the chain reaches beside simpler means, on several data sets and label regimes.

    python -m studies.scoreboard --budget 3h --jobs 2              the bundled data sets, all regimes, three seeds
    python -m studies.scoreboard --data FOLDER --regimes 4 10      a folder of images per class; a test set is cut off
    python -m studies.scoreboard --only digits-4 resnet            only jobs whose name has one of these in it
    python -m studies.scoreboard --known docs/scoreboard.jsonl     continue the board of another machine
    python -m studies.scoreboard --dry                             list the jobs and what each would take

Each column of each cell is one file of JSON in runs/scoreboard-CONFIGS/cells, so a board that was stopped continues. Seeds
come first: a budget that ends early leaves all cells with fewer seeds. Partial boards say what is missing. The last line is one
JSON object: points of accuracy, the mean of the classes, by which the chain exceeds the best baseline, in the worst cell and on
average, and the like.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from threadpoolctl import threadpool_limits  # scikit-learn brings it

from pipeline.cli import guarded
from pipeline.errors import ConfigError, PipelineError
from studies.scoreboard import pictures
from studies.scoreboard.board import ACCURACY, Board, Place, write_document
from studies.scoreboard.columns import JOBS
from studies.scoreboard.pictures import Case
from studies.scoreboard.recipe import Chain

# Counted work, so that a board gives the same numbers beside other work; docs/scoreboard.md has the seconds.
CHAIN_BUDGET = "2.2T"
_UNITS = {"s": 1, "m": 60, "h": 3600}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m studies.scoreboard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FOLDER", help="folders of images, in place of --sets"
    )
    parser.add_argument("--sets", nargs="+", choices=pictures.BUNDLED, default=list(pictures.BUNDLED))
    parser.add_argument("--regimes", nargs="+", choices=pictures.REGIMES, default=list(pictures.REGIMES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only jobs whose name contains one of these words"
    )
    parser.add_argument("--budget", help="start no job that would end later than this, for example 3h or 90m")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time, with one thread each (default 1)")
    parser.add_argument(
        "--configs",
        default="recipe",
        metavar="NAME",
        help="chain to measure: configs/STAGE/NAME.yaml, or what the recipe writes for each case (default recipe)",
    )
    parser.add_argument(
        "--chain-budget",
        default=CHAIN_BUDGET,
        help=f"with --configs recipe: what a chain may cost (default {CHAIN_BUDGET})",
    )
    parser.add_argument("--dry", action="store_true", help="list the jobs without starting them")
    parser.add_argument(
        "--document",
        type=Path,
        metavar="FILE",
        help="write the board as Markdown, for example docs/scoreboard.md, and its cells beside it as .jsonl",
    )
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="take complete cells of another machine's board from its .jsonl"
    )
    given = parser.parse_args(arguments)
    folders = {re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.resolve().name): folder for folder in given.data}
    places = [Place(name, regime, seed)
              for seed in given.seeds for name in (folders or given.sets) for regime in given.regimes]  # fmt: skip
    chain = Chain(Path("runs") / f"scoreboard-{given.configs}", given.configs, given.chain_budget)
    board = Board(chain.runs / "cells", places)
    if given.known:
        taken = board.adopt(given.known)
        print(f"{given.known}: {taken} places are complete there and not begun here, and are taken", file=sys.stderr)
    # Most labels first, since the first case of a data set tunes its rival.
    ordered = sorted(places, key=lambda p: (given.seeds.index(p.seed), pictures.MEASURED.index(p.regime)))
    open_jobs = [(place, job) for place in ordered for job in JOBS
            if any(column not in board.cells[place] for column in JOBS[job].columns)
            and (not given.only or any(word in f"{place.name}-{job}" for word in given.only))]  # fmt: skip
    if given.dry:
        for place, job in open_jobs:
            seconds = _expected(board, job)
            print(f"{place.name}-{job}: " + (f"about {seconds:.0f} s" if seconds else "no time known yet"))
        return 0
    failed = _work(board, chain, open_jobs, folders, _seconds(given.budget), given.jobs)
    print(f"\n{board.table().markdown()}\n{board.costs().markdown()}")
    if given.document:
        words = f"{os.cpu_count()} cores, {platform.machine()}, {time.strftime('%d %B %Y')}"
        write_document(
            board, given.document, f"python -m studies.scoreboard {' '.join(arguments)}", words, given.configs
        )
    print(json.dumps(board.summary()))
    return 1 if failed else 0


def _work(
    board: Board,
    chain: Chain,
    open_jobs: list[tuple[Place, str]],
    folders: dict[str, Path],
    budget: float | None,
    jobs: int,
) -> list[str]:
    """Run jobs until the budget ends; returns the names of those that failed."""
    end = None if budget is None else time.monotonic() + budget
    failed: list[str] = []
    left = 0
    by_place = {
        place: [job for other, job in open_jobs if other == place] for place in dict.fromkeys(p for p, _ in open_jobs)
    }
    # Data are made before any thread starts: making them forks processes, and a fork waits forever for a thread that is inside
    # OpenBLAS, while that thread waits for the fork.
    cases: dict[Place, Case] = {}
    for place in by_place:
        try:
            found = pictures.prepared(place.pictures, folders.get(place.pictures))
            cases[place] = pictures.split_of(found, place.regime, place.seed)
        except (PipelineError, SystemExit) as error:
            failed.append(place.name)
            print(f"{place.name}: failed: {error}", file=sys.stderr, flush=True)
        except Exception:
            failed.append(place.name)
            traceback.print_exc()

    def one(place: Place, job: str, case: Case) -> None:
        nonlocal left
        needs = JOBS[job].needs
        if needs and any(column not in board.cells[place] for column in JOBS[needs].columns):
            return  # it was left out or failed, and said so
        if end is not None and time.monotonic() + _expected(board, job) > end:
            left += 1
            return
        began = time.monotonic()
        try:
            cells = JOBS[job].measure(case, place.name, place.seed, chain)
        except (PipelineError, SystemExit) as error:
            failed.append(f"{place.name}-{job}")
            print(f"{place.name}-{job}: failed: {error}", file=sys.stderr, flush=True)
            return
        except Exception:
            failed.append(f"{place.name}-{job}")
            traceback.print_exc()
            return
        mine = (place.name, f"{place.name}-*")
        for folder in (found for pattern in mine for found in chain.runs.glob(f"{pattern}/*/checkpoints")):
            shutil.rmtree(folder)  # a finished run is read from its export, and a board has hundreds of runs
        wall = round(time.monotonic() - began, 1)
        for column, cell in cells.items():
            board.write(place, column, {**cell, "labels": len(case.split.subset("labelled")), "job_seconds": wall})
        print(f"{place.name}-{job}: " + ", ".join(f"{c} {cell[ACCURACY]:.1f}" for c, cell in cells.items()) + f" ({wall:.0f} s)",
              file=sys.stderr, flush=True)  # fmt: skip

    # Threads of scikit-learn on cores that other jobs use wait for one another: its learners took minutes that way instead of
    # seconds. A limit holds for libraries that are loaded; OpenMP's holds for the thread that sets it.
    importlib.import_module("sklearn.neighbors")
    one_thread = partial(threadpool_limits, 1)
    # The jobs of one place depend on one another, so a thread takes a place and does its jobs in turn.
    with one_thread("blas"), ThreadPoolExecutor(max(1, jobs), initializer=one_thread, initargs=("openmp",)) as pool:
        list(pool.map(lambda place: [one(place, job, cases[place]) for job in by_place[place]], cases))
    if left:
        print(f"{left} jobs were not started: they would have ended after the budget", file=sys.stderr, flush=True)
    return failed


def _expected(board: Board, job: str) -> float:
    """Median time of a job on this board, in seconds; 0 if none is complete."""
    column = JOBS[job].columns[0]
    known = [found[column]["job_seconds"] for found in list(board.cells.values()) if column in found]
    return median(known) if known else 0.0


def _seconds(budget: str | None) -> float | None:
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not found:
        raise ConfigError(f"--budget {budget}: give a number and s, m or h, for example 3h")
    return float(found[1]) * _UNITS[found[2]]


if __name__ == "__main__":
    sys.exit(main())
