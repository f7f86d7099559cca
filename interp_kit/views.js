// Sliders, and arrow keys from token to token. Without this every dose is shown, one under another.
{
  const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

  const follow = (slider, steps) => {
    const shown = steps.find((step) => step.dataset.step === slider.value);
    for (const step of steps) step.classList.toggle("ik-away", step.dataset.step !== slider.value);
    slider.nextElementSibling.value = shown.dataset.label;
    slider.setAttribute("aria-valuetext", shown.dataset.label);
  };

  const rove = (tokens) => {
    // One stop for the tab key; arrows go on from there.
    tokens.forEach((token, i) => (token.tabIndex = i ? -1 : 0));
  };

  for (const view of document.querySelectorAll(".ik-view:not([data-ready])")) {
    view.dataset.ready = "";
    const slider = view.querySelector(".ik-slider input");
    const steps = [...view.querySelectorAll("[data-step]")];
    if (slider && steps.length) {
      slider.closest(".ik-slider").hidden = false;
      slider.addEventListener("input", () => follow(slider, steps));
      follow(slider, steps);
    }
    for (const text of view.querySelectorAll(".ik-text")) {
      const tokens = [...text.querySelectorAll(".ik-token")];
      rove(tokens);
      text.addEventListener("keydown", (event) => {
        const next = tokens[tokens.indexOf(event.target) + KEYS[event.key]];
        if (!next) return;
        event.preventDefault();
        event.stopPropagation(); // Jupyter would select the next cell
        event.target.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    }
  }
}
