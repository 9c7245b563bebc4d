"""Storyboards -> one batch of scenes to sample: captions embedded, given pictures and videos encoded, seeds set."""

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import jax
import numpy as np

from moc_jax.codecs import Codec, crop_frames, pixels_to_unit
from moc_jax.config import BucketConfig, DataConfig, MoCConfig, ModelConfig, SampleConfig
from moc_jax.data.manifest import SceneEntry
from moc_jax.data.pack import condition_of, own_texts, pack_scene, stack_scenes
from moc_jax.data.video import VideoError, decode, read_video
from moc_jax.diffusion.conditioning import Known
from moc_jax.sampling.storyboard import Shot, Storyboard, StoryboardError, check_pins, frames_of
from moc_jax.scene import Scene, SceneLengths
from moc_jax.shapes import Array, Float, Float32, Shaped, UInt8
from moc_jax.text import TextEncoder

TOKEN_LIMIT = 1 << 24  # video tokens of all storyboards; a minute of 480p video has 180 000
BYTE_LIMIT = 8 << 30  # of the text, of a given video's pixels, and of the table of frames and shots

Encode = Callable[[str], Float[np.ndarray, "L E"]]
"""Of a caption; a `TextEncoder` is one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of scenes to sample, in one bucket."""

    text: Float[Array, "B L E"]
    lengths: SceneLengths
    negative_text: Float[Array, "B L E"]
    negative_lengths: SceneLengths
    known: Known
    condition: Float[Array, "B F Y X C"] | None
    keys: Shaped[Array, "B S 2"]  # uint32: the data of each shot's random key


@dataclasses.dataclass(frozen=True)
class Canvas:
    """What storyboards are drawn on: the frames, the codec that makes latents of them, the patches of the model, and
    its attention."""

    data: DataConfig
    codec: Codec
    patch: tuple[int, int, int]
    moc: MoCConfig
    condition_channels: int = 0
    """What the model reads beside the latents, a mask and the latents of what is given: as many channels as `codec` has
    frames per latent, and its channels. 0: nothing."""

    @property
    def latent_size(self) -> tuple[int, int]:
        """Rows and columns of a latent frame."""
        return self.data.height // self.codec.stride[1], self.data.width // self.codec.stride[2]

    def keeps_first(self, shot: Shot) -> bool:
        """Whether its first frame is given and stays; a model with a condition reads it there, and makes it again."""
        return shot.starts_given and not self.condition_channels

    def frames(self, shot: Shot) -> int | None:
        """Frames of a shot; 0: there is no such short shot; None: as many as its video has, or those of a picture."""
        if shot.latents is not None:
            return self.codec.stride[0] * (len(shot.latents) - 1) + 1
        if shot.seconds is None:
            return None
        return frames_of(shot.seconds, self.data.fps, self.codec.stride[0], self.patch[0])


def canvas_of(data: DataConfig, codec: Codec, model: ModelConfig, moc: MoCConfig) -> Canvas:
    """That of a model."""
    return Canvas(data, codec, model.patch, moc, getattr(model, "condition_channels", 0))


def scene_storyboard(scene: SceneEntry, *, stride: int, fps: float) -> Storyboard:
    """The storyboard that asks for a scene of the training data: its captions and its durations."""
    shots = [
        Shot(caption=s.caption, seconds=(stride * (s.frames - 1) + 1) / fps, continues=s.continues) for s in scene.shots
    ]
    return Storyboard(caption=scene.caption, shots=tuple(shots), name=scene.name)


