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
