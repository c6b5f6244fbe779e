"""Made folders of tiny models, each a way of being incomplete, quantized, adapted, mismatched or corrupted.

`python -m integration.bad_models` puts them through every command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests.pairs import Pair, pair, run
from tests.tiny import build, make_samples, save

GATE = "language_model.model.layers.0.mlp.gate_proj.weight"
UP = "language_model.model.layers.1.mlp.up_proj.weight"
PROJECTION = re.compile(r"language_model\.model\.layers\..*proj\.weight$")
Weights = dict[str, torch.Tensor]


class Materials:
    """The materials of cases: pairs of tiny models and finished checkpoints, each written when first asked for."""

    def __init__(self, work: Path) -> None:
        self.work = work

    @cached_property
    def llava(self) -> Pair:
        return pair("llava", self.work / "llava")

    @cached_property
    def tied(self) -> Pair:
        return pair("qwen2_5_vl", self.work / "tied")

    @cached_property
    def deep(self) -> Pair:
        return pair("qwen3_vl", self.work / "deep")

    @cached_property
    def shallow(self) -> Pair:
        return pair("llava", self.work / "shallow", student={"layers": 1}, teacher={"layers": 1})

    @cached_property
    def other_words(self) -> Pair:
        return pair("llava", self.work / "words", teacher={"words": "other"})

    @cached_property
    def finished(self) -> Path:
        return run(self.llava, self.work / "finished", make_samples(4), max_steps=1).checkpoint


@dataclass(frozen=True)
class Case:
    """One folder.

    role: "student", "teacher" or "checkpoint" (for `verify`). make: writes the folder, given the materials and its path, and
    returns the path (or another, such as that of no folder). refused: a pattern that a refusal must show; None where it works.
    works_in: commands in which it works although others refuse it. like: the case whose weights it must give, bit for bit.
    recipe: blocks of the recipe. pair: the name of the pair that the folder is put into.
    """

    name: str
    role: str
    make: Callable[[Materials, Path], Any]
    refused: str | None = None
    works_in: tuple[str, ...] = ()
    like: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    pair: str = "llava"


# ---- ways of making a folder ------------------------------------------------------------------------------------------------


def copied(role: str, pair_name: str = "llava") -> Callable[[Materials, Path], Path]:
    return lambda made, path: Path(shutil.copytree(getattr(getattr(made, pair_name), role), path))


def weights(change: Callable[[Weights], Weights], base: Callable[[Materials, Path], Path]) -> Callable[..., Path]:
    """Return a maker of the base with other tensors in its one file."""

    def make(made: Materials, path: Path) -> Path:
        file = base(made, path) / "model.safetensors"
        save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file, {"format": "pt"})
        return path

    return make


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda held: {name: value for name, value in held.items() if not any(part in name for part in parts)}


def extra(*names: str) -> Callable[[Weights], Weights]:
    return lambda held: held | {name: torch.zeros(4) for name in names}


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda held: {prefix + name: value for name, value in held.items()}


def with_value(name: str, value: float) -> Callable[[Weights], Weights]:
    def change(held: Weights) -> Weights:
        held[name].view(-1)[3] = value
        return held

    return change


def config(
    base: Callable[[Materials, Path], Path], text: dict[str, Any] | None = None, **values: Any
) -> Callable[..., Path]:
    """Return a maker of the base with other values in config.json; `text` in its text_config."""

    def make(made: Materials, path: Path) -> Path:
        file = base(made, path) / "config.json"
        written = json.loads(file.read_text())
        for key, value in {"text_config": text or {}, **values}.items():
            written[key] = written.get(key, {}) | value if isinstance(value, dict) else value
        file.write_text(json.dumps(written))
        return path

    return make


def files(base: Callable[[Materials, Path], Path], **contents: str | bytes | None) -> Callable[..., Path]:
    """Return a maker of the base with files written or (None) removed; "__" in a name stands for a dot."""

    def make(made: Materials, path: Path) -> Path:
        base(made, path)
        for name, content in contents.items():
            file = path / name.replace("__", ".")
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def sharded(role: str) -> Callable[[Materials, Path], Path]:
    def make(made: Materials, path: Path) -> Path:
        copied(role)(made, path)
        (path / "model.safetensors").unlink()
        model = AutoModelForImageTextToText.from_pretrained(getattr(made.llava, role), dtype="auto")
        model.save_pretrained(path, max_shard_size="2MB" if role == "teacher" else "400KB")
        return path

    return make


def one_shard(base: Callable[[Materials, Path], Path], change: Callable[[Path], Any]) -> Callable[..., Path]:
    """Return a maker of the base whose first shard without the head is changed."""

    def make(made: Materials, path: Path) -> Path:
        base(made, path)
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        heads = {file for name, file in index.items() if "lm_head" in name}
        change(path / min(set(index.values()) - heads))
        return path

    return make


def as_bin(role: str) -> Callable[[Materials, Path], Path]:
    def make(made: Materials, path: Path) -> Path:
        file = copied(role)(made, path) / "model.safetensors"
        torch.save(load_file(file), path / "pytorch_model.bin")
        file.unlink()
        return path

    return make


def in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return FP8 codes of a weight [out, in], its scales by block of 128 x 128, and the weight that they stand for, in BF16."""
    blocks = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    dense = (codes.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1).bfloat16()
    return codes.flatten(2).flatten(0, 1), scales, dense


