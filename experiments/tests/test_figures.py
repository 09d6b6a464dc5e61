import numpy as np
import pytest

from mdnorm import plotting
from mdnorm_experiments import continual, figures, synthetic
from mdnorm_experiments.data.synthetic import BOTH_LIMITS, EFFECT_LIMITS, make_synthetic
from mdnorm_experiments.methods import METHODS
from mdnorm_experiments.methods import panels as make_panels

NAMES = {"none": "No normalisation", "batchnorm": "BatchNorm", "mdn-last": "MDN, last layer"}
ONE_PANEL = {"": NAMES}


def rows(methods=NAMES, sizes=(20, 200), seeds=3):
    return [
        {
            "method": method,
            "batch_size": size,
            "seed": seed,
            "bacc": 0.8 + 0.01 * seed,
            "dcor2": {"A": 0.1 * seed, "B": 0.3},
            "seconds_per_epoch": 1.0,
        }
        for method in methods
        for size in sizes
        for seed in range(seeds)
    ]


def accuracy(rows, panels):
    return synthetic.accuracy_figure(rows, panels, synthetic.batch_axis(rows))


def dependence(rows, panels):
    return synthetic.dependence_figure(rows, panels, synthetic.batch_axis(rows))


def means(axis):
    return {
        c.get_label(): tuple(np.asarray(v, float) for v in c[0].get_data()[::-1]) for c in axis.containers
    }


def test_accuracy_shows_means_deviations_and_both_limits():
    axis = accuracy(rows(), ONE_PANEL).axes[0]
    for values, _ in means(axis).values():
        np.testing.assert_allclose(values, [81, 81])
    (bars,) = axis.containers[0].lines[2]
    segment = bars.get_segments()[0]
    np.testing.assert_allclose(segment[:, 1], [80, 82])
    horizontal = {round(line.get_ydata()[0], 2) for line in axis.lines if line.get_linestyle() == "--"}
    assert horizontal == {83.33, 94.44}
    assert [text.get_text() for text in axis.get_xticklabels()] == ["20", "200"]


def test_methods_stand_side_by_side():
    axis = accuracy(rows(), ONE_PANEL).axes[0]
    positions = [x[0] for _, x in means(axis).values()]
    assert len({round(x, 3) for x in positions}) == 3
    assert max(positions) - min(positions) < 0.8


def test_dependence_has_a_panel_a_group():
    axes = dependence(rows(), ONE_PANEL).axes
    assert [axis.get_title() for axis in axes] == ["Group A", "Group B"]
    np.testing.assert_allclose(means(axes[0])["BatchNorm"][0], [0.1, 0.1])
    np.testing.assert_allclose(means(axes[1])["BatchNorm"][0], [0.3, 0.3])


@pytest.mark.parametrize("draw", [accuracy, dependence])
def test_gaps_single_seeds_and_single_sizes(draw, tmp_path):
    incomplete = [*rows(["none"], (20,), 1), *rows(["mdn-last"], (200,), 2)]
    for table in (incomplete, rows(["mdn-last"], (200,), 1)):
        plotting.save_figure(draw(table, ONE_PANEL), tmp_path / "figure.png")
    assert means(draw(incomplete, ONE_PANEL).axes[0])["No normalisation"][1].tolist() == pytest.approx(
        [-0.175]
    )


def test_a_method_keeps_its_colour_whatever_is_beside_it():
    def colour(methods):
        axis = accuracy(rows(methods), ONE_PANEL).axes[0]
        return {c.get_label(): c[0].get_color() for c in axis.containers}["MDN, last layer"]

    assert colour(["mdn-last"]) == colour(NAMES)


def test_methods_of_a_panel_have_a_colour_and_a_marker_of_their_own():
    names = {name: method.title for name, method in METHODS.items() if method.in_table}
    panels = make_panels(names)
    assert sorted(name for group in panels.values() for name in group) == sorted(names)
    assert max(map(len, panels.values())) <= len(plotting.PALETTE) == len(set(plotting.PALETTE))
    assert len(plotting.PALETTE) == len(set(plotting.MARKERS))


@pytest.mark.parametrize("draw", [accuracy, dependence])
def test_panels_are_stacked_and_titled(draw, tmp_path):
    panels = {"Without": {"none": "No normalisation"}, "With": {"mdn-last": "MDN, last layer"}}
    figure = draw(rows(), panels)
    legends = [part.legends[0] for part in figure.subfigs]
    assert [legend.get_title().get_text() for legend in legends] == ["Without", "With"]
    assert [[text.get_text() for text in legend.get_texts()] for legend in legends] == [
        ["No normalisation"],
        ["MDN, last layer"],
    ]
    plotting.save_figure(figure, tmp_path / "figure.png")


