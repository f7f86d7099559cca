"use strict";
// What a reader chose, kept in the URL after "#", so that a link shows what its sender saw.

const state = {
  // Both are empty where the URL names a section ("#findings") or nothing.
  read: () => new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : ""),
  written: new URLSearchParams(),

  write(pairs) {
    state.written = new URLSearchParams(pairs.filter(([, value]) => value !== null));
    const chosen = state.written.toString();
    if (!chosen && !state.read().size) return; // nothing to write, or to take back
    history.replaceState(null, "", location.href.split("#")[0] + (chosen && `#${chosen}`));
  },

  // Another state in the URL is shown; a link to a section has scrolled, and the state comes back.
  follow(show) {
    addEventListener("hashchange", () => {
      if (location.hash.includes("=")) show();
      else if (`${state.written}`) history.replaceState(null, "", `#${state.written}`);
    });
  },

  // Says what the URL or a file names that is not there; text, never markup.
  missing(names) {
    const line = document.getElementById("missing");
    line.hidden = !names.length;
    line.textContent = names.length ? `Not in this report: ${names.join("; ")}.` : "";
  },
};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
