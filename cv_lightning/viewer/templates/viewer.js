// One trajectory in full, and the group view that puts its siblings side by side.
const viewer = byId("viewer");

// ------------------------------------------------------------------ code
/** Code in its coloured pieces. */
const codePieces = (turn) => data.codes[turn.call.code].map(([tone, text]) => (tone ? put("span", tone, text) : text));
const codeBlock = (turn) => make("pre", { class: "code", tabindex: 0 }, codePieces(turn));

// ------------------------------------------------------------------ parts of a turn
const MARKS = ["think", "answer", "tool_call"].map((name) => `<${name}>[\\s\\S]*?(?:</${name}>|$)`).join("|");

/** What the model wrote, split at its marks; the tool call is shown as code below. */
function spoken(turn) {
  return turn.text.split(new RegExp(`(${MARKS})`)).filter((part) => part.trim()).map((part) => {
    if (part.startsWith("<think>")) return put("p", "think", part.replace(/<\/?think>/g, "").trim());
    if (part.startsWith("<answer>")) return put("p", "answer", `Answer: ${part.replace(/<\/?answer>/g, "").trim()}`);
    if (part.startsWith("<tool_call>") && turn.call) return null;
    return put("p", "said", part.trim());
  });
}

function operationLine(operation) {
  const values = Object.entries(operation.arguments).map(([name, value]) => `${name}=${value}`).join(", ");
  const [before, after] = operation.sizes;
  return make("li", {},
    put("span", "chip", words(operation.name)),
    make("code", { text: `${operation.call}(${values})` }),
    before && after ? put("span", "q", `${sizeText(before)} → ${sizeText(after)}`) : null,
    operation.used ? null : put("span", "chip note", "result not used"));
}

function resultPart(result, brief) {
  const tone = result.status === "ok" ? "good" : "bad";
  const effect = result.core.length ? ` net effect: ${result.core.map(words).join(", ")}.` : "";
  const how = result.executor ? `, ${result.executor}` : "";
  return [
    put("p", "label", "What really ran"),
    result.operations.length
      ? put("ul", "ran", result.operations.map(operationLine))
      : put("p", "note", "no image operation"),
    put("p", "note",
      put("span", `chip ${tone}`, result.status),
      result.error ? ` ${result.error}` : "",
      effect,
      brief ? null : ` ${(1000 * result.seconds).toFixed(1)} ms${how}`),
  ];
}

/** The call of a turn, what came of it and what the model was told; a brief one leaves times and words out. */
function toolPart(item, turn, brief = false) {
  const { result, call } = turn;
  const nodes = [];
  if (call) {
    nodes.push(put("p", "label", `Code, on image ${call.image}`));
    if (call.description) nodes.push(put("p", "think", call.description));
    nodes.push(codeBlock(turn));
  }
  if (turn.parseError) nodes.push(make("p", {}, put("span", "chip bad", "malformed call"), ` ${turn.parseError}`));
  if (result) nodes.push(...resultPart(result, brief));
  const shown = turn.images.filter((index) => item.trajectory.images[index]);
  if (shown.length) nodes.push(put("div", "tool-out", shown.flatMap((index) => imageFigures(item, index))));
  if (!brief && turn.response && turn.response !== result?.error) {
    nodes.push(put("p", "label", "The model was told"), put("p", "said", turn.response));
  }
  return nodes;
}

function imageFigures(item, index) {
  const image = item.trajectory.images[index];
  const same = image.model[0] === image.size[0] && image.model[1] === image.size[1];
  const caption = `image ${index}: ${sizeText(image.size)}${same ? "" : `, seen at ${sizeText(image.model)}`}`;
  const whole = linkedImage(image, imageAlt(item, index), item.store.folder);
  return [make("figure", {}, whole, make("figcaption", { text: caption })), seenFigure(image, item.store.folder)];
}

