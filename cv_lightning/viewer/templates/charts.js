// Curves and interval charts, drawn at the width they get.
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3"];
const ABOVE = 20; // room of a plot for the unit, in pixels
const BELOW = 34; // and for ticks and the name of the axis
let smoothing = 0.6;

/** Round tick values between two numbers; whole ones for iterations and steps. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const steps = [1, 2, 2.5, 5, 10].map((m) => m * power).filter((s) => !whole || Number.isInteger(s));
  const step = steps.find((s) => s >= rough) ?? 1;
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-6);
  if (last === first && high > low && count < 12) return ticks(low, high, 2 * count, whole); // one value tells no scale
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

/** Tick labels with as many digits as tell neighbours apart. */
function tickLabels(values) {
  const step = values.length > 1 ? values[1] - values[0] : Math.abs(values[0]) || 1;
  const most = Math.max(...values.map(Math.abs));
  if (most >= 1e6 || most < 0.001) return values.map(short);
  const power = Math.floor(Math.log10(step) + 1e-9);
  const isQuarter = Math.abs(step / 10 ** power - 2.5) < 1e-6;
  const digits = Math.max(0, (isQuarter ? 1 : 0) - power);
  return values.map((value) => value.toFixed(Math.min(digits, 8)));
}

/** Exponential mean without the bias of its start. */
function smooth(values) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    sum = smoothing * sum + value;
    weight = smoothing * weight + 1;
    return sum / weight;
  });
}

/** Calls `paint` once the element has a width, and whenever that changes (not when painting changed its height). */
function whenWidthChanges(node, paint) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth === width) return;
    width = node.clientWidth;
    requestAnimationFrame(paint);
  }).observe(node);
}

function line(xs, ys, x, y) {
  return xs.map((value, i) => `${i ? "L" : "M"}${x(value).toFixed(1)} ${y(ys[i]).toFixed(1)}`).join("");
}

function sentence(chart) {
  return chart.series.map(({ name, y }) => {
    const range = `lowest ${short(Math.min(...y))}, highest ${short(Math.max(...y))}`;
    return `${name}: from ${short(y[0])} to ${short(y.at(-1))}, ${range}`;
  }).join("; ");
}

/** One chart with its caption, legend and read-out. */
function chartFigure(chart, height, axis) {
  const several = chart.series.length > 1;
  const captioned = !several || chart.captioned;
  const hidden = new Set();
  const label = `${chart.title || "chart"}, ${chart.unit} by ${axis}. ${sentence(chart)}`;
  const plot = make("svg:svg", { class: "plot", role: "img", tabindex: 0, "aria-label": label });
  const tip = make("div", { class: "tip", hidden: true });
  const last = chart.series[0];
  const now = several ? null : make("span", { text: short(last.y.at(-1)) });
  const caption = captioned && chart.title ? make("figcaption", {}, make("b", {}, breakable(chart.title)), now) : null;
  const figure = make("figure", {}, caption, plot, tip);
  const state = { plot, tip, chart, hidden, height, axis, at: null };
  if (several) figure.append(legend(chart, state));
  const moved = (event) => {
    const box = plot.getBoundingClientRect();
    state.at = state.inverse ? state.inverse(event.clientX - box.left) : null;
    draw(state);
  };
  plot.addEventListener("pointermove", moved);
  plot.addEventListener("pointerdown", moved);
  for (const name of ["pointerleave", "blur"]) plot.addEventListener(name, () => { state.at = null; draw(state); });
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const xs = last.x;
    const now = state.at === null ? (step > 0 ? -1 : xs.length) : nearest(xs, state.at);
    state.at = xs[Math.max(0, Math.min(xs.length - 1, now + step))];
    draw(state);
  });
  whenWidthChanges(plot, () => draw(state));
  figure.redraw = () => draw(state);
  return figure;
}

/** A metric's name that may be broken after its separators, and copies as it is. */
const breakable = (name) => name.split(/(?<=[/_])/).flatMap((part) => [part, make("wbr")]);

/** What each line is; a press hides it. */
function legend(chart, state) {
  const entry = (series, i) => {
    const toggle = (event) => {
      const isShown = state.hidden.delete(i) || !state.hidden.add(i);
      event.currentTarget.setAttribute("aria-pressed", String(isShown));
      draw(state);
    };
    const style = { class: `s${i}`, "stroke-dasharray": DASHES[i] || null };
    const sample = make("svg:line", { ...style, x1: 0, x2: 24, y1: 4, y2: 4 });
    return make("li", {}, make("button", { type: "button", "aria-pressed": "true", on: { click: toggle } },
      make("svg:svg", { viewBox: "0 0 24 8", "aria-hidden": "true" }, sample),
      make("span", { text: series.name })));
  };
  return put("ul", "legend", chart.series.map(entry));
}

const nearest = (xs, at) => xs.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(xs[best] - at) ? i : best), 0);

