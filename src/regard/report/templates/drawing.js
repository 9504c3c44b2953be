// Elements. Text is only ever set as text, so that nothing in the data becomes markup.
const filled = (node, attributes, children) => {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
};
const html = (name, attributes = {}, ...children) => filled(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// Prose with `names in backticks` as code.
const prose = (text) => text.split("`").map((part, i, all) => (all.length % 2 && i % 2 ? html("code", {}, part) : all.length % 2 || !i ? part : "`" + part));

const signed = (text) => text.replaceAll("-", "\u2212");
const number = (x) => {
  if (Number.isNaN(x)) return "–";
  const small = x !== 0 && Math.abs(x) < 1e-4;
  return signed(small ? x.toExponential(2).replace(/\.?0+e/, "e") : String(Number(x.toPrecision(3))));
};
const change = (x) => (x > 0 ? "+" : "") + number(x);

// Colours.
const channels = (stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16));
const colour = (part, stops) => {
  const place = Math.min(Math.max(part, 0), 1) * (stops.length - 1);
  const first = Math.min(Math.floor(place), stops.length - 2);
  const [low, high] = [channels(stops[first]), channels(stops[first + 1])];
  return "#" + low.map((x, i) => Math.round(x + (place - first) * (high[i] - x)).toString(16).padStart(2, "0")).join("");
};
const readable = (fill) => {
  const [r, g, b] = channels(fill).map((x) => (x / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.22 ? "#111318" : "#ffffff";
};

// A scale over numbers: sequential, or, where they lie on both sides of zero, diverging.
const scaleOf = (arrays, sequential, diverging, always = false) => {
  let low = Infinity, high = -Infinity;
  for (const values of arrays) for (const x of values) {
    if (!Number.isFinite(x)) continue;
    low = Math.min(low, x);
    high = Math.max(high, x);
  }
  if (low > high) return { low: NaN, high: NaN, stops: sequential, part: () => 0 };
  const both = always || (low < 0 && high > 0);
  if (both) {
    high = Math.max(-low, high);
    low = -high;
  }
  const part = (x) => (high > low ? (x - low) / (high - low) : 0.5);
  return { low, high, stops: both ? diverging : sequential, part };
};

const stepFor = (size, apart) => {
  const least = Math.max(1, Math.ceil(apart / size));
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((m) => m * power >= least);
};
const cut = (text, most) => (text.length > most ? text.slice(0, Math.max(1, most - 1)) + "…" : text);

// A map of layers and heads as SVG. Colours stand in attributes, for files it is saved to; the
// page's style replaces those of its inks.
const LEFT = 40, TOP = 44;
const drawMap = ({ title, layers, heads, value, there, scale, width, name, link }) => {
  const cell = Math.min(Math.max((width - LEFT - 6) / heads, 9), 64);
  const tall = Math.min(Math.max(cell, 9), 30), gap = cell >= 14 ? 1 : 0;
  const wide = Math.max(LEFT + heads * cell + 6, 240), bottom = TOP + layers * tall;
  const size = { width: wide, height: bottom + 46 };
  const drawing = svg("svg", {
    class: "map", ...size, viewBox: `0 0 ${size.width} ${size.height}`, role: "group",
    "aria-label": `${title}, ${layers} layers and ${heads} heads`, "font-family": "sans-serif", "font-size": 11,
  });
  const text = (x, y, words, more = {}) =>
    drawing.append(svg("text", { x, y, fill: "#5d636c", class: "muted", ...more }, words));
  drawing.append(svg("rect", { ...size, fill: "#ffffff", class: "back" }));
  text(2, 13, cut(title, Math.floor(wide / 6.6)), { fill: "#1c1e22", class: "ink", "font-size": 12, "font-weight": 600 });
  for (let h = 0; h < heads; h += stepFor(cell, 24)) text(LEFT + (h + 0.5) * cell, TOP - 5, `${h}`, { "text-anchor": "middle" });
  for (let l = 0; l < layers; l += stepFor(tall, 13)) text(LEFT - 6, TOP + (l + 0.5) * tall + 4, `${l}`, { "text-anchor": "end" });
  text(2, TOP - 5, "layer");
  const numbers = cell >= 38 && tall >= 17;
  let holes = false;
  for (let l = 0; l < layers; l++) for (let h = 0; h < heads; h++) {
    if (!there(l, h)) continue;
    const x = LEFT + h * cell, y = TOP + l * tall, found = value(l, h), hole = !Number.isFinite(found);
    const fill = hole ? "#eeeeea" : colour(scale.part(found), scale.stops);
    const box = { x, y, width: cell - gap, height: tall - gap };
    const one = svg("a", { href: link(l, h), "data-at": `${l}.${h}`, tabindex: -1, "aria-label": name(l, h) });
    one.append(svg("rect", { ...box, fill, ...(hole ? { class: "hole" } : {}) }));
    if (hole) one.append(svg("path", { d: `M${x + 2} ${y + tall - 3}L${x + cell - 3} ${y + 2}`, stroke: "#8b9099" }));
    holes ||= hole;
    if (numbers && !hole) {
      const plain = String(Number(found.toPrecision(2)));
      const words = signed(plain.length * 6.2 > cell - 4 ? found.toExponential(0) : plain);
      one.append(svg("text", { x: x + cell / 2, y: y + tall / 2 + 4, "text-anchor": "middle", fill: readable(fill) }, words));
    }
    drawing.append(one);
  }
  const y = bottom + 12, long = Math.min(160, wide - LEFT - 60), parts = 32;
  for (let i = 0; i < parts; i++) {
    const fill = colour((i + 0.5) / parts, scale.stops);
    drawing.append(svg("rect", { x: LEFT + (i * long) / parts, y, width: long / parts + 0.3, height: 9, fill }));
  }
  text(LEFT, y + 22, number(scale.low));
  text(LEFT + long, y + 22, number(scale.high), { "text-anchor": "end" });
  if (holes) text(LEFT + long + 12, y + 9, "crossed: not measured");
  for (const kind of ["ring", "ring inner"]) {
    drawing.append(svg("rect", { class: kind, width: cell - gap + 1, height: tall - gap + 1, x: -99, y: -99, fill: "none" }));
  }
  drawing.ring = (l, h) => {
    for (const [i, ring] of [...drawing.querySelectorAll(".ring")].entries()) {
      ring.setAttribute("x", LEFT + h * cell - 0.5 + 2 * i);
      ring.setAttribute("y", TOP + l * tall - 0.5 + 2 * i);
      ring.setAttribute("width", cell - gap + 1 - 4 * i);
      ring.setAttribute("height", tall - gap + 1 - 4 * i);
    }
  };
  return drawing;
};

// Saving: the drawing without its links, in fixed colours.
const still = (drawing) => {
  const copy = drawing.cloneNode(true);
  for (const ring of copy.querySelectorAll(".ring")) ring.remove();
  for (const node of copy.querySelectorAll("*")) node.removeAttribute("class");
  for (const link of copy.querySelectorAll("a")) {
    link.replaceWith(svg("g", {}, svg("title", {}, link.getAttribute("aria-label")), ...link.childNodes));
  }
  copy.removeAttribute("class");
  return new XMLSerializer().serializeToString(copy);
};
const download = (address, file) => html("a", { href: address, download: file }).click();
const saveAs = (drawing, file, kind) => {
  const address = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(still(drawing));
  if (kind === "svg") return download(address, `${file}.svg`);
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = html("canvas");
    [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    download(canvas.toDataURL("image/png"), `${file}.png`);
  });
  image.src = address;
};
