"""A small job for every backend, and what a job looks like to the processes it starts."""

import re
from typing import Any

from launcher.job import JobSpec

# What a backend must be told besides a run. A backend that is not here needs nothing.
EXTRA: dict[str, dict[str, Any]] = {
    "hostfile": {"backends": {"hostfile": {"hosts": ["node1 slots=2"]}}},
    "kubernetes": {"image": "registry.example.com/pretrain:1"},
    "aws_batch": {
        "image": "registry.example.com/pretrain:1",
        "cores_per_node": 8,
        "memory_gib_per_node": 30,
        "backends": {"aws_batch": {"queue": "gpu", "region": "eu-central-1"}},
    },
    "gcp_batch": {
        "image": "registry.example.com/pretrain:1",
        "backends": {
            "gcp_batch": {
                "project": "my-project",
                "location": "europe-west4",
                "machine_type": "n2-standard-8",
            }
        },
    },
    "skypilot": {"image": "registry.example.com/pretrain:1"},
}


def job(backend: str, **fields: Any) -> JobSpec:
    """A job that ``backend`` can plan, with ``fields`` in place of its own."""
    return JobSpec(
        **{
            "name": "contract",
            "config": "configs/debug.yaml",
            "output": "s3://bucket/runs/contract",
            **EXTRA.get(backend, {}),
            **fields,
        }
    )


def expand(text: str, known: dict[str, str]) -> str:
    """What a container gets of a word of its command, or of a variable's value, by Kubernetes'
    documentation: $(NAME) is replaced if NAME is known, $$ is a plain $.

    Written down from the documentation: no kubelet can be had here.
    """

    def replaced(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)
