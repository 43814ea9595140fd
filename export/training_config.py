"""The public implementation's JSON training config, which tells what its checkpoints do not: norm groups, scale, schedules."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from sr3rt.bundle import MOST_STEPS
from sr3rt.errors import CheckpointError, OptionError
from sr3rt.schedule import NAMED, ScheduleSpec

STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
DEFAULT_NORM_GROUPS = 32  # what the implementation takes when its config names none


@dataclass(frozen=True)
class TrainingConfig:
    """What a config says. sha256: of the file. attention: levels, worked out from `attn_res` and `image_size`. None: it says nothing."""

    sha256: str
    variant: str
    in_channels: int
    channels: int
    inner: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    norm_groups: int | None
    image_size: int
    low_size: int | None
    high_size: int | None
    trained: ScheduleSpec
    inference: ScheduleSpec | None


def without_comments(text: str) -> str:
    """JSON text less its // and /* */ comments; what looks like one inside a string stays. Lines keep their numbers."""

    def replaced(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else "\n" * found.count("\n")

    return STRING_OR_COMMENT.sub(replaced, text)


def read_config(path: Path) -> TrainingConfig:
    """Raises CheckpointError when the file cannot be read, is not JSON, or lacks an entry or has one that cannot be used."""
    try:
        data = path.read_bytes()
        content = json.loads(without_comments(data.decode("utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the config {path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the config {path} is not JSON (// comments are fine): {error}") from None
    entries = Entries(content, path)
    image_size = entries.integer("model.diffusion.image_size")
    multipliers = entries.integers("model.unet.channel_multiplier")
    attended = entries.integers("model.unet.attn_res")
    val = entries.get("model.beta_schedule.val")
    return TrainingConfig(
        sha256=hashlib.sha256(data).hexdigest(),
        variant=entries.text("model.which_model_G"),
        in_channels=entries.integer("model.unet.in_channel"),
        channels=entries.integer("model.unet.out_channel"),
        inner=entries.integer("model.unet.inner_channel"),
        multipliers=multipliers,
        blocks=entries.integer("model.unet.res_blocks"),
        attention=tuple(level for level in range(len(multipliers)) if image_size // 2**level in attended),
        norm_groups=entries.optional_integer("model.unet.norm_groups"),
        image_size=image_size,
        low_size=entries.optional_integer("datasets.train.l_resolution", "datasets.val.l_resolution"),
        high_size=entries.optional_integer("datasets.train.r_resolution", "datasets.val.r_resolution"),
        trained=entries.schedule("model.beta_schedule.train"),
        inference=None if val is None else entries.schedule("model.beta_schedule.val"),
    )


class Entries:
    """Typed look-ups by dotted name in a JSON object; what is missing or of another type is a CheckpointError that names it."""

    def __init__(self, content: object, path: Path) -> None:
        self.content, self.path = content, path

    def get(self, name: str) -> object:
        value = self.content
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def wrong(self, name: str, expected: str) -> CheckpointError:
        value = self.get(name)
        found = "nothing" if value is None else json.dumps(value)[:80]
        return CheckpointError(f"the config {self.path} should have {expected} at {name}, found {found}")

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "a positive whole number")
        return value

    def optional_integer(self, *names: str) -> int | None:
        """The first of `names` that is there."""
        present = [name for name in names if self.get(name) is not None]
        return self.integer(present[0]) if present else None

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.get(name)
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.wrong(name, "a list of whole numbers")
        return tuple(value)

    def share(self, name: str) -> float:
        value = self.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise self.wrong(name, "a number from 0 to 1")
        return float(value)

    def schedule(self, name: str) -> ScheduleSpec:
        """One that can be made."""
        kind, steps = self.text(f"{name}.schedule"), self.integer(f"{name}.n_timestep")
        if kind not in NAMED:
            raise self.wrong(f"{name}.schedule", f"one of {', '.join(NAMED)}")
        if steps > MOST_STEPS:
            raise self.wrong(f"{name}.n_timestep", f"at most {MOST_STEPS:,} steps")
        spec = ScheduleSpec(kind, steps, self.share(f"{name}.linear_start"), self.share(f"{name}.linear_end"))
        try:
            spec.schedule()
        except OptionError as error:
            raise CheckpointError(f"the config {self.path} has a schedule that cannot be used at {name}: {error}") from None
        return spec
