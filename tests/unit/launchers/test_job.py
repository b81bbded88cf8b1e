"""The verdict: one exit code of a start from those of its ranks, and whether another start would help."""

import pytest

from launchers.job import code_of_start, job_id, worth_a_requeue


@pytest.mark.parametrize(
    ("codes", "srun", "verdict"),
    [
        ([], 0, 0),
        ([75, 75], 75, 75),
        ([75], 0, 75),  # rank 0 wrote its code but srun saw the others only
        ([3, 7, 7], 7, 3),  # a reason before the loss of a peer, though srun returns the largest
        ([1, 7], 7, 1),  # a bug is never requeued as a lost rank
        ([6, 75], 75, 6),
        ([75, 7], 75, 75),  # one rank was told to stop before the others had joined it
        ([7], 137, 7),  # a rank was killed: out of memory, or its node died
        ([], 137, 7),
        ([], 1, 7),  # srun itself failed
        ([], 128 + 12, 75),  # USR2 before Python had a handler
    ],
)
def test_one_code_for_all_ranks(codes: list[int], srun: int, verdict: int) -> None:
    assert code_of_start(codes, srun) == verdict


def test_an_interruption_is_requeued_and_a_reason_is_not() -> None:
    assert worth_a_requeue(75, 10, [{"code": 75, "checkpoint": 10}])
    assert not any(worth_a_requeue(code, 10, []) for code in (1, 2, 3, 4, 5, 6))


def test_a_rank_lost_twice_at_one_checkpoint_is_no_accident() -> None:
    assert worth_a_requeue(7, -1, [])
    assert worth_a_requeue(7, 20, [{"code": 7, "checkpoint": 10}])
    assert worth_a_requeue(7, 20, [{"code": 75, "checkpoint": 20}])
    assert not worth_a_requeue(7, 20, [{"code": 7, "checkpoint": 20}])


def test_a_task_of_an_array_is_named_by_its_place() -> None:
    assert job_id({"SLURM_JOB_ID": "7"}) == "7"
    last = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_id(last) == "7_2"
