"""Dependencies point one way: each layer is imported in a fresh process in which everything above it cannot be imported.

The modules are listed from the package's folder, so a new file is held to the rules of its layer without an edit here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tscompile"

LEAVES = ["problem", "options", "errors", "observe", "versions", "switches"]
READERS = ["report", "doctor", "probes"]  # read leaves only
LAYERS = [
    "nvshmem",
    "language",
    "templates",
    "lowering",
    "fx_passes",
]  # bottom to top; the modules that are in no list stand above

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {blocked!r}):
            raise ImportError(f"{{name}} is imported from below")

sys.meta_path.insert(0, Blocker())
"""


def run(code: str, blocked: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr


def import_all(modules: list[str]) -> str:
    return "".join(f"import {module}\n" for module in modules)


def units() -> set[str]:
    """Direct children of the package, modules and subpackages alike."""
    children = [*PACKAGE.glob("*.py"), *(path.parent for path in PACKAGE.glob("*/__init__.py"))]
    return {path.stem for path in children} - {"__init__"}


def modules_of(unit: str) -> list[str]:
    if (PACKAGE / f"{unit}.py").exists():
        return [f"tscompile.{unit}"]
    relative = sorted(path.relative_to(PACKAGE).with_suffix("").parts for path in (PACKAGE / unit).rglob("*.py"))
    return [".".join(("tscompile", *parts)).removesuffix(".__init__") for parts in relative]


def all_but(allowed: list[str]) -> list[str]:
    return [f"tscompile.{unit}" for unit in sorted(units() - set(allowed))]


def test_the_package_imports_nothing_heavy() -> None:
    run("import tscompile; tscompile.__version__", ["torch", "tilelang", "tvm", "rich", "numpy", "sympy"])


@pytest.mark.parametrize("unit", LEAVES)
def test_leaves_import_leaves_only(unit: str) -> None:
    run(import_all(modules_of(unit)), [*all_but(LEAVES), "torch", "tilelang", "tvm", "rich"])


@pytest.mark.parametrize("unit", READERS)
def test_readers_import_leaves_only(unit: str) -> None:
    run(import_all(modules_of(unit)), [*all_but(LEAVES + READERS), "torch", "tilelang", "tvm", "rich"])


@pytest.mark.parametrize("unit", LAYERS)
def test_layers_import_nothing_above_them(unit: str) -> None:
    below = LAYERS[: LAYERS.index(unit) + 1]
    kernels = (
        [] if unit in ("language", "templates") else ["tilelang"]
    )  # built when an op first runs, never when imported
    run(import_all(modules_of(unit)), [*all_but(LEAVES + below), *kernels])


def test_the_language_package_imports_tilelang_when_it_is_used() -> None:
    run("import tscompile.language as tl\ntl.fill_context, tl.WORDS, dir(tl)", ["torch", "tilelang", "tvm"])


def test_templates_import_tilelang_when_they_compile() -> None:
    """A process that finds its kernels compiled starts without it."""
    run("import tscompile.templates, tscompile.lowering.nvlink", ["tilelang", "tvm"])


def test_the_exports_of_the_language_package() -> None:
    run(
        "import pkgutil, importlib, tscompile.language as tl\n"
        "for module in pkgutil.iter_modules(tl.__path__):\n"
        "    importlib.import_module('tscompile.language.' + module.name)\n"
        "for name in tl.__all__:\n"
        "    assert type(getattr(tl, name)) is not type(tl), name\n"
        "assert set(tl._EXPORTS) < set(tl.__all__)\n",
        [],
    )


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(
    ("unit", "forbidden"),
    [
        ("nvshmem", ("torch.fx", "torch._inductor", "torch._dynamo", "tilelang")),
        ("language", ("torch.fx", "torch._inductor", "torch._dynamo")),
        ("templates", ("torch.fx", "torch._inductor", "torch._dynamo")),
        ("fx_passes", ("tilelang", "tvm")),
    ],
)
def test_no_layer_names_what_is_not_its_business(unit: str, forbidden: tuple[str, ...]) -> None:
    """Also inside functions, where a blocked import would not show."""
    wrong = {
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in (PACKAGE / unit).rglob("*.py")
        for name in imported_names(path)
        if any(f"{name}.".startswith(f"{prefix}.") for prefix in forbidden)
    }
    assert not wrong


def test_exports_that_need_no_torch() -> None:
    run(
        "import tscompile\n"
        "tscompile.Options(), tscompile.patch, tscompile.Report([]), tscompile.reports()\n"
        "assert set(tscompile.__all__) <= set(dir(tscompile))\n",
        ["torch", "tilelang", "rich"],
    )


def test_exports_are_what_they_say_even_after_their_module_was_imported() -> None:
    """`tscompile.explain` is a function and the name of its module: importing the module must not hide the function."""
    run(
        "import importlib, tscompile\n"
        "for name, module in tscompile._EXPORTS.items():\n"
        f"    if module in {sorted(units())!r}:\n"
        "        importlib.import_module('tscompile.' + module)\n"
        "        assert callable(getattr(tscompile, name)), name\n",
        [],
    )


def test_unknown_attribute() -> None:
    run(
        "import tscompile\n"
        "try:\n    tscompile.nothing\n"
        "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n",
        ["torch"],
    )
