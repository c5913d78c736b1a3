"""What a compression has worked out so far, beside its output until that is written.

OUT.work/
  teacher_labels.jsonl   texts of the speech it calibrates on
  sensitivities.jsonl    a layer's choices a line
  NAME.safetensors       a transformer layer or the embedding, rounded; or a student, healed

Everything but the texts, which know their teacher, names the digest of what it was worked out from,
and counts for nothing else: the command that was killed goes on, and another begins anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dqw.choices import Choice
from dqw.digest import digest
from dqw.recipe import QuantSpec
from dqw.rows import append_rows, cuts_beside, read_rows

Say = Callable[[str], object]


@dataclass(frozen=True)
class Kept:
    """The folder, for what follows from ``basis``, a digest. What cannot be written is said to
    ``say``, and work goes on without."""

    folder: Path
    say: Say = print
    basis: str = ""
    _faults: list[str] = field(default_factory=list)

    @property
    def labels(self) -> Path:
        return self.folder / "teacher_labels.jsonl"

    def on(self, tensors: Iterable[tuple[str, Tensor]], *more: object) -> Kept:
        """The same for what follows from ``tensors`` and ``more`` as well."""
        return replace(self, basis=digest(tensors, self.basis, *more))

    def has(self, name: str) -> bool:
        """Whether a module's state is kept under ``name``."""
        try:
            with safe_open(self._state(name), "pt") as file:
                return (file.metadata() or {}).get("basis") == self.basis
        except (OSError, SafetensorError):
            return False

    def load(self, name: str, module: nn.Module) -> None:
        """Give ``module`` the state that is kept under ``name``."""
        load_model(module, self._state(name))

    def save(self, name: str, module: nn.Module) -> None:
        """Keep the state of ``module`` under ``name``, whole or not at all."""
        path = self._state(name)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_model(module, str(partial), {"basis": self.basis})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            self._unwritten(error)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def choices(self, plan: Mapping[str, QuantSpec]) -> dict[str, list[Choice]]:
        """Layer → its choices, of those layers of ``plan`` that were measured."""
        found = {}
        try:
            for row in read_rows(self._choices, ("basis", "name", "spec", "choices")):
                own = plan.get(row["name"])
                if row["basis"] == self.basis and own is not None and row["spec"] == own.to_dict():
                    with suppress(TypeError, KeyError, AttributeError):
                        found[row["name"]] = [_choice(values) for values in row["choices"]]
        except OSError:
            return {}
        return found

    def keep_choices(self, name: str, spec: QuantSpec, choices: list[Choice]) -> None:
        rows = [asdict(choice) | {"spec": choice.spec.to_dict()} for choice in choices]
        row = {"basis": self.basis, "name": name, "spec": spec.to_dict(), "choices": rows}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_rows(self._choices, [row])
        except OSError as error:
            self._unwritten(error)

    def clear_states(self) -> None:
        """Remove the modules' states, which may be large, and no file of another's making."""
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError, SafetensorError):
                with safe_open(path, "pt") as file:
                    ours = "basis" in (file.metadata() or {})
                if ours:
                    path.unlink()

    def clear(self) -> None:
        """Remove what was kept, and the folder if nothing else is in it."""
        self.clear_states()
        with suppress(OSError):
            for path in (self.labels, cuts_beside(self.labels), self._choices):
                path.unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def _choices(self) -> Path:
        return self.folder / "sensitivities.jsonl"

    def _state(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _unwritten(self, error: Exception) -> None:
        why = str(getattr(error, "strerror", None) or error)
        if why not in self._faults:
            self._faults.append(why)
            self.say(f"no more is kept in {self.folder} ({why}): a kill would lose what comes now")


def _choice(values: dict[str, Any]) -> Choice:
    return Choice(**{**values, "spec": QuantSpec.from_dict(values["spec"])})
