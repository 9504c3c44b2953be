// The atlas: towers over the page's data, the maps, keys, and the way from a head's link to its page.
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);

const profileOf = (raw) => {
  let points = null;
  const count = Math.ceil(raw.length / raw.step);
  return { ...raw, of: (layer, head) => (points ??= floats(raw.points)).subarray((layer * raw.heads + head) * count, (layer * raw.heads + head + 1) * count) };
};
const towerOf = (raw) => {
  const decoded = new Map(), there = bytes(raw.there), none = new Float32Array(raw.layers * raw.heads).fill(NaN);
  const values = (metric) => {
    if (!(Object.hasOwn(raw.values, metric))) return none;
    if (!decoded.has(metric)) decoded.set(metric, floats(raw.values[metric]));
    return decoded.get(metric);
  };
  const contains = (l, h) => l < raw.layers && h < raw.heads && there[l * raw.heads + h] === 1;
  return {
    ...raw, values, contains,
    has: (metric) => Object.hasOwn(raw.values, metric),
    at: (metric, l, h) => (contains(l, h) ? values(metric)[l * raw.heads + h] : NaN),
    count: (metric, at) => `${Array.isArray(raw.counts[metric]) ? raw.counts[metric][at] : raw.counts[metric]}`,
    layerOf: (at) => Math.floor(at / raw.heads), headOf: (at) => at % raw.heads,
    profiles: raw.profiles.map(profileOf),
  };
};
const models = data.atlases.map((atlas) => atlas.towers.map(towerOf));
for (const [i, tower] of models[0].entries()) tower.twin = models[1]?.[i];

const $ = (id) => document.getElementById(id);
const [maps, readout, headSection, overview] = ["maps", "readout", "head", "overview"].map($);
const chosen = { tower: 0, layer: 0, head: 0 };
const title = document.title;
let left = 0, drawn = 0;

const anchor = (tower, l, h) => (data.alone ? "" : `${encodeURIComponent(tower.name)}.`) + `L${l}.H${h}`;
const current = () => models[0][chosen.tower];
const metric = () => $("metric").value + ($("domain").value ? `@${$("domain").value}` : "");

const describe = (tower, l, h) => {
  const name = metric(), mine = tower.at(name, l, h);
  const parts = [`L${l}.H${h}`, `${name} ${number(mine)}`];
  if (!Number.isNaN(mine)) {
    const known = tower.values(name).filter((x) => !Number.isNaN(x));
    parts.push(`rank ${1 + known.filter((x) => x > mine).length} of ${known.length}`);
  }
  if (tower.twin) {
    const other = tower.twin.at(name, l, h);
    parts.push(`${data.labels[1]} ${number(other)}`, `difference ${change(other - mine)}`);
  }
  const kinds = tower.types[`${l}.${h}`];
  return [...parts, ...(kinds ? [kinds.join(", ")] : [])].join(" · ");
};

const figures = (tower) => {
  const name = metric(), where = data.alone ? "" : ` · ${tower.name}`, twin = tower.twin;
  const link = (l, h) => `#${anchor(tower, l, h)}`;
  const one = (owner, label, scale) => ({
    title: `${label}${where} · ${name}`, layers: owner.layers, heads: owner.heads, there: owner.contains, scale, link,
    value: (l, h) => owner.at(name, l, h), name: (l, h) => `L${l}.H${h}: ${number(owner.at(name, l, h))}`,
  });
  const scale = scaleOf([tower, ...(twin ? [twin] : [])].map((each) => each.values(name)), data.sequential, data.diverging);
  if (!twin) return [one(tower, data.labels[0], scale)];
  const apart = (l, h) => twin.at(name, l, h) - tower.at(name, l, h), every = [];
  for (let l = 0; l < tower.layers; l++) for (let h = 0; h < tower.heads; h++) every.push(apart(l, h));
  const difference = {
    ...one(tower, "Difference, second − first", scaleOf([every], data.sequential, data.diverging, true)),
    value: apart, name: (l, h) => `L${l}.H${h}: ${change(apart(l, h))}`,
  };
  return [one(tower, data.labels[0], scale), one(twin, data.labels[1], scale), difference];
};

