"""Style sheet and script of the comparison page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5d6675; --line: #d9dde4; --paper: #ffffff; --panel: #f7f8fa;
  --heat: 190, 60, 40; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a3acba; --line: #39404c; --paper: #14171c;
  --panel: #1c2027; --heat: 235, 110, 80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto 4rem;
  max-width: 1480px; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .7rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p, li { color: var(--soft); margin: .2rem 0; } ul { padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; margin: 1rem 0; }
th, td { padding: .26rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; } td.text, th.text, .errors th:first-child { text-align: left; }
.sorted th { cursor: pointer; } .sorted th:hover { text-decoration: underline; }
td.best { font-weight: 700; } td small { color: var(--soft); font-size: .8em; font-weight: 400; }
.mark { color: var(--soft); } .mark.first { color: inherit; font-weight: 700; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em;
  background: var(--c, #8a93a3); }
.ramp { display: inline-block; width: 9em; height: .7em; border-radius: .35em; margin: 0 .5em;
  background: var(--c); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; min-width: 0; }
.panel.wide { grid-column: 1 / -1; }
.panel p { max-width: 46em; font-size: .82rem; } .panel svg { display: block; width: 100%; height: auto; }
.panel:not(.wide) svg { max-width: 560px; } .panel.wide svg { max-width: 1400px; min-width: 880px; }
.panel table { margin: .3rem 0; } .errors th { white-space: normal; text-align: center; vertical-align: bottom; }
.errors th:first-child { white-space: nowrap; font-weight: 400; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); font-size: 12px; }
.halo { paint-order: stroke; stroke: var(--panel); stroke-width: 4px; stroke-linejoin: round; }
.axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--line); fill: none; }
.line { stroke: var(--c, #8a93a3); fill: none; stroke-width: 1.6; } .wide-line { stroke-width: 2.2; }
.mean { stroke: #8a93a3; stroke-width: 2.4; } .ahead { stroke-dasharray: 5 4; } .join { stroke: #8a93a3; stroke-width: .8;
  opacity: .7; }
.hit { stroke: transparent; fill: none; stroke-width: 11; }
.dot { fill: var(--c, #8a93a3); stroke: var(--panel); stroke-width: 1; }
.heat { background: rgba(var(--heat), calc(var(--h) * .75)); text-align: center; }
.chosen .line[data-run]:not(.on), .chosen .dot[data-run]:not(.on) { opacity: .13; }
.chosen .join { opacity: .15; } .chosen .line.on { stroke-width: 3; } tr.on { background: rgba(120, 140, 180, .22); }
@media (prefers-color-scheme: dark) { .line { stroke: var(--d, #8a93a3); } .mean, .join { stroke: #8a93a3; }
  .dot { fill: var(--d, #8a93a3); } .swatch { background: var(--d, #8a93a3); } .ramp { background: var(--d); } }
#words { position: fixed; left: 0; right: 0; bottom: 0; padding: .45rem 1.5rem; background: var(--panel); color: var(--ink);
  border-top: 1px solid var(--line); font-size: .85rem; visibility: hidden; } .chosen #words { visibility: visible; }
"""

SCRIPT = """
const marks = document.querySelectorAll('[data-run]'), words = document.getElementById('words');
const rows = document.querySelectorAll('.sorted tr[data-run]');
const told = new Map([...rows].map(row => [row.dataset.run, row.title]));
let kept = null;
function choose(run) {
  document.body.classList.toggle('chosen', run !== null);
  for (const mark of marks) mark.classList.toggle('on', mark.dataset.run === run);
  words.textContent = run === null ? '' : told.get(run) ?? run;
}
for (const mark of marks) {
  mark.addEventListener('mouseenter', () => choose(mark.dataset.run));
  mark.addEventListener('mouseleave', () => choose(kept));
  mark.addEventListener('click', () => { kept = kept === mark.dataset.run ? null : mark.dataset.run; choose(kept); });
}
document.addEventListener('keydown', event => { if (event.key === 'Escape') choose(kept = null); });
// A click on a heading sorts by it, a second one the other way; what is not known comes last.
document.querySelectorAll('.sorted th').forEach((head, column) => head.addEventListener('click', () => {
  const up = head.dataset.up !== 'yes';
  head.dataset.up = up ? 'yes' : 'no';
  const value = row => { const v = row.cells[column].dataset.value; return v === '' || isNaN(v) ? v : Number(v); };
  const order = [...rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    const by = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
    return up ? by : -by;
  });
  order.forEach(row => row.parentNode.append(row));
}));
"""
