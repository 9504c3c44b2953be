// The page of one head: all its numbers with their ranks, its profiles, its strongest examples.
const placeStrip = (values, mine, other) => {
  const known = values.filter(Number.isFinite).sort();
  const ends = [known[0], known[known.length - 1], mine, other].filter(Number.isFinite);
  const low = Math.min(...ends), high = Math.max(...ends);
  const at = (x) => 6 + (high > low ? (88 * (x - low)) / (high - low) : 44);
  const quarter = (q) => at(known[Math.floor(q * (known.length - 1))]);
  const strip = svg("svg", { class: "place", viewBox: "0 0 100 12", width: 100, height: 12, "aria-hidden": "true" });
  strip.append(svg("path", { class: "rule", d: "M6 6H94" }));
  if (known.length > 3) strip.append(svg("path", { class: "half", d: `M${quarter(0.25)} 6H${quarter(0.75)}` }));
  if (Number.isFinite(other)) strip.append(svg("rect", { class: "there", x: at(other) - 3, y: 3, width: 6, height: 6 }));
  if (Number.isFinite(mine)) strip.append(svg("circle", { class: "here", cx: at(mine), cy: 6, r: 3.5 }));
  return strip;
};

const metricRow = (metric, tower, at, comparing) => {
  const all = tower.values(metric), mine = all[at] ?? NaN;
  const known = all.filter((x) => !Number.isNaN(x)), rank = 1 + known.filter((x) => x > mine).length;
  const other = comparing ? tower.twin.at(metric, tower.layerOf(at), tower.headOf(at)) : NaN;
  const cells = [html("td", { class: "number" }, number(mine))];
  if (comparing) cells.push(html("td", { class: "number" }, number(other)), html("td", { class: "number" }, change(other - mine)));
  cells.push(html("td", { class: "number" }, Number.isNaN(mine) ? "–" : `${rank} of ${known.length}`));
  cells.push(html("td", {}, known.length || !Number.isNaN(other) ? placeStrip(all, mine, other) : ""));
  if (!comparing) for (const domain of data.domains) cells.push(html("td", { class: "number" }, number(tower.values(`${metric}@${domain}`)[at] ?? NaN)));
  cells.push(html("td", { class: "number" }, tower.count(metric, at)));
  return html("tr", {}, html("th", { scope: "row" }, html("code", {}, metric), html("span", { class: "aside" }, ...prose(data.metrics[metric]))), ...cells);
};

const metricTable = (tower, at, comparing) => {
  const words = comparing ? ["First", "Second", "Difference", "Rank", "Among heads"] : ["Value", "Rank", "Among heads", ...data.domains];
  const heading = [...words, "Sequences"].map((word) =>
    html("th", { scope: "col", ...(word === "Among heads" ? {} : { class: "number" }) }, word));
  const rows = data.groups.flatMap(([group, metrics]) => {
    const here = metrics.filter((metric) => tower.has(metric)).map((metric) => metricRow(metric, tower, at, comparing));
    const name = html("th", { scope: "rowgroup", colspan: heading.length + 1, class: "group" }, group);
    return here.length && data.groups.length > 1 ? [html("tr", {}, name), ...here] : here;
  });
  return html("div", { class: "scroll", role: "region", "aria-label": "Metrics of this head", tabindex: 0 },
    html("table", {}, html("thead", {}, html("tr", {}, html("th", { scope: "col" }, "Metric"), ...heading)), html("tbody", {}, ...rows)));
};

const ablations = (tower, at) => {
  const found = data.ablations.filter((metric) => !Number.isNaN(tower.values(metric)[at] ?? NaN));
  if (!found.length) return [];
  const lines = found.map((metric) =>
    html("li", {}, html("code", {}, metric), ` ${number(tower.values(metric)[at])}: `, ...prose(data.metrics[metric])));
  return [html("h3", {}, "What ablating it costs"), html("ul", { class: "warnings" }, ...lines)];
};

