"""``python -m bench.equality``: does a packed model say what its fake-quantized self says?

A model is quantized by the default recipe; a copy is frozen, saved and loaded again. The packed
one transcribes every clip greedily; then the learning one, which rounds its latent weights in every
forward, sees the same clip and the same tokens. Counted: clips where every token is the learning
model's first choice too, and the largest difference between logits.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from bench.__main__ import exit_with_a_sentence


def main(
    model: Annotated[str, typer.Option(help="A float Whisper: hub id or folder.")],
    data: Annotated[str, typer.Option(help="manifest.jsonl, audio folder or dataset.")],
    bits: Annotated[int, typer.Option(help="Bits of Linear and embedding weights.")] = 4,
    limit: Annotated[int | None, typer.Option(help="At most this many clips.")] = None,
) -> None:
    """Compare packed and fake-quantized inference on real speech, clip by clip."""
    from transformers import WhisperForConditionalGeneration

    import dqw
    from dqw.convert import round_float_rest
    from dqw.recipe import Recipe
    from dqw.whisper.checkpoint import load_whisper, quiet_transformers
    from dqw.whisper.data import load_items

    items = load_items(data, limit=limit)
    learning, processor = load_whisper(model)
    recipe = Recipe.shipped("default")
    quant = replace(recipe.quant, bits=bits, embedding_bits=bits)
    dqw.quantize(learning, replace(recipe, quant=quant))
    round_float_rest(learning)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        dqw.freeze(copy.deepcopy(learning)).save_pretrained(Path(folder))
        packed = WhisperForConditionalGeneration.from_pretrained(folder)
    same = tokens = 0
    largest = spread = 0.0
    for item in track(items, console=Console(stderr=True)):
        wave = item.load()
        features = processor.feature_extractor(wave, sampling_rate=16000, return_tensors="pt")
        x = features.input_features
        with torch.inference_mode(), quiet_transformers():
            ids = packed.generate(
                x, language=item.language, task="transcribe", force_unique_generate_call=True
            )
            a, b = (m(input_features=x, decoder_input_ids=ids).logits for m in (packed, learning))
        tokens += ids.shape[1]
        same += torch.equal(a.argmax(-1), b.argmax(-1))
        largest = max(largest, (a - b).abs().max().item())
        spread = max(spread, b.std().item())
    print(f"{same} of {len(items)} clips with the same first choice at all {tokens} tokens")
    print(f"logits differ by at most {largest:.2g} (standard deviation {spread:.2g})")


if __name__ == "__main__":
    exit_with_a_sentence(lambda: typer.run(main))