const draw = () => {
  const tower = current();
  drawn = maps.clientWidth;
  if (!tower.heads) return maps.replaceChildren(html("p", { class: "about" }, "No numbers of single heads were measured here."));
  const specs = figures(tower);
  const side = specs.length > 1, room = side && drawn > 900 ? (drawn - 52) / 3 : side && drawn > 600 ? (drawn - 26) / 2 : drawn;
  maps.classList.toggle("side", side);
  $("meaning").replaceChildren(...prose(data.metrics[$("metric").value] ?? ""));
  maps.replaceChildren(...specs.map((spec) => {
    const drawing = drawMap({ ...spec, width: room - 8 }), file = `${spec.title}`.replace(/[^\w@.-]+/g, "_");
    const tools = ["svg", "png"].map((kind) => {
      const button = html("button", { type: "button", class: "tool" }, `Save ${kind.toUpperCase()}`);
      button.addEventListener("click", () => saveAs(drawing, file, kind));
      return button;
    });
    return html("figure", {}, html("div", { class: "map-scroll" }, drawing), html("div", { class: "tools" }, ...tools));
  }));
  mark(chosen.layer, chosen.head);
};

// One head is chosen in all maps: the one the keys move from.
const mark = (l, h) => {
  for (const lit of maps.querySelectorAll('a[tabindex="0"]')) lit.setAttribute("tabindex", -1);
  [chosen.layer, chosen.head] = [l, h];
  for (const drawing of maps.querySelectorAll("svg.map")) {
    drawing.querySelector(`a[data-at="${l}.${h}"]`)?.setAttribute("tabindex", 0);
    drawing.ring(l, h);
  }
  readout.textContent = describe(current(), l, h);
};
const placeOf = (target) => target.closest?.("a[data-at]")?.dataset.at.split(".").map(Number);
for (const event of ["mouseover", "focusin"]) maps.addEventListener(event, (e) => {
  const place = placeOf(e.target);
  if (place) mark(...place);
});

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
maps.addEventListener("keydown", (e) => {
  const place = placeOf(e.target), move = MOVES[e.key];
  if (!place || e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === "Enter") location.hash = anchor(current(), ...place);
  else if (e.key === "Home" || e.key === "End" || move) {
    const across = [...e.target.closest("svg").querySelectorAll(`a[data-at^="${place[0]}."]`)];
    const to = move ? `${place[0] + move[0]}.${place[1] + move[1]}` : across.at(e.key === "Home" ? 0 : -1).dataset.at;
    e.target.closest("svg").querySelector(`a[data-at="${to}"]`)?.focus();
  } else return;
  e.preventDefault();
});

const step = (by) => {
  const select = $("metric"), count = select.options.length, inMap = maps.contains(document.activeElement);
  const which = [...maps.querySelectorAll("svg.map")].findIndex((one) => one.contains(document.activeElement));
  select.selectedIndex = (select.selectedIndex + by + count) % count;
  draw();
  if (inMap && which >= 0) maps.querySelectorAll("svg.map")[which].querySelector('a[tabindex="0"]')?.focus();
};
const neighbour = (by) => {
  const tower = current(), last = tower.layers * tower.heads;
  for (let at = chosen.layer * tower.heads + chosen.head + by; at >= 0 && at < last; at += by) {
    if (tower.contains(tower.layerOf(at), tower.headOf(at))) return anchor(tower, tower.layerOf(at), tower.headOf(at));
  }
  return null;
};
document.addEventListener("keydown", (e) => {
  if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest?.("select, input, .scroll")) return;
  const onHead = !headSection.hidden;
  if (e.key === "Escape" && onHead) location.hash = "map";
  else if (onHead && (e.key === "ArrowLeft" || e.key === "ArrowRight")) {
    const next = neighbour(e.key === "ArrowLeft" ? -1 : 1);
    if (next) location.hash = next;
  } else if (!onHead && (e.key === "[" || e.key === "]")) step(e.key === "[" ? -1 : 1);
  else return;
  e.preventDefault();
});

