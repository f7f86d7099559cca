"use strict";
// Draws the page's figures from their data with the plotly.min.js that lies beside the index:
// first those in view, the others while the reader reads.

const plots = [...document.querySelectorAll("[data-figure]")];
const PAPER = 660; // pixels of a printed A4 page
const HEIGHT = 450; // of a figure that names none

const small = matchMedia("(max-width: 600px)").matches;
const specs = plots.map((plot) => {
  const { data, layout } = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
  const touched = small && { dragmode: false }; // a finger scrolls
  return { data, layout: { height: HEIGHT, ...layout, ...touched } };
});

function drawOne(i) {
  const plot = plots[i];
  if (plot.dataset.drawn) return;
  plot.dataset.drawn = true;
  Plotly.newPlot(plot, specs[i].data, specs[i].layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: !small && !plot.closest(".pictures"), // where it would hide titles
    showSendToCloud: false, // uploads
  });
}

function draw() {
  const inView = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) drawOne(plots.indexOf(target));
    }
  });
  for (const plot of plots) inView.observe(plot);
  const later = window.requestIdleCallback ?? setTimeout; // Safari has none
  let next = 0;
  const rest = () => {
    if (next >= plots.length) return;
    drawOne(next++);
    later(rest);
  };
  later(rest);
  const resize = (width) => plots.forEach((plot) => Plotly.relayout(plot, { width }));
  addEventListener("beforeprint", () => {
    plots.forEach((_, i) => drawOne(i));
    resize(PAPER);
  });
  addEventListener("afterprint", () => resize(null));
}

if (plots.length) {
  plots.forEach((plot, i) => (plot.style.height = `${specs[i].layout.height}px`)); // nothing jumps
  const library = document.createElement("script");
  library.src = document.body.dataset.plotly;
  library.addEventListener("load", draw);
  library.addEventListener("error", () => {
    for (const plot of plots) {
      plot.style.height = "";
      plot.textContent = "Not drawn: plotly.min.js is not beside the index.";
    }
  });
  document.head.append(library);
}