def fp8(held: Weights) -> Weights:
    written = dict(held)
    for name in filter(PROJECTION.match, held):
        written[name], written[f"{name}_scale_inv"], _ = in_blocks(held[name])
    return written


def fp8_dense(held: Weights) -> Weights:
    return {name: in_blocks(w)[2] if PROJECTION.match(name) else w for name, w in held.items()}


def modelopt(held: Weights) -> Weights:
    """FP8 with one scale a tensor, as modelopt exports it."""
    written = dict(held)
    for name in filter(PROJECTION.match, held):
        scale = held[name].float().abs().max() / 448
        written[name] = (held[name].float() / scale).to(torch.float8_e4m3fn)
        written[f"{name}_scale"] = scale.reshape(1)
    return written


def bitsandbytes(role: str, bits: int) -> Callable[[Materials, Path], Path]:
    def make(made: Materials, path: Path) -> Path:
        asked = (
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
            if bits == 4
            else BitsAndBytesConfig(load_in_8bit=True)
        )
        source = getattr(made.llava, role)
        model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=asked, dtype=torch.bfloat16)
        shutil.copytree(source, path)
        model.save_pretrained(path)
        return path

    return make


def finished(change: Callable[[Path], Any] = lambda _: None) -> Callable[[Materials, Path], Path]:
    """Return a maker of a changed finished checkpoint."""

    def make(made: Materials, path: Path) -> Path:
        shutil.copytree(made.finished, path)
        change(path)
        return path

    return make


def built(role: str, dtype: torch.dtype, **options: Any) -> Callable[[Materials, Path], Path]:
    size = {"seed": 1, "hidden": 512, "layers": 4, "vocab_rows": 400} if role == "teacher" else {"seed": 0}
    return lambda _, path: save(*build("llava", **(size | options)), path, dtype)


def nowhere(text: str) -> Callable[[Materials, Path], str]:
    return lambda _made, _path: text


def as_file(made: Materials, path: Path) -> Path:
    path.write_text("a file")
    return path


def link(made: Materials, path: Path) -> Path:
    path.symlink_to(made.llava.student, target_is_directory=True)
    return path


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def code_flipped(folder: Path) -> None:
    held = load_file(folder / "model.safetensors")
    name = next(name for name in held if name.endswith("weight_packed"))
    held[name][0, 0] ^= 1
    save_file(held, folder / "model.safetensors", {"format": "pt"})


