"""Moving an alias, through its gate."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import RegistryError
from pretrain.registry import golden, server, version
from pretrain.registry.gate import GateConfig, Verdict, judge


@dataclass(frozen=True)
class Promotion:
    """An alias that was moved.

    Attributes:
        uri: models:/NAME@ALIAS.
        version, before: the version it points to, and the one it pointed to; None: it is new.
        passed: what held, in words.
    """

    uri: str
    version: str
    before: str | None
    passed: list[str]


def promote(
    model_uri: str, uri: str, alias: str, gate: GateConfig, *, fresh: bool = False
) -> Promotion:
    """Point ``alias`` to a version if it passes the gate; else leave it where it is.

    The gate: every file has its recorded hash; golden outputs are reproduced in a clean environment
    of the logged releases; every metric rule holds, alone and against the version that has the
    alias now. What came of it is kept as a tag of the version either way.

    Args:
        model_uri: the candidate.
        uri: MLflow's tracking URI.
        alias: any but the candidate's own.
        fresh: install the logged requirements into a new virtual environment for the golden
            outputs, instead of linking what is installed.

    Raises:
        RegistryError: naming everything that does not hold.
    """
    if alias == server.CANDIDATE:
        raise RegistryError(
            f"--to={alias} is what `register` moves, without a gate; give another, as champion"
        )
    if not gate.rules:
        raise RegistryError(
            "gate.metrics is empty: nothing would be compared; give --config of a run with a gate "
            "section, or --set gate.metrics.zero_shot/SET/top1.drop=0"
        )
    with server.mlflow_at(uri, f"model={model_uri!r}") as client:
        candidate, _ = server.find(client, model_uri)
        champion = server.holder(client, candidate.name, alias)
        with tempfile.TemporaryDirectory(prefix="promote-") as scratch:
            verdicts = _verdicts(candidate, champion, gate, Path(scratch), fresh)
        failed = [v.text for v in verdicts if not v.passed]
        before = str(champion.version) if champion else None
        # One that holds the alias keeps the record it got it by: a stricter question that it fails
        # today must not stop those who pull it.
        if not failed or before != str(candidate.version):
            passed = [v.text for v in verdicts if v.passed]
            result = {"against": before, "passed": passed, "failed": failed}
            server.record_gate(client, candidate, alias, result)
        where = f"version {candidate.version} of {candidate.name!r}"
        if failed:
            held = f"stays at version {before}" if before else "is not set"
            raise RegistryError(
                f"{where} fails the gate for alias {alias!r}, which {held}: {'; '.join(failed)}"
            )
        now = server.holder(client, candidate.name, alias)
        if (str(now.version) if now else None) != before:
            raise RegistryError(
                f"alias {alias!r} was moved to version {now.version if now else None} meanwhile; "
                "promote again, to be compared with that"
            )
        client.set_registered_model_alias(candidate.name, alias, candidate.version)
    return Promotion(f"models:/{candidate.name}@{alias}", str(candidate.version), before, passed)


def _verdicts(
    candidate: Any, champion: Any | None, gate: GateConfig, scratch: Path, fresh: bool
) -> list[Verdict]:
    try:
        folder = server.download(candidate, scratch)
        version.verify(folder, candidate.tags.get(server.SUMS_TAG))
    except RegistryError as error:
        return [Verdict(False, str(error))]  # nothing of it is to be believed
    # The candidate's numbers are those of its card, which is hashed; tags can be edited.
    card = version.card(version.model_folder(folder))
    theirs = server.metrics(champion) if champion else None
    verdicts = judge(gate, version.card_metrics(card), theirs)
    if champion is not None:
        ours, held = card.get("evaluated_on") or {}, server.sets(champion)
        verdicts += [
            Verdict(False, f"set {name!r} is not the one that the champion was scored on")
            for name in sorted(ours.keys() & held.keys())
            if ours[name] != held[name]
        ]
    if not all(verdict.passed for verdict in verdicts):
        return verdicts  # a minute is not spent on what is refused anyway
    try:
        golden.check(folder, fresh=fresh, same_releases=True)
    except RegistryError as error:
        return [*verdicts, Verdict(False, str(error))]
    where = "a new virtual environment" if fresh else "a clean environment"
    return [*verdicts, Verdict(True, f"golden outputs reproduced in {where}")]
