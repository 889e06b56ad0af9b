"""The demo's page: one HTML file that holds all it shows and opens without a network."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

import torch

from ..environment import lines as environment_lines
from ..fidelity import CENTRED, Measurement, Table, format_error, label, tables
from . import covariance_page, figures
from .result import NAMES, DemoResult
from .style import CSS

_NATS_TO_BITS = 1 / math.log(2)
_TITLES = {"shaped": "Shaped attention", "plain": "Plain softmax attention"}


def render(result: DemoResult) -> str:
    """Return the whole page."""
    sections = (
        _head(result),
        _banners(result),
        _cards(result),
        _fidelity(result),
        covariance_page.section(result.covariance),
        _training(result),
        _maps(result),
        _gains(result),
        _samples(result),
        _setup(result),
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>shaped_attn demo</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _head(result: DemoResult) -> str:
    return """<header>
<h1>Shaped attention, on the source of Python</h1>
<p>Two small byte-level decoders were trained side by side: same initial weights, same data, same
number of steps. They differ in their attention alone:</p>
<p class="formula"><span>out<sub>i</sub> = identity · v<sub>i</sub></span>
<span>+ softmax · Σ<sub>j</sub> P<sub>ij</sub> v<sub>j</sub></span>
<span>− center · mean<sub>j ≤ i</sub> v<sub>j</sub> ,&emsp;</span>
<span>P = softmax(scale · q k<sup>T</sup>)</span></p>
<p>In <b class="shaped">shaped</b> attention the three gains are learned per head and start at 1:
each position first passes on its own value. <b class="plain">Plain</b> attention has them fixed at
0, 1, 0.</p>
</header>"""


def _banners(result: DemoResult) -> str:
    notes = []
    training, failures = result.training, result.fidelity.failures
    done = f"after {training.steps} of {training.planned_steps} steps"
    unfinished = "What follows shows the models as they were, with the learning rate still high."
    if training.stopped == "interrupt" and not training.steps:
        notes.append("Interrupted before training. What follows shows the models as they started.")
    elif training.stopped == "interrupt":
        notes.append(f"Interrupted {done}. {unfinished}")
    elif training.stopped == "time limit":
        notes.append(f"Stopped by the time limit {done}: the machine became slower. {unfinished}")
    if failures:
        notes.append(
            f"{len(failures)} of {len(result.fidelity.measurements)} fidelity measurements exceed "
            "their budget; they are red below."
        )
    return "".join(f'<p class="banner">{html.escape(note)}</p>' for note in notes)


def _cards(result: DemoResult) -> str:
    cards = [
        (
            f"{result.final_loss(name):.3f}",
            f'validation loss, <b class="{name}">{name}</b><br>'
            f"{result.final_loss(name) * _NATS_TO_BITS:.2f} bits per byte",
        )
        for name in NAMES
    ]
    cards.append(
        (
            f"{result.bigram_loss:.3f}",
            "nats per byte from the current byte alone (bigrams); "
            f"{result.unigram_loss:.3f} from byte frequencies",
        )
    )
    worst = _worst_centred(result)
    if worst is not None:
        error, composed = worst
        cards.append(
            (
                format_error(error),
                "largest error of the centred term in bf16; softmax attention minus a mean, both "
                f"rounded to bf16: {format_error(composed)}",
            )
        )
    body = "".join(f'<div class="card"><b>{b}</b><span>{text}</span></div>' for b, text in cards)
    return f'<div class="cards">{body}</div>'


def _worst_centred(result: DemoResult) -> tuple[float, float] | None:
    impl = result.fidelity.measurements[-1].impl  # the kernels, where they run
    rows = [
        m
        for m in result.fidelity.measurements
        if m.quantity == CENTRED and m.dtype == "bf16" and m.impl == impl
    ]
    if not rows:
        return None
    return max(m.error for m in rows), max(m.composed_error for m in rows)


def _fidelity(result: DemoResult) -> str:
    grouped = tables(result.fidelity)
    charts = "".join(
        _centred_chart([t for t in grouped if t.dtype == dtype], dtype)
        for dtype in dict.fromkeys(t.dtype for t in grouped)
    )
    details = "".join(
        f"<details><summary>{html.escape(_table_name(t))}: output and every gradient</summary>"
        f"{_fidelity_table(t)}</details>"
        for t in grouped
        if len(t.rows) > 1
    )
    impls = list(dict.fromkeys(t.impl for t in grouped))
    legend = "".join(
        f'<span><i class="shaped {style}"></i>{html.escape(_impl_text(impl, result))}</span>'
        for impl, style in zip(impls, ("", "dashed"), strict=False)
    )
    budget = " Dotted: the budget of the kernels." if "triton" in impls else ""
    return f"""<section>
