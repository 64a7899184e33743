// The live page: a stream of parts, each drawn from text alone. Nothing that a part says is ever read as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "8 3 2 3"];
const STATES = new Set(["answered", "refused", "late", "lost", "rejected", "failed", "none"]);
const parts = document.getElementById("parts");
const status = document.getElementById("state");
const form = document.getElementById("ask");

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function draw(name, attributes, text = "") {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.textContent = text;
  return element;
}

function say(text) { if (status.textContent !== text) status.textContent = text; }

function set(element, text) { if (element.textContent !== text) element.textContent = text; }

// As many children as there are items, each brought up to date in place, so that focus and scrolling stay.
function fit(parent, items, create, update) {
  while (parent.children.length > items.length) parent.lastElementChild.remove();
  items.forEach((item, index) => {
    if (index === parent.children.length) parent.append(create(item));
    update(parent.children[index], item);
  });
}

function fillCell(cell, content) {
  const { text, state = "", share = null } = typeof content === "string" ? { text: content } : content;
  const style = STATES.has(state) ? state : "";
  cell.className = [cell.dataset.kind, style && "state", style].filter(Boolean).join(" ");
  if (share === null) {
    set(cell, text);
    return;
  }
  if (!cell.querySelector(".gauge")) cell.replaceChildren(make("span"), make("div", { class: "gauge" }, make("i")));
  set(cell.firstChild, text);
  const gauge = cell.lastChild;
  gauge.setAttribute("role", "meter");
  gauge.setAttribute("aria-valuemin", "0");
  gauge.setAttribute("aria-valuemax", "100");
  gauge.setAttribute("aria-valuenow", String(Math.round(100 * share)));
  gauge.setAttribute("aria-label", "share of the cap");
  gauge.firstChild.className = share > 0.9 ? "high" : "";
  gauge.firstChild.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
}

