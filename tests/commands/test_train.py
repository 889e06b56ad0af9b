import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_training
from command_line import invoke

from shaped_attn.settings import settings_of
from shaped_attn.train import metrics, trainer
from shaped_attn.train import study as study_module
from shaped_attn.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
SHORT = {"depth": 1, "steps": 6, "warmup_steps": None}
SHORT |= {"evaluate_every": 3, "evaluation_windows": 4, "checkpoint_every": 3}
STUDY = ("--study", "depth", "--depths", "1,2", "--methods", "pre_ln, e_spa")
NEITHER = ("--no-skip", "--no-normalization")


def flags(**changes):
    return ["train", *tiny_training.flags(**SHORT | changes), "--device", "cpu"]


def study_flags():
    # The depth of the flags above is not an option of a study.
    return [*flags(depth=None), *NEITHER, *STUDY]


def words(text):
    return " ".join(text.split())


def press_ctrl_c(monkeypatch, step):
    """Press Ctrl-C in a step, counted over all runs."""
    take, seen = trainer._Run._take_step, []

    def pressed(run, last):
        seen.append(None)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return take(run, last)

    monkeypatch.setattr(trainer._Run, "_take_step", pressed)


# -------------------------------------------------------------------------------------------- train


def test_it_trains_and_says_so(tmp_path):
    result = invoke(*flags(), "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())
    loss, entropy = recorded["validation"][-1][1], recorded["unigram_entropy"]
    text = words(result.stdout)
    assert f"Finished after 6 steps: validation loss {loss:.4f} nats per byte" in text
    assert f"byte frequencies alone give {entropy:.4f}" in text
    assert f"{recorded['parameters']:,} parameters, cpu" in text
    assert f"Folder: {tmp_path / 'run'}" in result.stdout
    # The same command again repeats nothing and says the same.
    assert words(invoke(*flags(), "--output", tmp_path / "run").stdout) == text


def test_json_is_the_result(tmp_path):
    result = invoke(*flags(), "--output", tmp_path / "run", "--json")
    assert json.loads(result.stdout) == json.loads((tmp_path / "run" / "result.json").read_text())


def test_flags_win_over_the_file_and_reach_the_run(tmp_path):
    config = tmp_path / "c.json"
    values = {"method": "e_spa", "skip": True, "seed": 5, "steps": 3, "precision": "bf16"}
    config.write_text(json.dumps(values))
    options = ("--config", config, "--no-skip", "--learning-rate", 0.01)
    result = invoke(*flags(), *options, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    expected = {"method": "e_spa", "has_skip": False, "seed": 5, "steps": 6, "precision": "bf16"}
    assert {name: found[name] for name in expected} == expected
    assert (found["learning_rate"], found["has_normalization"]) == (0.01, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps must be an int, got 'many'. Pass a whole number."),
        ({"skip": 1}, "has_skip must be True or False, got 1"),
        ({"data": 3}, "data must be text, got 3"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_value_names_its_file(values, message, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "load_corpus", None)
    config = tmp_path / "c.json"
    config.write_text(json.dumps(values))
    result = invoke("train", "--config", config, "--output", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert f"Error: {config}: {message}" in words(result.stderr)
    assert not (tmp_path / "run").exists()
    # A flag that is wrong itself is not blamed on the file.
    result = invoke("train", "--config", config, *("--steps", 0) * ("steps" in values))
    assert (str(config) in words(result.stderr)) == ("steps" not in values)


def test_the_help_shows_the_defaults():
    text = words(invoke("train", "--help").stdout)
    for flag, default in (
        ("--depth, --layers INTEGER", "12"),
        ("--skip / --no-skip", "what the method's paper has"),
        ("--branch-gain FLOAT", "0.5"),
        ("--gain-scheme [fixed|learn|recover]", "fixed"),
        ("--data-bytes INTEGER", "100000000"),
        ("--learning-rate FLOAT", "0.001"),
        ("--warmup-steps INTEGER", "5 % of the steps"),
    ):
        assert re.search(re.escape(flag) + r"[^\[]*\[default: " + re.escape(default) + r"\]", text)
    flags = set(re.findall(r"--[a-z0-9-]+", text))
    assert {f"--{name.replace('_', '-')}" for name in settings_of(TrainSettings)} - flags == {
        "--has-skip",
        "--has-normalization",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"learning_rat": 1}, "learning_rat is not a setting. Did you mean learning_rate?"),
        ({"no_skip": True}, "Write skip = false."),
        ({"layers": 3}, "Write depth."),
        ({"output": "here"}, "Give --output on the command line."),
        ({"learning_rates": [1]}, "Give --learning-rates on the command line."),
        ({"skip": True, "has_skip": True}, "has_skip is given twice, by both"),
    ],
)
def test_a_file_with_other_names_is_refused(content, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(content))
    result = invoke("train", "--config", path, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert message in words(result.stderr)


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    whole = invoke(*flags(), "--output", tmp_path / "whole")
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 5)
        result = invoke(*flags(), "--output", tmp_path / "run")
    assert result.exit_code == 130
    assert "Interrupted after 5 steps" in result.stdout
    assert "The same command goes on from here." in result.stderr
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000005"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    again = invoke(*flags(), "--output", tmp_path / "run")
    assert again.exit_code == 0
    assert f"{tmp_path / 'run'}: resuming from step 5\n" in again.stderr
    assert "resuming" not in whole.stderr + result.stderr
    assert again.stdout.replace("run", "whole") == whole.stdout
    runs = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    losses = [[(line["kind"], line["step"], line["loss"]) for line in run] for run in runs]
    assert losses[0] == losses[1]


def test_a_process_that_gets_sigint_saves_and_ends(tmp_path):
    output = tmp_path / "run"
    arguments = [*flags(steps=1_000_000, checkpoint_every=1_000_000), "--output", str(output)]
    process = subprocess.Popen(
        [sys.executable, "-m", "shaped_attn", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        limit = time.monotonic() + 120
        while len(metrics.read(output / "metrics.jsonl")) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    last = metrics.read(output / "metrics.jsonl")[-1]["step"]
    assert f"Interrupted after {last} steps" in stdout
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{last:08d}"]
    assert "Traceback" not in stderr


def test_without_a_terminal_every_validation_is_a_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 5)
        first = invoke(*flags(), "--output", tmp_path / "run")
    second = invoke(*flags(), "--output", tmp_path / "run")
    found = metrics.read(tmp_path / "run" / "metrics.jsonl")
    expected = {
        line["step"]: f"step {line['step']} of 6: validation {line['loss']:.4f}"
        for line in found
        if line["kind"] == "validation"
    }
    # Nothing else, such as what remains of a bar.
    assert first.stderr.splitlines()[:-1] == [expected[0], expected[3]]
    assert second.stderr.splitlines() == [
        f"{tmp_path / 'run'}: resuming from step 5",
        expected[6],
    ]
    result = invoke(*flags(seed=1), "--output", tmp_path / "other", "--json")
    assert json.loads(result.stdout)["validation"]
    assert "step 6 of 6: validation" in result.stderr


def test_a_damaged_checkpoint_is_a_warning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 5)
        invoke(*flags(), "--output", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000005" / "optimizer.bin").write_bytes(b"")
    result = invoke(*flags(), "--output", tmp_path / "run")
    assert result.exit_code == 0
    assert "Warning: checkpoint" in result.stderr
    assert "step-00000005 is damaged (optimizer.bin has changed)" in words(result.stderr)
    assert "resuming from step 3" in result.stderr


def test_a_run_without_a_whole_checkpoint_fails(tmp_path):
    invoke(*flags(), "--output", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    folder = tmp_path / "run" / "checkpoints"
    for path in folder.iterdir():
        (path / "optimizer.bin").write_bytes(b"")
    for _ in range(2):
        result = invoke(*flags(), "--output", tmp_path / "run")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert f"Error: {folder} has no checkpoint that is whole" in result.stderr
        assert "damaged-step-00000003, damaged-step-00000006" in re.sub(
            r" \([^)]*\)", "", result.stderr
        )
        assert "name another output" in words(result.stderr)


@pytest.mark.parametrize("study", [False, True])
def test_an_output_that_cannot_be_written_is_found_before_any_work(study, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("there was work before")

    for name in (trainer, study_module):
        monkeypatch.setattr(name, "load_corpus", refuse)
    (tmp_path / "file").write_text("x")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    folders = [tmp_path / "file" / "run"]
    if not os.access(closed, os.W_OK):
        folders += [closed, closed / "run" / "below"]
    if Path("/proc/self").exists():  # there root cannot write either
        folders += [Path("/proc/run"), Path("/proc")]
    for output in folders:
        result = invoke(*(study_flags() if study else flags()), "--output", output)
        assert result.exit_code == 1, result.output
        text = words(result.stderr)
        assert f"output must be a folder that can be written, got {output} (" in text
        assert "Name another one." in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "file"]


def test_an_output_that_is_a_file_is_wrong_usage(tmp_path):
    (tmp_path / "file").write_text("x")
    result = invoke(*flags(), "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "Invalid value for '--output'" in result.stderr


def test_a_run_that_diverges_fails_and_says_why(tmp_path):
    options = ("--learning-rate", "1e30", "--clip-norm", 0, "--output", tmp_path / "run")
    result = invoke(*flags(), *options)
    assert result.exit_code == 1
    assert "Diverged after" in result.stdout
    assert "Training cannot go on: the" in result.stderr
    assert "A lower learning rate" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--depth", 0), "depth must be at least 1"),
        (("--width", "x"), "'x' is not a valid integer"),
        (("--method", "rezero"), "'rezero' is not one of 'shaped'"),
        (("--schedule", "step"), "'step' is not one of 'cosine'"),
        (("--data", "nowhere.txt"), "data must be a file or folder that exists"),
        (("--device", "abacus"), "'abacus' is not one of 'auto', 'cpu'"),
        (("--config", "none.json"), "does not exist"),
        (("--depths", "1,2"), "--depths is an option of --study depth"),
        (("--methods", "e_spa"), "--methods is an option of --study depth"),
        (("--learning-rates", "1"), "--learning-rates is an option of --study depth"),
        (("--study", "width"), "'width' is not 'depth'"),
        (("--study", "depth"), "--depth is not an option of --study depth. Give --depths."),
        (("--study", "depth", "--depths", "1,x"), "'1,x' is not a list of int between commas"),
    ],
)
def test_wrong_flags_are_wrong_usage(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = invoke(*flags(), *args)
    assert result.exit_code == 2, result.output
    assert message in words(result.stderr)
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_another_run_is_refused(tmp_path):
    invoke(*flags(), "--output", tmp_path / "run")
    result = invoke(*flags(seed=3), "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "a run of another configuration (seed: 0, now 3)" in words(result.stderr)


@pytest.mark.parametrize("study", [False, True])
@pytest.mark.parametrize("package", ["accelerate", "tensorboard", "datasets"])
def test_without_the_extra_it_says_what_to_install(package, study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    options = ("--data", "hf:owner/name") if package == "datasets" else ()
    if package != "datasets":
        for module in (trainer, study_module):  # nothing is read before
            monkeypatch.setattr(module, "load_corpus", None)
    chosen = study_flags() if study else flags()
    result = invoke(*chosen, *options, "--output", tmp_path / "run")
    assert result.exit_code == 1
    text = words(result.stderr)
    assert f'training needs the package {package}, of the extra "train", which is not' in text
    assert 'pip install "shaped-attn[train]"' in text
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------- study


def test_a_study_writes_a_table_a_plot_and_numbers(tmp_path):
    result = invoke(*study_flags(), "--output", tmp_path / "study")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "study" / "study.json").read_text())
    by_row = {(run["method"], run["depth"]): run["loss"] for run in found["runs"]}
    rows = [line.split() for line in result.stdout.splitlines()]
    assert f"byte frequencies alone give {found['unigram_entropy']:.3f}" in result.stdout
    for method in ("pre_ln", "e_spa"):
        losses = [f"{by_row[method, depth]:.3f}" for depth in (1, 2)]
        assert [method, "neither", *losses] in rows
    assert (tmp_path / "study" / "study.png").read_bytes()[:4] == b"\x89PNG"
    assert f"Plot: {tmp_path / 'study' / 'study.png'}" in result.stdout
    again = invoke(*study_flags(), "--output", tmp_path / "study", "--json")
    assert json.loads(again.stdout)["runs"] == found["runs"]


def test_ctrl_c_ends_a_study_that_then_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, 8)  # in the second run
        result = invoke(*study_flags(), "--output", tmp_path / "study")
    assert result.exit_code == 130
    assert "Interrupted after 1 of 4 runs" in result.stderr
    assert invoke(*study_flags(), "--output", tmp_path / "study").exit_code == 0


def test_a_study_names_the_runs_that_diverged(tmp_path):
    options = ("--learning-rates", "1e30,0.001", "--output", tmp_path / "study")
    result = invoke(*study_flags(), *options)
    assert result.exit_code == 0
    assert "Diverged: e_spa with neither, depth 2, learning rate 1e+30: the" in result.stdout
    assert "at 1e-3" in result.stdout