def make_request(
    storyboards: Sequence[Storyboard],
    canvas: Canvas,
    sample: SampleConfig,
    encoder: Encode,
    bucket: BucketConfig | None = None,
) -> Request:
    """Encodes storyboards into one batch, whose leaves are numpy arrays.

    Args:
        storyboards: at least one.
        canvas, encoder: of the model's training.
        sample: the defaults for seed and negative prompt.
        bucket: the static shape; None takes the smallest that holds all.

    Raises:
        StoryboardError: a caption that is too long, a duration without a frame, a picture or video that cannot be
            read or is too short, a scene that does not fit `bucket`, or more than fits any memory; names the
            storyboard and the place in it.
    """
    _check_whole(storyboards, canvas)
    shots = [_shot_latents(board, canvas) for board in storyboards]
    texts = [_captions(board, encoder, canvas.moc) for board in storyboards]
    negatives = [_negative(board, sample.negative_prompt, encoder, canvas.moc) for board in storyboards]
    if bucket is None:
        captions = itertools.chain(texts, negatives)
        bucket = BucketConfig(
            shots=max(map(len, shots)),
            frames=max(sum(map(len, scene)) for scene in shots),
            text_tokens=max(sum(map(len, scene)) for scene in captions),
        )

    def pack(captions: list[list[np.ndarray]]) -> Scene:
        try:
            packed = [_packed(b, s, texts, bucket) for b, s, texts in zip(storyboards, shots, captions)]
        except ValueError as error:
            raise StoryboardError(str(error)) from error
        return stack_scenes(packed)

    of_shots = functools.partial(_of_shots, bucket.shots)
    scene, negative = pack(texts), pack(negatives)
    boards = [board.shots for board in storyboards]
    first_frames = of_shots([[canvas.keeps_first(shot) for shot in row] for row in boards])
    clean = {"clean_first": first_frames} if sample.first_frames == "clean" else {}
    return Request(
        text=scene.text,
        lengths=dataclasses.replace(scene.lengths, **clean),
        negative_text=negative.text,
        negative_lengths=dataclasses.replace(negative.lengths, **clean),
        known=Known(
            video=scene.video,
            shots=of_shots([[shot.is_given for shot in row] for row in boards]),
            first_frames=first_frames,
        ),
        condition=cast(Array, _condition(boards, shots, canvas, bucket.frames)) if canvas.condition_channels else None,
        keys=of_shots([_keys(board, sample.seed) for board in storyboards], (2,), np.uint32),
    )


def check_request(
    storyboards: Sequence[Storyboard], canvas: Canvas, sample: SampleConfig, encoder: TextEncoder
) -> None:
    """Raises StoryboardError for what of `make_request` can be seen before anything is encoded."""
    _check_whole(storyboards, canvas)
    for board in storyboards:
        _check_shots(board, canvas, sample, encoder)


def check_shot_by_shot(board: Storyboard, canvas: Canvas, sample: SampleConfig, encoder: TextEncoder) -> None:
    """The same for a storyboard whose shots are sampled one after another, as parts of other scenes: of any length."""
    for shot in board.shots:
        _check_size([dataclasses.replace(board, shots=(shot,))], canvas)
    _check_shots(board, canvas, sample, encoder)


def _check_shots(board: Storyboard, canvas: Canvas, sample: SampleConfig, encoder: TextEncoder) -> None:
    captions = {f"shots[{s}].caption": shot.caption for s, shot in enumerate(board.shots)}
    negative = sample.negative_prompt if board.negative_prompt is None else board.negative_prompt
    for where, caption in {"caption": board.caption, **captions, "negative_prompt": negative}.items():
        try:
            encoder.check(caption)
        except ValueError as error:
            raise StoryboardError(f"{board.name}: {where}: {error}") from error
    of_each(board, lambda shot: _frames(shot, canvas))


def check_given(board: Storyboard, condition_channels: int) -> None:
    """Raises StoryboardError: nothing is given to a model that reads what is."""
    if condition_channels and not any(shot.is_given or shot.starts_given for shot in board.shots):
        raise StoryboardError(
            f"{board.name}: these weights animate pictures, but no shot has an `image` or a `video`; give the first "
            "shot an `image`, or take weights that make videos from text alone"
        )