/** An image that the model saw much smaller than it is: at that size, enlarged without smoothing. */
function seenFigure(image, folder) {
  if (!image.seen || !(embedded(image.seen) || seenUrl(image, folder))) return null;
  const size = sizeText(image.model);
  const small = imageNode(image, `The same as the model saw it, ${size} pixels`, folder, image.seen);
  return put("figure", "seen", small, make("figcaption", { text: `what the model saw: ${size}` }));
}

function turnPanel(item, turn, number) {
  const [generate, tool] = turn.seconds;
  const cost = `${turn.tokens} tokens, ${short(generate)} s${turn.result ? `, tool ${short(tool)} s` : ""}`;
  const raw = make("pre", { tabindex: 0, text: turn.text });
  return put("li", "panel",
    put("div", "turn-head", make("b", { text: `Turn ${number + 1}` }), make("span", { text: cost })),
    spoken(turn),
    toolPart(item, turn),
    make("details", {}, make("summary", { text: "Raw text" }), raw));
}

// ------------------------------------------------------------------ the source image and what was looked at
function corners(to, [width, height]) {
  const frame = [[0, 0], [width, 0], [width, height], [0, height]];
  return frame.map(([x, y]) => [to[0] * x + to[1] * y + to[2], to[3] * x + to[4] * y + to[5]]);
}

function polygonArea(points) {
  return Math.abs(points.reduce((sum, [x, y], i) => {
    const [nextX, nextY] = points[(i + 1) % points.length];
    return sum + x * nextY - nextX * y;
  }, 0)) / 2;
}

/** Outlines in source pixels: the ground-truth box, and the part that each crop shows. */
function sourceMarks({ task, trajectory }) {
  const [width, height] = task.images[0].size;
  const marks = [];
  if (task.box) {
    const [x1, y1, x2, y2] = task.box;
    marks.push({ tone: "truth", text: "ground truth", points: [[x1, y1], [x2, y1], [x2, y2], [x1, y2]] });
  }
  trajectory.images.forEach((image, index) => {
    if (image.parent === null || image.source !== 0 || !image.toSource) return;
    const points = corners(image.toSource, image.size);
    if (polygonArea(points) > 0.98 * width * height) return;
    const colour = [0, 1, 3, 5, 6][marks.length % 5]; // no green: that is the truth's
    marks.push({ tone: `s${colour}`, text: `image ${index} shows this part`, points });
  });
  return marks;
}

function outline({ tone, points }) {
  const text = points.map((point) => point.join(",")).join(" ");
  return ["under", tone].map((name) => make("svg:polygon", { class: name, points: text }));
}

