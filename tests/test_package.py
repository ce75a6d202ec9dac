"""The package as a whole: PyTorch and NumPy are enough, types are announced, versions agree, imports point one way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path

import persample

IMPORT_ALL = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # importing any of these now fails
import importlib, pkgutil, persample
for module in pkgutil.walk_packages(persample.__path__, "persample."):
    importlib.import_module(module.name)
    print(module.name)
"""
PACKAGE = Path(persample.__file__).parent
PARTS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__", "__pycache__"}
MODULE_OF = {
    "backpack-for-pytorch": "backpack",
    "curvlinops-for-pytorch": "curvlinops",
    "laplace-torch": "laplace",
    "scikit-learn": "sklearn",
    "traker": "trak",
}


def test_every_module_imports_without_the_extras() -> None:
    extras = {re.split(r"[^\w-]", r)[0] for r in requires("persample") or [] if "extra ==" in r} - {"persample"}
    assert {"matplotlib", "tqdm", "opacus"} < extras
    blocked = [MODULE_OF.get(name, name.replace("-", "_")) for name in sorted(extras)]
    run = subprocess.run([sys.executable, "-c", IMPORT_ALL, *blocked], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "persample.gradients" in run.stdout.split()


def test_nothing_else_is_required() -> None:
    always = [r for r in requires("persample") or [] if "extra ==" not in r]
    assert {re.split(r"\W", r)[0] for r in always} == {"torch", "numpy"}


def test_it_is_typed_and_says_its_version() -> None:
    assert files(persample).joinpath("py.typed").is_file()
    cited = (Path(__file__).parent.parent / "CITATION.cff").read_text()
    assert persample.__version__ == version("persample")
    assert f"version: {persample.__version__}\n" in cited


def test_public_names_exist() -> None:
    assert len(set(persample.__all__)) == len(persample.__all__)
    assert not [name for name in persample.__all__ if not hasattr(persample, name)]


def imported(path: Path) -> set[str]:
    """The parts (files and folders of the package) that a file imports as it is imported itself."""
    package = ["persample", *path.relative_to(PACKAGE).parent.parts]
    found: list[list[str]] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found += [[*base, name.name] for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name.split(".") for name in node.names]
    return {names[1] for names in found if names[0] == "persample" and len(names) > 1} & PARTS


def test_imports_point_one_way() -> None:
    arrows: dict[str, set[str]] = {part: set() for part in PARTS}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            arrows[part] |= imported(path) - {part}
    TopologicalSorter(arrows).prepare()  # raises where there is a circle
    assert arrows["factors"] <= {"convolution", "cost", "errors", "scratch"}  # tensors only
    assert not arrows["rules"] & {"capture", "engines", "gradients"}
    assert not arrows["gradients"] & {"rules", "engines", "capture"}
