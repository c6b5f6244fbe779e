"""What `mutation.py` found: verdicts of two passes and of earlier runs put together, survivors with their reasons.

Verdicts that are carried. "Killed" is kept for the mutants of a function whose text, decorators and docstring included, is
the same as at an earlier revision; mutmut numbers a function's mutants by its text, so they keep their names. Everything else
runs: new and changed functions whole, and of unchanged ones what was alive. This holds only while tests are added or
strengthened, never weakened; a test function that is gone since then is listed in results.json under "tests_gone". A killed
verdict is not checked again when a function that the mutant's own calls changes.
"""

import ast
import difflib
import functools
import json
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "mutation"
PARTS = ["losses", "quantizer", "controller.py"]
TESTS = ["losses", "quantizer", "reference", "test_controller.py"]
KILLED, SURVIVED, UNTESTED, TIMEOUT, NOT_RUN = "killed", "survived", "no tests", "timeout", "not run"
DEAD = (KILLED, TIMEOUT)
STATUS = {
    None: NOT_RUN,
    0: SURVIVED,
    1: KILLED,
    3: KILLED,
    5: UNTESTED,
    33: UNTESTED,
    -6: KILLED,
    -11: KILLED,  # the mutant brings the tests' process down
    36: TIMEOUT,
    24: TIMEOUT,
    -24: TIMEOUT,
    152: TIMEOUT,
}


class Earlier(NamedTuple):
    """The code that a run is on, and what an earlier run of `mutation.py` says about its mutants."""

    now: str | None  # its revision; None where it is not committed
    killed: dict[str, dict[str, int]]  # unchanged function -> revision at which it ran -> how many of its mutants died
    alive: list[str]  # mutants of unchanged functions that lived
    tests_gone: list[str]

    def names(self, today: dict[str, str]) -> list[str]:
        """What has to run, in mutmut's own words: the mutants that lived, and all of functions that are new or changed."""
        return self.alive + [f"{mangled(where)}__mutmut_*" for where in today if where not in self.killed]


def git(*arguments: str) -> str:
    """Output of git in this repository; an error of git's ends the run."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def revision() -> str | None:
    """Return the commit whose packages and tests these are; None when they differ from it."""
    places = [*(f"grace_plugin/{name}" for name in PARTS), *(f"tests/{name}" for name in TESTS)]
    return None if git("status", "--porcelain", "--", *places) else git("rev-parse", "--short", "HEAD").strip()


def texts(parent: str, names: list[str], since: str | None = None) -> dict[str, str]:
    """Text of every function, "losses.fused_head_chunks _chunk" -> its lines: as they lie here, or at a revision."""
    listed = git("ls-tree", "-r", "--name-only", since, "--", parent).split() if since else []
    here = [path.relative_to(ROOT).as_posix() for path in (ROOT / parent).rglob("*.py")]
    found = {}
    for path in sorted(listed if since else here):
        module = path.removeprefix(f"{parent}/").removesuffix(".py")
        if not path.endswith(".py") or not any(f"{module}.py".startswith(name) for name in names):
            continue
        text = git("show", f"{since}:{path}") if since else (ROOT / path).read_text()
        lines = text.splitlines()
        for node in ast.parse(text).body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for one in inner:
                if isinstance(one, ast.FunctionDef):
                    first = min([one.lineno, *(d.lineno for d in one.decorator_list)]) - 1
                    found[f"{module.replace('/', '.')} {owner}{one.name}"] = "\n".join(lines[first : one.end_lineno])
    return found


def mangled(where: str) -> str:
    """mutmut's name for a function, without the number; a property was renamed by `mutation.Undecorate`."""
    module, _, function = where.partition(" ")
    owner, _, name = function.rpartition(".")
    if owner and texts("grace_plugin", PARTS)[where].lstrip().startswith("@property"):
        name = f"_get_{name}"
    return f"grace_plugin.{module}." + (f"xǁ{owner}ǁ{name}" if owner else f"x_{name}")


def place(mutant: str) -> str:
    """ "losses.fused_head_chunks _chunk" of mutmut's name for a mutant."""
    module, _, function = mutant.removeprefix("grace_plugin.").rpartition(".")
    function = function.rpartition("__mutmut_")[0]
    return f"{module} {function.removeprefix('x_').replace('xǁ', '').replace('ǁ', '.').replace('._get_', '.')}"


def earlier(since: str | None) -> Earlier:
    """The recorded run, at its own revision or, for records that do not name one, at ``since``."""
    recorded = json.loads((RESULTS / "results.json").read_text())
    at = recorded.get("revision") or since
    if not at or (since and git("rev-parse", since) != git("rev-parse", at)):
        raise SystemExit(
            f"results.json was recorded at {recorded.get('revision')}, --since says {since}; give the first"
        )
    old, today = texts("grace_plugin", PARTS, at), texts("grace_plugin", PARTS)
    same = {where for where, text in today.items() if old.get(where) == text}
    alive = [survivor["mutant"] for survivor in recorded["survivors"] if survivor["where"] in same]
    ran = recorded.get("functions", {})
    gone = sorted(set(texts("tests", TESTS, at)) - set(texts("tests", TESTS)))
    return Earlier(
        revision(),
        {where: ran[where]["killed"] if where in ran else {at: -1} for where in same},  # -1: all that are not alive
        alive,
        [name for name in gone if name.partition(" ")[2].startswith("test_")],
    )


