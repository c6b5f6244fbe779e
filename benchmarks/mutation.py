"""Mutation run over losses, quantizer and controller: does a changed sign, index or bound make a test fail?

Works on a copy of the three packages and their tests with an empty package file, so that neither llm-compressor nor
transformers is imported; mutmut changes one operator, number, name or argument at a time and runs the tests that reach
the changed function. mutmut leaves decorated functions alone; to have those mutated too, the copy is rewritten without
changing what it computes: ``@torch.no_grad()`` becomes a ``with`` block, ``@once_differentiable`` is dropped and
``@property`` becomes an assignment. Texts of error messages are not mutated (lines that start with a string).

Two passes. The first runs the tests in torch. What they leave alive meets the kernels' tests of small shapes in Triton's
interpreter, which alone reach `losses.fused_head_chunks.fused_chunks` and the branches that start kernels. The kernels
themselves (``*_triton.py``) are not mutated: they run compiled or interpreted, where mutmut does not reach; tests of their own
compare them with torch and float64.

    pip install mutmut==3.8.1            into an environment that has the package's own dependencies
    python benchmarks/mutation.py        more than an hour and a half on one core; --children 2 for two
    python benchmarks/mutation.py --since            keeps what is recorded as killed where a function did not change
    python benchmarks/mutation.py --since REVISION   the same for a record that does not name its revision
    python benchmarks/mutation.py --second-pass      the second pass again, after the first pass in build/
    python benchmarks/mutation.py --report-only      reads the last run again

With --since only changed functions and former survivors run; `mutation_report` says what that rests on, and results.json how
many verdicts were carried and from which revisions. Commit first: only verdicts on committed code can be carried later.

Writes results/mutation/results.json and survivors.md. A survivor that cannot be killed is explained in
results/mutation/reasons.json: "module function" -> list of [part of its diff, why it survives].
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import libcst as cst
from mutation_report import DEAD, NOT_RUN, PARTS, ROOT, TESTS, Earlier, earlier, report, revision, texts, verdicts

WORK, INTERPRETED = ROOT / "build" / "mutation", ROOT / "build" / "mutation_interpreted"
SMALL = (  # kernels' tests that take little time in the interpreter
    "test_fused_chunks_triton or test_grouped_triton or small or needed"
)
CONFIGURATION = """
[tool.mutmut]
source_paths = ["grace_plugin"]
do_not_mutate = ["*_triton.py"]
do_not_mutate_patterns = ['^\\s*f?"', 'raise \\w+\\(f?"']
pytest_add_cli_args = ["-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"%s]
pytest_add_cli_args_test_selection = ["tests"]
timeout_multiplier = 5.0
timeout_constant = 20.0

[tool.pytest.ini_options]
pythonpath = ["."]
"""


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


def prepare(work: Path) -> None:
    """A fresh copy of packages and tests in ``work``; of the tests, those in torch or those in Triton's interpreter."""
    shutil.rmtree(work, ignore_errors=True)
    (work / "grace_plugin").mkdir(parents=True)
    (work / "tests").mkdir()
    for package in ("grace_plugin", "tests"):
        (work / package / "__init__.py").touch()
    for parent, names in (("grace_plugin", PARTS), ("tests", TESTS)):
        for name in names:
            source, target = ROOT / parent / name, work / parent / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    for path in (work / "tests").rglob("test_*.py"):
        if path.stem.endswith("_triton") != (work == INTERPRETED):
            path.unlink()
    for path in (work / "grace_plugin").rglob("*.py"):
        path.write_text(cst.parse_module(path.read_text()).visit(Undecorate()).code)
    selection = f', "-k", "{SMALL}"' if work == INTERPRETED else ""
    (work / "pyproject.toml").write_text(CONFIGURATION % selection)


def mutmut(work: Path, children: int, mutants: list[str]) -> None:
    """Run mutmut in ``work`` on one thread per process, over some mutants or, without names, all."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    environment.pop("TRITON_INTERPRET", None)
    if work == INTERPRETED:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children), *mutants]
    subprocess.run(command, cwd=work, env=environment, check=False)


def main() -> None:
    """Prepare, mutate, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--children", type=int, default=1, help="processes that test mutants at one time")
    parser.add_argument("--since", nargs="?", const="", metavar="REVISION", help="keep recorded verdicts: killed")
    parser.add_argument("--second-pass", action="store_true", help="keep the first pass, run the second again")
    parser.add_argument("--report-only", action="store_true", help="read the last run again")
    options = parser.parse_args()
    carried = WORK / "carried.json"
    if options.report_only or options.second_pass:
        known = Earlier(*json.loads(carried.read_text()))
    else:
        known = Earlier(revision(), {}, [], []) if options.since is None else earlier(options.since or None)
        prepare(WORK)
        carried.write_text(json.dumps(known))
        mutants = known.names(texts("grace_plugin", PARTS)) if known.killed else []  # none: all
        mutmut(WORK, options.children, mutants)
    if not options.report_only:
        if known.now and texts("grace_plugin", PARTS, known.now) != texts("grace_plugin", PARTS):
            raise SystemExit(f"the first pass ran on {known.now}, and functions have changed since; run it again")
        left = [name for name, status in verdicts(WORK).items() if status not in (*DEAD, NOT_RUN)]
        prepare(INTERPRETED)
        mutmut(INTERPRETED, options.children, [name for name in left if "controller" not in name])
    sys.exit(0 if report(WORK, INTERPRETED, known) else 1)


if __name__ == "__main__":
    main()
