"""How a submitted job is found again, and what is known of it."""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from launcher.marker import read_marker
from launcher.plan import Plan
from launcher.strict import JobError

State = Literal["queued", "running", "succeeded", "failed", "cancelled", "unknown"]
ENDED: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Status:
    """Where a job stands.

    code: its exit code, where the scheduler tells one. detail: the scheduler's own words.
    """

    state: State
    code: int | None = None
    detail: str = ""

    def exit_code(self) -> int:
        """Of the `status` verb: 0 unless the job ended otherwise than well."""
        return 0 if self.state in ("queued", "running", "succeeded") else self.code or 1


def marker_before(output: str) -> tuple[str, str] | None:
    """The end marker in ``output`` now; None, with a word to the user, if it cannot be seen."""
    marker, unseen = _marker(output)
    if unseen and "://" in output:
        print(f"warning: {unseen}", file=sys.stderr)
    return marker


def _marker(output: str) -> tuple[tuple[str, str] | None, str]:
    """The end marker, and why nothing is known of it."""
    remedy = "whether the run succeeded cannot be told from here"
    if "://" not in output and not Path(output).exists():
        return None, f"output={output!r} is not on this machine; {remedy}"
    try:
        return read_marker(output), ""
    except Exception as error:  # whatever the storage's library raises: no network, no rights
        why = str(error).partition("\n")[0][:200]
        return None, f"output={output!r} cannot be read ({type(error).__name__}: {why}); {remedy}"


@dataclass(frozen=True)
class Handle:
    """What submit leaves behind in `FOLDER/handle.json`.

    id: the scheduler's name of the job. before: the end marker that stood in the run's output when
    the job was submitted (None: there was none); a job that succeeds leaves another one.
    """

    backend: str
    id: str
    before: tuple[str, str] | None = None

    def save(self, folder: str) -> None:
        path = Path(folder, "handle.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, plan: Plan) -> "Handle":
        """Raises:
        JobError: this job was not submitted from this folder.
        """
        path = Path(plan.folder, "handle.json")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            before = tree["before"]
            return cls(plan.backend, str(tree["id"]), tuple(before) if before else None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JobError(
                f"name={plan.name!r} was not submitted to {plan.backend} from this folder "
                f"({path}: {type(error).__name__}); submit it, or go to the folder it was "
                "submitted from"
            ) from None


def truth(plan: Plan, status: Status) -> Status:
    """``status`` as the run's end marker shows it: a scheduler's word alone is no success.

    Where the run's output cannot be seen from here, a success is "unknown".
    """
    if status.state != "succeeded":
        return status
    before = Handle.load(plan).before
    after, unseen = _marker(plan.output)
    if unseen:
        return replace(status, state="unknown", code=None, detail=f"{status.detail}; {unseen}")
    if after is not None and after != before:
        return status
    detail = f"{status.detail} ends without an end marker of this job in {plan.output}".strip()
    return replace(status, state="failed", code=status.code or 1, detail=detail)
