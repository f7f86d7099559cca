"use strict";
// Draws the page's figures from their data with the plotly.min.js that lies beside the index.

const plots = [...document.querySelectorAll("[data-figure]")];
const PAPER = 660; // pixels of a printed A4 page
const HEIGHT = 450; // of a figure that names none
const GLANCE = 330; // of a figure that the index opens with, at most
const LETTER = 8; // pixels of one in an axis title
const BESIDE_NAMES = 0.45; // of a figure's width, which names of bars leave to the bars
const NARROW = 60; // pixels beside axes on a phone; names of bars take more by themselves
const LONGEST = 24; // letters of a name below an axis
const small = matchMedia("(max-width: 600px)");
const dark = matchMedia("screen and (prefers-color-scheme: dark)"); // paper is light

// What stands on a dark page for the colours of figures, which are made for white.
function onDark() {
  const style = getComputedStyle(document.documentElement);
  const [paper, ink, zero, ...ends] = ["paper", "ink", "zero", "minus", "plus", "deep-minus", "deep-plus"]
    .map((name) => style.getPropertyValue(`--${name}`).trim());
  const pairs = { white: paper, black: ink, "#000000": ink, "#2a3f5f": ink,
    "#EBF0F8": zero, "#DFE8F3": zero, "#C8D4E3": zero };
  const scale = ({ zmin, texttemplate }) => {
    const [minus, plus] = texttemplate ? ends.slice(2) : ends; // plotly writes in white on the deep ones
    return zmin < 0 ? [[0, minus], [0.5, zero], [1, plus]] : [[0, zero], [1, minus]];
  };
  return { colours: new Map(Object.entries(pairs)), scale };
}

// Only what a figure names as a colour is exchanged: a token "black" keeps its name.
function figure(plot, scheme) {
  const text = document.getElementById(plot.dataset.figure).textContent;
  const { data, layout } = JSON.parse(text, (key, value) =>
    (/color$/.test(key) && scheme?.colours.get(value)) || value);
  for (const trace of scheme ? data : []) {
    if ("zmin" in trace) trace.colorscale = scheme.scale(trace);
  }
  const shown = { height: HEIGHT, ...layout, uirevision: "kept" }; // a reader's zoom
  if (small.matches) shown.dragmode = false; // a finger scrolls
  if (small.matches || plot.closest(".pictures")) tighten(plot, shown);
  return [data, shown];
}

// Plotly would cut a long title, which stands above, and those of axes; it has the legend below.
function tighten(plot, shown) {
  const { l = 80, b = 60 } = shown.margin ?? {};
  shown.title = undefined;
  shown.margin = { ...shown.margin, l: small.matches ? Math.min(l, NARROW) : l, t: 20 };
  shown.legend = { ...shown.legend, yref: "container", y: 0, yanchor: "bottom" };
  if (plot.closest(".pictures")) shown.height = Math.min(shown.height - 40, GLANCE);
  for (const [name, axis] of Object.entries(shown)) {
    if (!/^[xy]axis/.test(name)) continue;
    axis.ticktext = axis.ticktext?.map((text) => // pointing at a place shows all of it
      text.length > LONGEST ? `${text.slice(0, LONGEST)}…` : text);
    if (!axis.title?.text) continue;
    const [from, to] = axis.domain ?? [0, 1];
    const room = name[0] === "x" ? BESIDE_NAMES * plot.clientWidth : shown.height - b - 80;
    axis.title.text = wrapped(axis.title.text, (room * (to - from)) / LETTER);
  }
}

function wrapped(text, letters) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (!lines.at(-1) || longer.length <= letters) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines.join("<br>");
}

function draw(more = {}, scheme = dark.matches ? onDark() : null) {
  for (const plot of plots) {
    const [data, layout] = figure(plot, scheme);
    Plotly.react(plot, data, { autosize: true, ...layout, ...more }, {
      responsive: true,
      displaylogo: false,
      displayModeBar: !small.matches && !plot.closest(".pictures"), // where it would hide titles
      showSendToCloud: false, // uploads
    });
  }
}

if (plots.length) {
  const library = document.createElement("script");
  library.src = document.body.dataset.plotly;
  library.addEventListener("load", () => {
    draw();
    dark.addEventListener("change", () => draw());
    addEventListener("beforeprint", () => draw({ width: PAPER }, null));
    addEventListener("afterprint", () => draw());
  });
  library.addEventListener("error", () => {
    for (const plot of plots) plot.textContent = "Not drawn: plotly.min.js is not beside the index.";
  });
  document.head.append(library);
}
