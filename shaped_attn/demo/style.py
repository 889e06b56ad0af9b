"""The page's style sheet: one column, readable on a phone, light or dark as the system is."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1d2733; --soft: #5b6875; --line: #dfe4ea; --panel: #f5f7f9;
  --shaped: #1666b8; --plain: #d2691e; --good: #1f7a3d; --bad: #c62f2b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12171d; --ink: #e4e9ee; --soft: #9aa7b4; --line: #2c3640; --panel: #1a2129;
    --shaped: #5aa9f5; --plain: #f0935a; --good: #5cc27e; --bad: #f2716c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 62rem; background: var(--paper);
  color: var(--ink); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .6rem 0; }
ul { padding-left: 1.2rem; }
.soft, figcaption, .note { color: var(--soft); }
.note, figcaption { font-size: .9rem; max-width: 46rem; }
sub, sup { line-height: 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .9em; }
.formula {
  padding: .8rem 1rem; background: var(--panel); border-radius: .5rem;
  font-family: Georgia, "Times New Roman", serif; font-size: 1.08rem;
}
.formula span { display: inline-block; }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0;
}
.card { background: var(--panel); border-radius: .6rem; padding: .8rem 1rem; }
.card > b {
  display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums;
}
.card span { color: var(--soft); font-size: .88rem; line-height: 1.4; display: block; }
.banner { border-left: 4px solid var(--bad); background: var(--panel); padding: .7rem 1rem; }
.charts {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr));
  gap: 1.2rem;
}
figure { margin: 0; min-width: 0; }
figure > b { font-size: .95rem; }
.chart { width: 100%; height: auto; display: block; }
.chart text { fill: var(--soft); font-size: 12.5px; font-family: inherit; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .level { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .6rem 0; }
.legend i {
  display: inline-block; width: 1.5rem; height: 0; border-top: 3px solid; margin-right: .45rem;
  vertical-align: .28em;
}
.legend .band { position: relative; height: .8rem; border: 0; vertical-align: -.12em; }
.legend .band::before, .legend .band::after {
  content: ""; position: absolute; inset: 0; background: currentColor;
}
.legend .band::before { opacity: .2; }
.legend .band::after { inset: calc(50% - 1px) 0; }
.legend .dots { border-top: 6px dotted; vertical-align: .1em; }
.ink { color: var(--ink); }
.shaped { color: var(--shaped); } .plain { color: var(--plain); }
.dashed { border-top-style: dashed !important; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th, tr.rule > * { border-bottom: 1px solid var(--line); }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
tr.composed td { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 700; }
.gains {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
  gap: 1.2rem;
}
.gains table { width: 100%; margin-top: .3rem; }
.gains th, .gains td { text-align: center; padding: .2rem .15rem; }
.gains td { border: 2px solid var(--paper); }
.gains th { font-weight: 400; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: var(--shaped); }
.maps {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr));
  gap: 1.6rem 2rem; margin: 1rem 0;
}
.grid-of-maps { display: grid; gap: 4px; align-items: center; margin-top: .3rem; }
.grid-of-maps img {
  width: 100%; display: block; image-rendering: pixelated; border: 1px solid var(--line);
}
.grid-of-maps span { font-size: .75rem; color: var(--soft); text-align: center; }
.colorbar { max-width: 26rem; margin: .8rem 0; font-size: .8rem; color: var(--soft); }
.colorbar div { height: .7rem; border: 1px solid var(--line); }
.colorbar p { display: flex; justify-content: space-between; margin: .15rem 0; }
pre {
  background: var(--panel); border-radius: .5rem; padding: .8rem 1rem; margin: .4rem 0;
  font-size: .82rem; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere;
}
pre b { font-weight: 700; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""
