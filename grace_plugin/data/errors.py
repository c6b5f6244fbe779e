"""Why a sample cannot be used: a reason to count by, and a message that names the sample and how to correct it.

Every check of the package raises `SampleError`, whose `reason` is one of `REASONS`. A source that cannot even parse a sample
gives `unreadable(...)` in its place, so that other samples keep their numbers; `check_sample` raises its error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grace_plugin.data.shown import MESSAGE, shortened

__all__ = ["REASONS", "SampleError", "malformed", "raise_unreadable", "unreadable"]

#: reason -> what it says
REASONS: dict[str, str] = {
    "not_json": "the line or sample is no JSON object",
    "invalid_utf8": "the sample holds bytes or characters that are not valid UTF-8",
    "empty_conversation": "no messages, or a turn without content",
    "malformed": "fields of another type or name than the format's",
    "unknown_field": "a field that would change what is supervised or seen, and that nothing here reads",
    "unknown_role": "a role the format does not know",
    "roles_out_of_order": "turns that do not alternate, or do not end with the assistant",
    "placeholder_mismatch": "another number of placeholders than of images or videos",
    "missing_file": "an image or video file that is not there",
    "unreadable_image": "an image file that cannot be decoded",
    "image_too_large": "an image or a frame of more pixels than the limit, or of which the processor makes more",
    "image_shape": "an image whose shape the model's processor refuses",
    "unreadable_video": "a video that cannot be decoded, or ends early, or has no image track",
    "video_unsupported": "a video for a model that takes none, or one that was decoded and that its processor refuses",
    "template": "a conversation the model's chat template cannot render, or renders without its images",
    "too_long": "more tokens than max_length or than the model's context",
    "outside_vocabulary": "a token that the model, or its teacher, has no embedding for",
    "no_supervised_tokens": "no token of the sample is supervised",
    "duplicate": "the same id and content as an earlier sample",
}
_ERROR = "__grace_error__"


class SampleError(ValueError):
    """A sample that cannot be used.

    reason: a key of `REASONS`. The text names the sample, what is wrong and how to fix it; it is cut to `MESSAGE`
    characters, whatever of the sample it quotes.
    """

    def __init__(self, reason: str, message: str) -> None:
        if reason not in REASONS:
            raise KeyError(reason)
        super().__init__(shortened(message, MESSAGE))
        self.reason = reason

    # an exception is pickled as its class called with `args`, which lack the reason; workers of a loader pickle it
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


def malformed(message: str) -> SampleError:
    """Return the error of a field of another type or name than its format's."""
    return SampleError("malformed", message)


def unreadable(reason: str, message: str) -> dict[str, Any]:
    """Return what takes the place of a sample that could not be read."""
    return {_ERROR: [reason, message]}


def raise_unreadable(sample: Mapping[str, Any]) -> None:
    """Raise the error that `unreadable` put into a sample's place; a proper sample passes."""
    if isinstance(sample, Mapping) and _ERROR in sample:
        raise SampleError(*sample[_ERROR])
