// The live page of a run under way: asks the server for new data and draws it, keeping filters and focus.
const ASK_EVERY_MS = 2000;
const keyOf = ({ store, group, task, trajectory }) =>
  [store.name, group.iteration, task.id, trajectory.sample].join("\n");

function say(text) {
  if (byId("live").textContent !== text) byId("live").textContent = text;
}

/** Replace the data and draw it. */
function renew(fresh) {
  const focused = all[Number(document.activeElement?.dataset.index ?? -1)];
  const stage = document.querySelector("#stages [aria-selected=true]")?.dataset.stage;
  data = fresh;
  all = readItems();
  together = null;
  byId("lead").textContent = data.lead;
  if (byId("stored")) byId("stored").textContent = data.stored.join(" ");
  document.querySelectorAll(".parts .progress").forEach((cell, i) => { cell.textContent = data.progress[i]?.[0] || "–"; });
  byId("shown-count").textContent = data.trajectories.length.toLocaleString("en");
  byId("total-count").textContent = data.stores.reduce((sum, store) => sum + store.total, 0).toLocaleString("en");
  fillFilters();
  applyFilters(Math.max(shown, PAGE));
  if (current) current = all.find((item) => keyOf(item) === keyOf(current)) ?? current;
  const again = focused && all.find((item) => keyOf(item) === keyOf(focused));
  if (again) document.querySelector(`.tile[data-index="${again.index}"]`)?.focus({ preventScroll: true });
  if (stage) startCurves(stage);
}

async function ask() {
  const reply = await fetch(`data.json?have=${encodeURIComponent(data.state)}`);
  if (reply.status === 204) return;
  if (!reply.ok) throw new Error(await reply.text());
  const fresh = await reply.json();
  if (fresh.fixed === data.fixed) renew(fresh);
  else if (!viewer.open) location.reload(); // tables and headings are written by the server; the link keeps the filters
}

async function keepAsking() {
  try {
    if (!document.hidden) await ask();
    say("live");
  } catch (error) {
    say(`no longer live: ${error instanceof TypeError ? "the server has stopped" : error.message}`);
  }
  setTimeout(keepAsking, ASK_EVERY_MS);
}

function startLive() {
  if (data.live) keepAsking();
}
