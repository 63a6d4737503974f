// One trajectory in full, and the group view that puts its siblings side by side.
const viewer = byId("viewer");

// ------------------------------------------------------------------ code
const PYTHON = /(#[^\n]*)|("""[\s\S]*?"""|'''[\s\S]*?'''|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|\b(False|None|True|and|as|break|class|continue|def|elif|else|except|finally|for|from|if|import|in|is|lambda|not|or|pass|raise|return|try|while|with)\b|\b(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\b|\b([A-Za-z_]\w*)(?=\s*\()/g;

/** Python with light highlighting. */
function codeBlock(code) {
  const block = make("pre", { class: "code", tabindex: 0 });
  let end = 0;
  for (const match of code.matchAll(PYTHON)) {
    const kind = ["com", "str", "k", "num", "fn"][match.slice(1).findIndex((part) => part !== undefined)];
    block.append(code.slice(end, match.index), make("span", { class: kind, text: match[0] }));
    end = match.index + match[0].length;
  }
  block.append(code.slice(end));
  return block;
}

// ------------------------------------------------------------------ parts of a turn
/** What the model wrote, split at its marks; the tool call is shown as code below. */
function spoken(turn) {
  const parts = turn.text.split(/(<think>[\s\S]*?(?:<\/think>|$)|<answer>[\s\S]*?(?:<\/answer>|$)|<tool_call>[\s\S]*?(?:<\/tool_call>|$))/);
  return parts.filter((part) => part.trim()).map((part) => {
    if (part.startsWith("<think>")) return make("p", { class: "think", text: part.replace(/<\/?think>/g, "").trim() });
    if (part.startsWith("<answer>")) return make("p", { class: "answer", text: `Answer: ${part.replace(/<\/?answer>/g, "").trim()}` });
    if (part.startsWith("<tool_call>") && turn.call) return null;
    return make("p", { class: "said", text: part.trim() });
  });
}

function operationLine(operation) {
  const values = Object.entries(operation.arguments).map(([name, value]) => `${name}=${value}`).join(", ");
  const [before, after] = operation.sizes;
  return make("li", {}, make("span", { class: "chip", text: words(operation.name) }), make("code", { text: `${operation.call}(${values})` }),
    before && after ? make("span", { class: "q", text: `${sizeText(before)} → ${sizeText(after)}` }) : null,
    operation.used ? null : make("span", { class: "chip note", text: "result not used" }));
}

function toolPart(item, turn, brief = false) {
  const { result, call } = turn;
  const nodes = [];
  if (call) {
    nodes.push(make("p", { class: "label", text: `Code, on image ${call.image}` }), call.description ? make("p", { class: "think", text: call.description }) : null, codeBlock(call.code));
  }
  if (turn.parseError) nodes.push(make("p", {}, make("span", { class: "chip bad", text: "malformed call" }), ` ${turn.parseError}`));
  if (result) {
    const good = result.status === "ok";
    nodes.push(make("p", { class: "label", text: "What really ran" }),
      result.operations.length ? make("ul", { class: "ran" }, result.operations.map(operationLine)) : make("p", { class: "note", text: "no image operation" }),
      make("p", { class: "note" }, make("span", { class: `chip ${good ? "good" : "bad"}`, text: result.status }), result.error ? ` ${result.error}` : "",
        result.core.length ? ` net effect: ${result.core.map(words).join(", ")}.` : "",
        brief ? null : ` ${(1000 * result.seconds).toFixed(1)} ms${result.tier ? `, ${result.tier}` : ""}`));
  }
  if (turn.image !== null && item.trajectory.images[turn.image]) nodes.push(make("div", { class: "tool-out" }, imageFigure(item, turn.image)));
  if (!brief && turn.response && turn.response !== result?.error) nodes.push(make("p", { class: "label", text: "The model was told" }), make("p", { class: "said", text: turn.response }));
  return nodes;
}

function imageFigure(item, index) {
  const image = item.trajectory.images[index];
  const same = image.model[0] === image.size[0] && image.model[1] === image.size[1];
  const caption = `image ${index}: ${sizeText(image.size)}${same ? "" : `, seen at ${sizeText(image.model)}`}`;
  const whole = make("figure", {}, linkedPicture(image, imageAlt(item, index), item.store.folder), make("figcaption", { text: caption }));
  return [whole, seenFigure(image)];
}

/** A picture that the model saw much smaller than it is, at that size and enlarged without smoothing. */
function seenFigure(image) {
  if (!image.seen || !embedded(image.seen)) return null;
  const small = picture({ file: image.seen, size: image.model }, `The same as the model saw it, ${sizeText(image.model)} pixels`);
  return make("figure", { class: "seen" }, small, make("figcaption", { text: `what the model saw: ${sizeText(image.model)}` }));
}

function turnPanel(item, turn, number) {
  const [generate, tool] = turn.seconds;
  return make("li", { class: "panel" },
    make("div", { class: "turn-head" }, make("b", { text: `Turn ${number + 1}` }), make("span", { text: `${turn.tokens} tokens, ${short(generate)} s${turn.result ? `, tool ${short(tool)} s` : ""}` })),
    spoken(turn), toolPart(item, turn),
    make("details", {}, make("summary", { text: "Raw text" }), make("pre", { tabindex: 0, text: turn.text })));
}

// ------------------------------------------------------------------ the source image and what was looked at
const corners = (to, [w, h]) => [[0, 0], [w, 0], [w, h], [0, h]].map(([x, y]) => [to[0] * x + to[1] * y + to[2], to[3] * x + to[4] * y + to[5]]);

function polygonArea(points) {
  return Math.abs(points.reduce((sum, [x, y], i) => {
    const [nextX, nextY] = points[(i + 1) % points.length];
    return sum + x * nextY - nextX * y;
  }, 0)) / 2;
}

/** The task's image with the ground-truth box and the parts that crops showed, in source pixels. */
function sourcePanel(item) {
  const { task, trajectory, store } = item;
  const image = task.images[0];
  if (!image) return null;
  const [width, height] = image.size;
  const marks = [];
  if (task.box) {
    const [x1, y1, x2, y2] = task.box;
    marks.push({ tone: "truth", dash: null, text: "ground truth", points: [[x1, y1], [x2, y1], [x2, y2], [x1, y2]] });
  }
  trajectory.images.forEach((derived, index) => {
    if (derived.parent === null || derived.source !== 0 || !derived.toSource) return;
    const points = corners(derived.toSource, derived.size);
    if (polygonArea(points) > 0.98 * width * height) return;
    marks.push({ tone: `s${marks.length % 8 === 2 ? 3 : marks.length % 8}`, text: `image ${index} shows this part`, points });
  });
  const overlay = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    marks.flatMap((mark) => ["under", mark.tone].map((tone) => make("svg:polygon", { class: tone, points: mark.points.map((point) => point.join(",")).join(" ") }))));
  const alt = `The task's image, ${sizeText(image.size)} pixels${marks.length ? `, marked: ${marks.map((mark) => mark.text).join(", ")}` : ""}`;
  const first = trajectory.images.find((candidate) => candidate.parent === null);
  return make("div", { class: "panel" }, make("h3", { text: `Source image, ${sizeText(image.size)}` }),
    embedded(image.file) ? make("div", { class: "source" }, picture(image, alt), overlay) : linkedPicture(image, alt, store.folder),
    make("ul", { class: "keys" }, marks.map((mark) => make("li", {}, make("svg:svg", { viewBox: "0 0 26 8", "aria-hidden": "true" }, make("svg:line", { class: mark.tone, x1: 0, x2: 26, y1: 4, y2: 4 })), mark.text))),
    first ? seenFigure(first) : null);
}

