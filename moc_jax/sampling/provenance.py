"""What a video says about how it was made."""

import dataclasses

import moc_jax
from moc_jax.config import MoCConfig, SampleConfig
from moc_jax.provenance import Provenance
from moc_jax.sampling.storyboard import Storyboard, storyboard_digest


def provenance_of(
    board: Storyboard, cfg: SampleConfig, moc: MoCConfig, *, weights: str, step: int = 0, digest: str = ""
) -> Provenance:
    """What will have made a sample of `board`; to be asked before it is sampled, while all files are there.

    Args:
        weights: their `digest.weights_digest`.
        step: after which they were saved, if a run of this package did.
        digest: `storyboard_digest`, if it was taken before; empty: it is taken now.

    Raises:
        StoryboardError: a file that the storyboard names can't be read.
    """
    return Provenance(
        version=moc_jax.__version__,
        weights=weights,
        step=step,
        storyboard=digest or storyboard_digest(board),
        seed=cfg.seed if board.seed is None else board.seed,
        settings={"sample": dataclasses.asdict(cfg), "moc": dataclasses.asdict(moc)},
        partly_given=any(shot.video or (shot.image and not shot.is_reference) for shot in board.shots),
    )
