"""The look of a report's page: one style sheet, for screens, phones and paper, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1d2329; --quiet: #5b6570; --rule: #d9dcdd; --grid: #e3e5e6;
  --panel: #f4f5f2; --link: #0b5a92;
  --adamw: #0072b2; --muon: #d55e00;
  --supported: #1a7f4b; --refuted: #b3312c; --inconclusive: #7a6a2f; --warning: #9a5b00;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #dfe3e6; --quiet: #98a2ab; --rule: #343a40; --grid: #2b3136;
    --panel: #1d2125; --link: #7cbcec;
    --adamw: #56b0e6; --muon: #f0883e;
    --supported: #4cc283; --refuted: #f0766f; --inconclusive: #cdb566; --warning: #e0a44a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 var(--serif); overflow-wrap: break-word; }
header, main, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 3.2rem; }
h1 { font-size: clamp(1.7rem, 1.2rem + 2.2vw, 2.5rem); line-height: 1.15; margin: 0 0 .6rem;
  font-weight: 600; letter-spacing: -.012em; text-wrap: balance; max-width: 46rem; }
h2 { font-size: 1.45rem; line-height: 1.25; font-weight: 600; margin: 0 0 .9rem; }
h3 { font-size: 1.16rem; line-height: 1.3; margin: 0; font-weight: 600; }
p { margin: 0 0 1rem; max-width: 44rem; text-wrap: pretty; }
.subtitle { color: var(--quiet); font: .95rem/1.5 var(--sans); max-width: 46rem; }
nav { font: .88rem/1.9 var(--sans); border-block: 1px solid var(--rule); margin-top: 1.6rem;
  padding: .45rem 0; display: flex; flex-wrap: wrap; column-gap: 1.2rem; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
section { padding: 2.4rem 0 .4rem; }
section + section { border-top: 1px solid var(--rule); }
ul { margin: 0 0 1rem; padding-left: 1.15rem; max-width: 46rem; }
li { margin: .25rem 0; }
.notes { font: .9rem/1.5 var(--sans); }
.warning { list-style: none; padding: .7rem 1rem .7rem; max-width: none;
  background: var(--panel); border-left: 3px solid var(--warning); }

.verdict { border: 1px solid var(--rule); border-top: 3px solid var(--tone); border-radius: 3px;
  margin: 0 0 1.4rem; padding: 1.1rem 1.3rem .3rem; break-inside: avoid-page; }
.verdict header { all: unset; display: flex; flex-wrap: wrap; align-items: baseline;
  gap: .3rem .8rem; }
.verdict > p { max-width: 52rem; }
.verdict .question { color: var(--quiet); font-style: italic; margin: .15rem 0 .6rem; }
.verdict .reason { margin-bottom: .6rem; }
.supported { --tone: var(--supported); }
.refuted { --tone: var(--refuted); }
.inconclusive { --tone: var(--inconclusive); }
.status { font: 600 .78rem/1 var(--sans); letter-spacing: .03em; color: var(--tone);
  border: 1px solid; border-radius: .9em; padding: .26em .7em .3em; }
.facts { font: .82rem/1.5 var(--sans); color: var(--quiet); margin: 0 0 .4rem; }
.clause { display: grid; grid-template-columns: minmax(0, 1fr) 17.5rem; gap: .2rem 1.6rem;
  border-top: 1px solid var(--rule); padding: .75rem 0; font: .88rem/1.5 var(--sans);
  break-inside: avoid; }
.clause p { margin: 0 0 .25rem; max-width: none; }
.clause .status { font-size: .68rem; margin-left: .4rem; }
.clause strong { font-weight: 600; }
.clause .because { color: var(--tone); }
.clause dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 0 .8rem; margin: 0;
  color: var(--quiet); font-size: .78rem; font-variant-numeric: tabular-nums; }
.clause dt { white-space: nowrap; }
.clause dd { margin: 0; color: var(--ink); }
.clause ul { margin: .1rem 0 .3rem; color: var(--quiet); font-size: .8rem; }
.aside { color: var(--quiet); font: 600 .75rem/1 var(--sans); letter-spacing: .05em;
  text-transform: uppercase; margin: .9rem 0 .5rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; font-family: var(--sans); }
svg text { fill: currentColor; }
.interval { max-width: 17.5rem; font-size: 10.5px; }
.interval text { fill: var(--quiet); }
.interval .zero { stroke: var(--quiet); stroke-width: 1; }
.interval .sesoi { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 3 2.5; }
.interval .paired { stroke: var(--tone); stroke-width: 1.4; }
.interval .pooled { stroke: var(--tone); stroke-width: 6; stroke-linecap: round; opacity: .38; }
.interval .estimate { stroke: var(--tone); stroke-width: 2.6; }
.interval .seed { fill: var(--paper); stroke: var(--tone); stroke-width: 1.5; }
.interval .arrow { fill: var(--tone); }

figure { margin: 0 0 1.8rem; }
figcaption, .caption { font: .86rem/1.45 var(--sans); color: var(--quiet); text-align: left;
  max-width: 52rem; margin-bottom: .6rem; }
.charts { display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(2, minmax(0, 27rem)); }
.of-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.chart h3 { font: 600 .88rem/1.35 var(--sans); margin: 0 0 .35rem; }
.chart { break-inside: avoid; margin: 0; max-width: 30rem;
  display: flex; flex-direction: column; justify-content: space-between; }

.table { overflow-x: auto; margin: 0 0 .5rem; }
table { border-collapse: collapse; font: .86rem/1.4 var(--sans); font-variant-numeric: tabular-nums;
  min-width: min(100%, 34rem); }
thead th { font-weight: 600; min-width: 4.6em; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink);  border-top: 1.5px solid var(--ink); }
th, td { padding: .34rem .8rem .34rem 0; text-align: right; font-weight: 400; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr { border-bottom: 1px solid var(--grid); }
tbody tr:last-child { border-bottom: 1.5px solid var(--ink); }
.left { text-align: left; }
td, tbody th { vertical-align: top; }
tr.strong > * { font-weight: 600; }
.tight { white-space: nowrap; }
.table-notes { font: .8rem/1.45 var(--sans); color: var(--quiet); max-width: 52rem;
  margin: 0 0 1.6rem; }
.space { margin-bottom: 1.4rem; }
pre { font: .78rem/1.55 var(--mono); background: var(--panel); padding: .8rem 1rem;
  overflow-x: auto; border-radius: 3px; margin: 0 0 1.2rem; }
code { font: .9em var(--mono); }
footer { color: var(--quiet); font: .82rem/1.5 var(--sans); padding-block: 1.2rem 3rem; }

@media (max-width: 60rem) { .of-3 { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 44rem) {
  .charts { grid-template-columns: minmax(0, 1fr); }
  .chart { max-width: none; }
  body { font-size: 1rem; }
  header, main, footer { padding-inline: 1rem; }
  header { padding-top: 1.8rem; }
  .clause { grid-template-columns: minmax(0, 1fr); }
  .verdict { padding-inline: .9rem; }
  section { padding-top: 1.8rem; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --quiet: #444; --rule: #bbb;
    --grid: #ddd; --panel: #f5f5f5; --link: #000; --adamw: #0072b2; --muon: #d55e00;
    --supported: #14643b; --refuted: #96261f; --inconclusive: #5d5123; --warning: #7a4800; }
  html { font-size: 11px; }
  nav { display: none; }
  .verdict { break-inside: auto; }
  .charts.of-3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  header, main, footer { max-width: none; padding-inline: 0; }
  .table { overflow: visible; }
  table { min-width: 0; }
  .tight { white-space: normal; }
  pre { white-space: pre-wrap; }
  h2, h3, figcaption, .caption { break-after: avoid; }
}
"""
