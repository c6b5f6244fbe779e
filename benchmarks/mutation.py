"""Mutation run over losses, quantizer and controller: does a changed sign, index or bound make a test fail?

The Triton files are left out: their arithmetic runs compiled or interpreted, where mutmut does not reach. They are compared
with torch and float64 by tests of their own.

Works on a copy of the three rooms and their tests with an empty package file, so that neither llm-compressor nor
transformers is imported; mutmut changes one operator, number, name or argument at a time and runs the tests that reach
the changed function. mutmut leaves decorated functions alone; to have those mutated too, the copy is rewritten without
changing what it computes: ``@torch.no_grad()`` becomes a ``with`` block, ``@once_differentiable`` is dropped and
``@property`` becomes an assignment. Texts of error messages are not mutated (lines that start with a string).

    pip install mutmut==3.8.1            into an environment that has the package's own dependencies
    python benchmarks/mutation.py        about 20 minutes on one core; --children 2 for two
    python benchmarks/mutation.py --report-only

Writes results/mutation/results.json and survivors.md. A survivor that cannot be killed is explained in
results/mutation/reasons.json: "module function" -> list of [part of its diff, why it survives].
"""

import argparse
import ast
import difflib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import libcst as cst

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutation"
RESULTS = Path(__file__).resolve().parent / "results" / "mutation"
ROOMS = ["losses", "quantizer", "controller.py"]
TESTS = ["losses", "quantizer", "reference", "test_controller.py"]
CONFIGURATION = """
[tool.mutmut]
source_paths = ["grace_plugin"]
do_not_mutate = ["*_triton.py"]
do_not_mutate_patterns = ['^\\s*f?"', 'raise \\w+\\(f?"']
pytest_add_cli_args = ["-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = ["tests"]
timeout_multiplier = 10.0
timeout_constant = 60.0

[tool.pytest.ini_options]
pythonpath = ["."]
"""
KILLED, SURVIVED, UNTESTED, TIMEOUT, NOT_RUN = "killed", "survived", "no tests", "timeout", "not run"
STATUS = {
    None: NOT_RUN,
    0: SURVIVED,
    1: KILLED,
    3: KILLED,
    5: UNTESTED,
    33: UNTESTED,
    36: TIMEOUT,
    24: TIMEOUT,
    -24: TIMEOUT,
    152: TIMEOUT,
}


class Undecorate(cst.CSTTransformer):
    """Rewrite decorated functions so that mutmut mutates their bodies."""

    def leave_FunctionDef(  # noqa: N802 - libcst's own name
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef | cst.FlattenSentinel[cst.BaseStatement]:
        """no_grad into the body, once_differentiable away, property into an assignment."""
        kept, silent, is_property = [], False, False
        for decorator in updated_node.decorators:
            text = cst.Module([]).code_for_node(decorator.decorator)
            silent |= text == "torch.no_grad()"
            is_property |= text == "property"
            if text not in ("torch.no_grad()", "once_differentiable", "property"):
                kept.append(decorator)
        node = updated_node.with_changes(decorators=kept)
        if silent:
            body = node.body.with_changes(body=node.body.body[1 if updated_node.get_docstring() else 0 :])
            block = cst.With(items=[cst.WithItem(cst.parse_expression("torch.no_grad()"))], body=body)
            node = node.with_changes(body=cst.IndentedBlock([block]))
        if not is_property:
            return node
        name = node.name.value
        assignment = cst.parse_statement(f"{name} = property(_get_{name})\n")
        return cst.FlattenSentinel([node.with_changes(name=cst.Name(f"_get_{name}")), assignment])


def prepare(resume: bool) -> None:
    """A fresh copy of rooms and tests in WORK; with ``resume`` mutmut keeps its verdicts on unchanged functions."""
    for name in ["grace_plugin", "tests"] if resume else ["."]:
        shutil.rmtree(WORK / name, ignore_errors=True)
    (WORK / "grace_plugin").mkdir(parents=True)
    (WORK / "tests").mkdir()
    for package in ("grace_plugin", "tests"):
        (WORK / package / "__init__.py").touch()
    ignored = shutil.ignore_patterns("__pycache__", "test_*_triton.py")
    for parent, names in (("grace_plugin", ROOMS), ("tests", TESTS)):
        for name in names:
            source, target = ROOT / parent / name, WORK / parent / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=ignored)
            else:
                shutil.copy(source, target)
    for path in (WORK / "grace_plugin").rglob("*.py"):
        path.write_text(cst.parse_module(path.read_text()).visit(Undecorate()).code)
    (WORK / "pyproject.toml").write_text(CONFIGURATION)


