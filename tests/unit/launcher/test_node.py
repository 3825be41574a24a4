"""Names of a job's starts; tests/cluster/test_node.py and test_slurm.py run the node itself."""

import pytest

from launcher.node import attempt


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"SLURM_JOB_ID": "31"}, "31-0"),
        ({"SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": "2"}, "31-2"),
        # The same on all nodes of the job.
        ({"AWS_BATCH_JOB_ID": "a1-b2#0", "AWS_BATCH_JOB_ATTEMPT": "1"}, "a1-b2-1"),
        ({"AWS_BATCH_JOB_ID": "a1-b2#1", "AWS_BATCH_JOB_ATTEMPT": "1"}, "a1-b2-1"),
        ({"SKYPILOT_TASK_ID": "sky/../x y"}, "sky-..-x-y-0"),
        ({}, "node"),
    ],
)
def test_the_name_of_a_start(env: dict[str, str], name: str) -> None:
    assert attempt(env) == name
