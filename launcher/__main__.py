"""`python -m launcher BACKEND [VERB] --config job.yaml`: plan a job, submit it, ask after it."""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from launcher import backends, jobfile
from launcher.handle import ENDED, Status, truth
from launcher.job import JobError, JobSpec
from launcher.plan import Plan
from launcher.tracked import Tracked

VERBS = ("submit", "status", "logs", "cancel", "preflight")
_POLL_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: the backend's own, or 2 for a job that cannot run as asked."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["node"]:
            return int(import_module("launcher.node").main(arguments[1:]))
        args = _parser().parse_args(arguments)
        backend = backends.load(args.backend)
        plan = backend.plan(_job(args))
        if args.dry_run:
            print(plan.render(), end="")
            return 0
        return _do(args.verb, backend, plan, args.wait)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _do(verb: str, backend: backends.Backend, plan: Plan, wait: bool) -> int:
    if verb == "preflight":
        look = getattr(backend, "preflight", None)
        if look is None:
            raise JobError(
                f"verb='preflight' has no meaning on {plan.backend}: its scheduler chooses the "
                "hosts; it is for hostfile"
            )
        return int(look(plan))
    if verb == "cancel":
        backend.cancel(plan)
    elif verb == "logs":
        for line in backend.logs(plan):
            print(line)
    else:
        code = backend.submit(plan) if verb == "submit" else 0
        if code or (verb == "submit" and not wait):
            return code
        return _report(plan, _status(backend, plan, wait))
    return 0


def _status(backend: backends.Backend, plan: Plan, wait: bool) -> Status:
    status = backend.status(plan)
    while wait and status.state not in ENDED:
        time.sleep(_POLL_SECONDS)
        status = backend.status(plan)
    return truth(plan, status)


def _report(plan: Plan, status: Status) -> int:
    code = "" if status.code is None else f", exit code {status.code}"
    detail = f" ({status.detail})" if status.detail else ""
    print(f"{plan.name}: {status.state}{code}{detail}")
    tracked = Tracked.read(plan.output)
    if tracked is not None:
        print(f"{plan.name}: {tracked.describe(plan.output, status.state in ENDED)}")
    return status.exit_code()


def _parser() -> argparse.ArgumentParser:
    known = "\n".join(f"  {name:<12} {backends.load(name).HELP}" for name in backends.names())
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Start a pretraining run; it continues what its output folder holds.",
        epilog=f"backends:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("backend", help="where to run; one of those below")
    parser.add_argument(
        "verb",
        nargs="?",
        choices=VERBS,
        default="submit",
        help="what to do with the job (default: submit)",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="job file as in configs/jobs/, or config of a run as in configs/",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="lay a value over the run's config",
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder or URL of the run (default: the config's)"
    )
    parser.add_argument("--name", help="name of the job (default: from the config's file name)")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks on each node (default: one per GPU, or 2 on CPU)",
    )
    parser.add_argument("--nodes", type=int, metavar="N", help="machines (default: 1)")
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="variable for every rank; plans show it",
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="variable for every rank, by where its value lies: env:NAME, file:/path, ...",
    )
    parser.add_argument(
        "--port", type=int, help="port of the rendezvous (default: derived from name and output)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument(
        "--wait", action="store_true", help="stay until the job has ended, and exit as it did"
    )
    return parser


def _job(args: argparse.Namespace) -> JobSpec:
    given = {
        "name": args.name,
        "output": args.output,
        "overrides": args.overrides,
        "nodes": args.nodes,
        "ranks_per_node": args.ranks,
        "env": dict(_variable("--env", text) for text in args.env),
        "secrets": dict(_variable("--secret", text) for text in args.secret),
        "port": args.port,
    }
    return jobfile.load(args.config, given)


def _variable(option: str, text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise JobError(f"{option} {name!r} must have the form NAME=value")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
