"""Which tensors files of Wan's autoencoders hold: diffusers' names and the Wan team's, shapes, and the order of axes.

The team numbers the layers of nested sequences, diffusers names them; both are made side by side here, so nothing is
renamed twice. ComfyUI has the team's names.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from moc_jax.codecs.wan_vae.network import BLOCKS, MULTIPLIERS, TIME, Sizes, down_names, up_names
from moc_jax.codecs.wan_vae.published import CLASS, DEVIATIONS, MEANS
from moc_jax.config import ConfigError
from moc_jax.showing import Shapes, contradictions, shown
from moc_jax.tensor_files.beside import Wanted

_IN_BLOCK = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
_LAST = len(MULTIPLIERS) - 1
_DOWN, _UP, _MIDDLE = "encoder.downsamples", "decoder.upsamples", "middle"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file."""

    names: tuple[str, str]  # diffusers', and the Wan team's
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The weight's own."""
        return self.names[0]

    def of_file(self, tensor: np.ndarray) -> np.ndarray:
        """As the layers have it: outputs last, before them inputs, frame by frame; of single positions, matrices."""
        if len(self.shape) == 1 or self.name.endswith("gamma"):
            return tensor.reshape(-1)
        frames = tensor.reshape(*tensor.shape[:2], -1, *tensor.shape[-2:])  # [out, in, t, y, x]
        kernel = frames.transpose(3, 4, 2, 1, 0).reshape(*tensor.shape[-2:], -1, len(tensor))
        return kernel[0, 0] if kernel.shape[:2] == (1, 1) else kernel