function markKey({ tone, text }) {
  const sample = make("svg:line", { class: tone, x1: 0, x2: 26, y1: 4, y2: 4 });
  return make("li", {}, make("svg:svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, sample), text);
}

/** The task's image with the ground-truth box and the parts that crops showed, in source pixels. */
function sourcePanel(item) {
  const { task, trajectory, store } = item;
  const image = task.images[0];
  if (!image) return null;
  const marks = sourceMarks(item);
  const names = marks.map((mark) => mark.text).join(", ");
  const alt = `The task's image, ${sizeText(image.size)} pixels${names ? `, marked: ${names}` : ""}`;
  const frame = { viewBox: `0 0 ${image.size.join(" ")}`, preserveAspectRatio: "none", "aria-hidden": "true" };
  const first = trajectory.images.find((candidate) => candidate.parent === null);
  return put("div", "panel",
    make("h3", { text: `Source image, ${sizeText(image.size)}` }),
    put("div", "source", imageNode(image, alt, store.folder), make("svg:svg", frame, marks.flatMap(outline))),
    put("ul", "keys", marks.map(markKey)),
    first ? seenFigure(first, store.folder) : null);
}

// ------------------------------------------------------------------ reward and facts
function bar(value, most) {
  const width = Math.min(1, Math.abs(value) / most) * 50;
  const tone = value < 0 ? "neg" : "pos";
  const x = value < 0 ? 50 - width : 50;
  return make("svg:svg", { class: "barbox", viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" },
    make("svg:rect", { class: tone, x, y: 2, width, height: 8 }),
    make("svg:line", { x1: 50, x2: 50, y1: 0, y2: 12, "vector-effect": "non-scaling-stroke" }));
}

function barRow([name, value], most) {
  return make("tr", { class: name === "total" ? "total" : null },
    make("th", { scope: "row", text: words(name) }),
    make("td", { text: short(value) }),
    make("td", {}, bar(value ?? 0, most)));
}

function rewardPanel(trajectory) {
  const heading = make("h3", { text: "Reward" });
  if (trajectory.reward === null) {
    return put("div", "panel", heading, put("p", "note", "Unscored: left out of its group."));
  }
  const rows = [...Object.entries(trajectory.components), ["total", trajectory.reward]];
  if (trajectory.advantage !== null) rows.push(["advantage", trajectory.advantage]);
  const most = Math.max(1, ...rows.map(([, value]) => Math.abs(value ?? 0)));
  return put("div", "panel", heading,
    put("table", "rewards components", make("tbody", {}, rows.map((row) => barRow(row, most)))),
    put("p", "note", `answer scored by ${trajectory.scoredBy}; components unweighted`));
}

function factsPanel({ trajectory, task, group }) {
  const [prompt, sampled, total] = trajectory.tokens;
  const facts = [
    ["task", task.id],
    ["kind", words(task.kind)],
    ["done to the image", task.transforms.map(words).join(", ") || "nothing"],
    ["end", words(trajectory.end)],
    ["tokens", `${prompt} prompt, ${sampled} sampled, ${total} in all`],
    ["mean log-probability", short(trajectory.logprob)],
    ["weights", `version ${trajectory.version}`],
    ["iteration", group.iteration],
    ["time", `${short(trajectory.seconds)} s`],
  ];
  if (trajectory.error) facts.push(["error", trajectory.error]);
  const rows = facts.map(([name, value]) =>
    make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: String(value) })));
  return put("div", "panel", make("h3", { text: "Facts" }), put("table", "rewards", make("tbody", {}, rows)));
}

// ------------------------------------------------------------------ siblings
const VERDICT_MARKS = { right: "✓", wrong: "✗", unscored: "?" };

function siblings(item) {
  const elsewhere = all.filter((other) => other.task.id === item.task.id && other.group !== item.group);
  const inGroup = item.group.members.map((index) => all[index]);
  const chip = (other, label) => make("button", {
    type: "button",
    "aria-current": other === item ? "true" : null,
    on: { click: () => showTrajectory(other.index) },
  }, `${label} ${VERDICT_MARKS[verdictText(other.trajectory)]}`);
  const member = (other) => {
    const { sample, advantage } = other.trajectory;
    return chip(other, `#${sample}${advantage === null ? "" : `, advantage ${short(advantage)}`}`);
  };
  const nodes = [];
  if (inGroup.length > 1) {
    const together = make("button", { type: "button", on: { click: () => showGroup(item) }, text: "Side by side" });
    nodes.push(make("h3", { text: "Its group" }), put("div", "siblings", inGroup.map(member), together));
  }
  if (elsewhere.length) {
    const chips = elsewhere.slice(0, 24).map((other) => chip(other, placeText(other)));
    nodes.push(make("h3", { text: "The same question elsewhere" }), put("div", "siblings", chips));
  }
  return nodes.length ? put("div", "panel", nodes) : null;
}

/** Where a trajectory comes from: its set, and the iteration of training. */
const placeText = ({ store, group }) => `${store.label}${group.iteration ? `, iteration ${group.iteration}` : ""}`;

function answerLine({ trajectory, task }) {
  return put("p", "verdict",
    verdictChip(trajectory),
    make("b", { text: trajectory.answer ?? "no answer" }),
    put("span", "q", `truth ${task.truth}`),
    endChip(trajectory),
    toolChip(trajectory));
}