// Links: #L3.H5 opens a head, with a tower's name before it where there are several.
const parsed = () => {
  const found = /^#(?:(.*)\.)?L(\d+)\.H(\d+)$/.exec(location.hash);
  if (!found) return null;
  let name = found[1] ?? models[0][0].name;
  try { name = decodeURIComponent(name); } catch { return null; }
  const tower = models[0].findIndex((one) => one.name === name), [l, h] = [Number(found[2]), Number(found[3])];
  const known = tower >= 0 && (models[0][tower].contains(l, h) || models[0][tower].twin?.contains(l, h));
  return known ? [tower, l, h] : null;
};
const openHead = (tower, l, h) => {
  if (headSection.hidden) left = scrollY;
  Object.assign(chosen, { tower, layer: l, head: h });
  $("tower").selectedIndex = tower;
  const [before, after] = [neighbour(-1), neighbour(1)], own = models[0][tower];
  const bar = html("nav", { class: "head-bar", "aria-label": "Heads" }, html("a", { href: "#map" }, "Map of heads"),
    before ? html("a", { href: `#${before}`, rel: "prev" }, "← previous head") : null,
    after ? html("a", { href: `#${after}`, rel: "next" }, "next head →") : null,
    html("span", { class: "keys" }, html("kbd", {}, "←"), " ", html("kbd", {}, "→"), " head · ", html("kbd", {}, "Esc"), " back"));
  headSection.replaceChildren(html("article", { id: anchor(own, l, h) }, bar, ...headPage(own, l, h)));
  document.title = `L${l}.H${h} · ${title}`;
};
const route = () => {
  const place = parsed(), was = !headSection.hidden;
  if (place) openHead(...place);
  headSection.hidden = !place;
  overview.hidden = Boolean(place);
  document.body.classList.toggle("on-head", Boolean(place));
  if (place) {
    scrollTo(0, 0);
    $("head-title").focus({ preventScroll: true });
    return;
  }
  document.title = title;
  if (was || !drawn) draw();
  if (!was) return;
  if (["", "#map"].includes(location.hash)) {
    scrollTo(0, left);
    maps.querySelector('a[tabindex="0"]')?.focus({ preventScroll: true });
  } else document.getElementById(location.hash.slice(1))?.scrollIntoView();
};

const options = (id, names, word = (name) => name) => {
  $(id).replaceChildren(...names.map((name) => html("option", { value: name }, word(name))));
  $(id).closest("label").hidden = names.length < 2;
};
const metricOptions = (tower) => {
  const groups = data.groups.map(([group, metrics]) => [group, metrics.filter((name) => tower.has(name))]);
  const filled = groups.filter(([, metrics]) => metrics.length);
  options("metric", filled.flatMap(([, metrics]) => metrics));
  if (filled.length < 2) return;
  $("metric").replaceChildren(...filled.map(([group, metrics]) =>
    html("optgroup", { label: group }, ...metrics.map((name) => html("option", { value: name }, name)))));
};
options("tower", models[0].map((tower) => tower.name));
metricOptions(current());
$("metric").value = ["retrieval", "induction", "sink_first"].find((name) => current().has(name)) ?? $("metric").value;
options("domain", ["", ...data.domains], (name) => name || "all passages");
$("tower").addEventListener("change", () => {
  Object.assign(chosen, { tower: $("tower").selectedIndex, layer: 0, head: 0 });
  const before = $("metric").value;
  metricOptions(current());
  if (current().has(before)) $("metric").value = before;
  draw();
});
for (const id of ["metric", "domain"]) $(id).addEventListener("change", draw);
new ResizeObserver(() => {
  if (!overview.hidden && Math.abs(maps.clientWidth - drawn) > 1) draw();
}).observe(maps);
addEventListener("hashchange", route);
route();
