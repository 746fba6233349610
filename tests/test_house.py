"""Rules that no single module can keep: one version, forbidden calls, floors, wheel, README."""

import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "rootflow"
SOURCES = sorted(SRC.rglob("*.py"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Whatever could run code from a file, or change torch's or numpy's global state.
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.save", "yaml.load", "torch.hub.load",
    "torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.random.manual_seed",
    "torch.set_default_dtype", "torch.set_default_device", "torch.set_default_tensor_type",
    "numpy.random.seed", "np.random.seed", "random.seed",
}  # fmt: skip
FORBIDDEN_ENDINGS = ("set_default_validate_args",)
# The gas table exists only as a pickle; its reader lets array constructors through, nothing else,
# and runs only where the user asked for it with --unpickle.
PICKLE_READER = SRC / "data" / "gas_frame.py"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def fenced(guide: Path, language: str) -> str:
    """All blocks of one language in a guide, one after the other."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", guide.read_text(), re.DOTALL | re.MULTILINE)
    return "".join(text for name, text in blocks if name == language)


def findings(tree: ast.AST) -> list[tuple[int, str]]:
    """Every forbidden import, call or argument of one file, as (line, what)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [(node.lineno, n) for n in names if n.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            full = {f"{module}.{alias.name}" for alias in node.names}
            if module.split(".")[0] in FORBIDDEN_MODULES or full & FORBIDDEN_CALLS:
                found.append((node.lineno, f"from {module} import"))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.endswith(FORBIDDEN_ENDINGS):
                found.append((node.lineno, f"{name}()"))
            for keyword in node.keywords:
                value = keyword.value
                off = isinstance(value, ast.Constant) and value.value is False
                if keyword.arg == "allow_pickle" and not off:
                    found.append((node.lineno, "allow_pickle other than False"))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "x = torch.load('a')",
        "eval('1')",
        "np.load('a', allow_pickle=True)",
        "torch.manual_seed(0)",
    ],
)
def test_the_search_for_forbidden_calls_finds_them(line):
    assert findings(ast.parse(line))


def test_the_search_lets_harmless_calls_through():
    assert not findings(
        ast.parse("flow.eval(); g.manual_seed(1); np.load('a', allow_pickle=False)")
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SRC)))
def test_source_file(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    allowed = [what for _, what in findings(tree)] == ["pickle"] and path == PICKLE_READER
    assert allowed or not findings(tree)
    assert len(text.splitlines()) <= 500
    assert f'"{VERSION}"' not in text, "the version is written in pyproject.toml only"
    if tree.body:
        assert ast.get_docstring(tree), "the first sentence says what the file is for"


def test_version_is_the_same_everywhere():
    import rootflow

    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == VERSION
    try:
        installed = importlib.metadata.version("rootflow")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree: there is nothing that could disagree
    assert installed == rootflow.__version__ == VERSION


def test_import_is_light():
    heavy = ["matplotlib", "pandas", "polars", "pyarrow", "scipy", "sklearn", "typer"]
    code = f"import sys, rootflow; print(*[m for m in {heavy} if m in sys.modules])"
    result = run_python("-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_modules_import_only_from_floors_below():
    code = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wheel_holds_code_and_data(tmp_path):
    result = run_python("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    files = {p for p in SRC.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {str(p.relative_to(SRC.parent)) for p in files} <= packed
    assert "rootflow/py.typed" in packed
    endings = {Path(name).name for name in packed}
    assert {"galaxies.parquet", "digits.parquet", "LICENSE", "entry_points.txt"} <= endings
    assert "rootflow/experiments/toml/zoo-2d.toml" in packed


def test_guides_name_only_commands_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set()
    for guide in GUIDES:
        named |= set(re.findall(r"(?:^|`)make ([a-z]+)", guide.read_text(), flags=re.MULTILINE))
    assert {"run", "test"} <= named <= targets

    overview = run_python("-c", "from rootflow.cli import main; main()", "--help").stdout
    for guide in GUIDES:
        for command in re.findall(r"^rootflow ([a-z]+)", fenced(guide, ""), flags=re.MULTILINE):
            assert re.search(rf"\b{command}\b", overview), f"{guide.name}: rootflow {command}"


def test_python_examples_use_names_that_exist():
    for guide in GUIDES:
        for node in ast.walk(ast.parse(fenced(guide, "python"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "rootflow":
                module, names = "rootflow", [node.attr]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rootflow"):
                module, names = node.module, [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                known = hasattr(importlib.import_module(module), name)
                if not known and isinstance(node, ast.ImportFrom):  # then it may be a submodule
                    known = importlib.util.find_spec(f"{module}.{name}") is not None
                assert known, f"{guide.name}: {name}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 130
