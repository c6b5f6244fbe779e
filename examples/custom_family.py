"""Train a model family that grace_plugin does not know: DeepSeek-VL, registered from outside the package.

    python examples/custom_family.py --model STUDENT --teacher TEACHER --dataset DATA.json --output_dir OUT

A `Family` states where a model's visual tokens and modules are; `grace_plugin/vlm/family.py` describes every fact. For the
`grace` command to know the family as well, install the class in a package of your own with an entry point:

    [project.entry-points."grace_plugin.families"]
    deepseek_vl = "my_package.custom_family"

vLLM 0.32 has no class for this first generation of DeepSeek-VL; the checkpoint is verified with transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import grace_plugin
from grace_plugin.vlm import Family, register_family


@register_family
class DeepseekVL(Family):
    """`DeepseekVLForConditionalGeneration`: a SigLIP tower, an aligner, a Llama decoder, a fixed number of tokens per image."""

    model_type = "deepseek_vl"
    vision = (r"re:(.*\.)?vision_model\..*",)
    projector = (r"re:(.*\.)?aligner\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id}

    def sizes(self, config: Any, batch: Mapping[str, Any], kind: str, total: int) -> list[int]:
        tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return [tokens] * batch["pixel_values"].shape[0]

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        return {name: getattr(config.vision_config, name) for name in ("image_size", "patch_size")}


def main() -> None:
    """Train a W4A16 student from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "teacher", "dataset", "output_dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--max_steps", type=int, default=100)
    given = parser.parse_args()
    recipe = grace_plugin.GraceModifier(targets=["Linear"], scheme="W4A16", teacher={"model": given.teacher})
    done = grace_plugin.train(
        given.model, recipe=recipe, dataset=given.dataset, output_dir=given.output_dir, max_steps=given.max_steps
    )
    print(f"wrote and verified {done.checkpoint}")


if __name__ == "__main__":
    main()