def _of_shots(
    shots: int, rows: Sequence[list[bool] | np.ndarray], shape: tuple[int, ...] = (), dtype: type = bool
) -> Array:
    out = np.zeros((len(rows), shots, *shape), dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return cast(Array, out)


def warn(storyboards: Sequence[Storyboard], request: Request, trained: Sequence[BucketConfig], guidance: float) -> None:
    """Warns of what will work, but not as hoped."""
    for board, frames in zip(storyboards, request.lengths.shot_frames):
        for what, count, most in (
            ("latent frames", int(frames.sum()), max((b.frames for b in trained), default=0)),
            ("shots", len(board.shots), max((b.shots for b in trained), default=0)),
        ):
            if trained and count > most:
                warnings.warn(
                    f"{board.name} has {count} {what}, more than the {most} of the longest training scene; expect it "
                    "to drift or to repeat itself",
                    stacklevel=3,
                )
        if board.negative_prompt and guidance == 1:
            warnings.warn(f"{board.name}: negative_prompt has no effect at guidance 1; raise it", stacklevel=3)


def _packed(board: Storyboard, shots: list[np.ndarray], captions: list[np.ndarray], bucket: BucketConfig) -> Scene:
    return pack_scene(shots, captions, bucket, continues=[shot.continues for shot in board.shots], name=board.name)


def _keys(board: Storyboard, seed: int) -> Shaped[np.ndarray, "S 2"]:
    """A shot's own seed, or the scene's folded with the shot's place: changing one shot's seed changes no other's."""
    scene = jax.random.key(seed if board.seed is None else board.seed)
    folded = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(scene, np.arange(len(board.shots)))
    own = jax.vmap(jax.random.key)(np.asarray([shot.seed or 0 for shot in board.shots], np.uint32))
    given = np.asarray([shot.seed is not None for shot in board.shots])
    return np.where(given[:, None], jax.random.key_data(own), jax.random.key_data(folded))


def _check_whole(storyboards: Sequence[Storyboard], canvas: Canvas) -> None:
    for board in storyboards:
        check_pins(board)
        check_given(board, canvas.condition_channels)
    _check_size(storyboards, canvas)


def _check_size(storyboards: Sequence[Storyboard], canvas: Canvas) -> None:
    """Refuses, before anything is allocated, what no machine could sample: hours at full size, or a million shots."""
    (rows, columns), (f, y, x), codec = canvas.latent_size, canvas.patch, canvas.codec

    def latent_frames(shot: Shot) -> int:
        frames = canvas.frames(shot)
        return codec.latent_frames(frames) if frames else f

    latents = [sum(map(latent_frames, board.shots)) for board in storyboards]
    most = max(latents)
    longest = storyboards[latents.index(most)]
    fix = "give fewer or shorter shots, or sample fewer storyboards at once"
    tokens = len(storyboards) * most // f * (rows // y) * (columns // x)
    if tokens > TOKEN_LIMIT:
        raise StoryboardError(
            f"{longest.name} has {most:,} latent frames, which are {tokens:,} tokens for {len(storyboards)} such "
            f"scene(s); the limit is {TOKEN_LIMIT:,}: {fix}"
        )
    values = len(storyboards) * most * rows * columns * codec.channels
    _check_bytes(longest, "its latents", 4 * values, fix)
    shots = max(len(board.shots) for board in storyboards)
    _check_bytes(longest, "the table of its frames and shots", len(storyboards) * shots * most, fix)


def _check_bytes(board: Storyboard, what: str, size: int, fix: str) -> None:
    if size > BYTE_LIMIT:
        raise StoryboardError(
            f"{board.name}: {what} would need {size / (1 << 30):,.1f} GiB; the limit is {BYTE_LIMIT >> 30} GiB: {fix}"
        )


# ------------------------------------------------------------------------------------------------ text


def _captions(board: Storyboard, encoder: Encode, moc: MoCConfig) -> list[np.ndarray]:
    embedded, size = [_embed(board, "caption", board.caption, encoder)], 0
    for s, shot in enumerate(board.shots):
        embedded.append(_embed(board, f"shots[{s}].caption", shot.caption, encoder))
        size += embedded[-1].nbytes
        _check_bytes(board, "its text", size, "give fewer shots or shorter captions")
    return _own(board, [board.caption, *(shot.caption for shot in board.shots)], embedded, moc)


def _own(board: Storyboard, captions: list[str], embedded: list[np.ndarray], moc: MoCConfig) -> list[np.ndarray]:
    return own_texts(embedded, captions, [shot.continues for shot in board.shots], moc)


def _negative(board: Storyboard, usual: str, encoder: Encode, moc: MoCConfig) -> list[np.ndarray]:
    """The negative prompt in place of every caption; when it is empty, that is training's caption dropout."""
    prompt = usual if board.negative_prompt is None else board.negative_prompt
    embedded = _embed(board, "negative_prompt", prompt, encoder)
    size = embedded.nbytes * (1 + len(board.shots))
    _check_bytes(board, "its negative_prompt, once for each shot,", size, "shorten it or give fewer shots")
    captions = 1 + len(board.shots)
    return _own(board, [prompt] * captions, [embedded] * captions, moc)


def _embed(board: Storyboard, where: str, caption: str, encoder: Encode) -> np.ndarray:
    try:
        return encoder(caption)
    except ValueError as error:
        raise StoryboardError(f"{board.name}: {where}: {error}") from error


# ------------------------------------------------------------------------------------------------ latents


def _shot_latents(board: Storyboard, canvas: Canvas) -> list[Float32[np.ndarray, "_ Y X Z"]]:
    """The latents of each shot: zeros where they are to be sampled."""
    return of_each(board, lambda shot: _latents(shot, canvas))


def of_each[T](board: Storyboard, action: Callable[[Shot], T]) -> list[T]:
    """`action` of each shot, which its errors name."""
    found = []
    for s, shot in enumerate(board.shots):
        try:
            found.append(action(shot))
        except (VideoError, StoryboardError) as error:
            raise StoryboardError(f"{board.name}: shots[{s}]: {error}") from error
    return found


def _frames(shot: Shot, canvas: Canvas) -> int | None:
    frames, fps = canvas.frames(shot), canvas.data.fps
    if frames == 0:
        raise StoryboardError(
            f"seconds = {shot.seconds:g} is less than a frame at {fps:g} frames per second; the shortest shot is "
            f"{0.5 / fps:.3g} seconds"
        )
    return frames


def _latents(shot: Shot, canvas: Canvas) -> Float32[np.ndarray, "_ Y X Z"]:
    if shot.latents is not None:
        return shot.latents
    codec, patch, frames = canvas.codec, canvas.patch[0], _frames(shot, canvas)
    if shot.video is not None:
        return codec.encode(pixels_to_unit(pixels_of(shot, canvas)))
    if shot.image is None:
        if frames is None:
            raise StoryboardError("seconds is missing")
        return np.zeros((codec.latent_frames(frames), *canvas.latent_size, codec.channels), np.float32)
    image = pixels_to_unit(pixels_of(shot, canvas))
    if frames is None:
        still = codec.stride[0] * (patch - 1) + 1
        return codec.encode(np.repeat(image, still, axis=0))
    first = codec.encode(image)
    return np.pad(first, [(0, codec.latent_frames(frames) - 1), (0, 0), (0, 0), (0, 0)])


def pixels_of(shot: Shot, canvas: Canvas) -> UInt8[np.ndarray, "F Y X 3"]:
    """The frames of its video, or its picture; of an `image` that is a video, the first frame."""
    if shot.pixels is not None:
        return shot.pixels
    if shot.video is not None:
        return _given_video(shot.video, shot.seconds, _frames(shot, canvas), canvas)
    assert shot.image is not None
    _, _, image = next(decode(shot.image, canvas.data.height, canvas.data.width))
    return image[None]


def _condition(
    boards: Sequence[Sequence[Shot]], latents: Sequence[Sequence[np.ndarray]], canvas: Canvas, frames: int
) -> Float32[np.ndarray, "B {frames} Y X C"]:
    """As Wan 2.2 I2V reads it: a mask, 1 where frames are given, and latents of these, the rest of their shot grey; of
    shots of which nothing is given, zeros."""
    codec, stride = canvas.codec, canvas.codec.stride[0]

    def started(count: int, shot: Shot) -> Float32[np.ndarray, "{count} Y X Z"]:
        video = np.zeros((stride * (count - 1) + 1, canvas.data.height, canvas.data.width, 3), np.float32)
        video[:1] = pixels_to_unit(pixels_of(shot, canvas))
        return codec.encode(video)

    out = np.zeros((len(boards), frames, *canvas.latent_size, canvas.condition_channels), np.float32)
    for scene, shots, of_shots in zip(out, boards, latents):
        begin = 0
        for shot, known in zip(shots, of_shots):
            mine, begin = scene[begin : begin + len(known)], begin + len(known)
            if shot.is_given:
                mine[:] = condition_of(known, len(known), stride)
            elif shot.image is not None:
                mine[:] = condition_of(started(len(known), shot), 1, stride)
    return out


def _given_video(path: Path, seconds: float | None, frames: int | None, canvas: Canvas) -> UInt8[np.ndarray, "F Y X 3"]:
    data = canvas.data
    most = BYTE_LIMIT // (data.height * data.width * 3 * 4)
    if (frames or 0) > most:
        raise StoryboardError(f"{path} would give {frames:,} frames; the limit at this size is {most:,}")
    video = read_video(path, data.height, data.width, data.fps, most + 1 if frames is None else frames)
    if len(video) > most:
        raise StoryboardError(f"{path} has more than {most:,} frames, which is the limit; cut it off with `seconds`")
    if frames is not None and len(video) < frames:
        raise StoryboardError(
            f"{path} has {len(video)} frames at {data.fps:g} frames per second, but seconds = {seconds:g} asks for "
            f"{frames}; leave `seconds` out to take all of it"
        )
    used = crop_frames(len(video), canvas.codec.stride[0], canvas.patch[0])
    if not used:
        raise StoryboardError(f"{path} has too few frames ({len(video)} at {data.fps:g} frames per second)")
    return video[:used]