def verdicts(work: Path) -> dict[str, str]:
    """Mutant -> killed, survived, no tests, timeout or not run, of one pass."""
    found = {}
    for meta in sorted((work / "mutants").rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        found |= {name: STATUS.get(code, f"exit {code}") for name, code in codes.items()}
    return found


@functools.cache
def functions(work: Path, module: str) -> dict[str, list[str]]:
    """The body of every original and mutated function of a module, as mutmut wrote them."""
    text = (work / "mutants" / (module.replace(".", "/") + ".py")).read_text()
    lines = text.splitlines()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {node.name: lines[node.lineno : node.end_lineno] for node in nodes}


def changed_lines(work: Path, mutant: str) -> str:
    """The changed lines of a mutant, without context."""
    module, _, name = mutant.rpartition(".")
    found = functions(work, module)
    original = found[name.rpartition("__mutmut_")[0] + "__mutmut_orig"]
    lines = difflib.unified_diff(original, found[name], lineterm="", n=0)
    return "\n".join(line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def tally(first: dict[str, str], second: dict[str, str], known: Earlier) -> tuple[dict[str, str], dict[str, Any]]:
    """Verdict of each mutant over both passes and the earlier run; per function, how many died at which revision."""
    found: dict[str, str] = {}
    per: dict[str, Any] = {}
    for mutant, status in first.items():
        where = place(mutant)
        alive_before = mutant in known.alive
        if where in known.killed and not alive_before:
            status = KILLED
        elif second.get(mutant) in DEAD:
            status = second[mutant]
        found[mutant] = status
        one = per.setdefault(where, {"mutants": 0, "killed": Counter()})
        one["mutants"] += 1
        if status in DEAD and (where not in known.killed or alive_before):
            one["killed"][known.now or "uncommitted"] += 1
    for where, killed in known.killed.items():
        if where in per:
            before = per[where]["mutants"] - sum(place(mutant) == where for mutant in known.alive)
            counts = {at: before if number < 0 else number for at, number in killed.items()}
            if sum(counts.values()) != before:
                raise SystemExit(f"{where}: {before} mutants were killed, the record says {counts}; run it all again")
            per[where]["killed"] += Counter(counts)
    return found, per


def report(work: Path, interpreted: Path, known: Earlier) -> bool:
    """Write the results; True when all were tested, at least 90 % killed and every survivor has a reason."""
    first, second = verdicts(work), verdicts(interpreted)
    found, per = tally(first, second, known)
    reasons_file = RESULTS / "reasons.json"
    reasons = json.loads(reasons_file.read_text()) if reasons_file.exists() else {}
    survivors = []
    for mutant, status in found.items():
        if status in DEAD:
            continue
        where, diff = place(mutant), changed_lines(work, mutant)
        why = next((reason for part, reason in reasons.get(where, []) if part in diff), None)
        survivors.append({"mutant": mutant, "where": where, "status": status, "diff": diff, "reason": why})
    counts = Counter(found.values())
    killed, tested = counts[KILLED] + counts[TIMEOUT], len(found) - counts[NOT_RUN]
    at: Counter[str] = sum((one["killed"] for one in per.values()), Counter())
    packages = {}
    for package in ("losses", "quantizer", "controller"):
        mine = [status for mutant, status in found.items() if mutant.startswith(f"grace_plugin.{package}")]
        done = [status for status in mine if status != NOT_RUN]
        packages[package] = {"mutants": len(mine), "tested": len(done), "killed": sum(s in DEAD for s in done)}
    import torch

    summary = {
        "environment": {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()},
        "revision": known.now,
        "mutants": len(found),
        "tested": tested,
        "killed": killed,
        "share_killed": killed / max(1, tested),
        "by_status": dict(counts),
        "killed_at_revision": dict(at),
        "carried": {
            "verdicts": sum(number for name, number in at.items() if name != (known.now or "uncommitted")),
            "functions": sum(where in known.killed for where in per),
            "tests_gone": known.tests_gone,
            "holds_while": "tests since those revisions were added or strengthened, none weakened",
        },
        "killed_in_tritons_interpreter_only": sum(second.get(m) in DEAD and first[m] not in DEAD for m in found),
        "packages": packages,
        "survivors_without_reason": sum(s["reason"] is None for s in survivors),
        "functions": per,
        "survivors": survivors,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "results.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    lines = [f"# Mutants that survive: {len(survivors)} of {tested} tested ({summary['share_killed']:.1%} killed)", ""]
    for survivor in survivors:
        shown = ["```diff", survivor["diff"], "```", survivor["reason"] or f"no reason given ({survivor['status']})"]
        lines += [f"## {survivor['where']}", "", *shown, ""]
    (RESULTS / "survivors.md").write_text("\n".join(lines))
    print(f"{killed} of {tested} tested killed ({summary['share_killed']:.1%}); {json.dumps(packages)}; {dict(counts)}")
    print(f"killed at revision: {dict(at)}; survivors without a reason: {summary['survivors_without_reason']}")
    return tested == len(found) and summary["share_killed"] >= 0.9 and summary["survivors_without_reason"] == 0
