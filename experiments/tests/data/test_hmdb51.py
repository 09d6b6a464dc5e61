"""The loader of HMDB51's layout, on small real files, whole and broken."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from mdnorm_experiments.data.actions import ACTIONS, SCENES, encode, make_clips, write_hmdb51
from mdnorm_experiments.data.hmdb51 import decode, load_hmdb51
from mdnorm_experiments.data.reading import DataProblemsError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_hmdb51(
        tmp_path_factory.mktemp("hmdb51") / "whole", make_clips(12, seed=0), make_clips(6, seed=1)
    )


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def clip_names(folder):
    return sorted(path.name for path in (folder / "hmdb51_org").glob("*/*"))


def test_a_whole_folder(folder):
    found = load_hmdb51(folder)
    assert found.clips.shape == (18, 3, 8, 32, 32)
    assert found.clips.dtype == torch.uint8
    assert found.is_test.sum() == 6
    assert found.scenes == SCENES
    assert not found.problems
    assert [name.split("_")[0] for name in found.names] == [found.classes[label] for label in found.labels]
    drawn = make_clips(12, seed=0)
    for row, name in enumerate(found.names):
        if "_train_" in name:
            index = int(name[-9:-4])
            assert torch.allclose(found.scores[row], torch.from_numpy(drawn.scores[index]), atol=1e-5)
            pixels = found.clips[row].permute(1, 2, 3, 0).numpy().astype(float)
            assert np.abs(pixels - drawn.frames[index]).mean() < 16


def test_other_sizes_and_a_parquet_table(folder):
    pd.read_csv(folder / "scene_scores.csv").to_parquet(folder / "scores.parquet")
    found = load_hmdb51(folder, folder / "scores.parquet", num_frames=5, image_size=24)
    assert found.clips.shape == (18, 3, 5, 24, 24)
    assert torch.equal(found.scores, load_hmdb51(folder).scores)


def test_clips_that_a_split_leaves_out(folder):
    path = folder / "testTrainMulti_7030_splits" / "jump_test_split1.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace(" 1", " 0"), *lines[1:]]))
    assert len(load_hmdb51(folder).names) == 17


def break_everything(folder):
    names = clip_names(folder)
    files = {path.name: path for path in (folder / "hmdb51_org").glob("*/*")}
    files[names[0]].unlink()
    whole = files[names[1]].read_bytes()
    files[names[1]].write_bytes(whole[: len(whole) // 2])
    files[names[2]].write_bytes(b"")
    shutil.copy(files[names[3]], files[names[3]].with_name("unknown.mp4"))
    table = pd.read_csv(folder / "scene_scores.csv").set_index("clip")
    table = table.drop(names[4])
    table.loc[names[5], "beach"] = np.nan
    table = pd.concat([table, table.loc[[names[6]]]])
    table.to_csv(folder / "scene_scores.csv")
    path = next((folder / "testTrainMulti_7030_splits").glob("wave_*"))
    path.write_text(path.read_text() + "nonsense\n" + path.read_text().splitlines()[0] + "\n")
    return names


def test_all_problems_are_told_at_once(folder):
    names = break_everything(folder)
    with pytest.raises(DataProblemsError) as error:
        load_hmdb51(folder)
    text = str(error.value)
    for kind, subject in (
        ("no clip", names[0]),
        ("unreadable clip", names[1]),
        ("unreadable clip", names[2]),
        ("clip in no split", "unknown.mp4"),
        ("no scores", names[4]),
        ("bad scores", names[5]),
        ("duplicate scores", names[6]),
        ("bad split line", "wave_test_split1.txt"),
        ("duplicate clip", ""),
    ):
        assert any(kind in line and subject in line for line in text.splitlines()), (kind, subject, text)


def test_what_is_skipped_is_said(folder):
    names = break_everything(folder)
    found = load_hmdb51(folder, on_problem="skip")
    left_out = {names[index] for index in (0, 1, 2, 4, 5, 6)}
    assert set(found.names) == set(clip_names(folder)) - left_out - {"unknown.mp4"}
    assert len(found.problems.found) == 9
    assert torch.isfinite(found.scores).all()


def test_absent_parts_say_what_to_get(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"Serre Lab"):
        load_hmdb51(tmp_path / "nothing")
    (folder / "scene_scores.csv").unlink()
    with pytest.raises(FileNotFoundError, match="Places365"):
        load_hmdb51(folder)


def test_bad_tables(folder):
    (folder / "scene_scores.csv").write_text("name,beach,sea\nx,1,0\n")
    with pytest.raises(ValueError, match="no column for the clip"):
        load_hmdb51(folder)


def test_a_clip_in_the_folder_of_another_class_is_not_taken(folder):
    name = next(name for name in clip_names(folder) if name.startswith("jump"))
    clips = folder / "hmdb51_org"
    (clips / "jump" / name).rename(clips / "wave" / name)
    with pytest.raises(DataProblemsError) as error:
        load_hmdb51(folder)
    assert f"no clip: {name}: not in {clips / 'jump'}" in str(error.value)
    assert f"clip in no split: {name}: {clips / 'wave' / name}" in str(error.value)
    assert name not in load_hmdb51(folder, on_problem="skip").names


def test_a_folder_of_test_clips_only(tmp_path):
    clips = make_clips(9, seed=5)
    found = load_hmdb51(write_hmdb51(tmp_path / "hmdb51", None, clips))
    assert bool(found.is_test.all())
    names = [f"{ACTIONS[label]}_test_{row:05d}.mp4" for row, label in enumerate(clips.labels)]
    assert found.names == tuple(sorted(names))


def test_there_are_three_splits(folder):
    with pytest.raises(ValueError, match="split must be 1, 2 or 3, got 4"):
        load_hmdb51(folder, split=4)


def test_a_damaged_table_of_scores_is_named(folder):
    (folder / "scene_scores.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"scene_scores\.parquet cannot be read as a table of scene scores"):
        load_hmdb51(folder)


def test_one_class_is_too_few(folder):
    for action in ("jump", "wave"):
        shutil.rmtree(folder / "hmdb51_org" / action)
        (folder / "testTrainMulti_7030_splits" / f"{action}_test_split1.txt").unlink()
    with pytest.raises(ValueError, match="two classes"):
        load_hmdb51(folder)


class TestDecode:
    def test_short_clips_repeat_and_wide_ones_are_cropped(self, tmp_path):
        frames = np.zeros((3, 32, 64, 3), np.uint8)
        frames[:, :, 16:48] = 200
        decoded = decode(encode(frames, tmp_path / "wide.mp4"), 6, 32)
        assert decoded.shape == (6, 32, 32, 3)
        assert np.abs(decoded.astype(float) - 200).mean() < 6

    def test_each_pixel_is_in_one_mean_where_sizes_do_not_divide(self, tmp_path):
        drawn = np.random.default_rng(0).integers(0, 256, (2, 50, 50, 3), np.uint8)
        path = encode(drawn, tmp_path / "noise.mp4")
        # In float64: a pixel belongs to the one of 32 cells, open to the left, in which its centre lies.
        cells = np.ceil((np.arange(50) + 0.5) * 32 / 50) - 1
        member = cells == np.arange(32)[:, None]
        shares = member / member.sum(1, keepdims=True)
        expected = np.einsum("yh,thwc,xw->tyxc", shares, decode(path, 2, 50).astype(float), shares)
        # Pillow rounds after each of two passes.
        assert np.abs(decode(path, 2, 32) - expected).max() <= 1

    def test_no_video(self, tmp_path):
        (tmp_path / "text.mp4").write_text("no video at all")
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode(tmp_path / "text.mp4", 8, 32)
