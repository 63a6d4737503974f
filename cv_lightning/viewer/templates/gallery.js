// The gallery: filters, tiles, and the state that the page's link keeps.
const PAGE = 24;
const OPERATORS = { min: (value, bound) => value >= bound, max: (value, bound) => value <= bound };
/** The page's trajectories with their group, task and store, and the values of the filters. */
const readItems = () => data.trajectories.map((trajectory, index) => {
  const group = data.groups[trajectory.group];
  const used = trajectory.turns.filter((turn) => turn.result);
  return {
    index, trajectory, group, task: group.task, store: data.stores[group.store],
    used: used.length > 0,
    failed: used.some((turn) => turn.result.status !== "ok") || trajectory.turns.some((turn) => turn.parseError),
    operations: used.flatMap((turn) => turn.result.operations.map((op) => op.name)),
    text: null,
  };
});
const codeText = (turn) => (turn.call ? data.codes[turn.call.code].map(([, text]) => text).join("") : "");
let all = readItems();
let found = [];
let shown = 0;

/** The searchable text of a trajectory, made on first use. */
function haystack(item) {
  item.text ??= [
    item.task.id, item.task.question, item.task.truth, item.trajectory.answer ?? "", item.trajectory.error,
    ...item.trajectory.turns.flatMap((turn) => [turn.text, codeText(turn), turn.response, turn.parseError]),
    ...item.operations,
  ].join("\n").toLowerCase();
  return item.text;
}

const verdictText = (trajectory) => (trajectory.correct === null ? "unscored" : trajectory.correct ? "right" : "wrong");

function verdictChip(trajectory) {
  const tone = { right: "good", wrong: "bad", unscored: "note" }[verdictText(trajectory)];
  const mark = { right: "✓", wrong: "✗", unscored: "?" }[verdictText(trajectory)];
  return make("span", { class: `chip ${tone}`, text: `${mark} ${verdictText(trajectory)}` });
}

function toolChip(trajectory) {
  if (trajectory.must === true) return make("span", { class: "chip good", text: "tool-use success" });
  if (trajectory.must === false) return make("span", { class: "chip", text: "no tool-use success" });
  return trajectory.spurious ? make("span", { class: "chip bad", text: "unnecessary rotation" }) : null;
}

/** The end state of a trajectory that did not end with an answer. */
function endChip({ end }) {
  return end === "answered" ? null : put("span", "chip note", `ended: ${words(end)}`);
}

function imageAlt(item, index) {
  const image = item.trajectory.images[index];
  if (image.parent === null) return `Image ${index}: the task's own, ${sizeText(image.size)} pixels`;
  const turn = item.trajectory.turns.find((candidate) => candidate.image === index);
  const made = turn?.result?.operations.map((op) => words(op.name)).join(", ") || "code";
  return `Image ${index}: made by ${made} from image ${image.parent}, ${sizeText(image.size)} pixels`;
}

/** The first images in a row, with arrows between them. */
function strip(item) {
  const { images } = item.trajectory;
  const nodes = images.slice(0, 4).flatMap((image, i) => [
    i ? make("span", { class: "then", "aria-hidden": "true", text: "→" }) : null,
    imageNode(image, imageAlt(item, i), item.store.folder),
  ]);
  return put("span", "strip", nodes, images.length > 4 ? put("span", "then", `+${images.length - 4}`) : null);
}

function operationChips(item) {
  if (item.operations.length) return item.operations.map((name) => put("span", "chip", words(name)));
  return [put("span", "q", item.used ? "no operation ran" : "no tool call")];
}

function tile(item) {
  const { trajectory, task, store, group } = item;
  const reward = trajectory.reward === null ? "" : `reward ${short(trajectory.reward)}`;
  const place = `${store.label}${group.iteration ? ` ${group.iteration}` : ""} · ${words(task.kind)}`;
  const open = { type: "button", class: "tile", "data-index": item.index, on: { click: () => openViewer(item.index) } };
  return make("li", {}, make("button", open,
    strip(item),
    put("span", "verdict",
      verdictChip(trajectory),
      make("b", { text: trajectory.answer ?? "no answer" }),
      put("span", "q", `truth ${task.truth}`),
      endChip(trajectory),
      toolChip(trajectory)),
    put("span", "ops", operationChips(item), item.failed ? put("span", "chip note", "a call failed") : null),
    put("span", "meta", make("span", { text: place }), make("span", { text: reward }))));
}

// ------------------------------------------------------------------ filters
const CONTROLS = [
  "search", "store", "outcome", "tool", "kind", "transform", "end", "iter-min", "iter-max", "component", "comp-min",
  "comp-max", "sort",
];
const control = (name) => byId(`f-${name}`);

function options(name, values, first, label = words) {
  const select = control(name);
  const chosen = select.value;
  const entries = values.map((value) => make("option", { value, text: label(value) }));
  select.replaceChildren(make("option", { value: "", text: first }), ...entries);
  if (chosen) select.value = chosen;
}

