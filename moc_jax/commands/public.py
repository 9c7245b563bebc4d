"""What `moc-sample` opens of a folder of public weights, before any device is touched."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax

from moc_jax.codecs import Codec, fit_codec
from moc_jax.commands.sample import configure
from moc_jax.commands.sample_arguments import Arguments
from moc_jax.config import Config, ConfigError
from moc_jax.errors import explain_memory
from moc_jax.sampling.generate import Sampler, SamplingError
from moc_jax.sampling.scenes import canvas_of, check_request
from moc_jax.sampling.storyboard import Storyboard
from moc_jax.sharding import Params
from moc_jax.showing import named
from moc_jax.text import TextEncoder, build_text_encoder
from moc_jax.weights import PublicWeights, WeightsError, load
from moc_jax.weights.adapters import merged, open_adapters
from moc_jax.weights.pipelines import open_pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """Weights, a run's or public ones, and what goes with them."""

    config: Config
    codec: Codec
    encoder: TextEncoder | None = None
    """None: what the config says."""
    load: Callable[[Sampler], Params]
    """Puts the weights on the mesh in context."""
    digest: str
    """Of the weights."""
    step: int = 0
    """After which a run saved them."""
    data: str = ""
    """The fingerprint of what a run trained them on."""


def open_public(args: Arguments, boards: Sequence[Storyboard]) -> Opened:
    """What is to be sampled with, and whether `boards` can be.

    Raises:
        WeightsError, ConfigError: something isn't there or not whole, or of something else; or a setting is impossible.
        StoryboardError: a caption is too long, or a duration impossible.
    """
    places = {"codec": args.codec or args.weights, "text": args.text_encoder or args.weights}
    found = open_pipeline(args.checkpoint, **places, tokenizer=args.tokenizer)
    config = configure(found.config, 1, args)
    with _noted("--codec names where the autoencoder lies"):
        codec = fit_codec(config.codec, ())
    with _noted("--text-encoder names where the text encoder lies, --tokenizer where its spiece.model does"):
        encoder = build_text_encoder(config.text)
    if not args.extend:  # else of the generation's settings, which may be others
        check_request(boards, canvas_of(config.data, codec, config.model, config.moc), config.sample, encoder)
    weights, digest = found.weights, found.weights.digest
    if args.lora:
        adapters = open_adapters(args.lora)
        weights, digest = merged(weights, adapters, args.lora_scale), adapters.digest(digest, args.lora_scale)
    dtype = "mixed" if config.model.dtype == "bfloat16" else "float32"
    print(f"{named(args.checkpoint)}: licence: {found.weights.licence}", flush=True)
    return Opened(
        config=config,
        codec=codec,
        encoder=encoder,
        load=lambda _: _placed(weights, dtype),
        digest=digest,
    )


@explain_memory("the weights", SamplingError, lambda weights: "Split them over more devices (--mesh.fsdp)")
def _placed(weights: PublicWeights, dtype: Literal["float32", "mixed"]) -> Params:
    """Split over the mesh in context by the rules of training."""
    return load(weights, jax.sharding.get_mesh(), dtype=dtype)


@contextlib.contextmanager
def _noted(fix: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, WeightsError) as error:
        error.add_note(fix)
        raise