def test_projection_separates_what_was_put_in(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    confounder = generator.normal(size=100)
    features = np.outer(confounder, [3.0, 0, 0]) + 0.01 * generator.normal(size=(100, 3))
    panel = {"features": features, "labels": labels, "confounder": confounder}
    figure = figures.projections({"one": panel, "two": panel})
    offsets = figure.axes[0].collections[0].get_offsets()
    assert len(offsets) == 50
    assert abs(np.corrcoef(offsets[:, 0], confounder[:50])[0, 1]) > 0.999
    assert "100.00 %" in figure.axes[0].get_xlabel()
    plotting.save_figure(figure, tmp_path / "projection.png")


def test_files_are_png_and_pdf_and_the_same_each_time(tmp_path):
    data = make_synthetic(4)
    path = plotting.save_figure(synthetic.example_images(data), tmp_path / "examples.png")
    first = [path.read_bytes(), path.with_suffix(".pdf").read_bytes()]
    assert first[0].startswith(b"\x89PNG")
    assert first[1].startswith(b"%PDF")
    assert len(first[0]) > 10_000
    plotting.save_figure(synthetic.example_images(data), path)
    assert [path.read_bytes(), path.with_suffix(".pdf").read_bytes()] == first
    assert len(list(tmp_path.iterdir())) == 2


def test_fewer_images_than_asked_for():
    figure = synthetic.example_images(make_synthetic(2), count=4)
    assert sum(bool(axis.images) for axis in figure.axes) == 4


def stage_rows(methods=NAMES, seeds=3):
    """Accuracy 0.5 + 0.05 j + 0.01 seed + 0.1 (i − j) on stage j after stage i, so that diagonals matter."""
    i, j = np.indices((5, 5))
    return [
        {
            "method": method,
            "seed": seed,
            "bacc_matrix": (0.5 + 0.05 * j + 0.01 * seed + 0.1 * (i - j)).tolist(),
            "dcor2_matrix": {
                group: (base + 0.01 * j + 0.1 * (i - j)).tolist() for group, base in (("A", 0), ("B", 0.3))
            },
        }
        for method in methods
        for seed in range(seeds)
    ]


LOWER = (0.75, 0.7, 0.65, 0.6, 0.5)


def test_accuracy_by_stage_shows_the_diagonal_and_both_limits():
    axis = synthetic.accuracy_figure(stage_rows(), ONE_PANEL, continual.stage_axis()).axes[0]
    for values, _ in means(axis).values():
        np.testing.assert_allclose(values, [51, 56, 61, 66, 71])
    (bars,) = axis.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [50, 52])
    dashed = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(dashed, 100 * np.array([BOTH_LIMITS, EFFECT_LIMITS]))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "3", "4", "5"]
    assert axis.containers[0][0].get_linestyle() == "-"


def test_dependence_by_stage_has_a_panel_a_group():
    axes = synthetic.dependence_figure(stage_rows(), ONE_PANEL, continual.stage_axis()).axes
    assert [axis.get_title() for axis in axes] == ["Group A", "Group B"]
    np.testing.assert_allclose(means(axes[0])["BatchNorm"][0], [0, 0.01, 0.02, 0.03, 0.04])
    np.testing.assert_allclose(means(axes[1])["BatchNorm"][0], [0.3, 0.31, 0.32, 0.33, 0.34])


def test_stage_figures_with_one_seed_a_missing_method_and_panels(tmp_path):
    panels = {"Without": {"none": "No normalisation"}, "With": {"mdn-last": "MDN", "mdn-every": "not run"}}
    rows_of_one = stage_rows(["none", "mdn-last"], seeds=1)
    for figure in (
        synthetic.accuracy_figure(rows_of_one, panels, continual.stage_axis()),
        synthetic.dependence_figure(rows_of_one, panels, continual.stage_axis()),
    ):
        assert [part.legends[0].get_title().get_text() for part in figure.subfigs] == ["Without", "With"]
        plotting.save_figure(figure, tmp_path / "figure.png")


@pytest.mark.parametrize("count", [1, 3, 4])
def test_matrices_show_the_mean_difference_from_the_limit(count, tmp_path):
    values = [row["bacc_matrix"] for row in stage_rows(["none"])]
    figure = figures.stage_matrices({f"Method {index}": values for index in range(count)}, LOWER)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == [f"Method {index}" for index in range(count)]
    for axis in maps:
        texts = [text.get_text() for text in axis.texts]
        # Trained on 1: 51 − 75 on stage 1, 46 − 70 on stage 2; trained on 5: 71 − 50 on stage 5.
        assert texts[:2] == ["−24", "−24"]
        assert texts[-1] == "+21"
        assert [text.get_fontweight() for text in axis.texts].count("bold") == 5
    plotting.save_figure(figure, tmp_path / "figure.png")


def test_a_difference_that_rounds_to_zero_has_no_sign():
    texts = figures.stage_matrices({"": [[[0.7499, 0.706], [0.751, 0.7]]]}, (0.75, 0.7)).axes[0].texts
    assert [text.get_text() for text in texts] == ["0", "+1", "0", "0"]


def test_example_images_with_column_titles(tmp_path):
    figure = synthetic.example_images(make_synthetic(2), 2, ["first", "second"])
    assert figure.axes[0].get_title().startswith("first\n\neffect ")
    assert figure.axes[2].get_title().startswith("effect ")
    plotting.save_figure(figure, tmp_path / "figure.png")
