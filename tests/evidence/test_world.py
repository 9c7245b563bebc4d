"""The rendered world: the same for the same seed, told apart by looks alone, and never to be had by copying."""

import dataclasses

import numpy as np
import pytest

from evidence.dataset import fit
from evidence.measures import drawn, dynamic_degree, psnr
from evidence.stories import CANDIDATES
from evidence.world import NAMES, World, distinct_looks
from moc_jax.codecs import pixels_from_unit, pixels_to_unit
from moc_jax.config import PcaConfig
from tests.evidence.made import check_identified

WORLD = World(shots=12, frames=5, characters=4, places=3)


def test_a_story_is_a_function_of_its_seed():
    again = World(shots=12, frames=5, characters=4, places=3)
    again.story(1)  # whatever else was drawn before
    assert (WORLD.story(7).render() == again.story(7).render()).all()
    others = [WORLD.story(8), dataclasses.replace(WORLD, split=1).story(7)]
    assert all((other.render() != WORLD.story(7).render()).mean() > 0.5 for other in others)


@pytest.mark.parametrize("seed", range(5))
def test_every_character_is_revealed_once_and_recalled_once(seed):
    story = WORLD.story(seed)
    who = [shot.character for shot in story.shots]
    assert sorted(who[:4]) == [0, 1, 2, 3] == sorted(w for w in who[4:] if w is not None)
    assert [(who[recall], who[reveal], reveal < 4 <= recall) for recall, reveal in story.recalls] == [
        (w, w, True) for w in who[4:] if w is not None
    ]
    assert len({gap for s in range(40) for gap in (a - b for a, b in WORLD.story(s).recalls)}) == 11  # 1..11


def test_names_say_nothing_about_looks():
    """Over many stories, the first name's color has no mean of its own."""
    by_name = {name: [] for name in NAMES}
    for seed in range(160):
        story = WORLD.story(seed)
        for shot in story.shots[:4]:
            by_name[shot.caption.split()[0]].append(story.looks[shot.character].colors[0])
    for colors in map(np.array, by_name.values()):
        assert len(colors) > 50
        assert (np.abs(colors.mean(0) - 0.5) < 4 * colors.std(0) / np.sqrt(len(colors))).all()


def test_captions_say_who_is_where_and_not_how_anybody_looks():
    story = WORLD.story(3)
    other = dataclasses.replace(story, looks=WORLD.story(4).looks)
    assert [shot.caption for shot in story.shots] == [shot.caption for shot in other.shots]
    empty = [shot for shot in story.shots if shot.character is None]
    assert empty
    assert all(shot.caption.startswith("Nobody is in the ") for shot in empty)


def test_in_a_still_world_a_recall_differs_from_its_reveal_by_the_place_alone():
    story = dataclasses.replace(WORLD, still=True).story(1)
    for recall, reveal in story.recalls:
        frames, before = story.render_shot(recall), story.render_shot(reveal)
        assert (frames == frames[:1]).all()
        assert story.shots[recall].caption == story.shots[reveal].caption
        assert (frames[:, 28:37, 28:37] == before[:, 28:37, 28:37]).all()  # inside of any outline
    assert all(shot.caption.rstrip(".") in (*NAMES, "Nobody") for shot in story.shots)


def test_a_mixed_world_has_shots_of_both_kinds():
    mixed, in_words = (dataclasses.replace(WORLD, mixed=told) for told in ("names", "words"))
    shares = []
    for seed in range(60):
        story, other = mixed.story(seed), WORLD.story(seed)
        assert story.looks[0].colors.tolist() == other.looks[0].colors.tolist()  # of the same cast and places
        shares.append(np.mean([shot.still for shot in story.shots]))
        for shot in story.shots:
            assert shot.still == (not np.ptp(shot.camera, axis=0).any())
            assert shot.still == (shot.caption.rstrip(".") in (*NAMES, "Nobody"))
        for shot, named in zip(in_words.story(seed).shots, story.shots):
            assert len(shot.caption.split()) == (11 if shot.character is None else 14)
            assert ("stands still." in shot.caption) == shot.still == named.still
            assert (shot.path == named.path).all()
        assert mixed.text_tokens == WORLD.text_tokens
    assert 0.35 < np.mean(shares) < 0.65
    assert min(shares) < 0.2 < 0.8 < max(shares)
    assert not mixed.recolorable
    with pytest.raises(ValueError, match="still and mixed: choose one"):
        dataclasses.replace(mixed, still=True)
    with pytest.raises(ValueError, match="mixed is 'word'; choose 'names', 'words'"):
        dataclasses.replace(mixed, mixed="word")


