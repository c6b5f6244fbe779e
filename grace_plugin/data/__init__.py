"""Conversations with images to batches."""

from grace_plugin.data.collate import ConversationCollator
from grace_plugin.data.conversation import Row, check_row, check_rows, read_row
from grace_plugin.data.sources import load_rows

__all__ = ["ConversationCollator", "Row", "check_row", "check_rows", "load_rows", "read_row"]
