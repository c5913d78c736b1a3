"""Whisper around the kernels: audio in, datasets, checkpoint formats, transcribing, scoring."""