def test_only_the_box_changes_with_the_look():
    other = WORLD.story(1).looks[0]
    for story in map(dataclasses.replace(WORLD, frames=15).story, range(2, 12)):
        for index, shot in enumerate(story.shots):
            changed = (story.render_shot(index) != story.render_shot(index, other)).any(-1)
            assert not (changed & ~shot.box).any()
            assert (changed[shot.box].mean() > 0.15) == (shot.character is not None)


def test_a_recall_is_no_copy_of_its_reveal():
    for seed in range(10):
        story = WORLD.story(seed)
        for recall, reveal in story.recalls:
            frames, before = story.render_shot(recall), story.render_shot(reveal)
            everywhere = np.ones(frames.shape[:3], bool)
            assert max(psnr(frames, before[[f] * len(frames)], everywhere) for f in range(len(before))) < 26


def test_frames_move():
    assert all(dynamic_degree(WORLD.story(s).render_shot(0)) > 0.002 for s in range(20))
    assert dynamic_degree(WORLD.story(0).render_shot(0)[[0, 0, 0]]) == 0


def test_the_truth_is_identified_and_others_are_not():
    check_identified(WORLD, 5)


def test_without_memory_every_candidate_is_as_likely():
    """Of all candidates the one nearest to gray is a character's as often as chance says."""
    found = []
    for seed in range(600):
        colors = np.array([look.colors[0] for look in distinct_looks(np.random.default_rng(seed))])
        found.append(int(np.argmin(((colors - 0.5) ** 2).sum(1))) < 4)
        apart = np.linalg.norm(colors[:, None] - colors, axis=2)
        assert apart[~np.eye(CANDIDATES, dtype=bool)].min() > 0.3
    assert abs(np.mean(found) - 4 / CANDIDATES) < 3 * np.sqrt(0.25 * 0.75 / 600)


def test_large_frames_show_more_of_the_place_and_characters_everywhere():
    large = dataclasses.replace(WORLD, size=160, frames=41)
    seen = np.zeros((160, 160), bool)
    for seed in range(4):
        story = large.story(seed)
        assert [shot.caption for shot in story.shots] == [shot.caption for shot in WORLD.story(seed).shots]
        recall, _ = story.recalls[0]
        frames, other = story.render_shot(recall), story.render_shot(recall, story.strangers[0])
        changed, box = (frames != other).any(-1), story.shots[recall].box
        assert frames.shape == (41, 160, 160, 3)
        assert not (changed & ~box).any()
        assert (box.sum((1, 2)) >= 28**2).all()  # whole in every frame
    for seed in range(8):
        seen |= np.any([shot.box.any(0) for shot in large.story(seed).shots], axis=0)
    assert min(seen.any(0).mean(), seen.any(1).mean()) > 0.95  # from edge to edge, by nine ways
    assert seen.mean() > 0.7


def test_looks_are_those_of_the_whole_frames_reconstruction():
    codec = fit(WORLD, PcaConfig(channels=8), 4)

    def reconstruct(frames):
        return pixels_from_unit(codec.decode(codec.encode(pixels_to_unit(frames))))

    story = dataclasses.replace(WORLD, size=200).story(0)
    shot = story.recalls[0][0]
    found = drawn(story, shot, story.looks[:2], reconstruct)
    for look, pixels in zip(story.looks, found):
        whole = reconstruct(story.render_shot(shot, look))[story.shots[shot].box]
        assert np.abs(whole.astype(int) - pixels).max() <= 1  # rounded apart


def test_what_no_world_can_be_is_refused():
    with pytest.raises(ValueError, match=r"7 characters in 12 shots: each needs a reveal and a recall.*try 6"):
        World(shots=12, characters=7)
    with pytest.raises(ValueError, match=r"9 places; choose 1\.\.8"):
        World(places=9)
    with pytest.raises(ValueError, match=r"16 frames; choose 1\.\.15"):
        World(frames=16)
    with pytest.raises(ValueError, match=r"61 frames; choose 1\.\.60"):
        World(frames=61, size=128)
    with pytest.raises(ValueError, match=r"frames of 56 pixels; choose 64 or more"):
        World(size=56)
