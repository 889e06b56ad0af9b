import json
import math
import shutil
import signal
import textwrap
import time

import pytest
import torch
from fresh_python import python
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_training import TINY, assert_same_run, lines, settings, train

from shaped_attn.nn import Projection, ShapedTransformer, ShapedTransformerConfig, anneal_gains
from shaped_attn.train import checkpoints, metrics, trainer
from shaped_attn.train.corpus import fixed_windows, sample_batch, step_generator
from shaped_attn.train.data import load_corpus
from shaped_attn.train.folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(TINY["data"], TINY["data_bytes"])


# ------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("steps", [None, 8])
def test_training_is_that_of_the_formulas(steps, float64, tmp_path, corpus):
    """The same losses as a loop of plain torch, with clipping, warm-up and decay in effect."""
    changes = {"clip_norm": 0.5, "learning_rate": 1e-2, "weight_decay": 0.2}
    if steps is not None:
        changes |= {"gain_scheme": "recover", "recover_steps": steps}
    result = train(tmp_path / "run", **changes)
    found = lines(tmp_path / "run", "train")

    model = trainer.build(settings(**changes))
    tables = {id(model.embedding.weight)}
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim == 2 and id(p) not in tables]
    others = [p for p in parameters if p.ndim != 2 or id(p) in tables]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    clipped = 0
    for step in range(12):
        rate = (step + 1) / 3
        if step >= 3:
            rate = 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate
        if steps is not None:
            anneal_gains(model, min(1, step / steps))
        batch = sample_batch(corpus.train, 4, 15, step_generator(0, step))
        logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))
        clipped += norm > 0.5
        for p in parameters:
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        line = found[step]
        assert (line["kind"], line["step"]) == ("train", step + 1)
        assert line["learning_rate"] == pytest.approx(1e-2 * rate, rel=1e-14)
        assert line["gradient_norm"] == pytest.approx(norm, rel=1e-9)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert clipped == 12
    if steps is not None:
        anneal_gains(model, 1)
    windows = fixed_windows(corpus.validation, 6, 15)
    with torch.no_grad():
        assert result.loss == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-9)


def test_a_norm_of_0_does_not_clip(float64, tmp_path):
    train(tmp_path / "off", clip_norm=0.0)
    train(tmp_path / "far", clip_norm=1e9)
    train(tmp_path / "near", clip_norm=1e-3)
    off, far, near = (
        [line["loss"] for line in lines(tmp_path / name, "train")]
        for name in ("off", "far", "near")
    )
    assert off == far != near


def test_accumulation_does_not_change_the_step(float64, tmp_path):
    results = []
    for parts in (1, 2, 4):
        train(tmp_path / str(parts), accumulation=parts)
        results.append(lines(tmp_path / str(parts)))
    for other in results[1:]:
        assert [line["loss"] for line in other] == pytest.approx(
            [line["loss"] for line in results[0]], rel=1e-9
        )


def test_runs_of_a_seed_see_the_same_text_whatever_the_model(tmp_path, monkeypatch):
    batches = {}
    take = trainer._Run._batch

    def remember(self):
        batch = take(self)
        batches.setdefault((self.settings.method, self.settings.seed), []).append(batch)
        return batch

    monkeypatch.setattr(trainer._Run, "_batch", remember)
    for method, seed in (("shaped", 0), ("pre_ln", 0), ("shaped", 1)):
        train(tmp_path / f"{method}{seed}", method=method, seed=seed, steps=4)
    shaped, pre_ln, other = (torch.stack(found) for found in batches.values())
    assert torch.equal(shaped, pre_ln)
    assert not torch.equal(shaped, other)
    assert shaped.shape == (4, 4, 16)
    assert not torch.equal(shaped[0], shaped[1])


