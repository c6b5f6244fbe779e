"""Start `vllm serve CHECKPOINT` in the serving environment, wait until it answers, and stop it with all its children.

On a CPU a start takes 20 to 30 s, nearly all of it three processes that import vLLM.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KERNEL = re.compile(r"Using (\w+) for CompressedTensorsWNA16")
LOG_TAIL = 25


class ServerError(RuntimeError):
    """vLLM could not be started or did not answer; the message ends with the tail of its log."""


@dataclass(frozen=True)
class Server:
    """A vLLM server that answers.

    url: without a trailing slash. model: the name to ask for. kernel: the class that multiplies by packed weights, None for a
    dense checkpoint. seconds: from start to the first healthy answer.
    """

    url: str
    model: str
    kernel: str | None
    seconds: float
    log: Path


def serving_environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """Return `base` (default: os.environ) with the variables under which vLLM answers as transformers does.

    Values in `base` win: no hub, no usage reports and 1 GiB of key-value cache on a CPU are only defaults.
    """
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Always: vLLM's CPU kernel would quantize activations to 8 bits as well, which the checkpoint was not trained for.
    return defaults | dict(os.environ if base is None else base) | {"VLLM_CPU_INT4_W4A8": "0"}


def kernel_of(log: str) -> str | None:
    """Return the name of the kernel that vLLM has chosen for packed weights, from its log; None without one."""
    found = KERNEL.search(log)
    return found.group(1) if found else None


def command(
    checkpoint: Path, python: Path, port: int, *, images: int, max_model_len: int | None, max_num_seqs: int
) -> list[str]:
    """Return the `vllm serve` command line for `checkpoint`, run by the interpreter `python`."""
    script = python.parent / "vllm"
    start = [str(script)] if script.exists() else [str(python), "-m", "vllm.entrypoints.cli.main"]
    line = [*start, "serve", str(checkpoint), "--host", "127.0.0.1", "--port", str(port)]
    # eager: compilation takes 25 s on two cores; no profiling of the vision tower, whose largest image would need much memory
    line += ["--served-model-name", checkpoint.name, "--enforce-eager", "--skip-mm-profiling"]
    line += ["--max-num-seqs", str(max_num_seqs), "--limit-mm-per-prompt", json.dumps({"image": images})]
    return line + (["--max-model-len", str(max_model_len)] if max_model_len else [])


@contextmanager
def serve(
    checkpoint: str | Path,
    python: str | Path,
    *,
    images: int = 1,
    max_model_len: int | None = None,
    max_num_seqs: int = 16,
    timeout: float = 240.0,
    log: str | Path | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Serve `checkpoint` while the block runs: `with serve(path, python) as server: ...`.

    Args:
        python: interpreter of the serving environment.
        images: largest number of images in one prompt.
        timeout: seconds until the first healthy answer.
        log: file for vLLM's output; a temporary one by default.
        arguments: further `vllm serve` arguments.

    Raises:
        FileNotFoundError: no such checkpoint or interpreter.
        ServerError: vLLM ends or does not answer in time.
    """
    checkpoint, python = Path(checkpoint).resolve(), Path(python).absolute()
    _must_exist(checkpoint, python)
    port = _free_port()
    line = command(
        checkpoint, python, port, images=images, max_model_len=max_model_len, max_num_seqs=max_num_seqs
    ) + list(arguments)
    path = Path(log) if log else Path(tempfile.mkdtemp(prefix="grace-serve-")) / "vllm.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with path.open("w") as out:
        # a session of its own, so that `stop` also reaches the engine processes that vLLM starts
        process = subprocess.Popen(
            line, stdout=out, stderr=subprocess.STDOUT, env=serving_environment(), start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, path, timeout)
        seconds = time.monotonic() - start
        yield Server(url, checkpoint.name, kernel_of(path.read_text(errors="replace")), seconds, path)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """End `process` and every process of its session: by SIGTERM, and by SIGKILL after `patience` seconds."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _must_exist(checkpoint: Path, python: Path) -> None:
    if not (checkpoint / "config.json").exists():
        raise FileNotFoundError(f"{checkpoint} holds no config.json; give the folder of a saved checkpoint")
    if not python.exists():
        raise FileNotFoundError(
            f"there is no serving interpreter at {python}; build one with `make env` or pass another"
        )


def _free_port() -> int:
    # Another process may take it before vLLM does; vLLM then ends, and `serve` raises with its message.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerError(f"vLLM ended with code {process.returncode} before it answered\n{_tail(log)}")
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise ServerError(f"vLLM did not answer within {timeout:.0f} s\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
    return "\n".join([f"end of {log}:", *lines])