<h2>How exact it is</h2>
<p>At small logits softmax is nearly uniform, and the centred term, softmax minus mean, is a small
difference of large numbers. Composing it from two finished outputs leaves mostly rounding. The
Triton kernels sum the difference itself, and the torch implementation works in float32. Shown is
the relative error against float64, for causal attention.</p>
<div class="legend">{legend}<span><i class="plain"></i>softmax attention minus mean,
composed</span></div>
<div class="charts">{charts}</div>
<p class="note">Error of the centred term over the standard deviation of the logits.{budget}</p>
{_centred_table(grouped)}
{details}
</section>"""


def _centred_table(grouped: list[Table]) -> str:
    head = "".join(f"<th>{std:g}</th>" for std in grouped[0].logit_stds)
    rows = "".join(
        _fidelity_rows(_table_name(table), dict(table.rows)[CENTRED]) for table in grouped
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>centred term, logit std</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _impl_text(impl: str, result: DemoResult) -> str:
    if impl != "triton":
        return f"shaped_attn, {impl} implementation"
    where = " under Triton's interpreter" if result.impl != "triton" else ""
    return f"shaped_attn, Triton kernels{where}"


def _table_name(table: Table) -> str:
    return f"{table.impl}, {table.dtype}, T = {table.length}"


def _centred_chart(group: list[Table], dtype: str) -> str:
    drawn = []
    budgets: list[float] = []
    for index, table in enumerate(group):
        row = dict(table.rows)[CENTRED]
        drawn.append(
            figures.Line(
                [(m.logit_std, m.error) for m in row],
                "shaped",
                dashed=index > 0,
                markers=True,
            )
        )
        budgets = [m.budget for m in row] if table.impl == "triton" else budgets
        if index == len(group) - 1:
            composed = [(m.logit_std, m.composed_error) for m in row]
            drawn.append(figures.Line(composed, "plain", markers=True))
    levels = []
    if budgets:
        text = f"budget {format_error(max(budgets))}"
        levels.append(figures.Level(max(budgets), text, at_left=True))
    svg = figures.line_chart(
        drawn,
        title=f"Relative error of the centred term in {dtype}",
        x_label="standard deviation of the logits",
        y_label="relative error",
        levels=levels,
        x_log=True,
        y_log=True,
    )
    return f"<figure><b>{html.escape(dtype)}</b>{svg}</figure>"


def _fidelity_table(table: Table) -> str:
    head = "".join(f"<th>{std:g}</th>" for std in table.logit_stds)
    rows = "".join(_fidelity_rows(label(quantity), row) for quantity, row in table.rows)
    return (
        f'<div class="scroll"><table><thead><tr><th>logit std</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _fidelity_rows(name: str, row: tuple[Measurement, ...]) -> str:
    """An error, what it may be, and what composing gives."""
    errors = "".join(
        f"<td{'' if m.is_within else ' class=bad'}>{format_error(m.error)}</td>" for m in row
    )
    budgets = "".join(f"<td>{format_error(m.budget)}</td>" for m in row)
    composed = "".join(f"<td>{format_error(m.composed_error)}</td>" for m in row)
    return (
        f"<tr><td>{html.escape(name)}</td>{errors}</tr>"
        f'<tr class="composed"><td>budget</td>{budgets}</tr>'
        f'<tr class="composed rule"><td>composed</td>{composed}</tr>'
    )


def _training(result: DemoResult) -> str:
    runs, steps = result.training.runs, result.training.steps
    # Wide enough to see through the noise of single batches, never most of the run.
    window = max(1, min(20, steps // 15))
    whole, late = [], []
    for name in NAMES:
        smoothed = figures.smooth(runs[name].train_loss, window)
        whole.append(figures.Line(smoothed, name, width=1.4, opacity=0.55))
        whole.append(figures.Line(runs[name].validation, name, markers=True))
        late.append(
            figures.Line(
                [p for p in runs[name].validation if p[0] >= steps / 3], name, markers=True
            )
        )
    levels = [
        figures.Level(result.unigram_loss, "byte frequencies"),
        figures.Level(result.bigram_loss, "byte pairs"),
    ]
    charts = [
        (
            "Whole run",
            figures.line_chart(
                whole,
                title="Training and validation loss",
                x_label="step",
                y_label="nats per byte",
                levels=levels,
            ),
        ),
        (
            "Validation, from a third of the run on",
            figures.line_chart(
                late, title="Validation loss, later part", x_label="step", y_label="nats per byte"
            ),
        ),
    ]
    drawn = "".join(f"<figure><b>{name}</b>{svg}</figure>" for name, svg in charts)
    rows = "".join(
        f'<tr><td><b class="{name}">{name}</b></td>'
        f"<td>{f'{runs[name].train_loss[0]:.3f}' if steps else '–'}</td>"
        f"<td>{result.final_loss(name):.4f}</td>"
        f"<td>{result.final_loss(name) * _NATS_TO_BITS:.3f}</td>"
        f"<td>{sum(p.numel() for p in runs[name].model.parameters()):,}</td>"
        f"<td>{1e3 * runs[name].seconds / max(1, steps):.0f} ms</td></tr>"
        for name in NAMES
    )
    return f"""<section>
