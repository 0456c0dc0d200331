const wanted = document.querySelector('input');
const conversations = [...document.querySelectorAll('.conversation')];
wanted.addEventListener('input', () => {
  const words = wanted.value.toLowerCase();
  for (const one of conversations) one.hidden = !one.textContent.toLowerCase().includes(words);
});
function open() {
  const chosen = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (chosen) { chosen.open = true; chosen.scrollIntoView(); }
}
addEventListener('hashchange', open); open();
