// The same tasks before and after training.

/** One trajectory in short: text, code, operations and image of each turn. */
function exampleColumn(item, title) {
  const turns = item.trajectory.turns.map((turn, i) => make("li", {},
    put("div", "turn-head", make("b", { text: `Turn ${i + 1}` }), make("span", { text: `${turn.tokens} tokens` })),
    spoken(turn),
    toolPart(item, turn, true)));
  const open = { type: "button", class: "quiet", text: "Open in full", "aria-label": `${title}: open in full` };
  return put("div", "example",
    make("h4", { text: title }),
    answerLine(item),
    put("ol", "turns", turns),
    make("button", { ...open, on: { click: () => openViewer(item.index) } }));
}

function exampleCard(example) {
  const [before, after] = [all[example.before], all[example.after]];
  const done = after.task.transforms.map(words).join(", ") || "nothing";
  const about = make("small", { text: `“${after.task.question}” Done to the image: ${done}.` });
  return put("article", "card",
    make("h3", { text: `${words(example.kind)} ` }, about),
    put("div", "example-grid",
      sourcePanel(after),
      exampleColumn(before, example.labels[0]),
      exampleColumn(after, example.labels[1])));
}

function startExamples() {
  byId("example-list")?.append(...data.examples.map(exampleCard));
}
