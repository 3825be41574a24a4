"""Whether the hosts of a job can run it: asked before it starts, with a verdict by host.

    python -m launcher hostfile preflight --config job.yaml

Every host is asked for its facts (`launcher.facts`) and then measured with the others
(`launcher.pairs`); what differs, fails or is slow is named, with what to do about it.
"""

import re
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher import remote
from launcher.launch import Launch

FACTS_SECONDS = 40.0
PAIRS_SECONDS = 45.0
SKEW_SECONDS = 5.0  # S3 refuses requests from 15 minutes on; logs of ranks are read side by side
DISK_GIB = 5.0
SLOW_STEP, SLOW_LINK = 1.5, 0.5  # times the median: longer than that, narrower than that
SLOW_ANSWER, SLOW_ANSWER_SECONDS = 4.0, 0.001  # times the median, and at least so much above it
_URL = re.compile(r"(s3|gs|gcs|abfs|https?)://[^\s'\"]+")
_WRITTEN = ("copy_to", "output")  # fields whose URLs are written to

_REMEDIES = {
    "python": "install the same Python, or give environment.python",
    "packages": "run `pip install -r requirements.txt` there",
    "code": "check out the same revision there, or use a shared folder",
    "config": "give the path of a file that every host sees",
    "cores": "ask for fewer cores_per_node",
    "disk_gib": "free space there, or choose another output",
    "peers": "add the names to its DNS or /etc/hosts, or list the hosts by address",
    "shared": "output must lie on storage that all hosts and this machine mount at the same path",
    "writes": "check the endpoint and the credentials (secrets: AWS_ACCESS_KEY_ID, ...) and rights",
    "reads": "check the URL, the endpoint and the credentials",
    "mlflow": "check MLFLOW_TRACKING_URI and its credentials (secrets: MLFLOW_TRACKING_TOKEN, ...)",
}


@dataclass(frozen=True)
class Finding:
    """Something about a host. bad: the job cannot run; else it is a warning."""

    host: str
    check: str
    said: str
    remedy: str
    bad: bool = True


def check(launch: Launch, env: Mapping[str, str]) -> list[Finding]:
    """Ask all hosts, and measure those that answered; within 90 s.

    Args:
        env: variables of the ranks, credentials among them.
    """
    hosts = list(launch.hosts)
    writes, reads, server = stores(launch, env)
    output, token = Path(launch.output), uuid.uuid4().hex[:12]
    mark = output / f".preflight-{token}"
    if "://" not in launch.output:
        output.mkdir(parents=True, exist_ok=True)
        mark.touch()
    request = {
        "do": "facts",
        "output": launch.output,
        "config": launch.config,
        "peers": hosts,
        "writes": writes,
        "reads": reads,
        "mlflow": server,
        "token": token,
        "env": dict(env),
    }
    try:
        began = time.time()
        answers = remote.ask(launch.reach, dict.fromkeys(hosts, request), FACTS_SECONDS)
        window = (began, time.time())
        seen = {path.name for path in output.glob(f".preflight-{token}-*")}
    finally:
        for path in [mark, *output.glob(f".preflight-{token}-*")]:
            path.unlink(missing_ok=True)
    facts = {host: reply["facts"] for host, reply in answers.items() if "facts" in reply}
    found = [
        Finding(host, "reach", reply.get("unreachable") or str(reply.get("error")), _reach(host))
        for host, reply in answers.items()
        if host not in facts
    ]
    for host, known in facts.items():
        name = known["name"].get("value", host)
        if "shared" in known and f".preflight-{token}-{name}" not in seen:
            known["shared"] = {"error": "what it wrote to the output folder is not seen here"}
    found += judge(facts, window)
    if len(facts) > 1 and not any(f.check in ("python", "packages") for f in found):
        found += _measure(launch, list(facts))
    return found


def judge(
    facts: Mapping[str, Mapping[str, dict[str, Any]]], window: tuple[float, float]
) -> list[Finding]:
    """What the facts of each host say; ``window``: when they were asked for and had come, by the
    asker's clock."""
    found = []
    for host, known in facts.items():
        for check, fact in known.items():
            if "error" in fact:
                found.append(Finding(host, check, fact["error"], _REMEDIES.get(check, "")))
        value: dict[str, Any] = {check: fact.get("value") for check, fact in known.items()}
        if value.get("shared") is False:
            said = "what this machine wrote to the output folder is not there"
            found.append(Finding(host, "shared", said, _REMEDIES["shared"]))
        if value.get("peers"):
            said = f"does not know {', '.join(value['peers'])}"
            found.append(Finding(host, "peers", said, _REMEDIES["peers"]))
        if value.get("disk_gib") is not None and value["disk_gib"] < DISK_GIB:
            said = f"{value['disk_gib']:.1f} GiB are free for the output, {DISK_GIB:g} are needed"
            found.append(Finding(host, "disk_gib", said, _REMEDIES["disk_gib"]))
        if value.get("time") is not None:
            skew = max(window[0] - value["time"], value["time"] - window[1], 0.0)
            if skew > SKEW_SECONDS:
                said = f"its clock is {skew:.0f} s off this machine's"
                found.append(Finding(host, "time", said, "let it synchronise (chrony, ntpd)"))
    for check in ("python", "code", "config", "packages"):
        found += _odd(
            check, {h: k[check]["value"] for h, k in facts.items() if "value" in k[check]}
        )
    return found


