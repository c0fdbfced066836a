"use strict";
// What the page does beside the plots: colours of day and night, picking a point, sorting a table.

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Bokeh draws on canvas, where style sheets do not reach.
function paint() {
  for (const doc of Bokeh.documents)
    for (const root of doc.roots())
      for (const model of [root, ...root.references()]) {
        if (/Axis$/.test(model.type))
          model.setv({
            axis_label_text_color: ink("--muted"), major_label_text_color: ink("--muted"),
            axis_line_color: ink("--line"), major_tick_line_color: ink("--line"),
          });
        else if (model.type === "Grid" && model.grid_line_color !== null)
          model.setv({ grid_line_color: ink("--line") });
        else if (model.type === "Legend") model.setv({ label_text_color: ink("--muted") });
        else if (model.type === "LabelSet") model.setv({ text_color: ink("--ink") });
        else if (model.tags && model.tags.includes("outline")) model.setv({ line_color: ink("--ink") });
      }
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const bitsOf = (widths) => (/^W(\d+)/.exec(widths) || [0, "float"])[1];
const colourOf = (widths) => `var(--w${bitsOf(widths)})`;

function strip(place, layers, widths) {
  place.replaceChildren(...widths.map((w, i) => {
    const cell = element("span", "", { title: `${layers[i]}: ${w}` });
    cell.style.background = colourOf(w);
    return cell;
  }));
  place.classList.toggle("many", widths.length > 60);
}

function key(place, widths) {
  const counts = new Map();
  for (const w of widths) counts.set(w, (counts.get(w) || 0) + 1);
  place.replaceChildren(...[...counts].sort().map(([w, n]) => {
    const item = element("li", "");
    const mark = element("i", "");
    mark.style.background = colourOf(w);
    item.append(mark, `${w}: ${n} ${n === 1 ? "layer" : "layers"}`);
    return item;
  }));
}

function picker() {
  const holder = document.getElementById("front-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const at = (name) => document.getElementById(`pick-${name}`);
  const source = Bokeh.documents.map((doc) => doc.get_model_by_name("front")).find(Boolean);
  const text = (point) => point.lines.map((i) => data.lines[i] + "\n").join("");
  let now = data.picked;

  function show(i) {
    now = i;
    const point = data.points[i];
    at("title").textContent = point.chosen ? `Chosen: ${point.file}` : `Point ${i + 1} of ${data.points.length}`;
    at("facts").replaceChildren(...Object.entries(point.facts).flatMap(([k, v]) => [element("dt", k), element("dd", v)]));
    strip(at("strip"), data.layers, point.widths);
    at("strip").setAttribute("aria-label", `bits of ${data.layers.length} layers, from input to output`);
    key(at("key"), point.widths);
    at("bits").replaceChildren(...data.layers.map((name, k) => {
      const item = element("li", "");
      item.append(element("span", name, { class: "name", title: name }), element("span", point.widths[k]));
      return item;
    }));
    at("yaml").textContent = text(point);
    at("range").value = i;
    at("range").setAttribute("aria-valuetext", Object.entries(point.facts).map(([k, v]) => `${k} ${v}`).join(", "));
    if (source.selected.indices[0] !== i) source.selected.indices = [i];
  }

  window.mpqPick = show;
  at("range").max = data.points.length - 1;
  at("range").addEventListener("input", (event) => show(Number(event.target.value)));
  at("save").addEventListener("click", () => {
    const link = element("a", "", { download: data.points[now].file });
    link.href = URL.createObjectURL(new Blob([text(data.points[now])], { type: "application/yaml" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  at("reset").addEventListener("click", () => show(data.picked));
  show(now);
}

// "18.4k", "1,024", "98.3%", "1.2e-4" as numbers; what is none comes last.
function value(text) {
  const found = /^([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*([kMG]?)/i.exec(text.trim());
  if (!found) return text.trim() === "exact" ? Infinity : NaN;
  return Number(found[1].replaceAll(",", "")) * ({ k: 1e3, M: 1e6, G: 1e9 }[found[2]] || 1);
}

function sort(table, column, number, down) {
  const body = table.tBodies[0];
  const cell = (row) => row.cells[column].textContent;
  const order = (a, b) => {
    if (!number) return cell(a).localeCompare(cell(b), undefined, { numeric: true });
    const [x, y] = [value(cell(a)), value(cell(b))];
    return Number.isNaN(x) ? (down ? -1 : 1) : Number.isNaN(y) ? (down ? 1 : -1) : x - y;
  };
  body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * order(a, b)));
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.textContent) return;
    const button = element("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table, column, head.classList.contains("number"), down);
    });
  });
}

function jumps() {
  for (const bar of document.querySelectorAll(".jump"))
    bar.addEventListener("click", (event) => {
      const index = [...bar.children].indexOf(event.target);
      const graph = bar.parentElement.querySelector(".graph");
      if (index >= 0) graph.scrollTop = graph.querySelectorAll("li")[index].offsetTop - 60;
    });
}

document.querySelectorAll("table").forEach(sortable);
jumps();
window.mpqReady = new Promise((resolve) => {
  // The plots are made as soon as the document is there; their views follow.
  const plots = document.querySelectorAll("[data-root-id]").length;
  const wait = () => {
    if (plots && !Bokeh.documents.length) return setTimeout(wait, 20);
    if (!Bokeh.documents.every((doc) => doc.is_idle)) return setTimeout(wait, 20);
    paint();
    picker();
    resolve(true);
  };
  wait();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
