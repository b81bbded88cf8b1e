"""Sums through shared memory: the sum in the order of the ranks, the same bits on all, and an error that names who is missing."""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.train import distributed
from pipeline.train.shared_sums import SharedSums, open_sums
from tests.conftest import free_port
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[3]
RANKS = 3
SLOT = 2**18 // 4  # fp32 numbers of a slot of sums.cpp


def meet(rank: int, folder: str, size: int = RANKS) -> SharedSums | None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    return open_sums(rank, size, 60.0)


def opened(rank: int, folder: str) -> SharedSums:
    sums = open_sums(rank, RANKS, 60.0, spins=0) if dist.is_initialized() else meet(rank, folder)
    assert sums is not None
    return sums


def numbers(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * size + rank), dtype=torch.float64).to(dtype)


def adds(rank: int, folder: str) -> None:
    sums = opened(rank, folder)
    sizes = [0, 1, 2, 63, 1000, SLOT // 2, SLOT - 1, SLOT, SLOT + 1, 3 * SLOT + 5]
    for size, dtype in itertools.product(sizes, (torch.float32, torch.float64)):
        every = [numbers(k, size, dtype) for k in range(RANKS)]
        mine = every[rank].clone()
        sums.add(mine)
        expected = every[0].clone()
        for other in every[1:]:
            expected += other
        assert torch.equal(mine, expected)
    for dtype in (torch.float32, torch.float64):  # arrays of all sizes, cut where a slot ends
        lengths = [0, 3, SLOT - 4, 0, 7, 2 * SLOT, 1, 0]
        lists = [[numbers(k, n, dtype) for n in lengths] for k in range(RANKS)]
        means = [t.clone() for t in lists[rank]]
        sums.add(*means, factor=1 / RANKS)
        for mean, parts in zip(means, zip(*lists, strict=True), strict=True):
            assert torch.equal(mean, (parts[0] + parts[1] + parts[2]) * torch.tensor(1 / RANKS, dtype=dtype))
    wrong = torch.full((3,), float("nan") if rank == 1 else 1.0)
    sums.add(wrong)
    assert wrong.isnan().all()
    for k in range(5_000):  # the slots are used in turn, and nobody overtakes
        own = torch.tensor([float(k + rank)])
        sums.add(own)
        assert own.item() == RANKS * k + sum(range(RANKS))
    for tensor in (torch.ones(2, dtype=torch.bfloat16), torch.ones(4, 4).t()[1:], torch.ones(2, dtype=torch.int64)):
        assert not sums.serves(torch.ones(1, dtype=tensor.dtype), tensor)
    assert not sums.serves(torch.ones(1), torch.ones(1, dtype=torch.float64))

    # The counters are 32 bits wide and begin anew after 2^32 sums.
    sums = opened(rank, folder)
    ctypes.c_uint32.from_address(ctypes.addressof(sums._memory) + rank * sums._library.sums_bytes(1)).value = 2**32 - 3
    dist.barrier()
    for k in range(9):
        own = torch.tensor([float(k)])
        sums.add(own)
        assert own.item() == RANKS * k

    # One brings other numbers than the others, one comes too late, one leaves, one ends. All later sums fail too.
    sums = opened(rank, folder)
    with pytest.raises(dist.DistError, match=r"sums other numbers|sums no more"):
        sums.add(torch.ones(5 if rank == 2 else 4))
    sums = opened(rank, folder)
    with pytest.raises(dist.DistError, match=r"sums other numbers|sums no more"):
        sums.add(torch.ones(2, dtype=torch.float32) if rank else torch.ones(1, dtype=torch.float64))
    sums = opened(rank, folder)
    sums.timeout_seconds = 0.2
    if rank:
        with pytest.raises(dist.DistError, match=r"rank 0 did not come within the time-out|rank . sums no more"):
            sums.add(torch.ones(1))
    dist.barrier()
    with pytest.raises(dist.DistError, match="sums no more"):
        sums.add(torch.ones(1))
    sums = opened(rank, folder)
    if rank == 2:
        sums.close()
    else:
        with pytest.raises(dist.DistError, match=r"rank . sums no more"):
            sums.add(torch.ones(1))
    sums = opened(rank, folder)
    dist.barrier()
    if rank == 2:
        os._exit(0)
    with pytest.raises(dist.DistError, match=r"rank 2 ended|rank \d sums no more") as failure:
        sums.add(torch.ones(1))
    assert distributed.is_communication_failure(failure.value)


def test_sums_and_what_goes_wrong(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    run_ranks(adds, str(tmp_path), number=RANKS)
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "sums" in name}


UNREAPED = """
import os, sys, time
import torch
from tests.unit.train.test_shared_sums import meet
sums = meet(int(sys.argv[1]), sys.argv[2], 2)
if sys.argv[1] == "1":
    os._exit(0)
begin = time.monotonic()
try:
    sums.add(torch.ones(1))
except Exception as error:
    print(error, time.monotonic() - begin < 10)
os._exit(0)
"""


def test_a_rank_that_nobody_has_reaped_is_seen_to_have_ended(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", UNREAPED, str(rank), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = ranks[0].communicate(timeout=120)[0]  # nobody waits for rank 1 until here
    assert said == b"a sum over the ranks failed: rank 1 ended True\n"
    ranks[1].communicate()


def starts(rank: int, port: str, next_port: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.start(60)
    assert distributed._sums is not None
    import deepspeed

    calls: list[int] = []
    add = distributed._sums.add
    distributed._sums.add = lambda tensor: (calls.append(tensor.numel()), add(tensor))[1]  # type: ignore[method-assign, assignment]
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    deepspeed.comm.all_reduce(x)
    assert (x.tolist(), calls) == ([3.0, 6.0], [2])
    deepspeed.comm.all_reduce(x, op=dist.ReduceOp.MAX)  # goes the usual way, as do other dtypes
    whole = torch.tensor([rank + 1])
    distributed.sum_over_ranks(whole)
    assert (x.tolist(), whole.item(), calls) == ([3.0, 6.0], 3, [2])
    assert distributed._sums.timeout_seconds == 60
    distributed.stop()
    assert distributed._sums is None
    os.environ["MASTER_PORT"] = next_port  # DeepSpeed's backend outlives the group, and is served once
    once = deepspeed.comm.comm.cdb.all_reduce
    distributed.start(50)
    assert deepspeed.comm.comm.cdb.all_reduce is once
    deepspeed.comm.all_reduce(x)
    assert x.tolist() == [6.0, 12.0]
    assert distributed._sums.timeout_seconds == 50


def test_a_started_world_sums_deepspeeds_gradients_through_it() -> None:
    """The ranks assert; what one of them raises, this raises."""
    run_ranks(starts, str(free_port()), str(free_port()))


NAMESPACES = """
import sys
from tests.unit.train.test_shared_sums import meet
from pipeline.cli import leave
print(meet(int(sys.argv[1]), sys.argv[2], 2) is None)
leave(0)
"""


def test_ranks_in_separate_containers_use_gloo(tmp_path: Path) -> None:
    """A process of a PID namespace of its own cannot see the other's memory, nor is a process of that number the other."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces of processes need unshare and its permission")
    command = [sys.executable, "-c", NAMESPACES]
    ranks = [
        subprocess.Popen([*extra, *command, str(rank), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank, extra in enumerate(([], apart))
    ]
    assert [re.sub(r"\s", "", rank.communicate(timeout=120)[0]) for rank in ranks] == ["True", "True"]