# ---- the cases --------------------------------------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
ADAPTER = '{"base_model_name_or_path": "some/base", "peft_type": "LORA"}'
FP8_CONFIG = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "vision_tower", "multi_modal_projector"],
}  # fmt: skip
#: `teacher cache` reads of a student its config and its processor alone
CACHE, HEAD_ALONE = "teacher cache", ("train cached",)


class Both:
    """Make cases in which a student and a teacher are refused alike; `teacher cache` reads none of a student's weights."""

    def __init__(self, role: str) -> None:
        self.role, self.base = role, copied(role)
        self.works: tuple[str, ...] = (CACHE,) if role == "student" else ()

    def __call__(
        self, name: str, make: Any, refused: str, works_in: tuple[str, ...] | None = None, **more: Any
    ) -> Case:
        return Case(
            f"{self.role}: {name}", self.role, make, refused, self.works if works_in is None else works_in, **more
        )


def incomplete(case: Both) -> Iterable[Case]:
    role, base = case.role, case.base
    yield case("no output head", weights(without("lm_head"), base), r"1 weight\(s\) are missing \(lm_head\.weight\)")
    yield case("no embedding", weights(without("embed_tokens"), base), r"missing \(.*embed_tokens\.weight\)")
    yield case("no second layer", weights(without("layers.1."), base), r"missing \(.*layers\.1\.")
    yield case("no final norm", weights(without("model.norm"), base), r"missing \(.*norm\.weight\)")
    yield case("no projector", weights(without("multi_modal_projector"), base), r"4 weight\(s\) are missing")
    yield case("no merger", weights(without("visual.merger"), copied(role, "deep")), r"missing \(.*merger", pair="deep")
    yield case("one bias missing", weights(without("fc1.bias"), base), r"missing \(.*fc1\.bias")
    yield case("weights cut short", lambda made, path: (base(made, path), cut(path / "model.safetensors"), path)[2],
               r"cannot read .*model\.safetensors of the .*fetch or save it again")  # fmt: skip
    yield case("weights empty", files(base, model__safetensors=""), r"header too small")
    yield case("weights a Git LFS pointer", files(base, model__safetensors=LFS), r"Git LFS pointer.*git lfs pull")
    yield case("weights no safetensors", files(base, model__safetensors="x" * 99), r"cannot read .*of the")
    yield case("no weights", files(base, model__safetensors=None), r"no (file named )?model\.safetensors")
    yield case("a shard missing", one_shard(sharded(role), Path.unlink), r"lacks 1 of \d+ weights files")
    yield case("a shard cut short", one_shard(sharded(role), cut), r"cannot read .*-of-.*incomplete metadata")
    broken = files(sharded(role), **{"model__safetensors__index__json": "{"})
    yield case("a broken index", broken, "holds no weight_map")
    yield case("no config.json", files(base, config__json=None), r"no config\.json", ())
    yield case("a broken config.json", files(base, config__json="{"), "JSON", ())
    yield case("an empty config.json", files(base, config__json="{}"), "model_type|model type", ())
    yield case("no such folder", nowhere("/no/such/folder"), "no such folder", ())
    yield case("a file", as_file, r"it is a file; name the folder", ())


