"""``generate`` on the native networks: a subclass that a packed Whisper takes at load. On a GPU
those are CUDA graphs (``gpu``).

transformers keeps what it is good at (language, prompts, windows of long audio, thresholds); the
greedy loop and the encoder are ours. The loop asks the same logits processors and stopping criteria
and so gives the same tokens; what it does not cover (sampling, attentions asked for, padded
prompts, other dtypes on a CPU, layers with hooks, training) runs as it would without it.

Within ``generate`` many rows are multiplied in bfloat16 where the processor does that faster, as
`dqw transcribe` does; a model that is called keeps float32.
"""

from __future__ import annotations

import copyreg
import functools
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.generation import (
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dqw.whisper.decoding import SuppressTokens
from dqw.whisper.fast import FastDecoder, Session, fast_decoder, fast_encoder
from dqw.whisper.fast_greedy import Stop, greedy
from dqw.whisper.gpu import GpuSession, Graphs, graphs_of

# Whether products of float32 may be rounded to bfloat16: true within generate.
_rounds: ContextVar[bool] = ContextVar("dqw_rounds", default=False)
# Within generate on a GPU: the model's.
_graphs: ContextVar[Graphs | None] = ContextVar("dqw_graphs", default=None)


def speed_up(model: Any) -> None:
    """Let ``model`` generate on the native networks wherever they cover it; others stay as is."""
    if type(model) is WhisperForConditionalGeneration:
        model.__class__ = _FastWhisper
        model.model.encoder.__class__ = _FastEncoder


def native_decoder(model: Any) -> FastDecoder | None:
    """The native decoder of a model that ``speed_up`` had; None where it does not cover it."""
    return fast_decoder(model) if isinstance(model, _FastWhisper) else None


class _FastWhisper(WhisperForConditionalGeneration):
    # transformers refuses these for quantized models; packed codes keep their dtype in any case.
    def half(self, *args: Any) -> Any:
        return self.to(dtype=torch.float16)  # type: ignore[call-arg]

    def float(self, *args: Any) -> Any:
        return self.to(dtype=torch.float32)  # type: ignore[call-arg]

    @functools.wraps(WhisperForConditionalGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        graphs = graphs_of(self)
        before, graphs_before = _rounds.set(True), _graphs.set(graphs)
        try:
            with nullcontext() if graphs is None else graphs.lock:
                return super().generate(*args, **kwargs)
        finally:
            _rounds.reset(before)
            _graphs.reset(graphs_before)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("_dqw_graphs", None)  # moved or cast: the memory of a GPU is free at once
        return super()._apply(*args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        decoder: FastDecoder | Graphs | None = None
        argmax = not generation_config.do_sample and not synced_gpus
        if argmax and _is_covered(generation_config, model_kwargs, input_ids):
            graphs = _graphs.get()
            decoder = fast_decoder(self) if graphs is None else graphs
        if decoder is None:
            plain: Any = super()
            return plain._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        pad = generation_config._pad_token_tensor
        asks = generation_config.return_dict_in_generate
        with torch.inference_mode():
            found = greedy(
                decoder,
                model_kwargs["encoder_outputs"][0],
                input_ids,
                [_quick(processor) for processor in logits_processor],
                Stop.of(stopping_criteria),
                pad=0 if pad is None else int(pad),
                scores=asks and generation_config.output_scores,
                logits=asks and generation_config.output_logits,
                streamer=streamer,
                bf16=_rounds.get(),
            )
        if not asks:
            return found.ids
        kept: dict[str, Any] = {"scores": tuple(found.scores) or None}
        kept |= {"sequences": found.ids, "logits": tuple(found.logits) or None}
        return GenerateEncoderDecoderOutput(**kept)

    def _beam_search(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' beam search, with our decoder in the place of its cache."""
        decoder = None
        beams = generation_config.num_beams
        covered = _graphs.get() is None  # beams on a GPU are transformers'
        if covered and not synced_gpus and _is_covered(generation_config, model_kwargs, input_ids):
            decoder = fast_decoder(self)
        if decoder is not None:
            states = model_kwargs["encoder_outputs"][0][::beams].contiguous()
            longest = generation_config.max_length
            name = "cache" if "cache" in model_kwargs else "past_key_values"
            model_kwargs[name] = Session(decoder, states, longest, beams, bf16=_rounds.get())
        plain: Any = super()
        return plain._beam_search(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus=synced_gpus,
            **model_kwargs,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the beam search, and the single token that detects the language, are ours."""
        session = kwargs.get("cache", kwargs.get("past_key_values"))
        if session is None and not args and not torch.is_grad_enabled():
            session = self._detecting(kwargs)
        if isinstance(session, Session | GpuSession):
            return Seq2SeqLMOutput(logits=session.step(kwargs["decoder_input_ids"])[:, None])
        return super().__call__(*args, **kwargs)

    def _detecting(self, given: dict[str, Any]) -> Session | GpuSession | None:
        """Decoding of what ``detect_language`` asks for, if ``given`` is that."""
        ids = given.get("decoder_input_ids")
        rest = given.keys() - {"decoder_input_ids", "use_cache"}
        if ids is None or ids.shape[1] != 1 or given.get("use_cache") is not False:
            return None
        if rest not in ({"encoder_outputs"}, {"input_features"}) or torch.compiler.is_compiling():
            return None
        graphs = _graphs.get()
        decoder = fast_decoder(self) if graphs is None else graphs
        if decoder is None:
            return None
        encoded = given.get("encoder_outputs") or self.model.encoder(given["input_features"])
        return decoder.session(encoded[0], 1, bf16=_rounds.get())


class _FastEncoder(WhisperEncoder):
    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        native = None
        config = self.config
        asks = config.output_attentions or config.output_hidden_states
        asks = asks or kwargs.get("output_attentions") or kwargs.get("output_hidden_states")
        frames = 2 * config.max_source_positions
        asks = asks or torch.compiler.is_compiling()  # the plain modules are what can be traced
        if not asks and not torch.is_grad_enabled() and input_features.shape[-1] == frames:
            graphs = _graphs.get()
            if graphs is not None and graphs.encoder is self:
                return _encoded(graphs.encode(input_features), kwargs)
            if input_features.device.type == "cpu":
                native = fast_encoder(self)
        if native is None:
            return super().forward(input_features, attention_mask, **kwargs)
        return _encoded(native(input_features, bf16=_rounds.get()), kwargs)


def _encoded(states: Tensor, asked: dict[str, Any]) -> Any:
    if asked.get("return_dict", True) is False:
        return (states,)
    return BaseModelOutput(last_hidden_state=states)


_MINE: dict[type, type] = {
    WhisperForConditionalGeneration: _FastWhisper,
    WhisperEncoder: _FastEncoder,
}


def _empty(theirs: type) -> Any:
    return object.__new__(_MINE[theirs])


def _reduced(theirs: type, module: Any) -> tuple[Any, ...]:
    return _empty, (theirs,), module.__dict__


# transformers finds classes by these names: as the architecture that save_pretrained writes, and to
# know what a forward pass can record. pickle, by which processes are handed a model, would find
# theirs by them.
for _theirs, _mine in _MINE.items():
    copyreg.pickle(_mine, functools.partial(_reduced, _theirs))
    for _name in ("__name__", "__qualname__", "__module__"):
        setattr(_mine, _name, getattr(_theirs, _name))


def _is_covered(config: Any, inputs: dict[str, Any], ids: Tensor) -> bool:
    mask = inputs.get("decoder_attention_mask")
    states = inputs.get("encoder_outputs")
    cache = inputs.get("cache", inputs.get("past_key_values"))
    return bool(
        not (config.output_attentions or config.output_hidden_states)
        and config.use_cache is not False
        and getattr(config, "prefill_chunk_size", None) is None
        and states is not None
        and states[0].device == ids.device
        and states[0].shape[0] == ids.shape[0] > 0
        and (mask is None or bool(mask.all()))
        and inputs.get("decoder_inputs_embeds") is None
        and inputs.get("decoder_position_ids") is None
        and (cache is None or cache.get_seq_length() == 0)
    )


def _quick(processor: Any) -> Any:
    """transformers' two processors that suppress tokens look for them in the whole vocabulary."""
    if type(processor) is SuppressTokensLogitsProcessor:
        return SuppressTokens(processor.suppress_tokens.tolist(), ())
    if type(processor) is SuppressTokensAtBeginLogitsProcessor:
        quick = SuppressTokens((), processor.begin_suppress_tokens.tolist())
        quick.set_begin_index(processor.begin_index)
        return quick
    return processor
