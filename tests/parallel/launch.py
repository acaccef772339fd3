"""Run the bodies of many tests in the same few processes: starting one costs more than most tests.

A test marked ``@pytest.mark.ranks(4)`` has its body run on each of four processes, with a gloo group between them. All
such tests of one file, as far as they are selected, share one launch, and so do those of files that give the same name
as ``LAUNCH``; each test has its own result. When a body fails on a rank the processes are stopped and new ones take the
tests that are left. Under pytest-xdist the first worker that comes to a file launches for all workers.
"""

import faulthandler
import importlib
import json
import os
import signal
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from forking import spawn

SECONDS_FOR_A_CELL = 60  # One takes less than 2 on an idle machine.


def result_of(item):
    """What went wrong in the body of this test, on any rank; empty if nothing did."""
    ranks, launch = _ranks(item), _launch_of(item)
    items = [i for i in item.session.items if _ranks(i) == ranks and _launch_of(i) == launch]
    results = _run_once(item.config, launch, ranks, [_cell(i) for i in items])
    return results[_cell(item)[0]]


def join_group(rank, world_size, folder):
    """Become one of ``world_size`` ranks that meet in ``folder``; what is printed goes to a file there."""
    output = open(folder / f"output-{rank}", "w", buffering=1)  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, output)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS_FOR_A_CELL),
    )


def leave_group():
    dist.barrier()  # gloo aborts a rank that is still at work when another leaves.
    dist.destroy_process_group()


def stop(processes):
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _ranks(item):
    marker = item.get_closest_marker("ranks")
    return marker.args[0] if marker else None


def _launch_of(item):
    return getattr(item.module, "LAUNCH", item.path.stem)


def _cell(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return f"{item.path.stem}::{item.name}", item.path.stem, item.originalname, params


def _run_once(config, launch, ranks, cells):
    folder = config._tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / f"{launch}-{ranks}"
    folder.mkdir(exist_ok=True)
    finished = folder / "results.json"
    with FileLock(folder / "lock"):
        if not finished.exists():
            finished.write_text(json.dumps(_run(ranks, cells, folder)))
    return json.loads(finished.read_text())


def _run(ranks, cells, folder):
    results, attempt = {}, 0
    while cells:
        attempt += 1
        this = folder / str(attempt)
        this.mkdir()
        results |= _launch(ranks, cells, this)
        cells = [cell for cell in cells if cell[0] not in results]
    return results


def _launch(ranks, cells, folder):
    """Results of the cells up to the first that fails, at least of one."""
    processes = spawn(ranks, _work, ranks, folder, cells)
    done, since = 0, time.monotonic()
    while any(process.is_alive() for process in processes):
        time.sleep(0.05)
        records = [_records(folder, rank) for rank in range(ranks)]
        failed = any(error for record in records for error in record.values())
        if failed:
            time.sleep(1)  # For the others to report the same, where all fail alike.
            break
        if min(map(len, records)) > done:
            done, since = min(map(len, records)), time.monotonic()
        if time.monotonic() - since > SECONDS_FOR_A_CELL:
            break
        if any(process.exitcode for process in processes):
            break
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)  # Where it hangs goes to its output.
    time.sleep(0.1)
    stop(processes)
    records = [_records(folder, rank) for rank in range(ranks)]
    results = {}
    for name, *_ in cells:
        errors = [_error(record.get(name), folder, rank) for rank, record in enumerate(records)]
        results[name] = "\n".join(error for error in errors if error)
        if results[name]:
            break
    return results


def _error(recorded, folder, rank):
    if recorded is not None:
        return recorded and f"rank {rank}: {recorded}"
    output = (folder / f"output-{rank}").read_text() if (folder / f"output-{rank}").exists() else ""
    return f"rank {rank} did not finish. What it printed ends with:\n{output[-3000:]}"


def _records(folder, rank):
    file = folder / f"records-{rank}"
    lines = file.read_text().splitlines() if file.exists() else []
    return dict(json.loads(line) for line in lines if line.endswith("]"))


def _work(rank, world_size, folder, cells):
    join_group(rank, world_size, folder)
    with open(folder / f"records-{rank}", "w", buffering=1) as records:
        for name, module, function, params in cells:
            error = _run_cell(getattr(importlib.import_module(module), function), params)
            records.write(json.dumps([name, error]) + "\n")
            if error:
                time.sleep(60)  # Until the parent ends it: a rank that leaves makes the others fail too.
    leave_group()


def _run_cell(body, params):
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        measured = body(**params)
        dist.barrier()
    except pytest.fail.Exception as failure:
        return f"{failure}\n{traceback.format_exc()}"
    except BaseException:
        return traceback.format_exc()
    error = "" if measured is None else f", largest error {measured:.1e}"
    print(f"{body.__name__} {params or ''}: {time.perf_counter() - start:.2f} s{error}", flush=True)
    return ""