function draw(state) {
  const { plot, chart, hidden, height, axis } = state;
  const width = plot.clientWidth;
  if (!width) return;
  const shown = chart.series.map((series, i) => ({ ...series, i })).filter((series) => !hidden.has(series.i));
  const xs = chart.series.flatMap((series) => series.x);
  const ys = shown.flatMap((series) => series.y);
  let [low, high] = ys.length ? [Math.min(...ys), Math.max(...ys)] : [0, 1];
  if (low >= 0 && low < 0.4 * high) low = 0;
  if (high === low && chart.unit === "fraction") [low, high] = [0, 1];
  if (high === low) [low, high] = [low - (Math.abs(low) * 0.1 || 0.5), high + (Math.abs(high) * 0.1 || 0.5)];
  const yTicks = ticks(low, high, height > 180 ? 5 : 3);
  const yLabels = tickLabels(yTicks);
  const left = 12 + 6.4 * Math.max(...yLabels.map((label) => label.length));
  const [first, final] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => left + ((value - first) / (final - first || 1)) * (width - left - 14);
  const y = (value) => height - BELOW - ((value - low) / (high - low)) * (height - BELOW - ABOVE);
  state.inverse = (px) => first + ((px - left) / (width - left - 14)) * (final - first);
  plot.setAttribute("height", height);
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.replaceChildren(
    ...yTicks.flatMap((value, i) => [
      make("svg:line", { class: "grid", x1: left, x2: width - 8, y1: y(value), y2: y(value) }),
      make("svg:text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", text: yLabels[i] }),
    ]),
    ...ticks(first, final, Math.max(2, Math.floor(width / 110)), true).map((value) =>
      make("svg:text", { x: x(value), y: height - BELOW + 14, "text-anchor": "middle", text: short(value) })),
    make("svg:text", { class: "unit", x: 0, y: 10, text: chart.unit }),
    make("svg:text", { class: "unit", x: (left + width - 14) / 2, y: height - 3, "text-anchor": "middle", text: axis }),
    ...shown.flatMap((series) => curvePaths(series, x, y, chart.series.length > 1)),
    ...(state.at === null ? [] : [crossLine(x(state.at), height)]),
  );
  readout(state, shown, x, width);
}

const crossLine = (x, height) => make("svg:line", { class: "cross", x1: x, x2: x, y1: ABOVE, y2: height - BELOW });

function curvePaths(series, x, y, several) {
  const tone = `s${series.i}`;
  const style = { "stroke-dasharray": (several && DASHES[series.i]) || null };
  const raw = line(series.x, series.y, x, y);
  if (series.x.length === 1) {
    return [make("svg:circle", { class: `full ${tone}`, cx: x(series.x[0]), cy: y(series.y[0]), r: 3 })];
  }
  if (series.y.length < 8 || smoothing === 0) return [make("svg:path", { class: tone, d: raw, ...style })];
  return [
    make("svg:path", { class: `raw ${tone}`, d: raw }),
    make("svg:path", { class: tone, d: line(series.x, smooth(series.y), x, y), ...style }),
  ];
}

function readout(state, shown, x, width) {
  state.tip.hidden = state.at === null;
  if (state.at === null || !shown.length) return;
  const rows = shown.map((series) => {
    const i = nearest(series.x, state.at);
    return { name: series.name, value: series.y[i], step: series.x[i] };
  });
  state.tip.replaceChildren(
    make("b", { text: `${state.axis} ${short(rows[0].step)}` }),
    ...rows.map((row) => make("div", {}, make("span", { text: row.name }), make("span", { text: short(row.value) }))),
  );
  const right = x(state.at) > width / 2;
  state.tip.style.left = right ? "auto" : `${x(state.at) + 12}px`;
  state.tip.style.right = right ? `${width - x(state.at) + 12}px` : "auto";
}

// ------------------------------------------------------------------ learning curves
/** A heading, its large charts, a grid of small ones and a note; a folded one is drawn when it is opened. */
function curveGroup(group, axis) {
  const draws = () => {
    const big = group.charts.filter((chart) => chart.big);
    const small = group.charts.filter((chart) => !chart.big);
    return [
      ...big.map((chart) => chartFigure(chart, 285, axis)),
      small.length ? make("div", { class: "chart-grid" }, small.map((chart) => chartFigure(chart, 155, axis))) : null,
      group.note ? make("p", { class: "note", text: group.note }) : null,
    ].filter(Boolean);
  };
  if (!group.folded) {
    const heading = make("h3", { text: group.title });
    return make("div", { class: "chart-group" }, heading, draws());
  }
  const count = group.charts.length ? ` (${group.charts.length} chart${group.charts.length === 1 ? "" : "s"})` : "";
  const details = make("details", { class: "chart-group" }, make("summary", { text: group.title + count }));
  details.addEventListener("toggle", () => details.append(...draws()), { once: true });
  return details;
}

function showStage(stage) {
  for (const tab of byId("stages").children) {
    const chosen = tab.dataset.stage === stage;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
  const { groups, axis } = data.curves.find((entry) => entry.stage === stage);
  byId("charts").replaceChildren(...groups.map((group) => curveGroup(group, axis)));
}


function startCurves(chosen = null) {
  const stages = data.curves.map((entry) => entry.stage);
  if (!stages.length) return;
  const go = (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = stages[(stages.indexOf(event.target.dataset.stage) + step + stages.length) % stages.length];
    showStage(next);
    [...byId("stages").children].find((tab) => tab.dataset.stage === next).focus();
  };
  byId("stages").hidden = stages.length < 2;
  byId("stages").replaceChildren(...data.curves.map(({ stage, label }) => make("button", {
    type: "button", role: "tab", "data-stage": stage, "aria-controls": "charts", text: label,
    on: { click: () => showStage(stage), keydown: go },
  })));
  byId("smoothing").oninput = (event) => {
    smoothing = Number(event.target.value);
    byId("smoothing-value").textContent = smoothing;
    for (const figure of document.querySelectorAll("#charts figure, #compared figure")) figure.redraw();
  };
  const rolled = data.curves.find((entry) => entry.axis === "iteration")?.stage;
  showStage([chosen, rolled, stages[0]].find((stage) => stages.includes(stage)));
}

/** Trainings that an application compares, in the same charts. */
function startCompared() {
  byId("compared")?.append(...data.compared.map((chart) =>
    chartFigure({ ...chart, title: words(chart.title), captioned: true }, 215, "iteration")));
}
