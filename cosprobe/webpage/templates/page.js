"use strict";
(() => {
  const DATA = JSON.parse(document.getElementById("data").textContent);
  const SAID = document.getElementById("said");
  const CONFIG = {displayModeBar: false, responsive: true, doubleClick: false, showTips: false};
  const chosen = {}; // by chart: the colouring it shows

  // ---- values of maps; an axis of length 1 has the same value everywhere

  function cell(field, row, column) {
    const values = field.values;
    const found = values[values.length === 1 ? 0 : row];
    const value = found[found.length === 1 ? 0 : column];
    return value === null || value === undefined ? null : field.names ? field.names[value] : value;
  }

  function written(name, value) {
    return typeof value === "number" ? value.toFixed(/^p(_|$)/.test(name) ? 3 : 2).replace("-", "\u2212") : String(value);
  }

  function coloured(map, colouring, row, column) {
    const value = map.fields[colouring.value] ? cell(map.fields[colouring.value], row, column) : null;
    if (!colouring.minus || value === null) return value;
    const other = map.fields[colouring.minus] ? cell(map.fields[colouring.minus], row, column) : null;
    return other === null ? null : value - other;
  }

  function each(map, make) {
    return map.rows.map((_, row) => map.columns.map((_, column) => make(row, column)));
  }

  // texts of the label of a cell, without markup; a difference that the colour shows comes first
  function lines(map, colouring, row, column) {
    const said = [`${map.row} ${map.rows[row]}, ${map.column} ${map.columns[column]}`];
    const shown = coloured(map, colouring, row, column);
    if (colouring.minus) said.push(`${colouring.label}: ${shown === null ? "not measured" : written("", shown)}`);
    for (const [pattern, otherwise] of map.hover) {
      let known = true;
      const text = pattern.replace(/\{(\w+)\}/g, (_, name) => {
        const value = map.fields[name] ? cell(map.fields[name], row, column) : null;
        known = known && value !== null;
        return value === null ? "" : written(name, value);
      });
      if (known || otherwise) said.push(known ? text : otherwise);
    }
    return said;
  }

  function escaped(text) {
    return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  function look(map, colouring) {
    const scale = DATA.scales[colouring.scale];
    const z = each(map, (row, column) => coloured(map, colouring, row, column));
    const text = each(map, (row, column) => lines(map, colouring, row, column).map(escaped).join("<br>"));
    return {z, text, zmin: scale.low, zmax: scale.high, colorscale: scale.colours};
  }

  // cells that are struck through: those without evidence for what the colour shows; null: those of the figure
  function struck(map, colouring, z) {
    if (colouring.test === null) return null;
    const found = {x: [], y: []}, p = map.fields[colouring.test];
    if (!p) return found;
    each(map, (row, column) => {
      const value = cell(p, row, column);
      if (value === null ? z[row][column] === null : value <= DATA.alpha) return;
      found.x.push(column);
      found.y.push(row);
    });
    return found;
  }

  function notes(layout, known) {
    const missing = {
      text: "not measured for this target", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5,
      bgcolor: "rgba(255,255,255,0.9)", borderpad: 4,
    };
    return [...(layout.annotations || []), ...(known ? [] : [missing])];
  }

  // ---- drawing

  function draw(name) {
    const {figure, map} = DATA.charts[name];
    const place = document.getElementById(name);
    const data = figure.data;
    const layout = {...figure.layout, autosize: true};
    if (map) {
      const values = look(map, chosen[name]);
      Object.assign(data[0], values);
      layout.annotations = notes(figure.layout, values.z.flat().some((value) => value !== null));
      const side = (place.clientWidth - 150) / map.columns.length; // of a cell, in pixels
      for (const trace of data) {
        if (trace.name !== "struck") continue;
        trace.marker.size = Math.max(3, Math.min(11, 0.8 * side));
        Object.assign(trace, struck(map, chosen[name], values.z));
      }
    }
    return Plotly.newPlot(place, data, layout, CONFIG).then(() => readable(name));
  }

  function recolour(name, colouring) {
    chosen[name] = colouring;
    const {figure, map} = DATA.charts[name];
    const values = look(map, colouring);
    const place = document.getElementById(name);
    const known = values.z.flat().some((value) => value !== null);
    const {zmin, zmax} = values;
    const changed = {z: [values.z], text: [values.text], colorscale: [values.colorscale], zmin, zmax};
    Plotly.update(place, changed, {annotations: notes(figure.layout, known)}, [0]);
    const marks = struck(map, colouring, values.z);
    const at = figure.data.findIndex((trace) => trace.name === "struck");
    if (marks) Plotly.restyle(place, {x: [marks.x], y: [marks.y]}, [at]);
    const table = place.closest("figure").querySelector("details.numbers[open]");
    if (table) tabulate(table);
  }

  // ---- arrow keys: a cursor on the cells of a map, or the points of lines

  function readable(name) {
    const place = document.getElementById(name);
    const {figure, map} = DATA.charts[name];
    for (const drawn of place.children) drawn.setAttribute("aria-hidden", "true"); // its label says what it shows
    const read = figure.data.map((trace, i) => i).filter((i) => map ? i === 0 : figure.data[i].hoverinfo !== "skip");
    let row = 0, column = 0;
    place.addEventListener("keydown", (event) => {
      const step = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0]}[event.key];
      if (event.key === "Escape") Plotly.Fx.unhover(place);
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      const height = map ? map.rows.length : read.length;
      row = Math.max(0, Math.min(height - 1, row + (map ? step[0] : -step[0])));
      const width = map ? map.columns.length : figure.data[read[row]].x.length;
      column = Math.max(0, Math.min(width - 1, column + step[1]));
      if (map) {
        SAID.textContent = lines(map, chosen[name], row, column).join("; ");
        Plotly.Fx.hover(place, {xval: column, yval: row});
      } else {
        const trace = figure.data[read[row]];
        SAID.textContent = `${trace.name}: ${trace.text[column].replaceAll("<br>", "; ")}`;
        Plotly.Fx.hover(place, [{curveNumber: read[row], pointNumber: column}]);
      }
    });
    place.addEventListener("blur", () => Plotly.Fx.unhover(place));
  }

  // ---- the numbers of a map as a table, made when it is opened

  function tabulate(details) {
    const name = details.dataset.chart, {map} = DATA.charts[name], colouring = chosen[name];
    const table = document.createElement("table");
    table.createCaption().textContent = `${colouring.label}, by ${map.row} and ${map.column}`;
    const head = table.createTHead().insertRow();
    const heading = (line, text, scope) => {
      const made = document.createElement("th");
      made.scope = scope;
      made.textContent = text;
      line.append(made);
    };
    heading(head, `${map.row} \\ ${map.column}`, "col");
    map.columns.forEach((column) => heading(head, column, "col"));
    const body = table.createTBody();
    for (let row = map.rows.length - 1; row >= 0; row--) {
      const line = body.insertRow();
      heading(line, map.rows[row], "row");
      map.columns.forEach((_, column) => {
        const value = coloured(map, colouring, row, column);
        line.insertCell().textContent = value === null ? "\u2013" : written("", value);
      });
    }
    const frame = document.createElement("div");
    frame.className = "table";
    frame.tabIndex = 0;
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", table.caption.textContent);
    frame.append(table);
    details.querySelector(".table")?.remove();
    details.append(frame);
  }

  // ---- start

  for (const [name, {colourings, charts}] of Object.entries(DATA.switches)) {
    for (const chart of charts) chosen[chart] = colourings[0];
    const select = document.getElementById(name);
    select.selectedIndex = 0; // a browser may remember another one
    select.addEventListener("change", () => {
      const colouring = colourings[select.selectedIndex];
      document.getElementById(`${name}-meaning`).textContent = colouring.meaning;
      const legend = document.getElementById(`${name}-struck`);
      if (legend && colouring.struck) legend.textContent = colouring.struck;
      for (const chart of charts) recolour(chart, colouring);
    });
  }
  for (const button of document.querySelectorAll("button.still")) {
    const source = button.parentElement.querySelector("source"), query = source.media;
    button.addEventListener("click", () => {
      const still = button.getAttribute("aria-pressed") !== "true";
      source.media = still ? "all" : query;
      button.setAttribute("aria-pressed", String(still));
    });
  }
  for (const details of document.querySelectorAll("details.numbers")) {
    details.addEventListener("toggle", () => { if (details.open) tabulate(details); });
  }
  const fit = () => document.querySelectorAll(".plot").forEach((place) => Plotly.Plots.resize(place));
  addEventListener("beforeprint", fit);
  addEventListener("afterprint", fit);
  Promise.all(Object.keys(DATA.charts).map(draw)).then(() => {
    document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true"); // Plotly measures texts in it
    document.documentElement.dataset.drawn = "true";
  });
})();
