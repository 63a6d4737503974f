// Rates with their 95 % intervals, by kind of task and evaluation.
const VALUE_TICKS = [0, 0.25, 0.5, 0.75, 1];

/** One evaluation of one kind of task: name, interval and value. */
function intervalRow(row, tone, middle, x, width) {
  const [value, low, high, n] = row.rate;
  const mark = { class: `${row.off ? "hollow" : "full"} ${tone}`, cx: x(value), cy: middle, r: 4.5 };
  const text = `${row.label}: ${short(value)} (${short(low)} to ${short(high)}), n = ${n}`;
  return [
    make("svg:text", { x: 10, y: middle + 4, text: row.label }),
    make("svg:line", { class: "grid", x1: x(0), x2: x(1), y1: middle, y2: middle }),
    make("svg:line", { class: tone, "stroke-width": 2, x1: x(low), x2: x(high), y1: middle, y2: middle }),
    make("svg:circle", mark, make("svg:title", { text })),
    make("svg:text", { x: width, y: middle + 4, "text-anchor": "end", text: value.toFixed(2) }),
  ];
}

function paintIntervals(plot, rows, order) {
  const width = plot.clientWidth;
  if (!width) return;
  const left = Math.min(150, 20 + 6.3 * Math.max(...rows.map((row) => row.label.length)));
  const x = (value) => left + value * (width - left - 46);
  const nodes = [];
  let top = 4;
  for (const kind of new Set(rows.map((row) => row.kind))) {
    nodes.push(make("svg:text", { class: "kind", x: 0, y: top + 12, text: words(kind) }));
    top += 19;
    for (const row of rows.filter((candidate) => candidate.kind === kind)) {
      nodes.push(...intervalRow(row, `s${order.indexOf(row.stage) % 8}`, top + 7, x, width));
      top += 18;
    }
    top += 8;
  }
  nodes.push(...VALUE_TICKS.map((value) =>
    make("svg:text", { x: x(value), y: top + 8, "text-anchor": "middle", text: value })));
  plot.setAttribute("height", top + 14);
  plot.setAttribute("viewBox", `0 0 ${width} ${top + 14}`);
  plot.replaceChildren(...nodes);
}

function intervalChart(rows, title, order) {
  const told = rows.map((row) => {
    const [value, low, high] = row.rate.map(short);
    return `${words(row.kind)}, ${row.label}: ${value}, 95 % ${low} to ${high}`;
  });
  const plot = make("svg:svg", { class: "plot", role: "img", "aria-label": `${title}. ${told.join("; ")}` });
  whenWidthChanges(plot, () => paintIntervals(plot, rows, order));
  return make("div", {}, make("h4", { text: `${title} ` }, make("small", { text: "fraction, 95 % interval" })), plot);
}

function startIntervals() {
  const place = byId("intervals");
  if (!place) return;
  const modes = [...new Set(data.intervals.map((row) => row.mode))];
  const stages = [...new Set(data.intervals.map((row) => row.stage))];
  const order = stages.reverse(); // the last stage gets the first colour
  const show = (mode) => {
    const chart = (metric, title) => {
      const rows = data.intervals.filter((row) => row.mode === mode && row.metric === metric);
      return rows.length ? intervalChart(rows, title, order) : "";
    };
    place.replaceChildren(chart("accuracy", "Accuracy"), chart("tool_use_success", "Tool-use success"));
  };
  if (modes.length > 1) {
    const choose = (event) => {
      for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab === event.currentTarget));
      show(event.currentTarget.dataset.mode ?? "");
    };
    const tabs = make("div", { class: "tabs", role: "group", "aria-label": "Decoding" }, modes.map((mode) =>
      make("button", {
        type: "button",
        text: mode || "other",
        "data-mode": mode || null,
        "aria-pressed": String(mode === modes[0]),
        on: { click: choose },
      })));
    place.before(put("div", "controls", tabs));
  }
  show(modes[0]);
}
