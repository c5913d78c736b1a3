"""What is said in windows of audio: the encoder's states in, languages and tokens out.

Noise and music, which Whisper puts sentences to, are told from speech by the rule of OpenAI's
whisper: a window is taken for no speech where the model finds that likelier than ``NO_SPEECH`` and
the words it would write less sure than ``DOUBT``.
"""

from __future__ import annotations

from typing import Any

import torch

from dqw.errors import UserError
from dqw.whisper.data import language_code
from dqw.whisper.decoding import Rules, is_time
from dqw.whisper.engines import Engine

NO_SPEECH = 0.6  # probability of <|nospeech|> behind the start
DOUBT = -1.0  # mean log-probability of the tokens


class Listener:
    """One model with one way of decoding."""

    def __init__(
        self,
        engine: Engine,
        task: str = "transcribe",
        beams: int = 1,
        prompt: str | None = None,
        no_speech: float = NO_SPEECH,
    ) -> None:
        """Arguments as of ``transcribe``. Raises UserError for a task or a prompt that the model
        cannot have."""
        self.engine, self.task, self.beams, self.no_speech = engine, task, beams, no_speech
        self.settings: Any = engine.settings
        self.multilingual = bool(getattr(self.settings, "is_multilingual", True))
        self.first_timestamp: int = self.settings.no_timestamps_token_id + 1
        self.end: int = self.settings.eos_token_id
        if task == "translate" and not self.multilingual:
            raise UserError("this model only knows English and can't translate; leave --task out")
        self.languages: dict[int, str] = {}  # token id -> code
        if self.multilingual:
            self.languages = {i: token[2:-2] for token, i in self.settings.lang_to_id.items()}
        self.before = self._before(prompt) if prompt and prompt.strip() else []

    def code(self, language: str | None) -> str | None:
        """Whisper's code for a language; UserError if the model does not know it."""
        known = set(self.languages.values()) or {"en"}
        code = language if language in known else language_code(language, "the language")
        if code is not None and code not in known:
            raise UserError(f"this model does not know the language '{code}'; take a "
                            "multilingual one or leave the language out")  # fmt: skip
        return code

    def own_language(self) -> str | None:
        """The one that a fine-tune's generation_config names, if it knows that."""
        named = getattr(self.settings, "language", None)
        if not self.multilingual or not isinstance(named, str):
            return None
        try:
            return self.code(named.strip("<|>"))
        except UserError:
            return None

    def _before(self, prompt: str) -> list[int]:
        """The tokens of what counts as said before, by OpenAI's rules for `initial_prompt`."""
        start = getattr(self.settings, "prev_sot_token_id", None)
        if start is None:
            raise UserError("this model was made without a place for a prompt; leave --prompt out")
        tokens = self.engine.tokens(" " + prompt.strip())
        own = range(self.end, self.first_timestamp)
        if any(token in own or is_time(token, self.first_timestamp) for token in tokens):
            raise UserError("the prompt holds one of Whisper's own tokens, <|…|>; leave it out")
        most = self.engine.positions // 2 - 1
        if len(tokens) > most:
            raise UserError(f"the prompt has {len(tokens)} tokens; {most} is the most, shorten it")
        return [start, *tokens]

    def said(
        self, states: torch.Tensor, languages: list[str | None], timestamps: bool
    ) -> tuple[list[str | None], list[list[int] | None]]:
        """The windows' languages, detected where none is given (None in an English model), and the
        tokens of what is said in each; None: nothing is."""
        unsure = self.multilingual and None in languages
        silent = [0.0] * len(languages)
        if unsure or self.no_speech < 1.0:
            with self.engine.session(states, 1) as session:
                start = torch.full((len(states), 1), self.settings.decoder_start_token_id)
                logits = session.step(start).float().cpu()
            # As in every Whisper, the token before <|notimestamps|> is <|nospeech|>.
            silent = logits.softmax(-1)[:, self.first_timestamp - 2].tolist()
            if unsure:
                ids = torch.tensor(sorted(self.languages))
                found = ids[logits[:, ids].argmax(1)].tolist()
                languages = [
                    code or self.languages[one] for code, one in zip(languages, found, strict=True)
                ]
        prompt = self.prompts(languages, timestamps)
        said: list[list[int] | None] = [*self.tokens(states, languages, prompt, timestamps)]
        for row, odds in enumerate(silent):
            tokens = said[row]
            if odds > self.no_speech and tokens:
                rules = self.rules(prompt.shape[1], timestamps)
                if (
                    self.sureness(states[row : row + 1], prompt[row].tolist(), tokens, rules)
                    < DOUBT
                ):
                    said[row] = None
        return languages, said

    def sureness(
        self, states: torch.Tensor, prompt: list[int], tokens: list[int], rules: Rules
    ) -> float:
        """The mean log-probability of ``tokens`` and the end behind them, under ``rules``."""
        wanted = [*tokens, self.end] if len(prompt) + len(tokens) < rules.longest else tokens
        total, ids, new = 0.0, torch.tensor([prompt]), torch.tensor([prompt])
        with self.engine.session(states, rules.longest) as session:
            for token in wanted:
                scores = session.step(new).float().cpu()
                for rule in rules.processors():
                    scores = rule(ids, scores)
                total += float(scores.log_softmax(-1)[0, token])
                new = torch.tensor([[token]])
                ids = torch.cat([ids, new], dim=1)
        return total / len(wanted)

    def prompts(self, languages: list[str | None], timestamps: bool) -> torch.Tensor:
        """The tokens that every row begins with, as generate would put them."""
        config = self.settings
        rows = []
        for code in languages:
            row = [*self.before, config.decoder_start_token_id]
            if self.multilingual:
                row += [config.lang_to_id[f"<|{code}|>"], config.task_to_id[self.task]]
            rows.append(row if timestamps else [*row, config.no_timestamps_token_id])
        return torch.tensor(rows)

    def rules(self, begin: int, timestamps: bool) -> Rules:
        settings, positions = self.settings, self.engine.positions
        return Rules(
            begin,
            longest=min((settings.max_length or positions) + begin, positions),
            end=self.end,
            first_timestamp=self.first_timestamp,
            always=tuple(settings.suppress_tokens or ()),
            first=tuple(settings.begin_suppress_tokens or ()),
            timestamps=timestamps,
            latest=getattr(settings, "max_initial_timestamp_index", None),
        )

    def tokens(
        self,
        states: torch.Tensor,
        languages: list[str | None],
        prompt: torch.Tensor,
        timestamps: bool,
    ) -> list[list[int]]:
        """The likeliest tokens of each window, without prompt and end."""
        begin = prompt.shape[1]
        decoder = self.engine.native() if self.beams == 1 else None
        # generate has rules of its own for times, but these come after what is suppressed.
        rules = self.rules(begin, timestamps)
        if decoder is not None:
            rows = decoder.greedy(states, prompt, rules)
        else:
            options: dict[str, Any] = {"task": self.task} if self.multilingual else {}
            if self.before:
                options["prompt_ids"] = torch.tensor(self.before)
            rows = self.engine.generate(
                states,
                languages,
                num_beams=self.beams,
                do_sample=False,
                logits_processor=rules.processors(),
                return_timestamps=timestamps,
                **options,
            )
        tokens = [row[begin:] for row in rows.tolist()]
        return [row[: row.index(self.end)] if self.end in row else row for row in tokens]

    def reported(self, code: str | None) -> str | None:
        return code if self.multilingual else "en"

    def text(self, tokens: list[int]) -> str:
        said = [token for token in tokens if not is_time(token, self.first_timestamp)]
        return self.engine.text(said).strip()