def slow(hosts: Sequence[str], measured: Mapping[str, dict[str, Any]]) -> list[Finding]:
    """Hosts that hold the others up. Of two hosts a slow link cannot be laid to one."""
    found = []
    steps = {host: reply["step_seconds"] for host, reply in measured.items()}
    usual = statistics.median_low(list(steps.values()))
    for host, seconds in steps.items():
        if seconds > SLOW_STEP * usual:
            said = f"slow: a mock step takes {seconds:.3f} s, elsewhere {usual:.3f} s"
            remedy = "see what else runs there, its clock rate and its temperature; or leave it out"
            found.append(Finding(host, "step", said, remedy, bad=False))
    rates = {h: statistics.median([p[2] for p in r["pairs"]]) for h, r in measured.items()}
    best = statistics.median_high(list(rates.values()))
    for host, rate in rates.items():
        if len(hosts) > 2 and rate < SLOW_LINK * best:
            said = f"slow: {rate / 1e6:.0f} MB/s with the others, which have {best / 1e6:.0f}"
            remedy = "see its cable, port and interface (NCCL_SOCKET_IFNAME); or leave it out"
            found.append(Finding(host, "link", said, remedy, bad=False))
    # Of its quickest pair: what is slow with each of the others is slow itself.
    answers = {h: min(p[1] for p in r["pairs"]) for h, r in measured.items()}
    usual = statistics.median_low(list(answers.values()))
    for host, seconds in answers.items():
        late = seconds > max(SLOW_ANSWER * usual, usual + SLOW_ANSWER_SECONDS)
        if len(hosts) > 2 and late:
            said = f"slow: answers the others in {1e3 * seconds:.1f} ms, they in {1e3 * usual:.1f}"
            remedy = (
                "see where it stands in the network and what else uses its link; or leave it out"
            )
            found.append(Finding(host, "latency", said, remedy, bad=False))
    return found


def render(launch: Launch, findings: Sequence[Finding], seconds: float) -> str:
    """A verdict by host."""
    lines = []
    for host in launch.hosts:
        own = [f for f in findings if f.host == host]
        word = "FAILS" if any(f.bad for f in own) else "slow" if own else "ok"
        lines.append(f"{host:<20} {word}")
        lines += [f"    {f.check}: {f.said}\n        remedy: {f.remedy}" for f in own]
    bad = len({f.host for f in findings if f.bad})
    lines.append(f"preflight: {len(launch.hosts) - bad} of {len(launch.hosts)} hosts can run it")
    return "\n".join([*lines, f"({seconds:.0f} s)"])


def stores(launch: Launch, env: Mapping[str, str]) -> tuple[list[str], list[str], str | None]:
    """URLs that the run writes below, URLs that it reads, and its MLflow server, as far as its
    config and overrides name them."""
    texts: list[tuple[str, str]] = [("output", launch.output)]
    path: Path | None = Path(launch.code, launch.config)
    while path is not None and path.exists():
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        texts += list(_leaves("", tree))
        base = tree.get("base") if isinstance(tree, dict) else None
        path = path.parent / str(base) if base else None
    texts += [tuple(w.split("=", 1)) for w in launch.argv if "=" in w]  # type: ignore[misc]
    writes, reads, server = [], [], env.get("MLFLOW_TRACKING_URI")
    for name, text in texts:
        field = name.rpartition(".")[2]
        if not _URL.fullmatch(text):
            continue
        if field == "uri":
            server = server or text
        elif field in _WRITTEN:
            writes.append(text)
        else:
            reads.append(text)
    return sorted(set(writes)), sorted(set(reads)), server


def _leaves(name: str, tree: Any) -> Iterable[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(f"{name}.{key}", value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(name, value)
    elif isinstance(tree, str):
        yield name, tree


def _odd(check: str, values: Mapping[str, Any]) -> list[Finding]:
    """Hosts that differ from most."""
    if not values:
        return []
    usual = Counter(map(repr, values.values())).most_common(1)[0][0]
    base = next(v for v in values.values() if repr(v) == usual)
    found = []
    for host, value in values.items():
        if repr(value) != usual:
            if isinstance(value, dict):
                names = sorted(n for n in {*value, *base} if value.get(n) != base.get(n))
                said = "; ".join(f"{n} {value.get(n)}, elsewhere {base.get(n)}" for n in names[:5])
            else:
                said = f"{value}, elsewhere {base}"
            found.append(Finding(host, check, said, _REMEDIES[check]))
    return found


def _measure(launch: Launch, hosts: list[str]) -> list[Finding]:
    requests = {
        host: {
            "do": "pairs",
            "rank": rank,
            "world": len(hosts),
            "address": launch.options["main_address"] or hosts[0],
            "port": launch.port,
            "seconds": PAIRS_SECONDS,
        }
        for rank, host in enumerate(hosts)
    }
    answers = remote.ask(launch.reach, requests, PAIRS_SECONDS)
    failed = {h: str(r.get("unreachable") or r.get("error")) for h, r in answers.items()}
    failed = {h: said for h, said in failed.items() if "step_seconds" not in answers[h]}
    if failed:
        remedy = (
            f"open ports between the hosts (port {launch.port} of {hosts[0]}, and high ports); "
            "name the interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME in env"
        )
        return [Finding(host, "collective", said, remedy) for host, said in failed.items()]
    return slow(hosts, answers)


def _reach(host: str) -> str:
    return f"see that `ssh {host} true` works without a question, and that its Python is there"
