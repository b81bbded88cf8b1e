"""The doctor on a real SLURM: it looks at the compute nodes too, and promised GPUs that are not seen there are a problem."""

from tests.slurm.conftest import Person

ARM = ("arm", "configs/arm/smoke.yaml", "run.experiment=doctor")


def test_all_ranks_of_the_preset_meet_on_the_compute_nodes(person: Person) -> None:
    done = person.type("doctor", *ARM, *person.overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK       2 ranks on node1, node2 sum a tensor over gloo" in done.stdout
    assert "GB of /dev/shm or more" in done.stdout


def test_a_node_that_promises_eight_gpus_and_shows_none_is_a_problem(person: Person) -> None:
    """SLURM's books have eight GPUs a node (a fake GRES), torch sees none."""
    more = ["cluster:nodes=1", "cluster:gpus_per_node=8", "cluster:tasks_per_node=1"]
    done = person.type("doctor", *ARM, *person.overrides, *more)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "PROBLEM  compute node: node" in done.stdout
    assert "GPUs were promised (SLURM_" in done.stdout
    assert "torch sees none" in done.stdout