function drawTable(body, part) {
  if (!body.firstChild) {
    const table = make("table", {}, make("thead", {}, make("tr")), make("tbody"));
    body.append(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": part.title }, table));
    body.append(make("p", { class: "soft" }));
  }
  const table = body.querySelector("table");
  const kinds = part.columns.map((column) => column.kind || "");
  fit(table.tHead.rows[0], part.columns, () => make("th", { scope: "col" }), (cell, column) => {
    cell.className = column.kind || "";
    set(cell, column.name);
  });
  fit(table.tBodies[0], part.rows, () => make("tr"), (row, cells) => {
    fit(row, cells, () => make(row.children.length ? "td" : "th"), (cell, content) => {
      const index = [...row.children].indexOf(cell);
      if (index === 0) cell.setAttribute("scope", "row");
      cell.dataset.kind = kinds[index] || "";
      fillCell(cell, content);
    });
  });
  set(body.lastChild, part.rows.length ? part.note || "" : part.empty || part.note || "none");
  body.firstChild.hidden = !part.rows.length;
}

function drawFacts(body, part) {
  if (!body.firstChild) body.append(make("dl"));
  const pairs = part.rows.flatMap(([name, value]) => [["dt", name], ["dd", value]]);
  fit(body.firstChild, pairs, ([kind]) => make(kind), (element, [, content]) => fillCell(element, content));
}

function drawLines(body, part) {
  if (!body.firstChild) body.append(make("ul", { class: "lines", tabindex: "0", "aria-label": part.title }), make("p", { class: "soft" }));
  fit(body.firstChild, part.lines, () => make("li"), (item, [text, state]) => {
    item.className = STATES.has(state) ? state : "";
    set(item, text);
  });
  body.firstChild.hidden = !part.lines.length;
  set(body.lastChild, part.lines.length ? part.note || "" : part.empty || "none");
}

function steps(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

function short(value) {
  return Number.isInteger(value) && Math.abs(value) < 1e6 ? String(value) : String(Number(value.toPrecision(3)));
}

function drawChart(body, part) {
  const width = 460, height = 260, left = 52, right = 12, top = 10, bottom = 40;
  const points = part.series.flatMap((series) => series.points);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", class: "chart", "aria-label": part.label });
  svg.append(draw("title", {}, part.label));
  let [low, high] = [Math.min(0, ...points.map((point) => point[1])), Math.max(...points.map((point) => point[1]))];
  const limits = (part.limits || []).filter((limit) => limit.value <= 4 * high || high <= 0);
  high = Math.max(high, ...limits.map((limit) => limit.value));
  if (high <= low) high = low + 1;
  high += 0.06 * (high - low);
  let [first, last] = [Math.min(...points.map((point) => point[0])), Math.max(...points.map((point) => point[0]))];
  if (first === last) [first, last] = [first - 1, last + 1];
  const x = (value) => left + ((value - first) / (last - first)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  for (const value of steps(low, high, 5)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of steps(first, last, 6).filter(Number.isInteger)) {
    const isAtEdge = x(value) > width - right - 16; // where half of the number would be cut off
    const place = isAtEdge ? { x: width - 1, "text-anchor": "end" } : { x: x(value), "text-anchor": "middle" };
    svg.append(draw("text", { ...place, y: height - bottom + 16 }, short(value)));
  }
  svg.append(draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, part.x));
  for (const limit of limits) {
    svg.append(draw("line", { class: "limit", x1: left, x2: width - right, y1: y(limit.value), y2: y(limit.value) }));
    svg.append(draw("text", { x: width - right, y: y(limit.value) - 4, "text-anchor": "end" }, limit.name));
  }
  const legend = make("div", { class: "legend" });
  part.series.forEach((series, index) => {
    const look = { stroke: `var(--series-${(index % 6) + 1})`, "stroke-dasharray": DASHES[index % DASHES.length], class: "curve" };
    svg.append(draw("polyline", { ...look, points: series.points.map((point) => `${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join(" ") }));
    const newest = series.points.at(-1);
    svg.append(draw("circle", { cx: x(newest[0]), cy: y(newest[1]), r: 3, fill: look.stroke }));
    const sample = draw("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" });
    sample.append(draw("line", { ...look, x1: 0, x2: 30, y1: 5, y2: 5 }));
    legend.append(make("span", {}, make("b", { class: "line" }, sample), series.name));
  });
  body.replaceChildren(svg, ...(part.series.length > 1 ? [legend] : []), make("p", { class: "soft" }, part.note || ""));
}

const pictures = new Map();

async function drawPictures(body, part) {
  if (!body.firstChild) body.append(make("div", { class: "pictures" }));
  fit(body.firstChild, part.pictures, () => make("figure", {}, make("figcaption"), make("img")), (figure, picture) => {
    set(figure.firstChild, picture.caption);
    figure.lastChild.alt = `Generated faces, ${picture.caption}`;
    if (figure.dataset.name === picture.name) return;
    figure.dataset.name = picture.name;
    load(picture.name, figure.lastChild);
  });
}

async function load(name, image) {
  const answer = await fetch(`/picture/${encodeURIComponent(name)}`, { headers: { Authorization: `Bearer ${token()}` } }).catch(() => null);
  if (!answer || !answer.ok) return;
  if (pictures.has(image)) URL.revokeObjectURL(pictures.get(image));
  pictures.set(image, URL.createObjectURL(await answer.blob()));
  image.src = pictures.get(image);
}

const KINDS = { table: drawTable, facts: drawFacts, lines: drawLines, chart: drawChart, pictures: drawPictures };

function show(part) {
  if (part.id === "order") {
    const wanted = new Set(part.parts.map((name) => `part-${name}`));
    for (const section of [...parts.children]) if (!wanted.has(section.id)) section.remove();
    part.parts.map((name) => document.getElementById(`part-${name}`)).filter(Boolean).forEach((section, index) => {
      if (parts.children[index] !== section) parts.insertBefore(section, parts.children[index]);
    });
    order = part.parts;
    return;
  }
  if (part.kind === "title") {
    set(document.getElementById("title"), part.title);
    document.title = `${part.title} – maskfed live`;
    return;
  }
  let section = document.getElementById(`part-${part.id}`);
  if (section && section.dataset.kind !== part.kind) { section.remove(); section = null; }
  if (!section) {
    const heading = `heading-${part.id}`;
    section = make("section", { class: "card", id: `part-${part.id}`, "aria-labelledby": heading }, make("h2", { id: heading }), make("div"));
    section.dataset.kind = part.kind;
    const later = order.slice(order.indexOf(part.id) + 1).map((name) => document.getElementById(`part-${name}`)).find(Boolean);
    parts.insertBefore(section, later || null);
  }
  section.classList.toggle("wide", Boolean(part.wide));
  set(section.firstChild, part.title);
  KINDS[part.kind](section.lastChild, part);
}

let order = [];

function token() { return sessionStorage.getItem("token") || ""; }

function ask(text) {
  say(text);
  form.hidden = false;
  document.getElementById("token").focus();
}

async function watch() {
  const answer = await fetch("/stream", { headers: { Authorization: `Bearer ${token()}` } });
  if (answer.status === 401) { sessionStorage.removeItem("token"); ask("The token is not this page's: each start draws a new one."); return false; }
  if (!answer.ok) throw new Error(await answer.text());
  say("live");
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return true;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) show(JSON.parse(line));
  }
}

async function stay() {
  for (let wait = 1; ; wait = Math.min(30, 2 * wait)) {
    let why = "";
    try {
      if (!await watch()) return;
      wait = 1;
    } catch (error) {
      why = ` (${error.message})`;
    }
    say(`Not live${why}; asking again. What is below is older.`);
    await new Promise((resolve) => setTimeout(resolve, 1000 * wait));
  }
}

function begin() { form.hidden = true; if (token()) stay(); else ask("Show the token of this page."); }

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", document.getElementById("token").value.trim());
  document.getElementById("token").value = "";
  begin();
});

// The token comes behind the #, which no browser sends; it is taken out of the address, and so out of the history.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}
begin();
