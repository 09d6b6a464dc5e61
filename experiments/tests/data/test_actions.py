"""Drawn clips: what tells the label, what goes with it, and that real video files hold what was drawn."""

from __future__ import annotations

import numpy as np
import pytest

from mdnorm_experiments.data.actions import ACTIONS, LABEL_NOISE, SCENES, encode, make_clips
from mdnorm_experiments.data.hmdb51 import decode


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_file_holds_what_was_drawn(tmp_path, suffix):
    clips = make_clips(3, seed=4)
    for frames in clips.frames:
        decoded = decode(encode(frames, tmp_path / f"clip{suffix}"), 8, 32)
        assert decoded.shape == (8, 32, 32, 3)
        error = np.abs(decoded.astype(float) - frames)
        # Colour has half the resolution in the file; brightness must be near.
        assert np.abs(decoded.mean(3) - frames.mean(3)).mean() < 8
        assert error.mean() < 16
        # Every frame is nearest to itself: the movement is there, in order.
        distance = np.abs(decoded.astype(float)[:, None] - frames.astype(float)[None]).mean((2, 3, 4))
        assert (distance.argmin(1) == np.arange(8)).mean() >= 0.75


def test_shapes_and_the_seed():
    first, again, other = (make_clips(7, seed=seed) for seed in (1, 1, 2))
    assert first.frames.shape == (7, 8, 32, 32, 3)
    assert first.frames.dtype == np.uint8
    assert len(first.labels) == 7
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)
    assert np.allclose(first.scores.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("correlation", [0.0, 0.6, 1.0])
def test_scenes_go_with_labels_as_asked(correlation):
    clips = make_clips(1500, seed=0, correlation=correlation, image_size=16)
    own = (clips.scenes // 2 == clips.labels).mean()
    assert own == pytest.approx(correlation + (1 - correlation) / 3, abs=0.04)
    shown = np.arange(len(clips.labels)) % len(ACTIONS)
    assert (shown != clips.labels).mean() == pytest.approx(LABEL_NOISE, abs=0.025)
    # The scores are mostly, not always, on the clip's own scene.
    assert 0.9 < (clips.scores.argmax(1) == clips.scenes).mean() < 1
    # The scene follows the label and nothing else: among clips of a label, not the action shown.
    if correlation:
        wrong = shown != clips.labels
        assert (clips.scenes[wrong] // 2 == clips.labels[wrong]).mean() >= correlation


def test_single_frames_of_all_actions_have_the_same_scenes_when_shuffled():
    clips = make_clips(1800, seed=3, correlation=0.0, image_size=16)
    counts = np.array([np.bincount(clips.scenes[clips.labels == label], minlength=6) for label in range(3)])
    # 100 expected in each cell; four standard deviations either way.
    assert counts.min() > 60
    assert counts.max() < 140
    assert len(SCENES) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"size": 3, "image_size": 17}, "even number"),
        ({"size": 3, "image_size": 8}, "even number"),
        ({"size": 3, "correlation": 1.2}, "correlation"),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        make_clips(seed=0, **options)


def test_only_frames_are_encoded(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        encode(np.zeros((4, 16, 16, 3)), tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="frames must be"):
        encode(np.zeros((4, 16, 16), np.uint8), tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())
