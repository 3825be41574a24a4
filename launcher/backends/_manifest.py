"""The Kubernetes objects of a job: pure, as `kubernetes.py` writes them into files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import model_validator

from launcher.job import DEFAULT_PORT, JobError, JobSpec
from launcher.secrets import scheme_of
from launcher.strict import Described, Variables, check_match

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_RESOURCE = re.compile(r"[a-z0-9.-]+/[A-Za-z0-9._-]+")
_CONTEXT = re.compile(r"[\w.@:/][\w.@:/-]*", re.ASCII)
_SELECTOR_KEY = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", re.ASCII)
_SELECTOR_VALUE = re.compile(r"([A-Za-z0-9]([\w.-]*[A-Za-z0-9])?)?", re.ASCII)
NODE = "node"  # of the container, and of the replicated job that Kubeflow's runtimes have
POD_LABEL = {
    "job": "batch.kubernetes.io/job-name",
    "jobset": "jobset.sigs.k8s.io/jobset-name",
    "trainjob": "jobset.sigs.k8s.io/jobset-name",  # a TrainJob makes a JobSet of its own name
}
# Of a pod, what a TrainJob may lay over its runtime's.
_PATCHED = (
    *("volumes", "nodeSelector", "tolerations", "serviceAccountName", "imagePullSecrets"),
    "terminationGracePeriodSeconds",
)


class Options(Described):
    """What the cluster needs to know besides the job.

    kind: job needs nothing installed; jobset restarts all nodes at once and counts retries as
        attempts; trainjob takes the rest from the runtime that `runtime` names.
    gpu_resource: the name by which the cluster's nodes offer accelerators.
    shm_gib: of /dev/shm, which the ranks of a node and the loader's workers share.
    preemptible_nodes: labels of the nodes with spare capacity, which are tolerated as taints too
        (GKE: cloud.google.com/gke-spot: "true").
    queue: of Kueue, if the cluster has it.
    """

    kind: Literal["job", "jobset", "trainjob"] = "job"
    namespace: str = "default"
    context: str | None = None
    gpu_resource: str = "nvidia.com/gpu"
    shm_gib: int = 8
    service_account: str | None = None
    image_pull_secret: str | None = None
    node_selector: Variables = {}  # noqa: RUF012
    preemptible_nodes: Variables = {}  # noqa: RUF012
    priority_class: str | None = None
    queue: str | None = None
    runtime: str = "torch-distributed"

    @model_validator(mode="after")
    def _check(self) -> "Options":
        check_match("namespace", self.namespace, _LABEL, "give the name of a namespace")
        check_match("gpu_resource", self.gpu_resource, _RESOURCE, "give DOMAIN/NAME")
        if self.context is not None:
            check_match("context", self.context, _CONTEXT, "give a context of your kubeconfig")
        for field in ("service_account", "image_pull_secret", "priority_class", "queue", "runtime"):
            value = getattr(self, field)
            if value is not None:
                check_match(field, value, _NAME, "give the name of an object in the cluster")
        for field in ("node_selector", "preemptible_nodes"):
            for key, value in getattr(self, field).items():
                check_match(field, key, _SELECTOR_KEY, "give the key of a label")
                check_match(f"{field}.{key}", value, _SELECTOR_VALUE, "give the value of a label")
        if not 1 <= self.shm_gib <= 4_096:
            raise JobError(f"shm_gib={self.shm_gib} must be a whole number from 1 to 4096")
        return self


@dataclass(frozen=True)
class Manifest:
    """What is made from one job: the objects, and the parts that all kinds share."""

    job: JobSpec
    options: Options

    def objects(self) -> list[dict[str, Any]]:
        if self.options.kind == "trainjob":
            return [self._train_job()]
        if self.options.kind == "jobset":
            return [self._job_set()]
        return [self._service(), self._job()]

    def main_host(self) -> str:
        """Where the other pods reach pod 0: the names that the service and JobSet publish."""
        name = self.job.name
        pod = f"{name}-0" if self.options.kind == "job" else f"{name}-{NODE}-0-0"
        return f"{pod}.{name}"

    def _service(self) -> dict[str, Any]:
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": self._metadata(),
            "spec": {
                "clusterIP": "None",
                "selector": {POD_LABEL["job"]: self.job.name},
                # The ranks meet before any pod is ready.
                "publishNotReadyAddresses": True,
                "ports": [{"name": "rendezvous", "port": self.job.port or DEFAULT_PORT}],
            },
        }

    def _job(self) -> dict[str, Any]:
        # A pod that ends takes the others with it, so an attempt may cost a failure for each node.
        rules = [("FailJob", 2), ("Ignore", 75), ("Ignore", None)]
        spec = self._job_spec(rules, self.job.retries * self.job.nodes)
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": self._metadata(), "spec": spec}

    def _job_set(self) -> dict[str, Any]:
        """Exit code 75 and preemption restart all nodes for nothing, a mistake (2) none, the rest
        one retry."""
        jobset_rules = [
            {
                "name": "mistake",
                "action": "FailJobSet",
                "onJobFailureReasons": ["PodFailurePolicy"],
                "onJobFailureMessagePatterns": ["exit code 2 matching"],
            },
            {
                "name": "stopped",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": ["PodFailurePolicy"],
            },
        ]
        spec = self._job_spec([("FailJob", 2), ("FailJob", 75), ("FailJob", None)], 0)
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": self._metadata(),
            "spec": {
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "failurePolicy": {"maxRestarts": self.job.retries, "rules": jobset_rules},
                "replicatedJobs": [{"name": NODE, "replicas": 1, "template": {"spec": spec}}],
            },
        }

    def _train_job(self) -> dict[str, Any]:
        container = self._container()
        pod = self._pod()
        patch = {"containers": [{"name": NODE, "volumeMounts": container["volumeMounts"]}]}
        patch.update({name: pod[name] for name in _PATCHED if name in pod})
        node = {"name": NODE, "template": {"spec": {"template": {"spec": patch}}}}
        trainer = {
            "image": container["image"],
            "command": container["command"],
            "env": container["env"],
            "numNodes": self.job.nodes,
            "numProcPerNode": self.job.ranks(),
            "resourcesPerNode": container.get("resources"),
        }
        limit = self.job.time_limit_minutes
        spec = {
            "runtimeRef": {"name": self.options.runtime},
            "trainer": {name: value for name, value in trainer.items() if value},
            **({"activeDeadlineSeconds": limit * 60} if limit else {}),
            "runtimePatches": [
                {
                    "manager": "diffdis-pretrain/launcher",
                    "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
                }
            ],
        }
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": self._metadata(),
            "spec": spec,
        }

    def _job_spec(self, rules: list[tuple[str, int | None]], limit: int) -> dict[str, Any]:
        """rules: an action and the exit code it is for (None: the pod was taken away), in order."""
        return {
            "completionMode": "Indexed",
            "completions": self.job.nodes,
            "parallelism": self.job.nodes,
            "backoffLimit": limit,
            # A pod is replaced when it has ended, so that two never write one checkpoint.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": [_rule(action, code) for action, code in rules]},
            "template": {"metadata": {"labels": self._labels()}, "spec": self._pod()},
        }

    def _pod(self) -> dict[str, Any]:
        job, options = self.job, self.options
        taints = options.preemptible_nodes if job.preemptible else {}
        limit = job.time_limit_minutes
        pod = {
            "restartPolicy": "Never",
            "subdomain": job.name if options.kind == "job" else None,
            # Of one attempt; the kubelet then sends TERM and waits for the grace period.
            "activeDeadlineSeconds": limit and max(1, limit * 60 - job.grace_seconds),
            "terminationGracePeriodSeconds": job.grace_seconds,
            "serviceAccountName": options.service_account,
            "priorityClassName": options.priority_class,
            "imagePullSecrets": options.image_pull_secret and [{"name": options.image_pull_secret}],
            "nodeSelector": {**options.node_selector, **taints},
            "tolerations": [
                {"key": key, "operator": "Equal", "value": value} for key, value in taints.items()
            ],
            "containers": [self._container()],
            "volumes": [
                {
                    "name": "shm",
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{options.shm_gib}Gi"},
                },
                *({"name": f"storage-{i}", **volume} for i, volume in enumerate(self._volumes())),
            ],
        }
        return {name: value for name, value in pod.items() if value}

    def _container(self) -> dict[str, Any]:
        job = self.job
        resources = {
            "cpu": job.cores_per_node,
            "memory": job.memory_gib_per_node and f"{job.memory_gib_per_node}Gi",
            self.options.gpu_resource: job.accelerators_per_node,
        }
        amounts = {name: str(value) for name, value in resources.items() if value}
        mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]
        for i, mount in enumerate(job.storage):
            read_only = {"readOnly": True} if mount.read_only else {}
            mounts.append({"name": f"storage-{i}", "mountPath": mount.path, **read_only})
        container = {
            "name": NODE,
            "image": job.image,
            "command": [_literal(word) for word in job.node_command("kubernetes")],
            "env": self._environment(),
            "resources": {"requests": dict(amounts), "limits": dict(amounts)} if amounts else None,
            "volumeMounts": mounts,
            "securityContext": {"allowPrivilegeEscalation": False},
        }
        return {name: value for name, value in container.items() if value}

    def _environment(self) -> list[dict[str, Any]]:
        place = {}
        if self.options.kind != "trainjob":  # whose runtime sets torchrun's own variables
            place["NNODES"] = str(self.job.nodes)
            place["MASTER_ADDR"] = self.main_host()
            place["MASTER_PORT"] = str(self.job.port or DEFAULT_PORT)
        plain = {**place, **self.job.variables()}
        env: list[dict[str, Any]] = [{"name": n, "value": _literal(v)} for n, v in plain.items()]
        for name, reference in sorted(self.job.secrets.items()):
            if scheme_of(reference) == "kubernetes":
                secret, _, key = reference.partition(":")[2].partition("/")
                env.append(
                    {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
                )
        return env

    def _volumes(self) -> Iterator[dict[str, Any]]:
        for mount in self.job.storage:
            claim, host, nfs = mount.of("pvc"), mount.of("host"), mount.of("nfs")
            if claim is not None:
                check_match("storage.source", claim, _NAME, "give pvc:NAME")
                yield {"persistentVolumeClaim": {"claimName": claim}}
            elif host is not None:
                yield {"hostPath": {"path": host, "type": "Directory"}}
            elif nfs is not None:
                server, _, path = nfs.partition(":")
                yield {"nfs": {"server": server, "path": path}}
            else:
                raise JobError(
                    f"storage.source={mount.source!r} cannot be mounted on kubernetes; give "
                    "pvc:CLAIM, nfs:SERVER:/PATH or host:/PATH, or use the URL in the run's config"
                )

    def _metadata(self) -> dict[str, Any]:
        return {"name": self.job.name, "labels": self._labels(queue=True)}

    def _labels(self, queue: bool = False) -> dict[str, str]:
        labels = {
            "app.kubernetes.io/name": "diffdis-pretrain",
            "app.kubernetes.io/instance": self.job.name,
        }
        if queue and self.options.queue:
            labels["kueue.x-k8s.io/queue-name"] = self.options.queue
        return labels


def _rule(action: str, code: int | None) -> dict[str, Any]:
    if code is None:
        condition = {"type": "DisruptionTarget", "status": "True"}
        return {"action": action, "onPodConditions": [condition]}
    on = {"containerName": NODE, "operator": "In", "values": [code]}
    return {"action": action, "onExitCodes": on}


def _literal(text: str) -> str:
    """``text`` so that Kubernetes, which expands $(NAME) and reads $$ as $, leaves it as it is."""
    return text.replace("$", "$$")
