"""A student becomes a folder: frozen, sealed with a checksum, whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from dqw.errors import UserError

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor


def save_student(
    student: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    out: Path,
    made_by: dict[str, Any] | None = None,
) -> Path:
    """Freeze ``student`` (if it still learns) and write the folder ``out``, whole or not at all."""
    import dqw
    from dqw.convert import freeze, quant_modules
    from dqw.hf import attach
    from dqw.whisper.checkpoint import file_sha256, quiet_transformers, save_processor

    student.cpu()  # where packing is tested to the last bit
    if not all(m.frozen for m in quant_modules(student).values()):
        freeze(student)
    attach(student, dqw_version=dqw.__version__, made_by=made_by)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            # transformers saves odd settings only where they are as they were loaded.
            settings = student.generation_config
            settings._original_object_hash = hash(settings)
            with quiet_transformers():
                student.save_pretrained(partial)
            save_processor(processor, partial)
            _seal(partial, file_sha256(partial / "model.safetensors"))
            (partial / "README.md").write_text(_card(out.name), encoding="utf-8")
            mode = (partial / "config.json").stat().st_mode
            for file in partial.iterdir():
                file.chmod(mode)  # safetensors makes files that their owner alone may read
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            os.rename(partial, out)
    except (OSError, SafetensorError) as error:  # the latter: from writing the weights
        raise UserError(
            f"{out} could not be written ({getattr(error, 'strerror', None) or error}): make room "
            "there, or give another --out; nothing was left behind."
        ) from error
    return out


def _seal(folder: Path, sha256: str) -> None:
    """Put the weights' checksum into config.json, so that an edited file is noticed on load."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["weights_sha256"] = sha256
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(name: str) -> str:
    return f"""# {name}

A Whisper packed by dqw. Transcribe with `dqw transcribe AUDIO --model {name}`, or in Python:

```python
import dqw  # teaches transformers to read this folder
from transformers import pipeline

asr = pipeline("automatic-speech-recognition", model="{name}")
```

Without `import dqw` loading stops with a size mismatch.
"""