def mutmut(*arguments: str) -> None:
    """Run mutmut in WORK on one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    subprocess.run([sys.executable, "-m", "mutmut", *arguments], cwd=WORK, env=environment, check=False)


def verdicts() -> dict[str, str]:
    """Mutant -> killed, survived, no tests or timeout."""
    found = {}
    for meta in sorted((WORK / "mutants").rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        found |= {name: STATUS.get(code, f"exit {code}") for name, code in codes.items()}
    return found


def place(mutant: str) -> str:
    """ "losses.head _chunk" of mutmut's name for a mutant."""
    module, _, function = mutant.removeprefix("grace_plugin.").rpartition(".")
    function = function.rpartition("__mutmut_")[0]
    return f"{module} {function.removeprefix('x_').replace('xǁ', '').replace('ǁ', '.').replace('._get_', '.')}"


@functools.cache
def functions(module: str) -> dict[str, list[str]]:
    """The body of every original and mutated function of a module, as mutmut wrote them."""
    text = (WORK / "mutants" / (module.replace(".", "/") + ".py")).read_text()
    lines = text.splitlines()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {node.name: lines[node.lineno : node.end_lineno] for node in nodes}


def changed_lines(mutant: str) -> str:
    """The changed lines of a mutant, without context."""
    module, _, name = mutant.rpartition(".")
    found = functions(module)
    original = found[name.rpartition("__mutmut_")[0] + "__mutmut_orig"]
    lines = difflib.unified_diff(original, found[name], lineterm="", n=0)
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def report() -> bool:
    """Write the results; True when all were tested, at least 90 % killed and every survivor has a reason."""
    found = verdicts()
    reasons_file = RESULTS / "reasons.json"
    reasons = json.loads(reasons_file.read_text()) if reasons_file.exists() else {}
    survivors = []
    for mutant, status in found.items():
        if status in (KILLED, TIMEOUT, NOT_RUN):
            continue
        where, diff = place(mutant), changed_lines(mutant)
        why = next((reason for part, reason in reasons.get(where, []) if part in diff), None)
        survivors.append({"mutant": mutant, "where": where, "status": status, "diff": diff, "reason": why})
    counts = Counter(found.values())
    killed = counts[KILLED] + counts[TIMEOUT]
    tested = len(found) - counts[NOT_RUN]
    rooms = {}
    for room in ("losses", "quantizer", "controller"):
        mine = [status for mutant, status in found.items() if mutant.startswith(f"grace_plugin.{room}")]
        done = [status for status in mine if status != NOT_RUN]
        rooms[room] = {"mutants": len(mine), "tested": len(done), "killed": sum(s in (KILLED, TIMEOUT) for s in done)}
    import torch

    summary = {
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        "mutants": len(found), "tested": tested, "killed": killed, "share_killed": killed / max(1, tested),
        "by_status": dict(counts),
        "rooms": rooms, "survivors_without_reason": sum(s["reason"] is None for s in survivors), "survivors": survivors,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    lines = [f"# Mutants that survive: {len(survivors)} of {tested} tested ({summary['share_killed']:.1%} killed)", ""]
    for survivor in survivors:
        lines += [
            f"## {survivor['where']}",
            "",
            "```diff",
            survivor["diff"],
            "```",
            survivor["reason"] or "no reason given",
            "",
        ]
    (RESULTS / "survivors.md").write_text("\n".join(lines))
    print(f"{killed} of {tested} tested killed ({summary['share_killed']:.1%}); {json.dumps(rooms)}; {dict(counts)}")
    return tested == len(found) and summary["share_killed"] >= 0.9 and summary["survivors_without_reason"] == 0


def main() -> None:
    """Prepare, mutate, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--children", type=int, default=1, help="processes that test mutants at one time")
    parser.add_argument("--resume", action="store_true", help="keep the last run's verdicts on unchanged functions")
    parser.add_argument("--report-only", action="store_true", help="read the last run again")
    options = parser.parse_args()
    if not options.report_only:
        prepare(options.resume)
        mutmut("run", "--max-children", str(options.children))
    sys.exit(0 if report() else 1)


if __name__ == "__main__":
    main()
