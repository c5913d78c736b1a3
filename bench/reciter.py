"""A Whisper of another size, for timing without its weights: it recites one text to any audio.

Weights are random, so every engine multiplies what it would multiply; the decoder's positions point
at the text's tokens and outweigh the layers, so every engine writes the same words and stops. Only
its speed and memory mean anything.
"""

from typing import Any

import torch

SHAPES = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24)}
PROMPT = 4  # start, language, task, no timestamps: the first word comes after them
TEXT = (
    " The harbour was quiet when the first boats came in, and nobody on the pier had slept much. "
    "A boy counted the crates twice, wrote the number on his sleeve and ran uphill to the office, "
    "where the clerk was still boiling water for tea. Eleven boxes of herring, four of cod, one "
    "torn net, he said, and my uncle wants his money before noon. The clerk looked over her "
    "glasses, opened the green ledger and smiled. Tell him that the bank opens at nine, she "
    "answered, and that the price went up again last night."
)


def reciter(shape: str, base: Any, processor: Any) -> Any:
    """A float32 WhisperForConditionalGeneration of ``shape`` (of ``SHAPES``: width, layers of each
    stack), the same every time. base: a Whisper of the same vocabulary, for all the rest, and its
    processor. ``TEXT`` must fit the decoder's positions."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    width, layers = SHAPES[shape]
    sizes = {"d_model": width, "encoder_layers": layers, "decoder_layers": layers}
    sizes |= {f"{part}_attention_heads": width // 64 for part in ("encoder", "decoder")}
    sizes |= {f"{part}_ffn_dim": 4 * width for part in ("encoder", "decoder")}
    torch.manual_seed(0)
    model: Any = WhisperForConditionalGeneration(
        WhisperConfig.from_dict({**base.config.to_dict(), **sizes, "num_hidden_layers": layers})
    )
    model.generation_config = base.generation_config
    decoder = model.model.decoder
    words = processor.tokenizer(TEXT, add_special_tokens=False).input_ids
    said = torch.tensor([*words, base.generation_config.eos_token_id])
    with torch.no_grad():
        for layer in decoder.layers:  # 36 outputs of length 0.4 beside a position of length 20
            for last in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
                last.weight.mul_(0.05)
        decoder.embed_tokens.weight.normal_().mul_(width**-0.5)
        positions = decoder.embed_positions.weight
        positions[PROMPT - 1 : PROMPT - 1 + len(said)] = 20 * decoder.embed_tokens.weight[said]
    return model.eval()
