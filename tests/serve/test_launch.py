"""Starting and stopping a server: real processes, whose `vllm` command is a short script next to the interpreter."""

from __future__ import annotations

import os
import sys
import textwrap
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from grace_plugin.serve.launch import ServerError, command, kernel_of, serve, serving_environment

LISTENING = """
    import http.server, subprocess, sys
    print("Using CPUWNA16LinearKernel for CompressedTensorsWNA16", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("child", child.pid, flush=True)
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.HTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
DYING = """
    import sys
    print("KeyError: vision_tower.weight_packed")
    sys.exit(3)
"""
SILENT = "import time; time.sleep(600)"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + textwrap.dedent(LISTENING)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a config.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def environment_with(tmp_path: Path, script: str) -> Path:
    """The interpreter of a folder whose `vllm` command runs `script`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\n" + textwrap.dedent(script))
    program.chmod(0o755)
    return folder / "python"


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process ends within `seconds`."""
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


def child_of(log: Path) -> int:
    """The child's process id that the script wrote."""
    return int(next(line for line in log.read_text().splitlines() if line.startswith("child")).split()[1])


@pytest.mark.parametrize("script", [LISTENING, STUBBORN])
def test_serve__block_ends__server_and_children_are_gone(checkpoint: Path, tmp_path: Path, script: str) -> None:
    python = environment_with(tmp_path, script)
    with serve(checkpoint, python, timeout=30, log=tmp_path / "logs" / "vllm.log") as server:
        with urllib.request.urlopen(server.url + "/health", timeout=5) as reply:
            assert reply.status == 200
        child = child_of(server.log)
        assert alive(child)
        assert server.kernel == "CPUWNA16LinearKernel"
        assert server.model == "model"
        assert 0 < server.seconds < 30
    assert gone(child)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url + "/health", timeout=2)


def test_serve__error_in_the_block__server_and_children_are_gone(checkpoint: Path, tmp_path: Path) -> None:
    python = environment_with(tmp_path, LISTENING)
    with pytest.raises(KeyError, match="mine"), serve(checkpoint, python, timeout=30) as server:  # noqa: PT012
        child = child_of(server.log)
        raise KeyError("mine")
    assert gone(child)


def test_serve__server_ends__error_with_the_end_of_its_log(checkpoint: Path, tmp_path: Path) -> None:
    python = environment_with(tmp_path, DYING)
    with pytest.raises(ServerError, match=r"ended with code 3(.|\n)*vision_tower\.weight_packed"):
        with serve(checkpoint, python, timeout=30):
            pytest.fail("a dead server was served")


def test_serve__server_does_not_answer__error_after_timeout(checkpoint: Path, tmp_path: Path) -> None:
    python = environment_with(tmp_path, SILENT)
    with pytest.raises(ServerError, match="did not answer within 1 s"):
        with serve(checkpoint, python, timeout=1):
            pytest.fail("a silent server was served")


def test_serve__folder_without_config__refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"), serve(tmp_path, sys.executable):
        pytest.fail("an empty folder was served")


def test_serve__missing_interpreter__refused_with_how_to_build_it(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make env"), serve(checkpoint, tmp_path / "none" / "python"):
        pytest.fail("served without an interpreter")


def test_command__no_vllm_script__module_is_run(checkpoint: Path, tmp_path: Path) -> None:
    line = command(checkpoint, tmp_path / "python", 8000, images=2, max_model_len=512, max_num_seqs=4)
    assert line[:3] == [str(tmp_path / "python"), "-m", "vllm.entrypoints.cli.main"]
    assert line[line.index("--limit-mm-per-prompt") + 1] == '{"image": 2}'
    assert line[line.index("--max-model-len") + 1] == "512"
    assert line[line.index("--max-num-seqs") + 1] == "4"
    assert "--max-model-len" not in command(
        checkpoint, tmp_path / "python", 8000, images=1, max_model_len=None, max_num_seqs=4
    )


def test_serving_environment__users_variables__kept_but_quantized_activations() -> None:
    chosen = serving_environment({"VLLM_CPU_KVCACHE_SPACE": "7", "VLLM_CPU_INT4_W4A8": "1", "PATH": "x"})
    assert chosen["VLLM_CPU_INT4_W4A8"] == "0"
    assert chosen["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert chosen["HF_HUB_OFFLINE"] == "1"
    assert serving_environment()["PATH"] == os.environ["PATH"]


def test_kernel_of__log_of_another_kernel__none() -> None:
    assert kernel_of("Using CutlassInt8Kernel for something") is None