const profileFigure = (profile, layer, head, twin) => {
  const [width, height, left, base] = [420, 150, 44, 126];
  const series = [profile, ...(twin ? [twin] : [])].map((one) => one.of(layer, head));
  const count = Math.max(...series.map((points) => points.length));
  const known = series.flatMap((points) => [...points]).filter(Number.isFinite);
  const high = Math.max(0, ...known) || 1, low = Math.min(0, ...known);
  const y = (x) => 10 + ((base - 10) * (high - x)) / (high - low), each = (width - left - 6) / count;
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": `${profile.name} of this head` });
  const bar = each / series.length, thin = series.length > 1 && bar < 2;
  if (thin) for (const [which, points] of series.entries()) {
    const places = [...points].map((x, i) => [left + (i + 0.5) * each, y(x)]).filter((place) => Number.isFinite(place[1]));
    drawing.append(svg("path", { class: which ? "line second" : "line", fill: "none", d: "M" + places.map((place) => place.join(" ")).join("L") }));
  }
  if (!thin) for (const [which, points] of series.entries()) for (const [i, x] of points.entries()) {
    if (!Number.isFinite(x)) continue;
    const first = i * profile.step, last = Math.min(first + profile.step, profile.length) - 1;
    drawing.append(svg("rect", {
      class: which ? "bar second" : "bar", x: left + i * each + which * bar, y: Math.min(y(x), y(0)),
      width: Math.max(bar - (bar > 3 ? 1 : 0), 0.5), height: Math.max(Math.abs(y(0) - y(x)), 0.5),
    }, svg("title", {}, `${first === last ? first : `${first}–${last}`}: ${number(x)}`)));
  }
  drawing.append(svg("path", { class: "axis", d: `M${left} ${y(0)}H${width - 6}`, fill: "none" }));
  const text = (x, at, words, anchor) => drawing.append(svg("text", { x, y: at, "text-anchor": anchor }, words));
  text(left - 6, y(high) + 4, number(high), "end");
  text(left - 6, y(0) + 4, "0", "end");
  if (low < 0) text(left - 6, y(low) + 4, number(low), "end");
  const last = profile.length - 1, step = stepFor(each / profile.step, 46);
  for (let i = 0; i <= last; i += step) text(left + ((i + 0.5) * each) / profile.step, height - 6, `${i}`, "middle");
  const about = profile.step > 1 ? `${profile.meaning}; means over steps of ${profile.step}` : profile.meaning;
  return html("figure", {}, html("figcaption", {}, html("code", {}, profile.name), html("span", { class: "aside" }, ...prose(about))), drawing);
};