function bar(value, most) {
  const width = Math.min(1, Math.abs(value) / most) * 50;
  return make("svg:svg", { class: "barbox", viewBox: "0 0 100 12", preserveAspectRatio: "none", "aria-hidden": "true" },
    make("svg:rect", { class: value < 0 ? "neg" : "pos", x: value < 0 ? 50 - width : 50, y: 2, width, height: 8 }), make("svg:line", { x1: 50, x2: 50, y1: 0, y2: 12, "vector-effect": "non-scaling-stroke" }));
}

function rewardPanel(trajectory) {
  if (trajectory.reward === null) return make("div", { class: "panel" }, make("h3", { text: "Reward" }), make("p", { class: "note", text: "Unscored: left out of its group." }));
  const rows = [...Object.entries(trajectory.components), ["total", trajectory.reward]];
  if (trajectory.advantage !== null) rows.push(["advantage", trajectory.advantage]);
  const most = Math.max(1, ...rows.map(([, value]) => Math.abs(value ?? 0)));
  return make("div", { class: "panel" }, make("h3", { text: "Reward" }), make("table", { class: "rewards components" }, make("tbody", {}, rows.map(([name, value]) =>
    make("tr", { class: name === "total" ? "total" : null }, make("th", { scope: "row", text: words(name) }), make("td", { text: short(value) }), make("td", {}, bar(value ?? 0, most)))))),
  make("p", { class: "note", text: `answer scored by ${trajectory.scoredBy}; components unweighted` }));
}

