"use strict";
(() => {
  const PAPER = 660, COLUMN = 310; // CSS pixels that fit on a page of A4 or Letter, and on half of it
  const config = { displayModeBar: false, responsive: true, doubleClick: false, showTips: false, typesetMath: false };
  const figures = [...document.querySelectorAll("script[data-plot]")];
  const drawn = [];

  // What does not fit is scrolled, and then has to be reachable with the keyboard.
  function reachable() {
    for (const box of document.querySelectorAll(".scroll")) {
      if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  }

  async function draw() {
    for (const script of figures) {
      const place = document.getElementById(script.dataset.plot);
      const { data, layout } = JSON.parse(script.textContent);
      await Plotly.newPlot(place, data, layout, config);
      drawn.push(place);
      await new Promise((done) => setTimeout(done)); // let the reader scroll meanwhile
    }
    reachable();
    document.documentElement.dataset.drawn = drawn.length;
  }

  let before = null;
  function toPaper() {
    if (before) return;
    before = [...document.querySelectorAll("details:not([open])")];
    for (const one of before) one.open = true;
    for (const place of drawn) {
      const room = place.closest(".narrow") ? COLUMN : PAPER;
      Plotly.relayout(place, { autosize: false, width: Math.min(room, place.offsetWidth || room) });
    }
  }
  function toScreen() {
    if (!before) return;
    for (const one of before) one.open = false;
    before = null;
    for (const place of drawn) Plotly.relayout(place, { autosize: true, width: null });
  }

  // Whoever follows a link to what is folded wants to see it.
  function unfold() {
    const place = document.getElementById(location.hash.slice(1));
    for (let one = place; one; one = one.parentElement) if (one.tagName == "DETAILS") one.open = true;
    if (place && place.tagName == "DETAILS") place.scrollIntoView();
  }

  addEventListener("hashchange", unfold);
  addEventListener("beforeprint", toPaper);
  addEventListener("afterprint", toScreen);
  addEventListener("resize", reachable);
  document.addEventListener("toggle", reachable, true);
  unfold();
  draw();
})();
