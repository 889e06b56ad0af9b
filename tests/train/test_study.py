import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console
from tiny_training import one_thread, settings

from shaped_attn import plots
from shaped_attn.commands.train import study_table
from shaped_attn.nn import METHODS
from shaped_attn.plots.study import plot_study
from shaped_attn.train import study, trainer
from shaped_attn.train.study import Study, StudyRun, Variant, run_study, variants
from shaped_attn.train.trainer import TrainResult

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = settings(
    steps=4,
    warmup_steps=0,
    evaluate_every=2,
    evaluation_windows=4,
    checkpoint_every=2,
    has_skip=False,
    has_normalization=False,
)


def run(output, **options):
    options = {"depths": (1, 2), "methods": ("pre_ln", "e_spa"), **options}
    return run_study(TINY, output, device="cpu", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of 2 depths and 2 methods, and its folder."""
    output = tmp_path_factory.mktemp("study") / "out"
    with one_thread():
        return run(output), output


def names(found):
    return [(run.depth, run.variant.method) for run in found.runs]


def losses(found):
    return [run.result.validation for run in found.runs]


def test_every_model_is_trained_for_the_same_steps(whole):
    found, output = whole
    assert names(found) == [(1, "pre_ln"), (1, "e_spa"), (2, "pre_ln"), (2, "e_spa")]
    assert found.is_complete
    for one in found.runs:
        assert (one.result.status, one.result.step) == ("finished", 4)
        assert [step for step, _ in one.result.validation] == [0, 2, 4]
    assert len(set(losses(found))) == 4
    # A run of its own has the same losses.
    alone = replace(TINY, method="e_spa", depth=2)
    assert trainer.train(alone, output / "alone", device="cpu").validation == losses(found)[3]


def test_the_results_are_written_and_checkpoints_removed(whole):
    found, output = whole
    written = json.loads((output / "study.json").read_text())
    assert written == json.loads(json.dumps(found.to_dict()))
    assert written["is_complete"] is True
    assert written["settings"] == TINY.to_dict()
    assert written["data"]["train_bytes"] + written["data"]["validation_bytes"] == 50_000
    for row, one in zip(written["runs"], found.runs, strict=True):
        assert row["method"] == one.variant.method
        assert row["loss"] == one.result.validation[-1][1]
        assert (row["skip"], row["normalization"]) == (False, False)
    folders = sorted(path.name for path in (output / "runs").iterdir())
    assert folders == sorted(
        f"{method}-no-skip-no-norm-depth-{depth}-lr-0.001"
        for method in ("pre_ln", "e_spa")
        for depth in (1, 2)
    )
    for folder in (output / "runs").iterdir():
        assert not (folder / "checkpoints").exists()
        assert not (folder / "model.safetensors").exists()
        assert (folder / "metrics.jsonl").exists()


def test_an_interrupted_study_goes_on_without_repeating_runs(tmp_path, whole):
    taken = []

    def on_progress(name, ended, runs, progress):
        taken.append((name, ended, progress.step))
        assert runs == 4

    # In the third run, after its third step.
    stop = iter([False] * 11 + [True])
    first = run(tmp_path, stop=lambda: next(stop), on_progress=on_progress)
    assert not first.is_complete
    assert names(first) == [(1, "pre_ln"), (1, "e_spa")]
    assert json.loads((tmp_path / "study.json").read_text())["is_complete"] is False
    assert len(taken) == 11
    assert taken[-1] == ("pre_ln-no-skip-no-norm-depth-2-lr-0.001", 2, 3)

    taken.clear()
    second = run(tmp_path, on_progress=on_progress)
    assert second.is_complete
    assert [(ended, step) for _, ended, step in taken] == [(2, 4), *((3, k) for k in range(1, 5))]
    assert losses(second) == losses(whole[0])

    taken.clear()
    assert losses(run(tmp_path, on_progress=on_progress)) == losses(second)
    assert taken == []


def test_of_several_learning_rates_the_best_counts(tmp_path):
    rates = (1e-5, 3e-3)
    found = run(tmp_path, depths=(1,), methods=("e_spa",), learning_rates=rates)
    assert [one.learning_rate for one in found.runs] == list(rates)
    (best,) = found.best().values()
    assert best.learning_rate == 3e-3
    assert best.result.loss < found.runs[0].result.loss


def test_a_run_that_diverges_is_a_result(tmp_path):
    rates = (1e30, 1e-3)
    found = run(tmp_path, depths=(1,), learning_rates=rates)
    assert [one.result.status for one in found.runs] == ["diverged", "finished"] * 2
    assert found.is_complete
    assert {one.learning_rate for one in found.best().values()} == {1e-3}
    worst = run(tmp_path, depths=(1,), learning_rates=rates[:1])
    text = shown(worst)
    assert text.count("diverged") == 2
    rows = json.loads((tmp_path / "study.json").read_text())["runs"]
    assert all("is nan" in row["reason"] or "is inf" in row["reason"] for row in rows)
    assert plot_study(worst).axes


# ---------------------------------------------------------------------------------------- variants


def test_variants_are_those_that_are_defined():
    free = replace(TINY, has_skip=None, has_normalization=None)
    found = variants(free, METHODS)
    assert {variant.method for variant in found} == set(METHODS)
    assert len(found) == len(set(found))
    combinations = {
        method: {variant.parts for variant in found if variant.method == method}
        for method in METHODS
    }
    assert combinations["simplified"] == {"norm"}
    assert combinations["simplified_parallel"] == {"norm", "neither"}
    assert combinations["e_spa"] == {"skip + norm", "skip", "norm", "neither"}
    for variant in found:
        config = replace(
            free,
            method=variant.method,
            has_skip=variant.skip,
            has_normalization=variant.normalization,
        ).model_config()
        assert (config.has_skip, config.has_normalization) == (
            variant.skip,
            variant.normalization,
        )


def test_flags_narrow_the_variants():
    free = replace(TINY, has_normalization=None)
    assert [v.parts for v in variants(free, ("e_spa",))] == ["norm", "neither"]
    assert variants(TINY, ("e_spa",)) == [Variant("e_spa", False, False)]
    with pytest.raises(ValueError, match="methods must have a combination.*'simplified'"):
        variants(TINY, ("e_spa", "simplified"))
    with pytest.raises(ValueError, match="methods must be one of"):
        variants(TINY, ("rezero",))


def test_bad_settings_are_found_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "train", None)
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        run(tmp_path, depths=(2, 0))
    with pytest.raises(ValueError, match="learning_rate must be greater than 0, got -1"):
        run(tmp_path, learning_rates=(1e-3, -1.0))


# ------------------------------------------------------------------------------- the table and plot


def made(status, *losses):
    validation = tuple((10 * k, loss) for k, loss in enumerate(losses))
    reason = None if status == "finished" else "the loss is nan in step 3"
    return TrainResult(status, reason, 10, validation, 3.0, 100, "cpu", 1.0)


def shown(found):
    console = Console(width=100, file=io.StringIO())
    console.print(study_table(found))
    return console.file.getvalue()


@pytest.fixture
def invented():
    """Numbers that are known."""
    vanilla, spa = Variant("pre_ln", False, False), Variant("e_spa", True, False)
    runs = (
        StudyRun(vanilla, 12, 1e-3, made("finished", 6.0, 3.5)),
        StudyRun(vanilla, 12, 3e-3, made("finished", 6.0, 3.25)),
        StudyRun(vanilla, 36, 1e-3, made("diverged", 6.0)),
        StudyRun(vanilla, 36, 3e-3, made("diverged")),
        StudyRun(spa, 12, 1e-3, made("finished", 5.5, 2.5)),
        StudyRun(spa, 12, 3e-3, made("diverged", 5.5, 1.0)),
    )
    return Study(TINY, {}, runs, 8, 3.0)


def test_the_table_shows_the_best_losses(invented):
    rows = [line.split() for line in shown(invented).splitlines()]
    assert ["pre_ln", "neither", "3.250", "at", "3e-3", "diverged"] in rows
    assert ["e_spa", "skip", "2.500", "at", "1e-3", "-"] in rows


def test_the_plot_shows_the_best_losses_over_depth(invented, tmp_path):
    figure = plot_study(invented)
    neither, skip = figure.axes
    assert [axes.get_title(loc="left") for axes in (neither, skip)] == ["neither", "skip"]
    curve, cross, level = (list(zip(*line.get_data(), strict=True)) for line in neither.lines)
    assert curve == [(12, 3.25)]
    assert [depth for depth, _ in cross] == [36]
    assert {loss for _, loss in level} == {3.0}
    assert [list(line.get_ydata()) for line in skip.lines] == [[2.5], [3.0, 3.0]]
    low, high = neither.get_ylim()
    assert low < 2.5 < 3.25 < cross[0][1] < high
    path = plots.save(figure, tmp_path / "study.png")
    assert path.stat().st_size < 100_000


def test_the_best_of_runs_that_diverged_is_one_of_them(invented):
    best = invented.best()
    assert best[Variant("pre_ln", False, False), 36].result.status == "diverged"
    assert best[Variant("e_spa", True, False), 12].result.loss == 2.5
    assert not math.isnan(best[Variant("pre_ln", False, False), 12].result.loss)