def test_the_weights_depend_on_the_seed_and_the_draws_of_others_do_not():
    before = torch.get_rng_state()
    first, second, other = (trainer.build(settings(seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(tmp_path, whole):
    dtypes = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, out: dtypes.add(out.dtype) if isinstance(module, Projection) else None
    )
    try:
        train(tmp_path / "run", precision="bf16")
    finally:
        hook.remove()
    # Products that are mixed into the stream take its float32.
    assert dtypes == {torch.bfloat16, torch.float32}
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    exact = lines(whole[0], "train")[0]["loss"]
    found = lines(tmp_path / "run", "train")[0]["loss"]
    # The same weights: each of a few roundings of logits of order 1 is at most 2^-9 of them.
    assert found != exact
    assert found == pytest.approx(exact, abs=8 * 2**-9)


def test_the_files_make_the_trained_model(whole, corpus):
    output, result = whole
    config = ShapedTransformerConfig.from_json((output / "model.json").read_text())
    model = ShapedTransformer(config)
    model.load_state_dict(load_file(output / "model.safetensors"))
    windows = fixed_windows(corpus.validation, 6, 15)
    with torch.no_grad():
        losses = [model(part, labels=part).loss for part in windows.split(4)]
    mean = (4 * losses[0] + 2 * losses[1]) / 6
    assert result.loss == pytest.approx(mean.item(), rel=1e-6)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    # Beside it, byte frequencies on the same tokens.
    counts = torch.bincount(corpus.train, minlength=256).double() + 1
    unigram = -(counts / counts.sum()).log()[windows[:, 1:]].mean()
    assert result.unigram_entropy == pytest.approx(unigram.item(), rel=1e-12)


# ----------------------------------------------------------------------------------------- records


def test_every_line_has_its_numbers(whole):
    output, result = whole
    found = metrics.read(output / "metrics.jsonl")
    assert [line["step"] for line in found if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in found if line["kind"] == "validation"] == [0, 6, 12]
    for line in found:
        names = {"kind", "step", "loss"}
        if line["kind"] == "train":
            names |= {"learning_rate", "gradient_norm", "tokens_per_second"}
        assert set(line) == names
        assert all(math.isfinite(value) for name, value in line.items() if name != "kind")
    validation = [(line["step"], line["loss"]) for line in found if line["kind"] == "validation"]
    assert result.validation == tuple(validation)
    assert (result.status, result.reason, result.step) == ("finished", None, 12)


def read_tensorboard(output):
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_same_numbers(whole):
    output, _ = whole
    scalars = read_tensorboard(output)
    assert set(scalars) == {
        "validation/loss",
        *(f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm")),
        "train/tokens_per_second",
    }
    for kind in ("train", "validation"):
        expected = [
            (line["step"], torch.tensor(line["loss"]).item()) for line in lines(output, kind)
        ]
        assert scalars[f"{kind}/loss"] == expected


def test_losses_are_recorded_every_few_steps(tmp_path, whole):
    train(tmp_path / "run", log_every=5)
    found = lines(tmp_path / "run", "train")
    # Also where there is a checkpoint, and at the end.
    assert [line["step"] for line in found] == [4, 5, 8, 10, 12]
    assert all(line in lines(whole[0], "train") for line in found)


# -------------------------------------------------------------------------------------- interrupted

KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from shaped_attn.train import checkpoints, trainer
from shaped_attn.train.settings import TrainSettings

torch.set_num_threads(1)

def kill(*args):
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
trainer.train(TrainSettings(**{values!r}), Path(sys.argv[1]), device="cpu")
"""
KILLS = {
    # After step 7, three steps after a checkpoint.
    "step": """
        take = trainer._Run._take_step
        trainer._Run._take_step = lambda run, last: kill() if run.step == 7 else take(run, last)
    """,
    # While the checkpoint of step 8 is written: its files are there, its manifest is not.
    "checkpoint": """
        digest, counted = checkpoints._digest, []
        checkpoints._digest = lambda path: (
            counted.append(path), kill() if len(counted) > 4 else None, digest(path)
        )[-1]
    """,
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_run_goes_on_with_the_same_losses(kill, tmp_path, whole):
    script = KILLED.format(patch=textwrap.dedent(KILLS[kill]), values=TINY)
    python("-c", script, tmp_path / "run", status=-signal.SIGKILL)
    reached = {"step": 7, "checkpoint": 8}[kill]
    assert lines(tmp_path / "run", "train")[-1]["step"] == reached
    folders = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    part = [".step-00000008.part"] if kill == "checkpoint" else []
    assert folders == [*part, "step-00000004"]
    time.sleep(1.1)  # TensorBoard orders its files by their names, which count seconds
    steps = []
    result = train(tmp_path / "run", on_progress=lambda progress: steps.append(progress.step))
    assert steps == list(range(5, 13))
    assert result.validation == whole[1].validation
    assert_same_run(tmp_path / "run", whole[0])
    scalars = read_tensorboard(tmp_path / "run")["train/loss"]
    assert scalars == read_tensorboard(whole[0])["train/loss"]


@pytest.mark.parametrize("steps", [0, 5])
def test_a_stop_request_saves_and_the_run_goes_on(steps, tmp_path, whole):
    result = train(tmp_path / "run", stop_after=steps)
    assert (result.status, result.step) == ("interrupted", steps)
    assert not (tmp_path / "run" / "result.json").exists()
    assert train(tmp_path / "run").status == "finished"
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(keep, tmp_path):
    train(tmp_path / "run", keep_checkpoints=keep)
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == ["step-00000004", "step-00000008", "step-00000012"][-keep:]
    for name in found:
        assert checkpoints.find_damage(tmp_path / "run" / "checkpoints" / name) is None


def test_a_run_that_has_ended_is_not_repeated(whole, monkeypatch):
    output, result = whole
    monkeypatch.setattr(trainer, "_Run", None)
    assert train(output) == result


def test_a_line_that_is_torn_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tra')
    assert metrics.read(path) == [{"kind": "train", "step": 1}]
    path.write_text('{"kind": "tra\n{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl must hold .* Remove that line"):
        metrics.read(path)
    assert path.read_text() == '{"kind": "tra\n{"kind": "train", "step": 1}\n'


@pytest.mark.parametrize("content", ["{", "3", "[]", '{"status": "finished"}', '{"validation": 3}'])
def test_a_result_that_is_damaged_is_a_clear_error(content, tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"result\.json must be the result of a run.*Move it away"):
        train(tmp_path / "run")
    assert path.read_text() == content
    path.rename(tmp_path / "away")
    assert train(tmp_path / "run").validation == whole[1].validation
    assert_same_run(tmp_path / "run", whole[0])


# ------------------------------------------------------------------------------------ other folders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, r"another configuration \(depth: 2, now 3\)"),
        ({"method": "pre_ln", "seed": 1}, "method: 'shaped', now 'pre_ln'; seed: 0, now 1"),
        ({"data_bytes": 40_000}, "the text is another one"),
    ],
)
def test_a_folder_of_another_run_is_refused(changes, message, whole):
    output, _ = whole
    before = {path: path.read_bytes() for path in output.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(output, **changes)
    assert {path: path.read_bytes() for path in output.iterdir() if path.is_file()} == before


def test_bookkeeping_may_change_between_the_parts_of_a_run(tmp_path, whole):
    train(tmp_path / "run", stop_after=4)
    train(tmp_path / "run", keep_checkpoints=5, checkpoint_every=3)
    assert_same_run(tmp_path / "run", whole[0])


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ValueError, match="output must be a new folder.*which holds other files"):
        train(tmp_path)
    (tmp_path / "run.json").write_text('{"settings": 3}')
    with pytest.raises(ValueError, match=r"whose run\.json is none of ours"):
        train(tmp_path)


def test_a_number_of_processes_belongs_to_a_run(whole, corpus):
    output, _ = whole
    with pytest.raises(ValueError, match="processes: 1, now 2"):
        RunFolder(output).check(settings(), corpus.digest(), 2)


# ----------------------------------------------------------------------------------------- failures


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    # Steps so large that the third loss overflows.
    changes = {"learning_rate": 1e30, "clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0}
    result = train(tmp_path / "run", **changes)
    assert result.status == "diverged"
    assert result.reason == f"the loss is nan in step {result.step + 1}"
    assert 1 <= result.step < 4
    assert [line["step"] for line in lines(tmp_path / "run", "train")] == list(
        range(1, result.step + 1)
    )
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (recorded["status"], recorded["reason"]) == ("diverged", result.reason)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    monkeypatch.setattr(trainer, "_Run", None)
    assert train(tmp_path / "run", **changes) == result


@pytest.mark.parametrize("log_every", [1, 100])  # step 8 is also that of a checkpoint
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_step(
    log_every, tmp_path, monkeypatch
):
    backward = trainer._Run._backward

    def poisoned(run, batch):
        loss, norm = backward(run, batch)
        return loss, norm * (math.nan if run.step == 7 else 1.0)

    monkeypatch.setattr(trainer._Run, "_backward", poisoned)
    result = train(tmp_path / "run", log_every=log_every)
    assert (result.status, result.step) == ("diverged", 7)
    assert result.reason == "the norm of the gradient is nan in step 8"
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert folders == ["step-00000004"]


def test_a_network_that_is_not_finite_at_the_start_has_no_loss(tmp_path, monkeypatch):
    build = trainer.build

    def poisoned(chosen):
        model = build(chosen)
        with torch.no_grad():
            model.head.weight[0, 0] = math.inf
        return model

    monkeypatch.setattr(trainer, "build", poisoned)
    result = train(tmp_path / "run")
    assert (result.status, result.step, result.loss) == ("diverged", 0, None)
    assert result.reason == "the validation loss is nan after 0 steps"


def test_text_that_is_too_short_is_a_clear_error(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("x" * 100)
    with pytest.raises(ValueError, match="data must hold more than length"):
        train(tmp_path / "run", data=str(text))


def test_an_unknown_device_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="device must be one of 'auto', 'cpu', got 'abacus'"):
        trainer.train(settings(), tmp_path / "run", device="abacus")
