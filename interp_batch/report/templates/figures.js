"use strict";
// Draws the page's figures from their data with the plotly.min.js that lies beside the index.

const plots = [...document.querySelectorAll("[data-figure]")];
const PAPER = 660; // pixels of a printed A4 page
const HEIGHT = 450; // of a figure that names none

function draw() {
  const small = matchMedia("(max-width: 600px)").matches;
  for (const plot of plots) {
    const { data, layout } = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const shown = { height: HEIGHT, ...layout, ...(small && { dragmode: false }) }; // a finger scrolls
    if (plot.closest(".pictures")) { // where plotly would cut a long title, which stands above
      shown.title = undefined;
      shown.margin = { ...layout.margin, t: 20 };
      shown.height -= 40;
    }
    Plotly.newPlot(plot, data, shown, {
      responsive: true,
      displaylogo: false,
      displayModeBar: !small && !plot.closest(".pictures"), // where it would hide titles
      showSendToCloud: false, // uploads
    });
  }
  const resize = (width) => plots.forEach((plot) => Plotly.relayout(plot, { width }));
  addEventListener("beforeprint", () => resize(PAPER));
  addEventListener("afterprint", () => resize(null));
}

if (plots.length) {
  const library = document.createElement("script");
  library.src = document.body.dataset.plotly;
  library.addEventListener("load", draw);
  library.addEventListener("error", () => {
    for (const plot of plots) plot.textContent = "Not drawn: plotly.min.js is not beside the index.";
  });
  document.head.append(library);
}
