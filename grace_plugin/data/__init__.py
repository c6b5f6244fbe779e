"""Conversations with images and videos to batches."""

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import Row, check_row, check_rows, read_row
from grace_plugin.data.faults import REASONS, RowFault
from grace_plugin.data.sources import load_rows

__all__ = ["REASONS", "ConversationCollator", "Row", "RowFault", "check_row", "check_rows", "load_rows", "read_row"]
