// The page of all runs. Whatever comes from runs is set as text, never as HTML.

const find = selector => document.querySelector(selector);
const COLOURS = 8, FIRST = 6, MOST_DRAWN = 40, CHARTS = 4;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "1 4"];
const ORDER = ["loss", "accuracy", "f1", "ndcg@10", "bits_per_byte", "perplexity"];
const LAST = ["learning_rate", "gradient_norm", "tokens_per_second", "mfu"];

let data = JSON.parse(find("#data").textContent);
const slots = new Map();  // name of a drawn run → the number of its colour and dash
const columns = new Set();  // settings and metrics that are columns: "setting:…", "metric:…"
let sorted = {key: "age", down: false};

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit}`;
  return `${Math.round(seconds)} s`;
}
const written = value => value === null || value === undefined ? "–" : typeof value === "boolean" ? (value ? "yes" : "no") : typeof value === "number" ? String(value) : value;
const look = name => { const slot = slots.get(name); return {colour: slot % COLOURS, dash: DASHES[Math.floor(slot / COLOURS) % DASHES.length]}; };

function draw(name, on) {
  if (!on) return slots.delete(name);
  if (slots.has(name) || slots.size >= MOST_DRAWN) return;
  const taken = new Set(slots.values());
  let free = 0;
  while (taken.has(free)) free++;
  slots.set(name, free);
}
const drawn = () => data.runs.filter(run => slots.has(run.name));

// Every word must be in the name, task, state or settings; "setting=value" must be that setting's value.
function matches(run, words) {
  return words.every(word => {
    const [name, value] = word.split("=");
    if (value !== undefined)
      return Object.entries(run.settings).some(([key, held]) => (key.toLowerCase() === name || key.toLowerCase().endsWith("." + name)) && String(written(held)).toLowerCase() === value);
    return `${run.name} ${run.task} ${run.title} ${run.state}`.toLowerCase().includes(word);
  });
}

const FIXED = [
  {key: "name", title: "name", of: run => run.name},
  {key: "task", title: "task", of: run => run.task},
  {key: "state", title: "state", of: run => run.state},
  {key: "step", title: "step", of: run => run.step, number: true},
  {key: "loss", title: "loss", of: run => run.loss, number: true},
  {key: "value", title: "metric", of: run => run.value, number: true},
  {key: "tokens_per_second", title: "tokens/s", of: run => run.tokens_per_second, number: true},
  {key: "age", title: "age", of: run => run.age, number: true},
];
function allColumns() {
  return [...FIXED, ...[...columns].map(key => {
    const at = key.indexOf(":"), kind = key.slice(0, at), name = key.slice(at + 1);
    if (kind === "setting") return {key, title: name, of: run => run.settings[name] ?? null};
    return {key, title: name, number: true, of: run => { const curve = run.curves[name]; return curve ? curve[1][curve[1].length - 1] : null; }};
  })];
}

function shown() {
  const words = find("#filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const column = allColumns().find(one => one.key === sorted.key) || FIXED[0];
  const rows = data.runs.filter(run => matches(run, words)).map(run => [run, column.of(run)]);
  const empty = value => value === null || value === undefined;
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true});
  // What is not known stands last in both directions.
  rows.sort(([, a], [, b]) => empty(a) || empty(b) ? empty(a) - empty(b) : compare(a, b) * (sorted.down ? -1 : 1));
  return rows.map(([run]) => run);
}

function drawTable() {
  const list = allColumns(), head = find("#table thead"), body = find("#table tbody"), rows = shown();
  const focused = document.activeElement?.dataset?.focus;
  head.replaceChildren(); body.replaceChildren();
  const top = make(head, "tr");
  make(top, "th", "draw");
  for (const column of list) {
    const cell = make(top, "th", null, {scope: "col", class: column.number ? "number" : /^(name|task|state)$/.test(column.key) ? column.key : ""});
    if (column.key === sorted.key) cell.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
    const button = make(cell, "button", column.title, {"data-sort": column.key, "data-focus": `sort ${column.key}`});
    button.onclick = () => { sorted = {key: column.key, down: sorted.key === column.key ? !sorted.down : false}; drawTable(); };
  }
  for (const run of rows) {
    const row = make(body, "tr", null, {"data-run": run.name});
    const choice = make(make(row, "td"), "label");
    const box = make(choice, "input", null, {type: "checkbox", "aria-label": `draw ${run.name}`, "data-focus": `draw ${run.name}`});
    box.checked = slots.has(run.name);
    if (box.checked) make(choice, "i", null, {class: "swatch", style: `color:var(--k${look(run.name).colour})`});
    box.onchange = () => { draw(run.name, box.checked); render(); };
    for (const column of list) {
      const cell = make(row, "td", null, {class: column.number ? "number" : column.key.includes(":") ? "long" : column.key, dir: "auto"});
      if (column.key === "name") {
        if (run.report) make(cell, "a", run.name, {href: run.report, title: run.path});
        else { cell.textContent = run.name; cell.title = run.path; }
        if (run.title) make(cell, "small", run.title);
      } else if (column.key === "state") {
        make(cell, "span", run.state, {class: `badge ${run.state}`});
        if (run.left !== null) make(cell, "small", `${duration(run.left)} left`);
        if (run.note) make(cell, "small", run.note);
      } else if (column.key === "step") cell.textContent = run.step.toLocaleString("en") + (run.steps ? ` / ${run.steps.toLocaleString("en")}` : "");
      else if (column.key === "value") { cell.textContent = short(run.value); if (run.metric) make(cell, "small", (run.metric === "loss" ? "held-out " : "") + run.metric); }
      else if (column.key === "age") cell.textContent = duration(run.age);
      else { const value = column.of(run); cell.textContent = column.number ? short(value) : written(value); }
    }
  }
  find("#count").textContent = `${rows.length} of ${data.runs.length} runs, ${slots.size} drawn` + (slots.size >= MOST_DRAWN ? ` (at most ${MOST_DRAWN})` : "");
  // The table is made anew, and the keyboard stays where it was.
  if (focused) [...document.querySelectorAll("[data-focus]")].find(node => node.dataset.focus === focused)?.focus({preventScroll: true});
}

function differing(runs) {
  const names = [...new Set(runs.flatMap(run => Object.keys(run.settings)))];
  return names.filter(name => new Set(runs.map(run => JSON.stringify(run.settings[name] ?? null))).size > 1);
}

function drawChoices() {
  const at = find("#choices");
  at.replaceChildren();
  const names = [...differing(data.runs).map(name => `setting:${name}`), ...[...new Set(data.runs.flatMap(run => Object.keys(run.curves)))].sort().map(name => `metric:${name}`)];
  for (const key of names) {
    const label = make(at, "label"), box = make(label, "input", null, {type: "checkbox", "data-column": key});
    box.checked = columns.has(key);
    box.onchange = () => { box.checked ? columns.add(key) : columns.delete(key); drawTable(); };
    label.append(key.slice(key.indexOf(":") + 1) + (key.startsWith("metric:") ? " (last)" : ""));
  }
}

function drawCharts() {
  const runs = drawn(), options = {logx: find("#logx").checked, logy: find("#logy").checked, smooth: Number(find("#smooth").value)};
  const place = name => ORDER.includes(name) ? ORDER.indexOf(name) : LAST.includes(name) ? 100 + LAST.indexOf(name) : 50;
  const names = [...new Set(runs.flatMap(run => Object.keys(run.curves)).map(name => name.replace(/^eval\//, "")))].sort((a, b) => place(a) - place(b) || a.localeCompare(b));
  find("#legend").replaceChildren();
  for (const run of runs) {
    const entry = make(find("#legend"), "li", null, {dir: "auto"});
    make(entry, "i", null, {style: `color:var(--k${look(run.name).colour});border-top-style:${look(run.name).dash ? "dashed" : "solid"}`});
    entry.append(run.name);
  }
  const parts = [[find("#charts"), names.slice(0, CHARTS)], [find("#others"), names.slice(CHARTS)]];
  find("#more").hidden = names.length <= CHARTS;
  find("#more summary").textContent = `${names.length - CHARTS} more: ${names.slice(CHARTS).join(", ")}`;
  for (const [parent, metrics] of parts) {
    if (parent.id === "others" && !find("#more").open) { parent.replaceChildren(); continue; }
    // Figures stay where they are, so that the one that is looked at keeps the keyboard.
    while (parent.children.length > metrics.length) parent.lastChild.remove();
    while (parent.children.length < metrics.length) make(parent, "figure");
    metrics.forEach((metric, at) => {
      const curves = [];
      for (const run of runs)
        for (const [name, marked] of [[metric, false], [`eval/${metric}`, true]])
          if (run.curves[name]) curves.push({name: run.name + (marked ? ", held-out" : ""), marked, exact: metric.endsWith("learning_rate"), steps: run.curves[name][0], values: run.curves[name][1], ...look(run.name)});
      const figure = parent.children[at], focused = figure.contains(document.activeElement);
      // Who reads values off a chart is not disturbed by the next line of a run that goes on.
      if (refreshing && (focused || figure.matches(":hover"))) return;
      chart(figure, metric.replaceAll("_", " "), curves, options);
      figure.dataset.metric = metric;
      if (focused) figure.querySelector("svg").focus({preventScroll: true});
    });
  }
  if (!runs.length) make(find("#charts"), "p", "Choose runs in the table.", {class: "soft"});
}

function drawDiffering() {
  const runs = drawn(), names = runs.length > 1 ? differing(runs) : [];
  find("#differ").hidden = !names.length;
  const head = find("#differ thead"), body = find("#differ tbody");
  head.replaceChildren(); body.replaceChildren();
  const top = make(head, "tr");
  make(top, "th", "setting");
  for (const run of runs) {
    const cell = make(top, "th", null, {scope: "col", dir: "auto"});
    make(cell, "i", null, {class: "swatch", style: `color:var(--k${look(run.name).colour})`});
    cell.append(run.name);
  }
  for (const name of names) {
    const row = make(body, "tr");
    make(row, "th", name, {scope: "row"});
    for (const run of runs) make(row, "td", written(run.settings[name]), {class: "long", dir: "auto"});
  }
}

function drawSamples() {
  const at = find("#samples div"), runs = drawn().filter(run => run.samples.length);
  find("#samples").hidden = !runs.length;
  const open = new Set([...at.querySelectorAll("details[open]")].map(one => one.dataset.run));
  at.replaceChildren();
  for (const run of runs) {
    const part = make(at, "details", null, {"data-run": run.name});
    part.open = open.has(run.name);
    make(part, "summary", run.name);
    for (const text of run.samples) make(part, "blockquote", text, {dir: "auto"});
  }
}

function drawGoing() {
  const at = find("#going");
  at.replaceChildren();
  for (const run of data.runs.filter(run => run.state === "running")) {
    const card = make(at, "div", null, {"data-run": run.name});
    make(make(card, "p"), "strong", run.name, {dir: "auto"});
    if (run.steps) { const bar = make(card, "progress", null, {max: run.steps, "aria-label": `steps of ${run.name}`}); bar.value = run.step; }
    make(card, "p", `step ${run.step.toLocaleString("en")}` + (run.steps ? ` of ${run.steps.toLocaleString("en")}` : "") + (run.left !== null ? `, ${duration(run.left)} left` : ""));
    make(card, "p", `loss ${short(run.loss)} · ${short(run.tokens_per_second)} tokens/s · last line ${duration(run.age)} ago`, {class: "soft"});
    if (run.note) make(card, "p", run.note, {class: "soft"});
  }
}

function drawHead() {
  const going = data.runs.filter(run => run.state === "running").length;
  find("#sub").textContent = `${data.folder}: ${data.runs.length} runs, ${going} running` + (data.live ? "" : `, as of ${new Date(data.time * 1000).toLocaleString()}`);
  const at = find("#problems");
  at.replaceChildren();
  for (const line of data.problems) make(at, "p", line, {class: "warn"});
}

let refreshing = false;
function render() {
  drawHead(); drawGoing(); drawTable(); drawCharts(); drawDiffering(); drawSamples();
  document.body.dataset.rendered = Number(document.body.dataset.rendered || 0) + 1;
}

for (const id of ["logx", "logy"]) find("#" + id).onchange = drawCharts;
find("#smooth").oninput = () => { find("#smoothed").textContent = find("#smooth").value; drawCharts(); };
find("#filter").oninput = drawTable;
find("#all").onclick = () => { slots.clear(); shown().slice(0, MOST_DRAWN).forEach(run => draw(run.name, true)); render(); };
find("#none").onclick = () => { slots.clear(); render(); };
find("#more").ontoggle = drawCharts;
find("#columns").ontoggle = drawChoices;
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawCharts(); } });

// At first the newest run with curves, and those of its task.
const newest = data.runs.find(run => Object.keys(run.curves).length);
data.runs.filter(run => newest && run.task === newest.task && Object.keys(run.curves).length).slice(0, FIRST).forEach(run => draw(run.name, true));
render();

async function follow() {
  let failed = null;
  try {
    const answer = await fetch(`data?since=${data.version}&server=${data.server}`);
    if (!answer.ok) throw new Error(answer.statusText);
    const news = await answer.json();
    const before = new Map((news.server === data.server ? data.runs : []).map(run => [run.name, run]));
    for (const run of news.runs) before.set(run.name, run);
    const runs = news.order.filter(brief => before.has(brief.name)).map(brief => ({...before.get(brief.name), ...brief}));
    const changed = news.runs.length || runs.length !== data.runs.length || JSON.stringify(news.problems) !== JSON.stringify(data.problems);
    for (const run of runs) if (!data.runs.some(old => old.name === run.name) && run.state === "running") draw(run.name, true);
    data = {...data, ...news, folder: data.folder, runs};
    for (const name of [...slots.keys()]) if (!runs.some(run => run.name === name)) slots.delete(name);
    refreshing = true;
    if (changed || failedBefore) render(); else { drawGoing(); drawHead(); }
  } catch (error) {
    failed = "The server does not answer; trying again.";
    find("#problems").replaceChildren();
    make(find("#problems"), "p", failed, {class: "warn"});
  } finally { refreshing = false; }
  failedBefore = failed !== null;
  setTimeout(follow, failed ? 5000 : 2000);
}
let failedBefore = false;
if (data.live) setTimeout(follow, 2000);
