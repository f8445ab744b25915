"""The documents agree with the code: generated tables are fresh, links lead somewhere, every code of a refusal is explained."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tscompile.options import Options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    for file, name in set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())):
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_every_row_about_sequence_parallelism_names_a_test() -> None:
    page = (ROOT / "docs/sequence-parallelism.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    claims = [row for row in rows if not re.match(r"\| (program|attention) \|", row)]
    assert len(claims) > 15 and len(rows) - len(claims) == 3
    assert [row for row in claims if "`tests/" not in row.rpartition(" | ")[2]] == []


@pytest.mark.parametrize("page", ["README.md", "docs/options.md"])
def test_every_option_is_documented(page: str) -> None:
    text = (ROOT / page).read_text()
    for row in Options.table():
        assert f"| `{row.key}` | {row.takes} |" in text, "stale: run ./dev docs"
        assert row.doc in text, "stale: run ./dev docs"


def test_every_code_of_a_refusal_is_explained() -> None:
    explained = set(re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE))
    position = {
        "Keep": 0,
        "Verdict": 1,
        "judge_ready": 0,
        "keep_group": 1,
        "keep_site": 1,
    }  # where the call takes its code
    used = set()
    for path in (ROOT / "tscompile").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            code = node.args[position[name]] if name in position and len(node.args) > position[name] else None
            if isinstance(code, ast.Constant) and code.value:
                used.add(code.value)
    assert len(used) > 30
    assert used <= explained, "add the code to docs/troubleshooting.md"


def test_dev_script_says_what_it_can() -> None:
    good = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, timeout=20)
    bad = subprocess.run([ROOT / "dev", "tset"], capture_output=True, text=True, timeout=20)
    assert good.returncode == 0 and "test [args]" in good.stdout
    assert bad.returncode == 1 and "unknown command: tset" in bad.stderr


def test_generator_finds_the_report_in_the_output_of_a_program() -> None:
    code = (
        "import sys; sys.path.insert(0, 'docs'); import generate\n"
        "from tscompile.report import Report; from tscompile.problem import Row\n"
        "row = Row('s', 'g', 'forward', None, '0', 2, ['all_reduce'], 'unmatched', 'c', 'why')\n"
        "found = generate.report_in(f'step 1\\n\\n{Report([row])}\\nloss 3\\n')\n"
        "assert found == f'```text\\n{Report([row])}\\n```', found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
