"""What a run finds in its folder decides whether and where it goes on; nothing in it is lost."""

import errno
import shutil
from pathlib import Path

import pytest
from tiny_training import assert_same_run, train

from shaped_attn.train import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def stopped(tmp_path):
    """The folder of the checkpoints 8 and 9 of a run that was stopped."""
    train(tmp_path / "run", stop_after=9)
    folder = tmp_path / "run" / "checkpoints"
    assert names(folder) == ["step-00000008", "step-00000009"]
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    """All files below a folder, with what they hold."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ------------------------------------------------------------------------------------------ damage


def shorten(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(checkpoint):
    path = checkpoint / "optimizer.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_folder(checkpoint):
    (checkpoint / "optimizer.bin").unlink()
    (checkpoint / "optimizer.bin").mkdir()


DAMAGES = {
    "model.safetensors has changed": shorten,
    "optimizer.bin has changed": flip,
    "optimizer.bin is not a file": replace_by_a_folder,
    "random_states_0.pkl is missing": lambda folder: (folder / "random_states_0.pkl").unlink(),
    "checkpoint.json is missing": lambda folder: (folder / "checkpoint.json").unlink(),
    "checkpoint.json is not one of ours": lambda folder: (folder / "checkpoint.json").write_text(
        "{"
    ),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(problem, stopped, whole):
    DAMAGES[problem](stopped / "step-00000009")
    damaged = contents(stopped / "step-00000009")
    warnings, steps, resumed = [], [], []
    train(
        stopped.parent,
        warn=warnings.append,
        on_resume=resumed.append,
        on_progress=lambda progress: steps.append(progress.step),
    )
    (text,) = warnings
    assert f"step-00000009 is damaged ({problem}" in text
    assert "set aside as damaged-step-00000009, and step-00000008 serves" in text
    assert resumed == [8]
    assert steps == list(range(9, 13))
    assert_same_run(stopped.parent, whole[0])
    assert names(stopped) == ["damaged-step-00000009", "step-00000008", "step-00000012"]
    assert contents(stopped / "damaged-step-00000009") == damaged


def test_what_was_set_aside_before_is_not_overwritten(stopped, whole):
    shorten(stopped / "step-00000009")
    first = contents(stopped / "step-00000009")
    with pytest.warns(UserWarning, match="step-00000008 serves"):
        train(stopped.parent, stop_after=1)
    assert names(stopped) == ["damaged-step-00000009", "step-00000008", "step-00000009"]
    flip(stopped / "step-00000009")
    second = contents(stopped / "step-00000009")
    with pytest.warns(UserWarning, match="damaged-step-00000009-2"):
        train(stopped.parent)
    assert contents(stopped / "damaged-step-00000009") == first
    assert contents(stopped / "damaged-step-00000009-2") == second
    assert_same_run(stopped.parent, whole[0])


def test_without_a_whole_checkpoint_the_run_stops_and_keeps_all(stopped, whole, tmp_path):
    shutil.copytree(stopped / "step-00000009", tmp_path / "copy")
    shorten(stopped / "step-00000009")
    (stopped / "step-00000008" / "optimizer.bin").unlink()
    damaged = contents(stopped / "step-00000009")
    others = {name: x for name, x in contents(stopped.parent).items() if "checkpoints" not in name}
    # The second time nothing is there but what was set aside, whose problems nobody knows.
    for problems in ((" (optimizer.bin is missing)", " (model.safetensors has changed)"), ("", "")):
        with pytest.raises(OSError, match="has no checkpoint that is whole") as error:
            train(stopped.parent)
        damage = "damaged-step-00000008{}, damaged-step-00000009{}.".format(*problems)
        for part in (str(stopped), damage, "Put back a whole copy", "another output"):
            assert part in str(error.value)
        assert names(stopped) == ["damaged-step-00000008", "damaged-step-00000009"]
        assert contents(stopped / "damaged-step-00000009") == damaged
        left = contents(stopped.parent)
        assert {name: left[name] for name in others} == others
    shutil.copytree(tmp_path / "copy", stopped / "step-00000009")
    assert train(stopped.parent).status == "finished"
    assert_same_run(stopped.parent, whole[0])


# ------------------------------------------------------------------------------- what is no damage


@pytest.mark.parametrize("name", ["_digest", "iterdir"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_what_cannot_be_read_stops_the_run_and_changes_nothing(code, name, stopped, monkeypatch):
    """A file of a checkpoint, or the folder, which is then no empty one."""
    shorten(stopped / "step-00000009")  # known to be damaged before the other is tried
    before = contents(stopped.parent)
    owner = checkpoints if name == "_digest" else Path
    read = getattr(owner, name)

    def unreadable(path):
        if path == stopped or path.parent.name == "step-00000008":
            raise OSError(code, "out of order", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, unreadable)
        with pytest.raises(OSError, match=r"cannot be read.*out of order.*nothing was changed"):
            train(stopped.parent)
    assert contents(stopped.parent) == before
    with pytest.warns(UserWarning, match="step-00000008 serves"):
        train(stopped.parent, stop_after=0)


def test_a_run_that_begins_is_not_resumed(tmp_path):
    resumed = []
    train(tmp_path / "run", stop_after=5, on_resume=resumed.append)
    assert resumed == []
    train(tmp_path / "run", on_resume=resumed.append)
    assert resumed == [5]
    train(tmp_path / "run", on_resume=resumed.append)  # it has ended
    assert resumed == [5]


def test_a_run_that_ended_before_its_first_checkpoint_goes_on_from_0(tmp_path, whole):
    resumed = []
    train(tmp_path / "run", stop_after=0)
    train(tmp_path / "run", on_resume=resumed.append)
    assert resumed == [0]
    assert_same_run(tmp_path / "run", whole[0])


# ------------------------------------------------------------------------------- what is removed


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path, monkeypatch):
    save = checkpoints.save

    def save_and_damage(accelerator, folder, step, keep):
        save(accelerator, folder, step, keep)
        if step == 8:
            shorten(folder / "step-00000008")

    monkeypatch.setattr(checkpoints, "save", save_and_damage)
    train(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert names(folder) == ["step-00000004", "step-00000008", "step-00000012"]
    assert checkpoints.find_damage(folder / "step-00000004") is None


def test_what_killed_runs_have_left_is_removed_and_nothing_else(stopped):
    for name in (".step-00000003.part", "damaged-step-00000002", "step-notes", "step-00000001.bak"):
        (stopped / name).mkdir()
        (stopped / name / "file").write_text("x")
    train(stopped.parent)
    assert names(stopped) == [
        *("damaged-step-00000002", "step-00000001.bak", "step-00000009", "step-00000012"),
        "step-notes",
    ]


def test_a_checkpoint_of_another_run_is_not_replaced(stopped):
    def intrude(progress):
        if progress.step == 10:  # as a second run in this folder would
            (stopped / "step-00000012").mkdir()
            (stopped / "step-00000012" / "file").write_text("x")

    with pytest.raises(FileExistsError, match=r"step-00000012 exists.*one run at a time"):
        train(stopped.parent, on_progress=intrude)
    assert names(stopped) == ["step-00000008", "step-00000009", "step-00000012"]
    assert (stopped / "step-00000012" / "file").read_text() == "x"


def test_of_a_run_that_has_ended_only_what_was_set_aside_stays(stopped):
    (stopped / "damaged-step-00000003").mkdir()
    (stopped / ".step-00000003.part").mkdir()
    checkpoints.remove_all(stopped)
    assert names(stopped) == ["damaged-step-00000003"]
    (stopped / "damaged-step-00000003").rmdir()
    checkpoints.remove_all(stopped)
    assert not stopped.exists()
    checkpoints.remove_all(stopped)
