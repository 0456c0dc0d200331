const cards = [...document.querySelectorAll('article')], buttons = [...document.querySelectorAll('button')];
const words = document.querySelector('input'), shown = document.getElementById('shown');
let kind = '';
function filter() {
  const wanted = words.value.toLowerCase();
  let count = 0;
  for (const card of cards) {
    const kinds = card.dataset.kinds.split(' ');
    card.hidden = !((kind === '' || kinds.includes(kind)) && (!wanted || card.textContent.toLowerCase().includes(wanted)));
    count += !card.hidden;
  }
  for (const button of buttons) button.setAttribute('aria-pressed', button.dataset.kind === kind);
  shown.textContent = count;
}
for (const button of buttons) button.addEventListener('click', () => {
  kind = button.dataset.kind === kind ? '' : button.dataset.kind; filter();
});
words.addEventListener('input', filter);
addEventListener('hashchange', () => document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView());