/** Fill the filters' options from the trajectories on the page. */
function fillFilters() {
  const unique = (values) => [...new Set(values)].sort();
  const storeText = ({ label, shown: some, total }) => `${label} (${some} of ${total})`;
  options("store", [...data.stores.keys()], "all", (i) => storeText(data.stores[i]));
  options("kind", unique(all.map((item) => item.task.kind)), "all");
  options("transform", [...unique(all.flatMap((item) => item.task.transforms)), "none"], "any");
  options("end", unique(all.map((item) => item.trajectory.end)), "any");
  options("component", unique(all.flatMap((item) => Object.keys(item.trajectory.components))), "total");
}

const TOOL_TESTS = {
  must: (item) => item.trajectory.must === true,
  missed: (item) => item.trajectory.must === false,
  used: (item) => item.used,
  unused: (item) => !item.used,
  failed: (item) => item.failed,
  spurious: (item) => item.trajectory.spurious,
};

function tests() {
  const value = Object.fromEntries(CONTROLS.map((name) => [name, control(name).value.trim()]));
  const list = [];
  const when = (name, test) => { if (value[name] !== "") list.push(test); };
  when("store", (item) => String(item.group.store) === value.store);
  when("outcome", (item) => verdictText(item.trajectory) === value.outcome);
  when("tool", TOOL_TESTS[value.tool]);
  when("kind", (item) => item.task.kind === value.kind);
  when("transform", ({ task }) =>
    (value.transform === "none" ? !task.transforms.length : task.transforms.includes(value.transform)));
  when("end", (item) => item.trajectory.end === value.end);
  for (const side of ["min", "max"]) {
    when(`iter-${side}`, (item) => OPERATORS[side](item.group.iteration, Number(value[`iter-${side}`])));
    when(`comp-${side}`, (item) => {
      const number = value.component ? item.trajectory.components[value.component] : item.trajectory.reward;
      return number !== null && number !== undefined && OPERATORS[side](number, Number(value[`comp-${side}`]));
    });
  }
  const terms = value.search.toLowerCase().split(/\s+/).filter(Boolean);
  if (terms.length) list.push((item) => terms.every((term) => haystack(item).includes(term)));
  return { list, sort: value.sort };
}

/** Questions that most sets share come first, kinds in turn, so that before and after are side by side. */
function togetherOrder() {
  const tasks = new Map();
  for (const item of all) {
    const entry = tasks.get(item.task.id) ?? { stores: new Set(), kind: item.task.kind, items: [] };
    entry.stores.add(item.group.store);
    entry.items.push(item);
    tasks.set(item.task.id, entry);
  }
  const seen = {};
  const ranked = [...tasks.values()].sort((a, b) => b.stores.size - a.stores.size);
  for (const entry of ranked) {
    const key = `${entry.stores.size}/${entry.kind}`;
    entry.turn = seen[key] = (seen[key] ?? -1) + 1;
  }
  ranked.sort((a, b) => b.stores.size - a.stores.size || a.turn - b.turn || b.kind.length - a.kind.length);
  return new Map(ranked.flatMap((entry) => entry.items).map((item, place) => [item, place]));
}
let together = null;

const SORT_DEFAULT = data.live ? "-iteration" : "together";
const SORT_KEYS = {
  iteration: (item) => item.group.iteration,
  together: (item) => (together ??= togetherOrder()).get(item),
  reward: (item) => item.trajectory.reward ?? -Infinity,
  advantage: (item) => item.trajectory.advantage ?? -Infinity,
  turns: (item) => item.trajectory.turns.length,
  tokens: (item) => item.trajectory.tokens[1],
};

/** Show the trajectories that pass the filters, at most `most` tiles. */
function applyFilters(most = PAGE) {
  const { list, sort } = tests();
  found = all.filter((item) => list.every((test) => test(item)));
  if (sort !== "run") {
    const sign = sort.startsWith("-") ? -1 : 1;
    const key = SORT_KEYS[sort.replace("-", "")];
    found = found.toSorted((a, b) => sign * (key(a) - key(b)));
  }
  byId("count").textContent = `${found.length} of ${all.length} trajectories`;
  shown = 0;
  byId("cards").replaceChildren();
  if (!found.length) byId("cards").append(make("li", { class: "empty", text: "Nothing matches these filters." }));
  showMore(most);
}

function showMore(count = PAGE) {
  const next = found.slice(shown, shown + count);
  byId("cards").append(...next.map(tile));
  shown += next.length;
  byId("more").hidden = shown >= found.length;
  byId("more").textContent = `Show ${Math.min(PAGE, found.length - shown)} more`;
}

function remember(extra = {}) {
  const values = CONTROLS.map((name) => [name, control(name).value]);
  const isSet = ([name, value]) => value && !(name === "sort" && value === SORT_DEFAULT);
  const state = new URLSearchParams(values.filter(isSet));
  for (const [name, value] of Object.entries(extra)) state.set(name, value);
  history.replaceState(null, "", state.size ? `#${state}` : "#trajectories");
}

function startGallery() {
  if (!byId("filters")) return;
  fillFilters();
  const state = new URLSearchParams(location.hash.slice(1));
  for (const name of CONTROLS) if (state.has(name)) control(name).value = state.get(name);
  let timer = 0;
  byId("filters").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { applyFilters(); remember(); }, 120);
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(() => { applyFilters(); remember(); }));
  byId("more").addEventListener("click", () => showMore());
  applyFilters();
  if (state.has("t") && all[Number(state.get("t"))]) openViewer(Number(state.get("t")));
}