function column(item) {
  const { trajectory } = item;
  const numbers = [["advantage", trajectory.advantage], ["reward", trajectory.reward]];
  const chain = trajectory.images.map((image, i) => imageNode(image, imageAlt(item, i), item.store.folder));
  const turns = trajectory.turns.map((turn) => make("li", {},
    turn.call ? make("code", {}, codePieces(turn)) : spoken(turn),
    turn.result && turn.result.status !== "ok" ? put("p", "note", turn.result.error) : null));
  const open = { type: "button", class: "quiet", text: "Open", "aria-label": `Open sample ${trajectory.sample}` };
  return put("div", "panel column",
    make("h3", { text: `Sample ${trajectory.sample}` }),
    answerLine(item),
    put("table", "rewards components", make("tbody", {}, numbers.map((row) => barRow(row, 2)))),
    put("div", "chain", chain),
    make("ol", {}, turns),
    make("button", { ...open, on: { click: () => showTrajectory(item.index) } }));
}

// ------------------------------------------------------------------ the dialog
function header(title, buttons) {
  const close = make("button", { type: "button", text: "Close", on: { click: () => viewer.close() } });
  return put("div", "v-head", make("h2", { id: "viewer-title", text: title }), put("div", "buttons", buttons, close));
}

const body = (label, ...children) =>
  make("div", { class: "v-body", tabindex: 0, role: "group", "aria-label": label }, ...children);

/** Replaces what the dialog shows; the keyboard stays on the button of the same name. */
function fill(...nodes) {
  const hadFocus = viewer.contains(document.activeElement) && document.activeElement.textContent;
  viewer.replaceChildren(...nodes);
  const buttons = [...viewer.querySelectorAll("button")];
  const again = buttons.find((button) => button.textContent === hadFocus && !button.disabled);
  (again ?? viewer.querySelector(".v-head button:last-child")).focus({ preventScroll: true });
}

let current = null;

function showTrajectory(index) {
  const item = all[index];
  const place = found.indexOf(item);
  current = item;
  const step = (by) => make("button", {
    type: "button",
    class: "quiet",
    text: by < 0 ? "← Previous" : "Next →",
    disabled: place < 0 || !found[place + by],
    on: { click: () => move(by) },
  });
  const question = put("p", "said", make("b", { text: item.task.question }));
  fill(
    header(`${placeText(item)}: ${words(item.task.kind)}`, [step(-1), step(1)]),
    body("Trajectory", put("div", "v-grid",
      put("div", "v-side", sourcePanel(item), rewardPanel(item.trajectory), factsPanel(item)),
      put("div", "stack",
        put("div", "panel", question, answerLine(item)),
        put("ol", "turns", item.trajectory.turns.map((turn, i) => turnPanel(item, turn, i))),
        siblings(item)))));
  remember({ t: index });
}

function showGroup(item) {
  const { task } = item;
  const members = item.group.members.map((index) => all[index]);
  const back = { type: "button", class: "quiet", text: "Back", on: { click: () => showTrajectory(item.index) } };
  const done = task.transforms.map(words).join(", ") || "nothing";
  const about = `${placeText(item)}; ${words(task.kind)}; truth ${task.truth}; done to the image: ${done}`;
  fill(
    header(`Group of ${members.length}: ${task.question}`, [make("button", back)]),
    body("Group", put("p", "lead", about), put("div", "side-by-side", members.map(column))));
}

function move(by) {
  const next = found[found.indexOf(current) + by];
  if (next) showTrajectory(next.index);
}

function openViewer(index) {
  viewer.showModal();
  showTrajectory(index);
}

viewer.addEventListener("close", () => remember());
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest("pre, input, .side-by-side")) return;
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by && viewer.querySelector(".v-grid")) { event.preventDefault(); move(by); }
});
