// Sliders, and arrow keys from token to token. Without this every dose is shown, one under another.
{
  const KEYS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

  const follow = (slider, steps) => {
    const shown = steps.find((step) => step.dataset.step === slider.value);
    for (const step of steps) step.classList.toggle("ik-away", step.dataset.step !== slider.value);
    slider.nextElementSibling.value = shown.dataset.label;
    slider.setAttribute("aria-valuetext", shown.dataset.label);
  };

  for (const slider of document.querySelectorAll(".ik-slider input:not([data-ready])")) {
    const view = slider.closest(".ik-view");
    const steps = [...view.querySelectorAll("[data-step]")];
    if (!steps.length) continue;
    slider.dataset.ready = view.dataset.stepped = "";
    slider.closest(".ik-slider").hidden = false;
    slider.addEventListener("input", () => follow(slider, steps));
    follow(slider, steps);
  }

  for (const text of document.querySelectorAll(".ik-text:not([data-ready])")) {
    const tokens = [...text.querySelectorAll(".ik-token")];
    text.dataset.ready = "";
    tokens.forEach((token, i) => (token.tabIndex = i ? -1 : 0)); // one stop for the tab key
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
