"""The package as it is installed, and the shape of its code: what a wheel holds, which way imports run."""

import ast
import importlib.metadata
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Each may import those that follow it; the root's own modules (errors.py) are for all.
LAYERS = ["pipelines", "distill", "rl", "rewards", "model", "kernels"]
# Imported where a GPU computes, and brought by the torch that serves GPUs, in the version it is built with.
BY_TORCH = {"triton"}
MODULES = sorted([*ROOT.glob("*.py"), *(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))])
DATA = sorted(
    path
    for pattern in ("recipes/*.yaml", "model/presets/**/*", "pipelines/*.html")
    for path in ROOT.glob(pattern)
    if path.is_file()
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """The absolute names that a module imports: 'torch', 'amalgam.rl.engine'; inside functions too."""
    package = ["amalgam", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves a build folder beside the source
    for path in [*MODULES, *DATA, *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", folder, source], check=True, timeout=120)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == {f"amalgam/{relative(path)}" for path in [*MODULES, *DATA]}
    assert {"amalgam/recipes/quickstart.yaml", "amalgam/recipes/tiny-base.yaml"} <= files
    assert any(name.startswith("amalgam/model/presets/") and name.endswith(".safetensors") for name in files)


def test_wheel_installs_one_top_level_name(wheel):
    (metadata,) = {name.split("/")[0] for name in wheel.namelist()} - {"amalgam"}
    assert metadata.endswith(".dist-info")
    scripts = wheel.read(f"{metadata}/entry_points.txt").decode()
    assert "amalgam = amalgam.pipelines.cli:main" in scripts


def test_packages_are_the_folders_with_code():
    folders = {path.parent.relative_to(ROOT) for path in MODULES} - {Path()}
    assert all((ROOT / folder / "__init__.py").exists() for folder in folders)
    found = {".".join(["amalgam", *folder.parts]) for folder in folders}
    assert {"amalgam", *found} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_run_one_way(path):
    layer = path.relative_to(ROOT).parts[0] if path.parent != ROOT else None
    allowed = LAYERS[LAYERS.index(layer) :] if layer else []
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in {"tests", "benchmarks", *LAYERS}, f"{relative(path)} imports {name}"
        if top == "amalgam":
            inner = rest.partition(".")[0]
            assert inner not in LAYERS or inner in allowed, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_inside_the_package_are_relative(path):
    assert not re.findall(r"^\s*(?:from|import) amalgam\b.*", path.read_text(), re.MULTILINE)


def test_dependencies_are_what_the_code_imports():
    distributions = importlib.metadata.packages_distributions()
    tops = {name.partition(".")[0] for path in MODULES for name in imports(path)}
    foreign = tops - set(sys.stdlib_module_names) - {"amalgam", "__future__"}
    assert foreign >= BY_TORCH
    imported = {normal(dist) for top in foreign - BY_TORCH for dist in distributions.get(top, [top])}
    assert imported == {normal(each) for each in PROJECT["project"]["dependencies"]}


def test_triton_is_imported_where_a_gpu_computes():
    users = {relative(path) for path in MODULES if any(name.partition(".")[0] == "triton" for name in imports(path))}
    assert {user for user in users if not user.startswith("kernels/fused/")} == {"kernels/dispatch.py"}


def test_every_requirement_is_pinned():
    pinned = {normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = {normal(each) for each in [*PROJECT["project"]["dependencies"], *itertools.chain(*extras)]}
    assert wanted - {"amalgam"} <= pinned  # an extra may hold another of ours


def normal(requirement: str) -> str:
    name = re.split(r"[\[<>=!~; (]", requirement.strip())[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_console_scripts_can_be_called():
    (script,) = importlib.metadata.distribution("amalgam").entry_points
    assert script.name == "amalgam"
    assert callable(script.load())


@pytest.mark.parametrize("statement", ["import amalgam", "import amalgam.pipelines.cli"])
def test_the_front_door_imports_nothing_heavy(statement):
    heavy = ["torch", "ray", "deepspeed", "transformers", "datasets", "wandb", "reasoning_gym"]
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_nothing_of_ours_shadows_other_packages():
    """Hugging Face has a `kernels`; `rl`, `model` and the rest are names that anyone may use."""
    assert str(ROOT) not in sys.path
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    command = [sys.executable, "-c", code, *LAYERS, "recipes", "tests"]
    assert subprocess.run(command, capture_output=True, text=True, cwd="/").stdout.strip() == "[]"


@pytest.mark.parametrize("path", [*MODULES, *(ROOT / "tests").rglob("*.py")], ids=relative)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500