<h2>Training</h2>
<div class="legend"><span><i class="shaped"></i>shaped</span><span><i class="plain"></i>plain</span>
<span class="soft">points: validation; thin: training, mean of {window} steps</span></div>
<div class="charts">{drawn}</div>
<p>{html.escape(_verdict(result))}</p>
<div class="scroll"><table><thead><tr><th>attention</th><th>first loss</th><th>validation</th>
<th>bits per byte</th><th>parameters</th><th>per step</th></tr></thead>
<tbody>{rows}</tbody></table></div>
<p class="note">Losses are in nats per byte on {len(runs["shaped"].window_losses)} windows of files
that neither model was trained on. The dotted lines code the same bytes by how often each byte, or
each pair of bytes, occurs in the training text: a decoder without attention can hardly do
better than the second.</p>
</section>"""


def _verdict(result: DemoResult) -> str:
    difference, error = result.difference()
    steps = result.training.steps
    size = f"{abs(difference):.4f} ± {error:.4f} nats per byte"
    if not steps:
        return "Neither was trained: these are the losses at the start."
    if not math.isfinite(difference):
        return f"After {steps} steps a loss is not a number: training diverged."
    if abs(difference) <= 2 * error:
        outcome = f"After {steps} steps the two cannot be told apart (difference {size})."
    else:
        order = ("shaped", "plain") if difference < 0 else ("plain", "shaped")
        outcome = (
            f"After {steps} steps {order[0]} attention has the lower loss, by {size} against "
            f"{order[1]} attention."
        )
    return (
        f"{outcome} The ± is the standard error over validation windows. It does not cover the "
        "seed, of which there is one, and so short a run says little about a long one."
    )


def _maps(result: DemoResult) -> str:
    panels = "".join(
        _map_panel(f"{_TITLES[name]}, {when}", maps[name])
        for name in NAMES
        for when, maps in (
            ("before training", result.maps_before),
            ("after training", result.maps_after),
        )
    )
    (r, g, b), (nr, ng, nb) = figures.POSITIVE_RGB, figures.NEGATIVE_RGB
    gradient = (
        f"linear-gradient(90deg, rgba({nr},{ng},{nb},1), rgba({nr},{ng},{nb},0) 50%, "
        f"rgba({r},{g},{b},0) 50%, rgba({r},{g},{b},1))"
    )
    length = next(iter(result.maps_before.values())).shape[-1]
    return f"""<section>
<h2>The attention matrices</h2>
<p>The matrix that multiplies the values, for every layer (down) and head (across): row i is what
position i takes from each position. It is not recomputed from a formula: the values given to the
operator are the identity matrix, and this is what it returns. Shaped attention starts at the
identity and may subtract; plain attention starts as an average over the past and cannot.</p>
<div class="colorbar"><div style="background:{gradient}"></div>
<p><span>−1</span><span>−¼</span><span>0</span><span>¼</span><span>1</span></p></div>
<div class="maps">{panels}</div>
<figcaption>Text, {length} bytes of the validation part:</figcaption>
<pre>{html.escape(result.map_text)}</pre>
</section>"""


def _map_panel(title: str, maps: torch.Tensor) -> str:
    layers, heads = maps.shape[:2]
    cells = ["<span></span>", *(f"<span>head {h + 1}</span>" for h in range(heads))]
    for layer in range(layers):
        cells.append(f'<span title="layer">{layer + 1}</span>')
        for head in range(heads):
            alt = html.escape(f"{title}: layer {layer + 1}, head {head + 1}")
            cells.append(f'<img alt="{alt}" src="{figures.matrix_image(maps[layer, head])}">')
    return (
        f"<figure><b>{html.escape(title)}</b>"
        f'<div class="grid-of-maps" style="grid-template-columns: 1.2rem repeat({heads}, 1fr)">'
        f"{''.join(cells)}</div></figure>"
    )


def _gains(result: DemoResult) -> str:
    gains = result.training.runs["shaped"].model.learned_gains()
    heads = len(gains[0]["identity_gain"])
    head_cells = "".join(f"<th>head {h + 1}</th>" for h in range(heads))
    tables_ = []
    for name in gains[0]:
        rows = "".join(
            f"<tr><th>layer {layer + 1}</th>{''.join(_gain_cell(x) for x in by_name[name])}</tr>"
            for layer, by_name in enumerate(gains)
        )
        tables_.append(
            f"<figure><b>{html.escape(label(name))}</b>"
            f"<table><tr><th></th>{head_cells}</tr>{rows}</table></figure>"
        )
    return f"""<section>
