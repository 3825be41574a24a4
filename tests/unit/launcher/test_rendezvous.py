"""Each scheduler's variables, as it sets them, give rank, number of nodes, address and port."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.job import JobError
from launcher.rendezvous import NodePlace, expand_hosts, node_place, rank_place

AWS = {"AWS_BATCH_JOB_NUM_NODES": "3", "AWS_BATCH_JOB_MAIN_NODE_INDEX": "1"}
SLURM = {
    "SLURM_JOB_ID": "31",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "3",
    "SLURM_JOB_NODELIST": "gpu[08-09,11]",
}
PET = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "run-node-0-0.run"}
SKY = {
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
}
GCP = {"BATCH_TASK_INDEX": "1", "BATCH_TASK_COUNT": "2", "BATCH_MAIN_NODE_HOSTNAME": "vm-0.c.p"}
PLAIN = {"NNODES": "2", "MASTER_ADDR": "run-0.run", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (PLAIN, NodePlace("explicit", 1, 2, "run-0.run", 29_500)),
        (
            {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "0", "MASTER_PORT": "30000"},
            NodePlace("explicit", 0, 2, "a", 30_000),
        ),
        ({"NNODES": "1"}, NodePlace("explicit", 0, 1, "127.0.0.1", 29_500)),
        (
            {**PET, "PET_MASTER_PORT": "29400", "PET_NPROC_PER_NODE": "4"},
            NodePlace("torchrun", 1, 2, "run-node-0-0.run", 29_400, 4),
        ),
        (
            {**PET, "PET_NPROC_PER_NODE": "auto", "JOB_COMPLETION_INDEX": "1"},
            NodePlace("torchrun", 1, 2, "run-node-0-0.run", 29_500),
        ),
        (
            {"PET_NNODES": "2:2", "PET_NODE_RANK": "0", "PET_RDZV_ENDPOINT": "h:1234"},
            NodePlace("torchrun", 0, 2, "h", 1_234),
        ),
        (SLURM, NodePlace("slurm", 1, 3, "gpu08", 20_031)),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "gpu[09,11]", "SLURM_STEP_NUM_NODES": "2"},
            NodePlace("slurm", 1, 2, "gpu09", 20_031),
        ),
        ({**SLURM, "MASTER_ADDR": "10.1.1.1"}, NodePlace("slurm", 1, 3, "10.1.1.1", 20_031)),
        # The main node is told no address; it is the one of rank 0, whatever its index.
        (
            {**AWS, "AWS_BATCH_JOB_NODE_INDEX": "1"},
            NodePlace("aws_batch", 0, 3, "127.0.0.1", 29_500),
        ),
        (
            {
                **AWS,
                "AWS_BATCH_JOB_NODE_INDEX": "0",
                "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.9",
            },
            NodePlace("aws_batch", 2, 3, "10.0.0.9", 29_500),
        ),
        (GCP, NodePlace("gcp_batch", 1, 2, "vm-0.c.p", 29_500)),
        (
            {**GCP, "BATCH_NODE_INDEX": "0", "BATCH_NODE_COUNT": "2"},
            NodePlace("gcp_batch", 0, 2, "vm-0.c.p", 29_500),
        ),
        (SKY, NodePlace("skypilot", 1, 2, "10.0.0.4", 29_500)),
        (
            {**SKY, **SLURM, "SKYPILOT_NUM_GPUS_PER_NODE": "8"},
            NodePlace("skypilot", 1, 2, "10.0.0.4", 29_500, 8),
        ),
    ],
)
def test_a_nodes_place(env: dict[str, str], expected: NodePlace) -> None:
    assert node_place(env) == expected


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "set NNODES, NODE_RANK and MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "JOB_COMPLETION_INDEX"),
        ({**PLAIN, "JOB_COMPLETION_INDEX": "2"}, "node 2 of 2"),
        ({**PLAIN, "JOB_COMPLETION_INDEX": "-1"}, "whole number"),
        ({**PLAIN, "NNODES": "two"}, "NNODES='two'"),
        ({**PLAIN, "MASTER_ADDR": "a; reboot"}, "no host name"),
        ({**PLAIN, "MASTER_ADDR": "-oProxyCommand=x"}, "no host name"),
        ({**PLAIN, "MASTER_PORT": "80"}, "from 1024 to 65535"),
        ({**PET, "PET_NNODES": "1:4"}, "elastic"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "PET_MASTER_ADDR is not set"),
        ({**SLURM, "SLURM_NNODES": "4"}, "holds 3 hosts"),
        ({**SLURM, "SLURM_JOB_NODELIST": "gpu[8-"}, "node[1-3,7]"),
        ({**AWS, "AWS_BATCH_JOB_NODE_INDEX": "0"}, "MAIN_NODE_PRIVATE_IPV4_ADDRESS is not set"),
        ({"BATCH_TASK_INDEX": "0", "BATCH_TASK_COUNT": "2"}, "BATCH_MAIN_NODE_HOSTNAME is not"),
        ({**SKY, "SKYPILOT_NODE_IPS": "10.0.0.4"}, "holds 1 addresses"),
    ],
)
def test_what_is_missing_or_wrong_is_named(env: dict[str, str], said: str) -> None:
    with pytest.raises(JobError) as error:
        node_place(env)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        },
        {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"},
        {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
        {
            "SLURM_PROCID": "3",
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": "1",
            "SLURM_NTASKS_PER_NODE": "2",
        },
    ],
)
def test_a_ranks_place(env: dict[str, str]) -> None:
    found = rank_place({**env, "MASTER_ADDR": "node1", "MASTER_PORT": "2345"}).environment()
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "2345",
    }
    with pytest.raises(JobError, match="MASTER_ADDR is not set"):
        rank_place(env)
    first = next(iter(env))
    with pytest.raises(JobError, match="do not agree"):
        rank_place({**env, first: "4", "MASTER_ADDR": "node1"})
    with pytest.raises(JobError, match="looked for RANK with LOCAL_WORLD_SIZE"):
        rank_place({})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("gpu[098-101],x", ["gpu098", "gpu099", "gpu100", "gpu101", "x"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
    ],
)
def test_slurms_list_of_hosts(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@given(st.integers(0, 2000), st.integers(0, 50), st.integers(1, 5))
def test_any_span_of_hosts(low: int, more: int, width: int) -> None:
    names = [f"n{i:0{width}d}" for i in range(low, low + more + 1)]
    assert expand_hosts(f"n[{low:0{width}d}-{low + more:0{width}d}]") == names
