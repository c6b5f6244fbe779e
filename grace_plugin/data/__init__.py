"""Conversations with images and videos to batches."""

from typing import Any

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import Sample, check_sample, check_samples, read_sample
from grace_plugin.data.errors import REASONS, SampleError
from grace_plugin.data.key import SAMPLE_KEY, processor_settings, sample_key
from grace_plugin.data.mix import draw_samples
from grace_plugin.data.order import EpochSampler, epoch_order
from grace_plugin.data.prepare import BadSamplesError, Prepared, is_scannable, prepare
from grace_plugin.data.sources import as_samples, load_samples, stream_samples
from grace_plugin.data.stream import StreamedSamples
from grace_plugin.deprecation import deprecated_attributes

__all__ = [
    "REASONS",
    "SAMPLE_KEY",
    "BadSamplesError",
    "ConversationCollator",
    "EpochSampler",
    "Prepared",
    "Sample",
    "SampleError",
    "StreamedSamples",
    "as_samples",
    "check_sample",
    "check_samples",
    "draw_samples",
    "epoch_order",
    "is_scannable",
    "load_samples",
    "prepare",
    "processor_settings",
    "read_sample",
    "sample_key",
    "stream_samples",
]

_RENAMED: dict[str, Any] = {
    "BadRowsError": BadSamplesError,
    "Row": Sample,
    "RowError": SampleError,
    "RowSampler": EpochSampler,
    "StreamedRows": StreamedSamples,
    "check_row": check_sample,
    "check_rows": check_samples,
    "draw_rows": draw_samples,
    "load_rows": load_samples,
    "read_row": read_sample,
    "stream_rows": stream_samples,
}
__getattr__ = deprecated_attributes(__name__, {old: (new.__name__, new) for old, new in _RENAMED.items()})
