// Keys for what the buttons do. The page works without them.
"use strict";

document.documentElement.classList.add("keys");
let sent = false;

addEventListener("pageshow", () => { sent = false; });

// One answer per page: a second press, while the next page is on its way, is not for this one.
addEventListener("submit", (event) => {
  if (sent) event.preventDefault();
  sent = true;
  setTimeout(() => { sent = false; }, 3000);
});

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target instanceof Element && event.target.closest("input:not([type=hidden]), textarea, select")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const button = document.querySelector(`button[data-key="${CSS.escape(key)}"]`);
  if (!button) return;
  event.preventDefault();
  button.click();
});