function factsPanel(item) {
  const { trajectory, task, group } = item;
  const [prompt, sampled, total] = trajectory.tokens;
  const facts = [
    ["task", task.id], ["kind", words(task.kind)], ["done to the image", task.transforms.map(words).join(", ") || "nothing"], ["end", words(trajectory.end)],
    ["tokens", `${prompt} prompt, ${sampled} sampled, ${total} in all`], ["mean log-probability", short(trajectory.logprob)],
    ["weights", `version ${trajectory.version}`], ["iteration", group.iteration], ["time", `${short(trajectory.seconds)} s`],
  ];
  if (trajectory.error) facts.push(["error", trajectory.error]);
  return make("div", { class: "panel" }, make("h3", { text: "Facts" }), make("table", { class: "rewards" }, make("tbody", {}, facts.map(([name, value]) => make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: String(value) }))))));
}

// ------------------------------------------------------------------ siblings
function siblings(item) {
  const elsewhere = all.filter((other) => other.task.id === item.task.id && other.group !== item.group);
  const inGroup = item.group.members.map((index) => all[index]);
  const chip = (other, label) => make("button", { type: "button", "aria-current": other === item ? "true" : null, on: { click: () => showTrajectory(other.index) } },
    `${label} ${{ right: "✓", wrong: "✗", unscored: "?" }[verdictText(other.trajectory)]}`);
  const nodes = [];
  if (inGroup.length > 1) {
    nodes.push(make("h3", { text: "Its group" }), make("div", { class: "siblings" }, inGroup.map((other) => chip(other, `#${other.trajectory.sample}${other.trajectory.advantage === null ? "" : `, advantage ${short(other.trajectory.advantage)}`}`)),
      make("button", { type: "button", on: { click: () => showGroup(item) }, text: "Side by side" })));
  }
  if (elsewhere.length) nodes.push(make("h3", { text: "The same question elsewhere" }), make("div", { class: "siblings" }, elsewhere.slice(0, 24).map((other) => chip(other, `${other.store.label}${other.group.iteration ? ` ${other.group.iteration}` : ""}`))));
  return nodes.length ? make("div", { class: "panel" }, nodes) : null;
}

function column(item) {
  const { trajectory } = item;
  return make("div", { class: "panel column" },
    make("h3", { text: `Sample ${trajectory.sample}` }),
    make("p", { class: "verdict" }, verdictChip(trajectory), make("b", { text: trajectory.answer ?? "no answer" }), toolChip(trajectory)),
    make("table", { class: "rewards components" }, make("tbody", {}, [["advantage", trajectory.advantage], ["reward", trajectory.reward]].map(([name, value]) =>
      make("tr", {}, make("th", { scope: "row", text: name }), make("td", { text: short(value) }), make("td", {}, bar(value ?? 0, 2)))))),
    make("div", { class: "chain" }, trajectory.images.map((image, i) => (embedded(image.file) ? picture(image, imageAlt(item, i)) : null))),
    make("ol", {}, trajectory.turns.map((turn) => make("li", {}, turn.call ? make("code", { text: turn.call.code }) : spoken(turn), turn.result && turn.result.status !== "ok" ? make("p", { class: "note", text: turn.result.error }) : null))),
    make("button", { type: "button", class: "quiet", text: "Open", "aria-label": `Open sample ${trajectory.sample}`, on: { click: () => showTrajectory(item.index) } }));
}

