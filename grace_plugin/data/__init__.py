"""Conversations with images and videos to batches."""

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import Row, check_row, check_rows, read_row
from grace_plugin.data.errors import REASONS, RowError
from grace_plugin.data.given import as_samples
from grace_plugin.data.key import SAMPLE_KEY, processor_settings, sample_key
from grace_plugin.data.mix import draw_rows
from grace_plugin.data.order import RowSampler, epoch_order, rank_batches
from grace_plugin.data.prepare import BadRowsError, Prepared, is_scannable, prepare
from grace_plugin.data.sources import load_rows, stream_rows
from grace_plugin.data.stream import StreamedRows

__all__ = [
    "REASONS",
    "SAMPLE_KEY",
    "BadRowsError",
    "ConversationCollator",
    "Prepared",
    "Row",
    "RowError",
    "RowSampler",
    "StreamedRows",
    "as_samples",
    "check_row",
    "check_rows",
    "draw_rows",
    "epoch_order",
    "is_scannable",
    "load_rows",
    "prepare",
    "processor_settings",
    "rank_batches",
    "read_row",
    "sample_key",
    "stream_rows",
]
