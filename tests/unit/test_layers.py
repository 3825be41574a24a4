"""Imports go down the layers only. The layers are the tables below; nothing else knows them.

A module may import its own layer and those under it, but for what `APART` lists.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# layer -> the modules (x means x.py) and folders (x/ means all in it) of that layer
LAYERS: dict[str, list[str]] = {
    "pretrain": [
        "errors config plugins remote storage comm types rng ops progress mlflow_env "
        "mlflow_server hub stop watchdog sentinel profiling node_metrics distances hardware page/ "
        "pipeline_files/",
        "data/ diffusion/ model/ features/",
        "objectives/",
        "task ema inference weights classifier diffusers_folder pipeline_parts pretrained describe",
        "engine engine_config streaming optim partitions parts guard",
        "mirror checkpoint evaluators/ tracking/ registry/ pyfunc_model",
        "run_config plan abstract flops opcost communication roofline forecast forecast_text",
        "train export card heads_page ckpt_tools summary encode encoders suite results scorecard "
        "scorecard_log",
        "report/",
        "commands/ __main__",
    ],
    "launcher": [
        "strict secrets job plan marker tracked handle shell jobfile",
        "rendezvous preflight supervise node "
        "records ticket rank remote host facts pairs launch monitor restarts attempts init",
        "backends/",
        "__main__",
    ],
}
# part -> the parts of its own layer that it may not import all the same
APART = {
    "data/": {"diffusion/", "model/"},
    "diffusion/": {"data/", "model/"},
    "model/": {"data/"},
    "features/": {"diffusion/", "model/"},
}
# Files that may import deepspeed: the engine anywhere, the others inside a function only.
DEEPSPEED = {
    "pretrain/engine.py": "anywhere",
    "pretrain/ops.py": "in functions",
    "pretrain/export.py": "in functions",
    "pretrain/streaming.py": "in functions",
}


def part_of(package: str, module: str) -> tuple[str, int] | None:
    """The table's entry for ``module`` and its layer (`pretrain.data.shards`: `data/`, 1).

    None for the package itself; LookupError where the table has no place for it.
    """
    inner = module.split(".")[1:]
    if not inner:
        return None
    for layer, row in enumerate(LAYERS[package]):
        for part in row.split():
            if part == inner[0] or part == f"{inner[0]}/":
                return part, layer
    raise LookupError(
        f"{package}/{inner[0]}: no layer; add {inner[0]!r} to LAYERS in tests/unit/test_layers.py"
    )


def imports(path: Path, root: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether at the top of the file) of every import in ``path``."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    lazy = {
        inner
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for inner in ast.walk(outer)
    }
    package = list(path.relative_to(root).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node not in lazy
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from pretrain import comm` names a module, `from pretrain.comm import rank` not.
                inner = root.joinpath(*module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield (
                    (f"{module}.{alias.name}" if is_module else module),
                    node.lineno,
                    node not in lazy,
                )


def violations(root: Path) -> list[str]:
    """Every import below ``root`` that the tables forbid, as `file:line: what`."""
    found = []
    for package in LAYERS:
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(
                ".__init__"
            )
            try:
                own = part_of(package, module)
                for imported, line, at_top in imports(path, root):
                    problem = forbidden(package, own, name, imported, at_top)
                    if problem:
                        found.append(f"{name}:{line}: {problem}")
            except LookupError as unknown:
                found.append(str(unknown.args[0]))
    return sorted(set(found))


def forbidden(
    package: str, own: tuple[str, int] | None, name: str, imported: str, at_top: bool
) -> str | None:
    """Why the file ``name``, of the part ``own``, may not import ``imported``; None if it may."""
    top = imported.split(".")[0]
    if top == "deepspeed":
        allowed = DEEPSPEED.get(name)
        if allowed is None:
            return f"imports deepspeed; only {', '.join(DEEPSPEED)} may"
        return (
            "imports deepspeed at its top; do it inside the function"
            if at_top and allowed != "anywhere"
            else None
        )
    if top in LAYERS and top != package:
        return f"{package} imports {imported}; the two packages do not know each other"
    target = part_of(package, imported) if top == package else None
    if target is None:
        return None
    if own is None:
        return (
            f"a package's __init__ imports {imported}; every import of the package would pay for it"
        )
    if target[1] > own[1]:
        return (
            f"{own[0]} (layer {own[1]}) imports {imported} (layer {target[1]}), which is above it"
        )
    if target[0] in APART.get(own[0], ()):
        return f"{own[0]} imports {imported}; the two stand apart (APART)"
    return None


def test_imports_go_down() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("pretrain/rng.py", "import pretrain.train", "above it"),
        ("pretrain/rng.py", "def f():\n    from pretrain import train", "above it"),
        ("pretrain/data/x.py", "from ..model import y", "stand apart"),
        ("pretrain/data/x.py", "from pretrain.model.y import z", "stand apart"),
        ("pretrain/objectives/x.py", "from pretrain.task import Task", "above it"),
        ("pretrain/task.py", "import deepspeed.comm", "imports deepspeed"),
        ("pretrain/ops.py", "import deepspeed", "inside the function"),
        ("pretrain/__init__.py", "from pretrain import train", "__init__"),
        ("launcher/job.py", "import pretrain.config", "do not know each other"),
        ("launcher/job.py", "from launcher.backends import local", "above it"),
        ("pretrain/novel.py", "", "add 'novel' to LAYERS"),
        ("pretrain/task.py", "import pretrain.novel", "add 'novel' to LAYERS"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str, said: str) -> None:
    """The check itself can fail: each of these is planted in an otherwise good tree."""
    for name in ("pretrain/train.py", "pretrain/model/y.py", "launcher/backends/local.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert file == "pretrain/novel.py" or violations(tmp_path) == []
    (tmp_path / file).write_text(text)
    (problem,) = violations(tmp_path)
    assert said in problem


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pretrain/data/x.py", "from pretrain import storage\nfrom . import y"),
        ("pretrain/model/x.py", "from pretrain.diffusion import path"),
        ("pretrain/task.py", "import pretrain.ema"),  # the same layer
        ("pretrain/engine.py", "import deepspeed"),
        ("pretrain/ops.py", "def f():\n    import deepspeed"),
        (
            "launcher/backends/slurm.py",
            "from launcher.supervise import run\nfrom launcher.backends import local",
        ),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, text: str) -> None:
    for name in (
        "pretrain/storage.py",
        "pretrain/ema.py",
        "pretrain/data/y.py",
        "launcher/backends/local.py",
        file,
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


def test_planning_a_run_needs_no_torch() -> None:
    """A login node plans runs: the launcher's files import only light packages at their top."""
    light = {"yaml", "pydantic", "psutil", "fsspec", "launcher", *sys.stdlib_module_names}
    for path in sorted((ROOT / "launcher").rglob("*.py")):
        heavy = {
            module
            for module, _, at_top in imports(path, ROOT)
            if at_top and module.split(".")[0] not in light
        }
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy} at its top"