// ------------------------------------------------------------------ before and after
/** One trajectory in short, for the page itself: what was said, the code, what ran, the image, turn by turn. */
function exampleColumn(item, title) {
  const { trajectory } = item;
  const turns = trajectory.turns.map((turn, i) => make("li", {},
    make("div", { class: "turn-head" }, make("b", { text: `Turn ${i + 1}` }), make("span", { text: `${turn.tokens} tokens` })),
    spoken(turn), toolPart(item, turn, true)));
  const open = { type: "button", class: "quiet", text: "Open in full", "aria-label": `${title}: open in full` };
  return make("div", { class: "example" },
    make("h4", { text: title }),
    make("p", { class: "verdict" }, verdictChip(trajectory), make("b", { text: trajectory.answer ?? "no answer" }),
      make("span", { class: "q", text: `truth ${item.task.truth}` }), toolChip(trajectory)),
    make("ol", { class: "turns" }, turns),
    make("button", { ...open, on: { click: () => openViewer(item.index) } }));
}

function startExamples() {
  byId("example-list")?.append(...data.examples.map((example) => {
    const [before, after] = [all[example.before], all[example.after]];
    const done = after.task.transforms.map(words).join(", ") || "nothing";
    return make("article", { class: "card" },
      make("h3", { text: `${words(example.kind)} ` }, make("small", { text: `“${after.task.question}” Done to the image: ${done}.` })),
      make("div", { class: "example-grid" }, sourcePanel(after), exampleColumn(before, "After SFT"), exampleColumn(after, "After RL")));
  }));
}

// ------------------------------------------------------------------ the dialog
function header(title, buttons) {
  return make("div", { class: "v-head" }, make("h2", { id: "viewer-title", text: title }), make("div", { class: "buttons" }, buttons,
    make("button", { type: "button", text: "Close", on: { click: () => viewer.close() } })));
}

function fill(...nodes) {
  const hadFocus = viewer.contains(document.activeElement) && document.activeElement.textContent;
  viewer.replaceChildren(...nodes);
  const again = [...viewer.querySelectorAll("button")].find((button) => button.textContent === hadFocus && !button.disabled);
  (again ?? viewer.querySelector(".v-head button:last-child")).focus({ preventScroll: true });
}

let current = null;

function showTrajectory(index) {
  const item = all[index];
  current = item;
  const place = found.indexOf(item);
  const step = (by) => make("button", { type: "button", class: "quiet", text: by < 0 ? "← Previous" : "Next →", disabled: place < 0 || !found[place + by], on: { click: () => move(by) } });
  fill(
    header(`${item.store.label}${item.group.iteration ? `, iteration ${item.group.iteration}` : ""}: ${words(item.task.kind)}`, [step(-1), step(1)]),
    make("div", { class: "v-body", tabindex: 0, role: "group", "aria-label": "Trajectory" }, make("div", { class: "v-grid" },
      make("div", { class: "v-side" }, sourcePanel(item), rewardPanel(item.trajectory), factsPanel(item)),
      make("div", { class: "stack" }, make("div", { class: "panel" }, make("p", { class: "said" }, make("b", { text: item.task.question })),
        make("p", { class: "verdict" }, verdictChip(item.trajectory), make("span", {}, "answered ", make("b", { text: item.trajectory.answer ?? "nothing" })), make("span", { class: "q", text: `truth ${item.task.truth}` }), toolChip(item.trajectory))),
      make("ol", { class: "turns" }, item.trajectory.turns.map((turn, i) => turnPanel(item, turn, i))), siblings(item)))));
  remember({ t: index });
}

function showGroup(item) {
  const members = item.group.members.map((index) => all[index]);
  fill(
    header(`Group of ${members.length}: ${item.task.question}`, [make("button", { type: "button", class: "quiet", text: "Back", on: { click: () => showTrajectory(item.index) } })]),
    make("div", { class: "v-body", tabindex: 0, role: "group", "aria-label": "Group" },
      make("p", { class: "lead", text: `${item.store.label}${item.group.iteration ? `, iteration ${item.group.iteration}` : ""}; ${words(item.task.kind)}; truth ${item.task.truth}; done to the image: ${item.task.transforms.map(words).join(", ") || "nothing"}` }),
      make("div", { class: "side-by-side" }, members.map(column))));
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

startIntervals();
startCurves();
startCompared();
startExamples();
startGallery();
