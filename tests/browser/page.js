// What tests/browser/test_page.py asks of a page: functions that return plain data.

// The pictures that did not decode.
function brokenPictures() {
  return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).map(i => i.alt);
}

// Tables, figures and text that make the whole page scroll sideways.
function wideElements() {
  const width = document.documentElement.clientWidth;
  const inScroller = e => e.closest(".scroll, figure.chart") !== null;
  return [...document.querySelectorAll("main *")]
    .filter(e => !inScroller(e) && e.getBoundingClientRect().right > width + 1)
    .map(e => e.outerHTML.slice(0, 80));
}

// Scroll containers that hold more than they show, and whether they can be scrolled to its end.
function scrollers() {
  return [...document.querySelectorAll(".scroll, figure.chart")]
    .filter(e => e.scrollWidth > e.clientWidth)
    .map(e => {
      e.scrollLeft = e.scrollWidth;
      const reached = e.scrollLeft + e.clientWidth >= e.scrollWidth - 1;
      e.scrollLeft = 0;
      return reached;
    });
}

function channels(colour) {
  const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
  return {r, g, b, a};
}

// https://www.w3.org/TR/WCAG22/#dfn-relative-luminance
function luminance({r, g, b}) {
  const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}

function background(element) {
  for (let e = element; e; e = e.parentElement) {
    const colour = channels(getComputedStyle(e).backgroundColor);
    if (colour.a === 1) return colour;
  }
  return {r: 255, g: 255, b: 255};
}

// The lowest contrast of text with what is behind it, and where.
function lowestContrast() {
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  let worst = {ratio: Infinity, text: ""};
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.textContent.trim()) continue;
    const element = node.parentElement;
    const pair = [luminance(channels(getComputedStyle(element).color)), luminance(background(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < worst.ratio) worst = {ratio, text: node.textContent.trim().slice(0, 60)};
  }
  return worst;
}

// The smallest letters of a table, in pixels.
function smallestTableText() {
  return Math.min(...[...document.querySelectorAll("td, th")].map(e => parseFloat(getComputedStyle(e).fontSize)));
}

// The box of an element on the page, after scrolling to it.
function boxOf(element) {
  element.scrollIntoView({block: "center", behavior: "instant"});
  const {x, y, width, height} = element.getBoundingClientRect();
  return {x: x + scrollX, y: y + scrollY, width, height};
}

// The middle of an element in the window, after scrolling to it.
function middleOf(element) {
  element.scrollIntoView({block: "center", behavior: "instant"});
  const {x, y, width, height} = element.getBoundingClientRect();
  return {x: x + Math.min(width / 2, 40), y: y + height / 2};
}
