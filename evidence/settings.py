"""The experiments: what world, which model, how long, and on which stories."""

import dataclasses
import json
import pathlib

from evidence.stories import Stories
from evidence.video import VideoWorld
from evidence.world import World
from moc_jax.config import DiffusionConfig, HashConfig, MMDiTConfig, ModelConfig, PcaConfig, SampleConfig

TRAINING, CHOICES, FINAL = 0, 1, 2
"""Splits: what is trained on, what choices are made on, and what only the final table is made of."""

FINAL_FILE = pathlib.Path(__file__).parent / "final.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """All that the arms of an experiment have in common."""

    world: Stories
    codec: PcaConfig
    text: HashConfig
    model: ModelConfig
    diffusion: DiffusionConfig
    sample: SampleConfig
    batch: int
    box_weight: float
    warmup: int
    updates: int
    """At most; the minutes may end training sooner."""
    every: int
    """Updates between two tests."""
    stories: int
    """To train on."""
    held_out: int
    """Stories for choices."""
    quick: int
    """As many of them are asked while training goes on."""
    codec_stories: int = 64
    codec_world: Stories | None = None
    """Whose stories the codec is fitted on, where it is not `world`: that of the weights that are started from."""
    tested_world: Stories | None = None
    """Of which held-out stories are, where it is not `world`."""
    final: int = 256
    """As many of the final stories, at most."""
    in_turn: bool = False
    """Whether it is trained to follow finished shots; see `Task`."""

    def __post_init__(self):
        kinds = [(of.shots, of.frames, of.characters, of.size) for of in (self.world, self.tested_world) if of]
        if len(set(kinds)) > 1:
            raise ValueError(f"stories have {kinds[0]} and in tests {kinds[1]} shots, frames, characters and pixels")

    @property
    def seeds(self) -> range:
        """Of the stories to train on, which are others than those that the codec is fitted on."""
        return range(self.codec_stories, self.codec_stories + self.stories)


FULL = Setting(
    world=World(split=TRAINING),
    codec=PcaConfig(),
    text=HashConfig(dim=256),
    model=MMDiTConfig(dim=256, depth=6, heads=4, patch=(1, 2, 2), remat="none", scan_layers=False),
    diffusion=DiffusionConfig(t_mean=2.0, t_std=1.5),
    sample=SampleConfig(solver="euler", schedule="wan-dpm++", steps=12, shift=1.0, history_noise=0.02),
    batch=64,
    box_weight=10.0,
    warmup=100,
    updates=20_000,
    every=250,
    stories=12_000,
    held_out=200,
    quick=64,
)

STILL = dataclasses.replace(
    FULL,
    world=World(still=True, split=TRAINING),
    diffusion=DiffusionConfig(t_mean=3.0, t_std=1.5),
    box_weight=20.0,
    stories=12_000,  # each in 48 colorings
    every=100,
)

NARROW, WIDE = (
    dataclasses.replace(STILL, model=dataclasses.replace(STILL.model, dim=64 * heads, heads=heads)) for heads in (2, 8)
)

MIXED = dataclasses.replace(
    STILL,
    world=World(mixed="names", split=TRAINING),
    codec_world=FULL.world,
    tested_world=FULL.world,
    stories=40_000,
    updates=12_000,
    every=250,
)
"""The full world, learned from stories of moving and still shots."""

WORDS = dataclasses.replace(MIXED, world=World(mixed="words", split=TRAINING), stories=60_000)
"""The same, but captions of still shots are as long as the others."""

IN_TURN = dataclasses.replace(
    STILL, diffusion=DiffusionConfig(t_mean=3.0, t_std=1.5, history_noise=(0.0, 0.3)), in_turn=True, updates=3_000
)


def long(setting: Setting) -> Setting:
    """The same with shots of 41 frames of 256 x 256: 33,792 video tokens, of which characters take a sixteenth of the
    share; to be started from its weights."""
    assert isinstance(setting.world, World)
    return dataclasses.replace(
        setting,
        world=dataclasses.replace(setting.world, size=256, frames=41),
        codec_world=setting.world,
        model=dataclasses.replace(setting.model, scan_layers=True),  # kernels take long to compile
        batch=2,
        box_weight=16 * setting.box_weight,
        warmup=50,
        updates=2_000,
        every=200,
        stories=512,
        held_out=48,
        quick=16,
        final=48,
    )


SETTINGS: dict[str, Setting] = {
    "full": FULL,
    "full-mixed": MIXED,
    "full-words": WORDS,
    "still": STILL,
    "still-narrow": NARROW,
    "still-wide": WIDE,
    "in-turn": IN_TURN,
    "long": long(FULL),
    "long-still": long(STILL),
    "video": dataclasses.replace(FULL, world=VideoWorld(split=TRAINING), box_weight=2.0),  # boxes are larger
    "small": Setting(
        world=World(shots=4, frames=5, characters=2, places=2, still=True, split=TRAINING),
        codec=PcaConfig(),
        text=HashConfig(dim=64),
        model=MMDiTConfig(
            dim=64, depth=2, heads=2, mlp_ratio=2.0, patch=(1, 4, 4), text_dim=64, dtype="float32", remat="none"
        ),
        diffusion=DiffusionConfig(t_mean=4.0),
        sample=SampleConfig(solver="euler", schedule="wan-dpm++", steps=1, shift=1.0, history_noise=0.02),
        batch=16,
        box_weight=20.0,
        warmup=50,
        updates=1_000,
        every=250,
        stories=3_000,
        held_out=800,
        quick=100,
    ),
}


def final_seeds(most: int = 256) -> tuple[range, list[int]]:
    """The first so many stories of the final table, and the rows of those on the contact sheet."""
    found = json.loads(FINAL_FILE.read_text())
    count = min(found["count"], most)
    rows = [row for row in found["contact_sheet"] if row < count]
    return range(found["first"], found["first"] + count), rows


def final_training_seeds() -> tuple[int, ...]:
    """Of the runs of the final table."""
    return tuple(json.loads(FINAL_FILE.read_text())["training_seeds"])
