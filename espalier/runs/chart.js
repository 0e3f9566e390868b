"use strict";
// A chart of curves over steps as SVG. Nothing here knows of runs.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 230, LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24;

function make(parent, tag, text, attributes = {}) {
  const node = parent.namespaceURI === SVG || tag === "svg" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return parent.appendChild(node);
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e15) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

function tick(value) {
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= 10 * unit || (Math.abs(value) >= unit && value % unit === 0)) return Number((value / unit).toPrecision(4)) + letter;
  return short(value);
}

// Round numbers between two values; on a logarithmic axis 1, 2, 5 of each power of ten, or the powers alone.
function ticks(low, high, logarithmic, most) {
  const found = [];
  if (logarithmic) {
    const powers = Math.log10(high / low);
    if (powers > 0.7) {
      const steps = powers > most / 2 ? [1] : [1, 2, 5], every = Math.max(1, Math.ceil(powers / most));
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every)
        for (const step of steps) { const at = step * 10 ** power; if (at >= low * 0.999 && at <= high * 1.001) found.push(at); }
      return found;
    }
  }
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(one => one * power).find(one => one >= rough) || rough;
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number++) found.push(Number((number * step).toPrecision(12)));
  return found;
}

// Exponential moving mean, whose first values are not drawn towards zero (as Adam corrects its means).
function smooth(values, weight) {
  let mean = 0, whole = 0;
  return values.map(value => { mean = weight * mean + (1 - weight) * value; whole = weight * whole + (1 - weight); return mean / whole; });
}

// curves: [{name, colour, dash, marked, exact (never smoothed), steps, values}]; options: {logx, logy, smooth}.
function chart(figure, title, curves, options) {
  figure.replaceChildren();
  make(figure, "figcaption", title);
  const width = Math.max(240, Math.round(figure.clientWidth || 420));
  const svg = make(figure, "svg", null, {viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, tabindex: "0", role: "img"});
  const values = make(figure, "div", null, {class: "values", "aria-live": "polite"});
  const drawn = [];
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const curve of curves) {
    const keep = curve.steps.map((step, at) => at).filter(at => (!options.logx || curve.steps[at] > 0) && (!options.logy || curve.values[at] > 0));
    if (!keep.length) continue;
    const steps = keep.map(at => curve.steps[at]), raw = keep.map(at => curve.values[at]);
    const shown = options.smooth > 0 && !curve.marked && !curve.exact ? smooth(raw, options.smooth) : raw;
    drawn.push({...curve, steps, raw, shown});
    x0 = Math.min(x0, steps[0]); x1 = Math.max(x1, steps[steps.length - 1]);
    for (const value of shown) { y0 = Math.min(y0, value); y1 = Math.max(y1, value); }
  }
  svg.setAttribute("aria-label", `${title}, ${drawn.length} curves: ` + drawn.map(one => `${one.name} last ${short(one.raw[one.raw.length - 1])}`).join("; "));
  if (!drawn.length) { values.textContent = options.logy ? "nothing above 0" : "no values"; return; }
  if (x0 === x1) { x1 = x0 + 1; if (!options.logx) x0 = Math.max(0, x0 - 1); }
  if (y0 === y1) { const space = Math.abs(y0) * 0.1 || 1; y1 += space; if (!options.logy) y0 -= space; else y0 /= 1.1; }
  const px = options.logx ? Math.log : Number, py = options.logy ? Math.log : Number;
  const space = options.logy ? 0 : (y1 - y0) * 0.04;
  y0 -= space; y1 += space;
  const x = step => LEFT + (px(step) - px(x0)) / (px(x1) - px(x0)) * (width - LEFT - RIGHT);
  const y = value => Math.min(1e4, Math.max(-1e4, HEIGHT - BOTTOM - (py(value) - py(y0)) / (py(y1) - py(y0)) * (HEIGHT - TOP - BOTTOM)));
  for (const at of ticks(y0, y1, options.logy, 5)) {
    make(svg, "line", null, {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(at), y2: y(at)});
    make(svg, "text", tick(at), {x: LEFT - 6, y: y(at) + 4, "text-anchor": "end"});
  }
  for (const at of ticks(x0, x1, options.logx, width < 330 ? 4 : 6)) {
    if (!options.logx && at % 1) continue;
    const anchor = x(at) > width - 30 ? "end" : x(at) < LEFT + 12 ? "start" : "middle";
    make(svg, "text", tick(at), {x: x(at), y: HEIGHT - 6, "text-anchor": anchor});
  }
  const line = list => list.steps.map((step, at) => `${at ? "L" : "M"}${x(step).toFixed(1)} ${y(list.values[at]).toFixed(1)}`).join("");
  for (const one of drawn) {
    const style = `stroke:var(--k${one.colour})` + (one.dash ? `;stroke-dasharray:${one.dash}` : "");
    if (one.shown !== one.raw) make(svg, "path", null, {class: "pale", style, d: line({steps: one.steps, values: one.raw})});
    make(svg, "path", null, {class: "curve", style, d: line({steps: one.steps, values: one.shown})});
    if (one.marked || one.steps.length === 1)
      for (const [at, step] of one.steps.entries()) make(svg, "circle", null, {cx: x(step), cy: y(one.shown[at]), r: 2.6, style: `fill:var(--k${one.colour})`});
  }
  const cursor = make(svg, "line", null, {class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden"});
  const stops = [...new Set(drawn.flatMap(one => one.steps))].sort((a, b) => a - b);
  let at = null;
  function show(number) {
    at = number;
    values.replaceChildren();
    cursor.setAttribute("visibility", number === null ? "hidden" : "visible");
    if (number === null) return;
    const step = stops[number];
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
    make(values, "strong", `step ${step.toLocaleString("en")}`);
    for (const one of drawn) {
      const place = nearest(one.steps, step), far = one.steps[place] !== step;
      // A curve that does not reach this far has no value here.
      if (step > one.steps[one.steps.length - 1] && !one.marked && far) continue;
      const entry = make(values, "span");
      make(entry, "i", null, {class: "swatch", style: `color:var(--k${one.colour})`});
      const smoothed = one.shown !== one.raw ? ` (smoothed ${short(one.shown[place])})` : "";
      entry.append(`${one.name} ${short(one.raw[place])}${smoothed}` + (far ? ` at ${one.steps[place].toLocaleString("en")}` : ""));
    }
  }
  function pointed(event) {
    const box = svg.getBoundingClientRect(), share = Math.min(1, Math.max(0, ((event.clientX - box.left) / box.width * width - LEFT) / (width - LEFT - RIGHT)));
    const step = options.logx ? Math.exp(px(x0) + share * (px(x1) - px(x0))) : x0 + share * (x1 - x0);
    show(nearest(stops, step));
  }
  svg.addEventListener("pointermove", pointed);
  svg.addEventListener("pointerdown", pointed);
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") show(null); });
  svg.addEventListener("keydown", event => {
    const far = event.shiftKey ? 10 : 1, last = stops.length - 1;
    const to = {ArrowLeft: Math.max(0, (at ?? last + 1) - far), ArrowRight: Math.min(last, (at ?? -1) + far), Home: 0, End: last}[event.key];
    if (event.key === "Escape") show(null);
    else if (to !== undefined) { show(to); event.preventDefault(); }
  });
}

// The place in a sorted list that is nearest to a value.
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (list[middle] < value) low = middle + 1; else high = middle; }
  return low > 0 && value - list[low - 1] <= list[low] - value ? low - 1 : low;
}