def tensors(sizes: Sizes) -> Iterator[Tensor]:
    """All of an autoencoder's."""
    z, pixels = sizes.channels, 3 * sizes.pixels**2
    yield from _conv(("quant_conv", "conv1"), 2 * z, 2 * z, 1, 1, 1)
    yield from _conv(("post_quant_conv", "conv2"), z, z, 1, 1, 1)
    yield from _ends("encoder", pixels, sizes.encoder, sizes.encoder * MULTIPLIERS[-1], 2 * z)
    for level, (a, b) in enumerate(sizes.down):
        blocks, step = down_names(sizes, level)
        yield from _level(blocks, _numbered(sizes, _DOWN, level, BLOCKS), a, b)
        if level < _LAST:
            names = step, _numbered(sizes, _DOWN, level, BLOCKS)[-1]
            yield from _step(names, b, b, b if TIME[level] else 0)
    yield from _ends("decoder", z, sizes.decoder * MULTIPLIERS[-1], sizes.decoder, pixels)
    for level, (a, b) in enumerate(sizes.up):
        blocks, step = up_names(sizes, level)
        yield from _level(blocks, _numbered(sizes, _UP, level, BLOCKS + 1), a, b)
        if level < _LAST:
            names = step, _numbered(sizes, _UP, level, BLOCKS + 1)[-1]
            yield from _step(names, b, b if sizes.shortcuts else b // 2, 2 * b if TIME[_LAST - 1 - level] else 0)


def _numbered(sizes: Sizes, side: str, level: int, blocks: int) -> list[str]:
    """The team's names of a level's blocks and of the step after them: in a sequence of their own, or one of all."""
    if sizes.shortcuts:
        return [f"{side}.{level}.{side.split('.')[1]}.{i}" for i in range(blocks + 1)]
    return [f"{side}.{level * (blocks + 1) + i}" for i in range(blocks + 1)]


def _ends(side: str, given: int, first: int, last: int, out: int) -> Iterator[Tensor]:
    """What lies around the levels; the middle is where pictures are smallest."""
    yield from _conv((f"{side}.conv_in", f"{side}.conv1"), given, first, 3, 3, 3)
    c = first if side == "decoder" else last
    for i, number in enumerate((0, 2)):
        yield from _block((f"{side}.mid_block.resnets.{i}", f"{side}.{_MIDDLE}.{number}"), c, c)
    names = f"{side}.mid_block.attentions.0", f"{side}.{_MIDDLE}.1"
    yield Tensor(_ended(names, "norm.gamma"), (c, 1, 1))
    yield from _conv(_ended(names, "to_qkv"), c, 3 * c, 1, 1)
    yield from _conv(_ended(names, "proj"), c, c, 1, 1)
    yield Tensor((f"{side}.norm_out.gamma", f"{side}.head.0.gamma"), (last, 1, 1, 1))
    yield from _conv((f"{side}.conv_out", f"{side}.head.2"), last, out, 3, 3, 3)


def _level(diffusers: list[str], original: list[str], a: int, b: int) -> Iterator[Tensor]:
    for i, names in enumerate(zip(diffusers, original)):
        yield from _block(names, b if i else a, b)


def _block(names: tuple[str, str], a: int, b: int) -> Iterator[Tensor]:
    for (ours, theirs), width in zip(_IN_BLOCK.items(), (a, a, b, b)):
        of = f"{names[0]}.{ours}", f"{names[1]}.{theirs}"
        if ours.startswith("norm"):
            yield Tensor(_ended(of, "gamma"), (width, 1, 1, 1))
        else:
            yield from _conv(of, width, b, 3, 3, 3)
    if a != b:
        yield from _conv((f"{names[0]}.conv_shortcut", f"{names[1]}.shortcut"), a, b, 1, 1, 1)


def _step(names: tuple[str, str], a: int, b: int, time: int) -> Iterator[Tensor]:
    """To the next level; `time`: channels that its convolution in time gives, 0: it has none."""
    yield from _conv(_ended(names, "resample.1"), a, b, 3, 3)
    if time:
        yield from _conv(_ended(names, "time_conv"), a, time, 3, 1, 1)


def _conv(names: tuple[str, str], a: int, b: int, *kernel: int) -> Iterator[Tensor]:
    yield Tensor(_ended(names, "weight"), (b, a, *kernel))
    yield Tensor(_ended(names, "bias"), (b,))


def _ended(names: tuple[str, str], end: str) -> tuple[str, str]:
    return f"{names[0]}.{end}", f"{names[1]}.{end}"


def recognised(
    shapes: Shapes, settings: Mapping[str, object], where: str
) -> tuple[tuple[Sizes, int], Wanted, list[str]]:
    """The autoencoder that some tensors are of, and which of their names they have: 0, diffusers', or 1; then what its
    file must hold, and what its config.json says of it that isn't so. What lies beside the Wan team's file is of the
    transformer.

    Raises:
        ConfigError: they are of something else.
    """
    spelling = 0 if "post_quant_conv.bias" in shapes else 1
    telling = (
        ("post_quant_conv.bias", "encoder.conv_in.bias", "decoder.norm_out.gamma"),
        ("conv2.bias", "encoder.conv1.bias", "decoder.head.0.gamma"),
    )[spelling]
    if spelling:
        settings = {}  # of what lies beside it
    if (kind := settings.get("_class_name", CLASS)) != CLASS:
        raise ConfigError(f"{where}: its config.json says that it is a {shown(kind)}; supported is {CLASS} alone")
    found = [shapes.get(name, ()) for name in telling]
    if not all(found):
        few = ", ".join(sorted(shapes)[:3])
        raise ConfigError(f"{where} isn't an autoencoder of Wan: its {len(shapes)} tensors are others (it has {few})")
    shortcuts = any(name.startswith(("encoder.down_blocks.0.resnets.", f"{_DOWN}.0.downsamples.")) for name in shapes)
    sizes = Sizes(*(shape[0] for shape in found), shortcuts=shortcuts)
    wanted = {tensor.names[spelling]: (tensor.name, tensor.shape) for tensor in tensors(sizes)}
    said = {"z_dim": sizes.channels, "base_dim": sizes.encoder, "decoder_base_dim": sizes.decoder}
    return (sizes, spelling), wanted, contradictions(settings, said) + _normalised_otherwise(sizes, settings)


def _normalised_otherwise(sizes: Sizes, settings: Mapping[str, object]) -> list[str]:
    problems = []
    for name, of in (("latents_mean", MEANS), ("latents_std", DEVIATIONS)):
        said, ours = settings.get(name), of[sizes.version].tolist()
        numbers = said if isinstance(said, list) and all(isinstance(x, int | float) for x in said) else []
        alike = len(numbers) == len(ours) and all(b - 5e-5 < a < b + 5e-5 for a, b in zip(numbers, ours))
        if said is not None and not alike:
            theirs = f"that of Wan's {sizes.version} is {shown([round(x, 4) for x in ours])}, and no other is supported"
            problems.append(f"its config.json says {name} {shown(said)}; {theirs}")
    return problems
