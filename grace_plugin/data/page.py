"""A dataset on one HTML page: what can be used and why not, how long samples are, and samples as the model will read them.

The page has no scripts and no outside references; images are small JPEGs inside it. Supervised text is highlighted from the
same segments that training uses.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import Sample, read_sample
from grace_plugin.data.errors import REASONS
from grace_plugin.data.order import shuffled
from grace_plugin.data.prepare import Prepared, spread

__all__ = ["sample_images", "write_page"]

_SIDE = 256
_BARS = 40
_FRAMES = 4  # frames shown of a video


def _thumbnail(image: Image.Image, alt: str) -> dict[str, str]:
    small = image.copy()
    small.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return {"src": f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", "alt": alt}


def sample_images(sample: Sample) -> list[dict[str, str]]:
    """Return the images of a sample and some frames of its videos, small, as `src` (a data URI) and `alt`."""
    images = [
        _thumbnail(image, f"image {n + 1}, {image.width} x {image.height}") for n, image in enumerate(sample.images)
    ]
    for n, video in enumerate(sample.videos):
        for place in np.linspace(0, len(video.frames) - 1, min(_FRAMES, len(video.frames))).astype(int).tolist():
            images.append(_thumbnail(Image.fromarray(video.frames[place]), f"video {n + 1}, frame {place}"))
    return images


def _chart(title: str, values: list[int]) -> dict[str, Any]:
    chart: dict[str, Any] = {"title": title, "spread": spread(values), "bars": []}
    if values:
        counts, edges = np.histogram(values, bins=min(_BARS, max(1, len(set(values)))))
        chart["low"], chart["high"] = int(min(values)), int(max(values))
        chart["bars"] = [
            {
                "height": round(100 * count / counts.max(), 1),
                "label": f"{edges[i]:.0f} to {edges[i + 1]:.0f}: {count} samples",
            }
            for i, count in enumerate(counts.tolist())
        ]
    return chart


def _sample(prepared: Prepared, number: int, collator: ConversationCollator) -> dict[str, Any]:
    sample = read_sample(prepared.samples[number], number, max_pixels=collator.max_pixels)
    names = list(prepared.report["sets"])
    owner = prepared.samples.set_of(number) if hasattr(prepared.samples, "set_of") else 0
    return {
        "name": sample.name,
        "number": number,
        "set": names[owner],
        "entry": prepared.entries[number],
        "images": sample_images(sample),
        "segments": collator.segmenter.segments(sample),
    }


def write_page(
    path: Path,
    prepared: Prepared,
    collator: ConversationCollator,
    *,
    title: str,
    model: str,
    samples: int = 24,
    seed: int = 0,
) -> Path:
    """Write the page of a prepared dataset.

    Args:
        samples: usable samples shown, drawn by `seed` over all sets.
    """
    used = [n for n, entry in enumerate(prepared.entries) if not entry.reason]
    drawn = sorted(used[i] for i in shuffled(len(used), seed)[:samples].tolist())
    first: dict[str, str] = {}
    for entry in prepared.entries:
        if entry.reason:
            first.setdefault(entry.reason, entry.message)
    entries = [prepared.entries[n] for n in used]
    charts = [
        _chart("Tokens per sample", [e.tokens for e in entries]),
        _chart("Image and video tokens per sample", [e.visual for e in entries]),
        _chart("Supervised tokens per sample", [e.supervised for e in entries]),
    ]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    text = environment.get_template("page.html.j2").render(
        title=title,
        model=model,
        report=prepared.report,
        reasons=REASONS,
        first=first,
        charts=charts,
        seed=seed,
        samples=[_sample(prepared, number, collator) for number in drawn],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