<h2>The gains it learned</h2>
<p>All started at 1; blue has grown, red has shrunk. Plain attention has 0, 1, 0 throughout.</p>
<div class="gains">{"".join(tables_)}</div>
</section>"""


def _gain_cell(gain: float) -> str:
    color = figures.POSITIVE_RGB if gain >= 1 else figures.NEGATIVE_RGB
    opacity = 0.55 * min(1.0, abs(gain - 1)) if math.isfinite(gain) else 0
    tint = f"rgba({color[0]},{color[1]},{color[2]},{opacity:.2f})"
    return f'<td style="background:{tint}">{gain:.2f}</td>'


def _samples(result: DemoResult) -> str:
    blocks = "".join(
        f'<figure><b class="{name}">{_TITLES[name]}</b>'
        f"<pre><b>{html.escape(result.prompt)}</b>{html.escape(result.samples[name])}</pre></figure>"
        for name in NAMES
    )
    return f"""<section>
<h2>What they write</h2>
<p>Both continue the same prompt (bold) at temperature 0.8, after {result.tokens:,} bytes of
training.</p>
<div class="charts">{blocks}</div>
</section>"""


def _setup(result: DemoResult) -> str:
    model, training, corpus = result.model_config, result.training_config, result.corpus
    text = (
        f"{corpus['source']}: {corpus['train_bytes']:,} bytes of {corpus['train_files']} files to "
        f"train on, {corpus['validation_bytes']:,} bytes of {corpus['validation_files']} other "
        "files to validate"
    )
    decoder = (
        f"{model.layers} pre-norm blocks, width {model.width}, {model.heads} heads, rotary "
        f"positions, context {model.length} bytes; a branch f is mixed in as {model.skip:.3f} x + "
        f"{model.branch:g} f(norm(x)), the squares adding to 1"
    )
    equal = (
        "initial weights (query weights zero, so that logits start at 0), scale 1 / √D, batches "
        "and their order, optimiser, schedule, steps, and the operator: plain attention calls it "
        "with fixed gains"
    )
    different = (
        "the gains: shaped learns identity, softmax and center gain per head, "
        f"{3 * model.layers * model.heads} numbers more than plain has"
    )
    optimiser = (
        f"AdamW, batch {training.batch}, learning rate {training.learning_rate:g}, of the gains "
        f"{training.gain_learning_rate:g}, betas {training.betas[0]:g} and {training.betas[1]:g}, "
        f"weight decay {training.weight_decay:g} on matrices, {training.warmup_share:.0%} "
        f"warm-up, cosine to {training.final_learning_rate_share:.0%}, gradients clipped at "
        f"{training.clip_norm:g}, seed {training.seed}"
        f"{', bfloat16 autocast' if training.autocast else ''}"
    )
    rows = [
        ("Text", text),
        ("Model", decoder),
        ("Equal", equal),
        ("Different", different),
        ("Optimiser", optimiser),
        ("Steps", f"{result.training.steps} of {result.training.planned_steps} planned"),
        ("Device", f"{result.device}, implementation {result.impl}"),
        ("Time", ", ".join(f"{name} {value:.0f} s" for name, value in result.seconds.items())),
    ]
    steps = result.training.steps or result.training.planned_steps
    reproduce = f"shaped-attn demo --steps {steps} --seed {training.seed}"
    return f"""<section>
<h2>How it was made</h2>
{_pairs(rows)}
<h3>Command</h3>
<pre>{html.escape(result.command)}</pre>
<p class="note">The same number of steps, whatever the speed of the machine:
<code>{html.escape(reproduce)}</code></p>
<h3>Environment</h3>
{_pairs(environment_lines(result.environment))}
</section>"""


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="text">{html.escape(text)}</td></tr>'
        for name, text in rows
    )
    return f'<div class="scroll"><table><tbody>{body}</tbody></table></div>'
