"""Transcripts as txt, json, srt and vtt text."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from dqw.whisper.transcript import Segment, Transcript

FORMATS = ("txt", "json", "srt", "vtt")
TIMED = ("srt", "vtt")  # these need segments


def render(transcript: Transcript, form: str, timestamps: bool = False) -> str:
    """`transcript` as the text of a file of the format `form`, newline at the end.

    `timestamps`: in txt, one segment a line with its times before it. A text without segments is
    one in json, srt and vtt.
    """
    if form == "json":
        whole = replace(transcript, segments=list(_segments(transcript)))
        return json.dumps(whole.to_dict(), ensure_ascii=False, indent=2) + "\n"
    if form == "srt":
        blocks = enumerate(_segments(transcript), start=1)
        return "\n".join(f"{n}\n{_span(s, ',')}\n{s.text}\n" for n, s in blocks)
    if form == "vtt":
        return "WEBVTT\n" + "".join(f"\n{_span(s, '.')}\n{s.text}\n" for s in _segments(transcript))
    if timestamps:
        return "".join(f"[{_span(s, '.')}] {s.text}\n" for s in _segments(transcript))
    return transcript.text + "\n"


def _segments(transcript: Transcript) -> Iterable[Segment]:
    if transcript.segments or not transcript.text:
        return transcript.segments
    return [Segment(0.0, transcript.seconds, transcript.text)]


def _span(segment: Segment, point: str) -> str:
    return f"{_clock(segment.start, point)} --> {_clock(segment.end, point)}"


def _clock(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest // 1000:02d}{point}{rest % 1000:03d}"