def quantized(case: Both) -> Iterable[Case]:
    base = case.base
    quant = lambda **values: config(base, quantization_config=values)  # noqa: E731
    exported = config(weights(modelopt, base), quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    yield case("modelopt FP8", exported, r"quantized with modelopt \(FP8\)", ())
    yield case("hf_quant_config.json", files(base, hf_quant_config__json='{"quantization": {"quant_algo": "NVFP4"}}'),
               r"quantized with modelopt \(NVFP4\)", ())  # fmt: skip
    yield case("AWQ", quant(quant_method="awq", bits=4), "quantized with awq", ())
    yield case("GPTQ", quant(quant_method="gptq", bits=4), "quantized with gptq", ())
    yield case("HQQ", quant(quant_method="hqq"), "quantized with hqq", ())
    yield case("MXFP4", quant(quant_method="mxfp4"), "quantized with mxfp4", ())
    yield case("no quant_method", quant(bits=4), r"unknown \(no quant_method\)", ())
    yield case(
        "codes without a config",
        weights(lambda held: held | {GATE: held[GATE].to(torch.int8)}, base),
        "stores 1 tensor",
    )
    yield case("scales left over", weights(extra(f"{GATE}_scale"), base), "quantization_config")


def adapted(case: Both) -> Iterable[Case]:
    base = case.base
    yield case(
        "keys of a PEFT wrapper", weights(renamed("base_model.model."), base), r"base_model\.model\..*merge_and_unload"
    )
    yield case(
        "an adapter's matrices",
        weights(extra(GATE.replace("weight", "lora_A.default.weight")), base),
        "merge_and_unload",
    )
    yield case("adapter_config.json", files(base, adapter_config__json=ADAPTER), r"adapter_config\.json", ())
    yield case(
        "an adapter alone",
        files(base, config__json=None, adapter_config__json=ADAPTER),
        "PEFT adapter of some/base",
        (),
    )


def mismatched(case: Both) -> Iterable[Case]:
    base = case.base
    yield case("more layers asked for", config(base, {"num_hidden_layers": 9}), r"missing \(.*layers\.[345]")
    yield case("fewer layers asked for", config(base, {"num_hidden_layers": 2}), "left over")
    yield case("a larger vocabulary", config(base, {"vocab_size": 512}), "another shape")
    yield case("narrower layers", config(base, {"intermediate_size": 128}), "another shape")
    yield case(
        "a text model", config(base, model_type="llama", architectures=["LlamaForCausalLM"]), "LlamaForCausalLM", ()
    )
    yield case("an unknown type", config(base, model_type="no_such_model"), "no_such_model", ())
    yield case("a head of next tokens left over", weights(extra("mtp.layers.0.weight"), base), r"left over \(mtp\.")


def corrupted(case: Both) -> Iterable[Case]:
    base = case.base
    lone = HEAD_ALONE if case.role == "teacher" else case.works  # of a cached teacher, the head alone is read
    yield case("a NaN", weights(with_value(UP, float("nan")), base), r"NaN or infinity \(.*up_proj\.weight: 1 of", lone)
    yield case("an infinity in the tower", weights(with_value("multi_modal_projector.linear_1.weight", float("inf")), base),
               r"NaN or infinity \(.*multi_modal_projector\.linear_1\.weight: 1 of", lone)  # fmt: skip


def of_both(role: str) -> Iterable[Case]:
    case = Both(role)
    for kind in (incomplete, quantized, adapted, mismatched, corrupted):
        yield from kind(case)


def students() -> Iterable[Case]:
    base, (no_scale, off) = copied("student"), ({"stored_dtype": "bfloat16"}, {"enabled": False})
    plain, tied = "student: whole", "student: tied embeddings"
    yield Case(plain, "student", base)
    yield Case("student: in shards", "student", sharded("student"), like=plain)
    yield Case("student: torch's own format", "student", as_bin("student"), like=plain)
    yield Case("student: a linked folder", "student", link, like=plain)
    leftovers = extra(
        GATE.replace("mlp.gate_proj.weight", "self_attn.rotary_emb.inv_freq"),
        "vision_tower.vision_model.embeddings.position_ids",
    )
    yield Case("student: known leftovers", "student", weights(leftovers, base), like=plain)
    yield Case(tied, "student", copied("student", "tied"), pair="tied")
    yield Case("student: stored as float16", "student", built("student", torch.float16))
    yield Case(
        "student: stored as float32", "student", built("student", torch.float32), r"stored as torch\.float32", (CACHE,)
    )
    yield Case(
        "student: stored as float32, BF16 asked for",
        "student",
        built("student", torch.float32),
        recipe={"scales": no_scale},
    )
    yield Case("student: one layer", "student", copied("student", "shallow"), r"decoder has 1 layer")
    yield Case(
        "student: one layer without relation", "student", copied("student", "shallow"), recipe={"relational": off}
    )
    yield Case("student: a finished checkpoint", "student", finished(), "finished GRACE checkpoint")
    yield Case(
        "student: block FP8",
        "student",
        config(weights(fp8, base), quantization_config=FP8_CONFIG),
        "quantized with fp8",
    )
    yield Case("student: NF4", "student", bitsandbytes("student", 4), "quantized with bitsandbytes")
    pickled = files(base, model__safetensors=None, pytorch_model__bin="x" * 99)
    yield Case("student: torch's own format, broken", "student", pickled, "cannot load the student", (CACHE,))
    yield Case("student: no processor", "student", files(base, processor_config__json=None, tokenizer__json=None,
               tokenizer_config__json=None, chat_template__jinja=None), "cannot read the student's processor")  # fmt: skip
    yield Case(
        "student: a broken tokenizer",
        "student",
        files(base, tokenizer__json="{"),
        "cannot read the student's processor",
    )


def teachers() -> Iterable[Case]:
    base = copied("teacher")
    dense = "teacher: the weights of block FP8"
    yield Case("teacher: whole", "teacher", base)
    yield Case("teacher: in shards", "teacher", sharded("teacher"), like="teacher: whole")
    yield Case("teacher: torch's own format", "teacher", as_bin("teacher"), r"its head is read from safetensors",
               ("train", "oneshot", "train offload"), like="teacher: whole")  # fmt: skip
    yield Case("teacher: stored as float16", "teacher", built("teacher", torch.float16))
    yield Case("teacher: a finished checkpoint", "teacher", finished())
    yield Case(dense, "teacher", weights(fp8_dense, base))
    yield Case("teacher: block FP8", "teacher", config(weights(fp8, base), quantization_config=FP8_CONFIG), like=dense)
    yield Case("teacher: NF4", "teacher", bitsandbytes("teacher", 4))
    yield Case("teacher: 8 bits of bitsandbytes", "teacher", bitsandbytes("teacher", 8))
    yield Case("teacher: one layer", "teacher", copied("teacher", "shallow"), r"decoder has 1 layer")
    yield Case("teacher: another tokenizer", "teacher", copied("teacher", "other_words"), "tokenizers differ")
    yield Case(
        "teacher: another image size", "teacher", config(base, vision_config={"image_size": 28}), "shape|differently"
    )
    yield Case("teacher: another family", "teacher", copied("teacher", "deep"), "differently")
    head = "language_model.lm_head.weight"
    yield Case(
        "teacher: an infinity in the head", "teacher", weights(with_value(head, float("inf")), base), "NaN or infinity"
    )


def checkpoints() -> Iterable[Case]:
    yield Case("checkpoint: whole", "checkpoint", finished())
    named = "is not what was trained|is not what"
    for name, change, refused in (
        ("no record", lambda f: (f / "grace/record.json").unlink(), r"record\.json"),
        ("a broken record", edit("grace/record.json", lambda _: "{"), "record"),
        ("a code flipped", code_flipped, named),
        ("weights cut short", lambda f: cut(f / "model.safetensors"), r"model\.safetensors"),
        ("no weights", lambda f: (f / "model.safetensors").unlink(), "safetensors"),
        ("no config.json", lambda f: (f / "config.json").unlink(), r"config\.json"),
        ("another tokenizer", edit("tokenizer.json", lambda text: text + " "), "tokenizer"),
        ("no probe", lambda f: (f / "grace/probe.safetensors").unlink(), "probe"),
        ("no quantization_config", edit("config.json", lambda t: json.dumps(
            {k: v for k, v in json.loads(t).items() if k != "quantization_config"})), ""),
    ):  # fmt: skip
        yield Case(f"checkpoint: {name}", "checkpoint", finished(change), refused)
    yield Case("checkpoint: a BF16 student", "checkpoint", copied("student"), "no grace/record.json")


def cases() -> list[Case]:
    return [*students(), *of_both("student"), *teachers(), *of_both("teacher"), *checkpoints()]
