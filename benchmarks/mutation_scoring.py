"""Mutation run over scoring and statistics: does a changed sign, index, quantile or comparison make a test fail?

The same machinery as `mutation.py` (mutmut, decorated functions rewritten so that their bodies are mutated), over what says how
good a method is: the study's statistics, its search, its scoring and blind baseline, the report's answers, intervals and sums,
and the demo's scoring. Whole packages are copied, because these modules import them; only functions of `TARGETS` are mutated.
Tests that compare recorded tables are left out: they read files that are not in the copy.

    python -m venv --system-site-packages ENV; ENV/bin/pip install mutmut==3.8.1      next to the package's own dependencies
    ENV/bin/python benchmarks/mutation_scoring.py            about ten minutes of one core
    ENV/bin/python benchmarks/mutation_scoring.py --report-only

Writes results/mutation/scoring.json and scoring_survivors.md. A survivor that cannot be killed is explained in
results/mutation/scoring_reasons.json: "module function" -> list of [part of its diff, why it survives].
"""

import argparse
import json
import platform
import shutil
import subprocess
from collections import Counter

import libcst as cst
from mutation import Undecorate, mutmut
from mutation_report import DEAD, NOT_RUN, RESULTS, ROOT, changed_lines, git, place, verdicts

WORK = ROOT / "build" / "mutation_scoring"
TARGETS = {
    "benchmarks/accuracy/statistics.py": ("*",),
    "benchmarks/accuracy/rows.py": ("x_answers_of", "x_scored"),
    "benchmarks/accuracy/study.py": ("x_best_of",),
    "benchmarks/accuracy/blind.py": ("x_most_frequent", "x_answer_blind"),
    "benchmarks/accuracy/data.py": ("x_score",),
    "benchmarks/accuracy/caption_work.py": ("x_choice_accuracy", "x_likelihood"),
    "benchmarks/accuracy/table.py": ("x_closed", "x_missing_default", "x_label_of"),
    "grace_plugin/report/answers.py": ("x_accepted", "x_answer_start"),
    "grace_plugin/report/summary.py": (
        "x_interval",
        "x_paired_difference",
        "x__accuracy",
        "x_by_modality",
        "x_by_type",
        "x__paired",
        "x_overall",
    ),
    "examples/bundled_demo/score.py": ("x_is_right",),
    "examples/bundled_demo/disjoint.py": ("x_check_disjoint",),
}
TESTS = [
    "tests/benchmarks/test_statistics.py",
    "tests/benchmarks/test_scoring.py",
    "tests/benchmarks/test_captions.py",
    "tests/report/test_scoring.py",
    "tests/bundled_demo/test_score.py",
    "tests/bundled_demo/test_disjoint.py",
]
LEFT_OUT = (
    "not recorded and not page and not demo__compositions and not study__tiny and not margins and not greedy "
    "and not trained_model"
)
CONFIGURATION = f"""
[tool.mutmut]
source_paths = ["grace_plugin", "benchmarks", "examples"]
only_mutate = {json.dumps(list(TARGETS))}
do_not_mutate_patterns = ['^\\s*f?"', 'raise \\w+\\(f?"', '^\\s*raise ValueError']
also_copy = ["tests"]
pytest_add_cli_args = ["-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-k", "{LEFT_OUT}"]
pytest_add_cli_args_test_selection = {json.dumps(TESTS)}
timeout_multiplier = 8.0
timeout_constant = 60.0

[tool.pytest.ini_options]
pythonpath = ["."]
"""


def prepare() -> None:
    """Copy packages and tests to a fresh folder, the targets rewritten so that decorated functions are mutated too."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    for name in ("grace_plugin", "benchmarks", "examples", "tests"):
        shutil.copytree(ROOT / name, WORK / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in TARGETS:
        file = WORK / name
        file.write_text(cst.parse_module(file.read_text()).visit(Undecorate()).code)
    (WORK / "pyproject.toml").write_text(CONFIGURATION)


def names() -> list[str]:
    """mutmut's names for the mutants of TARGETS."""
    modules = {name.removesuffix(".py").replace("/", "."): functions for name, functions in TARGETS.items()}
    return [
        f"{module}.{one}__mutmut_*" if one != "*" else f"{module}.*" for module, own in modules.items() for one in own
    ]


def report() -> None:
    """Write verdicts, and every survivor with its diff and reason."""
    wanted = {f"{name.removesuffix('.py').replace('/', '.')}": functions for name, functions in TARGETS.items()}
    found = {}
    for mutant, status in verdicts(WORK).items():
        module, _, function = mutant.rpartition(".")
        own = wanted.get(module, ())
        if own == ("*",) or function.rpartition("__mutmut_")[0] in own:
            found[mutant] = status
    file = RESULTS / "scoring_reasons.json"
    reasons = json.loads(file.read_text()) if file.is_file() else {}
    survivors = []
    for mutant, status in found.items():
        if status not in DEAD:
            where, diff = place(mutant), changed_lines(WORK, mutant)
            why = next((reason for part, reason in reasons.get(where, []) if part in diff), None)
            survivors.append({"mutant": mutant, "where": where, "status": status, "diff": diff, "reason": why})
    counts = Counter(found.values())
    tested = len(found) - counts[NOT_RUN]
    killed = sum(counts[status] for status in DEAD)
    summary = {
        "command": "python benchmarks/mutation_scoring.py",
        "environment": {"python": platform.python_version(), "machine": platform.machine()},
        "revision": git("describe", "--always", "--dirty").strip(),
        "mutants": len(found),
        "tested": tested,
        "killed": killed,
        "share_killed": killed / max(1, tested),
        "by_status": dict(counts),
        "by_module": {
            module: {"mutants": len(own), "killed": sum(status in DEAD for status in own)}
            for module in wanted
            if (own := [status for mutant, status in found.items() if mutant.rpartition(".")[0] == module])
        },
        "survivors_without_reason": sum(one["reason"] is None for one in survivors),
        "survivors": survivors,
    }
    (RESULTS / "scoring.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    lines = [
        f"# Mutants of scoring that survive: {len(survivors)} of {tested} ({summary['share_killed']:.1%} killed)",
        "",
    ]
    for one in survivors:
        lines += [f"## {one['where']}", "", "```diff", one["diff"], "```", one["reason"] or "no reason given", ""]
    (RESULTS / "scoring_survivors.md").write_text("\n".join(lines))
    print(f"{killed} of {tested} killed; {dict(counts)}; without a reason: {summary['survivors_without_reason']}")


def main() -> None:
    """Prepare, mutate, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--children", type=int, default=1, help="processes that test mutants at one time")
    parser.add_argument("--report-only", action="store_true", help="read the last run again")
    options = parser.parse_args()
    if not options.report_only:
        prepare()
        try:
            mutmut(WORK, options.children, names())
        except subprocess.SubprocessError as error:
            raise SystemExit(f"mutmut did not run: {error}") from error
    report()


if __name__ == "__main__":
    main()