// Words of a model, with what is invisible in them made visible.
const shown = (word) => (word === "" ? "∅" : word.replace(/\n/g, "⏎").replace(/\t/g, "⇥")
  .replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
  .replace(/[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, (c) => `⟨${c.charCodeAt(0).toString(16)}⟩`));
const tint = (part) => `rgba(0, 114, 178, ${(0.72 * Math.sqrt(part)).toFixed(3)})`;

const token = (atlas, place, word, weight, most, query) => {
  const node = html("bdi", { tabindex: 0, title: `${place}: ${number(weight)}` }, shown(atlas.words[word] ?? ""));
  node.style.backgroundColor = tint(weight / most);
  if (place === query) node.classList.add("query");
  return weight >= 0.05 ? [node, html("sub", {}, number(Number(weight.toFixed(2))))] : [node];
};

const tokenLine = (atlas, example, most) => {
  const line = html("p", { class: "tokens" });
  let after = 0;
  for (const [start, words, weights] of example.spans) {
    if (start > after) line.append(html("span", { class: "gap" }, `… ${(start - after).toLocaleString("en")} tokens …`));
    for (const [i, weight] of weights.entries()) {
      line.append(...token(atlas, start + i, words[i], weight / 10000, most, example.query));
    }
    after = start + weights.length;
  }
  return line;
};

const picture = (example, most) => {
  const [rows, columns] = example.grid, [prefix, , weights] = example.spans[0];
  const cell = Math.max(6, Math.min(26, Math.floor(420 / Math.max(rows, columns))));
  const size = { width: columns * cell + 2, height: rows * cell + 2 };
  const drawing = svg("svg", { class: "picture", ...size, viewBox: `-1 -1 ${size.width} ${size.height}`, role: "img", "aria-label": "Weights over the image" });
  const box = (k) => ({ x: (k % columns) * cell, y: Math.floor(k / columns) * cell, width: cell - 0.5, height: cell - 0.5 });
  for (const [k, weight] of weights.entries()) {
    drawing.append(svg("rect", { ...box(k), fill: colour(weight / 10000 / most, data.sequential) }, svg("title", {}, `row ${Math.floor(k / columns)}, column ${k % columns}: ${number(weight / 10000)}`)));
  }
  if (example.query >= prefix) drawing.append(svg("rect", { ...box(example.query - prefix), class: "query", fill: "none" }));
  return drawing;
};

const exampleFigure = (atlas, example) => {
  const most = Math.max(1e-4, ...example.spans.flatMap((span) => span[2]).map((w) => w / 10000));
  const said = example.grid
    ? `Image ${example.passage}, ${example.query >= example.spans[0][0] ? "the outlined query" : "a query outside the image"}`
    : `Passage ${example.passage}, query ${example.query.toLocaleString("en")} (outlined)`;
  const legend = html("span", { class: "bar-legend" });
  const stops = [0, 0.25, 0.5, 0.75, 1].map((x) => (example.grid ? colour(x, data.sequential) : tint(x)));
  legend.style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  const drawn = example.grid ? picture(example, most) : tokenLine(atlas, example, most);
  return html("div", { class: "example" }, html("p", { class: "note" }, `${said}. Weight 0`, legend, number(most)), drawn);
};

const exampleFigures = (atlas, tower, layer, head, label) => {
  const found = tower.examples[`${layer}.${head}`] ?? [];
  const title = html("h3", {}, `Strongest examples${label ? `: ${label}` : ""}`);
  if (!found.length) return [title, html("p", { class: "about" }, atlas.left ? "Left out for want of room." : "None was kept.")];
  const about = "Queries that put most weight on one key, other than the first token and their own; the numbers are weights.";
  return [title, html("p", { class: "about" }, about), ...found.map((example) => exampleFigure(atlas, example))];
};

const headPage = (tower, layer, head) => {
  const at = layer * tower.heads + head, comparing = data.atlases.length > 1, here = data.alone ? "" : ` · ${tower.name}`;
  const own = tower.contains(layer, head), kinds = tower.types[`${layer}.${head}`] ?? [];
  const parts = [html("h2", { id: "head-title", tabindex: -1 }, `Layer ${layer}, head ${head}${here}`)];
  if (kinds.length) parts.push(html("ul", { class: "badges", "aria-label": "Types" }, ...kinds.map((kind) => html("li", {}, kind))));
  if (!own) parts.push(html("p", { class: "about" }, `${data.labels[0]} has no such head.`));
  if (own) {
    parts.push(...ablations(tower, at), html("h3", {}, "Metrics"));
    parts.push(html("p", { class: "about" }, `Rank 1 is the highest value. Among heads: from the lowest to the highest, the middle half thick, this head a dot${comparing ? `, the second's a square. First: ${data.labels[0]}; second: ${data.labels[1]}` : ""}.`));
    parts.push(metricTable(tower, at, comparing));
    const figures = tower.profiles.map((profile) =>
      profileFigure(profile, layer, head, comparing ? tower.twin.profiles.find((one) => one.name === profile.name && one.step === profile.step) : null));
    if (figures.length) parts.push(html("h3", {}, "Profiles"), html("div", { class: "profiles" }, ...figures));
    if (comparing && figures.length) parts.push(html("p", { class: "note" }, `Blue: ${data.labels[0]}. Orange: ${data.labels[1]}.`));
    parts.push(...exampleFigures(data.atlases[0], tower, layer, head, comparing ? data.labels[0] : ""));
  }
  if (comparing && tower.twin.contains(layer, head)) parts.push(...exampleFigures(data.atlases[1], tower.twin, layer, head, data.labels[1]));
  return parts;
};
