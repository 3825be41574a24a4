"""How a submitted job is found again, and what is known of it."""

import json
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
        return 0 if self.state not in ("failed", "cancelled") else self.code or 1


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
    """``status`` as the run's end marker shows it: a scheduler's word alone is no success."""
    if status.state != "succeeded":
        return status
    before, after = Handle.load(plan).before, read_marker(plan.output)
    if after is not None and after != before:
        return status
    detail = f"{status.detail} ends without an end marker of this job in {plan.output}".strip()
    return replace(status, state="failed", code=status.code or 1, detail=detail)
